"""Commands forked from one process that has loaded what they need.

A start costs a fork instead of seconds of imports; the rest is as `python ARGUMENTS`. Tests use
`start`; as a program this is the process that forks, fed through a socket.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

REPOSITORY = Path(__file__).parents[1]

PREPARE = ("xrai.preprocess", "xrai.verify", "boto3.session")
RANK = ("xrai.train", "torch._dynamo")  # what each rank of a training loads
COMMAND = (  # what commands load: the packages that measure, draw and store, and torchrun itself
    *RANK,
    "xrai.run",
    "xrai.evaluate",
    "xrai.predict",
    "xrai.results.plots",
    "sklearn.linear_model",
    "torch.utils.tensorboard",
    "torch.distributed.run",
    "boto3.session",
)


class Process:
    """What tests use of `subprocess.Popen`, for a process that `start` forked."""

    def __init__(self, status: int, outputs: list[IO[str]]) -> None:
        self._status = os.fdopen(status, "rb", buffering=0)  # whose rest `select` sees
        self._outputs = outputs
        self.pid = int(self._status.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._ended(within_s=0)

    def wait(self, timeout: float) -> int:
        if self._ended(within_s=timeout) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float = 60) -> tuple[str, ...]:
        """What it wrote to the files that `start` made, when it has ended."""
        self.wait(timeout)
        texts = []
        for file in self._outputs:
            file.seek(0)
            texts.append(file.read())
            file.close()
        self._outputs = []
        return tuple(texts)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, *, within_s: float) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], within_s)[0]:
            self.returncode = int(self._status.readline())
            self._status.close()
        return self.returncode


def start(
    arguments: list[str],
    *,
    environment: dict[str, str] | None = None,
    output: IO[Any] | None = None,
    preload: tuple[str, ...] = COMMAND,
) -> Process:
    """`python ARGUMENTS` in a session of its own. It writes to `output`, or else to two files."""
    files: list[IO[Any]] = [output, output] if output else [_file(), _file()]
    read, write = os.pipe()
    variables = dict(os.environ) if environment is None else environment
    request = json.dumps({"arguments": arguments, "environment": variables})
    fds = [write, *(file.fileno() for file in files)]
    socket.send_fds(_zygote(preload), [request.encode()], fds)
    os.close(write)
    return Process(read, [] if output else files)


def _file() -> IO[str]:
    return tempfile.TemporaryFile("w+")


@functools.cache
def _zygote(preload: tuple[str, ...]) -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote", str(theirs.fileno()), *preload],
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )

    def end() -> None:
        ours.close()
        process.wait(20)

    atexit.register(end)
    return ours


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    gc.disable()
    for name in sys.argv[2:]:
        importlib.import_module(name)
    gc.freeze()  # no collection in a command looks at, and so copies, what is loaded here
    gc.enable()
    while True:
        message, fds, _, _ = socket.recv_fds(channel, 1 << 20, 3)
        if not message:
            return
        if not os.fork():
            channel.close()
            return keep(json.loads(message), *fds)
        for fd in fds:
            os.close(fd)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def keep(request: dict[str, Any], status: int, *outputs: int) -> None:
    """Tell the process id of the command, and how it ended."""
    if not (pid := os.fork()):
        os.close(status)
        return become(request, *outputs)
    os.write(status, f"{pid}\n".encode())
    os.write(status, f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
    os._exit(0)


def become(request: dict[str, Any], *outputs: int) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, fd in zip((1, 2), outputs, strict=True):
        os.dup2(fd, number)
        os.close(fd)
    first, *rest = request["arguments"]
    if first == "-c":
        code, *rest = rest
        sys.argv = ["-c", *rest]
        exec(compile(code, "-c", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        name, *rest = rest
        sys.argv = ["-m", *rest]
        sys.modules.pop(name, None)  # it runs once more, as __main__
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    main()
