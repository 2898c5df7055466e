"""How well recipes hold on images that are not like those of training.

    python -m benchmarks.recipe --source DIR --cache DIR  # configs/pneumonia.yaml, seeds 0, 1, 2
    python -m benchmarks.recipe --source DIR --cache DIR --seeds 0 \\
        --recipe="--config=fast" --recipe="--config=pneumonia --model.width=24"

Each training runs as users run it: labels in a table, `xrai.preprocess`, `torchrun -m xrai.train`;
validation images are carved from its training patients, and the threshold, temperature and review
limit are those that it stored. Then the images that were held out are scored. Data sets, runs and
scores stay in `--cache`, so that a recipe is trained once, however often it is compared.

Trainings, by what is held out (all images of a patient together):

    IM+bacteria, …    trained on one stream of normals (IM or NORMAL2) and one of pneumonias
                      (bacteria or virus), tested on the other two: other patients, rooms and germs
    lowest, highest   the quarter of the patients of each stream with the lowest (highest) numbers
    fold k            a fifth of the patients, at random: no shift

Looks, in which held-out images are scored:

    as they are
    coarse            half as many pixels a side, stored as JPEG of quality 25
    originals         those of them that are in `--originals`, full-size: cropped to a square, where
                      the others were squashed
    normals 86 %      the middle 86 % (80 %) of a normal's height, stretched to the square again,
    high, … 80 %      which is how a wider image looks (docs/decisions/0005-recipe.md)

The first table has each training and look; the second one the mean of each recipe over those that
are real shifts, which are all but folds and stretched normals; the third one compares rules that
choose the threshold. Accuracy is that of 5 pneumonias to 3 normals, as in the official test split.
"""

import argparse
import csv
import hashlib
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO, StringIO
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import roc_auc_score

from xrai.config import USES, from_mapping, load_yaml, read_file
from xrai.dataset.loader import open_split
from xrai.dataset.manifest import Row
from xrai.files import write_atomically
from xrai.ingest.images import decode
from xrai.ingest.layout import lay_out
from xrai.ingest.sources import Source, open_source
from xrai.learning.distributed import join
from xrai.learning.predictor import TrainedModel, load_model, predict_split
from xrai.results.calibration import calibrated, choose_threshold, fit_temperature, log_odds
from xrai.store import open_store

NUM_FOLDS = 5
STREAMS = tuple(
    f"{normals}+{germ}" for normals in ("IM", "NORMAL2") for germ in ("bacteria", "virus")
)
BLOCKS = {"lowest": 0, "highest": 3}  # quarters of the numbers
FOLDS = tuple(f"fold {k}" for k in range(NUM_FOLDS))
AS_THEY_ARE, COARSE, ORIGINALS = "as they are", "coarse", "originals"
FRAMINGS = {"normals 86 % high": 0.86, "normals 80 % high": 0.80}
VALIDATION, AUGMENTED = "validation", "validation, augmented"
PNEUMONIA_SHARE = 390 / 624  # of the official test split
MEASURES = ("auroc", "accuracy", "sensitivity", "specificity", "review")

Floats = NDArray[np.float64]


def main() -> None:
    """Train what the cache lacks, score it, and print the tables."""
    parser = argparse.ArgumentParser(description="Recipes under shifts of the images.")
    parser.add_argument("--source", required=True, help="the public data set: a folder or zip")
    parser.add_argument("--originals", help="full-size images of the same names")
    parser.add_argument("--cache", type=Path, required=True, help="folder for runs and scores")
    parser.add_argument(
        "--recipe", action="append", help="options of xrai train; repeat it to compare"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--trainings", nargs="+", choices=(*STREAMS, *BLOCKS, *FOLDS), default=[*STREAMS, *BLOCKS]
    )
    parser.add_argument("--processes", type=int, default=2)
    flags = parser.parse_args()
    print(
        f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, "
        f"numpy {np.__version__}",
        flush=True,
    )
    bench = Bench(flags.source, flags.originals, flags.cache.resolve(), flags.processes)
    scored: list[Scored] = []
    for recipe in flags.recipe or ["--config=pneumonia"]:
        for training in flags.trainings:
            scored += [bench.scores_of(recipe, training, seed) for seed in flags.seeds]
            print(f"{recipe}: {training} is scored", flush=True)
    print("\n".join(["", *show_looks(scored), "", *show_recipes(scored), "", *show_rules(scored)]))


# --------------------------------------------------------------------------------------- held out


def is_held_out(entry: Row, training: str, blocks: dict[str, list[int]]) -> bool:
    """Whether an image is tested on, not trained with; the same for all images of a patient.

    `blocks` has the three numbers that divide the patients of each stream into quarters.
    """
    stream, _, number = entry.patient.partition(":")
    if training in BLOCKS:
        return sum(int(number) > limit for limit in blocks[stream]) == BLOCKS[training]
    if training in FOLDS:
        fold = int(hashlib.sha256(entry.patient.encode()).hexdigest()[:8], 16) % NUM_FOLDS
        return fold == FOLDS.index(training)
    return stream not in training.split("+")


def hold_out(entries: Sequence[Row], training: str) -> list[Row]:
    """The images that a training is tested on."""
    numbers: dict[str, set[int]] = {}
    for entry in entries:
        stream, _, number = entry.patient.partition(":")
        numbers.setdefault(stream, set()).add(int(number))
    blocks = {
        stream: [int(limit) for limit in np.quantile(sorted(own), [0.25, 0.5, 0.75])]
        for stream, own in numbers.items()
    }
    return [entry for entry in entries if is_held_out(entry, training, blocks)]


def write_labels(path: Path, entries: Iterable[Row], held_out: Sequence[Row]) -> None:
    """The table for `xrai.preprocess --labels`; validation images are carved from those of
    training.
    """
    tested = {entry.path for entry in held_out}
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["path", "label", "patient", "split"])
        for entry in entries:
            label = "PNEUMONIA" if entry.label == 1 else "NORMAL"
            table.writerow(
                [entry.path, label, entry.patient, "test" if entry.path in tested else "train"]
            )


# ------------------------------------------------------------------------------- train and score


@dataclass(frozen=True)
class Scores:
    """What a run says of the images of one look, or of its validation images."""

    labels: NDArray[np.int64]  # (N,) 0 or 1
    logits: Floats  # (N,)
    reviews: NDArray[np.bool_]  # (N,)


@dataclass(frozen=True)
class Scored:
    """All scores of one run."""

    recipe: str
    training: str
    seed: int
    seconds: float  # the command's, whatever else ran on the machine
    looks: dict[str, Scores]


class Bench:
    """Trainings and their scores, kept in a folder."""

    def __init__(self, source: str, originals: str | None, cache: Path, processes: int) -> None:
        self._address, self._source = source, open_source(source)
        self._originals = open_source(originals) if originals else None
        self._cache, self._processes = cache, processes
        paths = self._source.files().paths
        self._entries = lay_out(paths, source=self._source.name).rows

    def scores_of(self, recipe: str, training: str, seed: int) -> Scored:
        """From the cache; else trained and scored, which takes as long as that takes."""
        options = shlex.split(recipe)
        flags = (option.split("=")[0].removeprefix("--") for option in options)
        of_data = [
            option
            for option, name in zip(options, flags, strict=True)
            if name == "config" or name.partition(".")[0] in USES["preprocess"]
        ]
        place = self._cache / training.replace(" ", "-")
        dataset = place / f"dataset-{_short_hash(of_data)}"
        run = f"{_short_hash(options)}-seed-{seed}"
        file = place / f"{run}.csv"
        if not file.exists():
            held_out = hold_out(self._entries, training)
            if not (dataset / "dataset.json").exists():
                place.mkdir(parents=True, exist_ok=True)
                labels = place / "labels.csv"
                write_labels(labels, self._entries, held_out)
                given = [f"--source={self._address}", f"--labels={labels}", f"--dataset={dataset}"]
                run_module("xrai.preprocess", *of_data, *given)
            given = [f"--dataset={dataset}", f"--artifacts={place}", f"--run_id={run}"]
            given += [f"--train.seed={seed}", "--evaluate.num_bootstrap=10"]  # nobody reads them
            began = time.monotonic()
            run_module("xrai.train", *options, *given, processes=self._processes)
            seconds = time.monotonic() - began
            write_scores(file, seconds, self._score(place / run, dataset, held_out))
        seconds, looks = read_scores(file)
        return Scored(recipe, training, seed, seconds, looks)

    def _score(
        self, run: Path, dataset: Path, held_out: Sequence[Row]
    ) -> Iterator[tuple[str, Scores]]:
        store = open_store(str(run))
        model = load_model(store)
        yield from validation_scores(model, store.read("config.yaml"), dataset)
        yield AS_THEY_ARE, score(model, self._source, held_out)
        yield COARSE, score(model, self._source, held_out, change=make_coarse)
        if self._originals is not None:
            full_size = {*self._originals.files().paths}
            found = [entry for entry in held_out if entry.path in full_size]
            yield ORIGINALS, score(model, self._originals, found)
        for look, height in FRAMINGS.items():
            yield look, score(model, self._source, held_out, change=stretch_normals(height))


def _short_hash(options: Sequence[str]) -> str:
    """Of options, and of what the files in `--config` say now."""
    texts = [
        repr(read_file(option.removeprefix("--config=")))
        if option.startswith("--config=")
        else option
        for option in options
    ]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:8]


def run_module(module: str, *options: str | Path, processes: int = 0) -> None:
    """Run a command of xrai, under torchrun where `processes` is given; its output is shown only
    if it fails.
    """
    start = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes else []
    command = [sys.executable, *start, "-m", module, *map(str, options)]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-5000:]}"
        )


def validation_scores(
    model: TrainedModel, config: bytes, dataset: Path
) -> Iterator[tuple[str, Scores]]:
    """Scores of the validation images, and of the augmented copies on which the threshold was
    chosen.
    """
    stored = from_mapping(load_yaml(config, where="config.yaml"), where="in config.yaml")
    loader = open_split(stored, str(dataset), "val")
    labels = np.asarray(loader.labels, dtype=np.int64)
    draws = stored.evaluate.shift_draws
    with join(timeout_s=60) as ranks:
        clean = predict_split(model.network, loader, ranks=ranks)
        shifted = predict_split(
            model.network, loader, ranks=ranks, shift=stored.augment, draws=draws
        )
    for look, logits in ((VALIDATION, clean.logits), (AUGMENTED, shifted.logits)):
        wanted = np.tile(labels, len(logits))
        yield look, Scores(wanted, logits[:, :, 0].ravel(), np.zeros(len(wanted), dtype=np.bool_))


Change = Callable[[Image.Image, Row], Image.Image]  # of an image before it is decoded


@torch.inference_mode()
def score(
    model: TrainedModel, source: Source, entries: Sequence[Row], *, change: Change | None = None
) -> Scores:
    """The scores of images, changed by `change`."""
    logits, reviews = [], []
    for start in range(0, len(entries), 256):
        part = entries[start : start + 256]
        pictures = np.stack([read(model, source, entry, change=change) for entry in part])
        grey = torch.from_numpy(pictures)[:, None].float() / 255  # (B, 1, H, W)
        found, atypicality = model.typicality.atypicality(model.network, grey)
        logits.append(found[:, 0].double().numpy())
        reviews.append(atypicality.numpy() > 1)
    labels = np.array([entry.label for entry in entries], dtype=np.int64)
    return Scores(labels, np.concatenate(logits), np.concatenate(reviews))


def read(
    model: TrainedModel, source: Source, entry: Row, *, change: Change | None
) -> NDArray[np.uint8]:
    """An image as the model sees it, (H, W)."""
    data = source.read(entry.path)
    if change is not None:
        assert isinstance(data, bytes)
        data = np.asarray(change(Image.open(BytesIO(data)).convert("L"), entry))
    return decode(data, size=model.image_size, fit=model.fit, max_pixels=model.images.max_pixels)


def make_coarse(image: Image.Image, entry: Row) -> Image.Image:
    """Half as many pixels a side, stored as JPEG of quality 25."""
    file = BytesIO()
    half = (image.width // 2, image.height // 2)
    image.resize(half, Image.Resampling.BILINEAR).save(file, "JPEG", quality=25)
    return Image.open(file)


def stretch_normals(height: float) -> Change:
    """The middle share `height` of a normal image, stretched to the shape that it had."""

    def change(image: Image.Image, entry: Row) -> Image.Image:
        if entry.label == 1:
            return image
        margin = image.height * (1 - height) / 2
        box = (0, margin, image.width, image.height - margin)
        return image.resize(image.size, Image.Resampling.BILINEAR, box=box)

    return change


def write_scores(path: Path, seconds: float, looks: Iterable[tuple[str, Scores]]) -> None:
    """A line for each image of each look; the first line has the seconds that training took."""
    file = StringIO(newline="")
    table = csv.writer(file)
    table.writerow([seconds])
    for look, scores in looks:
        columns = (scores.labels.tolist(), scores.logits.tolist(), scores.reviews.tolist())
        table.writerows([look, *row] for row in zip(*columns, strict=True))
    write_atomically(path, file.getvalue().encode())


def read_scores(path: Path) -> tuple[float, dict[str, Scores]]:
    """What `write_scores` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        (seconds,), *rows = csv.reader(file)
    looks = {}
    for look, part in groupby(rows, key=lambda row: row[0]):
        _, labels, logits, reviews = zip(*part, strict=True)
        looks[look] = Scores(
            np.array(labels, dtype=np.int64),
            np.array(logits, dtype=np.float64),
            np.array(reviews) == "True",
        )
    return float(seconds), looks


# ---------------------------------------------------------------------------------------- compare


def chosen_on(*looks: str) -> Callable[[dict[str, Scores]], float]:
    """The rule that chooses as training does, but on these scores of the validation images."""

    def choose(scores: dict[str, Scores]) -> float:
        augmented = scores[AUGMENTED]
        temperature = fit_temperature(augmented.labels, augmented.logits)
        labels = np.concatenate([scores[look].labels for look in looks])
        logits = np.concatenate([scores[look].logits for look in looks])
        threshold = choose_threshold(labels, calibrated(logits, temperature))
        return temperature * log_odds(threshold)

    return choose


RULES: dict[str, Callable[[dict[str, Scores]], float]] = {  # to a threshold of logits
    "augmented": chosen_on(AUGMENTED),  # what training does
    "clean": chosen_on(VALIDATION),
    "both": chosen_on(VALIDATION, AUGMENTED),
    "logit 0": lambda scores: 0.0,  # of logit adjustment: where both classes are as probable
}


def measure(scores: Scores, threshold: float) -> dict[str, float]:
    """The measures of one look at a threshold of logits."""
    is_positive, calls = scores.labels == 1, scores.logits >= threshold
    sensitivity = float(np.mean(calls[is_positive]))
    specificity = float(np.mean(~calls[~is_positive]))
    return {
        "auroc": float(roc_auc_score(scores.labels, scores.logits)),
        "accuracy": PNEUMONIA_SHARE * sensitivity + (1 - PNEUMONIA_SHARE) * specificity,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "review": float(np.mean(scores.reviews)),
    }


def looks_of(scored: Iterable[Scored], *, only_shifts: bool) -> list[tuple[str, str]]:
    """The trainings and looks that there are, in order."""
    pairs = dict.fromkeys(
        (one.training, look)
        for one in scored
        for look in one.looks
        if look not in (VALIDATION, AUGMENTED)
    )
    if not only_shifts:
        return list(pairs)
    return [(by, look) for by, look in pairs if by not in FOLDS and look not in FRAMINGS]


def show_looks(scored: Sequence[Scored]) -> list[str]:
    """A table in Markdown: each recipe, training and look; mean over seeds, smallest, largest."""
    lines = [
        f"| recipe | trained on | look | n | {' | '.join(MEASURES)} |",
        "|---" * (4 + len(MEASURES)) + "|",
    ]
    for recipe in dict.fromkeys(one.recipe for one in scored):
        for training, look in looks_of(scored, only_shifts=False):
            found = [
                one
                for one in scored
                if (one.recipe, one.training) == (recipe, training) and look in one.looks
            ]
            rows = [measure(one.looks[look], RULES["augmented"](one.looks)) for one in found]
            cells = []
            for name in MEASURES:
                values = [row[name] for row in rows]
                cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f}–{max(values):.3f})")
            num = len(found[0].looks[look].labels)
            lines.append(f"| {recipe} | {training} | {look} | {num} | {' | '.join(cells)} |")
    return lines


def show_recipes(scored: Sequence[Scored]) -> list[str]:
    """A table in Markdown: the mean of each recipe over the shifts and its standard deviation
    between them, of means over seeds.
    """
    lines = ["| recipe | auroc | accuracy | specificity | s |", "|---|---|---|---|---|"]
    for recipe in dict.fromkeys(one.recipe for one in scored):
        own = [one for one in scored if one.recipe == recipe]
        cells = [over_shifts(own, "augmented", name) for name in ("auroc", "accuracy")]
        cells.append(over_shifts(own, "augmented", "specificity"))
        seconds = statistics.mean(one.seconds for one in own)
        lines.append(f"| {recipe} | {' | '.join(cells)} | {seconds:.0f} |")
    return lines


def show_rules(scored: Sequence[Scored]) -> list[str]:
    """A table in Markdown: the same of each rule that chooses a threshold."""
    lines = ["| recipe | threshold | accuracy | sensitivity | specificity |", "|---" * 5 + "|"]
    for recipe in dict.fromkeys(one.recipe for one in scored):
        own = [one for one in scored if one.recipe == recipe]
        for rule in RULES:
            names = ("accuracy", "sensitivity", "specificity")
            cells = [over_shifts(own, rule, name) for name in names]
            lines.append(f"| {recipe} | {rule} | {' | '.join(cells)} |")
    return lines


def over_shifts(scored: Sequence[Scored], rule: str, name: str) -> str:
    """A measure's mean over the shifts, and its standard deviation between them."""
    values = []
    for training, look in looks_of(scored, only_shifts=True):
        own = [one for one in scored if one.training == training]
        found = [measure(one.looks[look], RULES[rule](one.looks))[name] for one in own]
        values.append(statistics.mean(found))
    return f"{statistics.mean(values):.4f} ± {statistics.pstdev(values):.4f}"


if __name__ == "__main__":
    main()
