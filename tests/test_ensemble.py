"""Several runs predict together: the mean of their calibrated logits, one row for each image."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

import xrai
from tests.dataset.pictures import dicom_file
from tests.models import FINGERPRINT, phantoms, save_random_run, save_run
from tests.training import call_main
from xrai import predict
from xrai.errors import RunError
from xrai.ingest.find import find_files
from xrai.ingest.images import decode, ratio_of, shown_box
from xrai.labels import LabelSpec
from xrai.learning.explain import laid_over
from xrai.learning.network import ResNet
from xrai.pipeline import Pipeline, load_pipeline
from xrai.results.ensemble import disagreement, mean_outputs, mean_priors, scaled_logits
from xrai.results.types import outputs_of

FITS = ("crop", "squash", "pad")
CLASSES = LabelSpec("multiclass", ("NORMAL", "BACTERIAL", "VIRAL"))
FINDINGS = LabelSpec("multilabel", ("Mass", "Edema", "Nodule"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two runs of other image sizes, fits, temperatures and thresholds."""
    folder = tmp_path_factory.mktemp("runs")
    first = save_run(folder, run_id="large", threshold=0.4)
    options = {"threshold": 0.7, "temperature": 0.8, "num_steps": 40}
    second = save_run(folder, run_id="small", size=32, fit="squash", **options)  # type: ignore[arg-type]
    return str(first), str(second)


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms, one image of noise, and a file that is none."""
    folder = tmp_path_factory.mktemp("films")
    for number, film in enumerate(phantoms(20)[0]):
        Image.fromarray(film).save(folder / f"{number:02}.png")
    noise = np.random.default_rng(5).integers(0, 256, (90, 120), np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    (folder / "none.txt").write_text("no image")
    return folder


def logits(probabilities: list[float]) -> NDArray[np.float64]:
    values = np.array(probabilities)
    return np.asarray(np.log(values) - np.log1p(-values))


@pytest.mark.parametrize("labels", [None, CLASSES, FINDINGS])
def test_a_run_with_itself_predicts_as_it_does_alone(
    labels: LabelSpec | None, runs: tuple[str, str], films: Path, tmp_path: Path
) -> None:
    run = runs[0] if labels is None else str(save_random_run(tmp_path, labels))
    alone, twice = xrai.load(run), xrai.load(run, run)
    files = find_files([str(films)])
    pairs = zip(*(each.classify(files, explain_side=32) for each in (alone, twice)), strict=True)
    for one, two in pairs:
        before, after = one.prediction, two.prediction
        assert after.probabilities == pytest.approx(before.probabilities, rel=1e-12)
        expected = (before.decision, before.reason, before.calls, before.thresholds)
        assert (after.decision, after.reason, after.calls, after.thresholds) == expected
        assert before.disagreement is None
        assert after.disagreement == (0 if after.is_readable else None)
        assert after.model == f"{before.model}+{before.model}"
        assert list(one.heats) == list(two.heats)
        for name, heat in one.heats.items():
            assert two.heats[name] == pytest.approx(heat, abs=1e-6)


def test_logits_thresholds_and_heat_maps_are_means_and_review_is_any_runs(
    runs: tuple[str, str], films: Path
) -> None:
    files = find_files([str(films)])
    both = load_pipeline(*runs)
    first, second, found = (
        list(each.classify(files, explain_side=32))
        for each in (load_pipeline(runs[0]), load_pipeline(runs[1]), both)
    )
    (threshold,) = {each.prediction.threshold for each in found}
    assert threshold is not None
    assert logits([threshold])[0] == pytest.approx(logits([0.4, 0.7]).mean())
    num_calls, num_review, num_other = 0, 0, 0
    for one, two, mean in zip(first, second, found, strict=True):
        row = mean.prediction
        assert row.model == "large+small"
        if row.probability is None:
            assert (row.decision, row.disagreement) == ("review", None)
            continue
        of_each = [one.prediction.probability or 0.0, two.prediction.probability or 0.0]
        assert logits([row.probability])[0] == pytest.approx(logits(of_each).mean(), rel=1e-6)
        assert row.disagreement == pytest.approx(np.ptp(of_each))
        is_review = "review" in (one.prediction.decision, two.prediction.decision)
        assert (row.decision == "review") == is_review
        num_review += is_review
        if not is_review:
            assert (row.decision == "pneumonia") == (row.probability >= threshold)
            num_calls += row.decision == "pneumonia"
        heat, small = one.heats["pneumonia"], torch.from_numpy(two.heats["pneumonia"])[None]
        with Image.open(row.path) as film:
            ratio = film.width / film.height
        whole, middle = (
            torch.tensor([shown_box(ratio, fit=fit)]).double() for fit in ("squash", "crop")
        )
        placed = laid_over(small, whole, onto=middle, size=64)[0].numpy()
        num_other += ratio != 1 and not np.allclose(
            placed, functional.interpolate(small[None], (64, 64), mode="bilinear")[0, 0], atol=0.1
        )
        assert mean.heats["pneumonia"] == pytest.approx((heat + placed) / 2, abs=1e-5)
        assert mean.image is not None and one.image is not None
        assert np.array_equal(mean.image, one.image)
    assert num_review >= 1 and num_calls >= 3 and num_other >= 3
    assert both.squares == ((64, "crop"), (32, "squash"))
    images = [np.zeros((2, size, size), np.uint8) for size, _ in both.squares]
    assert all(each.shape == (2,) for each in both.score(images))
    with pytest.raises(AssertionError, match="several fits"):
        both.explain(images)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("other", FITS)
@pytest.mark.parametrize(("width", "height"), [(320, 160), (150, 200)])  # padded to whole pixels
def test_what_is_laid_over_a_square_of_another_fit_is_at_its_own_place(
    width: int, height: int, fit: str, other: str
) -> None:
    # a smooth image is its own heat map: its squares must show it at the same places
    waves = 2.2 + np.sin(np.arange(height) / 35)[:, None] + np.cos(np.arange(width) / 30)
    film = np.rint(50 * waves).astype(np.uint8)  # never black, as what "pad" adds is
    expected, maps = (
        decode(film, size=size, fit=each, max_pixels=10**6).astype(np.float32)
        for size, each in ((48, fit), (64, other))
    )
    boxes, onto = (
        torch.tensor([shown_box(width / height, fit=each)]).double() for each in (other, fit)
    )
    found, seen = (
        laid_over(each[None], boxes, onto=onto, size=48)[0].numpy()
        for each in (torch.from_numpy(maps), torch.ones(64, 64))
    )
    assert not found[seen == 0].any()
    assert (seen == 0).any() == (fit == "pad" != other or (fit, other) == ("squash", "crop"))
    is_shown = (seen > 0) & (expected > 0) & (found > 0)
    assert is_shown.mean() > 0.2 and np.median(np.abs(found - expected)[is_shown]) < 1


def test_the_ratio_is_that_of_the_upright_image_with_square_pixels(tmp_path: Path) -> None:
    turned = Image.new("L", (30, 20))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    turned.save(tmp_path / "plain.png")
    assert ratio_of((tmp_path / "turned.jpg").read_bytes()) == pytest.approx(20 / 30)
    assert ratio_of((tmp_path / "plain.png").read_bytes()) == pytest.approx(30 / 20)
    dicom = dicom_file(np.zeros((20, 30), np.uint16), PixelSpacing=[0.2, 0.1])
    assert ratio_of(dicom) == pytest.approx(30 / 40)
    assert ratio_of(np.zeros((20, 30), np.uint8)) == pytest.approx(30 / 20)


@pytest.mark.parametrize("labels", [CLASSES, FINDINGS])
def test_outputs_in_another_order_are_matched_by_name(
    labels: LabelSpec, films: Path, tmp_path: Path
) -> None:
    model = load_pipeline(str(save_random_run(tmp_path, labels))).model
    turned = load_pipeline(str(tmp_path / "tiny")).model
    order = [2, 0, 1]
    assert isinstance(turned.network, ResNet)
    with torch.no_grad():
        for parameter in (turned.network.head.weight, turned.network.head.bias):
            parameter.copy_(parameter[order].clone())
    several: dict[str, Any] = {
        name: tuple(getattr(model, name)[place] for place in order)
        for name in ("temperatures", "thresholds", "priors")
        if len(getattr(model, name)) == 3
    }
    names = tuple(labels.classes[place].lower() for place in order)
    turned = replace(turned, labels=LabelSpec(labels.task, names), **several)
    alone, both = Pipeline(model), Pipeline(model, turned)
    assert both.priors == pytest.approx(alone.priors)
    files = find_files([str(films)])
    for one, two in zip(
        alone.classify(files, explain_side=32), both.classify(files, explain_side=32), strict=True
    ):
        assert two.prediction.probabilities == pytest.approx(one.prediction.probabilities, rel=1e-5)
        assert two.prediction.calls == one.prediction.calls
        assert two.prediction.thresholds == pytest.approx(one.prediction.thresholds)
        assert list(two.heats) == list(one.heats)
        for name, heat in one.heats.items():
            assert two.heats[name] == pytest.approx(heat, abs=1e-4)


def test_table_and_json_state_the_runs_and_how_far_they_are_apart(
    runs: tuple[str, str], films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [*(f"--run={run}" for run in runs), f"--out={out}", str(films)]
    assert call_main(predict, *arguments, "--no_overlays", capsys=capsys) == (0, [])
    arguments += ["--prior=0.1"]  # its own folder is taken again
    assert call_main(predict, *arguments, capsys=capsys) == (0, [])
    pipeline = xrai.load(*runs, prior=0.1)
    rows = pipeline.predict(films)
    with (out / "predictions.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    content = json.loads((out / "predictions.json").read_text())
    assert list(table[0])[-4:] == ["prior", "source_of_prior", "disagreement", "model"]
    for row, cells, entry in zip(rows, table, content["predictions"], strict=True):
        assert entry["disagreement"] == row.disagreement
        assert cells["disagreement"] == ("" if row.disagreement is None else str(row.disagreement))
        assert cells["model"] == entry["model"] == "large+small"
    assert content["run_id"] == "large+small" and content["temperature"] == 1.0
    assert logits([content["threshold"]])[0] == pytest.approx(logits([0.4, 0.7]).mean())
    assert [each["threshold"] for each in content["runs"]] == [0.4, 0.7]
    assert content["runs"][1] == {
        "run_id": "small",
        "dataset_fingerprint": FINGERPRINT,
        "classes": ["NORMAL", "PNEUMONIA"],
        "threshold": 0.7,
        "temperature": 0.8,
        "image_size": 32,
        "fit": "squash",
    }
    most = max(rows, key=lambda row: row.disagreement or 0)
    last = f"probabilities of the runs are at most {most.disagreement:.3f} apart: {most.path}"
    text = " ".join(line.strip() for line in predict.format_table(rows, pipeline.model, out=None))
    assert last in text and "up, the threshold of large+small, moved to the prior" in text


def test_runs_of_other_names_are_refused_in_one_line(
    runs: tuple[str, str], films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_random_run(tmp_path, CLASSES)
    arguments = [f"--run={runs[0]}", f"--run={other}", str(films)]
    status, (line,) = call_main(predict, *arguments, capsys=capsys)
    assert status == 2 and line.endswith(
        "run large was trained on the classes NORMAL, PNEUMONIA, run tiny on the classes NORMAL, "
        "BACTERIAL, VIRAL: only runs of the same names can predict together"
    )
    turned = replace(load_pipeline(runs[1]).model, labels=LabelSpec("binary", ("PNEUMONIA", "NO")))
    with pytest.raises(RunError, match="only runs of the same names"):
        Pipeline(load_pipeline(runs[0]).model, turned)
    status, (line,) = call_main(predict, f"--run={runs[0]}", "--run=", str(films), capsys=capsys)
    assert status == 2 and "--run is missing" in line


def test_priors_are_known_only_where_each_runs_are() -> None:
    assert mean_priors([(0.5,), ()], is_multiclass=False) == ()
    assert mean_priors([(0.3,), (0.3,)], is_multiclass=False) == (0.3,)
    found = mean_priors([(0.2,), (0.5,)], is_multiclass=False)
    assert found == pytest.approx([1 / 3])  # odds 1/4 and 1: their geometric mean is 1/2
    found = mean_priors([(0.5, 0.25, 0.25), (0.25, 0.5, 0.25)], is_multiclass=True)
    root = 8**-0.5
    assert found == pytest.approx(np.array([root, root, 0.25]) / (2 * root + 0.25))


def test_classes_are_averaged_whatever_constant_their_logits_have() -> None:
    outputs = outputs_of(CLASSES, [2.0], [], "")
    some = np.random.default_rng(0).normal(size=(5, 3))
    scaled = scaled_logits(outputs, some)
    assert np.exp(scaled).sum(axis=1) == pytest.approx(np.ones(5))
    assert scaled_logits(outputs, some + 700) == pytest.approx(scaled)
    (mean, *_) = mean_outputs([outputs, outputs])
    assert (mean.temperature, mean.threshold, mean.name) == (1.0, None, "NORMAL")
    apart = disagreement(np.array([[[0.1, 0.9]], [[0.3, 0.7]], [[0.2, 0.5]]]))
    assert apart == pytest.approx([0.4])
