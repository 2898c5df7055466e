"""What a finished run leaves to review. The numbers stand in docs/decisions/0008.

    python -m benchmarks.foreign --run submit/ID --dataset data/dataset
    python -m benchmarks.foreign --run submit/ID --dataset data/dataset \\
        --folder adults=adults --folder hands=hands

The first rows are images that should pass: the data set's held-out splits, as they are and
changed as the fit changes them. The others should not, and are made here: images of the last split
that are spoiled, patterns, drawn images (phantoms) and pieces of the photographs that scikit-learn
and matplotlib ship. Each --folder adds a row for the files below a folder, read as `xrai.predict`
reads them; files that cannot be read are counted and left out.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from xrai.config import Augment
from xrai.dataset.loader import Loader
from xrai.errors import ImageError
from xrai.ingest.images import decode
from xrai.learning.augment import augment
from xrai.learning.batch import to_grey
from xrai.learning.predictor import TrainedModel, load_model
from xrai.learning.typicality import VARIATION
from xrai.phantom import make_phantoms
from xrai.store import open_store

Pictures = NDArray[np.uint8]  # (n, H, W)

NUM_MADE = 200  # of each kind that is made without images
CPU = torch.device("cpu")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description="The share of pictures of each kind that a run leaves to review."
    )
    parser.add_argument(
        "--run", required=True, help="the finished run: a folder or s3://bucket/prefix/ID"
    )
    parser.add_argument("--dataset", required=True, help="a data set with its kind of films")
    parser.add_argument(
        "--folder",
        action="append",
        default=[],
        help="NAME=DIR, a folder of pictures; may be repeated",
    )
    flags = parser.parse_args()
    model = load_model(open_store(flags.run))
    print(
        f"{'kind':<34} {'n':>6} {'review':>8} {'median':>8}   "
        "(atypicality; above 1 is left to review)"
    )
    held_out = {split: read_split(flags.dataset, split) for split in splits_of(flags.dataset)}
    for split, films in held_out.items():
        print_row(f"{split} split", films, model)
        print_row(f"{split} split, changed", films, model, shift=VARIATION)
    for name, pictures in [*spoiled_films(films, model), *made_pictures(model)]:
        print_row(name, pictures, model)
    for pair in flags.folder:
        name, _, place = pair.partition("=")
        pictures, num_unreadable = read_folder(Path(place), model)
        print_row(name, pictures, model)
        if num_unreadable:
            print(f"  {num_unreadable} more files in {place} are no pictures that can be read")


def print_row(
    name: str, pictures: Pictures, model: TrainedModel, *, shift: Augment | None = None
) -> None:
    """One line of the table."""
    if len(pictures) == 0:
        print(f"{name:<34} {0:>6}        -        -")
        return
    scores = score(pictures, model, shift=shift)
    print(
        f"{name:<34} {len(scores):>6} {np.mean(scores > 1):>8.1%} {np.median(scores):>8.2f}",
        flush=True,
    )


@torch.inference_mode()
def score(pictures: Pictures, model: TrainedModel, *, shift: Augment | None) -> NDArray[np.float64]:
    """Atypicality (n,)."""
    found = []
    for start in range(0, len(pictures), 256):
        images = to_grey(pictures[start : start + 256, None], CPU, torch.float32)
        if shift is not None:
            rows = torch.arange(start, start + len(images))
            images = augment(images, rows, seed=7, epoch=0, strength=shift)
        images = images.contiguous(memory_format=torch.channels_last)
        found.append(model.typicality.atypicality(model.network, images)[1].double().numpy())
    return np.concatenate(found)


def splits_of(dataset: str) -> list[str]:
    """The held-out splits."""
    return [
        split
        for split in ("val", "test")
        if split in Loader(dataset, split="train", batch_size=1).index.splits
    ]


def read_split(dataset: str, split: str) -> Pictures:
    """All images of a split."""
    return np.concatenate(
        [batch.images[:, 0] for batch in Loader(dataset, split=split, batch_size=256).epoch(0)]
    )


def spoiled_films(films: Pictures, model: TrainedModel) -> Iterator[tuple[str, Pictures]]:
    """Images as they should not come. The first four are of the kinds that the fit itself makes
    of training images.
    """
    size = model.image_size
    generator = np.random.default_rng(0)
    yield "inverted", 255 - films
    yield "turned left", np.ascontiguousarray(np.rot90(films, 1, (1, 2)))
    yield "turned right", np.ascontiguousarray(np.rot90(films, -1, (1, 2)))
    yield "upside down", np.ascontiguousarray(films[:, ::-1, ::-1])
    yield "left and right exchanged", np.ascontiguousarray(films[:, :, ::-1])
    for share in (0.75, 0.5, 0.33):
        yield (
            f"cut out, {share:.0%} of each side",
            np.stack([cut_out(film, share, generator) for film in films]),
        )
    wider = round(size * 1.4)
    yield (
        "1.4 times as wide",
        np.stack(
            [resize(film, (wider, size))[:, (wider - size) // 2 :][:, :size] for film in films]
        ),
    )
    yield "quarters exchanged", np.roll(films, (size // 2, size // 2), axis=(1, 2))
    yield (
        "top over the other half",
        np.concatenate([films[:, : size // 2], films[:, : size // 2]], axis=1),
    )
    yield (
        "at half size on black",
        np.stack(
            [
                np.pad(resize(film, (size // 2, size // 2)), (size - size // 2) // 2)
                for film in films
            ]
        ),
    )


def made_pictures(model: TrainedModel) -> Iterator[tuple[str, Pictures]]:
    """Images of other things."""
    size = model.image_size
    generator = np.random.default_rng(1)
    y, x = np.mgrid[:size, :size] / size - 0.5
    angles = generator.uniform(0, 2 * np.pi, NUM_MADE)[:, None, None]
    slopes = np.cos(angles) * x + np.sin(angles) * y
    yield "gradients", ((slopes - slopes.min()) / np.ptp(slopes) * 255).astype(np.uint8)
    widths = generator.uniform(0.1, 0.5, NUM_MADE)[:, None, None]
    yield "bright blobs", (255 * np.exp(-(x**2 + y**2) / widths**2)).astype(np.uint8)
    yield "noise", generator.integers(0, 256, (NUM_MADE, size, size), np.uint8)
    yield (
        "flat",
        np.stack([np.full((size, size), level, np.uint8) for level in (0, 1, 64, 128, 255)]),
    )
    with tempfile.TemporaryDirectory() as folder:
        make_phantoms(Path(folder), num_images=NUM_MADE // 2, seed=1, workers=1)
        yield "phantoms", read_folder(Path(folder), model)[0]
    digits = load_digits().images[:NUM_MADE]
    yield (
        "handwritten digits",
        np.stack([resize((digit * 15).astype(np.uint8), (size, size)) for digit in digits]),
    )
    ours = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    photographs = [Image.fromarray(array) for array in load_sample_images().images] + [
        Image.open(ours)
    ]
    greys = [np.asarray(photograph.convert("L")) for photograph in photographs]
    pieces = [
        cut_out(grey, share, generator) for grey in greys for share in generator.uniform(0.4, 1, 50)
    ]
    yield (
        f"pieces of {len(greys)} photographs",
        np.stack([resize(piece, (size, size)) for piece in pieces]),
    )


def read_folder(folder: Path, model: TrainedModel) -> tuple[Pictures, int]:
    """The images of all files that can be read, and how many cannot."""
    found, num_unreadable = [], 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            found.append(
                decode(
                    path.read_bytes(),
                    size=model.image_size,
                    fit=model.fit,
                    max_pixels=model.images.max_pixels,
                )
            )
        except ImageError:
            num_unreadable += 1
    blank = np.empty((0, model.image_size, model.image_size), np.uint8)
    return np.stack(found) if found else blank, num_unreadable


def resize(picture: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.uint8]:
    """An image (H, W) at another (width, height)."""
    return np.asarray(Image.fromarray(picture).resize(shape, Image.Resampling.BILINEAR))


def cut_out(
    picture: NDArray[np.uint8], share: float, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """A square piece from a random place, its side a share of the short side, at the size of a
    square image.
    """
    side = max(1, int(min(picture.shape) * share))
    top, left = (int(generator.integers(0, length - side + 1)) for length in picture.shape)
    whole = min(picture.shape)
    return resize(picture[top : top + side, left : left + side], (whole, whole))


if __name__ == "__main__":
    main()
