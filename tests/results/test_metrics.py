"""Metrics against scikit-learn and plain loops, and what holds for any scores."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as scikit

from xrai.errors import XraiError
from xrai.results.artifacts import to_json
from xrai.results.metrics import (
    METRICS,
    auroc,
    calibration_bins,
    choose_threshold,
    evaluate_scores,
    format_interval,
    format_value,
)


def evaluate(labels: Any, scores: Any, *, groups: Any = None, subtypes: Any = None, **options: Any) -> dict[str, Any]:
    number = len(labels)
    return evaluate_scores(
        labels,
        scores,
        groups=np.arange(number) if groups is None else groups,
        subtypes=[""] * number if subtypes is None else subtypes,
        **{"threshold": 0.5, "split": "val", "threshold_source": "given", "num_bootstrap": 20, **options},
    )


def plain_metrics(labels: Any, scores: Any, threshold: float) -> dict[str, float]:
    """Each metric by scikit-learn or by its definition; both classes and both calls must be there."""
    labels, scores = np.asarray(labels), np.asarray(scores)
    calls = (scores >= threshold).astype(int)
    false_positive, true_positive, _ = scikit.roc_curve(labels, scores, drop_intermediate=False)
    bins = np.minimum((scores * 10).astype(int), 9)
    gaps = [abs(float((scores[bins == b] - labels[bins == b]).sum())) for b in range(10)]
    return {
        "accuracy": scikit.accuracy_score(labels, calls),
        "sensitivity": scikit.recall_score(labels, calls),
        "specificity": scikit.recall_score(labels, calls, pos_label=0),
        "ppv": scikit.precision_score(labels, calls),
        "npv": scikit.precision_score(labels, calls, pos_label=0),
        "auroc": scikit.roc_auc_score(labels, scores),
        "average_precision": scikit.average_precision_score(labels, scores),
        "f1": scikit.f1_score(labels, calls),
        "mcc": scikit.matthews_corrcoef(labels, calls),
        "brier": scikit.brier_score_loss(labels, scores),
        "ece": sum(gaps) / len(labels),
        "sensitivity_at_specificity_90": max(true_positive[false_positive <= 0.1 + 1e-9]),
        "specificity_at_sensitivity_90": max(1 - false_positive[true_positive >= 0.9 - 1e-9]),
    }


@st.composite
def scored_images(draw: st.DrawFn) -> tuple[list[int], list[float]]:
    """Images of both classes with scores that are often tied."""
    number = draw(st.integers(4, 60))
    labels = draw(
        st.lists(st.integers(0, 1), min_size=number, max_size=number).filter(lambda ls: 0 < sum(ls) < len(ls))
    )
    grid = st.integers(0, 12).map(lambda step: step / 12)
    scores = draw(st.lists(grid | st.floats(0, 1), min_size=number, max_size=number))
    return labels, scores


@given(scored_images(), st.floats(0.05, 0.95))
@settings(deadline=None, max_examples=60)
def test_every_value_is_that_of_scikit_learn_or_of_its_definition(
    images: tuple[list[int], list[float]], threshold: float
) -> None:
    labels, scores = images
    calls = {score >= threshold for score in scores}
    if len(calls) < 2:
        return  # some metrics are undefined, which another test is about
    found = evaluate(labels, scores, threshold=threshold)["metrics"]
    assert set(found) == set(METRICS)
    for name, value in plain_metrics(labels, scores, threshold).items():
        assert found[name]["value"] == pytest.approx(value, abs=1e-12), name


def test_intervals_are_those_of_a_plain_loop_that_draws_patients() -> None:
    generator = np.random.default_rng(7)
    groups = generator.integers(0, 40, 150)
    labels = (generator.random(40) < 0.6)[groups].astype(int)
    scores = np.round(np.clip(0.3 * labels + 0.7 * generator.random(150), 0, 1), 2)  # ties
    subtypes = np.where(labels == 1, np.where(groups % 2 == 0, "bacteria", "virus"), "")
    found = evaluate(
        labels, scores, groups=groups, subtypes=subtypes, threshold=0.55, num_bootstrap=50, seed=3
    )  # fmt: skip
    names = np.unique(groups)
    draws = np.random.default_rng(3).integers(0, len(names), size=(50, len(names)))
    for chosen, entry in (
        (np.ones(150, dtype=bool), found),
        ((labels == 0) | (subtypes == "virus"), found["subtypes"]["virus"]),
    ):
        rows = [np.flatnonzero(chosen & (groups == name)) for name in names]
        resamples = [np.concatenate([rows[index] for index in draw]) for draw in draws]
        samples = [plain_metrics(labels[resample], scores[resample], 0.55) for resample in resamples]
        for name in METRICS:
            low, high = np.percentile([sample[name] for sample in samples], [2.5, 97.5])
            assert entry["metrics"][name]["low"] == pytest.approx(low, abs=1e-9), name
            assert entry["metrics"][name]["high"] == pytest.approx(high, abs=1e-9), name


@given(scored_images(), st.integers(2, 4))
@settings(deadline=None, max_examples=30)
def test_more_images_of_the_same_patients_make_no_interval_narrower(
    images: tuple[list[int], list[float]], copies: int
) -> None:
    labels, scores = images
    groups = np.arange(len(labels))
    once = evaluate(labels, scores, groups=groups)["metrics"]
    often = evaluate(np.repeat(labels, copies), np.repeat(scores, copies), groups=np.repeat(groups, copies))["metrics"]
    for name in METRICS:
        for edge in ("value", "low", "high"):
            assert often[name][edge] == pytest.approx(once[name][edge], abs=1e-9, nan_ok=True), name


def test_intervals_hold_the_true_value_about_as_often_as_they_say() -> None:
    inside = 0
    for seed in range(100):
        generator = np.random.default_rng(seed)
        labels = (generator.random(200) < 0.5).astype(int)
        scores = np.clip(0.5 + 0.2 * (2 * labels - 1) + 0.2 * generator.standard_normal(200), 0, 1)
        entry = evaluate(labels, scores, num_bootstrap=200, seed=seed)["metrics"]["sensitivity"]
        inside += entry["low"] <= 0.8413 <= entry["high"]  # normal distribution, one standard deviation
    assert 88 <= inside <= 99


@pytest.mark.parametrize(
    ("labels", "scores", "undefined"),
    [
        ([0, 0, 0], [0.1, 0.2, 0.9], {"sensitivity", "auroc", "average_precision", "mcc"}),
        ([1, 1, 1], [0.1, 0.2, 0.9], {"specificity", "auroc", "average_precision", "mcc"}),
        ([0, 1, 1], [0.1, 0.2, 0.3], {"ppv", "mcc"}),
        ([0, 1, 1], [0.7, 0.8, 0.9], {"npv", "mcc"}),
        ([0, 0, 0], [0.1, 0.1, 0.2], {"sensitivity", "auroc", "average_precision", "mcc", "ppv", "f1"}),
        ([], [], set(METRICS)),
    ],
)
def test_an_undefined_metric_is_nan_with_a_reason_and_null_in_json(
    labels: list[int], scores: list[float], undefined: set[str]
) -> None:
    found = evaluate(labels, scores)
    at_fixed = {"sensitivity_at_specificity_90", "specificity_at_sensitivity_90"}
    undefined |= at_fixed if "auroc" in undefined else set()
    assert {name for name, entry in found["metrics"].items() if math.isnan(entry["value"])} == undefined
    stored = json.loads(to_json(found))
    for name in undefined:
        assert found["reasons"][name]
        assert stored["metrics"][name] == {"value": None, "low": None, "high": None}
    for name in set(METRICS) - undefined:
        assert name not in found["reasons"]


def test_an_interval_that_can_not_be_measured_says_so() -> None:
    one_patient = evaluate([0, 1, 1], [0.1, 0.9, 0.4], groups=["a", "a", "a"])
    assert math.isnan(one_patient["metrics"]["accuracy"]["low"])
    assert "one patient" in one_patient["reasons"]["accuracy.interval"]
    perfect = evaluate([0, 0, 1, 1] * 5, [0.1, 0.2, 0.8, 0.9] * 5)
    assert perfect["metrics"]["sensitivity"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert "resamples agree" in perfect["reasons"]["sensitivity.interval"]


def test_subtypes_are_measured_against_all_normal_images() -> None:
    labels = [0, 0, 0, 1, 1, 1, 1]
    scores = [0.1, 0.2, 0.6, 0.9, 0.8, 0.3, 0.15]
    found = evaluate(labels, scores, subtypes=["", "", "", "bacteria", "bacteria", "virus", "virus"])
    bacteria, virus = found["subtypes"]["bacteria"], found["subtypes"]["virus"]
    assert list(found["subtypes"]) == ["bacteria", "virus"]
    assert bacteria["counts"] == {"tp": 2, "fp": 1, "tn": 2, "fn": 0}
    assert virus["counts"] == {"tp": 0, "fp": 1, "tn": 2, "fn": 2}
    assert bacteria["metrics"]["auroc"]["value"] == 1.0
    assert virus["metrics"]["auroc"]["value"] == pytest.approx(0.5)
    assert found["counts"] == {"tp": 2, "fp": 1, "tn": 2, "fn": 2}
    assert (found["num_images"], found["num_patients"], virus["num_images"]) == (7, 7, 5)


@given(scored_images())
@settings(deadline=None, max_examples=150)
def test_the_chosen_threshold_has_the_largest_youden_index_of_all(images: tuple[list[int], list[float]]) -> None:
    labels, scores = np.array(images[0]), np.array(images[1])

    def youden(threshold: float) -> int:
        calls = scores >= threshold
        return int((calls & (labels == 1)).sum() * (labels == 0).sum() - (calls & (labels == 0)).sum() * labels.sum())

    best = max(youden(threshold) for threshold in [*scores, 2.0])
    assert youden(choose_threshold(labels, scores)) == best


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        ([0, 1], [0.2, 0.8], 0.5),
        ([0, 0, 1, 1], [0.1, 0.3, 0.4, 0.9], 0.35),
        ([0, 1], [0.5, 0.5], 0.5),  # no threshold is better than none
        ([1, 0], [0.2, 0.8], 0.1),  # the wrong way round: all or nothing, and all is the lower plateau
        ([0, 0, 1, 0, 1, 1], [0.1, 0.2, 0.25, 0.5, 0.9, 0.95], 0.7),  # two plateaus of equal J: the wider one
        ([0, 1, 0, 1], [0.2, 0.6, 0.6, 0.9], 0.55),
        ([0, 1], [0.0, 5e-324], 5e-324),  # neighbouring numbers have no middle
    ],
)
def test_the_chosen_threshold_is_the_middle_of_the_widest_best_plateau(
    labels: list[int], scores: list[float], expected: float
) -> None:
    assert choose_threshold(labels, scores) == pytest.approx(expected, abs=1e-12)
    shuffled = np.random.default_rng(0).permutation(len(labels))
    assert choose_threshold(np.array(labels)[shuffled], np.array(scores)[shuffled]) == choose_threshold(labels, scores)


def test_a_threshold_needs_both_classes() -> None:
    with pytest.raises(XraiError, match="none of them is normal"):
        choose_threshold([1, 1], [0.2, 0.4])
    with pytest.raises(XraiError, match="none of them is pneumonia"):
        choose_threshold([0], [0.2])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1, 1.1])
def test_a_score_that_is_no_probability_is_refused_with_its_row(bad: float) -> None:
    with pytest.raises(XraiError, match=r"row 2 is .* \(1 of 3 are wrong\)"):
        evaluate([0, 1, 1], [0.1, 0.2, bad])


def test_auroc_takes_logits_and_is_nan_with_one_class() -> None:
    assert auroc([0, 1, 1, 0], [-3.0, 8.0, -3.0, -5.0]) == pytest.approx(0.875)
    assert math.isnan(auroc([1, 1], [0.2, 0.4]))


@given(scored_images())
@settings(deadline=None, max_examples=40)
def test_the_calibration_bins_hold_each_image_once_and_add_up_to_the_ece(
    images: tuple[list[int], list[float]],
) -> None:
    labels, scores = images
    bins = calibration_bins(labels, scores)
    full = [entry for entry in bins if entry.num_images]
    assert sum(entry.num_images for entry in bins) == len(labels)
    assert all(entry.low <= entry.mean_score <= entry.high + 1e-12 for entry in full)
    gaps = sum(entry.num_images * abs(entry.mean_score - entry.share_pneumonia) for entry in full)
    assert evaluate(labels, scores)["metrics"]["ece"]["value"] == pytest.approx(gaps / len(labels))


def test_the_same_seed_gives_the_same_intervals_and_another_seed_others() -> None:
    generator = np.random.default_rng(0)
    labels, scores = generator.integers(0, 2, 80), generator.random(80)
    first, again = evaluate(labels, scores, seed=1), evaluate(labels, scores, seed=1)
    assert to_json(first) == to_json(again)
    assert to_json(first["metrics"]) != to_json(evaluate(labels, scores, seed=2)["metrics"])


def test_the_value_of_a_call_by_prevalence_is_that_of_bayes_and_meets_the_split_at_its_own() -> None:
    labels, scores = [0] * 10 + [1] * 10, [0.1] * 9 + [0.9] + [0.9] * 8 + [0.1] * 2
    found = evaluate(labels, scores)
    at = {entry["prevalence"]: entry for entry in found["by_prevalence"]}
    assert at[0.5]["ppv"] == pytest.approx(found["metrics"]["ppv"]["value"])
    assert at[0.5]["npv"] == pytest.approx(found["metrics"]["npv"]["value"])
    assert at[0.01]["ppv"] == pytest.approx(0.01 * 0.8 / (0.01 * 0.8 + 0.99 * 0.1))
    assert math.isnan(evaluate([1], [0.9])["by_prevalence"][0]["ppv"])


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("accuracy", 0.9415, "94.2 %"),
        ("auroc", 0.9815, "0.982"),
        ("accuracy", None, "–"),
        ("auroc", math.nan, "–"),
        ("mcc", -0.25, "-0.250"),
    ],
)
def test_a_value_reads_as_people_write_it(name: str, value: float | None, text: str) -> None:
    assert format_value(name, value) == text


def test_an_interval_reads_as_people_write_it() -> None:
    assert format_interval("accuracy", 0.9211, 0.9589) == "92.1–95.9 %"
    assert format_interval("auroc", 0.9721, 0.9889) == "0.972–0.989"
    assert format_interval("auroc", None, math.nan) == ""
