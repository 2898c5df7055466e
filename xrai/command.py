"""How a command reads its command line and ends; each `xrai.WORD` calls `parse` and `run_command`.

Exit status: 0 done; 2 the user's mistake (one clear line, no traceback); 1 anything else; 143
stopped by SIGTERM with its state saved.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, NoReturn

from xrai.config import (
    SECTIONS,
    USES,
    Config,
    KeySpec,
    all_keys,
    build,
    load_yaml,
    nearest,
    read_file,
    takes,
)
from xrai.errors import ConfigError, StoppedError, UserError, XraiError
from xrai.files import explaining_disk
from xrai.log import finish_streams, guard_streams, printable


@dataclass(frozen=True)
class Flag:
    """A flag of one command that is not a config key: an address or a switch.

    `env` names an environment variable that gives the default, for containers. `only_with` names
    the switch without which the flag is refused on the command line.
    """

    name: str
    default: Any
    meaning: str
    env: str | None = None
    type: Any = str
    nargs: str | None = None  # "+" or "*" makes it a positional list
    repeats: bool = False  # may be given again; its value is a list
    only_with: str | None = None

    def default_here(self) -> Any:
        """The value where the flag is not given."""
        return (self.env and os.environ.get(self.env)) or self.default


# Of the commands that use a finished run
RUN: Final = Flag("run", "", "the finished run, URI/ID: a folder or s3://bucket/prefix/ID")
RUNS: Final = Flag(
    "run", [], f"{RUN.meaning}; given again, the runs predict together", repeats=True
)

PRIOR: Final = Flag(
    "prior",
    "",
    "share of images that show what is looked for where the images come from, such as 0.1; of "
    "classes or findings NAME=SHARE|NAME=SHARE; or estimate, from these images; empty: as trained",
)


class Parsed(NamedTuple):
    """A command line that has been read."""

    config: Config
    flags: dict[str, Any]  # values of the command's own flags
    given: frozenset[str]  # keys (section.key) that the user gave, by flag or file

    @property
    def run(self) -> str:
        """The address that `RUN` gives. Raises `UserError` if it is empty."""
        return _address(self.flags[RUN.name])

    @property
    def runs(self) -> tuple[str, ...]:
        """The addresses that `RUNS` gives. Raises `UserError` if there is none, or one is empty."""
        return tuple(_address(text) for text in self.flags[RUNS.name] or [""])


def _address(text: str) -> str:
    if not (run := text.rstrip("/")):
        raise UserError(
            "--run is missing: give the address of a finished run, such as "
            "submit/20261123-031500-a1b2c3"
        )
    return run


def parse(
    command: str,
    arguments: Sequence[str] | None = None,
    *,
    description: str,
    flags: Sequence[Flag] = (),
) -> Parsed:
    """Read a command line. Flags are those in `flags` and the keys that `config.USES` names for
    `command`; a config file may hold keys of other commands, too, which do not count as given.

    `--help` and `--print_config` print and exit with 0. Raises `ConfigError` for an unknown key, a
    wrong type, a value out of range, or a config file that cannot be read.
    """
    keys = {spec.name: spec for spec in all_keys()}
    own = {name: spec for name, spec in keys.items() if takes(command, name)}
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    parsed, unknown = _parser(command, description, own, flags).parse_known_intermixed_args(
        given[:end]
    )
    names = given[end + 1 :]  # argparse reads twice, and forgets the `--` in between
    if positional := next((flag.name for flag in flags if flag.nargs), ""):
        setattr(parsed, positional, [*getattr(parsed, positional), *names])
    elif names and not unknown:
        raise ConfigError(f"unexpected argument {names[0]!r}; see xrai {command} --help")
    if unknown:
        _refuse(unknown[0], command, [*own, *(flag.name for flag in flags if not flag.nargs)])
    found = vars(parsed)
    for flag in flags:
        if flag.only_with and flag.name in found and not found[flag.only_with]:
            raise ConfigError(f"--{flag.name} is for --{flag.only_with}: give that, too")
    values: dict[str, Any] = {}
    for file in found["config"]:  # before the flags, so that these win wherever they stand
        values |= read_file(file)
    values |= {
        name: spec.check(_value(spec, found[name])) for name, spec in own.items() if name in found
    }
    config = build(values)
    if found["print_config"]:
        print(config.to_yaml(), end="")
        sys.exit(0)
    own_values = {flag.name: found.get(flag.name, flag.default_here()) for flag in flags}
    return Parsed(config, own_values, frozenset(own.keys() & values))


def run_command(command: Callable[[], None], *, rank: int = 0, world_size: int = 1) -> NoReturn:
    """Run a command's body and leave the process with the exit status of its outcome.

    An `XraiError`, and a file or disk that fails, becomes one line on stderr; any other exception
    keeps its traceback. The user's mistakes, which all ranks of a training meet alike, are printed
    by rank 0 alone.
    """
    guard_streams()
    status: Any = 0
    try:
        with explaining_disk():
            command()
    except SystemExit as ended:  # --help, --print_config
        status = ended.code
    except XraiError as error:
        if rank == 0 or not isinstance(error, UserError | StoppedError):
            kind = "" if isinstance(error, StoppedError) else "error: "
            text = printable(" ".join(str(error).split()))
            print(f"xrai: {kind}{text}", file=sys.stderr, flush=True)
        status = error.exit_status
    except KeyboardInterrupt:
        print("xrai: interrupted", file=sys.stderr, flush=True)
        status = 130
    status = finish_streams(status)
    if world_size > 1:
        # While the interpreter shuts down, threads of torch's process groups sometimes abort (seen
        # with torch 2.13.0), and torchrun takes that for a failure. All files are closed by now.
        os._exit(status)
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as our one-line `ConfigError`."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{' '.join(message.split())}; see {self.prog} --help")


def _value(spec: KeySpec, text: str) -> Any:
    """What a flag's text means: the number or truth value that it would be in YAML, else itself."""
    kinds = {int: (int, float), float: (int, float), bool: (bool,)}.get(spec.type, ())
    with suppress(ConfigError):
        value = load_yaml(os.fsencode(text), where=spec.name) if kinds else text
        if type(value) in kinds:
            return value
    return text


def _parser(
    command: str, description: str, keys: dict[str, KeySpec], flags: Sequence[Flag]
) -> Parser:
    parser = Parser(prog=f"xrai {command}", description=description, allow_abbrev=False)
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML file with any config keys, or the name of a config that comes with xrai; may be "
        "repeated, the last one wins",
    )
    parser.add_argument(
        "--print_config", action="store_true", help="print the resolved config as YAML and exit"
    )
    for flag in flags:
        text = _help(
            flag.meaning + (f"; environment: {flag.env}" if flag.env else ""), flag.default
        )
        if flag.nargs:
            parser.add_argument(flag.name, nargs=flag.nargs, type=flag.type, help=text)
        elif flag.repeats:
            parser.add_argument(f"--{flag.name}", action="append", default=flag.default, help=text)
        elif flag.type is bool:
            parser.add_argument(f"--{flag.name}", action="store_true", help=text)
        else:
            default = argparse.SUPPRESS if flag.only_with else flag.default_here()
            parser.add_argument(f"--{flag.name}", type=flag.type, default=default, help=text)
    for section in dict.fromkeys(name.partition(".")[0] for name in keys):
        group = parser.add_argument_group(section, (SECTIONS[section].__doc__ or "").split("\n")[0])
        for name, spec in keys.items():
            if name.startswith(f"{section}."):
                group.add_argument(
                    f"--{name}",
                    default=argparse.SUPPRESS,
                    metavar=name.partition(".")[2].upper(),
                    help=_help(f"{spec.meaning}; {spec.allowed()}", spec.default),
                )
    return parser


def _help(text: str, default: Any) -> str:
    shown = "" if default in ("", None, []) else f" (default: {default})"
    return f"{text}{shown}".replace("%", "%%")


def _refuse(argument: str, command: str, valid: Sequence[str]) -> NoReturn:
    """Raise `ConfigError` for an argument that is none of the `valid` flags."""
    name, equals, value = argument.removeprefix("--").partition("=")
    if not argument.startswith("--"):
        raise ConfigError(f"unexpected argument {argument!r}; see xrai {command} --help")
    section = name.partition(".")[0]
    if section in SECTIONS and (
        name in {spec.name for spec in all_keys()}
        or not any(own.startswith(f"{section}.") for own in valid)
    ):
        takers = ", ".join(word for word in USES if takes(word, name))
        raise ConfigError(
            f"xrai {command} does not take --{name}: section {section} belongs to xrai {takers}"
        )
    value = f" (value {value!r})" if equals else ""
    hint = nearest(name, [*valid, "config", "print_config", "help"], prefix="--")
    raise ConfigError(f"unknown option --{name}{value} of xrai {command}{hint}")
