"""From weights to scores: a split over all ranks, and the model file of a finished run."""

import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from xrai.config import Augment, Images, Model
from xrai.errors import CorruptError, RunError
from xrai.learning.augment import augment
from xrai.learning.batch import Loader, to_grey
from xrai.learning.checkpoint import MISFITS, NUM_TRANSFERS, read_state, write_state
from xrai.learning.distributed import Ranks
from xrai.learning.network import ResNet, fold_filters
from xrai.learning.typicality import SHIFT_SEED, Typicality
from xrai.log import progress
from xrai.store import Store

MODEL_FILE = "model.pt"
SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Predictions:
    """What a network says of every image of a split, once each, in the order of its rows."""

    logits: NDArray[np.float64]  # (draws, N), as both
    atypicality: NDArray[np.float64] | None = None  # above 1 asks for review; None: not asked for


@dataclass(frozen=True)
class Trained:
    """The best epoch's network, and its scores of images that it was not trained on."""

    network: ResNet
    epoch: int  # counted from 1
    typicality: Typicality
    scored: dict[str, Predictions]  # by split
    shifted: Predictions  # of augmented validation images


@torch.inference_mode()
def predict_split(
    model: nn.Module,
    loader: Loader,
    *,
    ranks: Ranks,
    shift: Augment | None = None,
    draws: int = 1,
    typicality: Typicality | None = None,
) -> Predictions:
    """Score every image of a split exactly once over all ranks, in fp32 (or the model's own fp64).

    With `shift`, each image is scored `draws` times, each time augmented by a draw of its own that
    is the same in every run: a stand-in for images of other hospitals. With `typicality`, which
    needs a `ResNet`, the predictions also say how unlike the training images each image is.
    """
    model.eval()
    if isinstance(model, ResNet):
        model = fold_filters(model)
    dtype = next(model.parameters()).dtype
    rows = [np.empty(0, np.int64)]
    scores = [np.empty((1 if typicality is None else 2, draws, 0))]
    with progress("score", total=None, unit="batches", closing_line=False) as bar:
        for batch in loader.epoch(0):
            bar.update()
            if len(batch.rows) == 0:
                continue
            images = to_grey(batch.images, ranks.device, dtype)
            positions = torch.from_numpy(batch.rows).to(ranks.device)
            scored = []
            for draw in range(draws):
                seen = images
                if shift is not None:
                    seen = augment(images, positions, seed=SHIFT_SEED, epoch=draw, strength=shift)
                seen = seen.contiguous(memory_format=torch.channels_last)
                if typicality is None:
                    found = model(seen)[None]  # (1, n)
                else:
                    assert isinstance(model, ResNet), "atypicality is measured on its features"
                    found = torch.stack(typicality.atypicality(model, seen))  # (2, n)
                scored.append(found.double().cpu().numpy())
            rows.append(batch.rows)
            scores.append(np.stack(scored, axis=1))  # (1 or 2, draws, n)
    parts = ranks.gather((np.concatenate(rows), np.concatenate(scores, axis=2)))
    all_rows = np.concatenate([part[0] for part in parts])
    order = np.argsort(all_rows, kind="stable")
    is_whole = np.array_equal(all_rows[order], np.arange(loader.num_images))
    assert is_whole, "each image counts exactly once"
    all_scores = np.concatenate([part[1] for part in parts], axis=2)[:, :, order]
    return Predictions(all_scores[0], None if typicality is None else all_scores[1])


def build_model(config: Model) -> ResNet:
    """The network of a config, with fresh weights drawn from torch's global generator."""
    return ResNet(name=config.name, width=config.width)


@dataclass(frozen=True)
class TrainedModel:
    """A network for inference with its preprocessing, calibration, threshold and review rule."""

    network: ResNet
    model: Model  # the config that `network` was built from
    images: Images  # how images are preprocessed
    classes: tuple[str, ...]
    threshold: float  # on the scale of calibrated probabilities, sigmoid(logit / temperature)
    temperature: float
    typicality: Typicality
    run_id: str
    fingerprint: str  # of the data set

    @property
    def image_size(self) -> int:
        """Height and width of what the network sees, in pixels."""
        return self.images.size

    @property
    def fit(self) -> str:
        """How images are made square."""
        return self.images.fit


def save_model(path: Path, trained: TrainedModel) -> None:
    """Write model.pt: the weights, and all that serving needs to treat images as training did."""
    weights, typicality = (
        {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
        for module in (trained.network, trained.typicality)
    )
    content = {
        "schema_version": SCHEMA_VERSION,
        "weights": weights,
        "model": asdict(trained.model),
        "images": asdict(trained.images),
        "classes": list(trained.classes),
        "threshold": float(trained.threshold),
        "temperature": float(trained.temperature),
        "typicality": typicality,
        "run_id": trained.run_id,
        "fingerprint": trained.fingerprint,
    }
    write_state(path, content)


def load_model(store: Store, *, sha256: str | None = None) -> TrainedModel:
    """The model of a finished run, from the run's place in a store.

    `sha256` is the hash that the run's summary states; without a summary the file is checked
    against its own checksums. A transfer that damages the file is repeated. Raises `RunError` if
    there is no model, or one of another version, and `CorruptError` if it is not as saved.
    """
    if store.size(MODEL_FILE) is None:
        raise RunError(
            f"{store.uri} holds no {MODEL_FILE}: no such run, or its training has not ended"
        )
    content = _read_model(store, sha256)
    if content.get("schema_version") != SCHEMA_VERSION:
        raise RunError(
            f"{MODEL_FILE} of {store.uri} has schema version {content.get('schema_version')}, "
            f"this xrai reads version {SCHEMA_VERSION}"
        )
    try:
        return _build(content)
    except MISFITS as error:
        raise CorruptError(
            f"{MODEL_FILE} of {store.uri} does not hold what a run saves: {error}"
        ) from error


def _build(content: dict[str, Any]) -> TrainedModel:
    """The model of what `save_model` wrote. Raises several errors if it is something else."""
    del content["schema_version"]
    weights = content.pop("weights")
    content["model"], content["images"] = Model(**content["model"]), Images(**content["images"])
    content["classes"] = tuple(content["classes"])
    content["typicality"] = Typicality(**content["typicality"])
    threshold, temperature = content["threshold"], content["temperature"]
    if not (0 <= threshold <= 1 and 0 < temperature < math.inf):
        raise ValueError(f"threshold {threshold}, temperature {temperature}")
    network = build_model(content["model"])
    network.load_state_dict(weights)
    network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    side = content["images"].size
    with torch.inference_mode():  # whether all tensors fit each other
        content["typicality"].atypicality(network, torch.zeros(1, 1, side, side))
    return TrainedModel(network, **content)


def _read_model(store: Store, sha256: str | None) -> dict[str, Any]:
    name = f"{MODEL_FILE} in {store.uri}"
    num_tries = 1 if store.local_path(MODEL_FILE) is not None else NUM_TRANSFERS
    for _ in range(num_tries - 1):
        with store.as_file(MODEL_FILE) as path, suppress(CorruptError):
            return read_state(path, name=name, sha256=sha256)
    with store.as_file(MODEL_FILE) as path:
        return read_state(path, name=name, sha256=sha256)
