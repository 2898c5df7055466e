"""`xrai WORD …`: each word starts `python -m xrai.WORD` in this process, and imports that alone.

`xrai train` also takes flags of torchrun (--standalone, --nproc_per_node=2, --nnodes=…, written
--flag=value, anywhere) or its PET_* variables, and then becomes torchrun.
"""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from xrai import __version__
from xrai.log import finish_streams, guard_streams

WORDS = {
    "preprocess": "turn raw X-rays into a data set",
    "train": "train a network on a data set; --nproc_per_node=N starts N processes",
    "evaluate": "measure a finished run on a data set",
    "predict": "classify X-rays with a finished run",
    "serve": "score films as they come, on a page and by HTTP",
    "export": "write a finished run for other programs, as ONNX or torch.export",
    "verify": "check a data set against its hashes, and repair it",
    "runs": "list runs, show their results, or fetch their files",
    "phantom": "draw made-up X-rays to try things with",
}
USAGE = "\n".join(
    [
        "usage: xrai WORD [OPTIONS]",
        "",
        *(f"  {word:<11} {meaning}" for word, meaning in WORDS.items()),
        "",
        "xrai WORD --help lists the options of a word; xrai --version prints the version.",
    ]
)
_TORCHRUN = re.compile(  # its options, each with either spelling of `_`
    r"--(standalone|nnodes|nproc.per.node|node.rank|rdzv.\w+|max.restarts|monitor.interval|role|tee"
    r"|shutdown.timeout|master.\w+|local.addr|log.dir|redirects|local.ranks.filter|numa.binding)(=|$)"
)
_JOIN_TIMEOUT_S = "600"  # torchrun's default
_ADDRESSED = re.compile(  # options and variables of a job that says where its machines are
    r"(--|pet_)(nnodes=(?!1$|1:1$)|node.rank|rdzv.endpoint|master.addr|local.addr)", re.IGNORECASE
)


def main() -> NoReturn:
    """Do what the command line says, and leave with the exit status of it."""
    guard_streams()
    word, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if word in ("-h", "--help", "--version"):
        print(f"xrai {__version__}" if word == "--version" else USAGE)
        sys.exit(finish_streams(0))
    if word not in WORDS:
        from difflib import get_close_matches

        near = get_close_matches(word, WORDS, n=1)
        hint = (
            f"; did you mean {near[0]}?"
            if near
            else f"; allowed: {', '.join(WORDS)}; xrai --help says more"
        )
        _refuse(f"unknown word {word!r}{hint}")
    if word == "train":
        arguments = launch(arguments)
    sys.argv = [f"xrai {word}", *arguments]
    runpy.run_module(f"xrai.{word}", run_name="__main__", alter_sys=True)
    sys.exit(0)


def launch(arguments: list[str]) -> list[str]:
    """Become torchrun if `arguments` or the environment name any of its options; else return
    `arguments`.

    torchrun exits with 1 whatever its processes exit with. So `train --check` runs before it, and
    a check that fails ends this process with its own status. XRAI_PREFLIGHT=0 skips the check.
    """
    options = [text for text in arguments if _TORCHRUN.match(text)]
    own = [text for text in arguments if text not in options]
    variables = [f"{name}={text}" for name, text in os.environ.items() if name.startswith("PET_")]
    if not options and not variables:
        return own
    if any(re.match(r"(--help|-h|--print_config)(=|$)", text) for text in own):
        return own
    if "--check" in own:
        return [*_check_ranks(_named(options, variables)), *own]
    for text in options:
        if "=" not in text and text != "--standalone":
            _refuse(f"{text} lacks its value; write {text}=VALUE")
    for before, text in zip(["", *own], own, strict=False):
        file = text if before == "--config" else text.removeprefix("--config=")
        if Path(file).is_fifo():
            _refuse(f"--config {file} is a pipe, which only one process can read: name a file")
    named = _named(options, variables)
    train = ["-m", "xrai.train"]
    if os.environ.get("XRAI_PREFLIGHT", "1") != "0":
        check = [sys.executable, *train, *_check_ranks(named), "--check", *own]
        try:
            status = subprocess.run(check, check=False).returncode
        except KeyboardInterrupt:
            print("xrai: interrupted", file=sys.stderr)
            sys.exit(130)
        if status:
            sys.exit(status if status > 0 else 128 - status)  # 128 + signal, as in a shell
    if not any(_ADDRESSED.match(text) for text in [*options, *variables]):
        options.append("--local_addr=localhost")  # torchrun hangs where the host name is unknown
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # else torchrun says at length that it sets this
    torchrun = ["torch.distributed.run", *options, *train, *own]
    endpoint = named.get("rdzv_endpoint")
    if endpoint and named.get("standalone", "0") == "0":  # else torchrun ignores it
        torchrun = ["xrai.rendezvous", endpoint, _join_timeout(named), *torchrun[1:]]
    os.execv(sys.executable, [sys.executable, "-m", *torchrun])


def _check_ranks(named: dict[str, str]) -> list[str]:
    """The flags that say how many ranks torchrun would start, in all and on this machine, where its
    options give numbers.
    """
    nodes, local = named.get("nnodes", "1"), named.get("nproc_per_node", "1")
    if not local.isdecimal():
        return []
    flags = [f"--check_local_ranks={int(local)}"] if local != "1" else []
    if nodes.isdecimal() and (nodes, local) != ("1", "1"):
        flags.insert(0, f"--check_ranks={int(nodes) * int(local)}")
    return flags


def _join_timeout(named: dict[str, str]) -> str:
    """How many seconds torchrun would wait for other machines."""
    settings = named.get("rdzv_conf", "").split(",")
    found = dict(text.strip().split("=", 1) for text in settings if "=" in text)
    value = found.get("join_timeout", "")
    return value if value.isdecimal() else _JOIN_TIMEOUT_S


def _named(options: list[str], variables: list[str]) -> dict[str, str]:
    """The values of torchrun's options, by their names with underscores; an option wins over its
    PET_* variable, as it does for torchrun.
    """
    found = {}
    for text in [*variables, *options]:
        name, _, value = text.partition("=")
        found[name.removeprefix("PET_").removeprefix("--").replace("-", "_").lower()] = value
    return found


def _refuse(message: str) -> NoReturn:
    print(f"xrai: error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
