"""A trained network measured on splits of a data set: where data set, learning and results meet.

`xrai.run` uses it at the end of a training, `xrai.evaluate` for a finished run; on rank 0 alone,
because it loads what draws.
"""

import math
from array import array
from collections import Counter
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from xrai.config import Config
from xrai.dataset.loader import Loader
from xrai.dataset.manifest import parse_manifest
from xrai.dataset.rows import is_file_patient
from xrai.dataset.shards import MANIFEST_KEY, DatasetIndex
from xrai.labels import LabelSpec
from xrai.learning.batch import to_grey
from xrai.learning.explain import layer_cam
from xrai.learning.network import Network
from xrai.learning.predictor import Predictions
from xrai.results import baselines
from xrai.results.folder import RunFolder
from xrai.results.record import record_scores
from xrai.results.types import DatasetFacts, Output, Scores, SplitResults, group_of
from xrai.store import open_store


@dataclass(frozen=True)
class Measuring:
    """A trained network, how its logits are read, and the run that its results go to."""

    run: RunFolder
    network: Network
    labels: LabelSpec  # that the network was trained for
    outputs: tuple[Output, ...]
    num_bootstrap: int
    known: baselines.Looks | None  # training images of the same data set, for the baselines

    def record(
        self, loader: Loader, predictions: Predictions, *, folder: str = "", step: int | None = None
    ) -> SplitResults:
        """Write all results of one split below `folder` of the run, and return them.

        `loader` reads the whole split and does not shuffle.
        """
        looks = read_looks(loader, limit=baselines.MAX_IMAGES)
        num, split, atypicality = self.num_bootstrap, loader.split, predictions.atypicality
        columns = loader.columns("labels", "source", "patient", "subtype")
        scores = Scores(
            split=split,
            task=self.labels.task,
            classes=self.labels.classes,
            outputs=self.outputs,
            labels=loader.index.labels.matrix_for(self.labels, columns["labels"]),
            logits=predictions.logits[0],
            patients=columns["patient"].tolist(),
            sources=columns["source"].tolist(),
            subtypes=columns["subtype"].tolist(),
            atypicality=None if atypicality is None else atypicality[0],
        )
        return record_scores(
            self.run,
            scores,
            num_bootstrap=num,
            baselines=baselines.measure_baselines(
                self.known, looks, split=split, num_bootstrap=num
            ),
            folder=folder,
            images=_Images(loader, self.network),
            step=step,
        )


@dataclass(frozen=True)
class _Images:
    """The images of a split and what a network sees in them, for its sheets."""

    loader: Loader
    network: Network

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        size = self.loader.batch_size
        steps = set((rows // size).tolist())
        batches = {step: next(self.loader.epoch(0, start=step)) for step in steps}
        return np.stack([batches[row // size].images[row % size, 0] for row in rows.tolist()])

    def explain(self, images: NDArray[np.uint8], output: int = 0) -> NDArray[np.float32]:
        weight = next(self.network.parameters())
        grey = to_grey(np.ascontiguousarray(images[:, None]), weight.device, weight.dtype)
        heats: NDArray[np.float32] = layer_cam(self.network, grey, output).float().cpu().numpy()
        return heats


def read_looks(loader: Loader, *, limit: int = baselines.MAX_TRAIN) -> baselines.Looks:
    """What the baselines see of the first `limit` images of a split, a random sample of it.

    `loader` reads the whole split and does not shuffle; rows are in the order of their files'
    hashes.
    """
    batches = islice(loader.epoch(0), math.ceil(limit / loader.batch_size))
    border = [baselines.border_features(batch.images[:, 0]) for batch in batches]
    num = min(limit, loader.num_images)
    columns = loader.columns("labels", "patient", "width", "height", stop=num)
    return baselines.Looks(
        labels=columns["labels"],
        spec=loader.index.labels,
        patients=columns["patient"].tolist(),
        geometry=baselines.geometry_features(columns["width"], columns["height"]),
        border=np.concatenate(border)[:num],
    )


def _unknown(index: DatasetIndex, split: str) -> dict[str, int]:
    """Images of a split where each finding is unknown; of classes none."""
    if index.labels.task != "multilabel":
        return {}
    num = index.num_images(split)
    return {name: num - known for name, known in index.num_known_per_class(split).items()}


def describe_dataset(dataset: str, index: DatasetIndex) -> DatasetFacts:
    """What a page says of a data set, from its index and its manifest."""
    excluded: Counter[str] = Counter()
    groups: dict[str, Counter[str]] = {split: Counter() for split in index.splits}
    # a hash for each image: names would take ten times the memory
    patients = {split: array("q") for split in index.splits}
    without_patient: Counter[str] = Counter()
    store, key = open_store(dataset), index.place + MANIFEST_KEY
    with store.as_file(key) as path, path.open("rb") as lines:
        for row in parse_manifest(lines, where=f"{store.uri}/{key}"):
            if row.reason:
                excluded[row.reason] += 1
            elif row.split in patients:
                without_patient[row.split] += is_file_patient(row.patient)
                patients[row.split].append(hash(row.patient))
                groups[row.split][group_of(row.patient)] += 1
    return DatasetFacts(
        source=index.source,
        fingerprint=index.fingerprint,
        image_size=index.image_size,
        fit=index.config["images"]["fit"],
        splits={split: index.num_images_per_class(split) for split in index.splits},
        num_found=index.counts.num_found,
        excluded=dict(excluded),
        num_patients={split: len(np.unique(np.asarray(each))) for split, each in patients.items()},
        num_without_patient=dict(without_patient),
        groups={split: dict(each) for split, each in groups.items()},
        num_images={split: index.num_images(split) for split in index.splits},
        num_unknown={split: _unknown(index, split) for split in index.splits},
        task=index.task,
        reading=Config().shaped_by(index.config).labels,
    )
