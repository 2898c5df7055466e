"""How benchmarks/epoch.py and benchmarks/trainers.py prepare, choose and demand; no timing."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from benchmarks import epoch, trainers
from benchmarks.data import copy_some, spread
from benchmarks.harness import Contender, Report, Run
from xrai.config import Augment, from_mapping
from xrai.learning.augment import augment


def draw(path: Path, *, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (level, level, level)).save(path, quality=95)


def test_a_share_of_the_images_is_spread_over_all_of_them() -> None:
    paths = [Path(str(k)) for k in range(10)]
    assert spread(paths, 0) == spread(paths, 10) == spread(paths, 99) == paths
    assert spread(paths, 5) == paths[::2]
    assert len(spread(paths, 3)) == 3


def test_some_images_are_copied_with_their_folders_and_all_stay_where_they_are(
    tmp_path: Path,
) -> None:
    source = tmp_path / "source"
    for number in range(6):
        draw(source / ("A" if number < 3 else "B") / f"{number}.jpeg", level=number)
    found = copy_some(source, tmp_path / "some", num_images=3)
    assert sorted(path.relative_to(found).as_posix() for path in found.rglob("*.jpeg")) == [
        "A/0.jpeg",
        "A/2.jpeg",
        "B/4.jpeg",
    ]
    assert copy_some(source, tmp_path / "all", num_images=0) == source


def test_a_file_becomes_gray_levels_and_the_number_of_its_class(tmp_path: Path) -> None:
    draw(tmp_path / "NORMAL" / "1.jpeg", level=20)
    draw(tmp_path / "PNEUMONIA" / "2.jpeg", level=200)
    items = trainers.list_items(tmp_path)
    assert [(Path(item["image"]).name, item["label"]) for item in items] == [
        ("1.jpeg", 0),
        ("2.jpeg", 1),
    ]
    for item, level in zip(items, (20, 200), strict=True):
        grey, label = epoch.read_grey(item["image"])
        assert grey.shape == (224, 224) and grey.dtype == np.uint8 and label == item["label"]
        assert np.all(np.abs(grey.astype(int) - level) <= 2)


def test_gray_levels_are_normalized_as_torchvision_does_it() -> None:
    grey = torch.tensor([[[0, 255]]], dtype=torch.uint8)  # (1, 1, 2)
    mean, deviation = torch.tensor(trainers.MEAN), torch.tensor(trainers.DEVIATION)
    expected = torch.stack([-mean / deviation, (1 - mean) / deviation], dim=1)  # (3, 2)
    assert torch.allclose(trainers.normalize(grey), expected[None, :, None])


def test_the_flags_of_the_second_table_turn_each_augmentation_off() -> None:
    flags = dict(flag.removeprefix("--augment.").split("=") for flag in epoch.augmentation_off())
    values = {name: float(text) for name, text in flags.items()}
    strength = from_mapping({"augment": values}, where="in a test").augment
    assert strength == Augment(**dict.fromkeys(values, 0.0))
    images = torch.rand(2, 1, 32, 32)
    changed = augment(images, torch.arange(2), seed=0, epoch=0, strength=strength)
    assert torch.allclose(changed, images, atol=1e-3)


def test_a_peer_is_measured_as_it_was_fastest_in_the_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {(1, 0): 5.0, (1, 2): 9.0, (2, 0): 7.0}  # the others fail

    def run_in_turn(contenders: list[Contender], *, rounds: int, **times: float) -> list[Run]:
        found = []
        for contender in contenders:
            job = contender.arguments["job"]
            rate = rates.get((job["processes"], job["workers"]))
            figures = {} if rate is None else {"images_per_s": rate}
            found += [Run(contender.name, number, figures, "broken") for number in range(rounds)]
        return found

    monkeypatch.setattr(epoch, "num_cores", lambda: 2)
    monkeypatch.setattr(epoch, "run_in_turn", run_in_turn)
    assert epoch.find_fastest("monai", tmp_path, "plain", trials=2) == (1, 2)
    rates.clear()
    with pytest.raises(SystemExit, match="monai failed in every set-up: broken"):
        epoch.find_fastest("monai", tmp_path, "plain", trials=1)


def test_xrai_has_to_be_ahead_of_each_peer_that_it_met_in_a_round(tmp_path: Path) -> None:
    report = Report("epoch", settings={})
    rates = {epoch.OURS: [30.0, 40.0], "slow": [10.0, 20.0], "fast": [60.0, 50.0]}
    runs = [
        Run(name, number, {"images_per_s": rate})
        for name, found in rates.items()
        for number, rate in enumerate(found)
    ]
    runs.append(Run("broken", 0, {}, "exit status 1"))
    epoch.demand_each(report, "plain", runs, ["slow", "fast", "broken"])
    report.save(tmp_path)
    demands = json.loads((tmp_path / "epoch.json").read_text())["demands"]
    assert [(each["value"], each["reached"]) for each in demands] == [(2.5, True), (0.65, False)]


def test_a_module_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="No module named benchmarks"):
        epoch.run("benchmarks.nowhere")


def test_a_command_is_ended_with_all_that_it_started() -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    command = [sys.executable, "-c", child]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        parent = psutil.Process(process.pid)
        while not (children := parent.children()):
            time.sleep(0.02)
        epoch.end_all(process.pid)
        assert process.wait(60) == -signal.SIGKILL
    assert psutil.wait_procs(children, timeout=60)[1] == []


def test_a_run_without_an_epoch_has_no_rows(tmp_path: Path) -> None:
    history = tmp_path / "history.csv"
    assert epoch.read_rows(history) == []
    history.write_text("epoch,epoch_s\n")
    assert epoch.read_rows(history) == []
    history.write_text("epoch,epoch_s\n1,2.5\n")
    assert epoch.read_rows(history) == [{"epoch": "1", "epoch_s": "2.5"}]


def test_the_loop_trains_on_each_image_once_and_steps_after_each_batch() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(3, 2)
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), head)
    before = head.weight.detach().clone()
    batches = [(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])) for _ in range(3)]
    batches.append((torch.rand(2, 3, 8, 8), torch.tensor([0, 1])))
    steps: list[int] = []
    found = trainers.run_loop(
        network, batches, trainers.make_optimizer(network), began=0.0, after_step=steps.append
    )
    assert found.num_images == 14 and steps == [1, 2, 3, 4] and found.loss > 0
    assert not torch.equal(head.weight, before)
