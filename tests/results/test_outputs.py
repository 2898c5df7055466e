"""Several classes or findings: metrics against scikit-learn, and what all outputs say together."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import metrics as scikit
from sklearn.preprocessing import label_binarize

from tests.results.many import make_many
from tests.results.small import make_classes, make_findings
from xrai.labels import LabelSpec
from xrai.results.calibration import calibrated, fit_softmax_temperature, fit_temperature, softmax
from xrai.results.intervals import estimate_mean
from xrai.results.measure import measure
from xrai.results.metrics import METRICS
from xrai.results.record import metrics_json, prediction_columns, prediction_rows
from xrai.results.summary import Summary, main_results, read_summary, result_lines
from xrai.results.types import Estimate, TrainedOn, Training, outputs_of
from xrai.tables import to_json


@st.composite
def classes(draw: st.DrawFn) -> tuple[NDArray[np.int64], NDArray[np.float64], float]:
    """Images of 3 to 5 classes, each of them present, their logits, often tied, a temperature."""
    num_classes, num = draw(st.integers(3, 5)), draw(st.integers(12, 60))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    labels = np.append(np.arange(num_classes), generator.integers(0, num_classes, num))
    logits = generator.normal(0, 2, (len(labels), num_classes))
    logits[np.arange(len(labels)), labels] += draw(st.floats(0, 4))
    if draw(st.booleans()):
        logits = np.round(logits)
    return labels, logits, draw(st.sampled_from([0.5, 1.0, 2.5]))


@given(classes())
def test_metrics_of_classes_are_those_of_scikit_learn(
    images: tuple[NDArray[np.int64], NDArray[np.float64], float],
) -> None:
    labels, logits, temperature = images
    num_classes = logits.shape[1]
    scores = make_classes(labels, logits, temperature=temperature)
    results = measure(scores, num_bootstrap=2)
    probabilities, calls = softmax(logits, temperature), logits.argmax(axis=1)
    assert probabilities.sum(axis=1) == pytest.approx(1)
    one_hot = label_binarize(labels, classes=range(num_classes))
    called = label_binarize(calls, classes=range(num_classes))
    for column, found in enumerate(results.outputs):
        wanted = of_calls(one_hot[:, column], probabilities[:, column], called[:, column])
        for name, value in wanted.items():
            assert found.whole.metrics[name].value == pytest.approx(value, abs=1e-9, nan_ok=True), (
                name
            )
    for average, means in ("macro", results.macro), ("micro", results.micro):
        options: dict[str, Any] = {"average": average, "zero_division": np.nan}
        assert means["auroc"].value == pytest.approx(
            scikit.roc_auc_score(one_hot, probabilities, average=average)
        )
        assert means["average_precision"].value == pytest.approx(
            scikit.average_precision_score(one_hot, probabilities, average=average)
        )
        assert means["sensitivity"].value == pytest.approx(
            scikit.recall_score(labels, calls, **options)
        )
        assert means["ppv"].value == pytest.approx(scikit.precision_score(labels, calls, **options))
        assert means["f1"].value == pytest.approx(scikit.f1_score(labels, calls, **options))
        assert means["accuracy"].value == scikit.accuracy_score(labels, calls)
    assert results.macro["kappa"].value == pytest.approx(scikit.cohen_kappa_score(labels, calls))
    assert results.macro["log_loss"].value == pytest.approx(scikit.log_loss(labels, probabilities))
    assert results.macro["brier"].value * num_classes == pytest.approx(
        scikit.brier_score_loss(labels, probabilities, scale_by_half=False)
    )
    assert results.confusion is not None
    assert np.array_equal(results.confusion, scikit.confusion_matrix(labels, calls))
    assert list(results.left_out) == [
        name
        for name in METRICS
        if any(each.whole.metrics[name].is_undefined for each in results.outputs)
    ]


def of_calls(labels: Any, scores: Any, called: Any) -> dict[str, float]:
    """Each metric by scikit-learn where it has one, for calls that no threshold makes."""
    options: dict[str, Any] = {"zero_division": np.nan}
    return {
        "accuracy": scikit.accuracy_score(labels, called),
        "sensitivity": scikit.recall_score(labels, called),
        "specificity": scikit.recall_score(labels, called, pos_label=0),
        "ppv": scikit.precision_score(labels, called, **options),
        "npv": scikit.precision_score(labels, called, pos_label=0, **options),
        "auroc": scikit.roc_auc_score(labels, scores),
        "average_precision": scikit.average_precision_score(labels, scores),
        "f1": scikit.f1_score(labels, called, **options),
        "brier": scikit.brier_score_loss(labels, scores),
    }


@st.composite
def findings(draw: st.DrawFn) -> tuple[NDArray[np.int8], NDArray[np.float64], list[float]]:
    """Images with 2 to 4 findings, some unknown, each present in one and absent in another."""
    num_findings, num = draw(st.integers(2, 4)), draw(st.integers(4, 40))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    labels = generator.integers(-1, 2, (num, num_findings)).astype(np.int8)
    labels[0], labels[1] = 0, 1
    logits = 2.0 * labels + generator.normal(0, 2, labels.shape)
    thresholds = draw(st.lists(st.floats(0.1, 0.9), min_size=num_findings, max_size=num_findings))
    return labels, np.round(logits, draw(st.integers(0, 3))), thresholds


@given(findings())
def test_metrics_of_findings_are_those_of_their_known_labels(
    images: tuple[NDArray[np.int8], NDArray[np.float64], list[float]],
) -> None:
    labels, logits, thresholds = images
    results = measure(make_findings(labels, logits, thresholds=thresholds), num_bootstrap=2)
    scores = calibrated(logits)
    called = (scores >= np.array(thresholds)).astype(int)
    is_known = labels >= 0
    expected = [
        of_calls(labels[known, column], scores[known, column], called[known, column])
        for column, known in enumerate(is_known.T)
    ]
    pooled = of_calls(labels[is_known], scores[is_known], called[is_known])
    for name, value in pooled.items():
        values = [each[name] for each in expected]
        for found, wanted in zip(results.outputs, values, strict=True):
            approximately = pytest.approx(wanted, abs=1e-9, nan_ok=True)
            assert found.whole.metrics[name].value == approximately, name
        defined = [each for each in values if not math.isnan(each)]
        mean = sum(defined) / len(defined) if defined else math.nan
        assert results.macro[name].value == pytest.approx(mean, abs=1e-9, nan_ok=True), name
        assert results.micro[name].value == pytest.approx(value, abs=1e-9, nan_ok=True), name
    assert results.confusion is None


def test_intervals_of_means_are_those_of_a_plain_loop_that_draws_patients() -> None:
    generator = np.random.default_rng(1)
    patients = generator.integers(0, 100, 150)
    labels = generator.integers(0, 3, 150)
    logits = generator.normal(0, 1, (150, 3)) + 1.5 * np.eye(3)[labels]
    found = measure(
        make_classes(labels, logits, patients=patients.tolist()), num_bootstrap=60, seed=3
    )
    names = np.unique(patients.astype(str)).astype(int)  # they are drawn in the order of their keys
    draws = np.random.default_rng(3).integers(0, len(names), size=(60, len(names)))
    samples = [
        np.concatenate([np.flatnonzero(patients == names[index]) for index in draw])
        for draw in draws
    ]
    scores, one_hot, calls = softmax(logits), np.eye(3)[labels], logits.argmax(axis=1)
    for estimate, loop in (
        (found.macro["auroc"], lambda own: scikit.roc_auc_score(one_hot[own], scores[own])),
        (
            found.micro["auroc"],
            lambda own: scikit.roc_auc_score(one_hot[own], scores[own], average="micro"),
        ),
        (found.macro["accuracy"], lambda own: scikit.accuracy_score(labels[own], calls[own])),
        (found.macro["kappa"], lambda own: scikit.cohen_kappa_score(labels[own], calls[own])),
        (found.outputs[2].whole.metrics["auroc"], lambda own: of_third(one_hot[own], scores[own])),
    ):
        low, high = np.percentile([loop(own) for own in samples], [2.5, 97.5])
        assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e-9)
        assert estimate.method == "bootstrap"


def test_a_mean_of_intervals_that_are_not_resampled_is_as_wide_as_their_correlation_says() -> None:
    one = Estimate(0.8, 0.6, 0.9, "wilson")
    resampled = np.random.default_rng(0).normal(0.8, 0.1, 4000)
    alike = estimate_mean([one] * 3, np.stack([resampled] * 3), np.eye(3))
    assert (alike.low, alike.high) == pytest.approx((0.6, 0.9))
    assert (alike.value, alike.method) == (pytest.approx(0.8), "combined")
    apart = np.random.default_rng(1).normal(0.8, 0.1, (4, 4000))
    apart[:, :400] = np.nan  # undefined there
    independent = estimate_mean([one] * 4, apart, np.ones((4, 4)))
    ends = (independent.low, independent.high)
    assert ends == pytest.approx((0.8 - 0.2 / 2, 0.8 + 0.1 / 2), abs=0.01)
    for constant in (np.ones((4, 10)), np.full((4, 10), np.nan)):  # says nothing of correlations
        found = estimate_mean([one] * 4, constant, np.eye(4))
        assert (found.low, found.high) == pytest.approx((0.7, 0.85))
        found = estimate_mean([one] * 4, constant, np.ones((4, 4)))
        assert (found.low, found.high) == pytest.approx((0.6, 0.9))


def test_a_mean_of_findings_of_the_same_patients_is_as_wide_as_one_of_them_where_all_is_right() -> (
    None
):
    labels = np.repeat([[1], [0], [0]], 3, axis=1).repeat(10, axis=0)
    for rolled in (0, 10):  # the same positive patients, then others
        labels = np.stack([np.roll(labels[:, 0], rolled * at) for at in range(3)], axis=1)
        found = measure(make_findings(labels, 4.0 * labels - 2), num_bootstrap=40)
        one, mean = found.main.whole.metrics["sensitivity"], found.macro["sensitivity"]
        part = 1 if rolled == 0 else 1 / math.sqrt(3)
        assert 1 - mean.low == pytest.approx(part * (1 - one.low))


def test_a_mean_has_an_interval_where_all_is_right_and_a_reason_where_an_output_has_none() -> None:
    labels = np.tile([[0, 1], [1, 0], [0, 0]], (10, 1))
    found = measure(make_findings(labels, 4.0 * labels - 2), num_bootstrap=40).macro
    for name in ("sensitivity", "specificity", "auroc", "accuracy"):
        assert found[name].value == 1 and found[name].method == "combined"
        assert 0.7 < found[name].low < found[name].high == 1
    assert found["f1"].value == 1 and "all give the same" in found["f1"].reason
    reasons = [Estimate(0.5, reason="too few"), Estimate(0.7, reason="too many")]
    nothing = np.zeros((2, 9))
    assert (
        estimate_mean(reasons, nothing, np.eye(2)).reason
        == "not every class or finding has an interval"
    )
    assert (
        estimate_mean([*reasons[:1], Estimate(reason="none")], nothing, np.eye(2)).reason
        == "too few"
    )


def test_the_interval_of_a_mean_holds_the_true_value_with_five_positive_images() -> None:
    inside = dict.fromkeys(("auroc", "sensitivity"), 0)
    truth = {"auroc": 0.8019, "sensitivity": 0.7257}  # of the normal distribution
    for seed in range(60):
        generator = np.random.default_rng(seed)
        labels = np.stack([generator.permutation(100) < 5 for _ in range(3)], axis=1).astype(int)
        logits = generator.normal(1.2 * labels - 0.6)
        found = measure(make_findings(labels, logits), num_bootstrap=40).macro
        for name, value in truth.items():
            inside[name] += found[name].low <= value <= found[name].high
    assert min(inside.values()) >= 54


def of_third(labels: NDArray[np.float64], scores: NDArray[np.float64]) -> float:
    return float(scikit.roc_auc_score(labels[:, 2], scores[:, 2]))


def test_a_finding_that_is_never_present_is_left_out_of_means_and_says_why() -> None:
    labels = np.array([[0, 1, -1], [0, 0, -1], [0, 1, -1], [-1, 0, -1]])
    results = measure(make_findings(labels, 1.0 * labels), num_bootstrap=20)
    absent, present, unknown = results.outputs
    assert absent.whole.metrics["auroc"].is_undefined
    assert absent.whole.metrics["auroc"].reason == "it needs images with A and images without A"
    assert absent.whole.metrics["sensitivity"].reason == "there are no images with A"
    assert present.whole.metrics["auroc"].value == results.macro["auroc"].value == 1
    assert (unknown.whole.num_images, unknown.whole.num_patients) == (0, 0)
    assert unknown.whole.metrics["accuracy"].reason == "there are no images"
    assert results.left_out["auroc"] == ("A", "C")
    assert results.left_out["specificity"] == ("C",)
    assert results.worst is present
    nothing = measure(make_findings(np.full((4, 2), -1), np.zeros((4, 2))), num_bootstrap=20)
    assert nothing.macro["auroc"].reason == "no class or finding has it"
    assert nothing.micro["accuracy"].reason == "there are no images"
    assert nothing.worst is None
    empty = measure(make_findings(np.zeros((0, 2)), np.zeros((0, 2))), num_bootstrap=20)
    assert empty.macro["accuracy"].is_undefined
    none = measure(make_classes([], np.zeros((0, 3))), num_bootstrap=20)
    assert none.macro["accuracy"].reason == "there are no images"
    assert none.confusion == ((0, 0, 0),) * 3


def test_images_of_unknown_labels_alone_are_counted_where_they_are_in_review() -> None:
    scores, _ = make_many("multilabel", 2)
    labels = scores.labels.copy()
    labels[-60:] = -1
    unknown = dataclasses.replace(scores, labels=labels)
    found = measure(unknown, num_bootstrap=10).abstention
    assert unknown.in_review[-60:].any()
    assert found.num_review == unknown.in_review.sum()
    assert found.share_review == pytest.approx(unknown.in_review.mean())


def test_one_patient_has_no_interval() -> None:
    results = measure(make_classes([0, 1, 2, 0], np.eye(4)[:, :3], patients="aaaa"))
    for estimate in (results.macro["auroc"], results.macro["kappa"], results.micro["auroc"]):
        assert math.isfinite(estimate.value)
        assert math.isnan(estimate.low)
        assert "one patient" in estimate.reason


def test_the_class_with_the_highest_score_is_called_and_the_first_of_equal_ones() -> None:
    scores = make_classes([0, 1, 2], [[1.0, 1.0, 0.0], [-5, 2, 900], [0, 0, 0]], temperature=2)
    assert scores.called.tolist() == [
        [True, False, False],
        [False, False, True],
        [True] + [False] * 2,
    ]
    assert scores.certainty[0].tolist() == [0, 0, 0.5]
    assert scores.certainty[1].tolist() == pytest.approx([452.5, 449, 449])
    assert np.isfinite(scores.probabilities).all()


def test_images_for_a_person_are_counted_by_class_and_the_rest_is_measured() -> None:
    labels = [0, 0, 1, 1, 2, 2]
    logits = np.eye(3)[[0, 0, 1, 2, 2, 2]] * [[4.0], [3], [2], [1], [2.5], [3.5]]
    scores = make_classes(labels, logits, atypicality=[0, 0, 0.5, 2, 3, 0])
    found = measure(scores, num_bootstrap=20).abstention
    assert found.num_review == 2
    assert {name: each.num_review for name, each in found.by_class.items()} == {
        "A": 0,
        "B": 1,
        "C": 1,
    }
    assert found.metrics["accuracy"].value == found.metrics["auroc"].value == 1
    assert found.curve[0].by_doubt == pytest.approx(5 / 6)
    assert found.curve[-1].num_images == 3
    assert found.curve[-1].by_doubt == 1  # the wrong call is the least certain
    assert found.curve[-1].by_atypicality == 1


def test_accuracy_on_the_images_that_are_kept_counts_every_known_finding() -> None:
    labels = [[1, -1], [1, 0], [-1, -1], [0, 1]]
    logits = [[3.0, 9.0], [-0.5, -2.0], [1, 1], [-2, -1.0]]
    found = measure(make_findings(labels, logits), num_bootstrap=20).abstention
    assert [point.num_images for point in found.curve[::5]] == [3, 2, 2]
    assert found.curve[0].by_doubt == pytest.approx(3 / 5)
    assert found.curve[5].by_doubt == pytest.approx(2 / 3)


@given(classes())
def test_the_temperature_of_classes_has_the_largest_likelihood_with_one_image_more(
    images: tuple[NDArray[np.int64], NDArray[np.float64], float],
) -> None:
    labels, logits, _ = images
    temperature = fit_softmax_temperature(labels, logits)

    def loss(at: float) -> float:
        losses = -np.log(np.clip(softmax(logits, at), 1e-300, 1))  # (N, C)
        one_more = (softmax(logits) * losses).sum(axis=1).mean()
        return float(losses[np.arange(len(labels)), labels].sum() + one_more)

    for other in (temperature * 1.05, temperature / 1.05):
        if 0.05 < other < 20:
            assert loss(temperature) <= loss(other) + 1e-12


def test_two_classes_by_softmax_have_the_temperature_of_one_logit() -> None:
    generator = np.random.default_rng(2)
    labels = generator.integers(0, 2, 300)
    logits = 8 * (labels - 0.5) + generator.normal(0, 8, 300)
    pair = np.column_stack([np.zeros(300), logits])
    assert fit_softmax_temperature(labels, pair) == pytest.approx(fit_temperature(labels, logits))


def test_the_words_of_a_metric_are_those_of_its_output() -> None:
    (binary,) = outputs_of(LabelSpec("binary", ("Healthy", "Effusion")), [1], [0.5], "given")
    assert METRICS["auroc"].of(binary).meaning == (
        "chance that an Effusion image scores above a Healthy one"
    )
    viral = outputs_of(LabelSpec("multiclass", ("N", "B", "VIRAL")), [1], [], "given")[2]
    assert (viral.name, viral.opposite, viral.threshold) == ("VIRAL", "not VIRAL", None)
    assert METRICS["specificity"].of(viral).meaning == (
        "share of images of other classes called not VIRAL"
    )
    found = outputs_of(LabelSpec("multilabel", ("Mass", "Effusion")), [1, 2], [0.1, 0.2], "g")[1]
    assert (found.temperature, found.threshold) == (2, 0.2)
    assert METRICS["sensitivity"].of(found).meaning == (
        "share of images with Effusion called Effusion"
    )
    assert METRICS["npv"].of(found).undefined == "no image was called no Effusion"


def test_files_of_classes_have_a_score_for_each_and_the_summary_is_read_again() -> None:
    labels = [0, 0, 1, 1, 2, 2]
    scores = make_classes(labels, 2.0 * np.eye(3)[[0, 0, 1, 2, 2, 2]], atypicality=[0] * 5 + [2])
    rows = list(prediction_rows(scores))
    assert list(rows[0]) == list(prediction_columns(scores))
    assert [row["label"] for row in rows] == list("AABBCC")
    assert [row["decision"] for row in rows] == [*"AABCC", "review"]
    assert sum(float(str(rows[0][f"score_{name}"])) for name in "ABC") == pytest.approx(1)
    results = measure(scores, num_bootstrap=20)
    written = json.loads(to_json(metrics_json(results)))
    assert written["confusion"] == [[2, 0, 0], [0, 1, 1], [0, 0, 2]]
    assert [each["name"] for each in written["outputs"]] == ["A", "B", "C"]
    assert written["macro"]["accuracy"]["value"] == pytest.approx(5 / 6)
    assert written["outputs"][0]["threshold"] is None
    trained_on = TrainedOn("data", 32, "crop", {"train": {"A": 1}})
    training = Training("r1", "finished", 1, 1, "0123", 1.0, trained_on)
    summary = Summary(training, main_results(results), {"auroc": 0.9})
    read = read_summary(to_json(summary.to_mapping()).encode(), where="summary.json")
    assert (read.main.task, read.main.threshold, read.main.temperature) == ("multiclass", None, 1)
    assert [each.name for each in read.main.outputs] == ["A", "B", "C"]
    lines = "\n".join(result_lines(read.main, "x"))
    assert "5 of 6 images correctly classified" in lines
    assert "worst B" in lines


def test_findings_are_joined_and_unknown_ones_are_marked() -> None:
    scores = make_findings([[1, -1, 1], [0, 0, 0]], [[2.0, 1.0, -1.0], [-1, -1, -1]])
    rows = list(prediction_rows(scores))
    assert [row["label"] for row in rows] == ["A|B?|C", ""]
    assert [row["call"] for row in rows] == ["A|B", ""]
    assert [row["decision"] for row in rows] == ["A|B", "no finding"]
    results = measure(scores, num_bootstrap=20)
    written = json.loads(to_json(metrics_json(results)))
    assert written["confusion"] is None
    assert written["left_out"]["auroc"] == ["B"]
    assert written["macro"]["auroc"]["value"] == 0.75  # C is tied
    lines = "\n".join(result_lines(main_results(results), "x", validation={}))
    assert "mean of 2 of 3 findings; worst C 0.500" in lines
    assert "x/curves/auroc.png" in lines


def test_the_accuracy_of_findings_is_the_share_of_known_labels_that_are_correct() -> None:
    labels = [[1, 1], [0, -1], [0, -1], [1, -1]]
    logits = [[2.0, -2.0], [-1, 0], [1, 0], [3, 0]]
    scores = make_findings(labels, logits, atypicality=[0, 0, 2, 0])
    results = measure(scores, num_bootstrap=20)
    main = main_results(results)
    assert results.macro["accuracy"].value == (3 / 4 + 0) / 2
    assert results.headline["accuracy"].value == main.accuracy == 3 / 5
    assert main.review.accuracy_of_the_rest == 3 / 4 == results.abstention.metrics["accuracy"].value
    line = next(line for line in result_lines(main, "x") if line.startswith("accuracy"))
    assert line.endswith("3 of 5 known labels correct") and "mean" not in line
