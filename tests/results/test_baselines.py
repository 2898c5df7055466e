"""The baselines see an image's border and size and nothing else, find a shortcut, and say where
there is none.
"""

import math
from typing import Any

import numpy as np
import pytest

from xrai.results import baselines, measure
from xrai.results.baselines import (
    BASELINES,
    Looks,
    border_features,
    fit_svm,
    geometry_features,
    measure_baselines,
)
from xrai.results.types import Scores, SplitResults


def looks(
    *, num: int = 120, seed: int = 0, shortcut: bool = True, constant: bool = False, **changes: Any
) -> Looks:
    """Images whose border is brighter, and whose source is wider, where there is pneumonia."""
    generator = np.random.default_rng(seed)
    labels = (np.arange(num) % 3 > 0).astype(np.uint8)
    hint = labels.astype(int) if shortcut else generator.integers(0, 2, num)
    images = generator.integers(0, 100, (num, 28, 28), dtype=np.uint8)
    images[:, :2] += (60 * hint[:, None, None]).astype(np.uint8)
    width = np.full(num, 500) if constant else 900 + 300 * hint + generator.integers(0, 100, num)
    values = {
        "labels": labels,
        "patients": [f"IM:{row // 2}" for row in range(num)],
        "geometry": geometry_features(width, np.full(num, 500) if constant else np.full(num, 800)),
        "border": border_features(images),
    }
    return Looks(**{**values, **changes})


@pytest.mark.parametrize("size", [16, 28, 64, 224])
def test_the_border_features_change_with_each_pixel_of_the_border_and_with_none_inside(
    size: int,
) -> None:
    depth = round(size / 14)
    images = np.random.default_rng(1).integers(0, 200, (1, size, size), dtype=np.uint8)
    before = border_features(images)
    assert before.shape == (1, 104)
    inside = images.copy()
    inside[:, depth : size - depth, depth : size - depth] = 255
    assert np.array_equal(border_features(inside), before)
    for row, column in [
        (0, 0),
        (depth - 1, size // 2),
        (size - 1, size - depth),
        (size // 2, 0),
        (size // 2, size - 1),
    ]:
        changed = images.copy()
        changed[0, row, column] += 50
        assert not np.array_equal(border_features(changed), before), (row, column)


def test_the_border_features_are_means_and_deviations_of_the_outer_cells() -> None:
    images = np.random.default_rng(2).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    found = border_features(images)
    assert found[:, 0] == pytest.approx(images[:, :2, :2].mean(axis=(1, 2)), rel=1e-5)
    assert found[:, 1] == pytest.approx(images[:, :2, :2].std(axis=(1, 2)), rel=1e-5)
    assert found[:, -2] == pytest.approx(images[:, 26:, 26:].mean(axis=(1, 2)), rel=1e-5)


def test_geometry_knows_width_height_aspect_and_area() -> None:
    found = np.exp(geometry_features([1000, 500], [800, 500]))
    assert found == pytest.approx(np.array([[1000, 800, 1.25, 800_000], [500, 500, 1, 250_000]]))


def test_a_shortcut_is_found_and_none_is_not() -> None:
    with_it = measure_baselines(looks(), looks(seed=1), split="test", num_bootstrap=20)
    without = measure_baselines(
        looks(shortcut=False), looks(seed=1, shortcut=False), split="test", num_bootstrap=20
    )
    assert set(with_it) == set(without) == set(BASELINES)
    for name in BASELINES:
        assert with_it[name].metrics["auroc"].value > 0.95
        assert with_it[name].metrics["accuracy"].value > 0.9
        assert 0.3 < without[name].metrics["auroc"].value < 0.7
        assert with_it[name].reason == ""
        assert (with_it[name].num_train, with_it[name].num_images) == (120, 120)
        assert with_it[name].metrics["auroc"].low < with_it[name].metrics["auroc"].high


def test_a_size_that_is_the_same_for_all_tells_nothing_and_says_so() -> None:
    found = measure_baselines(
        looks(constant=True), looks(seed=1, constant=True), split="val", num_bootstrap=20
    )
    assert found["geometry"].metrics["auroc"].value == 0.5
    assert "the same for all training images" in found["geometry"].reason
    assert found["border"].reason == ""


@pytest.mark.parametrize(
    ("train", "reason"),
    [(None, "no train split"), (looks(labels=np.ones(120, np.uint8)), "of one class")],
)
def test_where_a_baseline_cannot_be_fitted_there_is_a_reason_and_no_number(
    train: Looks | None, reason: str
) -> None:
    found = measure_baselines(train, looks(seed=1), split="test", num_bootstrap=20)
    for name in BASELINES:
        assert reason in found[name].reason
        assert math.isnan(found[name].metrics["auroc"].value)


def test_a_baseline_measured_on_the_images_it_was_fitted_to_says_so() -> None:
    found = measure_baselines(looks(), looks(), split="train", num_bootstrap=20)
    assert all("fitted to these very images" in entry.reason for entry in found.values())


def test_one_class_to_measure_on_leaves_the_auroc_undefined() -> None:
    found = measure_baselines(
        looks(), looks(seed=1, labels=np.zeros(120, np.uint8)), split="test", num_bootstrap=20
    )
    assert math.isnan(found["border"].metrics["auroc"].value)
    assert not math.isnan(found["border"].metrics["accuracy"].value)


def test_logits_are_the_same_each_time_and_0_is_between_the_classes() -> None:
    train, others = looks(), looks(seed=1)
    first, again = (fit_svm(train.border, train.labels)(others.border) for _ in range(2))
    assert np.array_equal(first, again)
    assert ((first > 0) == others.labels).mean() > 0.9


def test_the_splits_of_a_run_share_one_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[Any] = []
    monkeypatch.setattr(baselines, "fit_svm", lambda *given: fits.append(given) or fit_svm(*given))
    train = looks()
    for split in ("val", "test"):
        measure_baselines(train, looks(seed=1), split=split, num_bootstrap=20)
    assert len(fits) == len(BASELINES)


def test_the_source_groups_of_a_baseline_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[list[str]] = []

    def note(scores: Scores, **options: Any) -> SplitResults:
        measured.append(scores.groups)
        return measure.measure(scores, **options)

    monkeypatch.setattr(baselines, "measure", note)
    found = measure_baselines(looks(), looks(seed=1), split="test", num_bootstrap=20)
    assert measured == [[""] * 120] * 2
    assert found["border"].metrics["auroc"].value > 0.9
