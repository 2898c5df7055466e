"""From weights to scores: evaluation over all ranks, and the inference model of a finished run."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from xrai.config import Augment, Config, Model
from xrai.errors import RunError
from xrai.learning.augment import augment
from xrai.learning.batch import Loader, to_grey
from xrai.learning.checkpoint import read_state
from xrai.learning.distributed import Ranks
from xrai.learning.model import ResNet, fold_filters
from xrai.learning.typicality import SHIFT_SEED, Typicality
from xrai.log import progress
from xrai.store import Store

MODEL_FILE = "model.pt"
SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Predictions:
    """Logits of every image of a split, once each, in the order of its rows. All arrays are
    (draws, N).
    """

    rows: NDArray[np.int64]
    logits: NDArray[np.float64]
    atypicality: NDArray[np.float64] | None = (
        None  # above 1 asks for review; None where it was not asked for
    )

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """Of pneumonia, (draws, N), in [0, 1]."""
        return 1 / (1 + np.exp(-self.logits))


@torch.inference_mode()
def predict_split(
    model: nn.Module, loader: Loader, *, ranks: Ranks, shift: Augment | None = None, draws: int = 1,
    typicality: Typicality | None = None,
) -> Predictions:  # fmt: skip
    """Score every image of a split exactly once over all ranks, in fp32 (or the model's own fp64).

    With `shift`, each image is scored `draws` times, each time changed by a draw of its own that is
    the same in every run: images from elsewhere, for want of images from elsewhere. With
    `typicality`, which needs a `ResNet`, the predictions also say how unlike the training images
    each image is.
    """
    model.eval()
    if isinstance(model, ResNet):
        model = fold_filters(model)
    dtype = next(model.parameters()).dtype
    rows: list[NDArray[np.int64]] = []
    scores: list[NDArray[np.float64]] = []
    with progress("score", total=None, unit="batches", closing_line=False) as bar:
        for batch in loader.epoch(0):
            bar.update()
            if len(batch.rows) == 0:
                continue
            images = to_grey(batch.images, ranks.device, dtype)
            positions = torch.from_numpy(batch.rows).to(ranks.device)
            scored = []
            for draw in range(draws):
                seen = (
                    images
                    if shift is None
                    else augment(images, positions, seed=SHIFT_SEED, epoch=draw, strength=shift)
                )
                seen = seen.contiguous(memory_format=torch.channels_last)
                if typicality is None:
                    found = model(seen)[None]  # (1, n)
                else:
                    assert isinstance(model, ResNet), (
                        "atypicality is a matter of the network's own features"
                    )
                    found = torch.stack(typicality.atypicality(model, seen))  # (2, n)
                scored.append(found.double().cpu().numpy())
            rows.append(batch.rows)
            scores.append(np.stack(scored, axis=1))  # (1 or 2, draws, n)
    mine = (
        np.concatenate(rows) if rows else np.empty(0, np.int64),
        np.concatenate(scores, axis=2)
        if scores
        else np.empty((1 if typicality is None else 2, draws, 0)),
    )
    all_parts = ranks.gather(mine)
    all_rows = np.concatenate([part[0] for part in all_parts])
    all_scores = np.concatenate([part[1] for part in all_parts], axis=2)
    order = np.argsort(all_rows, kind="stable")
    all_rows, all_scores = all_rows[order], all_scores[:, :, order]
    assert np.array_equal(all_rows, np.arange(loader.num_images)), (
        "each image is counted exactly once"
    )
    logits = all_scores[0]
    return Predictions(
        np.broadcast_to(all_rows, logits.shape),
        logits,
        None if typicality is None else all_scores[1],
    )


def build_model(config: Model) -> ResNet:
    """The network of a config, with fresh weights drawn from torch's global generator."""
    return ResNet(name=config.name, width=config.width)


def save_model(
    path: Path, network: nn.Module, *, config: Config, classes: Sequence[str], threshold: float, temperature: float,
    typicality: Typicality, run_id: str, fingerprint: str,
) -> None:  # fmt: skip
    """Write model.pt: weights for inference with all that serving needs to treat a picture as
    training did.

    `threshold` is on the scale of probabilities, which are sigmoid(logit / `temperature`).
    """
    content = {
        "schema_version": SCHEMA_VERSION,
        "weights": {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()},
        "model": asdict(config.model),
        "images": asdict(config.images),
        "classes": list(classes),
        "threshold": float(threshold),
        "temperature": float(temperature),
        "typicality": typicality.to_state(),
        "run_id": run_id,
        "fingerprint": fingerprint,
    }
    temporary = path.with_name(path.name + ".tmp")
    torch.save(content, temporary)
    temporary.replace(path)


@dataclass(frozen=True)
class TrainedModel:
    """A network ready for inference with its preprocessing, calibration, operating threshold and
    rule of review.
    """

    network: ResNet
    image_size: int
    fit: str
    max_pixels: int
    classes: tuple[str, str]
    threshold: float  # on the scale of `probabilities`
    temperature: float
    typicality: Typicality
    run_id: str
    fingerprint: str

    def probabilities(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """Calibrated probabilities of the second class, of the logits' shape: sigmoid(logit /
        temperature).

        Guo et al. 2017, https://arxiv.org/abs/1706.04599.
        """
        probabilities: NDArray[np.float64] = np.exp(-np.logaddexp(0, -logits / self.temperature))
        return probabilities


def load_model(store: Store, *, folder: Path) -> TrainedModel:
    """The inference model of a finished run, from the run's place in a store.

    A remote file is first copied into `folder`. Raises `RunError` where there is no model, or one
    of another version.
    """
    if store.size(MODEL_FILE) is None:
        raise RunError(
            f"{store.uri} holds no {MODEL_FILE}: no such run, or its training has not ended"
        )
    content = read_state(store, MODEL_FILE, sha256=None, folder=folder)
    if content.get("schema_version") != SCHEMA_VERSION:
        raise RunError(
            f"{MODEL_FILE} of {store.uri} has schema version {content.get('schema_version')}, "
            f"this xrai reads version {SCHEMA_VERSION}"
        )
    _keep_freed_memory()
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
        float(content["temperature"]),
        Typicality.from_state(content["typicality"]),
        str(content["run_id"]),
        str(content["fingerprint"]),
    )


def _keep_freed_memory() -> None:
    """Have the C library keep what a batch frees for the next one, up to twice the block below.

    glibc hands memory back to the system above a limit that follows the largest block freed so far,
    of at most 32 MiB (M_MMAP_THRESHOLD in mallopt(3)). Without this a batch of 64 pictures of 64 px
    met 2,000 page faults, which took as long as the network (2 cores of an AMD EPYC, torch 2.14.1).
    No page of the block is touched. Other allocators, and limits that somebody set, stay as they
    are.
    """
    torch.empty(31 << 20, dtype=torch.uint8)
