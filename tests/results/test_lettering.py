"""Names in pictures and tables: none looks like another, and none is boxes."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest

from tests.results.many import make_many
from xrai.labels import LabelSpec
from xrai.results import plots
from xrai.results.folder import RunFolder
from xrai.results.lettering import legible, short_names, shortened
from xrai.results.measure import measure
from xrai.results.record import record_scores
from xrai.results.types import Output, Scores, outputs_of

LEFT, RIGHT = "Pleural effusion, left lung, lower lobe", "Pleural effusion, right lung, lower lobe"


def test_long_names_lose_their_middle_and_none_looks_like_another() -> None:
    assert shortened("abcdefghij", 10) == "abcdefghij"
    assert shortened("abcdefghijk", 10) == "abcde…hijk"
    assert short_names(["Hernia", LEFT, "Nodule"], 20) == [
        "Hernia",
        "Pleural ef…ower lobe",
        "Nodule",
    ]
    found = short_names(["Hernia", LEFT, RIGHT], 20)
    assert found == ["Hernia", "Pleural e…wer lobe 2", "Pleural e…wer lobe 3"]
    assert max(map(len, found)) <= 20


def test_a_name_that_the_font_lacks_is_shown_by_its_number_and_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    names = ("Ödem (groß)", "Пневмония", "肺炎", "Ascites")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert legible(names, "finding") == ("Ödem (groß)", "Пневмония", "finding 3", "Ascites")
    assert [record.getMessage() for record in caplog.records] == [
        "plots show names that their font lacks by number: finding 3 is 肺炎"
    ]


def test_pictures_alone_show_another_name(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Output, ...]] = []

    def draw(scores: Scores, results: object, folder: Path) -> None:
        seen.append(scores.outputs)

    monkeypatch.setattr(plots, "draw_plots", draw)
    scores = make_many("multiclass", 3)[0]
    spec = LabelSpec("multiclass", ("NORMAL", "细菌", "VIRAL"))
    scores = dataclasses.replace(
        scores, classes=spec.classes, outputs=outputs_of(spec, [1.2], [], "given")
    )
    results = record_scores(run, scores, num_bootstrap=2, baselines={})
    assert [each.output.name for each in results.outputs] == ["NORMAL", "细菌", "VIRAL"]
    assert "score_细菌" in (run.path / "predictions.csv").read_text(encoding="utf-8")
    ((_, bacterial, _),) = seen
    assert (bacterial.name, bacterial.opposite) == ("class 2", "not class 2")
    assert bacterial.temperature == 1.2
    assert measure(scores, num_bootstrap=2).outputs[1].output.name == "细菌"


def test_the_font_has_what_is_written_in_europe() -> None:
    text = "".join(chr(code) for code in [*range(0x20, 0x7F), *range(0xC0, 0x250)])
    assert legible((text, "Ελληνικά", "–…·"), "class") == (text, "Ελληνικά", "–…·")
    assert np.array(legible(("\x1b[2J",), "class")).tolist() == ["class 1"]
