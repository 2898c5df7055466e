"""The page of several classes or findings: all of them side by side, and one at a time."""

import base64
import dataclasses
import html
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser

from tests.browsers import open_chromium
from tests.results.conftest import Browse
from tests.results.many import KINDS, LONG_NAME, make_many, rename
from tests.results.small import make_scores, measure_split
from tests.results.test_report import Html, render_bare
from xrai.labels import Task
from xrai.results.measure import measure
from xrai.results.metrics import ALL_METRICS
from xrai.results.prior import move_outputs, read_prior
from xrai.results.record import metrics_json
from xrai.results.report import source_hash
from xrai.results.types import Estimate, SplitResults, with_shares


def render(folder: Path, results: SplitResults) -> str:
    names = [found.output.name for found in results.outputs]
    unknown = {"train": dict.fromkeys(names, 7)} if results.task == "multilabel" else {}
    return render_bare(
        folder,
        results,
        splits={"train": dict.fromkeys(names, 30)},
        num_images={"train": 1103},
        num_unknown=unknown,
    )


def overview_of(text: str) -> list[tuple[str, str]]:
    """The rows of the overview: section and name, which is whole in the title alone."""
    table = text.partition('id="overview"')[2].partition("</table>")[0]
    rows = re.findall(r'<th scope="row"><a href="#(output-\d+)" title="([^"]*)">', table)
    return [(place, html.unescape(name)) for place, name in rows]


@pytest.mark.parametrize(("task", "num"), KINDS)
def test_the_page_shows_each_output_once_and_the_one_with_the_lowest_auroc_first(
    tmp_path: Path, task: Task, num: int
) -> None:
    results = make_many(task, num)[1]
    text = render(tmp_path, results)
    page = Html(text)
    rows = overview_of(text)
    values = [results.outputs[int(place[7:])].whole.metrics["auroc"].value for place, _ in rows]
    known = [value for value in values if math.isfinite(value)]
    assert known == sorted(known) and values[: len(known)] == known
    assert sorted(name for _, name in rows) == sorted(
        found.output.name for found in results.outputs
    )
    shown = re.findall(r'<section class="output" id="(output-\d+)"', text)
    assert shown == [place for place, _ in rows]
    assert {address for address in page.addresses if address.startswith("#")} <= {
        f"#{name}" for name in page.ids
    }
    words = " ".join(page.text.split())
    long = dict(rows).get("output-1")
    assert long == LONG_NAME and ">A finding wit…n the others</a>" in text
    assert f"It does worst on {rows[0][1]}: AUROC {known[0]:.3f}" in words
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_the_page_of_many_outputs_asks_no_network_for_anything(tmp_path: Path, task: Task) -> None:
    text = render(tmp_path, make_many(task, 20)[1])
    assert not re.search(r"https?:|url\(|@import|<link|<iframe", text)
    scripts = Html(text).scripts
    explorers = [f"explorer-{number}-data" for number in range(20)]
    assert [attributes.get("id") for attributes, _ in scripts[:-1]] == (
        explorers if task == "multilabel" else []
    ), "classes have no threshold to try"
    (policy,) = re.findall(r"script-src ([^;\"]*)", html.unescape(text))
    assert policy == source_hash(scripts[-1][1])


def test_the_data_has_the_images_of_a_split_and_those_where_a_finding_is_unknown(
    tmp_path: Path,
) -> None:
    for task in ("multilabel", "multiclass"):
        words = " ".join(Html(render(tmp_path, make_many(task, 3)[1])).text.split())
        assert "Images1,103 Disease 030" in words
        assert ("Disease 030 + 7 unknown" in words) == (task == "multilabel")
        assert ("was trained on 1,103 images of" in words) == (task == "multilabel")


def test_a_number_that_is_undefined_stands_with_its_reason(tmp_path: Path) -> None:
    results = make_many("multilabel", 14)[1]
    text = " ".join(Html(render(tmp_path, results)).text.split())
    reason = results.outputs[-1].whole.metrics["auroc"].reason
    assert f"no AUROC: {reason}" in text
    assert f"AUROC: undefined, because {reason}." in text
    assert (
        results.worst is not None and results.worst.output.name != results.outputs[-1].output.name
    )


@pytest.mark.parametrize(
    ("task", "expected", "wrong"),
    [
        (
            "multiclass",
            "The class with the highest score before the prior is called; scores",
            "the class with the highest score is called",
        ),
        ("multilabel", "its own threshold, chosen on validation. The prior changes", "moved to"),
    ],
)
def test_with_a_prior_the_page_says_what_is_called_and_what_changes(
    tmp_path: Path, task: Task, expected: str, wrong: str
) -> None:
    scores, plain = make_many(task, 3)
    prior = read_prior(dict(zip(scores.classes, (0.7, 0.2, 0.1), strict=True)), scores.outputs)
    outputs = move_outputs(scores.outputs, (0.3, 0.3, 0.4), prior)
    moved = measure(dataclasses.replace(scores, outputs=outputs), num_bootstrap=10)
    with_prior, without = (
        " ".join(Html(render(tmp_path, results)).text.split()).partition("How it decides")[2]
        for results in (moved, plain)
    )
    assert expected in with_prior and wrong not in with_prior.lower()
    assert "Disease 0 0.700, given; it changes scores and no call" in with_prior
    assert "prior" not in without
    for name in ("auroc", "average_precision", "brier", "ece", "sensitivity", "accuracy"):
        is_same = moved.main.whole.metrics[name].value == plain.main.whole.metrics[name].value
        of_calls, of_order = ("sensitivity", "accuracy"), ("auroc", "average_precision")
        assert is_same == (name in of_calls or (task == "multilabel" and name in of_order))


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_each_output_has_its_calibration_and_the_checklist_leads_to_its_errors(
    tmp_path: Path, task: Task
) -> None:
    results = make_many(task, 3)[1]
    text = render(tmp_path, results)
    words = " ".join(Html(text).text.split())
    assert words.count("Scores of ") == words.count("Temperature 1.2095 % interval") == 3
    assert "patients by split, images by split and" in words
    assert words.count("does not state at which share") == 3
    row = r"<td>Explainability</td><td[^>]*>[^<]*</td><td>(.*?)</td>"
    assert re.findall(row, text) == ["–"]
    image = base64.b64decode("iVBORw0KGgo=")
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "overlays-01.png").write_bytes(image)
    assert re.findall(row, render(tmp_path, results)) == ['<a href="#outputs">outputs</a>']


@pytest.mark.parametrize("task", ["multiclass", "multilabel", "binary"])
def test_the_page_says_at_which_share_scores_are_probabilities(tmp_path: Path, task: Task) -> None:
    if task == "binary":
        scores = make_scores([0, 0, 0, 1] * 4, np.linspace(0.1, 0.9, 16).tolist(), split="test")
    else:
        scores = make_many(task, 3)[0]
    shares = (0.423, 0.25, 0.327)[: len(scores.outputs)]
    outputs = with_shares(scores.outputs, shares)
    results = measure(dataclasses.replace(scores, outputs=outputs), num_bootstrap=10)
    words = " ".join(Html(render(tmp_path, results)).text.split())
    counts, name = results.main.whole.counts, outputs[0].words["positives"]
    here = 100 * counts.num_positive / (counts.num_positive + counts.num_negative)
    told = f"where about 42.3 % of all are {name}; here {here:.1f} % are. The first share"
    assert told in words and "does not state at which share" not in words
    content: dict[str, Any] = metrics_json(results)
    parts = [content] if task == "binary" else content["outputs"]
    assert [part["calibration"]["share"] for part in parts] == [*shares]
    prior = read_prior(dict(zip([o.name for o in outputs], (0.1, 0.2, 0.7), strict=False)), outputs)
    moved = move_outputs(outputs, shares, prior)
    results = measure(dataclasses.replace(scores, outputs=moved), num_bootstrap=10)
    words = " ".join(Html(render(tmp_path, results)).text.split())
    assert f"10.0 % of all are {name}, which is the prior; here {here:.1f} % are." in words


def test_no_share_is_stated_of_a_finding_whose_validation_labels_all_agree(tmp_path: Path) -> None:
    scores = make_many("multilabel", 3)[0]
    known, *others = scores.outputs
    untold = [dataclasses.replace(each, temperature=1.0, threshold=0.5) for each in others]
    outputs = with_shares([known, *untold], [0.5, 0.5, 0.25])
    assert [output.share for output in outputs] == [0.5, None, 0.25]
    results = measure(dataclasses.replace(scores, outputs=outputs), num_bootstrap=10)
    words = " ".join(Html(render(tmp_path, results)).text.split())
    assert words.count(f"does not state at which share of {outputs[1].name} its scores") == 1
    content: dict[str, Any] = metrics_json(results)
    assert ["share" in each["calibration"] for each in content["outputs"]] == [True, False, True]


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_every_mean_without_percentiles_is_noted_with_its_method_or_its_reason(
    tmp_path: Path, task: Task
) -> None:
    results = make_many(task, 3)[1]
    text = render(tmp_path, results)
    assert "patients unless noted." in " ".join(Html(text).text.split())
    section = html.unescape(text[text.index('id="metrics"') :])
    notes = re.findall("<li>(.*?)</li>", section[: section.index("</ul>")])
    ways = {"wilson": "Wilson", "newcombe": "Newcombe", "combined": "combined", "": "no interval"}
    for where, metrics in ("macro", results.macro), ("micro", results.micro):
        for name, each in metrics.items():
            own = [
                note
                for note in notes
                if f" ({where}):" in note
                and ALL_METRICS[name].title in note.partition(" (")[0].split(", ")
            ]
            if each.method == "bootstrap":
                assert not own
            elif not each.is_undefined:
                (note,) = own
                assert ways[each.method] in note and each.reason in note


def test_the_page_names_what_a_prior_changes_of_findings(tmp_path: Path) -> None:
    scores, results = make_many("multilabel", 3)
    prior = read_prior({scores.outputs[0].name: 0.01}, scores.outputs)
    outputs = move_outputs(scores.outputs, [0.5] * 3, prior)
    moved = measure(dataclasses.replace(scores, outputs=outputs), num_bootstrap=10)

    def changed(before: Mapping[str, Estimate], after: Mapping[str, Estimate]) -> set[str]:
        return {
            name
            for name, each in before.items()
            if after[name].value != pytest.approx(each.value, nan_ok=True)
        }

    calibration = {"ece", "brier"}
    own, same = results.main.whole.metrics, moved.main.whole.metrics
    assert changed(own, same) == calibration
    fixed = {"sensitivity_at_specificity_90", "specificity_at_sensitivity_90"}
    assert changed(results.micro, moved.micro) == calibration | fixed | {
        *("auroc", "average_precision")
    }
    words = " ".join(Html(render(tmp_path, moved)).text.split())
    assert "the AUROC and average precision of each finding, are those without it" in words
    assert "ECE, Brier score, and micro means of what is computed from scores are not." in words


def test_without_its_script_the_page_shows_every_output_and_no_picker(tmp_path: Path) -> None:
    text = render(tmp_path, make_many("multilabel", 14)[1])
    assert not re.findall(r'<section class="output"[^>]*hidden', text)
    assert re.search(r'<div class="picker" id="picker" hidden>', text)
    assert re.search(r"@media print.*\.output\[hidden\] \{ display: block", text, re.DOTALL)


def test_hostile_names_of_classes_stay_text(tmp_path: Path) -> None:
    name = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}%s"
    for task in ("multiclass", "multilabel"):
        page = Html(render(tmp_path, rename(make_many(task, 3)[1], name)))
        assert not any("alert" in script for _, script in page.scripts)
        assert page.images == []
        assert page.text.count(name) >= 5


# ------------------------------------------------------------------------------------------ browser


def after(text: str, steps: str) -> str:
    """The page whose script takes some steps more and puts their result into the title."""
    script = Html(text).scripts[-1][1]
    acting = f"{script}\nconst act = () => {{ {steps} }};\n"
    acting += "setTimeout(() => { document.title = JSON.stringify(act()); });"
    old, new = (
        html.escape(source_hash(each)).replace("&#x27;", "&#39;") for each in (script, acting)
    )
    assert old in text
    return text.replace(old, new).replace(script, acting)


def title_of(document: str) -> str:
    return html.unescape(document.partition("<title>")[2].partition("</title>")[0])


@pytest.mark.browser
@pytest.mark.parametrize(("task", "num"), KINDS)
def test_the_overview_fits_a_screen_and_no_part_of_the_page_is_wider(
    tmp_path: Path, browse: Browse, task: Task, num: int
) -> None:
    steps = (
        "const box = document.getElementById('overview').getBoundingClientRect();"
        "return [Math.ceil(box.height), document.documentElement.scrollWidth - innerWidth];"
    )
    path = tmp_path / "report.html"
    path.write_text(after(render(tmp_path, make_many(task, num)[1]), steps), encoding="utf-8")
    document, console = browse(path, "", size="1440,900")
    assert console == []
    height, excess = map(int, re.findall(r"-?\d+", title_of(document)))
    assert 100 < height <= 900
    assert excess <= 0


# In how many pieces each word of the visible explorers' headers is shown
PIECES = """[...document.querySelectorAll('.explorer th.number')]
  .filter(head => head.offsetParent !== null)
  .flatMap(head => [...head.textContent.matchAll(/\\S+/g)].map(word => {
    const range = document.createRange();
    range.setStart(head.firstChild, word.index);
    range.setEnd(head.firstChild, word.index + word[0].length);
    return range.getClientRects().length;
  }))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_chromium() as browser:
        yield browser


@pytest.mark.browser
@pytest.mark.parametrize(("task", "num"), [("binary", 1), ("multilabel", 3), ("multiclass", 20)])
def test_no_page_is_wider_than_the_screen_and_no_word_of_a_header_is_broken(
    tmp_path: Path, browser: Browser, task: Task, num: int
) -> None:
    one = measure_split([0, 1] * 8, np.linspace(0, 1, 16).tolist(), split="test")
    results = rename(one if task == "binary" else make_many(task, num)[1], "Consolidation")
    path = tmp_path / "report.html"
    path.write_text(render(tmp_path, results), encoding="utf-8")
    with closing(browser.new_page()) as page:
        for width in (320, 380, 768, 1440):
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(path.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert {*page.evaluate(PIECES)} == {1}


def shown_in(document: str) -> list[str]:
    """The sections that are not hidden."""
    return [
        place
        for place, rest in re.findall(
            r'<section class="output" id="(output-\d+)"([^>]*)>', document
        )
        if "hidden" not in rest
    ]


@pytest.mark.browser
def test_one_output_is_shown_at_a_time_the_worst_first_and_the_address_chooses(
    tmp_path: Path, browse: Browse
) -> None:
    text = render(tmp_path, make_many("multilabel", 14)[1])
    worst = overview_of(text)[0][0]
    path = tmp_path / "report.html"
    path.write_text(text, encoding="utf-8")
    for fragment, wanted in (("", worst), ("#output-5", "output-5"), ("#metrics", worst)):
        document, console = browse(path, fragment)
        assert console == []
        assert shown_in(document) == [wanted]
        assert '<div class="picker" id="picker">' in document
    document, _ = browse(path, "#output-5&threshold=0.25")
    assert shown_in(document) == ["output-5"]
    assert re.search(r'id="explorer-5-threshold">0\.250<', document)
    assert re.search(r'id="explorer-4-threshold">0\.600<', document)


@pytest.mark.browser
@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_the_picker_is_a_labelled_list_that_keeps_the_focus_with_buttons_beside_it(
    tmp_path: Path, browse: Browse, task: Task
) -> None:
    text = render(tmp_path, make_many(task, 20)[1])
    rows = [place for place, _ in overview_of(text)]
    steps = """
      const choice = document.getElementById("picker-choice");
      const seen = [choice.labels.length, choice.tagName];
      const shown = () => [...document.querySelectorAll("section.output")]
        .filter((section) => !section.hidden).map((section) => section.id);
      const note = () => seen.push(shown().join("+"), location.hash);
      choice.focus();
      choice.selectedIndex = 3; choice.dispatchEvent(new Event("change")); note();
      seen.push(document.activeElement.id);
      document.getElementById("picker-next").click(); note();
      document.getElementById("picker-previous").click(); note();
      choice.selectedIndex = 20; choice.dispatchEvent(new Event("change"));
      seen.push(shown().length);
      return seen;"""
    path = tmp_path / "report.html"
    path.write_text(after(text, steps), encoding="utf-8")
    document, console = browse(path, "")
    assert console == []
    expected = [1, "SELECT", rows[3], f"#{rows[3]}", "picker-choice"]
    expected += [rows[4], f"#{rows[4]}", rows[3], f"#{rows[3]}", 20]
    assert title_of(document) == str(expected).replace("'", '"').replace(", ", ",")


@pytest.mark.browser
def test_a_link_of_the_overview_opens_its_output_and_moves_the_focus_there(
    tmp_path: Path, browse: Browse
) -> None:
    text = render(tmp_path, make_many("multiclass", 20)[1])
    place, _ = overview_of(text)[7]
    steps = f"""
      document.querySelector('#overview a[href="#{place}"]').click();
      dispatchEvent(new Event("hashchange"));
      const top = document.getElementById("{place}").getBoundingClientRect().top;
      return [document.activeElement.id, Math.abs(top) < 200];"""
    path = tmp_path / "report.html"
    path.write_text(after(text, steps), encoding="utf-8")
    document, console = browse(path, "")
    assert console == []
    assert title_of(document) == f'["{place}-title",true]'
    assert shown_in(document) == [place]
    assert LONG_NAME in document
