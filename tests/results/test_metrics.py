"""Metrics against scikit-learn and plain loops, and what holds for any scores."""

import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn import metrics as scikit

from xrai.errors import XraiError
from xrai.results.calibration import calibrated, choose_threshold, fit_temperature
from xrai.results.metrics import (
    METRICS,
    auroc,
    calibration_bins,
    count_calls_by_threshold,
    evaluate_scores,
    format_interval,
    format_value,
    newcombe_interval,
    wilson_interval,
)
from xrai.results.tables import to_json


def evaluate(
    labels: Any, scores: Any, *, patients: Any = None, subtypes: Any = None, **options: Any
) -> dict[str, Any]:
    number = len(labels)
    return evaluate_scores(
        labels,
        scores,
        patients=np.arange(number) if patients is None else patients,
        subtypes=[""] * number if subtypes is None else subtypes,
        **{
            "threshold": 0.5,
            "split": "val",
            "threshold_source": "given",
            "num_bootstrap": 20,
            **options,
        },
    )


def plain_metrics(labels: Any, scores: Any, threshold: float) -> dict[str, float]:
    """Each metric by scikit-learn or by its definition; both classes and both calls must be
    there.
    """
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
        st.lists(st.integers(0, 1), min_size=number, max_size=number).filter(
            lambda ls: 0 < sum(ls) < len(ls)
        )
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
    patients = generator.integers(0, 40, 150)
    labels = (generator.random(40) < 0.6)[patients].astype(int)
    scores = np.round(np.clip(0.3 * labels + 0.7 * generator.random(150), 0, 1), 2)  # ties
    subtypes = np.where(labels == 1, np.where(patients % 2 == 0, "bacteria", "virus"), "")
    found = evaluate(
        labels, scores, patients=patients, subtypes=subtypes, threshold=0.55, num_bootstrap=50, seed=3
    )  # fmt: skip
    names = np.unique(patients)
    draws = np.random.default_rng(3).integers(0, len(names), size=(50, len(names)))
    for chosen, entry in (
        (np.ones(150, dtype=bool), found),
        ((labels == 0) | (subtypes == "virus"), found["subtypes"]["virus"]),
    ):
        rows = [np.flatnonzero(chosen & (patients == name)) for name in names]
        resamples = [np.concatenate([rows[index] for index in draw]) for draw in draws]
        samples = [
            plain_metrics(labels[resample], scores[resample], 0.55) for resample in resamples
        ]
        assert sum(entry["metrics"][name]["method"] == "bootstrap" for name in METRICS) >= 12
        for name in METRICS:
            if entry["metrics"][name]["method"] != "bootstrap":
                continue  # too few errors: another test is about these
            low, high = np.percentile([sample[name] for sample in samples], [2.5, 97.5])
            assert entry["metrics"][name]["low"] == pytest.approx(low, abs=1e-9), name
            assert entry["metrics"][name]["high"] == pytest.approx(high, abs=1e-9), name


@given(scored_images(), st.integers(2, 4))
@example(
    ([0, 1, 0, 1], [0.5, 0.0, 0.5, 0.0]), 2
)  # all wrong: resamples of MCC differ by rounding alone
@settings(deadline=None, max_examples=30)
def test_more_images_of_the_same_patients_make_no_interval_narrower(
    images: tuple[list[int], list[float]], copies: int
) -> None:
    labels, scores = images
    patients = np.arange(len(labels))
    once = evaluate(labels, scores, patients=patients)["metrics"]
    often = evaluate(
        np.repeat(labels, copies), np.repeat(scores, copies), patients=np.repeat(patients, copies)
    )["metrics"]
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
        inside += (
            entry["low"] <= 0.8413 <= entry["high"]
        )  # normal distribution, one standard deviation
    assert 88 <= inside <= 99


@pytest.mark.parametrize(
    ("labels", "scores", "undefined"),
    [
        ([0, 0, 0], [0.1, 0.2, 0.9], {"sensitivity", "auroc", "average_precision", "mcc"}),
        ([1, 1, 1], [0.1, 0.2, 0.9], {"specificity", "auroc", "average_precision", "mcc"}),
        ([0, 1, 1], [0.1, 0.2, 0.3], {"ppv", "mcc"}),
        ([0, 1, 1], [0.7, 0.8, 0.9], {"npv", "mcc"}),
        (
            [0, 0, 0],
            [0.1, 0.1, 0.2],
            {"sensitivity", "auroc", "average_precision", "mcc", "ppv", "f1"},
        ),
        ([], [], set(METRICS)),
    ],
)
def test_an_undefined_metric_is_nan_with_a_reason_and_null_in_json(
    labels: list[int], scores: list[float], undefined: set[str]
) -> None:
    found = evaluate(labels, scores)
    at_fixed = {"sensitivity_at_specificity_90", "specificity_at_sensitivity_90"}
    undefined |= at_fixed if "auroc" in undefined else set()
    assert {
        name for name, entry in found["metrics"].items() if math.isnan(entry["value"])
    } == undefined
    stored = json.loads(to_json(found))
    for name in undefined:
        assert found["reasons"][name]
        assert stored["metrics"][name] == {"value": None, "low": None, "high": None, "method": ""}
    for name in set(METRICS) - undefined:
        assert name not in found["reasons"]


def test_an_interval_that_can_not_be_measured_says_so() -> None:
    one_patient = evaluate([0, 1, 1], [0.1, 0.9, 0.4], patients=["a", "a", "a"])
    assert math.isnan(one_patient["metrics"]["accuracy"]["low"])
    assert "one patient" in one_patient["reasons"]["accuracy.interval"]
    few = evaluate([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9], num_bootstrap=10)
    assert math.isnan(
        few["metrics"]["f1"]["low"]
    )  # it is 1 in all resamples, and no method knows better
    assert "all give the same" in few["reasons"]["f1.interval"]


def test_no_interval_of_a_proportion_or_an_auroc_collapses_where_nothing_is_wrong() -> None:
    found = evaluate([0, 0, 1, 1, 1] * 8, [0.1, 0.2, 0.8, 0.9, 0.7] * 8)["metrics"]
    for name in (
        "accuracy",
        "sensitivity",
        "specificity",
        "ppv",
        "npv",
        "auroc",
        "sensitivity_at_specificity_90",
    ):
        assert found[name]["value"] == found[name]["high"] == 1.0
        assert 0.75 < found[name]["low"] < 0.95, name
        assert found[name]["method"] == ("newcombe" if name == "auroc" else "wilson")
    assert found["sensitivity"]["low"] == pytest.approx(
        24 / (24 + 1.959964**2)
    )  # Wilson at 24 of 24
    assert found["specificity"]["low"] == pytest.approx(16 / (16 + 1.959964**2))
    assert found["brier"]["method"] == "bootstrap"


def test_the_interval_of_few_errors_counts_patients_and_not_their_images() -> None:
    labels, scores = [0] * 20 + [1] * 20, [0.1] * 18 + [0.9] * 2 + [0.9] * 20
    found = evaluate(
        labels, scores, patients=[*range(20), *[100 + number // 5 for number in range(20)]]
    )["metrics"]
    assert found["specificity"]["method"] == "wilson"
    assert (found["specificity"]["low"], found["specificity"]["high"]) == pytest.approx(
        wilson_interval(0.9, 20)
    )
    assert found["sensitivity"]["low"] == pytest.approx(wilson_interval(1, 4)[0])


@pytest.mark.parametrize(
    ("share", "number", "low", "high"),
    [
        (0.0, 10, 0.0, 0.2775),
        (1.0, 10, 0.7225, 1.0),
        (0.5, 10, 0.2366, 0.7634),
        (81 / 263, 263, 0.2553, 0.3662),
    ],
)  # the last one is of Newcombe 1998, table I
def test_wilsons_interval_is_that_of_the_literature(
    share: float, number: int, low: float, high: float
) -> None:
    assert wilson_interval(share, number) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("area", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_newcombes_interval_ends_where_its_equation_holds(area: float) -> None:
    low, high = newcombe_interval(area, 12, 30)
    assert 0 <= low <= area <= high <= 1
    for theta in {low, high} - {0.0, 1.0}:
        q1, q2 = theta / (2 - theta), 2 * theta**2 / (1 + theta)  # Hanley and McNeil 1982
        spread = (
            theta * (1 - theta) + 20 * (q1 - theta**2) + 20 * (q2 - theta**2)
        )  # both sizes as their mean
        assert (theta - area) ** 2 == pytest.approx(1.959964**2 * spread / (12 * 30), rel=1e-5)
    wider = newcombe_interval(area, 6, 15)
    assert wider[1] - wider[0] > high - low


def test_subtypes_are_measured_against_all_normal_images() -> None:
    labels = [0, 0, 0, 1, 1, 1, 1]
    scores = [0.1, 0.2, 0.6, 0.9, 0.8, 0.3, 0.15]
    found = evaluate(
        labels, scores, subtypes=["", "", "", "bacteria", "bacteria", "virus", "virus"]
    )
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
def test_the_chosen_threshold_has_the_largest_youden_index_of_all(
    images: tuple[list[int], list[float]],
) -> None:
    labels, scores = np.array(images[0]), np.array(images[1])

    def youden(threshold: float) -> int:
        calls = scores >= threshold
        return int(
            (calls & (labels == 1)).sum() * (labels == 0).sum()
            - (calls & (labels == 0)).sum() * labels.sum()
        )

    best = max(youden(threshold) for threshold in [*scores, 2.0])
    assert youden(choose_threshold(labels, scores)) == best


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        ([0, 1], [0.2, 0.8], 0.5),
        ([0, 0, 1, 1], [0.1, 0.3, 0.4, 0.9], 0.35),
        ([0, 1], [0.5, 0.5], 0.5),  # no threshold is better than none
        (
            [1, 0],
            [0.2, 0.8],
            0.1,
        ),  # the wrong way round: all or nothing, and all is the lower plateau
        (
            [0, 0, 1, 0, 1, 1],
            [0.1, 0.2, 0.25, 0.5, 0.9, 0.95],
            0.7,
        ),  # two plateaus of equal J: the wider one
        ([0, 1, 0, 1], [0.2, 0.6, 0.6, 0.9], 0.55),
        ([0, 1], [0.0, 5e-324], 5e-324),  # neighbouring numbers have no middle
    ],
)
def test_the_chosen_threshold_is_the_middle_of_the_widest_best_plateau(
    labels: list[int], scores: list[float], expected: float
) -> None:
    assert choose_threshold(labels, scores) == pytest.approx(expected, abs=1e-12)
    shuffled = np.random.default_rng(0).permutation(len(labels))
    assert choose_threshold(
        np.array(labels)[shuffled], np.array(scores)[shuffled]
    ) == choose_threshold(labels, scores)


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


@given(scored_images(), st.floats(0.1, 8))
@settings(deadline=None, max_examples=40)
def test_the_temperature_has_the_smallest_log_loss_of_all(
    images: tuple[list[int], list[float]], stretch: float
) -> None:
    labels, logits = np.array(images[0]), stretch * (np.array(images[1]) * 6 - 3)
    temperature = fit_temperature(labels, logits)

    def log_loss(tried: float) -> float:
        return float(np.logaddexp(0, np.where(labels == 1, -logits, logits) / tried).mean())

    assert 0.05 <= temperature <= 20
    for tried in (*np.geomspace(0.05, 20, 60), temperature * 0.99, temperature * 1.01):
        if 0.05 <= tried <= 20:
            assert log_loss(temperature) <= log_loss(tried) + 1e-12


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
        XraiError, match="no temperature can be chosen on 2 images: none of them is normal"
    ):
        fit_temperature([1, 1], [0.2, 0.4])


def test_calibration_is_measured_before_and_after() -> None:
    generator = np.random.default_rng(2)
    labels = generator.integers(0, 2, 300)
    logits = 8 * (labels - 0.5) + generator.normal(0, 8, 300)  # far too sure
    temperature = fit_temperature(labels, logits)
    after, before = calibrated(logits, temperature), calibrated(logits)
    found = evaluate(labels, after, uncalibrated=before, temperature=temperature)
    alone = evaluate(labels, before)
    for name in ("brier", "ece"):
        assert found["calibration"]["after"][name] == found["metrics"][name]
        assert found["calibration"]["before"][name] == alone["metrics"][name]
        assert found["metrics"][name]["value"] < alone["metrics"][name]["value"]
    assert found["calibration"]["temperature"] == temperature
    assert found["metrics"]["auroc"]["value"] == alone["metrics"]["auroc"]["value"]


def test_groups_are_measured_against_the_other_class_or_by_themselves_where_they_hold_both() -> (
    None
):
    labels = [0, 0, 0, 1, 1, 1, 0, 1]
    scores = [0.1, 0.2, 0.6, 0.9, 0.8, 0.3, 0.4, 0.7]
    found = evaluate(
        labels, scores, groups=["IM", "IM", "N2", "virus", "virus", "bacteria", "clinic", "clinic"]
    )
    groups = found["groups"]
    assert list(groups) == ["IM", "N2", "bacteria", "clinic", "virus"]
    assert groups["IM"]["counts"] == {"tp": 3, "fp": 0, "tn": 2, "fn": 1}
    assert groups["N2"]["counts"] == {"tp": 3, "fp": 1, "tn": 0, "fn": 1}
    assert groups["bacteria"]["counts"] == {"tp": 0, "fp": 1, "tn": 3, "fn": 1}
    assert groups["clinic"]["counts"] == {"tp": 1, "fp": 0, "tn": 1, "fn": 0}
    assert [groups[name]["against"] for name in ("IM", "virus", "clinic")] == [
        "all pneumonia",
        "all normal",
        "itself",
    ]
    assert (groups["IM"]["num_normal"], groups["IM"]["num_pneumonia"]) == (2, 0)
    assert evaluate(labels, scores, groups=["one"] * 8)["groups"] == {}  # all of it is the whole
    many = evaluate(
        [0, 1] * 30, [0.2, 0.8] * 30, groups=[f"g{number % 20:02d}" for number in range(60)]
    )
    assert (len(many["groups"]), many["num_groups"]) == (12, 20)


def test_abstention_counts_what_is_left_to_a_person_and_measures_the_rest() -> None:
    labels = [0, 0, 0, 1, 1, 1]
    scores = [0.1, 0.2, 0.9, 0.9, 0.8, 0.2]
    atypicality = [0.5, 1.0, 1.5, 0.2, math.nan, 0.3]  # what is no number is no typical image
    found = evaluate(labels, scores, atypicality=atypicality)
    abstention = found["abstention"]
    assert (abstention["num_review"], abstention["share_review"]) == (2, pytest.approx(1 / 3))
    assert abstention["by_class"] == {
        "normal": {"num_images": 3, "num_review": 1}, "pneumonia": {"num_images": 3, "num_review": 1}
    }  # fmt: skip
    rest = evaluate([0, 0, 1, 1], [0.1, 0.2, 0.9, 0.2])
    for name in METRICS:
        assert abstention["metrics"][name]["value"] == rest["metrics"][name]["value"], name
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(
        4 / 6
    )  # the whole counts every image
    unknown = evaluate(labels, scores)["abstention"]
    assert unknown["num_review"] is None and "no typicality" in unknown["reason"]
    assert "by_atypicality" not in unknown["curve"][0]


def test_the_abstention_curve_leaves_out_the_least_sure_and_the_least_typical_first() -> None:
    labels, scores = [1] * 10 + [0] * 10, [0.51] * 5 + [0.9] * 5 + [0.55] * 5 + [0.05] * 5
    found = evaluate(labels, scores, threshold=0.52, atypicality=np.linspace(0, 0.9, 20))
    curve = {entry["coverage"]: entry for entry in found["abstention"]["curve"]}
    assert (
        curve[1.0]["by_doubt"]
        == curve[1.0]["by_atypicality"]
        == found["metrics"]["accuracy"]["value"]
        == 0.5
    )
    assert (curve[0.5]["num_images"], curve[0.5]["by_doubt"]) == (
        10,
        1.0,
    )  # all ten near the threshold were wrong
    assert curve[0.5]["by_atypicality"] == 0.5
    assert [entry["num_images"] for entry in curve.values()] == sorted(
        (entry["num_images"] for entry in curve.values()), reverse=True
    )


@given(scored_images())
@settings(deadline=None, max_examples=40)
def test_the_calls_at_each_threshold_are_those_of_a_plain_count(
    images: tuple[list[int], list[float]],
) -> None:
    labels, scores = np.array(images[0]), np.array(images[1])
    found = count_calls_by_threshold(labels, scores)
    for step in range(0, 201, 25):
        calls = scores >= step / 200
        assert found["tp"][step] == (calls & (labels == 1)).sum()
        assert found["fp"][step] == (calls & (labels == 0)).sum()
    assert (len(found["tp"]), found["num_steps"]) == (201, 200)


def test_the_same_seed_gives_the_same_intervals_and_another_seed_others() -> None:
    generator = np.random.default_rng(0)
    labels, scores = generator.integers(0, 2, 80), generator.random(80)
    first, again = evaluate(labels, scores, seed=1), evaluate(labels, scores, seed=1)
    assert to_json(first) == to_json(again)
    assert to_json(first["metrics"]) != to_json(evaluate(labels, scores, seed=2)["metrics"])


def test_the_value_of_a_call_by_prevalence_is_that_of_bayes_and_meets_the_split_at_its_own() -> (
    None
):
    labels, scores = [0] * 10 + [1] * 10, [0.1] * 9 + [0.9] + [0.9] * 8 + [0.1] * 2
    found = evaluate(labels, scores)
    at = {entry["prevalence"]: entry for entry in found["by_prevalence"]}
    assert at[0.5]["ppv"] == pytest.approx(found["metrics"]["ppv"]["value"])
    assert at[0.5]["npv"] == pytest.approx(found["metrics"]["npv"]["value"])
    assert at[0.01]["ppv"] == pytest.approx(0.01 * 0.8 / (0.01 * 0.8 + 0.99 * 0.1))
    assert math.isnan(evaluate([1], [0.9])["by_prevalence"][0]["ppv"])
    clean = evaluate([0] * 10 + [1] * 10, [0.1] * 10 + [0.9] * 10)["by_prevalence"][
        0
    ]  # no false alarm was seen
    least = wilson_interval(1, 10)[0]
    assert (clean["ppv"], clean["ppv_low"]) == (
        1,
        pytest.approx(0.01 * least / (0.01 * least + 0.99 * (1 - least))),
    )
    assert clean["npv_low"] < clean["npv"] == 1


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


def test_counting_results_loads_no_other_library_than_numpy() -> None:
    program = (
        "import sys, xrai.results.metrics, xrai.results.review, xrai.results.baselines\n"
        "assert not {'scipy', 'sklearn', 'matplotlib', 'torch', 'jinja2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
