"""Sheets show the pictures that they were given, under their names; bars are as long as their
numbers.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageColor

from xrai.results import sheets, style


def pixels_of(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def has_colour(path: Path, colour: str) -> bool:
    return bool((pixels_of(path) == ImageColor.getrgb(colour)).all(axis=2).any())


def test_a_sheet_shows_coloured_images_beside_grey_ones(tmp_path: Path) -> None:
    grey = np.full((32, 32), 77, np.uint8)
    sheets.draw_sheet(
        [grey, np.full((32, 32, 3), (200, 30, 60), np.uint8)], ["a", "b"], tmp_path / "sheet.png"
    )
    assert has_colour(tmp_path / "sheet.png", "#4d4d4d")
    assert has_colour(tmp_path / "sheet.png", "#c81e3c")


def test_a_sheet_shows_the_grey_values_of_its_images_and_any_name(tmp_path: Path) -> None:
    images = [np.full((32, 32), grey, np.uint8) for grey in (0, 77, 255, 77, 77, 77, 77)]
    titles = ["a.png", "$\\frac{b$_{.png", "x" * 200, "日本.png", "line\nbreak\x00", "", "ok"]
    sheets.draw_sheet(images, titles, tmp_path / "deep/er/sheet.png", heading="$h_", note="n$")
    assert has_colour(tmp_path / "deep/er/sheet.png", "#4d4d4d")
    sheets.draw_sheet([], [], tmp_path / "empty.png")
    with pytest.raises(ValueError, match="7 images and 1 titles"):
        sheets.draw_sheet(images, ["a"], tmp_path / "wrong.png")
    assert not (tmp_path / "wrong.png").exists()


def test_class_counts_are_drawn_in_the_colours_of_their_classes(tmp_path: Path) -> None:
    counts = {"train": {"normal": 1341, "pneumonia": 3875}, "val": {"normal": 0, "pneumonia": 0}}
    sheets.draw_class_counts(counts, tmp_path / "counts.png")
    pixels = pixels_of(tmp_path / "counts.png")
    blue = (pixels[..., 2].astype(int) - pixels[..., 0] > 100).sum()
    orange = (pixels[..., 0].astype(int) - pixels[..., 2] > 150).sum()
    assert orange / blue == pytest.approx(3875 / 1341, rel=0.1)
    sheets.draw_class_counts({}, tmp_path / "none.png")


def bar_lengths(path: Path) -> list[int]:
    """The lengths of the bars of a sheet of many classes, row by row from left to right."""
    bar = [round(0.85 * level + 0.15 * 255) for level in ImageColor.getrgb(style.CURVE)]
    inside = (pixels_of(path) == bar).all(axis=2)  # (H, W)
    rows = runs_of(np.flatnonzero(inside.any(axis=1)))
    middles = [row[len(row) // 2] for row in rows]
    return [len(run) for middle in middles for run in runs_of(np.flatnonzero(inside[middle]))]


def runs_of(places: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    return np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)


@pytest.mark.parametrize("num_classes", [3, 14, 20])
def test_many_classes_have_a_row_each_and_bars_as_long_as_their_shares(
    tmp_path: Path, num_classes: int
) -> None:
    names = [
        f"finding {'of a long name ' * (number == 1)}{number}" for number in range(num_classes)
    ]
    counts = {
        split: {name: times * (number + 1) for number, name in enumerate(names)}
        for split, times in (("train", 90), ("val", 3), ("test", 10))
    }
    num_images = {"train": 9000, "val": 300, "test": 1000}  # the same shares in each split
    path = tmp_path / "counts.png"
    sheets.draw_class_counts(counts, path, num_images=num_images)
    lengths = np.array(bar_lengths(path)).reshape(num_classes, 3)
    assert (np.ptp(lengths, axis=1) <= 1).all()
    expected = lengths[-1, 0] * np.arange(1, num_classes + 1) / num_classes
    assert lengths[:, 0] == pytest.approx(expected, abs=2)
    with Image.open(path) as image:
        assert image.width < 1300 and image.height < 1000


def test_two_findings_are_not_added_up_as_two_classes_are(tmp_path: Path) -> None:
    counts = {"train": {"effusion": 50, "nodule": 100}}
    sheets.draw_class_counts(counts, tmp_path / "findings.png", num_images={"train": 400})
    short, long = bar_lengths(tmp_path / "findings.png")
    assert long == pytest.approx(2 * short, abs=2)


def test_images_of_224_pixels_are_shown_as_they_are_one_beside_the_other(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 224, 224), np.uint8)
    names = [str(number) for number in range(8)]
    sheets.draw_sheet(list(noise), names, tmp_path / "sheet.png")
    shown = pixels_of(tmp_path / "sheet.png")
    assert (shown == shown[..., :1])[120:340].all()
    corners = [
        np.argwhere(
            (shown[:-223, :-223, 0] == image[0, 0]) & (shown[223:, 223:, 0] == image[-1, -1])
        )
        for image in noise
    ]
    places = []
    for image, found in zip(noise, corners, strict=True):
        (place,) = [(y, x) for y, x in found if (shown[y : y + 224, x : x + 224, 0] == image).all()]
        places.append(place)
    assert places == sorted(places), "row by row, from left to right"
    assert len({y for y, _ in places[:6]}) == 1
    assert [x for _, x in places[6:]] == [x for _, x in places[:2]]
    assert min(np.diff([x for _, x in places[:6]])) > 224


def test_small_images_are_enlarged_and_large_ones_averaged_and_none_is_stretched(
    tmp_path: Path,
) -> None:
    small = np.array([[0, 90], [180, 255]], np.uint8)
    large = np.tile(
        np.array([[60, 120], [120, 180]], np.uint8), (112, 224)
    )  # (224, 448), 120 on average
    sheets.draw_sheet([small, large], ["", ""], tmp_path / "sheet.png")
    shown = pixels_of(tmp_path / "sheet.png")[..., 0]
    for level in (0, 90, 180):
        assert (shown == level).sum() == 112 * 112
    assert (shown == 120).sum() == 224 * 112


def test_what_was_called_wrong_is_marked_in_colour(tmp_path: Path) -> None:
    black = np.zeros((8, 8), np.uint8)
    sheets.draw_sheet([black], ["a"], tmp_path / "right.png", marks=["normal  0.100"])
    sheets.draw_sheet([black], ["a"], tmp_path / "wrong.png", marks=["normal  0.900  wrong"])
    assert has_colour(tmp_path / "wrong.png", style.PNEUMONIA)
    assert not has_colour(tmp_path / "right.png", style.PNEUMONIA)
    with pytest.raises(ValueError, match="1 images and 2 marks"):
        sheets.draw_sheet([black], ["a"], tmp_path / "wrong.png", marks=["a", "b"])


def test_the_same_data_set_gives_the_same_bytes(tmp_path: Path) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (64, 64), np.uint8)
    for name in ("a", "b"):
        sheets.draw_sheet([picture], ["x.png"], tmp_path / name / "sheet.png", heading="h")
        sheets.draw_class_counts({"train": {"normal": 3}}, tmp_path / name / "counts.png")
    for name in ("sheet.png", "counts.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["counts.png", "sheet.png"]


def test_preprocessing_draws_its_figures_without_matplotlib() -> None:
    program = (
        "import sys, pathlib, tempfile, numpy, xrai.preprocess as command\n"
        "folder = pathlib.Path(tempfile.mkdtemp())\n"
        "command.draw_sheet([numpy.zeros((8, 8), numpy.uint8)], ['a'], folder / 'x.png', "
        "heading='h')\n"
        "command.draw_class_counts({'train': {'a': 1}}, folder / 'y.png')\n"
        "assert not {'matplotlib', 'torch', 'scipy', 'sklearn'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
