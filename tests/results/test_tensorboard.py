"""Both readers of TensorBoard get back what a run recorded, resumed or not."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams.api_pb2 import DataType
from tensorboard.util.tensor_util import make_ndarray

from tests.results.runs import read_events, row, server_points, server_reader
from xrai.config import Config
from xrai.results.folder import RunFolder
from xrai.results.tensorboard import FINAL_TAGS
from xrai.results.types import Estimate


def test_segments_are_closed_sort_by_number_and_each_is_readable_alone(run: RunFolder) -> None:
    for epoch in range(1, 13):
        run.append_history(row(epoch))
    names = sorted(path.name for path in (run.path / "tensorboard").iterdir())
    assert names == [f"events.out.tfevents.{number:06d}.xrai" for number in range(12)]
    assert [step for step, _ in read_events(run)["loss/train"]] == [
        10 * epoch for epoch in range(1, 13)
    ]
    for path in (run.path / "tensorboard").iterdir():
        alone = EventAccumulator(str(path))
        alone.Reload()
        assert len(alone.Scalars("loss/train")) == 1


def test_resuming_purges_what_tensorboard_had_past_the_step(run: RunFolder) -> None:
    for epoch in (1, 2, 3):
        run.append_history(row(epoch))
    again = RunFolder(str(run.path.parent), "r1")
    again.open()
    again.resume_at(epoch=2, step=11)
    again.append_history(row(2, train_loss=9.0))
    again.append_history(row(3, train_loss=8.0))
    assert read_events(again)["loss/train"] == [(10, 0.5), (20, 9.0), (30, 8.0)]


def test_the_first_resumption_and_each_later_one_purges_in_both_readers_of_tensorboard(
    run: RunFolder,
) -> None:
    for epoch in (1, 2, 3):
        run.append_history(row(epoch))
    for value in (9.0, 8.0):
        run = RunFolder(str(run.path.parent), "r1")
        run.open()
        run.resume_at(epoch=2, step=11)
        run.append_history(row(2, train_loss=value))
        expected = [(10, 0.5), (20, value)]
        assert read_events(run)["loss/train"] == server_points(run, "loss/train") == expected


def test_an_epoch_done_twice_from_a_checkpoint_at_its_last_step_stands_once_in_tensorboard(
    run: RunFolder,
) -> None:
    for epoch in (1, 2):
        run.append_history(row(epoch))
    again = RunFolder(str(run.path.parent), "r1")
    again.open()
    # epoch 2 was trained up to step 20, and its end was not saved
    again.resume_at(epoch=2, step=21)
    again.append_history(row(2, train_loss=9.0))
    assert server_points(again, "loss/train") == [(10, 0.5), (20, 9.0)]


def test_no_temporary_file_looks_like_events_to_tensorboard(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    replace = Path.replace

    def note(path: Path, target: Path) -> Path:
        seen.extend(found.name for found in run.path.rglob("*") if found.is_file())
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", note)
    run.events.add_scalars(1, {"x": 1.0})
    run.close_segment()
    assert seen and not any("tfevents" in name for name in seen)
    assert [path.name for path in (run.path / "tensorboard").iterdir()] == [
        "events.out.tfevents.000000.xrai"
    ]


def test_a_run_folder_imports_neither_torch_nor_tensorboard_before_it_writes_events() -> None:
    program = (
        "import sys, xrai.results.folder\n"
        "print({name.partition('.')[0] for name in sys.modules} & {'torch', 'tensorboard'})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.strip() == b"set()"


def test_hyperparameters_and_final_results_are_those_of_the_run(run: RunFolder) -> None:
    config = Config().to_mapping()
    results = {name: Estimate(place / 10) for place, name in enumerate(FINAL_TAGS)}
    run.events.add_hyperparameters(config)
    run.append_history(row(1))
    run.events.add_results(11, results)
    run.finish({})
    content = server_reader(run).PluginTagToContent("hparams")
    start = hparams_metadata.parse_session_start_info_plugin_data(
        content[hparams_metadata.SESSION_START_INFO_TAG]
    )
    assert start.group_name == "r1"
    flat = {
        f"{section}.{key}": value for section, keys in config.items() for key, value in keys.items()
    }
    assert {
        name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()
    } == flat
    described = hparams_metadata.parse_experiment_plugin_data(
        content[hparams_metadata.EXPERIMENT_TAG]
    )
    types = {bool: "BOOL", str: "STRING", int: "FLOAT64", float: "FLOAT64"}
    assert {info.name: info.type for info in described.hparam_infos} == {
        name: DataType.Value(f"DATA_TYPE_{types[type(value)]}") for name, value in flat.items()
    }
    assert all(info.description for info in described.hparam_infos)
    assert {info.name.tag: info.display_name for info in described.metric_infos} == {
        **{tag: f"final {name}" for name, tag in FINAL_TAGS.items()},
        "accuracy/val": "accuracy, validation",
        "auroc/val_shifted": "AUROC, augmented validation",
    }
    end = hparams_metadata.parse_session_end_info_plugin_data(
        content[hparams_metadata.SESSION_END_INFO_TAG]
    )
    assert end.status and end.end_time_secs >= start.start_time_secs > 0
    for name, tag in FINAL_TAGS.items():
        assert server_points(run, tag) == [(11, pytest.approx(results[name].value))]


def test_a_run_that_goes_on_is_not_listed_as_successful(run: RunFolder) -> None:
    run.events.add_hyperparameters(Config().to_mapping())
    run.append_history(row(1))
    tags = server_reader(run).PluginTagToContent("hparams")
    assert set(tags) == {hparams_metadata.EXPERIMENT_TAG, hparams_metadata.SESSION_START_INFO_TAG}


def test_the_precision_recall_curve_counts_as_a_plain_loop_does(run: RunFolder) -> None:
    generator = np.random.default_rng(2)
    labels, scores = generator.integers(0, 2, 40), generator.random(40, np.float32)
    run.events.add_precision_recall(7, "curve", labels, scores)
    run.close_segment()
    (event,) = server_reader(run).Tensors("curve")
    counted = make_ndarray(event.tensor_proto)  # (6, thresholds)
    assert event.step == 7
    for threshold, column in zip(np.linspace(0, 1, counted.shape[1]), counted.T, strict=True):
        tn, fp, fn, tp = confusion_matrix(labels, scores >= threshold, labels=[0, 1]).ravel()
        precision, recall = tp / max(tp + fp, 1), tp / max(tp + fn, 1)
        assert column == pytest.approx([tp, fp, tn, fn, precision, recall])


def test_the_precision_recall_curve_of_one_class_is_left_out(run: RunFolder) -> None:
    run.events.add_precision_recall(1, "one", [1, 1], [0.2, 0.9])
    run.events.add_precision_recall(1, "both", [0, 1], [0.2, 0.9])
    run.close_segment()
    assert list(server_reader(run).PluginTagToContent("pr_curves")) == ["both"]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_an_image_comes_back_with_the_same_pixels(run: RunFolder, mode: str) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (9, 7, 3), np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    image.save(run.path / "image.png")
    run.events.add_image(7, "shown", run.path / "image.png")
    run.close_segment()
    reader = EventAccumulator(str(run.path / "tensorboard"))
    reader.Reload()
    (shown,) = reader.Images("shown")
    assert (shown.step, shown.width, shown.height) == (7, 7, 9)
    found = Image.open(io.BytesIO(shown.encoded_image_string))
    assert np.array_equal(np.asarray(found), np.asarray(image.convert("RGB")))
