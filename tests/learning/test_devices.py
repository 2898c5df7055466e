"""All of a step is on its device, shown on `meta`, whose tensors have no values: an operation with
a tensor of the CPU raises there, and so does each look at a value.
"""

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch

from tests.learning.fakes import SPECS, FakeLoader, count_discs, label_discs, make_discs
from xrai.config import Augment, Config, Model, Train
from xrai.labels import Task
from xrai.learning import loop, optim
from xrai.learning.augment import augment
from xrai.learning.batch import to_device
from xrai.learning.distributed import Ranks
from xrai.learning.explain import layer_cam
from xrai.learning.predictor import build_model
from xrai.learning.typicality import SPOILED, fit_typicality

META, CPU = (Ranks(0, 1, 0, 1, torch.device(name)) for name in ("meta", "cpu"))
NETWORK = Model(width=8)


def plain_sgd(model: torch.nn.Module, config: object) -> torch.optim.Optimizer:
    """An optimizer that `meta` has; it is not asked to step."""
    return torch.optim.SGD([{"params": list(model.parameters()), "scale": 1.0}])


def begin(patch: pytest.MonkeyPatch, task: Task, parts: int) -> tuple[loop.Training, FakeLoader]:
    """A training on `meta`, which has neither fused optimizers nor autocast."""
    patch.setattr(optim, "make_optimizer", plain_sgd)
    patch.setattr(optim, "step", lambda *_: None)
    patch.setattr(loop.Precision, "autocast", lambda _: nullcontext())
    images, discs = make_discs(20)
    labels = label_discs(discs, task)
    loader = FakeLoader(images, labels, batch_size=8)
    setup = loop.Setup(
        Config(model=NETWORK, train=Train(precision="off", accumulation_steps=parts)),
        META,
        loader,
        loader,
        labels=SPECS[task],
        counts=count_discs(labels, task),
        val_labels=labels,
    )
    return loop.Training(build_model(NETWORK, SPECS[task].num_outputs), setup), loader


def run_steps(training: loop.Training, loader: FakeLoader) -> None:
    for batch in to_device(loader.epoch(0), META.device):
        loop.train_step(training, batch, loop.Clock(META.device))


@pytest.mark.parametrize(("task", "parts"), [("binary", 1), ("multiclass", 2), ("multilabel", 1)])
def test_a_step_is_on_its_device_alone_and_looks_at_no_value(
    monkeypatch: pytest.MonkeyPatch, task: Task, parts: int
) -> None:
    training, loader = begin(monkeypatch, task, parts)
    run_steps(training, loader)
    assert training.done.step == 3
    with pytest.raises(NotImplementedError, match="no data"):
        training.settle()  # which does look


def test_a_constant_that_was_left_on_the_cpu_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    training, loader = begin(monkeypatch, "multilabel", 1)
    on_cpu = training.objective.to(CPU.device, torch.float32)
    training.losses = partial(optim.image_losses, objective=on_cpu)
    with pytest.raises(RuntimeError, match="expected device"):
        run_steps(training, loader)


def test_scores_review_and_heat_maps_are_on_their_device_alone() -> None:
    network = build_model(NETWORK, 2).eval()
    train, val = (FakeLoader(*make_discs(num, seed=num), batch_size=16) for num in (40, 20))
    typicality = fit_typicality(network, train, val, ranks=CPU).to("meta")
    network = network.to("meta")
    images = torch.ones(5, 1, 32, 32, device="meta")
    logits, atypicality = typicality.atypicality(network, images)
    assert (logits.shape, atypicality.shape) == ((5, 2), (5,))
    assert layer_cam(network, images, torch.arange(5) % 2).shape == (5, 32, 32)
    key: dict[str, Any] = {"seed": 0, "epoch": 1, "strength": Augment()}
    rows = torch.arange(5, device="meta")
    changed = [augment(images, rows, **key)]
    changed += [spoil(images, torch.ones(5, 56, device="meta")) for spoil in SPOILED.values()]
    assert {(each.shape, each.device.type) for each in changed} == {(images.shape, "meta")}
