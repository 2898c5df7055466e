import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional

from xrai.config import Optim
from xrai.labels import LabelSpec
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


# ------------------------------------------------------------------------------- classes, findings

THREE = LabelSpec("multiclass", ("NORMAL", "BACTERIAL", "VIRAL"))
FINDINGS = LabelSpec("multilabel", ("Effusion", "Nodule"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("smoothing", "weighting"), [(0.0, 0.0), (0.1, 0.5)])
def test_with_two_classes_loss_and_gradient_are_the_plain_formula_bit_for_bit(
    dtype: torch.dtype, smoothing: float, weighting: float
) -> None:
    labels = LabelSpec("binary", ("NORMAL", "PNEUMONIA"))
    config = Optim(label_smoothing=smoothing, class_weighting=weighting)
    objective = optim.make_objective(labels, ((70, 100),), config).to(torch.device("cpu"), dtype)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(37, 1, generator=generator, dtype=dtype, requires_grad=True)
    truth = (torch.rand(37, generator=generator) < 0.7).to(torch.uint8)
    losses = optim.image_losses(logits, truth, objective)
    (gradient,) = torch.autograd.grad(losses.sum() * (1 / 37), logits)

    plain = logits.detach().squeeze(1).requires_grad_()
    targets = truth.to(dtype) * (1 - smoothing) + smoothing / 2
    expected = functional.binary_cross_entropy_with_logits(
        plain + math.log(70 / 30), targets, reduction="none"
    )
    if weighting:
        weights = (100 / 60) ** weighting, (100 / 140) ** weighting
        expected = expected * torch.where(truth > 0, weights[1], weights[0])
    (slope,) = torch.autograd.grad(expected.sum() * (1 / 37), plain)
    assert torch.equal(losses, expected) and torch.equal(gradient.squeeze(1), slope)


def test_classes_cost_the_cross_entropy_of_logits_with_their_log_priors() -> None:
    config = Optim(label_smoothing=0.3, class_weighting=1.0)
    objective = optim.make_objective(THREE, ((50, 100), (30, 100), (20, 100)), config)
    logits = torch.tensor([[0.3, -1.0, 2.0], [1.5, 0.2, -0.4]], dtype=torch.float64)
    truth = torch.tensor([2, 0], dtype=torch.uint8)
    losses = optim.image_losses(logits, truth, objective).tolist()
    for row, label, loss in zip(logits.tolist(), truth.tolist(), losses, strict=True):
        powers = [
            math.exp(logit) * share for logit, share in zip(row, (0.5, 0.3, 0.2), strict=True)
        ]
        logs = [math.log(power / sum(powers)) for power in powers]
        targets = [0.7 * (place == label) + 0.1 for place in range(3)]
        weight = 1 / (3 * (0.5, 0.3, 0.2)[label])
        expected = -weight * sum(t * log for t, log in zip(targets, logs, strict=True))
        assert loss == pytest.approx(expected, rel=1e-6)


def test_findings_cost_the_mean_over_known_ones_and_unknown_ones_nothing() -> None:
    objective = optim.make_objective(FINDINGS, ((20, 100), (30, 40)), Optim())
    logits = torch.tensor([[0.3, -1.0], [1.5, 0.2], [0.7, 0.1]], dtype=torch.float64)
    truth = torch.tensor([[1, 0], [-1, 1], [-1, -1]], dtype=torch.int8)
    logits.requires_grad_()
    losses = optim.image_losses(logits, truth, objective)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)

    def cost(logit: float, odds: float, label: int) -> float:
        return math.log1p(math.exp((-1 if label else 1) * (logit + math.log(odds))))

    first = (cost(0.3, 20 / 80, 1) + cost(-1.0, 30 / 10, 0)) / 2
    assert losses.tolist() == pytest.approx([first, cost(0.2, 30 / 10, 1), 0.0])
    assert (gradient == 0).tolist() == [[False, False], [True, False], [True, True]]


def test_weights_balance_presence_and_absence_of_each_finding_among_its_known_labels() -> None:
    config = Optim(class_weighting=1.0)
    weights = optim.make_objective(FINDINGS, ((20, 100), (30, 40)), config).weights
    assert weights.flatten().tolist() == pytest.approx([100 / 160, 40 / 20, 100 / 40, 40 / 60])


def test_right_labels_are_counted_among_known_ones() -> None:
    logits = torch.tensor([[0.3, -1.0], [1.5, 0.2]])
    truth = torch.tensor([[1, 1], [-1, 1]], dtype=torch.int8)
    assert tuple(map(int, optim.count_right(logits, truth, "multilabel"))) == (2, 3)
    classes = torch.tensor([0, 1], dtype=torch.uint8)
    assert tuple(map(int, optim.count_right(logits, classes, "multiclass"))) == (1, 2)


@pytest.mark.parametrize("counts", [((0, 9), (3, 9)), ((9, 9), (3, 9))])
def test_a_finding_of_all_images_or_none_has_no_objective(
    counts: tuple[tuple[int, int], ...],
) -> None:
    with pytest.raises(ValueError, match="each output needs images with and without it"):
        optim.make_objective(FINDINGS, counts, Optim())
