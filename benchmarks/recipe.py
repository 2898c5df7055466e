"""How well a recipe holds where images are not like those of training: cross-validation by
patient, and under shift.

    python -m benchmarks.recipe --source DIR  # configs/pneumonia.yaml, seeds 0, 1, 2
    python -m benchmarks.recipe --source DIR --config configs/fast.yaml --trainings "fold 0"

Each training runs as users run it: labels in a table, `xrai.preprocess`, `torchrun -m xrai.train`;
validation images are carved from its training patients, and the threshold, temperature and review
limit are those that it stored. Then the images that were held out are scored as they are, and in
two framings (below). Trainings:

    fold k             a fifth of the patients of each class is held out
    IM to NORMAL2      trained on the normals of stream IM, tested on those of NORMAL2 (and a fifth
                       of the pneumonias)
    NORMAL2 to IM      the reverse

Framings: the public copy at hand squashes images of any shape to squares. A normal of which the
middle 86 % (80 %) of the height is kept and stretched to the square again looks as a wider image
would. That alone reproduces, on held-out training patients, what a network without augmentation is
reported to lose on the official test split: AUROC falls to 0.937 and specificity to 0.45, there to
0.92 and 0.40 (docs/decisions/0005-recipe.md).
"""

import argparse
import csv
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import roc_auc_score

from xrai.ingest.images import decode
from xrai.ingest.layout import Entry, lay_out
from xrai.ingest.sources import Source, open_source
from xrai.learning.predictor import TrainedModel, load_model
from xrai.results.calibration import calibrated
from xrai.store import open_store

NUM_FOLDS = 5
SHIFTS = ("IM to NORMAL2", "NORMAL2 to IM")
FRAMINGS = {"as they are": 1.0, "normals 86 % high": 0.86, "normals 80 % high": 0.80}
MEASURES = ("auroc", "accuracy", "sensitivity", "specificity", "review")


def main() -> None:
    """Train, score and print the table."""
    parser = argparse.ArgumentParser(
        description="Cross-validation of a recipe by patient and under shift."
    )
    parser.add_argument("--source", required=True, help="the public data set: a folder or zip")
    parser.add_argument("--config", default="configs/pneumonia.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trainings", nargs="+", default=["fold 0", "fold 1", *SHIFTS])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("options", nargs="*", help="further options of xrai.train, after --")
    flags = parser.parse_args()
    versions = (
        f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    )
    print(
        f"{flags.config} {' '.join(flags.options)}; {os.cpu_count()} cores, {versions}", flush=True
    )
    source = open_source(flags.source)
    entries = lay_out((file.path for file in source.files()), source=source.name).entries
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="xrai-recipe-") as folder:
        for number, training in enumerate(flags.trainings):
            place = Path(folder) / str(number)
            place.mkdir()
            held_out = [entry for entry in entries if is_held_out(entry, training)]
            write_labels(place / "labels.csv", entries, held_out)
            run_module(
                "xrai.preprocess",
                "--config",
                flags.config,
                "--source",
                flags.source,
                "--labels",
                place / "labels.csv",
                "--dataset",
                place / "dataset",
            )
            for seed in flags.seeds:
                began = time.monotonic()
                run_module(
                    "xrai.train",
                    "--config",
                    flags.config,
                    "--dataset",
                    place / "dataset",
                    "--artifacts",
                    place,
                    "--run_id",
                    f"seed-{seed}",
                    f"--train.seed={seed}",
                    *flags.options,
                    processes=flags.processes,
                )
                seconds = time.monotonic() - began
                model = load_model(open_store(str(place / f"seed-{seed}")))
                for framing, height in FRAMINGS.items():
                    measured = measure(model, source, held_out, normal_height=height)
                    results.append(
                        {
                            "training": training,
                            "seed": seed,
                            "images": framing,
                            "seconds": seconds,
                            **measured,
                        }
                    )
                    show(results[-1])
    print("\n".join(["", *summarise(results)]))
    if flags.json:
        flags.json.write_text(
            json.dumps({"config": flags.config, "versions": versions, "results": results}, indent=1)
        )


def is_held_out(entry: Entry, training: str) -> bool:
    """Whether an image is tested on, not trained with; the same for all images of a patient."""
    fold = int(hashlib.sha256(entry.patient.encode()).hexdigest()[:8], 16) % NUM_FOLDS
    if training.startswith("fold "):
        return fold == int(training.removeprefix("fold "))
    if training not in SHIFTS:
        raise SystemExit(
            f"unknown training {training!r}: it takes {', '.join(SHIFTS)} "
            f"and fold 0 to {NUM_FOLDS - 1}"
        )
    if entry.label == 1:
        return fold == 0
    return entry.patient.startswith(training.split(" to ")[1] + ":")


def write_labels(path: Path, entries: Iterable[Entry], held_out: Sequence[Entry]) -> None:
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


@torch.inference_mode()
def measure(
    model: TrainedModel, source: Source, entries: Sequence[Entry], *, normal_height: float
) -> dict[str, float]:
    """Metrics at the model's own threshold, and the share of images that it would send to
    review.
    """
    labels = np.array([entry.label for entry in entries])
    scores, reviews = [], []
    for start in range(0, len(entries), 256):
        part = entries[start : start + 256]
        pictures = np.stack(
            [
                read(model, source, entry.path, height=normal_height if entry.label == 0 else 1.0)
                for entry in part
            ]
        )
        grey = torch.from_numpy(pictures)[:, None].float() / 255  # (B, 1, H, W)
        logits, atypicality = model.typicality.atypicality(model.network, grey)
        scores.append(calibrated(logits[:, 0].double().numpy(), model.temperatures[0]))
        reviews.append(atypicality.numpy() > 1)
    probabilities = np.concatenate(scores)
    calls = probabilities >= model.thresholds[0]
    return {
        "num_images": len(labels),
        "auroc": float(roc_auc_score(labels, probabilities)),
        "accuracy": float(np.mean(calls == labels)),
        "sensitivity": float(np.mean(calls[labels == 1])),
        "specificity": float(np.mean(~calls[labels == 0])),
        "review": float(np.mean(np.concatenate(reviews))),
    }


def read(model: TrainedModel, source: Source, path: str, *, height: float) -> NDArray[np.uint8]:
    """An image as the model sees it, of the middle share `height` of it, stretched to the shape
    that it had.
    """
    data = source.read(path)
    if height < 1:
        assert isinstance(data, bytes)
        whole = Image.open(BytesIO(data)).convert("L")
        margin = whole.height * (1 - height) / 2
        box = (0, margin, whole.width, whole.height - margin)
        data = np.asarray(whole.resize(whole.size, Image.Resampling.BILINEAR, box=box))
    return decode(data, size=model.image_size, fit=model.fit, max_pixels=model.images.max_pixels)


def show(row: dict[str, Any]) -> None:
    """One line of progress."""
    figures = "  ".join(f"{name} {row[name]:.4f}" for name in MEASURES)
    print(
        f"{row['training']:14} seed {row['seed']}  {row['images']:18} {figures}  "
        f"{row['seconds']:.0f} s",
        flush=True,
    )


def summarise(results: Sequence[dict[str, Any]]) -> list[str]:
    """A table in Markdown: the mean over seeds, and the smallest and largest, of each training
    and framing.
    """
    lines = [
        f"| trained and tested | images | n | {' | '.join(MEASURES)} |",
        "|---" * (3 + len(MEASURES)) + "|",
    ]
    for training, framing in dict.fromkeys((row["training"], row["images"]) for row in results):
        rows = [row for row in results if (row["training"], row["images"]) == (training, framing)]
        cells = []
        for name in MEASURES:
            values = [row[name] for row in rows]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f}–{max(values):.3f})")
        lines.append(f"| {training} | {framing} | {rows[0]['num_images']} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
