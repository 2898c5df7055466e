"""The optimizer, its schedule, the averaged weights and the loss."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import swa_utils

from xrai.config import Optim


def make_optimizer(model: nn.Module, config: Optim) -> torch.optim.Optimizer:
    """AdamW or SGD with Nesterov momentum; no weight decay on norms and biases (vectors)."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999))
    return torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0
    )


def restore(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Give an optimizer the moments of a checkpoint; its rates and decays stay its own.

    Raises `ValueError` or what torch raises if they are none of its parameters.
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


def class_weights(counts: tuple[int, int], weighting: float) -> tuple[float, float]:
    """Loss weights of normal and pneumonia, (N / 2 N_class) ** `weighting`: 1 balances them."""
    total = sum(counts)
    return (total / (2 * counts[0])) ** weighting, (total / (2 * counts[1])) ** weighting


def image_losses(
    logits: Tensor,
    labels: Tensor,
    *,
    log_odds: float,
    smoothing: float = 0.0,
    weights: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Binary cross-entropy of each image, (B,), from logits (B,) and labels (B,) in {0, 1}.

    `log_odds` is added to the logits: with the log of the classes' ratio in training, the logits
    themselves fit a balanced population (logit adjustment; Menon et al. 2021,
    https://arxiv.org/abs/2007.07314). `weights` are those of the classes.
    """
    targets = labels.to(logits.dtype) * (1 - smoothing) + smoothing / 2
    losses = functional.binary_cross_entropy_with_logits(
        logits + log_odds, targets, reduction="none"
    )
    if weights == (1.0, 1.0):
        return losses
    return losses * torch.where(labels > 0, weights[1], weights[0])
