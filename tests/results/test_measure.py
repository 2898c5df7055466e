"""Metrics against scikit-learn and plain loops, and what holds for any scores."""

import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sklearn import metrics as scikit

from tests.results.small import make_scores, measure_main, measure_split, scored_images
from xrai.errors import XraiError
from xrai.labels import LabelSpec
from xrai.results.calibration import fit_temperature
from xrai.results.intervals import newcombe_interval, wilson_interval
from xrai.results.measure import measure
from xrai.results.metrics import (
    METRICS,
    auroc,
    calibration_bins,
    count_calls_by_threshold,
    cumulative_calls,
    format_interval,
    format_value,
    precision_recall,
)
from xrai.results.record import metrics_json
from xrai.results.types import Counts, CurvePoint, Output, ReviewCount, Scores, outputs_of
from xrai.tables import to_json


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


@given(scored_images(), st.floats(0.05, 0.95))
def test_every_value_is_that_of_scikit_learn_or_of_its_definition(
    images: tuple[list[int], list[float]], threshold: float
) -> None:
    given_scores = make_scores(*images, threshold=threshold)
    labels, scores = images[0], given_scores.probabilities[:, 0]
    if len(set((scores >= threshold).tolist())) < 2:
        return  # some metrics are undefined, which another test is about
    found = measure(given_scores, num_bootstrap=2).main.whole.metrics
    assert set(found) == set(METRICS)
    for name, value in plain_metrics(labels, scores, threshold).items():
        assert found[name].value == pytest.approx(value, abs=1e-12), name


def test_intervals_are_those_of_a_plain_loop_that_draws_patients() -> None:
    generator = np.random.default_rng(7)
    patients = generator.integers(0, 120, 150)
    labels = (generator.random(120) < 0.6)[patients].astype(int)
    tied = np.round(np.clip(0.3 * labels + 0.7 * generator.random(150), 0, 1), 2)
    subtypes = np.where(labels == 1, np.where(patients % 2 == 0, "bacteria", "virus"), "")
    given_scores = make_scores(
        labels, tied, patients=patients.tolist(), subtypes=subtypes.tolist(), threshold=0.55
    )
    scores = given_scores.probabilities[:, 0]
    found = measure(given_scores, num_bootstrap=50, seed=3).main
    names = np.unique(patients.astype(str)).astype(int)  # they are drawn in the order of their keys
    draws = np.random.default_rng(3).integers(0, len(names), size=(50, len(names)))
    for chosen, entry in (
        (np.ones(150, dtype=bool), found.whole),
        ((labels == 0) | (subtypes == "virus"), found.subtypes["virus"]),
    ):
        rows = [np.flatnonzero(chosen & (patients == name)) for name in names]
        resamples = [np.concatenate([rows[index] for index in draw]) for draw in draws]
        samples = [
            plain_metrics(labels[resample], scores[resample], 0.55) for resample in resamples
        ]
        assert sum(entry.metrics[name].method == "bootstrap" for name in METRICS) >= 10
        for name in METRICS:
            if entry.metrics[name].method != "bootstrap":
                continue  # too few errors: another test is about these
            low, high = np.percentile([sample[name] for sample in samples], [2.5, 97.5])
            assert entry.metrics[name].low == pytest.approx(low, abs=1e-9), name
            assert entry.metrics[name].high == pytest.approx(high, abs=1e-9), name


@given(scored_images(), st.integers(2, 4))
@example(
    ([0, 1, 0, 1], [0.5, 0.0, 0.5, 0.0]), 2
)  # all wrong: resamples of MCC differ by rounding alone
def test_more_images_of_the_same_patients_make_no_interval_narrower(
    images: tuple[list[int], list[float]], copies: int
) -> None:
    labels, scores = images
    patients = list(range(len(labels)))
    once = measure_main(labels, scores, patients=patients).whole.metrics
    often = measure_main(
        np.repeat(labels, copies),
        np.repeat(scores, copies),
        patients=np.repeat(patients, copies).tolist(),
    ).whole.metrics
    for name in METRICS:
        for edge in ("value", "low", "high"):
            assert getattr(often[name], edge) == pytest.approx(
                getattr(once[name], edge), abs=1e-9, nan_ok=True
            ), name


def test_an_auroc_of_few_patients_of_a_class_has_newcombes_interval() -> None:
    generator = np.random.default_rng(0)
    patients = np.repeat(np.arange(100), 2)  # two images each
    for num_positive, method in (29, "newcombe"), (30, "bootstrap"):
        labels = (patients < num_positive).astype(int)
        scores = np.clip(0.5 + 0.2 * labels + 0.2 * generator.standard_normal(200), 0, 1)
        for known, own in (labels, scores), (1 - labels, 1 - scores):
            found = measure_main(known, own, patients=patients.tolist()).whole.metrics["auroc"]
            assert found.method == method
            if method == "newcombe":
                expected = newcombe_interval(found.value, 29, 71)  # or 71 and 29
                assert (found.low, found.high) == pytest.approx(expected)


def test_the_interval_of_an_auroc_holds_the_true_value_with_five_positive_images() -> None:
    labels, inside = np.repeat([1, 0], [5, 100]), 0
    for seed in range(100):
        scores = 0.5 + 0.1 * np.random.default_rng(seed).normal(1.2 * labels)
        found = measure_main(labels, np.clip(scores, 0, 1), num_bootstrap=50)
        interval = found.whole.metrics["auroc"]
        inside += interval.low <= 0.8019 <= interval.high  # of the normal distribution
    assert inside >= 90


def test_intervals_hold_the_true_value_about_as_often_as_they_say() -> None:
    inside = 0
    for seed in range(100):
        generator = np.random.default_rng(seed)
        labels = (generator.random(200) < 0.5).astype(int)
        scores = np.clip(0.5 + 0.2 * (2 * labels - 1) + 0.2 * generator.standard_normal(200), 0, 1)
        entry = measure_main(labels, scores, num_bootstrap=200, seed=seed).whole.metrics[
            "sensitivity"
        ]
        inside += entry.low <= 0.8413 <= entry.high  # normal distribution, one standard deviation
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
    results = measure_split(labels, scores)
    found = results.main.whole.metrics
    at_fixed = {"sensitivity_at_specificity_90", "specificity_at_sensitivity_90"}
    undefined |= at_fixed if "auroc" in undefined else set()
    assert {name for name, entry in found.items() if math.isnan(entry.value)} == undefined
    stored = json.loads(to_json(metrics_json(results)))
    for name in undefined:
        assert stored["reasons"][name] == found[name].reason != ""
        assert stored["metrics"][name] == {"value": None, "low": None, "high": None, "method": ""}
    for name in set(METRICS) - undefined:
        assert name not in stored["reasons"]


def test_an_interval_that_cannot_be_measured_says_so() -> None:
    one_patient = measure_main([0, 1, 1], [0.1, 0.9, 0.4], patients=["a", "a", "a"])
    assert math.isnan(one_patient.whole.metrics["accuracy"].low)
    assert "one patient" in one_patient.whole.metrics["accuracy"].reason
    few = measure_main([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9], num_bootstrap=10)
    assert math.isnan(
        few.whole.metrics["f1"].low
    )  # it is 1 in all resamples, and no method knows better
    assert "all give the same" in few.whole.metrics["f1"].reason


def test_no_interval_of_a_proportion_or_an_auroc_collapses_where_nothing_is_wrong() -> None:
    found = measure_main([0, 0, 1, 1, 1] * 8, [0.1, 0.2, 0.8, 0.9, 0.7] * 8).whole.metrics
    for name in ("accuracy", "sensitivity", "specificity", "ppv", "npv", "auroc"):
        assert found[name].value == found[name].high == 1.0
        assert 0.75 < found[name].low < 0.95, name
        assert found[name].method == ("newcombe" if name == "auroc" else "wilson")
    assert found["sensitivity"].low == pytest.approx(24 / (24 + 1.959964**2))  # Wilson at 24 of 24
    assert found["specificity"].low == pytest.approx(16 / (16 + 1.959964**2))
    assert found["brier"].method == "bootstrap"


def test_an_ece_has_no_interval_which_would_exclude_that_of_calibrated_scores() -> None:
    generator = np.random.default_rng(0)
    scores = generator.beta(0.5, 0.5, 600)
    labels = (generator.random(600) < scores).astype(int)
    results = measure_split(labels, scores, num_bootstrap=20)
    found = results.main.whole.metrics["ece"]
    assert 0.01 < found.value < 0.06 and math.isnan(found.low) and math.isnan(found.high)
    assert "biased upwards with few images" in found.reason
    written = json.loads(to_json(metrics_json(results)))
    assert written["reasons"]["ece.interval"] == found.reason
    assert written["calibration"]["before"]["ece"]["low"] is None
    assert results.main.whole.metrics["brier"].method == "bootstrap"


def test_a_rate_at_a_fixed_one_has_no_interval_where_few_patients_set_its_threshold() -> None:
    generator = np.random.default_rng(0)
    names = ("sensitivity_at_specificity_90", "specificity_at_sensitivity_90")
    for num, has in (29, False), (30, True):
        labels = np.repeat([0, 1], [2 * num, 100])  # two images of each negative patient
        patients = [*np.repeat(np.arange(num), 2), *range(100, 200)]
        scores = np.clip(0.4 + 0.2 * labels + 0.1 * generator.standard_normal(len(labels)), 0, 1)
        found = measure_main(labels, scores, patients=patients).whole.metrics
        mirror = measure_main(1 - labels, 1 - scores, patients=patients).whole.metrics
        few, many = found[names[0]], found[names[1]]
        assert math.isfinite(few.low) == math.isfinite(mirror[names[1]].low) == has
        if not has:
            told = "the images of 29 patients set its threshold, and 30 patients are needed"
            assert few.reason == mirror[names[1]].reason == told
        assert math.isfinite(many.low) and math.isfinite(mirror[names[0]].low)


def test_a_rate_at_a_fixed_one_is_as_unsure_as_its_threshold_and_its_few_errors() -> None:
    name = "sensitivity_at_specificity_90"
    all_right = measure_main([0] * 40 + [1] * 20, [0.1] * 40 + [0.9] * 20).whole.metrics[name]
    assert (all_right.low, all_right.high) == pytest.approx(wilson_interval(1, 20))
    # resamples that draw more of the 4 highest negatives lose half of the positives
    scores = [0.1] * 36 + [0.5] * 4 + [0.45] * 150 + [0.9] * 150
    unsure = measure_main([0] * 40 + [1] * 300, scores).whole.metrics[name]
    assert unsure.value == 1 and unsure.low < 0.6 < wilson_interval(1, 300)[0]
    assert (all_right.method, unsure.method) == ("wilson", "widest")


def test_the_interval_of_few_errors_counts_patients_and_not_their_images() -> None:
    labels, scores = [0] * 20 + [1] * 20, [0.1] * 18 + [0.9] * 2 + [0.9] * 20
    found = measure_main(
        labels, scores, patients=[*range(20), *[100 + number // 5 for number in range(20)]]
    ).whole.metrics
    assert found["specificity"].method == "wilson"
    assert (found["specificity"].low, found["specificity"].high) == pytest.approx(
        wilson_interval(0.9, 20)
    )
    assert found["sensitivity"].low == pytest.approx(wilson_interval(1, 4)[0])


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
    found = measure_main(
        labels, scores, subtypes=["", "", "", "bacteria", "bacteria", "virus", "virus"]
    )
    bacteria, virus = found.subtypes["bacteria"], found.subtypes["virus"]
    assert list(found.subtypes) == ["bacteria", "virus"]
    assert bacteria.counts == Counts(tp=2, fp=1, tn=2, fn=0)
    assert virus.counts == Counts(tp=0, fp=1, tn=2, fn=2)
    assert bacteria.metrics["auroc"].value == 1.0
    assert virus.metrics["auroc"].value == pytest.approx(0.5)
    assert found.whole.counts == Counts(tp=2, fp=1, tn=2, fn=2)
    assert (found.whole.num_images, found.whole.num_patients, virus.num_images) == (7, 7, 5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logit_that_is_not_finite_is_refused_with_its_row(bad: float) -> None:
    scores = make_scores([0, 1, 1], [0.1, 0.2, 0.3])
    scores.logits[2] = bad
    with pytest.raises(XraiError, match=r"row 2 is .* \(1 of 3 are wrong\)"):
        measure(scores)


def test_auroc_takes_logits_and_is_nan_with_one_class() -> None:
    assert auroc([0, 1, 1, 0], [-3.0, 8.0, -3.0, -5.0]) == pytest.approx(0.875)
    assert math.isnan(auroc([1, 1], [0.2, 0.4]))


@given(scored_images())
def test_the_calibration_bins_hold_each_image_once_and_add_up_to_the_ece(
    images: tuple[list[int], list[float]],
) -> None:
    found = make_scores(*images).labelled()
    labels, bins = found.labels, calibration_bins(found.labels, found.scores)
    full = [entry for entry in bins if entry.num_images]
    assert sum(entry.num_images for entry in bins) == len(labels)
    assert all(entry.low <= entry.mean_score <= entry.high + 1e-12 for entry in full)
    gaps = sum(entry.num_images * abs(entry.mean_score - entry.share_positive) for entry in full)
    assert measure_main(*images).whole.metrics["ece"].value == pytest.approx(gaps / len(labels))


def test_calibration_is_measured_before_and_after() -> None:
    generator = np.random.default_rng(2)
    labels = generator.integers(0, 2, 300)
    logits = 8 * (labels - 0.5) + generator.normal(0, 8, 300)  # far too sure
    temperature = fit_temperature(labels, logits)
    none = [""] * 300
    after, before = (
        measure(
            Scores(
                "val",
                "binary",
                ("NORMAL", "PNEUMONIA"),
                (Output("pneumonia", "normal", each, 0.5, "given"),),
                labels[:, None].astype(np.int8),
                logits[:, None],
                patients=[str(row) for row in range(300)],
                sources=none,
                subtypes=none,
            ),
            num_bootstrap=20,
        ).main
        for each in (temperature, 1.0)
    )
    for name in ("brier", "ece"):
        assert after.uncalibrated[name] == before.uncalibrated[name] == before.whole.metrics[name]
        assert after.whole.metrics[name].value < before.whole.metrics[name].value
    assert after.whole.metrics["auroc"].value == before.whole.metrics["auroc"].value


def test_groups_are_measured_against_the_other_class_or_by_themselves_where_they_hold_both() -> (
    None
):
    labels = [0, 0, 0, 1, 1, 1, 0, 1]
    scores = [0.1, 0.2, 0.6, 0.9, 0.8, 0.3, 0.4, 0.7]
    names = ["IM", "IM", "N2", "virus", "virus", "bacteria", "clinic", "clinic"]
    groups = measure_main(labels, scores, groups=names).groups
    assert list(groups) == ["IM", "N2", "bacteria", "clinic", "virus"]
    assert groups["IM"].measured.counts == Counts(tp=3, fp=0, tn=2, fn=1)
    assert groups["N2"].measured.counts == Counts(tp=3, fp=1, tn=0, fn=1)
    assert groups["bacteria"].measured.counts == Counts(tp=0, fp=1, tn=3, fn=1)
    assert groups["clinic"].measured.counts == Counts(tp=1, fp=0, tn=1, fn=0)
    against = [groups[name].against for name in ("IM", "virus", "clinic")]
    assert against == ["all pneumonia", "all normal", "itself"]
    assert (groups["IM"].num_negative, groups["IM"].num_positive) == (2, 0)
    assert measure_main(labels, scores, groups=["one"] * 8).groups == {}  # it is the whole
    many = measure_split(
        [0, 1] * 30, [0.2, 0.8] * 30, groups=[f"g{number % 20:02d}" for number in range(60)]
    )
    assert (len(many.main.groups), many.num_groups) == (12, 20)


def test_abstention_counts_what_goes_to_a_person_and_measures_the_rest() -> None:
    labels = [0, 0, 0, 1, 1, 1]
    scores = [0.1, 0.2, 0.9, 0.9, 0.8, 0.2]
    atypicality = [0.5, 1.0, 1.5, 0.2, math.nan, 0.3]  # NaN asks for review
    found = measure_main(labels, scores, atypicality=atypicality)
    abstention = found.abstention
    assert (abstention.num_review, abstention.share_review) == (2, pytest.approx(1 / 3))
    assert abstention.by_class == {"normal": ReviewCount(3, 1), "pneumonia": ReviewCount(3, 1)}
    rest = measure_main([0, 0, 1, 1], [0.1, 0.2, 0.9, 0.2])
    for name in METRICS:
        assert abstention.metrics[name].value == rest.whole.metrics[name].value, name
    assert found.whole.metrics["accuracy"].value == pytest.approx(4 / 6)  # of every image
    unknown = measure_split(labels, scores)
    assert unknown.main.abstention.num_review is None
    assert "no typicality" in unknown.main.abstention.reason
    assert "by_atypicality" not in to_json(metrics_json(unknown))


def test_the_abstention_curve_leaves_out_the_least_certain_and_the_least_typical_first() -> None:
    labels, scores = [1] * 10 + [0] * 10, [0.51] * 5 + [0.9] * 5 + [0.55] * 5 + [0.05] * 5
    found = measure_main(labels, scores, threshold=0.52, atypicality=np.linspace(0, 0.9, 20))
    curve = found.abstention.curve
    assert found.whole.metrics["accuracy"].value == 0.5
    assert curve[0] == CurvePoint(1.0, 20, 0.5, 0.5)
    # all ten near the threshold were wrong
    assert curve[-1] == CurvePoint(0.5, 10, 1.0, 0.5)
    sizes = [point.num_images for point in curve]
    assert sizes == sorted(sizes, reverse=True)


@given(scored_images())
def test_the_calls_at_each_threshold_are_those_of_a_plain_count(
    images: tuple[list[int], list[float]],
) -> None:
    labels, scores = np.array(images[0]), np.array(images[1])
    found = count_calls_by_threshold(labels, scores)
    for step in range(0, 201, 25):
        calls = scores >= step / 200
        assert found.tp[step] == (calls & (labels == 1)).sum()
        assert found.fp[step] == (calls & (labels == 0)).sum()
    assert (len(found.tp), found.num_steps) == (201, 200)


def test_the_same_seed_gives_the_same_intervals_and_another_seed_others() -> None:
    generator = np.random.default_rng(0)
    labels, scores = generator.integers(0, 2, 80), generator.random(80)
    first, again = measure_split(labels, scores, seed=1), measure_split(labels, scores, seed=1)
    assert first == again
    assert first.main.whole != measure_main(labels, scores, seed=2).whole


def test_the_value_of_a_call_by_prevalence_is_that_of_bayes_and_meets_the_split_at_its_own() -> (
    None
):
    labels, scores = [0] * 10 + [1] * 10, [0.1] * 9 + [0.9] + [0.9] * 8 + [0.1] * 2
    found = measure_main(labels, scores)
    at = {entry.prevalence: entry for entry in found.by_prevalence}
    assert at[0.5].ppv == pytest.approx(found.whole.metrics["ppv"].value)
    assert at[0.5].npv == pytest.approx(found.whole.metrics["npv"].value)
    assert at[0.01].ppv == pytest.approx(0.01 * 0.8 / (0.01 * 0.8 + 0.99 * 0.1))
    assert math.isnan(measure_main([1], [0.9]).by_prevalence[0].ppv)
    # no false alarm was seen
    clean = measure_main([0] * 10 + [1] * 10, [0.1] * 10 + [0.9] * 10).by_prevalence[0]
    least = wilson_interval(1, 10)[0]
    expected = pytest.approx(0.01 * least / (0.01 * least + 0.99 * (1 - least)))
    assert (clean.ppv, clean.ppv_low) == (1, expected)
    assert clean.npv_low < clean.npv == 1


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
        "import sys, xrai.results.metrics, xrai.results.types, xrai.results.baselines\n"
        "assert not {'scipy', 'sklearn', 'matplotlib', 'torch', 'jinja2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@given(scored_images())
def test_the_curves_are_those_of_scikit_learn(images: tuple[list[int], list[float]]) -> None:
    labels, scores = np.array(images[0]), np.array(images[1])
    tp, fp = cumulative_calls(labels, scores)
    fpr, tpr, _ = scikit.roc_curve(labels, scores, drop_intermediate=False)
    assert (fp / fp[-1], tp / tp[-1]) == (pytest.approx(fpr), pytest.approx(tpr))
    precision, recall, _ = scikit.precision_recall_curve(labels, scores)
    assert tp[::-1] / tp[-1] == pytest.approx(recall)
    assert tp[:0:-1] / (tp + fp)[:0:-1] == pytest.approx(precision[:-1])
    x, y = precision_recall(tp, fp)  # its corners, as plots and the page draw it
    average = scikit.average_precision_score(labels, scores)
    assert (x[0], x[-1], np.trapezoid(y, x)) == (0, 1, pytest.approx(average))
    assert auroc(labels, scores) == pytest.approx(scikit.roc_auc_score(labels, scores), abs=1e-12)


def test_several_outputs_with_unknown_labels_are_measured_one_by_one() -> None:
    generator = np.random.default_rng(4)
    labels = generator.integers(-1, 2, (90, 3)).astype(np.int8)
    logits = 2.0 * labels + generator.normal(0, 1, (90, 3))
    names = ("effusion", "nodule", "mass")
    outputs = outputs_of(LabelSpec("multilabel", names), [1.0] * 3, [0.5] * 3, "given")
    patients, none = [str(row // 2) for row in range(90)], [""] * 90
    found = measure(
        Scores("val", "multilabel", names, outputs, labels, logits, patients, none, none),
        num_bootstrap=20,
    )
    assert [each.output.name for each in found.outputs] == list(names)
    for column, each in enumerate(found.outputs):
        known = np.flatnonzero(labels[:, column] >= 0)
        alone = measure_main(
            labels[known, column],
            1 / (1 + np.exp(-logits[known, column])),
            patients=[patients[row] for row in known],
        )
        assert each.whole.counts == alone.whole.counts
        for name in METRICS:
            value = alone.whole.metrics[name].value
            assert each.whole.metrics[name].value == pytest.approx(value), name
