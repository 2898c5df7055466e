"""Training with images that are to go to review: what the run states, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.training import SMALL, Finished, call_main
from tests.undrawn import leave_figures_empty
from xrai import export, train
from xrai.learning import export as writing
from xrai.learning.export import Agreement
from xrai.results.summary import read_summary
from xrai.results.types import UnlikeImages
from xrai.store import open_store

pytestmark = pytest.mark.slow


def test_a_run_states_what_review_was_fitted_to(
    finished: Finished,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leave_figures_empty(monkeypatch.setattr)
    own = write_noise(tmp_path / "own")
    options = [f"--dataset={finished.dataset}", f"--artifacts={tmp_path}/submit", "--run_id=own"]
    options += [*SMALL, "--train.epochs=1", f"--review.unlike={own}"]
    assert call_main(train, *options, capsys=capsys) == (0, [])
    folder = tmp_path / "submit" / "own"
    data = (folder / "summary.json").read_bytes()
    given = read_summary(data, where="it").training.unlike
    sha256 = json.loads(data)["unlike"]["sha256"]
    assert given == UnlikeImages(str(own), sha256, 12, 12, 4, 4, 2) and len(sha256) == 64
    page = " ".join((folder / "report.html").read_text().split())
    assert "Review was also fitted to 12 images of at most 12 patients" in page
    assert "4 (100.0 %) go to review" in page
    monkeypatch.setattr(writing, "trace", lambda serving: serving)
    monkeypatch.setattr(writing, "write", write_nothing)
    assert call_main(export, f"--run={folder}", "--formats=torch", capsys=capsys)[0] == 0
    stated = json.loads((folder / "export" / "export.json").read_text())
    assert stated["unlike"] == json.loads(data)["unlike"]
    assert (folder / "export" / "model.pt2").read_text() == stated["unlike"]["sha256"]
    own.rename(tmp_path / "gone")  # a finished run does not need it again
    for more in ([], ["--check"]):
        assert call_main(train, *options, *more, capsys=capsys) == (0, [])
    options[2] = "--run_id=new"
    for more in ([], ["--check"]):
        status, (line,) = call_main(train, *options, *more, capsys=capsys)
        assert status == 2 and str(own) in line
    assert export.describe_review(open_store(str(finished.folder))) == {}
    usual = (finished.folder / "summary.json").read_text() + (
        finished.folder / "report.html"
    ).read_text().replace("review.unlike", "")
    assert '"unlike"' not in usual and "Review was also fitted" not in usual


def write_nothing(
    program: object, serving: object, path: Path, *, metadata: dict[str, Any], batches: object
) -> Agreement:
    """In place of an exported file, what its metadata state of `review.unlike`."""
    path.write_text(metadata["unlike"]["sha256"])
    return Agreement(1, 1, 0.0, 0.0)


def write_noise(folder: Path) -> Path:
    """12 images that are far from phantoms, of 10 patients and 2 that are unknown."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(12):
        pixels = generator.integers(0, 256, (32, 32), np.uint8)
        Image.fromarray(pixels).save(
            folder / (f"{number:08d}_000.png" if number < 10 else f"{number}.png")
        )
    return folder


@pytest.mark.parametrize("more", [[], ["--check"]])
def test_an_image_of_the_data_set_cannot_be_one_for_review(
    more: list[str], finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = write_noise(tmp_path / "own")
    shown = sorted(path for path in finished.phantoms.rglob("*") if path.suffix == ".png")[3]
    shutil.copy(shown, own / "another name.png")
    options = [f"--dataset={finished.dataset}", f"--artifacts={tmp_path}/submit", *SMALL, *more]
    status, (line,) = call_main(train, *options, f"--review.unlike={own}", capsys=capsys)
    assert status == 2 and f"review.unlike = {own} holds 1 image of the data set" in line
    assert str(shown.relative_to(finished.phantoms)) in line
    assert not list(tmp_path.glob("submit/*"))


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_a_folder_without_images_is_refused_before_training(
    kind: str, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / kind
    if kind == "empty":
        folder.mkdir()
    options = [f"--dataset={finished.dataset}", f"--artifacts={tmp_path}/submit", *SMALL]
    status, (line,) = call_main(train, *options, f"--review.unlike={folder}", capsys=capsys)
    assert status == 2 and str(folder) in line and "review.unlike" in line
    assert not list(tmp_path.glob("submit/*"))
