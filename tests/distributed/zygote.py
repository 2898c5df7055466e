"""Forks the ranks of a job from one process that has loaded torch and xrai.

A start costs a fork instead of seconds of imports. Reads requests, one JSON line each: a list of
ranks, each with `arguments` (as `python` takes them), `environment` and `output`, the path to
which `.stdout` and `.stderr` are added. Answers with a line of exit statuses when all have ended.
"""

import json
import os
import runpy
import sys
from typing import Any

import torch  # noqa: F401

import xrai.learning.loop
import xrai.learning.predictor  # noqa: F401


def main() -> None:
    for line in sys.stdin:
        pids = []
        for rank in json.loads(line):
            if not (pid := os.fork()):
                return become(rank)
            pids.append(pid)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(statuses), flush=True)


def become(rank: dict[str, Any]) -> None:
    """Run one rank to its end, in a process of its own."""
    os.environ.clear()
    os.environ.update(rank["environment"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, kind in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{rank['output']}.{kind}", os.O_WRONLY | os.O_CREAT, 0o600), number)
    first, *rest = rank["arguments"]
    if first == "-c":
        code, *rest = rest
        sys.argv = ["-c", *rest]
        exec(compile(code, "-c", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    main()
