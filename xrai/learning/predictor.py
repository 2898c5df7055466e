"""From weights to scores: a split over all ranks, and the model file of a finished run."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xrai.config import OWN_NETWORKS, TIMM, Augment, Images, Model
from xrai.dataset.unlike import Unlike
from xrai.errors import CorruptError, RunError
from xrai.labels import LabelSpec
from xrai.learning.augment import augment
from xrai.learning.batch import Loader, as_grey, to_device
from xrai.learning.checkpoint import MISFITS, NUM_TRANSFERS, read_state, write_state
from xrai.learning.distributed import Ranks
from xrai.learning.network import Network, ResNet, build_registered
from xrai.learning.typicality import SHIFT_SEED, Typicality
from xrai.log import progress
from xrai.store import Store

MODEL_FILE = "model.pt"
SCHEMA_VERSION = 5
_READ_VERSIONS = (3, 4, 5)  # 3 has no priors; review in 3 and 4 has no distance of fine detail


@dataclass(frozen=True)
class Predictions:
    """What a network says of every image of a split, once each, in the order of its rows."""

    logits: NDArray[np.float64]  # (draws, N, C)
    # (draws, N), above 1 means review; None: not measured
    atypicality: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Trained:
    """The best epoch's network, and its scores of images that it was not trained on."""

    network: Network
    epoch: int  # counted from 1
    typicality: Typicality
    scored: dict[str, Predictions]  # by split
    shifted: Predictions  # of augmented validation images
    unlike: Unlike | None = None  # what review was fitted to, in addition to training images
    num_unlike_review: int = 0  # how many of its held-out images go to review


@torch.inference_mode()
def predict_split(
    model: Network,
    loader: Loader,
    *,
    ranks: Ranks,
    shift: Augment | None = None,
    draws: int = 1,
    typicality: Typicality | None = None,
) -> Predictions:
    """Score every image of a split exactly once over all ranks, in fp32 (or the model's own fp64).

    With `shift`, each image is scored `draws` times, each time augmented by a draw of its own that
    is the same in every run: a stand-in for images of other hospitals. With `typicality`, the
    predictions also say how unlike the training images each image is.
    """
    model.eval()
    model = model.for_inference()
    dtype = next(model.parameters()).dtype
    rows: list[NDArray[np.int64]] = []
    found: list[Tensor] = []  # (draws, n, C), or with typicality (draws, n, C + 1), on the device
    with progress("score", total=None, unit="batches", closing_line=False) as bar:
        for batch in to_device(loader.epoch(0), ranks.device):
            bar.update()
            if len(batch.own_rows) == 0:
                continue
            images = as_grey(batch.images, dtype)
            scored = []
            for draw in range(draws):
                seen = images
                if shift is not None:
                    seen = augment(images, batch.rows, seed=SHIFT_SEED, epoch=draw, strength=shift)
                seen = seen.contiguous(memory_format=torch.channels_last)
                if typicality is None:
                    scored.append(model(seen))
                else:
                    logits, atypicality = typicality.atypicality(model, seen)
                    scored.append(torch.cat([logits, atypicality[:, None]], dim=1))
            rows.append(batch.own_rows)
            found.append(torch.stack(scored))
    scores = [each.double().cpu().numpy() for each in found]  # here Python waits for the device
    parts = [part for own in ranks.gather((rows, scores)) for part in zip(*own, strict=True)]
    all_rows = np.concatenate([part[0] for part in parts])
    order = np.argsort(all_rows, kind="stable")
    is_whole = np.array_equal(all_rows[order], np.arange(loader.num_images))
    assert is_whole, "each image counts exactly once"
    all_scores = np.concatenate([part[1] for part in parts], axis=1)[:, order]
    if typicality is None:
        return Predictions(all_scores)
    return Predictions(all_scores[:, :, :-1], all_scores[:, :, -1])


def build_model(config: Model, num_outputs: int, *, image_size: int = 64) -> Network:
    """The network of a config, with fresh weights drawn from torch's global generator.

    `image_size` is the height and width of its images in pixels; some networks take no other.
    """
    if config.name in OWN_NETWORKS:
        return ResNet(name=config.name, width=config.width, num_outputs=num_outputs)
    if config.name.startswith(TIMM):
        from xrai.learning import zoo  # here: few runs need it

        return zoo.build(config, num_outputs=num_outputs, image_size=image_size)
    return build_registered(config.name, num_outputs=num_outputs, image_size=image_size)


@dataclass(frozen=True)
class TrainedModel:
    """A network for inference with its preprocessing, calibration, threshold and review rule."""

    network: Network
    model: Model  # the config that `network` was built from
    images: Images  # how images are preprocessed
    labels: LabelSpec
    # One for each output; a single one for the logits of classes that exclude each other
    temperatures: tuple[float, ...]
    # On the scale of calibrated probabilities, sigmoid(logit / temperature), one for each output;
    # none for classes that exclude each other: the most probable one is called
    thresholds: tuple[float, ...]
    typicality: Typicality
    run_id: str
    fingerprint: str  # of the data set
    # Shares of images at which the probabilities are calibrated, by class or finding; for two
    # classes, that of the second one. Empty in a file of version 3
    priors: tuple[float, ...] = ()

    @property
    def image_size(self) -> int:
        """Height and width of what the network sees, in pixels."""
        return self.images.size

    @property
    def fit(self) -> str:
        """How images are made square."""
        return self.images.fit


def describe_calls(
    labels: LabelSpec, thresholds: Sequence[float], temperatures: Sequence[float]
) -> dict[str, object]:
    """What a file states of the outputs: their names, how they are calibrated and called."""
    classes = list(labels.classes)
    if labels.task == "binary":
        (threshold,), (temperature,) = thresholds, temperatures
        return {"classes": classes, "threshold": threshold, "temperature": temperature}
    return {
        "task": labels.task,
        "classes": classes,
        "thresholds": dict(zip(classes, thresholds, strict=False)),  # none for classes
        "temperatures": list(temperatures),
    }


def save_model(path: Path, trained: TrainedModel) -> None:
    """Write model.pt: the weights, and all that serving needs to treat images as training did."""
    write_state(path, contents_of(trained))


def contents_of(trained: TrainedModel) -> dict[str, Any]:
    """What model.pt holds: tensors, texts and numbers alone."""
    weights, typicality = (
        {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
        for module in (trained.network, trained.typicality)
    )
    return {
        "schema_version": SCHEMA_VERSION,
        "weights": weights,
        "model": asdict(trained.model),
        "images": asdict(trained.images),
        "task": trained.labels.task,
        "classes": list(trained.labels.classes),
        "temperatures": [float(value) for value in trained.temperatures],
        "thresholds": [float(value) for value in trained.thresholds],
        "priors": [float(value) for value in trained.priors],
        "typicality": typicality,
        "run_id": trained.run_id,
        "fingerprint": trained.fingerprint,
    }


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
    version = content.get("schema_version")
    if version not in _READ_VERSIONS:
        raise RunError(
            f"{MODEL_FILE} of {store.uri} has schema version {version}, this xrai reads versions "
            f"{', '.join(map(str, _READ_VERSIONS))}"
        )
    try:
        return build_trained(content)
    except MISFITS as error:
        raise CorruptError(
            f"{MODEL_FILE} of {store.uri} does not hold what a run saves: {error}"
        ) from error


def build_trained(content: dict[str, Any]) -> TrainedModel:
    """The model from what `contents_of` gave. Raises various errors if it is anything else."""
    version = content.pop("schema_version")
    if version == 3:
        content["priors"] = []
    weights = content.pop("weights")
    content["model"], content["images"] = Model(**content["model"]), Images(**content["images"])
    labels = LabelSpec(content.pop("task"), tuple(content.pop("classes")))
    if ("both" in content["typicality"]) != (version >= 5):
        raise ValueError(f"review of version {version} has {', '.join(content['typicality'])}")
    content["labels"], content["typicality"] = labels, Typicality(**content["typicality"])
    numbers = {name: tuple(content[name]) for name in ("temperatures", "thresholds", "priors")}
    content.update(numbers)
    temperatures, thresholds, priors = numbers.values()
    is_multiclass = labels.task == "multiclass"
    num = labels.num_outputs
    if (
        labels.fault()
        or (len(temperatures), len(thresholds)) != ((1, 0) if is_multiclass else (num, num))
        or not all(0 < value < math.inf for value in temperatures)
        or not all(0 <= value <= 1 for value in thresholds)
        or len(priors) not in (0, num)
        or not all(0 < value < 1 for value in priors)
    ):
        raise ValueError(f"{labels}, {numbers}")
    side = content["images"].size
    network = build_model(content["model"], num, image_size=side)
    network.load_state_dict(weights)
    network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
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
