"""The page is one file, asks for nothing, escapes all text, and says what a reader must know."""

import html
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xrai.config import Config
from xrai.results import plots
from xrai.results.artifacts import describe_environment, make_summary
from xrai.results.metrics import METRICS, evaluate_scores, format_value
from xrai.results.report import DatasetFacts, render_report

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """The page's tags, checked for balance, the addresses it names, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.text = ""
        self.ids: set[str] = set()
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids.update(value or "" for name, value in attrs if name == "id")
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset", "data")]
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


def render(folder: Path, *, split: str = "val", is_phantom: bool = False, **facts: Any) -> str:
    generator = np.random.default_rng(2)
    labels = generator.integers(0, 2, 90)
    scores = np.clip(0.3 + 0.4 * labels + 0.25 * generator.standard_normal(90), 0, 1)
    metrics = evaluate_scores(
        labels, scores, threshold=0.5, groups=np.arange(90), subtypes=np.where(labels == 1, "virus", ""), split=split,
        threshold_source="chosen on validation", num_bootstrap=20,
    )  # fmt: skip
    history = [{"epoch": 1, "step": 10, "train_loss": 0.5, "val_loss": None, "train_accuracy": 0.7}]
    plots.draw_curves(history, folder, is_phantom=is_phantom)
    plots.draw_plots(labels, scores, metrics, folder, is_phantom=is_phantom)
    dataset = {
        "source": "data/chest_xray", "fingerprint": "0123abcd", "image_size": 64, "fit": "crop", "num_found": 103,
        "splits": {"train": {"normal": 40, "pneumonia": 60}}, "set_aside": {"truncated": 3}, "is_phantom": is_phantom,
    }  # fmt: skip
    return render_report(
        folder,
        metrics=metrics,
        summary=make_summary(
            metrics, run_id="r1", status="done", epochs=24, best_epoch=22, fingerprint="0123abcd", duration_s=95,
            is_phantom=is_phantom,
        ),
        history=history,
        dataset=DatasetFacts(**{**dataset, **facts}),
        config=Config().to_mapping(),
        environment={**describe_environment(), "device": "cpu"},
        version="9.8.7",
    )  # fmt: skip


def test_the_page_is_one_file_that_asks_no_network_for_anything(tmp_path: Path) -> None:
    text = render(tmp_path)
    page = Page(text)
    assert len(page.images) == 7
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert {f"#{name}" for name in page.ids} >= {address for address in page.addresses if address.startswith("#")}
    without_data = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|//|url\(|@import|<script|<link", without_data.partition("</style>")[0][100:])
    assert not re.search(r"https?://|<script|<iframe|<link", without_data)
    assert "default-src 'none'" in text


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    name = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}"
    text = render(tmp_path, source=name, splits={name: {name: 1, "b": 2}}, set_aside={name: 1}, fit=name)
    page = Page(text)
    assert "script" not in page.tags
    assert len(page.images) == 7
    assert page.text.count(name) >= 5


def test_every_picture_says_in_words_what_it_shows(tmp_path: Path) -> None:
    assert all(len(image["alt"] or "") > 30 for image in Page(render(tmp_path)).images)


def test_the_page_says_all_that_a_reader_must_know(tmp_path: Path) -> None:
    text = " ".join(Page(render(tmp_path)).text.split())
    for part in (
        "Not a medical device", "data/chest_xray", "0123abcd", "64 × 64", "24 epochs in 1 min 35 s", "of epoch 22",
        "chosen on validation", "virus", "truncated", "103 files were found", "3 were set aside", "xrai 9.8.7", "cpu",
        "logit_adjustment", "The weights and the threshold were chosen on the same images",
        *(info.title for info in METRICS.values()),
    ):  # fmt: skip
        assert part in text, part
    assert "phantom" not in text


def test_phantoms_are_named_at_the_top_and_at_the_end(tmp_path: Path) -> None:
    text = Page(render(tmp_path, is_phantom=True)).text
    assert "(phantoms)" in text.partition("What was trained")[0]
    assert text.count("rawn phantoms, not patients") >= 2


def test_limits_fit_the_split_and_the_way_pictures_were_fitted(tmp_path: Path) -> None:
    assert "so they flatter" not in render(tmp_path, split="test")
    assert "read a picture's proportions" not in html.unescape(render(tmp_path))
    assert "read a picture's proportions" in html.unescape(render(tmp_path, fit="squash"))


@pytest.mark.parametrize("missing", ["curves", "plots"])
def test_a_page_without_its_pictures_is_a_page(tmp_path: Path, missing: str) -> None:
    render(tmp_path)
    for path in (tmp_path / missing).iterdir():
        path.unlink()
    metrics = evaluate_scores(
        [1], [0.7], threshold=0.5, groups=["a"], subtypes=[""], split="test", threshold_source="given", num_bootstrap=10
    )
    text = render_report(
        tmp_path,
        metrics=metrics,
        summary=make_summary(
            metrics, run_id="r", status="done", epochs=1, best_epoch=1, fingerprint="f", duration_s=0.5,
            is_phantom=False,
        ),
        history=[],
        dataset=DatasetFacts("s", "f", 64, "crop", {}, 1),
        config=Config().to_mapping(),
        environment=describe_environment(),
        version="1",
    )  # fmt: skip
    page = Page(text)
    assert len(page.images) == (5 if missing == "curves" else 2)
    assert format_value("specificity", None) in page.text
    assert "not defined, there are no normal images" in page.text
