"""Calibration and the threshold: where they are, how steady, and clear refusals."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.results.small import scored_images
from xrai.errors import XraiError
from xrai.results.calibration import (
    calibrated,
    choose_threshold,
    explain_limit,
    fit_softmax_temperature,
    fit_temperature,
    log_odds,
)


@settings(max_examples=10)  # each chooses four times
@given(scored_images())
def test_the_chosen_threshold_is_among_the_scores_and_has_no_side(
    images: tuple[list[int], list[float]],
) -> None:
    labels, scores = np.array(images[0]), np.array(images[1])
    threshold = choose_threshold(labels, scores)
    assert scores.min() <= threshold <= scores.max()
    assert choose_threshold(1 - labels, 1 - scores) == pytest.approx(1 - threshold, abs=1e-6)
    order = np.random.default_rng(0).permutation(len(labels))
    assert choose_threshold(labels[order], scores[order]) == pytest.approx(threshold, abs=1e-6)
    more = np.concatenate([np.arange(len(labels)), np.flatnonzero(labels), np.flatnonzero(labels)])
    # how common a class is does not matter
    assert choose_threshold(labels[more], scores[more]) == pytest.approx(threshold, abs=1e-6)


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        ([0, 1], [0.2, 0.8], 0.5),
        ([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9], 0.5),
        ([0, 1], [0.5, 0.5], 0.5),
        ([0, 1, 1], [0.3, 0.3, 0.3], 0.3),
        ([1, 0], [0.2, 0.8], 0.5),  # the wrong way round
        ([0, 1], [0.0, 1.0], 0.5),
        ([0, 1], [0.0, 5e-324], 0.0),
    ],
)
def test_the_chosen_threshold_is_in_the_middle_of_the_classes(
    labels: list[int], scores: list[float], expected: float
) -> None:
    assert choose_threshold(labels, scores) == pytest.approx(expected, abs=1e-6)


def test_the_chosen_threshold_is_steadier_than_the_best_of_a_sample() -> None:
    """Logits of unit deviation about -1 and 2: both classes are as probable at 0.5."""
    generator = np.random.default_rng(0)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        labels = (np.arange(200) < 150).astype(np.int64)
        return labels, calibrated(generator.normal(np.where(labels == 1, 2.0, -1.0), 1.0))

    def best_of_sample(labels: np.ndarray, scores: np.ndarray) -> float:
        youden = [
            np.mean(scores[labels == 1] >= cut) + np.mean(scores[labels == 0] < cut)
            for cut in scores
        ]
        return float(scores[np.argmax(youden)])

    samples = [draw() for _ in range(30)]
    chosen = [log_odds(choose_threshold(*sample)) for sample in samples]
    best = [log_odds(best_of_sample(*sample)) for sample in samples]
    assert np.mean(chosen) == pytest.approx(0.5, abs=0.1)
    assert np.std(chosen) < 0.6 * np.std(best)


def test_a_threshold_needs_both_classes() -> None:
    with pytest.raises(XraiError, match="none of them is negative"):
        choose_threshold([1, 1], [0.2, 0.4])
    with pytest.raises(XraiError, match="none of them is positive"):
        choose_threshold([0], [0.2])


@given(scored_images(), st.floats(0.1, 8))
def test_the_temperature_has_the_smallest_log_loss_of_all_with_one_image_more(
    images: tuple[list[int], list[float]], stretch: float
) -> None:
    labels, logits = np.array(images[0]), stretch * (np.array(images[1]) * 6 - 3)
    temperature = fit_temperature(labels, logits)

    def log_loss(tried: float) -> float:
        positive, negative = np.logaddexp(0, -logits / tried), np.logaddexp(0, logits / tried)
        one_more = np.mean(calibrated(logits) * positive + calibrated(-logits) * negative)
        return float(np.where(labels == 1, positive, negative).sum() + one_more)

    assert 0.05 <= temperature <= 20
    for tried in (*np.geomspace(0.05, 20, 60), temperature * 0.99, temperature * 1.01):
        if 0.05 <= tried <= 20:
            assert log_loss(temperature) * (1 - 1e-12) <= log_loss(tried) + 1e-12


def test_the_temperature_undoes_the_stretching_of_calibrated_logits() -> None:
    generator = np.random.default_rng(1)
    logits = generator.normal(0, 2, 40_000)
    labels = (generator.random(40_000) < calibrated(logits)).astype(int)
    assert fit_temperature(labels, logits) == pytest.approx(1, abs=0.03)
    assert fit_temperature(labels, 3.5 * logits) == pytest.approx(3.5, rel=0.03)
    assert calibrated([0.0, 3.5, -1e9, 1e9], 3.5) == pytest.approx(
        [0.5, 1 / (1 + math.exp(-1)), 0, 1]
    )
    with pytest.raises(
        XraiError, match="no temperature can be chosen on 2 images: none of them is negative"
    ):
        fit_temperature([1, 1], [0.2, 0.4])


def likeliest_temperature(labels: np.ndarray, logits: np.ndarray) -> float:
    """Without the image more: the best of a fine grid."""
    tried = np.geomspace(0.05, 20, 3000)
    wrong = np.where(labels == 1, -logits, logits)
    return float(tried[np.argmin([np.logaddexp(0, wrong / each).sum() for each in tried])])


def test_few_images_that_a_model_separates_do_not_send_the_temperature_to_its_limit() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat([1, 0], [4, 40])
    fits, likeliest = [], []
    for _ in range(30):
        logits = generator.normal(np.where(labels == 1, 5.0, -5.0), 2.2)
        fits.append(fit_temperature(labels, logits))
        likeliest.append(likeliest_temperature(labels, logits))
    assert np.mean(np.array(likeliest) < 0.06) > 0.4  # what was wrong
    assert all(0.1 < each < 1.5 for each in fits)
    assert np.median(fits) == pytest.approx(2.2**2 / 10, rel=0.25)  # of such logits


@pytest.mark.parametrize("stretch", [0.5, 1.0, 2.0, 4.0])
def test_the_temperature_of_a_hundred_images_of_each_class_is_the_likeliest(stretch: float) -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat([1, 0], 100)
    for distance in (1.2, 2.0):  # AUROC .80 and .92
        ratio = generator.normal(np.where(labels == 1, distance / 2, -distance / 2)) * distance
        logits = stretch * ratio
        expected = pytest.approx(likeliest_temperature(labels, logits), rel=0.02)
        assert fit_temperature(labels, logits) == expected


def test_copies_of_images_count_as_the_images() -> None:
    labels, logits = np.array([0, 0, 1, 1]), np.array([-3.0, -1.0, 2.0, 4.0])
    once = fit_temperature(labels, logits)
    copies = np.tile(labels, 3), np.tile(logits, 3)
    assert fit_temperature(*copies, num_draws=3) == pytest.approx(once)
    assert fit_temperature(*copies) < 0.95 * once
    pairs = np.column_stack([np.zeros(12), copies[1]])
    assert fit_softmax_temperature(copies[0], pairs, num_draws=3) == pytest.approx(once)


def test_a_temperature_at_a_limit_is_explained() -> None:
    wrong_way_round = fit_temperature([0, 1] * 20, [0.5, -0.5] * 20)
    assert "upper limit, 20," in explain_limit(wrong_way_round)
    assert explain_limit(wrong_way_round).endswith("or these images are too few")
    too_close = fit_temperature([0, 1] * 20, [-0.001, 0.001] * 20)
    assert "lower limit, 0.05, and scores may say too little:" in explain_limit(too_close)
    unsure = calibrated(np.array([-0.001, 0.001]), too_close)  # though the labels are certain
    assert unsure == pytest.approx([0.5, 0.5], abs=0.01)
    assert explain_limit(0.06) == explain_limit(1.0) == explain_limit(19.5) == ""


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1, 1.1])
def test_a_score_that_is_no_probability_is_refused_with_its_row(bad: float) -> None:
    with pytest.raises(XraiError, match=r"row 2 is .* \(1 of 3 are wrong\)"):
        choose_threshold([0, 1, 1], [0.1, 0.2, bad])


def test_scores_have_the_shape_of_their_logits() -> None:
    logits = np.array([[0.0, 2.0], [-2.0, 1e9]])
    assert calibrated(logits, 2.0) == pytest.approx(
        np.array([[0.5, 1 / (1 + math.exp(-1))], [1 / (1 + math.exp(1)), 1]])
    )
