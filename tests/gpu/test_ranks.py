"""Ranks on one GPU: two share it over gloo, since NCCL takes no two ranks of one; one has NCCL."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import finish_ranks, run_ranks, start_ranks
from tests.gpu.conftest import DEVICES

pytestmark = pytest.mark.distributed

RANK = "tests/distributed/discs_rank.py"
SMALL = [
    *("--model.width=8", "--train.global_batch_size=16", "--train.epochs=1"),
    *("--num_images=78", "--num_val=9", "--optim.lr=1e-3"),
]


@pytest.fixture(params=DEVICES)
def environment(request: pytest.FixtureRequest) -> dict[str, str]:
    """Variables with which a rank finds the GPU, or none."""
    return {} if request.param == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}


def run(environment: dict[str, str], *options: str, num_ranks: int) -> list[dict[str, Any]]:
    arguments = [RANK, *SMALL, "--share_device", *options]
    return run_ranks(arguments, world_size=num_ranks, environment=environment)


@pytest.mark.ci
def test_two_ranks_on_one_device_train_as_one_does(environment: dict[str, str]) -> None:
    one, two = (run(environment, "--train.precision=fp64", num_ranks=num) for num in (1, 2))
    assert two[0]["losses"] == pytest.approx(one[0]["losses"], abs=1e-8)
    assert two[0]["weights"] == two[1]["weights"]
    ours, theirs = two[0]["epochs"][-1], one[0]["epochs"][-1]
    assert ours["train_accuracy"] == theirs["train_accuracy"]
    assert ours["val_logits"][0] == [
        pytest.approx(each, abs=1e-7) for each in theirs["val_logits"][0]
    ]


@pytest.mark.ci
def test_a_run_goes_from_two_ranks_to_one(environment: dict[str, str], tmp_path: Path) -> None:
    (whole,) = run(environment, "--train.precision=fp64", num_ranks=1)
    losses: list[float] = []
    for num_ranks, stop_after in ((2, 2), (1, 0)):
        more = (f"--folder={tmp_path}", f"--stop_after={stop_after}", "--train.precision=fp64")
        losses += run(environment, *more, num_ranks=num_ranks)[0]["losses"]
    assert losses == pytest.approx(whole["losses"], abs=1e-8)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_loss_that_is_not_finite_on_one_rank_ends_both(
    environment: dict[str, str], precision: str
) -> None:
    options = [f"--train.precision={precision}", "--poison_rank=1", "--train.log_every=2"]
    arguments = [RANK, *SMALL, "--share_device", *options]
    ranks = start_ranks(arguments, world_size=2, environment=environment)
    for status, _, stderr in finish_ranks(ranks):
        assert status == 1
        assert "step 4 (epoch 1, batch 4): the loss of 2 images is not finite: disc-" in stderr


@pytest.mark.ci
def test_one_rank_of_torchrun_trains_as_a_process_alone(environment: dict[str, str]) -> None:
    """On a GPU its collectives are NCCL's."""
    alone = {**environment, "WORLD_SIZE": "", "RANK": ""}
    of_torchrun = {**environment, "TORCHELASTIC_RUN_ID": "none"}
    arguments = [RANK, *SMALL, "--train.precision=fp64", "--reduce"]
    (plain,), (joined,) = (
        run_ranks(arguments, world_size=1, environment=each) for each in (alone, of_torchrun)
    )
    assert joined["losses"] == pytest.approx(plain["losses"], abs=1e-8)
    has_gpu = "CUDA_VISIBLE_DEVICES" not in environment
    assert (plain["backend"], joined["backend"]) == ("", "nccl" if has_gpu else "gloo")
    assert joined["reduced"] == 3.0
