"""One typed config for all commands: dataclass defaults < `--config FILE.yaml` <
`--section.key=value`.

The defaults are the reference recipe. Each key is declared once, below, with its default, unit,
meaning and allowed range; the command line, `--help`, the YAML reader and the checks all come from
that declaration. jsonargparse does the reading and the types; this module adds ranges and the
nearest valid key to its messages. Commands call `parse`; a saved config is read back with
`from_mapping`.
"""

import dataclasses
import difflib
import os
import sys
from argparse import HelpFormatter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from xrai.errors import ConfigError


@dataclass(frozen=True)
class _Bounds:
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None

    def describe(self) -> str:
        parts = []
        if self.minimum is not None:
            parts.append(f"at least {self.minimum:g}")
        if self.above is not None:
            parts.append(f"above {self.above:g}")
        if self.maximum is not None:
            parts.append(f"at most {self.maximum:g}")
        if self.below is not None:
            parts.append(f"below {self.below:g}")
        return " and ".join(parts)

    def hold(self, value: float) -> bool:
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.maximum is None or value <= self.maximum)
            and (self.below is None or value < self.below)
        )  # NaN holds nowhere, for every key has a bound on at least one side


def _key(
    default: Any,
    meaning: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    bounds = _Bounds(minimum, maximum, above, below)
    return field(default=default, metadata={"meaning": meaning, "bounds": bounds})


@dataclass(frozen=True)
class Images:
    """How a raw file becomes pixels. Preprocessing and prediction share this."""

    size: int = _key(64, "height and width of the stored square, pixels", minimum=16, maximum=1024)
    fit: Literal["crop", "squash", "pad"] = _key(
        "crop", "how a picture meets the square: crop to the short side, squash, or pad with black"
    )
    max_pixels: int = _key(
        100_000_000,
        "a file that declares more pixels is set aside undecoded (decompression bombs)",
        minimum=1024,
    )
    max_set_aside: float = _key(
        0.05,
        "the share of source files that may be set aside before the job refuses",
        minimum=0,
        maximum=1,
    )


@dataclass(frozen=True)
class Splits:
    """How patients are divided into train, val and test where the source does not say."""

    val_fraction: float = _key(
        0.1, "share of patients carved for val when the source has none", above=0, below=1
    )
    test_fraction: float = _key(
        0.1, "share of patients carved for test when the source has none", minimum=0, below=1
    )
    min_val_images: int = _key(
        32, "a val folder with fewer images is too small to measure with and joins train", minimum=0
    )
    duplicates: Literal["error", "drop"] = _key(
        "error",
        "the same image in two splits of the source: refuse, or set aside all but the one in test, else val",
    )


@dataclass(frozen=True)
class Shards:
    """How the data set is cut into files."""

    rows: int = _key(1024, "images in one HDF5 shard", minimum=1, maximum=1_000_000)


@dataclass(frozen=True)
class Cache:
    """Where shards of a remote data set are kept on this machine."""

    dir: str = _key("", "folder of the local cache; empty: $XDG_CACHE_HOME/xrai or ~/.cache/xrai")
    max_gib: float = _key(0.0, "size limit of the cache, GiB; 0: no limit", minimum=0)


@dataclass(frozen=True)
class Loader:
    """How batches are put together."""

    window: int = _key(
        64, "shards that are shuffled together; the cache must hold as many", minimum=1
    )
    prefetch: int = _key(2, "batches that are assembled ahead", minimum=1, maximum=1000)
    threads: int = _key(4, "shards that are fetched at once", minimum=1, maximum=256)


@dataclass(frozen=True)
class Model:
    """The network."""

    name: Literal["resnet10", "resnet18"] = _key(
        "resnet10", "residual network with one or two basic blocks a stage"
    )
    width: int = _key(
        16, "channels of the first of four stages; each later stage doubles", minimum=8, maximum=256
    )


@dataclass(frozen=True)
class Augment:
    """Random changes of the training images, drawn for each image and epoch. A 0 turns one off."""

    rotation_deg: float = _key(10.0, "largest rotation either way, degrees", minimum=0, maximum=180)
    scale: float = _key(0.12, "largest relative change of size", minimum=0, below=1)
    shift: float = _key(0.10, "largest shift either way, share of the side", minimum=0, maximum=1)
    aspect: float = _key(0.25, "largest relative change of width over height", minimum=0, below=1)
    shear: float = _key(0.06, "largest horizontal shear, share of the height", minimum=0, maximum=1)
    gamma: float = _key(0.4, "largest change of the logarithm of gamma", minimum=0, maximum=3)
    contrast: float = _key(0.3, "largest relative change of contrast", minimum=0, below=1)
    blur: float = _key(
        0.5, "largest share of a 3x3 binomial blur that is mixed in", minimum=0, maximum=1
    )
    noise: float = _key(
        0.04, "largest standard deviation of added noise, grey range 1", minimum=0, maximum=1
    )


@dataclass(frozen=True)
class Optim:
    """The optimizer, its schedule and the loss."""

    name: Literal["adamw", "sgd"] = _key("adamw", "AdamW, or SGD with Nesterov momentum")
    lr: float = _key(3e-3, "peak learning rate", above=0, maximum=100)
    weight_decay: float = _key(
        0.05, "decoupled weight decay, not applied to norms and biases", minimum=0, maximum=10
    )
    momentum: float = _key(0.9, "momentum of sgd, beta1 of adamw", minimum=0, below=1)
    warmup_fraction: float = _key(
        0.1, "share of all steps in linear warm-up, before the cosine", minimum=0, below=1
    )
    clip_norm: float = _key(1.0, "largest L2 norm of the gradient; 0: no clipping", minimum=0)
    ema_decay: float = _key(
        0.998, "decay a step of the averaged weights that are saved", minimum=0, below=1
    )
    label_smoothing: float = _key(0.0, "label smoothing", minimum=0, below=1)
    class_weighting: float = _key(
        0.0,
        "how far the rarer class weighs more in the loss; 1: both classes weigh alike",
        minimum=0,
        maximum=1,
    )
    logit_adjustment: float = _key(
        1.0,
        "weight of the log class prior added to the logits in training (Menon et al. 2021); 0: off",
        minimum=0,
    )


@dataclass(frozen=True)
class Train:
    """The training job."""

    epochs: int = _key(40, "passes over the training split", minimum=1, maximum=100_000)
    seed: int = _key(0, "seed of weights, order and augmentation", minimum=0, maximum=2**31 - 1)
    global_batch_size: int = _key(64, "images a step, over all ranks together", minimum=1)
    accumulation_steps: int = _key(
        1, "parts that a rank's share of a batch is computed in, to save memory", minimum=1
    )
    precision: Literal["auto", "bf16", "fp16", "off", "fp64"] = _key(
        "auto",
        "mixed precision: auto is bf16 where the device is fast at it; off is fp32; fp64 compares runs exactly",
    )
    compile: bool = _key(False, "torch.compile the network")
    threads: int = _key(
        0,
        "CPU threads a rank; 0: the machine's cores divided by its ranks",
        minimum=0,
        maximum=1024,
    )
    patience: int = _key(
        0, "stop after so many epochs without a better validation score; 0: never", minimum=0
    )
    max_steps: int = _key(0, "stop after so many steps; 0: no limit", minimum=0)
    max_minutes: float = _key(0.0, "stop after so many minutes of training; 0: no limit", minimum=0)
    profile: str = _key(
        "", "steps A:B to profile into profile.json, a Chrome trace; counted from 1; empty: none"
    )
    timeout_s: float = _key(
        600.0, "how long a rank waits for the others up to the end of the first step", above=0
    )
    step_timeout_s: float = _key(
        300.0, "how long a rank waits for the others after the first step, seconds", above=0
    )


@dataclass(frozen=True)
class Checkpoint:
    """What is saved on the way, to go on from."""

    every: int = _key(0, "steps between checkpoints; 0: one at the end of each epoch", minimum=0)
    keep_last: int = _key(2, "how many of the newest checkpoints are kept", minimum=1)
    keep_best: int = _key(
        1, "how many of the checkpoints with the best validation score are kept", minimum=1
    )


@dataclass(frozen=True)
class Evaluate:
    """How results are measured."""

    batch_size: int = _key(256, "images a step in evaluation, over all ranks together", minimum=1)
    shift_draws: int = _key(
        2,
        "augmented copies of each val image that stand for other hospitals' images",
        minimum=1,
        maximum=100,
    )
    num_bootstrap: int = _key(
        1000, "bootstrap samples behind each 95 % interval", minimum=10, maximum=1_000_000
    )


@dataclass(frozen=True)
class Config:
    """All keys of all commands."""

    images: Images = field(default_factory=Images)
    splits: Splits = field(default_factory=Splits)
    shards: Shards = field(default_factory=Shards)
    cache: Cache = field(default_factory=Cache)
    loader: Loader = field(default_factory=Loader)
    model: Model = field(default_factory=Model)
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluate: Evaluate = field(default_factory=Evaluate)

    def to_mapping(self) -> dict[str, dict[str, Any]]:
        """Sections of plain values, as they stand in YAML and in dataset.json."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The resolved config as YAML, all keys, in the order of declaration."""
        return yaml.safe_dump(self.to_mapping(), sort_keys=False)


@dataclass(frozen=True)
class Flag:
    """A flag of one command that is not a config key: an address or a switch.

    `env` names an environment variable that gives the default, for containers.
    """

    name: str
    default: Any
    meaning: str
    env: str | None = None
    type: Any = str
    nargs: str | None = None  # "+" or "*" makes it a positional list


@dataclass(frozen=True)
class KeySpec:
    """One config key as declared."""

    name: str  # section.key
    type: Any
    default: Any
    meaning: str
    bounds: _Bounds

    def allowed(self) -> str:
        """What values the key takes, in words."""
        if get_origin(self.type) is Literal:
            return "one of " + ", ".join(str(choice) for choice in get_args(self.type))
        kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        return " ".join(filter(None, [kinds[self.type], self.bounds.describe()]))


def all_keys() -> Iterator[KeySpec]:
    """Every config key, in the order of declaration."""
    for section in dataclasses.fields(Config):
        section_class = section.default_factory
        assert isinstance(section_class, type)
        types = get_type_hints(section_class)
        for key in dataclasses.fields(section_class):
            yield KeySpec(
                f"{section.name}.{key.name}",
                types[key.name],
                key.default,
                key.metadata["meaning"],
                key.metadata["bounds"],
            )


def parse(
    command: str,
    arguments: Sequence[str] | None = None,
    *,
    description: str,
    flags: Sequence[Flag] = (),
) -> tuple[Config, dict[str, Any]]:
    """Read a command line into the config and the values of the command's own flags.

    `--help` and `--print_config` print and exit with 0. Raises `ConfigError` for an unknown key, a
    wrong type, a value out of range, or a config file that cannot be read; nothing has been done
    by then.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    keys = {spec.name: spec for spec in all_keys()}
    _refuse_unknown_flags(
        command, arguments, [*keys, *(flag.name for flag in flags if flag.nargs is None)]
    )
    parser = _parser(command, description, keys, flags)
    files, others = _separate_config_files(arguments)
    for path in files:
        _check_mapping(_read_yaml(Path(path)), where=f"in {path}")
    # jsonargparse lets the later one win; files first, so that the command line wins wherever it
    # stands
    parsed = parser.parse_args([*(f"--config={path}" for path in files), *others])
    config = _build({name: parsed[name] for name in keys})
    if parsed["print_config"]:
        print(config.to_yaml(), end="")
        sys.exit(0)
    return config, {flag.name: parsed[flag.name] for flag in flags}


def from_mapping(mapping: Mapping[str, Any], *, where: str) -> Config:
    """A saved config, checked as a config file is. `where` names it in messages. Raises
    `ConfigError`.
    """
    values = {spec.name: spec.default for spec in all_keys()}
    values.update(_check_mapping(mapping, where=where))
    return _build(values)


class _Parser(ArgumentParser):
    """jsonargparse, with its errors as our one-line `ConfigError`."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        cause: BaseException | None = ex
        while cause is not None:
            if isinstance(cause, _NotAllowedError):
                raise ConfigError(str(cause)) from None
            cause = cause.__cause__ or cause.__context__
        raise ConfigError(" ".join(f"{message}; see --help for what is allowed".split())) from ex


class _NotAllowedError(ValueError):
    """What argparse expects a type to raise."""


def _reader(spec: KeySpec) -> Callable[[Any], Any]:
    """The function that turns the text after `--section.key=` into a checked value."""

    def read(text: Any) -> Any:
        value = text
        if isinstance(text, str) and spec.type in (int, float, bool):
            try:
                value = yaml.safe_load(text)
            except yaml.YAMLError:
                value = text
        try:
            return _check_value(spec, value)
        except ConfigError as error:
            raise _NotAllowedError(str(error)) from None

    return read


def _parser(
    command: str, description: str, keys: Mapping[str, KeySpec], flags: Sequence[Flag]
) -> _Parser:
    parser = _Parser(
        prog=f"python -m xrai.{command}",
        description=description,
        print_config=None,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    parser.add_argument(
        "--print_config", action="store_true", help="print the resolved config as YAML and exit"
    )
    for flag in flags:
        text = _help(
            flag.meaning + (f"; environment: {flag.env}" if flag.env else ""), flag.default
        )
        default = os.environ.get(flag.env, flag.default) if flag.env else flag.default
        if flag.nargs:
            parser.add_argument(flag.name, nargs=flag.nargs, type=flag.type, help=text)
        elif flag.type is bool:
            parser.add_argument(f"--{flag.name}", action="store_true", help=text)
        else:
            parser.add_argument(
                f"--{flag.name}", type=flag.type, default=default or flag.default, help=text
            )
    groups = {}
    for section in dataclasses.fields(Config):
        summary = (section.default_factory.__doc__ or "").splitlines()[0]
        groups[section.name] = parser.add_argument_group(section.name, summary)
    for spec in keys.values():
        group = groups[spec.name.partition(".")[0]]
        group.add_argument(
            f"--{spec.name}",
            type=_reader(spec),
            default=spec.default,
            metavar=spec.name.partition(".")[2].upper(),
            help=_help(f"{spec.meaning}; {spec.allowed()}", spec.default),
        )
    return parser


def _help(text: str, default: Any) -> str:
    shown = "" if default in ("", None) else f" (default: {default})"
    return f"{text}{shown}".replace("%", "%%")


def _refuse_unknown_flags(command: str, arguments: Sequence[str], known: Sequence[str]) -> None:
    valid = [*known, "config", "print_config", "help"]
    for argument in arguments:
        if argument == "--":
            return
        if not argument.startswith("--"):
            continue
        name, equals, value = argument[2:].partition("=")
        if name not in valid:
            given = f" (value {value!r})" if equals else ""
            raise ConfigError(
                f"unknown option --{name}{given} of xrai.{command}{_nearest(name, valid, prefix='--')}"
            )


def _nearest(name: str, valid: Sequence[str], *, prefix: str = "") -> str:
    last_parts = {key.rpartition(".")[2]: key for key in valid}
    found = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    if not found:
        same_last_part = difflib.get_close_matches(
            name.rpartition(".")[2], list(last_parts), n=1, cutoff=0.7
        )
        found = [last_parts[part] for part in same_last_part]
    return f"; did you mean {prefix}{found[0]}?" if found else "; --help lists all that are allowed"


def _separate_config_files(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The values of `--config`, and all other arguments."""
    files, others = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config":
            files.append(next(rest, ""))
        elif argument.startswith("--config="):
            files.append(argument.partition("=")[2])
        else:
            others.append(argument)
    return files, others


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"there is no config file {path}; --config takes the path of a YAML file"
        ) from None
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not YAML: {error}") from error


def _check_mapping(mapping: Any, *, where: str) -> dict[str, Any]:
    """Flat {section.key: value} of nested sections; raises `ConfigError` naming the first key
    that is wrong.
    """
    keys = {spec.name: spec for spec in all_keys()}
    sections = {name.partition(".")[0] for name in keys}
    if mapping is None:
        return {}
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: a config holds sections of keys, not {type(mapping).__name__}")
    values: dict[str, Any] = {}
    for section, entries in mapping.items():
        if section not in sections:
            raise ConfigError(
                f"unknown section {section!r} {where}{_nearest(str(section), sorted(sections))}"
            )
        if not isinstance(entries, Mapping):
            raise ConfigError(f"section {section!r} {where} must hold keys, not {entries!r}")
        for key, value in entries.items():
            name = f"{section}.{key}"
            if name not in keys:
                raise ConfigError(
                    f"unknown key {name!r} (value {value!r}) {where}{_nearest(name, list(keys))}"
                )
            values[name] = _check_value(keys[name], value, where=where)
    return values


def _check_value(spec: KeySpec, value: Any, *, where: str = "") -> Any:
    place = f" {where}" if where else ""
    refused = ConfigError(
        f"{spec.name} = {value!r}{place} is not allowed: it takes {spec.allowed()}"
    )
    if get_origin(spec.type) is Literal:
        # YAML 1.1 reads a bare `off` as false
        value = "off" if value is False and "off" in get_args(spec.type) else value
        if value not in get_args(spec.type):
            raise refused
        return value
    if spec.type is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if spec.type is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            value = float(value)
        except ValueError:
            raise refused from None
    if type(value) is not spec.type or (
        isinstance(value, int | float) and not spec.bounds.hold(value)
    ):
        raise refused
    return value


def _build(values: Mapping[str, Any]) -> Config:
    """The config of flat values, each checked once more (values of the command line have passed
    no range check).
    """
    checked = {spec.name: _check_value(spec, values[spec.name]) for spec in all_keys()}
    sections: dict[str, Any] = {}
    for section in dataclasses.fields(Config):
        section_class = section.default_factory
        assert isinstance(section_class, type)
        entries = {
            key.name: checked[f"{section.name}.{key.name}"]
            for key in dataclasses.fields(section_class)
        }
        sections[section.name] = section_class(**entries)
    config = Config(**sections)
    if config.splits.val_fraction + config.splits.test_fraction >= 1:
        raise ConfigError(
            f"splits.val_fraction = {config.splits.val_fraction} and splits.test_fraction = "
            f"{config.splits.test_fraction} leave nothing to train on: their sum must be below 1"
        )
    return config
