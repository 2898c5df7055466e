"""How benchmarks/train.py counts what ranks lose by waiting; no timing."""

import pytest
import torch

from benchmarks.train import SCALES, losses_of
from xrai.learning.predictor import build_model


def test_a_rank_waits_until_the_slower_one_is_ready_and_then_for_the_exchange() -> None:
    rank0 = {"ready": [1.0, 12.0], "done": [3.5, 12.5], "epoch_s": [10.0, 10.0]}
    rank1 = {"ready": [3.0, 11.0], "done": [3.5, 12.7], "epoch_s": []}
    found = losses_of(rank0, rank1)
    assert found == pytest.approx({"rank0_wait": 10.0, "rank1_wait": 5.0, "exchange": 5.5})


def test_steps_that_only_one_rank_noted_are_an_error() -> None:
    rank = {"ready": [1.0], "done": [2.0], "epoch_s": [10.0]}
    with pytest.raises(ValueError, match="shorter"):
        losses_of({**rank, "ready": [1.0, 2.0]}, rank)


@pytest.mark.parametrize(("name", "millions"), [("0.3M", 0.31), ("3M", 3.0), ("10M", 10.1)])
def test_the_networks_have_the_sizes_that_their_words_say(name: str, millions: float) -> None:
    with torch.device("meta"):
        network = build_model(SCALES[name].model, 1)
    num = sum(parameter.numel() for parameter in network.parameters())
    assert num / 1e6 == pytest.approx(millions, rel=0.02)
