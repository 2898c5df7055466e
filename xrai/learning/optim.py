"""The optimizer, its schedule, the averaged weights and the loss."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import swa_utils

from xrai.config import Optim
from xrai.labels import UNKNOWN, LabelSpec, Task
from xrai.learning.network import Network

Counts = tuple[
    tuple[int, int], ...
]  # of each output: images that show it, images where it is known


def make_optimizer(model: nn.Module, config: Optim) -> torch.optim.Optimizer:
    """AdamW or SGD with Nesterov momentum; no weight decay on norms and biases (vectors).

    With `layer_decay`, the groups of a `Network` have a `scale` for the learning rate: 1 for the
    head's layer, times `layer_decay` for each layer before it.
    """
    scales = dict.fromkeys(dict(model.named_parameters()), 1.0)
    if config.layer_decay < 1:
        assert isinstance(model, Network)
        layers = model.parameter_layers()
        last = max(layers.values())
        scales |= {name: config.layer_decay ** (last - layer) for name, layer in layers.items()}
    groups = [
        {
            "params": [
                p for name, p in model.named_parameters() if (p.ndim > 1, scales[name]) == of
            ],
            "weight_decay": config.weight_decay if of[0] else 0.0,
            "scale": of[1],
        }
        for of in product((True, False), sorted({*scales.values()}, reverse=True))
    ]
    if config.layer_decay < 1:
        groups = [group for group in groups if group["params"]]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=True)
    sgd = torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=True
    )
    if config.momentum > 0:
        # Where the device skips the first step, torch 2.13 leaves its momentum uninitialized. A
        # first step from zeros gives the same
        for group in sgd.param_groups:
            for parameter in group["params"]:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, is_bad: Tensor) -> None:
    """A step of a fused optimizer, which the device skips if `is_bad`, (), is true there. A scaler
    that is enabled decides by itself, from the gradients.
    """
    optimizer.found_inf = is_bad.float()  # type: ignore[attr-defined]
    scaler.step(optimizer)
    scaler.update()


def restore(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Give an optimizer the moments of a checkpoint; its rates and decays stay its own.

    Raises `ValueError`, or what torch raises, if they do not fit its parameters.
    """
    own = [{**group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, rates in zip(optimizer.param_groups, own, strict=True):
        group.update(rates)
    moments = {"step", "exp_avg", "exp_avg_sq"}
    if isinstance(optimizer, torch.optim.SGD):
        moments = {"momentum_buffer"}
    for parameter, found in optimizer.state.items():
        shapes = {tensor.shape for tensor in found.values()}
        if {*found} != moments or not shapes <= {parameter.shape, torch.Size()}:
            raise ValueError(f"the optimizer's moments are {sorted(found)}, {shapes}")


def learning_rate(step: int, *, num_steps: int, config: Optim) -> float:
    """The rate of step `step` (from 0): linear warm-up to the peak, then half a cosine to 0.

    Loshchilov, Hutter 2017, https://arxiv.org/abs/1608.03983.
    """
    num_warmup = int(config.warmup_fraction * num_steps)
    if step < num_warmup:
        return config.lr * (step + 1) / num_warmup
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients down to an L2 norm of `max_norm` (0: never); return the norm before that."""
    return nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, *, step: int, decay: float) -> None:
    """Update the exponential moving average of the weights after step `step` (from 0).

    The decay grows as (1 + step) / (10 + step) up to `decay`, so that the first weights are soon
    forgotten.
    """
    update = swa_utils.get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))
    update(list(average.parameters()), list(model.parameters()), None)


@torch.no_grad()
def copy_statistics(average: nn.Module, model: nn.Module) -> None:
    """Give the averaged weights the model's buffers, such as the statistics of normalization."""
    for own, new in zip(average.buffers(), model.buffers(), strict=True):
        own.copy_(new)


@dataclass(frozen=True, eq=False)
class Objective:
    """What the loss of C outputs knows of the training labels. Made by `make_objective`."""

    task: Task
    prior: Tensor  # (C,) added to the logits
    weights: Tensor  # (2, C) float32, of images without and with each output
    smoothing: float = 0.0

    def to(self, device: torch.device, dtype: torch.dtype) -> "Objective":
        """The same on a device, for logits of a type."""
        prior, weights = self.prior.to(device, dtype), self.weights.to(device)
        return replace(self, prior=prior, weights=weights)

    def plain(self) -> "Objective":
        """The same without smoothing and weights."""
        return replace(self, weights=torch.ones_like(self.weights), smoothing=0.0)


def make_objective(labels: LabelSpec, counts: Counts, config: Optim) -> Objective:
    """The objective of a training split, on the CPU in float64.

    Logit adjustment (Menon et al. 2021, https://arxiv.org/abs/2007.07314): the loss adds
    `optim.logit_adjustment` times the log of each class's share in training, or the log odds of
    each finding among its known labels, to the logits; at 1, the logits alone fit a balanced
    population. Raises `ValueError` for an output that all images show, or none.
    """
    if not all(0 < present < known for present, known in counts):
        raise ValueError(f"each output needs images with and without it, not {counts}")
    is_multiclass = labels.task == "multiclass"
    priors = [
        config.logit_adjustment * math.log(present / (known if is_multiclass else known - present))
        for present, known in counts
    ]
    return Objective(
        labels.task,
        torch.tensor(priors, dtype=torch.float64),
        torch.tensor(class_weights(labels, counts, config.class_weighting)),
        config.label_smoothing,
    )


def class_weights(
    labels: LabelSpec, counts: Counts, weighting: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Loss weights of images without and with each output: (N / (C N_class)) ** `weighting`, so
    that 1 balances the C classes of an image, or presence and absence of each finding.
    """
    num_classes = len(labels.classes) if labels.task == "multiclass" else 2
    absent = tuple(
        (known / (num_classes * (known - present))) ** weighting for present, known in counts
    )
    present = tuple((known / (num_classes * present)) ** weighting for present, known in counts)
    return absent, present


def image_losses(logits: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    """The loss of each image, (B,), from logits (B, C) and labels as a data set holds them.

    `multiclass`: the cross-entropy of labels (B,) in 0 … C - 1. `multilabel`: the mean binary
    cross-entropy over the image's known findings, of labels (B, C): 1, 0, or -1 for unknown. An
    image without any known finding costs 0. `binary`: the same with one finding, which is known of
    all images, of labels (B,). The loss of a batch is the mean over all of its images, whatever is
    known of them, so that no rank needs the counts of the others.
    """
    adjusted = logits + objective.prior
    smoothing, weights = objective.smoothing, objective.weights
    if objective.task == "multiclass":
        classes = labels.long()
        losses = functional.cross_entropy(
            adjusted, classes, reduction="none", label_smoothing=smoothing
        )
        return losses * weights[1][classes]
    values = labels.to(logits.dtype).view_as(logits)  # (B, C)
    targets = values * (1 - smoothing) + smoothing / 2
    parts = functional.binary_cross_entropy_with_logits(adjusted, targets, reduction="none")
    parts = parts * torch.where(values > 0, weights[1], weights[0])
    is_known = values != UNKNOWN
    return torch.where(is_known, parts, 0.0).sum(dim=1) / is_known.sum(dim=1).clamp_min(1)


def count_right(logits: Tensor, labels: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """How many known labels are right, and how many are known, (), when the class with the largest
    logit is called, or each output whose logit is above 0. Shapes are those of `image_losses`.
    """
    if task == "multiclass":
        is_right, is_known = (
            logits.argmax(dim=1) == labels,
            torch.ones_like(labels, dtype=torch.bool),
        )
    else:
        values = labels.view_as(logits)
        is_right, is_known = (logits > 0) == values, values != UNKNOWN
    return (is_right & is_known).sum(), is_known.sum()
