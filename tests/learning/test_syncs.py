"""A step of training does not wait for the device, but once in `train.log_every` steps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from tests.learning.fakes import train_discs
from tests.learning.syncs import Syncs
from xrai.config import Config, Model, Optim, Train
from xrai.labels import Task
from xrai.learning import loop, optim
from xrai.learning.batch import to_device
from xrai.learning.distributed import Ranks

ONE = Ranks(0, 1, 0, 1, torch.device("cpu"))
NUM_STEPS, LOG_EVERY = 12, 5  # of an epoch of 8 images a step


def count(patch: pytest.MonkeyPatch, *, task: Task = "binary", **changes: Any) -> Syncs:
    """The calls of two epochs at which Python would wait, those between epochs left out."""
    syncs = Syncs(is_counting=False)
    end_epoch = loop.end_epoch

    class Clock(loop.Clock):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            syncs.is_counting = True  # the first step of the epoch comes next

    def end(*arguments: Any) -> None:
        syncs.is_counting = False
        end_epoch(*arguments)

    patch.setattr(loop, "Clock", Clock)
    patch.setattr(loop, "end_epoch", end)
    patch.setattr(loop, "to_device", partial(to_device, is_ahead=True))  # as on CUDA
    of_train = {"precision": "off", **changes.pop("train", {})}
    train = Train(epochs=2, global_batch_size=8, log_every=LOG_EVERY, threads=1, **of_train)
    config = Config(model=Model(width=8), train=train, **changes)
    with syncs:
        outcome = train_discs(config, ranks=ONE, num_images=8 * NUM_STEPS, num_val=4, task=task)
    assert len(outcome.losses) == 2 * NUM_STEPS
    return syncs


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("binary", {}),
        ("multiclass", {"train": {"precision": "bf16"}, "optim": Optim(name="sgd", lr=0.01)}),
        pytest.param(
            "multilabel",
            {"train": {"precision": "fp16", "accumulation_steps": 2}},
            marks=pytest.mark.ci,  # fp16 takes a CPU seconds
        ),
        ("binary", {"train": {"freeze_epochs": 1}, "optim": Optim(clip_norm=0, layer_decay=0.9)}),
    ],
    ids=["plain", "bf16, sgd", "fp16, in parts", "frozen body"],
)
def test_python_waits_for_the_device_once_in_log_every_steps(
    monkeypatch: pytest.MonkeyPatch, task: Task, changes: dict[str, Any]
) -> None:
    syncs = count(monkeypatch, task=task, **changes)
    steps = range(1, 2 * NUM_STEPS + 1)
    assert len(syncs.places) == sum(step % LOG_EVERY == 0 for step in steps), syncs.places
    assert {place.partition(":")[0] for place in syncs.places} == {"tolist at loop.py"}


def test_a_step_that_asks_for_its_norm_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clip_gradients = optim.clip_gradients

    def clip(*arguments: Any) -> torch.Tensor:
        norm = clip_gradients(*arguments)
        return norm if float(norm) < 1e9 else norm * 0

    monkeypatch.setattr(optim, "clip_gradients", clip)
    found = [place for place in count(monkeypatch).places if "test_syncs.py" in place]
    assert len(found) == 2 * NUM_STEPS


@pytest.mark.parametrize(
    "call",
    [
        float,
        bool,
        int,
        lambda tensor: tensor.item(),
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.cpu(),
        lambda tensor: tensor.to("cpu"),
        lambda tensor: tensor.to(device=tensor.device),
        lambda tensor: tensor[None].nonzero(),
        lambda tensor: tensor[None][tensor[None] > 0],
        lambda tensor: tensor[None].unique(),
        lambda tensor: torch.equal(tensor, tensor),
        lambda tensor: 1 if tensor > 0 else 0,
        lambda tensor: torch.tensor(3.0),
    ],
)
def test_each_way_to_wait_is_counted_once(call: Callable[[torch.Tensor], object]) -> None:
    tensor = torch.ones(())
    with Syncs() as syncs:
        call(tensor)
    assert len(syncs.places) == 1 and "test_syncs.py" in syncs.places[0]


def test_what_does_not_wait_is_not_counted() -> None:
    tensor = torch.ones(3)
    with Syncs() as syncs:
        tensor.to(torch.float64).to("cpu", non_blocking=True)
        torch.where(tensor > 0, tensor, 0.0).masked_fill(tensor > 2, 1.0).sum()
        torch.zeros(3, device=tensor.device).copy_(tensor)
        assert tensor.shape == (3,)
    assert syncs.places == []
