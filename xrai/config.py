"""One typed config for all commands: defaults < `--config FILE.yaml` < `--section.key=value`.

The defaults train within two minutes on two cores; `configs/` has recipes. Each key is declared
once, here, with its default, meaning and range; flags, `--help`, the YAML reader and the checks all
come from that declaration. `xrai.command.parse` reads a command line, `from_mapping` a saved
config.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from xrai.errors import ConfigError
from xrai.files import read_once

OWN_NETWORKS = ("resnet10", "resnet18")
TIMM = "timm/"  # begins the names of timm networks
NETWORK_GROUP = "xrai.networks"  # entry points by which installed packages register theirs

# The sections, and single keys of other sections, that a command takes as flags.
USES = {
    "preprocess": ("labels", "images", "splits", "shards"),
    "train": (
        *("images", "cache", "loader", "model", "augment", "optim", "train"),
        *("checkpoint", "evaluate", "review"),
    ),
    "evaluate": ("cache", "loader", "evaluate", "train.threads", "train.timeout_s"),
    "predict": ("images", "train.threads"),
    "serve": ("train.threads",),
    "export": (),
    "verify": (),
    "runs": (),
}


def takes(command: str, name: str) -> bool:
    """Whether a command takes the key `name`, section.key, as a flag."""
    return name in USES[command] or name.partition(".")[0] in USES[command]


def _key(default: Any, meaning: str, interval: str = "") -> Any:
    """A key; `interval` says which numbers are allowed, such as "[1, 10]" or "(0, inf)"."""
    return field(default=default, metadata={"meaning": meaning, "interval": interval})


@dataclass(frozen=True)
class Labels:
    """What the labels of images are, and how tables that state them are read."""

    target: Literal["label", "subtype"] = _key(
        "label", "what is learned: the label, or for pneumonia its subtype beside the normal images"
    )
    names: str = _key(
        "", "classes in order, or findings to use, joined by |; empty: those that are found"
    )
    negative: str = _key(
        "",
        "the class that is not looked for; empty: the one called normal, no finding, negative, "
        "healthy or control",
    )
    layout: Literal["", "nih", "chexpert", "rsna", "vindr", "covidx"] = _key(
        "", "public data set whose tables are read as they are downloaded; empty: none"
    )
    uncertain: Literal["unknown", "negative", "positive"] = _key(
        "unknown", "what a finding of -1 counts as"
    )
    blank: Literal["auto", "unknown", "negative"] = _key(
        "auto",
        "what an empty finding counts as; auto: negative in chexpert, an error in a column "
        "findings, else unknown",
    )
    missing: Literal["error", "skip"] = _key(
        "error", "files that a table names and the source lacks: refuse, or leave them out"
    )
    views: Literal["frontal", "pa", "ap", "all"] = _key(
        "frontal", "views that are used, where the tables of a layout tell them"
    )
    readers: Literal["majority", "any", "all", "agree"] = _key(
        "majority",
        "when a finding is present that several readers looked for (vindr): more than half of them "
        "say so, any, all; agree: unknown where they differ",
    )


@dataclass(frozen=True)
class Images:
    """How a raw file becomes pixels. Preprocessing and prediction share this."""

    size: int = _key(64, "height and width of the stored square, pixels", "[16, 1024]")
    fit: Literal["crop", "squash", "pad"] = _key(
        "crop", "how an image is made square: crop the center, stretch, or pad"
    )
    max_pixels: int = _key(
        100_000_000,
        "a file that declares more pixels is excluded undecoded; one takes up to 5 bytes of memory "
        "a pixel, DICOM 10",
        "[1024, inf)",
    )
    max_set_aside: float = _key(0.05, "share of source files that may be excluded", "[0, 1]")


@dataclass(frozen=True)
class Splits:
    """How patients are divided into train, val and test where the source does not say."""

    val_fraction: float = _key(0.1, "share of patients for val if the source has none", "(0, 1)")
    test_fraction: float = _key(0.1, "share of patients for test if the source has none", "[0, 1)")
    min_val_images: int = _key(32, "a val folder with fewer images joins train", "[0, inf)")
    duplicates: Literal["error", "drop"] = _key(
        "error", "the same image in two splits: refuse, or keep that in test, else val"
    )


@dataclass(frozen=True)
class Shards:
    """How the data set is cut into files."""

    rows: int = _key(1024, "images in one HDF5 shard", "[1, 1000000]")


@dataclass(frozen=True)
class Cache:
    """Where shards of a remote data set are kept on this machine."""

    dir: str = _key("", "folder of the local cache; empty: $XDG_CACHE_HOME/xrai or ~/.cache/xrai")
    max_gib: float = _key(0.0, "size limit of the cache, GiB; 0: no limit", "[0, 1000000]")


@dataclass(frozen=True)
class Loader:
    """How batches are put together."""

    window: int = _key(64, "shards shuffled together; the cache must hold as many", "[1, inf)")
    prefetch: int = _key(2, "batches assembled ahead", "[1, 1000]")
    threads: int = _key(4, "shards fetched at once", "[1, 256]")


@dataclass(frozen=True)
class Model:
    """The network."""

    name: str = _key(
        "resnet10",
        "resnet10 or resnet18: residual networks, 1 or 2 blocks a stage; timm/NAME; or a name that "
        "an installed package registers as xrai.networks",
    )
    width: int = _key(
        16,
        "channels of the first stage of resnet10 and resnet18; each of the three later ones "
        "doubles",
        "[8, 256]",
    )
    weights: str = _key(
        "",
        "initial weights: pretrained (those of timm), or the address of a .safetensors, .pth, .pt "
        "or .bin file; empty: random ones",
    )
    input: Literal["rgb", "standardized", "xrv"] = _key(
        "rgb",
        "what a network of timm sees: three equal channels with the mean and deviation of its "
        "weights; one channel, each image of mean 0 and deviation 1; one from -1024 to 1024",
    )
    batch_norm: Literal["auto", "frozen", "sync", "local"] = _key(
        "auto",
        "statistics of a network of timm: fixed, of all ranks, or of each rank; auto: frozen with "
        "model.weights or --init_from, else sync",
    )
    drop_path: float = _key(
        0.0, "share of images that skip a branch of a network of timm, at the last one", "[0, 1)"
    )


@dataclass(frozen=True)
class Augment:
    """Random changes of the training images, drawn for each image and epoch. 0 turns one off."""

    rotation_deg: float = _key(10.0, "largest rotation either way, degrees", "[0, 180]")
    scale: float = _key(0.12, "largest relative change of size", "[0, 1)")
    shift: float = _key(0.10, "largest shift either way, share of the side", "[0, 1]")
    aspect: float = _key(0.25, "largest relative change of width over height", "[0, 1)")
    shear: float = _key(0.06, "largest horizontal shear, share of the height", "[0, 1]")
    gamma: float = _key(0.4, "largest change of the logarithm of gamma", "[0, 3]")
    contrast: float = _key(0.3, "largest relative change of contrast", "[0, 1)")
    blur: float = _key(0.5, "largest share of a 3x3 binomial blur that is mixed in", "[0, 1]")
    noise: float = _key(0.04, "largest sigma of added noise, grey range 1", "[0, 1]")


@dataclass(frozen=True)
class Optim:
    """The optimizer, its schedule and the loss."""

    name: Literal["adamw", "sgd"] = _key("adamw", "AdamW, or SGD with Nesterov momentum")
    lr: float = _key(3e-3, "peak learning rate", "(0, 100]")
    weight_decay: float = _key(0.05, "decoupled; not applied to norms and biases", "[0, 10]")
    momentum: float = _key(0.9, "momentum of sgd, beta1 of adamw", "[0, 1)")
    layer_decay: float = _key(
        1.0, "factor of the learning rate from each layer to the one before; 1: none", "(0, 1]"
    )
    warmup_fraction: float = _key(0.1, "share of all steps in linear warm-up", "[0, 1)")
    clip_norm: float = _key(1.0, "largest L2 norm of the gradient; 0: no clipping", "[0, inf)")
    ema_decay: float = _key(
        0.998, "decay a step of the averaged weights, which are saved", "[0, 1)"
    )
    label_smoothing: float = _key(0.0, "label smoothing", "[0, 1)")
    class_weighting: float = _key(
        0.0, "balance of the classes in the loss; 0: as they are; 1: equal", "[0, 1]"
    )
    logit_adjustment: float = _key(
        1.0, "weight of the log class prior in the logits (Menon et al. 2021); 0: off", "[0, inf)"
    )


@dataclass(frozen=True)
class Train:
    """The training job."""

    epochs: int = _key(40, "passes over the training split", "[1, 100000]")
    freeze_epochs: int = _key(0, "first epochs in which only the head learns", "[0, 100000]")
    seed: int = _key(0, "seed of weights, order and augmentation", "[0, 2147483647]")
    global_batch_size: int = _key(64, "images a step, over all ranks together", "[1, inf)")
    accumulation_steps: int = _key(1, "parts of a rank's batch, to save memory", "[1, inf)")
    precision: Literal["auto", "bf16", "fp16", "off", "fp64"] = _key(
        "auto", "auto: bf16 where that is fast; off: fp32; fp64: to compare runs exactly"
    )
    compile: bool = _key(False, "torch.compile the network; needs a compiler")
    threads: int = _key(0, "CPU threads a rank; 0: cores divided by ranks", "[0, 1024]")
    patience: int = _key(
        0, "stop after so many epochs without a better score; 0: never", "[0, inf)"
    )
    max_steps: int = _key(0, "stop after this many steps; 0: no limit", "[0, inf)")
    max_minutes: float = _key(0.0, "stop after this many minutes; 0: no limit", "[0, inf)")
    log_every: int = _key(
        20,
        "steps after which a loss that is not finite is reported at the latest, and a GPU waited "
        "for; the step itself changes no weight",
        "[1, 100000]",
    )
    profile: str = _key("", "steps A:B, from 1, to profile into profile.json (Chrome trace)")
    timeout_s: float = _key(
        600.0, "seconds to wait for other ranks until the first step ends", "(0, 1000000]"
    )
    step_timeout_s: float = _key(
        300.0, "seconds to wait for other ranks after the first step", "(0, 1000000]"
    )


@dataclass(frozen=True)
class Checkpoint:
    """What is saved on the way, to resume from."""

    every: int = _key(0, "steps between checkpoints; 0: one at the end of each epoch", "[0, inf)")
    keep_last: int = _key(2, "how many of the newest checkpoints are kept", "[1, inf)")
    keep_best: int = _key(1, "how many of the best checkpoints are kept", "[1, inf)")


@dataclass(frozen=True)
class Evaluate:
    """How results are measured."""

    batch_size: int = _key(
        256, "images a step in evaluation, over all ranks together", "[1, 65536]"
    )
    shift_draws: int = _key(2, "augmented copies scored for each val image", "[1, 100]")
    num_bootstrap: int = _key(1000, "bootstrap samples behind each 95 % interval", "[10, 1000000]")


@dataclass(frozen=True)
class Review:
    """Which images are sent to review instead of getting a class."""

    unlike: str = _key(
        "",
        "folder, .zip or s3://bucket/prefix of images that are to go to review, such as those of "
        "adults where children are classified; empty: none",
    )


@dataclass(frozen=True)
class Config:
    """All keys of all commands."""

    labels: Labels = field(default_factory=Labels)
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
    review: Review = field(default_factory=Review)

    def shaped_by(self, stored: Mapping[str, Any]) -> "Config":
        """The same with the sections of a data set's own config, as dataset.json has it."""
        own = build(flatten(stored, where="in the config of dataset.json"))
        sections = {name: getattr(own, name) for name in USES["preprocess"]}
        return dataclasses.replace(self, **sections)

    def to_mapping(self) -> dict[str, dict[str, Any]]:
        """Sections of plain values, as they stand in YAML and in dataset.json."""
        return dataclasses.asdict(self)

    def to_yaml(self, *commands: str) -> str:
        """The resolved config as YAML, in the order of declaration: all keys, or those that one of
        these commands takes.
        """
        wanted = {
            section: {
                key: value
                for key, value in keys.items()
                if not commands or any(takes(each, f"{section}.{key}") for each in commands)
            }
            for section, keys in self.to_mapping().items()
        }
        kept = {section: keys for section, keys in wanted.items() if keys}
        return yaml.safe_dump(kept, sort_keys=False)


SECTIONS: dict[str, type] = get_type_hints(Config)


@dataclass(frozen=True)
class KeySpec:
    """One config key as declared."""

    name: str  # section.key
    type: Any
    default: Any
    meaning: str
    interval: str

    def allowed(self) -> str:
        """What values the key takes, in words."""
        if get_origin(self.type) is Literal:
            return "one of " + ", ".join(option or "empty" for option in get_args(self.type))
        kind = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        if not self.interval:
            return kind[self.type]
        low, high = self.interval[1:-1].split(", ")
        parts = [f"{'at least' if self.interval[0] == '[' else 'above'} {low}"]
        if high != "inf":
            parts.append(f"{'at most' if self.interval[-1] == ']' else 'below'} {high}")
        return f"{kind[self.type]} {' and '.join(parts)}"

    def check(self, value: Any, where: str = "") -> Any:
        """The value in the key's own type. Raises `ConfigError` where it is not allowed."""
        checked = value
        if get_origin(self.type) is Literal:
            if value is False and "off" in get_args(self.type):  # YAML 1.1 reads a bare `off` so
                checked = "off"
            is_allowed = checked in get_args(self.type)
        else:
            if self.type is float and type(value) in (int, str):  # YAML 1.1 reads 1e-3 as text
                with suppress(ValueError, OverflowError):
                    checked = float(value)
            is_allowed = type(checked) is self.type and self._holds(checked)
        if not is_allowed:
            place = f" {where}" if where else ""
            raise ConfigError(
                f"{self.name} = {value!r}{place} is not allowed: it takes {self.allowed()}"
            )
        return checked

    def _holds(self, value: Any) -> bool:
        """Whether a number is in the interval; NaN and infinity never are."""
        if not self.interval:
            return True
        low, high = (float(end) for end in self.interval[1:-1].split(", "))
        return (low < value or (self.interval[0] == "[" and low == value)) and (
            value < high or (self.interval[-1] == "]" and value == high)
        )


def all_keys() -> Iterator[KeySpec]:
    """Every config key, in the order of declaration."""
    for section, section_class in SECTIONS.items():
        types = get_type_hints(section_class)
        for key in dataclasses.fields(section_class):
            yield KeySpec(f"{section}.{key.name}", types[key.name], key.default, **key.metadata)


def from_mapping(mapping: Any, *, where: str) -> Config:
    """A saved config, checked as a config file is. `where` names it in messages, such as
    "in FILE". Raises `ConfigError`.
    """
    return build(flatten(mapping, where=where))


def build(values: Mapping[str, Any]) -> Config:
    """The config of checked {section.key: value}, with defaults for the other keys."""
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for name, value in values.items():
        section, _, key = name.partition(".")
        sections[section][key] = value
    config = Config(**{name: SECTIONS[name](**keys) for name, keys in sections.items()})
    if config.splits.val_fraction + config.splits.test_fraction >= 1:
        raise ConfigError(
            f"splits.val_fraction = {config.splits.val_fraction} and splits.test_fraction = "
            f"{config.splits.test_fraction} leave nothing to train on: their sum must be below 1"
        )
    _refuse_unknown_network(config.model.name)
    return config


def _refuse_unknown_network(name: str) -> None:
    if name in OWN_NETWORKS or name.startswith(TIMM):
        return
    names = [*OWN_NETWORKS, f"{TIMM}NAME", *sorted(entry_points(group=NETWORK_GROUP).names)]
    if name not in names:
        raise ConfigError(
            f"model.name = {name!r} is not allowed: it takes {', '.join(names)}, or the name of a "
            f"network that an installed package registers as {NETWORK_GROUP}"
        )


def flatten(mapping: Any, *, where: str) -> dict[str, Any]:
    """Checked {section.key: value} of nested sections; raises `ConfigError` for the first key
    that is wrong.
    """
    keys = {spec.name: spec for spec in all_keys()}
    if mapping is None:
        return {}
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: a config holds sections of keys, not {type(mapping).__name__}")
    values: dict[str, Any] = {}
    for section, entries in mapping.items():
        if section not in SECTIONS:
            raise ConfigError(
                f"unknown section {section!r} {where}{nearest(str(section), SECTIONS)}"
            )
        if not isinstance(entries, Mapping):
            raise ConfigError(f"section {section!r} {where} must hold keys, not {entries!r}")
        for key, value in entries.items():
            name = f"{section}.{key}"
            if name not in keys:
                raise ConfigError(
                    f"unknown key {name!r} (value {value!r}) {where}{nearest(name, keys)}"
                )
            values[name] = keys[name].check(value, where)
    return values


def read_file(name: str) -> dict[str, Any]:
    """Checked {section.key: value} of a YAML file. A name without slash and suffix that is no
    file means the config of that name which comes with xrai.
    """
    shipped = {path.stem: path for path in Path(__file__).parent.glob("configs/*.yaml")}
    path = Path(name)
    try:
        if not path.is_file():
            path = shipped.get(name, path)
        data = read_once(path, max_bytes=_MAX_YAML + 1)  # a device without an end, perhaps
    except FileNotFoundError:
        raise ConfigError(
            f"there is no config file {name}; --config takes the path of a YAML file, or "
            f"{', '.join(sorted(shipped))}"
        ) from None
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or error
        raise ConfigError(f"config file {name!r} cannot be read: {cause}") from error
    return flatten(load_yaml(data, where=f"config file {name}"), where=f"in {name}")


def load_yaml(data: bytes, *, where: str) -> Any:
    """The plain values of a small YAML file. Raises `ConfigError` if it is not valid, or if it is
    too large or nested too deep once its aliases are replaced. `where` names it.
    """
    try:
        if len(data) > _MAX_YAML:
            raise yaml.YAMLError(f"it has more than {_MAX_YAML} bytes")
        return yaml.load(data.decode(), _Loader)  # a SafeLoader
    except _NOT_YAML as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from error


_MAX_YAML = 65_536  # bytes, and characters and nodes once aliases are replaced
_MAX_DEPTH = 20
# What PyYAML raises on values that do not match their tag or form
_NOT_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)


# What is read as a number: decimal alone, where YAML 1.1 reads 010 as 8 and 1:30 as 90
_NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(?:0|[1-9][0-9_]*)\Z"),
    "tag:yaml.org,2002:float": re.compile(
        r"(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
}


class _Loader(yaml.SafeLoader):
    """YAML with decimal numbers alone, in which a key may not stand twice, and a few aliases cannot
    mean millions of nodes.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012, the name and type are PyYAML's
        first: [(tag, _NUMBERS.get(tag, pattern)) for tag, pattern in resolvers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth, self._sizes = 0, dict[yaml.Node, int]()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {_MAX_DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.ScalarNode):
            self._sizes[node] = 1 + len(node.value)
        elif node is not None:
            is_mapping = isinstance(node, yaml.MappingNode)
            parts = chain.from_iterable(node.value) if is_mapping else node.value
            self._sizes[node] = 1 + sum(self._sizes.get(part, 1) for part in parts)
        if node is not None and self._sizes[node] > _MAX_YAML:
            raise yaml.YAMLError("it is too large once its aliases are replaced")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                raise yaml.YAMLError(
                    f"{key.value!r} in line {line} is already in line {lines[key.value]}; "
                    "a key or section may stand only once"
                )
            if isinstance(key, yaml.ScalarNode):
                lines[key.value] = line
        return super().construct_mapping(node, deep)


def nearest(name: str, valid: Iterable[str], *, prefix: str = "") -> str:
    """The end of a message about an unknown name: the most similar valid one, if any."""
    last_parts = {key.rpartition(".")[2]: key for key in valid}
    found = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    if not found:
        last = difflib.get_close_matches(name.rpartition(".")[2], last_parts, n=1, cutoff=0.7)
        found = [last_parts[part] for part in last]
    return f"; did you mean {prefix}{found[0]}?" if found else "; --help lists what is allowed"
