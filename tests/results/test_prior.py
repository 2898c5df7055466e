"""Scores for other shares of classes: Bayes by hand, shares that are known and found again."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xrai.errors import UserError
from xrai.labels import LabelSpec
from xrai.results.calibration import calibrated, softmax
from xrai.results.metrics import Sample, values
from xrai.results.prior import (
    MIN_IMAGES,
    Prior,
    both,
    estimate_prior,
    estimate_shares,
    fit_shares,
    move_outputs,
    read_prior,
    shares_of,
)
from xrai.results.types import Output, Scores, call_logits, outputs_of, score_logits

BINARY = outputs_of(LabelSpec("binary", ("NORMAL", "PNEUMONIA")), [2.0], [0.4], "that of the run")
CLASSES = outputs_of(LabelSpec("multiclass", ("A", "B", "C")), [1.5], [], "")
FINDINGS = outputs_of(LabelSpec("multilabel", ("Mass", "Edema")), [1.0, 3.0], [0.5, 0.1], "run")
OWN = {1: (0.75,), 3: (0.5, 0.3, 0.2), 2: (0.4, 0.1)}


def simulate(
    share: float, *, num: int, seed: int, own: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,), and scores (N,) that are the true posteriors at the share `own`."""
    generator = np.random.default_rng(seed)
    labels = (generator.random(num) < share).astype(np.int8)
    # two Gaussians of variance v whose means differ by v: their log likelihood ratio is x itself
    ratio = generator.normal((labels - 0.5) * 4, 2.0)
    return labels, calibrated(ratio + math.log(own / (1 - own)))


@pytest.mark.parametrize("outputs", [BINARY, CLASSES, FINDINGS])
def test_scores_at_temperature_1_are_moved_to_the_prior_too(outputs: tuple[Output, ...]) -> None:
    num = len(outputs)
    shares = {output.name: 1 / max(num, 2) for output in outputs}
    moved = move_outputs(outputs, OWN[num], Prior(shares, "given"))
    logits = np.random.default_rng(0).normal(size=(8, num))
    names, none = tuple(output.name for output in outputs), [""] * 8
    scores = Scores(
        *("test", outputs[0].task, names, moved, np.zeros((8, num), dtype=np.int8), logits),
        patients=none,
        sources=none,
        subtypes=none,
    )
    plain = [replace(output, temperature=1.0) for output in outputs]
    expected = score_logits(move_outputs(plain, OWN[num], Prior(shares, "given")), logits)
    assert scores.uncalibrated == pytest.approx(expected)


@pytest.mark.parametrize(
    ("score", "own", "share", "expected"),
    [
        (0.5, 0.5, 0.1, 0.1),
        (0.9, 0.75, 0.5, 0.75),  # odds 9, times 1/3
        (0.2, 0.2, 0.2, 0.2),
        (0.75, 0.75, 0.1, 0.1),  # an image that tells nothing has the prior as its score
    ],
)
def test_a_score_is_moved_as_bayes_has_it(
    score: float, own: float, share: float, expected: float
) -> None:
    logits = np.array([[2.0 * math.log(score / (1 - score))]])
    moved = move_outputs(BINARY, [own], Prior({"pneumonia": share}, "given"))
    assert score_logits(moved, logits)[0, 0] == pytest.approx(expected)
    assert moved[0].offset == pytest.approx(
        math.log(share / (1 - share)) - math.log(own / (1 - own))
    )


def test_scores_of_classes_are_weighed_and_divided_by_their_sum() -> None:
    logits = np.array([[1.0, -2.0, 0.5], [0.0, 3.0, 3.0]])
    new, own = {"A": 0.1, "B": 0.2, "C": 0.7}, OWN[3]
    found = score_logits(move_outputs(CLASSES, own, Prior(new, "given")), logits)
    for row, before in zip(found, softmax(logits, 1.5), strict=True):
        parts = [p * to / at for p, to, at in zip(before, new.values(), own, strict=True)]
        assert row == pytest.approx([part / sum(parts) for part in parts])


def test_a_finding_that_the_prior_does_not_name_stays() -> None:
    moved = move_outputs(FINDINGS, OWN[2], read_prior("edema=0.5", FINDINGS))
    assert moved[0] is FINDINGS[0]
    assert moved[1].threshold == pytest.approx(0.5)  # 0.1 at a share of 0.1 tells nothing
    assert moved[1].threshold_source == "run, moved to the prior"


@given(
    st.sampled_from([BINARY, CLASSES, FINDINGS]),
    st.lists(st.floats(-60, 60), min_size=6, max_size=30),
    st.lists(st.floats(1e-6, 1 - 1e-6), min_size=3, max_size=3),
)
def test_a_prior_changes_no_call_and_no_order_and_thresholds_move_with_the_scores(
    outputs: tuple[Output, ...], numbers: list[float], shares: list[float]
) -> None:
    num = len(outputs)
    logits = np.array(numbers)[: len(numbers) // num * num].reshape(-1, num)
    prior = Prior({o.name: share for o, share in zip(outputs, shares, strict=False)}, "given")
    moved = move_outputs(outputs, OWN[num], prior)
    called = call_logits(outputs, logits)
    assert np.array_equal(call_logits(moved, logits), called)
    if outputs is CLASSES:
        return
    scores = score_logits(moved, logits)
    for column, output in enumerate(moved):
        order = np.argsort(logits[:, column])
        assert (np.diff(scores[order, column]) >= 0).all()
        assert output.threshold is not None and 0 <= output.threshold <= 1
        is_clear = np.abs(scores[:, column] - output.threshold) > 1e-9
        is_above = scores[:, column] > output.threshold
        assert np.array_equal(is_above[is_clear], called[is_clear, column])


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("own", [0.5, 0.75])
def test_the_estimate_converges_to_the_true_share(share: float, own: float) -> None:
    labels, scores = simulate(share, num=20_000, seed=3, own=own)
    found = estimate_shares(both(scores), both(own))
    assert found.sum() == pytest.approx(1)
    assert found[1] == pytest.approx(labels.mean(), abs=0.01)


def test_the_estimate_is_the_share_of_the_largest_likelihood() -> None:
    _, scores = simulate(0.3, num=80, seed=8, own=0.75)
    grid = np.linspace(0.001, 0.999, 999)
    odds = scores[:, None] / 0.75 * grid + (1 - scores[:, None]) / 0.25 * (1 - grid)
    best = grid[np.log(odds).sum(axis=0).argmax()]
    assert estimate_shares(both(scores), both(0.75))[1] == pytest.approx(best, abs=0.001)


def test_the_shares_of_three_classes_are_found() -> None:
    generator, own, true = np.random.default_rng(5), np.array(OWN[3]), np.array([0.1, 0.6, 0.3])
    labels = generator.choice(3, 20_000, p=true)
    seen = np.eye(3)[labels] * 2 + generator.normal(size=(len(labels), 3))
    densities = np.exp(-0.5 * ((seen[:, None] - 2 * np.eye(3)) ** 2).sum(axis=2))
    scores = densities * own / (densities * own).sum(axis=1, keepdims=True)
    assert estimate_shares(scores, own) == pytest.approx(true, abs=0.015)
    found = fit_shares(scores, np.eye(3)[labels].mean(axis=0))
    assert found == pytest.approx(own, abs=0.02)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_images_of_one_class_alone_have_no_share_of_0_or_1(share: float) -> None:
    scores = np.full(60, 1e-12 if share == 0 else 1 - 1e-12)
    found = estimate_shares(both(scores), both(0.5))[1]
    assert 0 < found < 1 and found == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("own", [0.2, 0.5, 0.75])
def test_what_scores_are_calibrated_at_is_found_from_labels_of_another_mix(own: float) -> None:
    labels, scores = simulate(0.75, num=20_000, seed=11, own=own)
    assert fit_shares(both(scores), both(labels.mean()))[1] == pytest.approx(own, abs=0.02)
    columns = np.stack([labels, np.where(np.arange(len(labels)) % 2, labels, -1)], axis=1)
    found = shares_of(columns, np.stack([scores, scores], axis=1), is_multiclass=False)
    assert found == pytest.approx([own, own], abs=0.03)


def test_images_that_do_not_tell_what_scores_are_calibrated_at_leave_the_share_of_the_labels() -> (
    None
):
    labels = np.array([0, 1, 1, 1], np.int8)[:, None]
    sure = labels.astype(np.float64)
    for scores in (sure, sure * (1 - 2e-15) + 1e-15):
        assert shares_of(labels, scores, is_multiclass=False) == pytest.approx([0.75])
    assert shares_of(np.ones_like(labels), np.full((4, 1), 0.3), is_multiclass=False) == [0.5]
    (wrong,) = shares_of(labels, 1 - sure, is_multiclass=False)
    assert 0 < wrong < 1


def test_the_calibration_error_at_another_share_falls_to_that_of_chance() -> None:
    labels, scores = simulate(0.1, num=3000, seed=2, own=0.75)
    logits = 2.0 * np.log(scores / (1 - scores))[:, None]
    known = read_prior(0.1, BINARY)
    estimated = estimate_prior(BINARY, (0.75,), score_logits(BINARY, logits))
    assert estimated.source == "estimated from 3000 images"

    def ece(outputs: tuple[Output, ...]) -> float:
        (found,) = score_logits(outputs, logits).T
        sample = Sample(labels.astype(np.int64), found, found > 0.5, np.arange(len(labels)))
        return values(sample)["ece"]

    assert ece(BINARY) > 0.1
    assert ece(move_outputs(BINARY, (0.75,), known)) < 0.02
    assert ece(move_outputs(BINARY, (0.75,), estimated)) < 0.03


@pytest.mark.parametrize(
    ("outputs", "wanted", "shares"),
    [
        (BINARY, 0.1, {"pneumonia": 0.1}),
        (BINARY, " 0.1 ", {"pneumonia": 0.1}),
        (BINARY, "PNEUMONIA=0.1", {"pneumonia": 0.1}),
        (BINARY, {"Pneumonia": 0.1}, {"pneumonia": 0.1}),
        (CLASSES, "c=0.2|a=0.5|b=0.3", {"A": 0.5, "B": 0.3, "C": 0.2}),
        (CLASSES, "A=0.333|B=0.333|C=0.333", dict.fromkeys("ABC", 1 / 3)),
        (FINDINGS, {"Edema": 0.9}, {"Edema": 0.9}),
        (FINDINGS, "Mass=0.1|Edema=0.9", {"Mass": 0.1, "Edema": 0.9}),
    ],
)
def test_a_prior_is_read_from_what_people_give(
    outputs: tuple[Output, ...], wanted: str | float, shares: dict[str, float]
) -> None:
    prior = read_prior(wanted, outputs)
    assert prior.shares == pytest.approx(shares) and prior.source == "given"
    assert list(prior.shares) == list(shares)


@pytest.mark.parametrize(
    ("outputs", "wanted", "message"),
    [
        (BINARY, "0", "'0' is no share: it is between 0 and 1"),
        (BINARY, 1.0, r"prior = 1\.0: '1\.0' is no share"),
        (BINARY, "nan", "'nan' is no share"),
        (BINARY, "10 %", "'10 %' is no share"),
        (BINARY, "normal=0.9", "'normal' is none of them: it takes the share of pneumonia, or est"),
        (CLASSES, "0.1", "'' is none of them: it takes A=SHARE|B=SHARE|C=SHARE, or estimate"),
        (CLASSES, "A=0.5|B=0.5", "shares of all classes, A, B, C, must be given, and their sum"),
        (CLASSES, "A=0.5|B=0.5|C=0.1", "their sum must be 1"),
        (FINDINGS, "Mass=0.1|mass=0.2", "'mass' is named twice"),
        (FINDINGS, "Hernia=0.1", "'Hernia' is none of them: it takes Mass=SHARE|Edema=SHARE"),
    ],
)
def test_a_prior_that_cannot_be_one_is_refused(
    outputs: tuple[Output, ...], wanted: str | float, message: str
) -> None:
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        read_prior(wanted, outputs)


def test_too_few_images_to_estimate_from_are_refused() -> None:
    _, scores = simulate(0.5, num=MIN_IMAGES, seed=1)
    estimate_prior(BINARY, (0.5,), scores[:, None])
    with pytest.raises(UserError, match=f"{MIN_IMAGES - 1} images that are not for review are too"):
        estimate_prior(BINARY, (0.5,), scores[1:, None])
