"""Training with images that are to go to review: what the run states, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.training import SMALL, Finished, call_main
from tests.undrawn import leave_figures_empty
from xrai import train
from xrai.results.summary import read_summary
from xrai.results.types import UnlikeImages

pytestmark = pytest.mark.slow


def test_a_run_states_what_review_was_fitted_to(
    finished: Finished,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leave_figures_empty(monkeypatch.setattr)
    generator = np.random.default_rng(0)
    (own := tmp_path / "own").mkdir()
    for number in range(12):
        pixels = generator.integers(0, 256, (32, 32), np.uint8)  # noise: far from phantoms
        Image.fromarray(pixels).save(own / f"{number:08d}_000.png")
    options = [f"--dataset={finished.dataset}", f"--artifacts={tmp_path}/submit", "--run_id=own"]
    options += [*SMALL, "--train.epochs=1", f"--review.unlike={own}"]
    assert call_main(train, *options, capsys=capsys) == (0, [])
    folder = tmp_path / "submit" / "own"
    data = (folder / "summary.json").read_bytes()
    given = read_summary(data, where="it").training.unlike
    sha256 = json.loads(data)["unlike"]["sha256"]
    assert given == UnlikeImages(str(own), sha256, 12, 12, 4, 4) and len(sha256) == 64
    page = " ".join((folder / "report.html").read_text().split())
    assert "Review was also fitted to 12 images of 12 patients" in page
    assert "4 (100.0 %) go to review" in page
    usual = (finished.folder / "summary.json").read_text() + (
        finished.folder / "report.html"
    ).read_text().replace("review.unlike", "")
    assert '"unlike"' not in usual and "Review was also fitted" not in usual


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
