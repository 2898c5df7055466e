"""Training under real signals, kills and hangs, through the real commands."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from tests import zygote
from tests.distributed.ranks import finish_ranks, free_port, start_ranks
from tests.training import SMALL, TORCHRUN, make_dataset
from xrai.learning.checkpoint import CheckpointFolder
from xrai.store import LEASE_KEY, open_store

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(240)]

OPTIONS = [*SMALL, "--train.epochs=3", "--checkpoint.every=1"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("faults"), num_images=240)


@pytest.fixture(scope="module")
def whole(dataset: Path) -> dict[str, torch.Tensor]:
    """The weights that a run of one process ends with when nothing disturbs it."""
    finish(start(dataset, "whole"))
    return weights(dataset, "whole")


@dataclass
class Started:
    process: zygote.Process
    log: Path

    def ended(self, *, timeout_s: float = 90) -> str:
        """What it wrote, when it has ended; nothing of it is left after that."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"still running after {timeout_s} s:\n{self.log.read_text()}"
            ) from None
        finally:
            self.kill_all()
        return self.log.read_text()

    def kill_all(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)


def start(
    dataset: Path,
    run_id: str,
    *options: str,
    launcher: Sequence[str] = (),
    program: tuple[str, ...] = (),
) -> Started:
    """`xrai.train` by its own process or by `launcher`; in its own with empty figures."""
    program = program or (("-m", "xrai.train") if launcher else ("tests/undrawn.py",))
    command = [*launcher, *program, f"--dataset={dataset}", f"--run_id={run_id}"]
    command += [f"--artifacts={dataset.parent}/submit", *OPTIONS, *options]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    log = dataset.parent / f"{run_id}-{time.monotonic_ns()}.log"
    with log.open("w") as file:
        return Started(zygote.start(command, environment=environment, output=file), log)


def folder_of(dataset: Path, run_id: str) -> Path:
    return dataset.parent / "submit" / run_id


def weights(dataset: Path, run_id: str) -> dict[str, torch.Tensor]:
    content = torch.load(folder_of(dataset, run_id) / "model.pt", weights_only=True)
    found: dict[str, torch.Tensor] = content["weights"]
    return found


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def last_step(dataset: Path, run_id: str) -> int:
    try:
        return int(
            json.loads((folder_of(dataset, run_id) / "checkpoints/latest.json").read_text())["step"]
        )
    except (OSError, ValueError):
        return 0


def wait_for_step(started: Started, dataset: Path, run_id: str, step: int) -> None:
    deadline = time.monotonic() + 90
    while last_step(dataset, run_id) < step:
        assert started.process.poll() is None, started.ended()
        assert time.monotonic() < deadline, f"no step {step} after 90 s"
        time.sleep(0.01)


def wait_for_text(started: Started, text: str) -> None:
    deadline = time.monotonic() + 90
    while text not in started.log.read_text():
        assert started.process.poll() is None, started.ended()
        assert time.monotonic() < deadline, f"it did not say {text!r} in 90 s"
        time.sleep(0.05)


def goes_on(started: Started) -> None:
    """It trains from where it was; that is enough, and it is asked to stop."""
    wait_for_text(started, "going on after step")
    started.process.terminate()
    started.ended()


def workers_of(started: Started) -> list[psutil.Process]:
    """The ranks that a torchrun agent started, by rank."""
    children = [
        child
        for child in psutil.Process(started.process.pid).children()
        if "--dataset=" in " ".join(child.cmdline())
    ]
    return sorted(children, key=lambda child: int(child.environ()["RANK"]))


def finish(started: Started) -> str:
    text = started.ended()
    assert started.process.returncode == 0, text
    return text


@pytest.mark.parametrize(
    ("num_kills", "kind"),
    [(1, signal.SIGTERM), pytest.param(4, signal.SIGINT, marks=pytest.mark.ci)],
)
def test_a_process_killed_and_then_asked_to_stop_goes_on_each_time_and_ends_bit_for_bit_the_same(
    dataset: Path, whole: dict[str, torch.Tensor], num_kills: int, kind: signal.Signals
) -> None:
    run_id = f"killed-{num_kills}"
    generator = random.Random(num_kills)
    for _ in range(num_kills):
        started = start(dataset, run_id)
        step = min(last_step(dataset, run_id) + generator.randint(2, 5), 20)
        wait_for_step(started, dataset, run_id, step)
        time.sleep(generator.uniform(0, 0.05))  # somewhere within a step
        started.kill_all()
    stopped = start(dataset, run_id, "--resume=must")
    wait_for_step(stopped, dataset, run_id, last_step(dataset, run_id) + 2)
    stopped.process.send_signal(kind)
    text = stopped.ended()
    assert stopped.process.returncode == 143, text
    said = re.search(
        r"xrai: stopped as asked after step (\d+) .*start again with the same --run_id", text
    )
    assert said and int(said[1]) == last_step(dataset, run_id)
    assert "Traceback" not in text
    finish(start(dataset, run_id, "--resume=must"))
    assert same(weights(dataset, run_id), whole)
    history = (folder_of(dataset, run_id) / "history.csv").read_text().splitlines()
    undisturbed = (folder_of(dataset, "whole") / "history.csv").read_text().splitlines()
    assert len(history) == len(undisturbed) == 4
    for ours, theirs in zip(history[1:], undisturbed[1:], strict=True):
        assert (
            ours.split(",")[:9] == theirs.split(",")[:9]
        )  # epoch, step, losses, accuracies, AUROC


@pytest.mark.ci
def test_of_two_trainings_of_one_run_the_second_is_refused_and_the_first_is_not_disturbed(
    dataset: Path, whole: dict[str, torch.Tensor]
) -> None:
    first = start(dataset, "twice")
    wait_for_step(first, dataset, "twice", 3)
    second = start(dataset, "twice")
    text = second.ended()
    assert second.process.returncode == 2, text
    assert f"is being written by process {first.process.pid} on" in text
    finish(first)
    assert same(weights(dataset, "twice"), whole)
    assert not (folder_of(dataset, "twice") / LEASE_KEY).exists()


@pytest.mark.ci
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_at_one_step(dataset: Path, rank: int) -> None:
    run_id = f"signal-to-{rank}"
    started = start(dataset, run_id, launcher=TORCHRUN)
    wait_for_step(started, dataset, run_id, 5)
    workers_of(started)[rank].send_signal(signal.SIGTERM)
    stopped_at_one_step(started, dataset, run_id)
    goes_on(start(dataset, run_id, launcher=TORCHRUN))


def stopped_at_one_step(started: Started, dataset: Path, run_id: str) -> None:
    text = started.ended(timeout_s=60)
    assert started.process.returncode != 0
    (said,) = re.findall(r"xrai: stopped as asked after step (\d+)", text)
    assert int(said) == last_step(dataset, run_id) >= 5


@pytest.mark.ci
def test_a_rank_that_torchrun_signals_while_it_leaves_still_says_where_it_stopped(
    dataset: Path,
) -> None:
    """Rank 1 leaves first, and torchrun then sends SIGTERM to rank 0 as well, a second time."""
    program = ("tests/faults/slow_to_leave.py",)
    started = start(dataset, "slow-to-leave", launcher=TORCHRUN, program=program)
    wait_for_step(started, dataset, "slow-to-leave", 5)
    workers_of(started)[0].send_signal(signal.SIGTERM)
    stopped_at_one_step(started, dataset, "slow-to-leave")


def said_after_a_kill(started: Started, orphans: list[psutil.Process]) -> str:
    """Kill the torchrun of these ranks, which must end by themselves; returns what all said."""
    started.process.kill()
    started.process.wait(20)
    _, alive = psutil.wait_procs(orphans, timeout=50)
    for orphan in alive:
        orphan.kill()
    text = started.log.read_text()
    assert not alive, text
    return text


@pytest.mark.ci
def test_ranks_stop_with_their_state_saved_when_torchrun_is_killed(dataset: Path) -> None:
    started = start(dataset, "agent-killed", launcher=TORCHRUN)
    wait_for_step(started, dataset, "agent-killed", 5)
    text = said_after_a_kill(started, workers_of(started))
    (said,) = re.findall(r"xrai: stopped as asked after step (\d+)", text)
    assert int(said) == last_step(dataset, "agent-killed") >= 5
    goes_on(start(dataset, "agent-killed"))


def is_loading_torch(process: psutil.Process) -> bool:
    return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.ci
def test_ranks_that_are_starting_end_when_torchrun_is_killed(dataset: Path) -> None:
    started = start(dataset, "agent-killed-early", launcher=TORCHRUN)
    orphans: list[psutil.Process] = []
    while len(orphans) < 2 or not all(is_loading_torch(orphan) for orphan in orphans):
        assert started.process.poll() is None, started.ended()
        time.sleep(0.01)
        with contextlib.suppress(KeyError, psutil.Error):  # one that is not yet a rank
            orphans = workers_of(started)
    said_after_a_kill(started, orphans)
    assert not folder_of(dataset, "agent-killed-early").exists()


@pytest.mark.ci
def test_torchrun_ends_all_ranks_when_one_is_killed(dataset: Path) -> None:
    started = start(dataset, "rank-killed", launcher=TORCHRUN)
    wait_for_step(started, dataset, "rank-killed", 5)
    workers_of(started)[1].kill()
    text = started.ended()
    assert started.process.returncode == 1, text
    assert "Signal 9 (SIGKILL)" in text
    goes_on(start(dataset, "rank-killed"))


@pytest.mark.ci
def test_torchrun_restarts_a_run_from_the_last_step_saved_and_a_signal_stops_all_at_one_step(
    dataset: Path,
) -> None:
    started = start(dataset, "restarted", launcher=[*TORCHRUN, "--max-restarts=1"])
    wait_for_step(started, dataset, "restarted", 5)
    workers_of(started)[0].kill()
    wait_for_text(started, "going on after step")
    started.process.terminate()
    stopped_at_one_step(started, dataset, "restarted")


def test_a_killed_rank_ends_the_others_soon(tmp_path: Path) -> None:
    options = ["--train.global_batch_size=32", "--train.epochs=1000", f"--folder={tmp_path}"]
    command = ["tests/distributed/discs_rank.py", *options, "--checkpoint.every=1"]
    processes = start_ranks(command, world_size=2)
    while not (tmp_path / "checkpoints/latest.json").exists():
        assert processes[0].poll() is None
        time.sleep(0.01)
    processes[1].kill()
    results = finish_ranks(processes, timeout_s=200)
    assert [status for status, _, _ in results] == [1, -signal.SIGKILL]
    assert "rank 0 of 2" in results[0][2] and "rank 1 was last heard of" in results[0][2]


def test_a_rank_that_hangs_is_named_by_the_others_when_time_is_over() -> None:
    processes = start_ranks(
        [
            "tests/distributed/discs_rank.py",
            "--train.global_batch_size=32",
            "--train.epochs=50",
            "--train.step_timeout_s=4",
            "--hang_rank=1",
        ],
        world_size=2,
    )
    try:
        stderr = processes[0].communicate(timeout=90)[1]
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=20)
    assert processes[0].returncode == 1
    line = stderr.splitlines()[-1]
    assert re.search(
        r"rank 0 of 2 waited for the other ranks .*"
        r"rank 1 was last heard of \d+ s ago, after step 6",
        line,
    )


def test_a_rank_that_cannot_have_a_shard_ends_all_and_says_which_rank_shard_and_cause(
    dataset: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    shard = next(copy.glob("train-*.h5"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    results = finish_ranks(
        start_ranks(
            [
                "-m",
                "xrai.train",
                f"--artifacts={tmp_path}/submit",
                "--run_id=one",
                *OPTIONS,
                f"--dataset={dataset}",
            ],
            world_size=2,
            more={1: [f"--dataset={copy}"]},
        ),
        timeout_s=100,
    )
    assert [status for status, _, _ in results] == [1, 1]
    (line,) = [line for line in results[1][2].splitlines() if line.startswith("xrai: error")]
    assert "rank 1 of 2" in line and shard.name in line and "is damaged" in line
    (other,) = [line for line in results[0][2].splitlines() if line.startswith("xrai: error")]
    assert "rank 0 of 2 waited for the other ranks" in other


def test_a_rank_that_raises_ends_the_others_at_once_and_its_traceback_is_in_the_error_file(
    tmp_path: Path,
) -> None:
    processes = start_ranks(
        [
            "tests/distributed/discs_rank.py",
            "--train.global_batch_size=32",
            "--train.epochs=50",
            "--raise_rank=1",
        ],
        world_size=2,
        environment={"TORCHELASTIC_ERROR_FILE": f"{tmp_path}/error-{{rank}}.json"},
    )
    results = finish_ranks(processes, timeout_s=90)
    assert [status for status, _, _ in results] == [1, 1]
    assert "ZeroDivisionError" in results[1][2]
    assert "rank 1" in results[0][2]
    assert "ZeroDivisionError" in (tmp_path / "error-1.json").read_text()


@pytest.mark.parametrize("num_kills", [2, pytest.param(8, marks=pytest.mark.ci)])
def test_a_kill_in_the_middle_of_saving_never_costs_a_checkpoint_that_was_there(
    tmp_path: Path, num_kills: int
) -> None:
    saver = tmp_path / "saver.py"
    saver.write_text(
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from xrai.learning.checkpoint import CheckpointFolder\n"
        "from xrai.store import open_store\n"
        "folder = Path(sys.argv[1])\n"
        "none = lambda names: None\n"
        "checkpoints = CheckpointFolder(\n"
        "    folder, store=open_store(str(folder)), publish=none, remove=none,\n"
        "    keep_last=2, keep_best=1)\n"
        "found = checkpoints.newest()\n"
        "step = found[0].step if found else 0\n"
        "while True:\n"
        "    step += 1\n"
        "    state = {'weight': torch.full((500_000,), float(step))}\n"
        "    checkpoints.save(state, step=step, epoch=0, score=None)\n"
        "    print(step, flush=True)\n"
    )
    folder = tmp_path / "run"
    generator = random.Random(1)
    done = 0
    for _ in range(num_kills):
        read, write = os.pipe()
        with os.fdopen(write) as output:
            process = zygote.start([str(saver), str(folder)], output=output)
        with os.fdopen(read) as lines:
            for _ in range(generator.randint(1, 5)):
                done = int(lines.readline())
            # a save takes about 10 ms: somewhere in the middle of the next one
            time.sleep(generator.uniform(0, 0.02))
            process.kill()
            process.wait(20)
        checkpoints = CheckpointFolder(
            folder,
            store=open_store(str(folder)),
            publish=lambda names: None,
            remove=lambda names: None,
            keep_last=2,
            keep_best=1,
        )
        found = checkpoints.newest()
        assert found is not None
        entry, state = found
        assert entry.step >= done
        assert torch.equal(state["weight"], torch.full((500_000,), float(entry.step)))


@pytest.mark.ci
def test_a_node_is_lost_and_comes_back_and_training_ends(dataset: Path) -> None:
    port = free_port()

    def node(name: str) -> Started:
        return start(
            dataset,
            "elastic",
            "--train.epochs=12",
            "--train.timeout_s=60",
            "--train.step_timeout_s=10",
            launcher=[
                *TORCHRUN[:2],
                "--nnodes=1:2",
                "--nproc_per_node=1",
                "--max-restarts=10",
                "--rdzv_backend=c10d",
                f"--rdzv_endpoint=127.0.0.1:{port}",
                "--rdzv_id=elastic",
                "--rdzv_conf=last_call_timeout=3,timeout=60",
                "--local_addr=127.0.0.1",
                *(["--node_rank=0"] if name == "first" else []),
            ],
        )

    first = node("first")
    others: list[Started] = []
    try:
        wait_for_step(first, dataset, "elastic", 2)
        others.append(node("second"))
        wait_for_text(first, "going on after step")  # it joined: both began anew
        wait_for_step(first, dataset, "elastic", last_step(dataset, "elastic") + 1)
        others[0].kill_all()
        stopped_at = last_step(dataset, "elastic")
        wait_for_step(first, dataset, "elastic", min(stopped_at + 5, 130))
        others.append(node("third"))
        text = first.ended(timeout_s=150)
        assert first.process.returncode == 0, text
        assert text.count("going on after step") >= 1
        assert (folder_of(dataset, "elastic") / "summary.json").exists()
    finally:
        for started in (first, *others):
            started.kill_all()


# ------------------------------------------------------------------------------ a disk that is full


@pytest.mark.ci
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_file_that_may_not_grow_ends_all_ranks_in_one_line_and_a_new_start_goes_on(
    dataset: Path, whole: dict[str, torch.Tensor], num_ranks: int
) -> None:
    run_id, program = f"starved-{num_ranks}", ("tests/faults/starved.py",)
    launcher = TORCHRUN if num_ranks == 2 else ()
    text = start(dataset, run_id, launcher=launcher, program=program).ended()
    said = re.findall(
        r"^xrai: error: (.*) cannot be used: File too large; free", text, re.MULTILINE
    )
    assert said == [f"{folder_of(dataset, run_id)}/checkpoints/step-000000001.pt"] * num_ranks
    assert num_ranks == 2 or "Traceback" not in text  # torchrun adds its own
    finish(start(dataset, run_id))
    assert same(weights(dataset, run_id), whole)


@pytest.mark.ci
@pytest.mark.parametrize("size_kib", [40, 600, 2900])
def test_a_full_disk_ends_a_training_in_one_line_and_a_new_start_goes_on(
    dataset: Path, whole: dict[str, torch.Tensor], size_kib: int, tmp_path: Path
) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk; the test above starves it by a limit")
    try:
        artifacts = f"--artifacts={tmp_path}/submit"
        text = start(dataset, "full", artifacts).ended()
        assert text.count("xrai: error:") == 1 and "Traceback" not in text
        assert "No space left on device; free some space, then start again" in text
        subprocess.run(["mount", "-o", "remount,size=64m", str(tmp_path)], check=True)
        finish(start(dataset, "full", artifacts))
        content = torch.load(tmp_path / "submit/full/model.pt", weights_only=True)
        assert same(content["weights"], whole)
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)
