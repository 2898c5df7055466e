"""The table of shortcuts keeps patients apart, and reads a source as preprocessing does."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import shortcuts
from xrai.phantom import make_phantoms


@pytest.mark.parametrize("size", [28, 30, 64])
def test_cells_are_the_means_of_a_plain_loop(size: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, size, size), dtype=np.uint8)
    edges = np.linspace(0, size, 15).round().astype(int)
    plain = [
        images[:, top:bottom, left:right].mean(axis=(1, 2))
        for top, bottom in itertools.pairwise(edges)
        for left, right in itertools.pairwise(edges)
    ]
    assert shortcuts.cells(images) == pytest.approx(np.column_stack(plain))


def test_no_patient_is_learned_from_and_measured_in_one_fold() -> None:
    patients = np.array([f"IM:{number // 3}" for number in range(60)])
    labels = (np.arange(60) // 3) % 2
    seen: list[int] = []

    def score(train: np.ndarray, test: np.ndarray) -> float:
        assert not set(patients[train]) & set(patients[test])
        assert set(labels[test]) == {0, 1}
        seen.extend(test)
        return len(test)

    assert shortcuts.cross_validate(score, labels, patients, num_folds=5, seeds=2) == [12, 12]
    assert sorted(seen) == sorted([*range(60)] * 2)  # each image is measured once a seed


def test_the_table_has_a_line_for_each_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_phantoms(tmp_path / "phantoms", num_images=30, workers=1)
    arguments = [f"--source={tmp_path / 'phantoms'}", "--size=28", "--folds=2", "--seeds=1"]
    monkeypatch.setattr(sys, "argv", ["shortcuts", *arguments])
    shortcuts.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == list(shortcuts.FITS)
    assert len({line.split()[1] for line in lines[2:5]}) == 1, (
        "the size of the source is the same under each fit"
    )
    assert lines[0].startswith("30 films")
