"""From weights to scores: evaluation over all ranks, and the inference model of a finished run."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xrai.config import Augment, Config, Model
from xrai.errors import RunError
from xrai.learning.augment import augment
from xrai.learning.checkpoint import read_state
from xrai.learning.distributed import Ranks
from xrai.learning.model import ResNet
from xrai.store import Store

MODEL_FILE = "model.pt"
SCHEMA_VERSION = 1
_SHIFT_SEED = 20_180_222  # the draws that stand for other hospitals are the same in every run


class Batch(Protocol):
    """What a loader hands out: this rank's part of a global batch. It may be empty at a ragged end."""

    @property
    def images(self) -> NDArray[np.uint8]:
        """(n, 1, H, W)."""

    @property
    def labels(self) -> NDArray[np.uint8]:
        """(n,), 1 for pneumonia."""

    @property
    def rows(self) -> NDArray[np.int64]:
        """(n,), positions in the split."""

    @property
    def num_global(self) -> int:
        """Images of the global batch, all ranks together."""


class Loader(Protocol):
    """The batches of one split, for one rank."""

    @property
    def num_images(self) -> int:
        """Of the split, all ranks together."""

    @property
    def num_batches(self) -> int:
        """Global batches of an epoch."""

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch from batch `start` on."""


@dataclass(frozen=True)
class Predictions:
    """Logits of every image of a split, once each, in the order of its rows. All arrays are (draws, N)."""

    rows: NDArray[np.int64]
    logits: NDArray[np.float64]

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """Of pneumonia, (draws, N), in [0, 1]."""
        return 1 / (1 + np.exp(-self.logits))


def to_grey(images: NDArray[np.uint8], device: torch.device, dtype: torch.dtype) -> Tensor:
    """(n, 1, H, W) uint8 to grey values in [0, 1] on the device."""
    tensor = torch.from_numpy(images)
    if device.type == "cuda":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(dtype) / 255


@torch.inference_mode()
def predict_split(
    model: nn.Module, loader: Loader, *, ranks: Ranks, shift: Augment | None = None, draws: int = 1
) -> Predictions:
    """Score every image of a split exactly once over all ranks, in fp32 (or the model's own fp64).

    With `shift`, each image is scored `draws` times, each time changed by a draw of its own that is the same in every
    run: images from elsewhere, for want of images from elsewhere.
    """
    model.eval()
    dtype = next(model.parameters()).dtype
    rows: list[NDArray[np.int64]] = []
    logits: list[NDArray[np.float64]] = []
    for batch in loader.epoch(0):
        if len(batch.rows) == 0:
            continue
        images = to_grey(batch.images, ranks.device, dtype)
        positions = torch.from_numpy(batch.rows).to(ranks.device)
        scored = []
        for draw in range(draws):
            seen = images if shift is None else augment(images, positions, seed=_SHIFT_SEED, epoch=draw, strength=shift)
            scored.append(model(seen.contiguous(memory_format=torch.channels_last)).double().cpu().numpy())
        rows.append(batch.rows)
        logits.append(np.stack(scored))  # (draws, n)
    mine = (
        np.concatenate(rows) if rows else np.empty(0, np.int64),
        np.concatenate(logits, axis=1) if logits else np.empty((draws, 0)),
    )
    all_parts = ranks.gather(mine)
    all_rows = np.concatenate([part[0] for part in all_parts])
    all_logits = np.concatenate([part[1] for part in all_parts], axis=1)
    order = np.argsort(all_rows, kind="stable")
    all_rows = all_rows[order]
    assert np.array_equal(all_rows, np.arange(loader.num_images)), "each image is counted exactly once"
    return Predictions(np.broadcast_to(all_rows, all_logits.shape), all_logits[:, order])


def build_model(config: Model) -> ResNet:
    """The network of a config, with fresh weights drawn from torch's global generator."""
    return ResNet(name=config.name, width=config.width)


def save_model(
    path: Path, network: nn.Module, *, config: Config, classes: Sequence[str], threshold: float, run_id: str,
    fingerprint: str,
) -> None:  # fmt: skip
    """Write model.pt: weights for inference with all that serving needs to treat a picture as training did."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "weights": {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()},
        "model": asdict(config.model),
        "images": asdict(config.images),
        "classes": list(classes),
        "threshold": float(threshold),
        "run_id": run_id,
        "fingerprint": fingerprint,
    }
    temporary = path.with_name(path.name + ".tmp")
    torch.save(content, temporary)
    temporary.replace(path)


@dataclass(frozen=True)
class TrainedModel:
    """A network ready for inference with its preprocessing and operating threshold."""

    network: ResNet
    image_size: int
    fit: str
    max_pixels: int
    classes: tuple[str, str]
    threshold: float
    run_id: str
    fingerprint: str


def load_model(store: Store, *, folder: Path) -> TrainedModel:
    """The inference model of a finished run, from the run's place in a store.

    A remote file is first copied into `folder`. Raises `RunError` where there is no model, or one of another version.
    """
    if store.size(MODEL_FILE) is None:
        raise RunError(f"{store.uri} holds no {MODEL_FILE}: no such run, or its training has not ended")
    content = read_state(store, MODEL_FILE, sha256=None, folder=folder)
    if content.get("schema_version") != SCHEMA_VERSION:
        raise RunError(
            f"{MODEL_FILE} of {store.uri} has schema version {content.get('schema_version')}, "
            f"this xrai reads version {SCHEMA_VERSION}"
        )
    network = build_model(Model(**content["model"]))
    network.load_state_dict(content["weights"])
    network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    first, second = content["classes"]
    return TrainedModel(
        network,
        int(content["images"]["size"]),
        str(content["images"]["fit"]),
        int(content["images"]["max_pixels"]),
        (first, second),
        float(content["threshold"]),
        str(content["run_id"]),
        str(content["fingerprint"]),
    )
