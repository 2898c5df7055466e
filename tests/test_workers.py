import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import multiprocessing, os, sys, time
from xrai.workers import start_pool

def begin(text):
    os.environ["BEGUN"] = text

def who():
    return os.getpid(), os.environ["BEGUN"]

if __name__ == "__main__":
    with start_pool(1, multiprocessing.get_context(sys.argv[1]), begin, "yes") as pool:
        print(*pool.submit(who).result(), flush=True)
        sys.stdin.read()
"""


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for_end(process: int) -> None:
    deadline = time.monotonic() + 60
    while is_alive(process):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_worker_ends_with_its_killed_parent_and_ignores_interrupts(
    method: str, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with subprocess.Popen(
        [sys.executable, str(program), method],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        text=True,
    ) as parent:
        assert parent.stdout is not None
        process, begun = parent.stdout.readline().split()
        worker = int(process)
        assert begun == "yes"
        assert "SIGINT" in ignored_signals(worker)
        assert is_alive(worker)
        parent.kill()
    wait_for_end(worker)


def ignored_signals(process: int) -> set[str]:
    status = Path(f"/proc/{process}/status").read_text().splitlines()
    (mask,) = (int(line.split()[1], 16) for line in status if line.startswith("SigIgn:"))
    return {known.name for known in signal.Signals if mask >> (known - 1) & 1}


STUBBORN = """
import os, signal, subprocess, sys, time
from xrai.workers import follow_parent

if sys.argv[1:] == ["child"]:
    signal.signal(signal.SIGTERM, lambda *_: print("asked to stop", flush=True))
    follow_parent(grace_s=0.2)
    print(os.getpid(), flush=True)
    while True:
        time.sleep(60)
else:
    subprocess.run([sys.executable, __file__, "child"])
"""


def said_after_its_parent(code: str, folder: Path) -> str:
    """What the child of a program says from the kill of its parent until it has ended, too."""
    program = folder / "program.py"
    program.write_text(code)
    with subprocess.Popen(
        [sys.executable, str(program)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        text=True,
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
        said = parent.stdout.read()
    wait_for_end(child)
    return said


def test_a_process_that_follows_its_parent_is_asked_to_stop_and_then_ended(tmp_path: Path) -> None:
    assert said_after_its_parent(STUBBORN, tmp_path) == "asked to stop\n"


LATE = """
import os, subprocess, sys, time
import xrai

if sys.argv[1:] == ["child"]:
    print(os.getpid(), flush=True)
    while os.getppid() == xrai.parent_at_start():
        time.sleep(0.01)  # as long as it takes to load torch
    from xrai.errors import StoppedError
    from xrai.workers import follow_parent
    try:
        follow_parent(grace_s=1000)
    except StoppedError as error:
        print(error, flush=True)
else:
    subprocess.run([sys.executable, __file__, "child"])
"""


def test_a_process_whose_parent_ends_while_it_starts_ends_too(tmp_path: Path) -> None:
    said = said_after_its_parent(LATE, tmp_path)
    assert said == "the process that started this one has ended\n"


def test_a_forked_process_follows_the_one_that_forked_it() -> None:
    code = (
        "import os, sys, xrai\n"
        "own, child = os.getpid(), os.fork()\n"
        "if child == 0:\n"
        "    os._exit(xrai.parent_at_start() != own)\n"
        "sys.exit(os.waitpid(child, 0)[1])"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
