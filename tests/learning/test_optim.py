import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from xrai.config import Optim
from xrai.learning import optim
from xrai.learning.network import ResNet


def test_the_rate_rises_to_its_peak_and_falls_to_zero_along_a_cosine() -> None:
    config = Optim(lr=2.0, warmup_fraction=0.1)
    rates = [optim.learning_rate(k, num_steps=100, config=config) for k in range(100)]
    assert (
        rates[0] == pytest.approx(0.2)
        and rates[9] == pytest.approx(2.0)
        and rates[10] == pytest.approx(2.0)
    )
    assert rates[55] == pytest.approx(1.0)
    assert 0 < rates[99] < 0.001
    assert all(earlier >= later for earlier, later in pairwise(rates[10:]))


def test_no_warmup_starts_at_the_peak() -> None:
    config = Optim(lr=1.0, warmup_fraction=0.0)
    assert optim.learning_rate(0, num_steps=10, config=config) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_every_parameter_is_in_one_group_and_vectors_do_not_decay(name: str) -> None:
    network = ResNet(width=8)
    optimizer = optim.make_optimizer(network, Optim(name=name, weight_decay=0.3))  # type: ignore[arg-type]
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in network.parameters()} and len(
        grouped
    ) == len(set(grouped))
    for group in optimizer.param_groups:
        assert group["weight_decay"] == (0.3 if group["params"][0].ndim > 1 else 0.0)


def test_sgd_uses_nesterov_momentum() -> None:
    optimizer = optim.make_optimizer(nn.Linear(2, 2), Optim(name="sgd", momentum=0.8))
    assert isinstance(optimizer, torch.optim.SGD)
    assert all(group["nesterov"] and group["momentum"] == 0.8 for group in optimizer.param_groups)


def test_the_average_follows_its_closed_formula() -> None:
    average, model = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.constant_(average.weight, 0.0)
    expected = 0.0
    for step in range(30):
        nn.init.constant_(model.weight, float(step))
        optim.update_average(average, model, step=step, decay=0.6)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert average.weight.item() == pytest.approx(expected, rel=1e-6)


def test_the_loss_is_binary_cross_entropy_of_adjusted_logits() -> None:
    logits = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
    labels = torch.tensor([1, 0, 0], dtype=torch.uint8)
    prior = torch.tensor([0.7], dtype=torch.float64)
    objective = optim.Objective("binary", prior, torch.ones(2, 1), smoothing=0.1)
    losses = optim.image_losses(logits[:, None], labels, objective)
    for logit, label, loss in zip(logits.tolist(), labels.tolist(), losses.tolist(), strict=True):
        probability = 1 / (1 + math.exp(-(logit + 0.7)))
        target = label * 0.9 + 0.05
        assert loss == pytest.approx(
            -target * math.log(probability) - (1 - target) * math.log(1 - probability)
        )


def test_clipping_scales_to_the_norm_and_zero_leaves_gradients() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 3.0)
    assert float(optim.clip_gradients([parameter], 0.0)) == pytest.approx(6.0)
    assert parameter.grad.tolist() == [3.0] * 4
    assert float(optim.clip_gradients([parameter], 1.0)) == pytest.approx(6.0)
    assert float(parameter.grad.norm()) == pytest.approx(1.0, rel=1e-4)
