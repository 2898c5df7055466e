"""The benchmark of GPUs says where there is none, and each of its parts runs on a CPU in small."""

from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.harness import Report, Run
from benchmarks.train import BARE, IN_MEMORY, LOADED
from tests.dataset.small import write_dataset

pytestmark = pytest.mark.ci


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks.gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^benchmarks\.gpu: no CUDA device here; [^\n]*$"):
        gpu.main()


def test_epochs_in_turn_and_the_loader_alone_are_measured(tmp_path: Path) -> None:
    keys = gpu.keys_of_loop(tiny=True)
    dataset = str(tmp_path)
    write_dataset(tmp_path, {"train": [20, 20], "val": [10]}, size=32)
    found = gpu.measure_loop(scratch=tmp_path, dataset=dataset, keys=keys, turns=1)
    runs = gpu.split_kinds(Run("epochs in turn", 0, found))
    assert [run.contender for run in runs] == [LOADED, IN_MEMORY, BARE]
    assert all(run.figures["images_per_s"] > 0 for run in runs)
    assert all(0 <= run.figures["wait_percent"] < 100 for run in runs[:2])
    feed = gpu.measure_feed(scratch=tmp_path, dataset=dataset, keys=keys)
    assert feed["images_per_s"] > 0


def test_shards_hold_all_images() -> None:
    assert gpu.shards_of(4700) == [512] * 9 + [92] and gpu.shards_of(64) == [64]


def test_a_recipe_that_fails_is_a_part_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report("gpu", settings={})
    monkeypatch.setattr(gpu, "run_in_turn", lambda *_, **__: [Run(gpu.RECIPE, 0, {}, "no room")])
    (run,) = gpu.report_recipe(report, str(tmp_path), tiny=True)
    assert run.failure == "no room" and report.demands == []
    assert "runs that failed: 1" in capsys.readouterr().out


def test_tests_that_pass_are_counted_apart_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    (tmp_path / "tests" / "gpu" / "test_some.py").write_text(
        "import os\nimport pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_runs(): print(1); assert os.environ['XRAI_TEST_GPU']\n"
        "def test_fails(): assert False\n"
        "def test_skips(): pytest.skip('x')\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\njunit_logging = all\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.run_tests() == (1, 2)
