"""Initial weights from outside: timm's pretrained ones, or those in a file.

A file is a .safetensors, or tensors alone that torch.save wrote: nothing else is ever unpickled.
Names may have a prefix (`module.`, `backbone.`), and the tensors may be under a key such as
`state_dict`. A head for other outputs is left out; anything else that the network needs must be in
the file and fit.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xrai.config import TIMM, Model
from xrai.errors import CorruptError, UserError
from xrai.files import sha256_of
from xrai.learning.checkpoint import UNREADABLE
from xrai.learning.network import Network
from xrai.log import get_logger
from xrai.store import open_parent

PRETRAINED = "pretrained"
_CONTAINERS = ("state_dict", "state_dict_ema", "model", "weights", "model_state_dict", "teacher")
_COUNTER = "num_batches_tracked"  # nothing depends on it, and old files lack it
_SHOWN = 5  # names, in a message
_logger = get_logger(__name__)


@dataclass(frozen=True)
class Loaded:
    """Which initial weights were loaded; kept with the run as weights.json."""

    source: str
    sha256: str  # of the file, or of the tensors of pretrained weights
    num_loaded: int
    left_out: tuple[str, ...]  # the network's tensors that stay random: the head of other outputs
    unused: tuple[str, ...]  # the file's tensors that the network does not have


def initial_weights(
    config: Model, network: Network, *, image_size: int
) -> tuple[dict[str, Tensor], Loaded]:
    """The whole state of a network that begins with the weights of the config.

    Raises `UserError` where they cannot be loaded or do not fit.
    """
    if config.weights == PRETRAINED:
        if not config.name.startswith(TIMM):
            raise UserError(
                f"model.weights = {PRETRAINED}, but only networks of timm come with weights, not "
                f"{config.name}: give the address of a file, or --init_from a finished run"
            )
        from xrai.learning.zoo import pretrained_weights

        weights, source = pretrained_weights(config, image_size=image_size)
        sha256 = _hash(weights)
    else:
        source = config.weights
        weights, sha256 = read_weights(source)
    if config.name.startswith(TIMM):
        from xrai.learning.zoo import TimmNetwork, convert

        assert isinstance(network, TimmNetwork)
        weights = convert(weights, network)
    return fit(weights, network, source=source, sha256=sha256)


def fit(
    weights: Mapping[str, Tensor], network: Network, *, source: str, sha256: str
) -> tuple[dict[str, Tensor], Loaded]:
    """The network's state with what fits of `weights`. Raises `UserError` naming what does not."""
    own = network.state_dict()
    weights = _renamed(weights, own)
    heads = network.head_prefixes()
    state, left_out, wrong = dict(own), [], []
    for name, tensor in own.items():
        found = weights.get(name)
        if found is not None and found.shape == tensor.shape:
            state[name] = found.to(tensor.dtype)
        elif name.startswith(heads):
            left_out.append(name)
        elif not name.endswith(_COUNTER):
            of = "missing" if found is None else f"{_size(found)}, not {_size(tensor)}"
            wrong.append(f"{name} ({of})")
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UserError(
            f"model.weights = {source} does not fit this network: {', '.join(wrong[:_SHOWN])}{more}"
            f"; of {len(own)} tensors {len(own) - len(wrong)} fit. Check model.name, and "
            "model.input for the number of channels"
        )
    unused = tuple(sorted(set(weights) - set(own)))
    loaded = Loaded(source, sha256, len(own) - len(left_out), tuple(left_out), unused)
    _logger.info(
        "weights of %s (sha256 %s…): %d tensors; left out: %s; unused: %s",
        *(source, sha256[:12], loaded.num_loaded),
        *(", ".join(names[:_SHOWN]) or "none" for names in (loaded.left_out, unused)),
    )
    return state, loaded


def read_weights(address: str) -> tuple[dict[str, Tensor], str]:
    """The tensors, by name, of a file in a folder or bucket, and the file's SHA-256 in hex.

    Raises `UserError` if there is no such file or its suffix is none of those allowed,
    `CorruptError` if it holds no tensors or cannot be read.
    """
    store, name = open_parent(address)
    if not name.endswith((".safetensors", ".pth", ".pt", ".bin")):
        raise UserError(
            f"model.weights = {address!r} is not allowed: it takes {PRETRAINED}, or the address of "
            "a .safetensors, .pth, .pt or .bin file in a folder or s3://bucket"
        )
    if store.size(name) is None:
        raise UserError(f"model.weights = {address}: there is no such file")
    with store.as_file(name) as path:
        sha256 = sha256_of(path)
        content = _read(path, address)
    for key in _CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {str(name): of for name, of in dict(content).items() if isinstance(of, Tensor)}
    if not tensors:
        raise CorruptError(f"model.weights = {address} holds no tensors")
    return tensors, sha256


def _read(path: Path, address: str) -> Any:
    if address.endswith(".safetensors"):
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError:
            raise UserError(
                f"model.weights = {address} needs safetensors, not installed here: pip install "
                "'xrai[timm]'"
            ) from None
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise CorruptError(f"{address} is not a file of weights: {error}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise CorruptError(
            f"{address} is not a file of tensors alone, and nothing else is read: {cause}"
        ) from error


def _renamed(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by the network's names: the prefix of names in the file is replaced by that of
    the network's own; of all pairs of prefixes, the one that makes most names agree.
    """
    pairs: Counter[tuple[str, str]] = Counter()
    for name in list(weights):
        for other in (name, *_without_prefix(name)):
            for target in (other, f"model.{other}", f"module.{other}"):
                if target in own:
                    pairs[name.removesuffix(other), target.removesuffix(other)] += 1
    if not pairs:
        return dict(weights)
    (old, new), _ = max(pairs.items(), key=lambda item: (item[1], -len(item[0][0])))
    return {
        new + name.removeprefix(old) if name.startswith(old) else name: tensor
        for name, tensor in weights.items()
    }


def _without_prefix(name: str) -> list[str]:
    """`a.b.c` without its first parts: `b.c`, `c`."""
    parts = name.split(".")
    return [".".join(parts[number:]) for number in range(1, min(3, len(parts)))]


def _hash(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _size(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"
