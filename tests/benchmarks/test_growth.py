"""The phantoms of the growth benchmark differ and belong together, and its fit says what grew
how.
"""

import io
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.growth import (
    MIN_SIZE,
    SIDE,
    exponent_of,
    growth_of,
    make_pictures,
    name_of,
    prepare,
)
from benchmarks.harness import OWN_PAGES, Run, count_kib
from xrai.ingest.layout import lay_out, parse_name
from xrai.phantom import plan


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.1, 2.0])
def test_the_exponent_is_found_whatever_starting_costs(exponent: float) -> None:
    sizes = [1_000, 10_000, 70_000]
    for start_s in (0.0, 3.0, 100.0):
        seconds = [start_s + 1e-4 * size**exponent for size in sizes]
        assert exponent_of(sizes, seconds) == pytest.approx(exponent, abs=1e-4)


def test_seconds_that_do_not_rise_are_refused() -> None:
    with pytest.raises(ValueError, match="do not rise"):
        exponent_of([1, 10, 100], [1.0, 0.9, 2.0])


def runs_of(seconds: dict[int, list[float]]) -> list[Run]:
    return [
        Run(f"load {size:,}", number, {"seconds": value, "anonymous_mib": 100 + size / 1024})
        for size, values in seconds.items()
        for number, value in enumerate(values)
    ]


def test_growth_is_that_of_the_medians() -> None:
    runs = runs_of({1000: [2.1, 2.0, 1.9], 10_000: [11, 99, 11], 100_000: [101]})
    growth = growth_of(runs, "load", [1000, 10_000, 100_000])
    assert growth.seconds == [2.0, 11, 101]
    assert growth.exponent == pytest.approx(1, abs=1e-4)
    assert growth.last_ratio == pytest.approx(1)
    assert growth.bytes_an_image == pytest.approx(1024)


def test_work_that_grows_with_the_square_shows() -> None:
    runs = runs_of({size: [3 + (size / 1e4) ** 2] for size in (1000, 10_000, 100_000)})
    growth = growth_of(runs, "load", [1000, 10_000, 100_000])
    assert growth.exponent == pytest.approx(2, abs=1e-3)
    assert growth.last_ratio > 1.2


def test_a_size_without_figures_is_named_as_such() -> None:
    with pytest.raises(ValueError, match="no run"):
        growth_of(runs_of({1000: [1.0], 10_000: [2.0]}), "load", [1000, 10_000, 100_000])


def test_images_differ_belong_to_their_patient_and_do_not_depend_on_how_many_are_made(
    tmp_path: Path,
) -> None:
    make_pictures(tmp_path / "few", 5, num_drawn=3, num_workers=1)
    make_pictures(tmp_path / "more", 9, num_drawn=3, num_workers=2)
    few, more = (
        {
            path.relative_to(tmp_path / name).as_posix(): path.read_bytes()
            for path in (tmp_path / name).rglob("*.jpeg")
        }
        for name in ("few", "more")
    )
    assert len(few) == 5
    assert len(more) == len(set(more.values())) == 9
    assert few.items() <= more.items()
    assert {Image.open(io.BytesIO(data)).size for data in more.values()} == {(SIDE, SIDE)}
    assert len({entry.patient for entry in lay_out(more, source="more").rows}) == 3


def test_a_variation_carries_the_name_of_its_patient() -> None:
    for phantom in islice(plan(0), 40):
        own = parse_name(f"{phantom.stem}.jpeg")
        assert own[0]
        assert {parse_name(name_of(phantom, variation)) for variation in range(3)} == {own}


def test_each_size_has_its_first_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "benchmarks.growth.make_pictures", lambda folder, num, num_workers: make_names(folder, num)
    )
    prepare(tmp_path, [MIN_SIZE, 5000], num_workers=1)
    found = {
        size: {path.name for path in (tmp_path / f"images-{size}").rglob("*.jpeg")}
        for size in (MIN_SIZE, 5000)
    }
    assert {size: len(names) for size, names in found.items()} == {MIN_SIZE: MIN_SIZE, 5000: 5000}
    assert found[MIN_SIZE] < found[5000]


def make_names(folder: Path, num: int) -> None:
    phantoms = list(islice(plan(0), 4000))
    for number in range(num):
        phantom = phantoms[number % 4000]
        path = folder / phantom.label / name_of(phantom, number // 4000)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_memory_that_a_file_holds_is_left_out() -> None:
    rollup = "Rss: 1800 kB\nPss: 245 kB\nPss_Anon: 120 kB\nPss_File: 125 kB\nPss_Shmem: 3 kB\n"
    assert count_kib(rollup, OWN_PAGES) == 123


def test_images_look_alike_but_are_no_copies(tmp_path: Path) -> None:
    make_pictures(tmp_path, 6, num_drawn=2, num_workers=1)
    pictures = [
        np.asarray(Image.open(path), np.float32) for path in sorted(tmp_path.rglob("*.jpeg"))
    ]
    for k, one in enumerate(pictures):
        for other in pictures[k + 1 :]:
            assert np.abs(one - other).mean() > 2
