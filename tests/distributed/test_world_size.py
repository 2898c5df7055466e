"""What must not depend on how many ranks there are, with real processes over gloo."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.distributed.ranks import finish_ranks, run_ranks, start_ranks
from tests.training import SMALL, Finished, make_dataset

pytestmark = pytest.mark.distributed

RANK = "tests/distributed/discs_rank.py"
EXACT = ["--train.precision=fp64", "--train.global_batch_size=32", "--model.width=8"]
TASKS = ["binary", *(pytest.param(t, marks=pytest.mark.ci) for t in ("multiclass", "multilabel"))]


def floats(text: str) -> NDArray[np.float64]:
    return np.frombuffer(base64.b64decode(text))


def train(*options: str, world_size: int) -> dict[str, Any]:
    outcome: dict[str, Any] = run_ranks([RANK, *EXACT, *options], world_size=world_size)[0]
    return outcome


@pytest.mark.ci  # without the mark: going from 2 to 1 to 4 ranks, with the same losses
@pytest.mark.parametrize("num_epochs", [1, 4])
def test_the_loss_of_25_and_of_100_steps_is_the_same_on_1_2_and_4_ranks(num_epochs: int) -> None:
    # at a higher rate rounding itself grows from step to step, to 1.5e-12 at 3e-3
    one, two, four = (
        train(
            f"--train.epochs={num_epochs}",
            "--optim.lr=1e-3",
            "--num_images=790",
            "--num_val=9",
            world_size=num,
        )
        for num in (1, 2, 4)
    )
    sizes = np.tile([*[32] * 24, 22], num_epochs)
    assert len(one["losses"]) == 25 * num_epochs
    for other in (two, four):
        difference = np.abs(np.array(one["losses"]) - np.array(other["losses"])) / sizes
        assert difference.max() < 1e-12
        for ours, theirs in zip(one["epochs"], other["epochs"], strict=True):
            assert theirs["train_loss"] == pytest.approx(ours["train_loss"], abs=1e-11)
            assert theirs["train_accuracy"] == ours["train_accuracy"]
            check_logits(ours, theirs, num_val=9)


def check_logits(ours: dict[str, Any], theirs: dict[str, Any], *, num_val: int) -> None:
    """The same for every image, each scored once."""
    for key in ("val_logits", "shifted_logits"):
        one, other = np.array(ours[key]), np.array(theirs[key])
        assert one.shape == other.shape and one.shape[1] == num_val
        assert np.allclose(one, other, atol=1e-9)


def test_fewer_validation_images_than_ranks_are_scored_once_each() -> None:
    options = ["--train.epochs=1", "--num_val=3", "--num_images=32"]
    one, four = train(*options, world_size=1), train(*options, world_size=4)
    check_logits(one["epochs"][0], four["epochs"][0], num_val=3)


def test_accumulation_over_two_ranks_equals_one_batch() -> None:
    whole = train("--train.epochs=1", world_size=1)
    parts = train("--train.epochs=1", "--train.accumulation_steps=4", world_size=2)
    assert parts["losses"] == pytest.approx(whole["losses"], abs=1e-10)


def test_fewer_images_than_ranks_in_the_last_batch_is_no_hang_and_no_difference() -> None:
    options = ["--train.epochs=1", "--num_images=65"]  # the last batch holds one image
    one, four = train(*options, world_size=1), train(*options, world_size=4)
    assert four["losses"] == pytest.approx(one["losses"], abs=1e-10)
    assert four["epochs"][-1]["train_accuracy"] == one["epochs"][-1]["train_accuracy"]


@pytest.mark.parametrize("task", TASKS)
def test_all_ranks_end_with_the_same_weights_and_go_on_bit_for_bit(
    tmp_path: Path, task: str
) -> None:
    options = [RANK, "--train.epochs=2", "--train.global_batch_size=32", "--train.precision=off"]
    options.append(f"--task={task}")
    whole, other = run_ranks(options, world_size=2)
    assert whole["weights"] == other["weights"]
    first = run_ranks(  # into the second epoch
        [*options, f"--folder={tmp_path}", "--stop_after=7", "--stop_rank=1"], world_size=2
    )
    assert [outcome["stopped"] for outcome in first] == [True, True]
    assert [len(outcome["losses"]) for outcome in first] == [7, 7]
    second = run_ranks([*options, f"--folder={tmp_path}"], world_size=2)
    assert first[0]["losses"] + second[0]["losses"] == whole["losses"]
    assert second[0]["weights"] == second[1]["weights"] == whole["weights"]
    assert first[0]["epochs"] + second[0]["epochs"] == whole["epochs"]


@pytest.mark.parametrize("task", TASKS)
def test_a_run_goes_from_2_to_1_to_4_ranks_with_the_same_batches_and_losses(
    tmp_path: Path, task: str
) -> None:
    options = [RANK, *EXACT, "--train.epochs=3", f"--folder={tmp_path}", f"--task={task}"]
    whole = train("--train.epochs=3", f"--task={task}", world_size=1)
    losses: list[float] = []
    epochs: list[dict[str, Any]] = []
    outcome: dict[str, Any] = {}
    for world_size, stop_after in ((2, 4), (1, 4), (4, 0)):
        outcome = run_ranks([*options, f"--stop_after={stop_after}"], world_size=world_size)[0]
        losses, epochs = losses + outcome["losses"], epochs + outcome["epochs"]
    assert losses == pytest.approx(whole["losses"], abs=1e-10)
    assert [epoch["epoch"] for epoch in epochs] == [0, 1, 2]
    for ours, theirs in zip(epochs, whole["epochs"], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-11)
        assert ours["train_accuracy"] == theirs["train_accuracy"]
    for name, values in whole["weights"].items():
        found, expected = floats(outcome["weights"][name]), floats(values)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_and_names_its_images(rank: int) -> None:
    options = [RANK, "--train.global_batch_size=32", f"--poison_rank={rank}"]
    for status, _, stderr in finish_ranks(start_ranks(options, world_size=2)):
        assert status == 1
        assert "step 4 (epoch 1, batch 4): the loss of 2 images is not finite: disc-" in stderr


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--train.epochs=3", "train.epochs = 3, rank 0 with 2"),
        ("--resume=must", "resume = must, rank 0 with auto"),
        ("--dataset={other}", "data set fingerprint = "),
    ],
)
def test_ranks_that_were_started_otherwise_are_refused_before_training(
    option: str, words: str, finished: Finished, tmp_path: Path
) -> None:
    if "{other}" in option:
        option = option.format(other=make_dataset(tmp_path, num_images=40, seed=1))
    options = [f"--dataset={finished.dataset}", f"--artifacts={tmp_path}/submit", *SMALL]
    own = ["--cache.max_gib=1", "--train.threads=2"]  # which a machine may have for itself
    ranks = start_ranks(["-m", "xrai.train", *options], world_size=2, more={1: [*own, option]})
    (status, _, said), (other, _, silent) = finish_ranks(ranks)
    assert (status, other) == (2, 2)
    (line,) = [line for line in said.splitlines() if line.startswith("xrai: ")]
    assert f"rank 1 was started with {words}" in line
    assert line.endswith("start all ranks with the same command")
    assert "xrai: " not in silent and not list(tmp_path.glob("submit/*"))


def test_one_writer_leaves_one_set_of_checkpoints(tmp_path: Path) -> None:
    options = [
        "--train.epochs=2",
        f"--folder={tmp_path}",
        "--checkpoint.every=2",
        "--checkpoint.keep_last=50",
    ]
    train(*options, world_size=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    steps = [f"{step:09d}" for step in (2, 4, 5, 6, 8)] + ["000000010_2"]  # after the validation
    expected = [f"step-{step}.{kind}" for step in steps for kind in ("json", "pt")]
    assert names == sorted([*expected, "latest.json"])
