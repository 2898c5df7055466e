"""The page is one file, asks for nothing, escapes all text, and says what a reader must know; a
browser reads it.
"""

import dataclasses
import functools
import html
import json
import re
import tempfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xrai
from tests.results.small import make_scores, measure_split
from xrai.config import Config
from xrai.config import Labels as LabelReading
from xrai.results import plots, sheets
from xrai.results.baselines import Looks, measure_baselines
from xrai.results.environment import describe_environment
from xrai.results.history import EpochRow
from xrai.results.measure import measure
from xrai.results.metrics import METRICS, format_value
from xrai.results.record import metrics_json
from xrai.results.report import Page, Part, explore, render_report, source_hash
from xrai.results.summary import main_results, result_lines
from xrai.results.types import DatasetFacts, Scores, SplitResults, TrainedOn, Training, told_images

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Html(HTMLParser):
    """The page's tags, checked for balance, the addresses it names, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.ids: set[str] = set()
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids.update(value or "" for name, value in attrs if name == "id")
        self.addresses += [
            value or ""
            for name, value in attrs
            if name in ("src", "href", "action", "srcset", "data")
        ]
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)  # of the drawing

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self.open and self.open[-1] != "style":
            self.text += data


BARE = {"source": "s", "fingerprint": "0123abcd", "image_size": 64, "fit": "crop"}
HISTORY = [EpochRow(epoch=1, step=10, train_loss=0.5, train_accuracy=0.7)]


@functools.cache
def measured(*, split: str = "val", is_phantom: bool = False) -> tuple[Scores, SplitResults]:
    generator = np.random.default_rng(2)
    labels = generator.integers(0, 2, 90)
    scores = make_scores(
        labels,
        np.clip(0.3 + 0.4 * labels + 0.25 * generator.standard_normal(90), 0.001, 0.999),
        threshold=0.5123,
        subtypes=np.where(labels == 1, "virus", "").tolist(),
        groups=np.where(
            labels == 1, "virus", np.where(np.arange(90) % 2, "IM", "NORMAL2")
        ).tolist(),
        split=split,
        atypicality=np.linspace(0, 1.1, 90),
        is_phantom=is_phantom,
    )
    border = generator.random((90, 104)) + labels[:, None] / 9
    seen = Looks(labels.astype(np.uint8), list("ab" * 45), generator.random((90, 4)), border)
    baselines = measure_baselines(seen, seen, split=split, num_bootstrap=20)
    return scores, dataclasses.replace(measure(scores, num_bootstrap=20), baselines=baselines)


@functools.cache
def draw(*, split: str, is_phantom: bool) -> dict[str, bytes]:
    """All plots of a page, by name; they take the most time."""
    with tempfile.TemporaryDirectory() as folder:
        plots.draw_curves(HISTORY, Path(folder) / "curves", is_phantom=is_phantom)
        plots.draw_plots(*measured(split=split, is_phantom=is_phantom), Path(folder) / "plots")
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in Path(folder).glob("*/*.png")
        }


def render(
    folder: Path,
    *,
    split: str = "val",
    is_phantom: bool = False,
    is_evaluation: bool = False,
    **facts: Any,
) -> str:
    for name, data in draw(split=split, is_phantom=is_phantom).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    values = {
        "source": "data/chest_xray",
        "fingerprint": "0123abcd",
        "image_size": 64,
        "fit": "crop",
        "splits": {"train": {"normal": 40, "pneumonia": 60}},
        "num_found": 103,
        "excluded": {"truncated": 3},
        **facts,
    }
    dataset = DatasetFacts(**values)
    page = Page(
        measured(split=split, is_phantom=is_phantom)[1],
        training_on(dataset),
        dataset,
        config=Config().to_mapping(),
        environment={**describe_environment(), "device": "cpu"},
        history=HISTORY,
        others=[measured(split="val")[1]] if split == "test" else (),
        is_evaluation=is_evaluation,
    )
    return render_report(page, folder)


def training_on(dataset: DatasetFacts) -> Training:
    return Training(
        run_id="r1",
        status="done",
        epochs=24,
        best_epoch=22,
        fingerprint="0123abcd",
        duration_s=95,
        trained_on=TrainedOn(dataset.source, dataset.image_size, dataset.fit, dataset.splits),
    )


def test_the_page_is_one_file_that_asks_no_network_for_anything(tmp_path: Path) -> None:
    text = render(tmp_path)
    page = Html(text)
    assert len(page.images) == 8
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert {f"#{name}" for name in page.ids} >= {
        address for address in page.addresses if address.startswith("#")
    }
    without_data = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(
        r"https?:|//|url\(|@import|<script|<link", without_data.partition("</style>")[0][100:]
    )
    assert not re.search(r"https?://|<iframe|<link", without_data)
    assert "default-src 'none'" in text


def test_the_policy_allows_the_pages_own_script_and_no_other(tmp_path: Path) -> None:
    text = render(tmp_path, source="</script><script>alert(1)</script>")
    scripts = Html(text).scripts
    assert [attributes for attributes, _ in scripts] == [
        {"type": "application/json", "id": "explorer-data"},
        {},
    ]
    (policy,) = re.findall(r"script-src ([^;\"]*)", html.unescape(text))
    assert policy == source_hash(scripts[1][1])
    assert json.loads(scripts[0][1])["threshold"] == 0.5123


def test_the_explorer_holds_the_counts_of_metrics_and_draws_each_image_once(tmp_path: Path) -> None:
    scores, results = measured()
    found = scores.labelled()
    data = json.loads(Html(render(tmp_path)).scripts[0][1])
    assert data["counts"] == vars(results.main.whole.counts)
    for step in (0, 37, 120, 200):
        calls = found.scores >= step / 200
        assert (data["tp"][step], data["fp"][step]) == (
            (calls & (found.labels == 1)).sum(),
            (calls & (found.labels == 0)).sum(),
        )
    explorer = explore(results.main)
    tallest = max(height for bars in explorer.bars.values() for _, height in bars)
    edges = np.linspace(0, 1, 51)
    biggest = max(
        np.histogram(found.scores[found.labels == label], edges)[0].max() for label in (0, 1)
    )
    for name, label in (("negative", 0), ("positive", 1)):
        counts = [
            round(float(np.expm1(height / tallest * np.log1p(biggest))))
            for _, height in explorer.bars[name]
        ]
        assert sum(counts) == (found.labels == label).sum()


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    name = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}"
    text = render(
        tmp_path, source=name, splits={name: {name: 1, "b": 2}}, excluded={name: 1}, fit=name
    )
    page = Html(text)
    assert len(page.scripts) == 2
    assert not any("alert" in script for _, script in page.scripts)
    assert len(page.images) == 8
    assert page.text.count(name) >= 5


def test_every_figure_says_in_words_what_it_shows(tmp_path: Path) -> None:
    assert all(len(image["alt"] or "") > 30 for image in Html(render(tmp_path)).images)


def test_the_page_says_all_that_a_reader_must_know(tmp_path: Path) -> None:
    text = " ".join(Html(render(tmp_path)).text.split())
    for part in (
        "Not a medical device",
        "data/chest_xray",
        "0123abcd",
        "64 × 64",
        "24 epochs in 1 min 35 s",
        "of epoch 22",
        "chosen on validation",
        "virus",
        "truncated",
        "103 files were found",
        "3 were excluded",
        f"xrai {xrai.__version__}",
        "cpu",
        "logit_adjustment",
        "The weights, the threshold and the temperature were chosen on the same images",
        "Intended use",
        "not for diagnosis",
        "NORMAL2",
        "all pneumonia",
        "CLAIM 2024",
        "Model card",
        "temperature of",
        "9 of 90 images (10.0 %)",
        "the outer border of the stored image alone",
        "fitted to 90 images",
        *(info.title for info in METRICS.values()),
    ):
        assert part in text, part
    assert "phantom" not in text


def test_the_page_says_why_an_interval_is_not_that_of_resamples_and_each_reason_once() -> None:
    labels, scores = [0] * 40 + [1] * 20, [0.1] * 40 + [0.9, 0.9] + [0.2] * 18
    kinds = [""] * 40 + ["bacteria", "virus"] * 10
    found = measure(make_scores(labels, scores, subtypes=kinds), num_bootstrap=20).main
    notes = Part("explorer", 0, found).notes
    (wilson,) = [note for note in notes if "Wilson" in note]
    assert wilson.startswith("Sensitivity, Specificity, PPV,")  # 2 of 20 are right, none is wrong
    assert "because too few patients are right, or wrong, to resample; counted in" in wilson
    assert sum("Newcombe's interval, because a class has too few" in note for note in notes) == 1
    assert sum(note.startswith("ECE") for note in notes) == 1  # of the whole and both subtypes


def test_every_link_of_the_page_leads_to_a_place_on_it(tmp_path: Path) -> None:
    render(tmp_path)
    sheets.draw_sheet([np.zeros((8, 8), np.uint8)], ["a"], tmp_path / "plots/overlays.png")
    sheets.draw_sheet([np.zeros((8, 8), np.uint8)], ["a"], tmp_path / "plots/mistakes.png")
    page = Html(render(tmp_path))
    links = {address for address in page.addresses if address.startswith("#")}
    assert (
        {"#mistakes", "#explorer", "#limits", "#checklists"}
        <= links
        <= {f"#{name}" for name in page.ids}
    )
    (shown,) = [image for image in page.images if "largest errors" in (image["alt"] or "")]
    assert "does not localise disease" in (
        shown["alt"] or ""
    )  # with heat maps, where there are some
    assert "chart" not in (shown.get("class") or ""), "X-rays keep their grey values in the dark"


def test_the_public_data_set_is_described_where_its_names_are_found_and_else_not(
    tmp_path: Path,
) -> None:
    groups = {"train": {"IM": 3, "NORMAL2": 4, "bacteria": 5, "virus": 6}}
    public = render(tmp_path, groups=groups, num_patients={"train": 17})
    assert "Guangzhou" in public and "CC BY 4.0" in public and "bacteria 5" in public
    for other in ({"IM": 3, "clinic": 1}, {"IM": 3}, {"virus": 3, "clinic": 1}):
        assert "Guangzhou" not in render(tmp_path, groups={"train": other})
    assert "Guangzhou" not in render(tmp_path)
    assert "Guangzhou" not in render(tmp_path, groups=groups, is_phantom=True)


def test_an_evaluation_says_so_and_names_both_data_sets(tmp_path: Path) -> None:
    text = " ".join(Html(render(tmp_path, split="test", is_evaluation=True)).text.split())
    for part in (
        "evaluation report",
        "On the test split of data/chest_xray",
        "Trained on",
        "Measured on",
        "0123abcd",
    ):
        assert part in text, part
    assert "training report" in Html(render(tmp_path)).text
    beside = " ".join(Html(render(tmp_path, split="test")).text.split())
    assert (
        "Compared with the other splits" in beside
        and "Compared with the other splits" not in Html(render(tmp_path)).text
    )


def test_an_evaluation_has_the_versions_of_the_training_and_its_own(tmp_path: Path) -> None:
    def software(page: Page) -> str:
        text = " ".join(Html(render_report(page, tmp_path)).text.split())
        return text.partition("Software")[2].partition("Config")[0].strip()

    machine: dict[str, Any] = describe_environment()
    machine["packages"]["xrai"] = "0.0.9"
    facts: dict[str, Any] = {"splits": {}, "num_found": 1, **BARE}
    dataset = DatasetFacts(**facts)
    results = measure_split([0, 1], [0.2, 0.7], split="test")
    page = Page(
        results, training_on(dataset), dataset, Config().to_mapping(), machine, is_evaluation=True
    )
    shown = software(page)
    assert shown.startswith("xrai 0.0.9, Python")
    assert shown.endswith(f"Measured withxrai {xrai.__version__}")
    assert "Measured with" not in software(dataclasses.replace(page, is_evaluation=False))


def test_one_image_of_one_patient_is_singular(tmp_path: Path) -> None:
    results = measure_split([1], [0.7], split="test")
    assert "On the test split, 1 image of 1 patient, the" in " ".join(
        Html(render_bare(tmp_path, results)).text.split()
    )
    lines = result_lines(main_results(results), "run")
    assert lines[0].startswith("test split: 1 image of 1 patient;")
    assert told_images(1204, 1) == "1,204 images of 1 patient"


@pytest.mark.parametrize("num_unknown", [0, 1, 4])
def test_no_patient_is_claimed_where_none_is_known(tmp_path: Path, num_unknown: int) -> None:
    keys = [f"{'clinic:' * (row % 2)}file:{row}.png" for row in range(num_unknown)]
    scores = make_scores([0, 1, 0, 1], [0.2, 0.7, 0.6, 0.9], split="test")
    scores = dataclasses.replace(scores, patients=[*keys, *"abcd"[num_unknown:]])
    results = measure(scores, num_bootstrap=10)
    facts: dict[str, Any] = {
        "splits": {"test": {"normal": 2, "pneumonia": 2}},
        "num_images": {"test": 4},
        "num_patients": {"test": 4},
        "num_without_patient": {"test": num_unknown},
    }
    text = " ".join(Html(render_bare(tmp_path, results, **facts)).text.split())
    told, cell, unit, level = {
        0: ("of 4 patients,", "test44", "patient", "by patient; identical"),
        1: (
            *("of at most 4 patients (unknown for 1 of the images),", "testat most 44"),
            *("patient", "by patient where known, else by image; identical"),
        ),
        4: (
            *("of unknown patients,", "testunknown4"),
            *("image", "by image, since no patient is known; identical"),
        ),
    }[num_unknown]
    assert f"On the test split, 4 images {told}" in text
    assert cell in text.replace(" ", "").replace("atmost", "at most ")
    assert f"disjoint{level}" in text
    alone = ", each image counting as a patient" if unit == "image" else ""
    assert f"10 resamples of {unit}s unless noted{alone}." in text
    assert ("counted in patients, each image counting as one." in text) == (unit == "image")
    assert f"resampled by {unit}" in text
    assert ("images the patient is unknown" in text) == bool(num_unknown)
    lines = result_lines(main_results(results), "run")
    assert lines[0].startswith(f"test split: 4 images {told[:-1]};")
    content = metrics_json(results)
    assert content.get("num_without_patient", 0) == num_unknown
    assert content["bootstrap"]["unit"] == unit  # type: ignore[index]


def test_a_run_that_knows_no_typicality_or_baselines_has_a_page_too(tmp_path: Path) -> None:
    page = Html(render_bare(tmp_path, measure_split([0, 1], [0.2, 0.7], split="test")))
    assert "shortcuts" not in page.ids and "names neither types" in page.text
    assert "request for review" not in page.text


def test_phantoms_are_named_at_the_top_and_at_the_end(tmp_path: Path) -> None:
    text = Html(render(tmp_path, is_phantom=True)).text
    assert "(phantoms)" in text.partition("What was trained")[0]
    assert text.count("rawn phantoms, not patients") >= 2


def test_limits_fit_the_split_and_the_way_images_were_fitted(tmp_path: Path) -> None:
    assert "so the numbers are too" not in render(tmp_path, split="test")
    assert "read an image's proportions" not in html.unescape(render(tmp_path))
    assert "read an image's proportions" in html.unescape(render(tmp_path, fit="squash"))


@pytest.mark.parametrize("is_evaluation", [False, True])
def test_results_on_images_that_the_run_was_made_with_are_called_too_good(
    tmp_path: Path, is_evaluation: bool
) -> None:
    def limits(split: str, **facts: Any) -> str:
        text = render(tmp_path, split=split, is_evaluation=is_evaluation, **facts)
        return " ".join(Html(text).text.split())

    chosen, trained = "were chosen on the same images", "was trained on these very images"
    assert chosen in limits("val") and trained not in limits("val")
    assert trained in limits("train") and chosen not in limits("train")
    others = [limits("test"), *(limits(name, fingerprint="4567") for name in ("val", "train"))]
    assert not [text for text in others if "the numbers are too good" in text]


def render_bare(folder: Path, results: SplitResults, **facts: Any) -> str:
    """The page of results alone, with some facts of the data set."""
    dataset = DatasetFacts(**{**{"splits": {}, "num_found": 1}, **BARE, **facts})
    page = Page(
        results,
        training_on(dataset),
        dataset,
        config=Config().to_mapping(),
        environment=describe_environment(),
        history=HISTORY,
        others=[results],
    )
    return render_report(page, folder)


@pytest.mark.parametrize("missing", ["curves", "plots"])
def test_a_page_without_its_figures_is_a_page(tmp_path: Path, missing: str) -> None:
    render(tmp_path)
    for path in (tmp_path / missing).iterdir():
        path.unlink()
    page = Html(render_bare(tmp_path, measure_split([1], [0.7], split="test")))
    assert len(page.images) == (6 if missing == "curves" else 2)
    assert format_value("specificity", None) in page.text
    assert "undefined, because there are no normal images" in page.text


# ------------------------------------------------------------------------------------------ browser


def shown_by(document: str) -> dict[str, str]:
    """What the explorer shows, by name."""
    return {
        name: html.unescape(text)
        for name, text in re.findall(r'id="explorer-([a-z]+)"[^>]*>([^<]*)<', document)
        if name != "data"
    }


def expected(
    results: SplitResults, *, step: int, prevalence: float | None = None
) -> dict[str, str]:
    """The same numbers, by hand, at a step of the slider."""
    counts, calls = results.main.whole.counts, results.main.by_threshold
    tp, fp = calls.tp[step], calls.fp[step]
    fn, tn = counts.num_positive - tp, counts.num_negative - fp
    sensitivity, specificity = tp / (tp + fn), tn / (tn + fp)
    share = (tp + fn) / (tp + fn + fp + tn) if prevalence is None else prevalence
    called = share * sensitivity + (1 - share) * (1 - specificity)
    left = share * (1 - sensitivity) + (1 - share) * specificity
    values = {
        "sensitivity": sensitivity,
        "specificity": specificity,
        "ppv": share * sensitivity / called if called else None,
        "npv": (1 - share) * specificity / left if left else None,
    }
    numbers = {"tp": tp, "fp": fp, "fn": fn, "tn": tn}
    return {
        "threshold": f"{step / 200:.3f}",
        **{name: format_value(name, value) for name, value in values.items()},
        **{name: f"{number:,}" for name, number in numbers.items()},
    }


@pytest.mark.browser
def test_the_explorer_agrees_with_metrics_at_the_runs_threshold_and_the_console_is_silent(
    tmp_path: Path, browse: Callable[[Path, str], tuple[str, list[str]]]
) -> None:
    page = tmp_path / "report.html"
    page.write_text(render(tmp_path), encoding="utf-8")
    whole = measured()[1].main.whole
    document, console = browse(page, "")
    assert console == []
    shown = shown_by(document)
    assert (shown["threshold"], shown["whose"]) == ("0.512", "the run's own")
    for name in ("sensitivity", "specificity", "ppv", "npv"):
        assert shown[name] == format_value(name, whole.metrics[name].value)
    assert {name: int(shown[name]) for name in vars(whole.counts)} == vars(whole.counts)
    assert 'translate(512.3 0)"' in document
    assert re.search(r'id="explorer-controls"[^>]*>', document)[0].count("hidden") == 0  # type: ignore[index]


@pytest.mark.browser
@pytest.mark.parametrize(
    ("fragment", "step", "prevalence"),
    [
        ("#threshold=0.8", 160, None),
        ("#threshold=0.301&prevalence=0.05", 60, 0.05),
        ("#threshold=1", 200, None),
        ("#threshold=0&prevalence=0.01", 0, 0.01),
    ],
)
def test_the_explorer_shows_the_threshold_and_the_prevalence_that_the_address_names(
    tmp_path: Path,
    browse: Callable[[Path, str], tuple[str, list[str]]],
    fragment: str,
    step: int,
    prevalence: float | None,
) -> None:
    page = tmp_path / "report.html"
    page.write_text(render(tmp_path), encoding="utf-8")
    document, console = browse(page, fragment)
    assert console == []
    shown = shown_by(document)
    assert {
        name: shown[name] for name in expected(measured()[1], step=step, prevalence=prevalence)
    } == expected(measured()[1], step=step, prevalence=prevalence)
    assert shown["whose"] == "tried out"
    assert f'translate({5 * step} 0)"' in document


@pytest.mark.browser
def test_the_slider_moves_the_numbers_and_the_address_and_the_button_brings_them_back(
    tmp_path: Path, browse: Callable[[Path, str], tuple[str, list[str]]]
) -> None:
    text = render(tmp_path)
    (_, script) = Html(text).scripts[1]
    for number, (steps, wanted) in enumerate(
        [
            ("s.dispatchEvent(new Event('change'));", "0.250"),
            ("document.getElementById('explorer-reset').click();", "0.512"),
        ]
    ):
        steps = f"s.value = '50'; s.dispatchEvent(new Event('input')); {steps}"
        acting = script + f"{{ const s = document.getElementById('explorer-slider'); {steps}\n"
        acting += "document.title = location.hash; }"
        hashes = [
            html.escape(source_hash(source)).replace("&#x27;", "&#39;")
            for source in (script, acting)
        ]
        assert hashes[0] in text
        page = tmp_path / f"{number}.html"
        page.write_text(
            text.replace(hashes[0], hashes[1]).replace(script, acting), encoding="utf-8"
        )
        document, console = browse(page, "")
        assert console == []
        assert shown_by(document)["threshold"] == wanted
        assert f"<title>#threshold={'0.25' if number == 0 else 'run'}</title>" in document


@pytest.mark.browser
def test_a_script_or_an_image_that_is_not_the_pages_own_is_refused_by_the_browser_and_seen_here(
    tmp_path: Path, browse: Callable[[Path, str], tuple[str, list[str]]]
) -> None:
    page = tmp_path / "report.html"
    changed = '<img src="http://127.0.0.1:9/x.png"><script>document.title = "taken"</script></main>'
    page.write_text(render(tmp_path).replace("</main>", changed), encoding="utf-8")
    document, console = browse(page, "#threshold=0.8")
    assert "<title>taken" not in document
    assert sum("Content Security Policy" in line for line in console) == 2, console
    assert shown_by(document)["threshold"] == "0.800"


@pytest.mark.parametrize(
    ("reading", "told"),
    [
        (
            LabelReading(layout="chexpert", uncertain="positive"),
            ("an empty finding counts as absent;", "an uncertain finding counts as present"),
        ),
        (
            LabelReading(layout="chexpert", blank="unknown"),
            ("an empty finding counts as unknown;",),
        ),
        (
            LabelReading(uncertain="negative"),
            (
                "counts as unknown, or as absent where &#39;No finding&#39; is stated;",
                "a finding that a list of names leaves out counts as absent",
                "an uncertain finding counts as absent",
            ),
        ),
        (LabelReading(layout="vindr"), ("present if more than half of its readers say so",)),
        (
            LabelReading(missing="skip"),
            ("images that a table names and the source lacks are left",),
        ),
    ],
)
def test_the_page_says_what_empty_and_uncertain_findings_count_as(
    tmp_path: Path, reading: LabelReading, told: tuple[str, ...]
) -> None:
    page = render(tmp_path, task="multilabel", reading=reading)
    for words in (*told, "unknown findings cost no loss and count in no metric"):
        assert words in page, words
    for words in ("no label is imputed", "labels as they are"):
        assert words not in page


def test_the_page_says_that_labels_of_classes_are_as_they_are(tmp_path: Path) -> None:
    page = render(tmp_path)
    assert "with a reason; no label is imputed" in page and "labels as they are" in page
    page = render(tmp_path, reading=LabelReading(target="subtype"))
    assert "subtypes are classes (labels.target = subtype)" in page
