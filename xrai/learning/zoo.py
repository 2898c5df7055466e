"""Networks of timm, `model.name` = timm/NAME: the one home of that package (the extra `timm`).

Usable are convolutional and hierarchical networks and vision transformers that name the modules of
their stages (`feature_info`). Forward hooks record the maps of the stages, so that the logits are
computed from these very maps and heat maps can show the gradient there. Transformers that classify
by a class token are made to classify by the mean of all patches: the class token does not depend on
the patches that the last block puts out, so its heat map there would be empty.
"""

import importlib.util
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from xrai.config import TIMM, Model
from xrai.errors import ConfigError, UserError
from xrai.learning.distributed import summed
from xrai.learning.network import Network, Standardize

_HEAD_DEVIATION = 0.01  # of a new head's weights
_NUM_BLOCKS = 4  # blocks that count as stages in a transformer, whose blocks have one resolution
# What normalizes grey values in [0, 1], by name: channels, mean and standard deviation; None stands
# for those that the network was pretrained with
_INPUTS: dict[str, tuple[int, float | None, float | None]] = {
    "rgb": (3, None, None),
    "standardized": (1, 0.0, 1.0),
    "xrv": (1, 0.5, 1 / 2048),  # -1024 to 1024, as torchxrayvision has it
}
_looking = threading.RLock()  # hooks are added and removed by one thread at a time


class TimmNetwork(Network):
    """A timm network with the normalization of its input, for images of one size."""

    mean: Tensor  # (1, C, 1, 1)
    deviation: Tensor  # (1, C, 1, 1)

    def __init__(self, model: nn.Module, config: Model, *, image_size: int) -> None:
        super().__init__()
        self.model = model
        self._draws = _Draws()
        self._is_frozen = batch_norm(config) == "frozen"
        cfg: dict[str, Any] = dict(model.pretrained_cfg)  # type: ignore[arg-type]
        channels, mean, deviation = _INPUTS[config.input]
        self._standardize = Standardize() if config.input == "standardized" else nn.Identity()
        for name, value, own in (("mean", mean, "mean"), ("deviation", deviation, "std")):
            numbers = torch.tensor(cfg[own] if value is None else [value] * channels)
            self.register_buffer(name, numbers.view(1, channels, 1, 1), persistent=False)
        names = cfg["classifier"]
        self._heads = (names,) if isinstance(names, str) else tuple(names)
        self._stages = _stages_of(model)
        self.num_draws = _replace(model, _is_drop_path, partial(DropPath, draws=self._draws))
        if batch_norm(config) == "sync":
            _replace(model, _is_batch_norm, lambda norm, place: SyncedNorm(norm))
        for module in model.modules():
            # No dropout: its draws would depend on the rank, and on where a run was stopped
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
            if hasattr(module, "drop_rate"):
                module.drop_rate = 0.0  # type: ignore[assignment]
            if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
                kind = type(module)
                module.__class__ = type(kind.__name__, (_Depthwise, kind), {})
        self.image_size = image_size

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(self._normalized(images))
        return logits

    def look(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        maps: list[Tensor] = []
        with self._recording(maps):
            logits = self(images)
        return logits, maps

    def train(self, mode: bool = True) -> "TimmNetwork":
        super().train(mode)
        if self._is_frozen:
            for module in self.modules():
                if _is_batch_norm(module):
                    module.eval()
        return self

    def draw(self, numbers: Tensor) -> None:
        self._draws.numbers = numbers

    def head_prefixes(self) -> tuple[str, ...]:
        return tuple(f"model.{name}." for name in self._heads)

    def parameter_layers(self) -> dict[str, int]:
        from timm.models import group_parameters

        matcher = getattr(self.model, "group_matcher", None)
        if matcher is None:
            return super().parameter_layers()
        found = group_parameters(self.model, matcher(coarse=False), reverse=True)
        places = {layer: place for place, layer in enumerate(sorted(set(found.values())))}
        return {f"model.{name}": places[layer] for name, layer in found.items()}

    def _normalized(self, images: Tensor) -> Tensor:
        grey: Tensor = self._standardize(images)
        return (grey - self.mean) / self.deviation  # (B, C, H, W)

    @contextmanager
    def _recording(self, maps: list[Tensor]) -> Iterator[None]:
        """Appends the maps of all stages of a forward pass of this thread."""
        thread = threading.get_ident()

        def record(channels: int, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            if threading.get_ident() != thread:
                return None
            found, same = self._to_maps(output, channels)
            maps.append(found)
            return same

        with _looking:
            handles = [
                self.model.get_submodule(name).register_forward_hook(partial(record, channels))
                for name, channels in self._stages
            ]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _to_maps(self, output: Tensor, channels: int) -> tuple[Tensor, Tensor]:
        """The maps (B, C, h, w) of what a stage gave, and that again, made from the maps."""
        if output.ndim == 3:  # tokens, (B, N, C)
            num_prefix = int(getattr(self.model, "num_prefix_tokens", 0))
            prefix, patches = output[:, :num_prefix], output[:, num_prefix:]
            side = round(patches.shape[1] ** 0.5)
            maps = patches.transpose(1, 2).unflatten(2, (side, side))
            return maps, torch.cat([prefix, maps.flatten(2).transpose(1, 2)], dim=1)
        is_last = output.shape[-1] == channels
        if is_last and getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            maps = output.permute(0, 3, 1, 2)
            return maps, maps.permute(0, 2, 3, 1)
        return output, output


def build(config: Model, *, num_outputs: int, image_size: int) -> TimmNetwork:
    """A timm network with fresh weights. Raises `UserError` if timm has none of this name, or it
    cannot be used for such images.
    """
    model = _create(config, num_outputs, image_size)
    if getattr(model, "global_pool", "") == "token":
        model.reset_classifier(num_outputs, global_pool="avg")  # type: ignore[operator]
    head = model.get_classifier()  # type: ignore[operator]
    if isinstance(head, nn.Linear):  # timm draws an EfficientNet's as wide as 1 / sqrt(num_outputs)
        nn.init.normal_(head.weight, std=_HEAD_DEVIATION)
        nn.init.zeros_(head.bias)
    embedding = getattr(model, "patch_embed", None)
    patch = getattr(embedding, "patch_size", None)
    stride = getattr(getattr(embedding, "proj", None), "stride", patch)
    try:
        if isinstance(patch, tuple) and patch == stride and image_size % patch[0]:
            raise ValueError(f"its patches of {patch[0]} pixels do not divide them")
        network = TimmNetwork(model, config, image_size=image_size).eval()
        with torch.no_grad():
            logits, maps = network.look(torch.zeros(2, 1, image_size, image_size))
        if logits.shape != (2, num_outputs) or not all(each.ndim == 4 for each in maps):
            raise ValueError(f"it gives logits of {tuple(logits.shape)}")
    except (
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise UserError(
            f"model.name = {config.name} cannot be used for images of {image_size} x {image_size} "
            f"pixels: {_line(error)}"
        ) from error
    return network.train()


def pretrained_weights(config: Model, *, image_size: int) -> tuple[dict[str, Tensor], str]:
    """timm's pretrained weights for a network, by the network's names, and where they come from.

    Raises `UserError` if there are none or they cannot be fetched.
    """
    model = _create(config, None, image_size, pretrained=True)
    cfg: dict[str, Any] = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    source = cfg.get("hf_hub_id") or cfg.get("url") or cfg.get("file") or config.name
    return model.state_dict(), f"{source} ({cfg.get('tag') or 'default'})"


def convert(weights: dict[str, Tensor], network: TimmNetwork) -> dict[str, Tensor]:
    """Weights of a file by timm's names: those of a DINOv2 of transformers are renamed, and
    position embeddings are resampled to the network's number of patches.
    """
    if "embeddings.patch_embeddings.projection.weight" in weights:
        weights = _from_transformers(weights)
    own = getattr(network.model, "pos_embed", None)
    found = weights.get("pos_embed")
    if own is None or found is None or found.shape == own.shape or found.ndim != 3:
        return weights
    from timm.layers import resample_abs_pos_embed

    num_prefix = int(getattr(network.model, "num_prefix_tokens", 0))
    side = round((own.shape[1] - num_prefix) ** 0.5)
    resampled = resample_abs_pos_embed(found, [side, side], num_prefix_tokens=num_prefix)
    return {**weights, "pos_embed": resampled}


def _from_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of timm's vision transformers for those of transformers' Dinov2Model, which
    RAD-DINO has.
    """
    renamed = {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.register_tokens": "reg_token",
        "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
        "layernorm.": "norm.",
        "encoder.layer.": "blocks.",
        "attention.output.dense.": "attn.proj.",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
        "mlp.weights_in.": "mlp.fc1.",
        "mlp.weights_out.": "mlp.fc2.",
    }
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if ".attention.attention." not in name:
            for old, new in renamed.items():
                name = name.replace(old, new)
            found[name] = tensor
        elif ".query." in name:
            parts = [weights[name.replace(".query.", f".{part}.")] for part in _QKV]
            name = name.replace("encoder.layer.", "blocks.")
            found[name.replace("attention.attention.query.", "attn.qkv.")] = torch.cat(parts)
    return found


_QKV = ("query", "key", "value")


def batch_norm(config: Model) -> str:
    """How the statistics of batch normalization are kept: auto means frozen for given weights."""
    if config.batch_norm != "auto":
        return config.batch_norm
    return "frozen" if config.weights else "sync"


class _Draws:
    """The random numbers of the step under way, shared by all modules that drop paths."""

    numbers: Tensor | None = None  # (B, num_draws) in [-1, 1)


class DropPath(nn.Module):
    """Skips a residual branch for some images, drawn for each image (Huang et al. 2016).

    The draws come from outside, a function of (seed, epoch, image), so they do not depend on the
    batch, the number of ranks or an interruption.
    """

    def __init__(self, original: nn.Module, place: int, *, draws: _Draws) -> None:
        super().__init__()
        self.probability = float(original.drop_prob)  # type: ignore[arg-type]
        self._place, self._draws = place, draws

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self._draws.numbers is None:
            return branch
        drawn = (self._draws.numbers[:, self._place].to(branch.dtype) + 1) / 2  # (B,) in [0, 1)
        kept = (drawn >= self.probability).to(branch.dtype) / (1 - self.probability)
        return branch * kept.view(-1, *[1] * (branch.ndim - 1))


class _Depthwise(nn.Conv2d):
    """A depthwise convolution, in fp32 where a CPU computes the others in bf16: the gradient of its
    filters in bf16 takes oneDNN several times as long.
    """

    def forward(self, maps: Tensor) -> Tensor:
        if maps.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(maps)
        with torch.autocast("cpu", enabled=False):
            return super().forward(maps.float())


class SyncedNorm(nn.BatchNorm2d):
    """Batch normalization with the statistics of the images of all ranks, of any number each."""

    def __init__(self, original: nn.Module) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(original.__dict__)

    def forward(self, maps: Tensor) -> Tensor:
        if self.training:
            normal = self._normalize(maps)
        else:
            normal = functional.batch_norm(
                maps, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        act: Callable[[Tensor], Tensor] | None = getattr(self, "act", None)
        return normal if act is None else act(normal)  # timm has both in one module

    def _normalize(self, maps: Tensor) -> Tensor:
        normal, mean, variance, num = _SyncedNormalize.apply(  # type: ignore[no-untyped-call]
            maps, self.weight, self.bias, self.eps
        )
        if self.running_mean is not None and self.running_var is not None:
            rate = 0.1 if self.momentum is None else self.momentum
            with torch.no_grad():
                self.running_mean.lerp_(mean, rate)
                self.running_var.lerp_(variance * num / (num - 1).clamp_min(1), rate)
        found: Tensor = normal
        return found


class _SyncedNormalize(torch.autograd.Function):
    """Maps (B, C, …) normalized over all ranks, with the mean (C,), the variance (C,), which is
    the biased one, and the number of values of a channel.

    With s the deviation's inverse, x' the normalized maps and n that number, the gradient is
    weight s (g - (sum g + x' sum(g x')) / n), with sums over all ranks (Ioffe and Szegedy 2015).
    """

    @staticmethod
    def forward(
        ctx: Any, maps: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kind = torch.promote_types(maps.dtype, torch.float32)
        zeros = maps.new_zeros(maps.shape[1], dtype=kind)
        mean, variance = zeros, zeros
        if len(maps):
            mean, variance = torch.batch_norm_update_stats(maps, zeros, zeros.clone(), 0.0)
        num = maps.new_full((1,), maps.numel() // maps.shape[1], dtype=torch.float64)
        mean, variance = mean.double(), variance.double()  # for a difference of large squares
        sums = summed(torch.cat([num * mean, num * (variance + mean.square()), num]))
        num = sums[-1:]
        mean, square = (sums[:-1] / num).chunk(2)
        mean, variance = mean.to(kind), (square - mean.square()).clamp_min(0).to(kind)
        if len(maps):
            normal = functional.batch_norm(maps, mean, variance, weight, bias, eps=eps)
        else:
            normal = maps.clone()
        ctx.save_for_backward(maps, weight, mean, variance, num)
        ctx.eps = eps
        num = num.to(kind)
        ctx.mark_non_differentiable(mean, variance, num)
        return normal, mean, variance, num

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight, mean, variance, num = ctx.saved_tensors
        of_weight, of_bias = torch.zeros_like(mean), torch.zeros_like(mean)
        if len(maps):
            _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
                *(gradients[0], maps, weight, mean, variance, None, None, False, ctx.eps),
                [False, True, True],  # that of the maps is below, in fewer passes
            )
        total, times_normal = (summed(torch.cat([of_bias, of_weight])) / num).chunk(2)
        inverse = torch.rsqrt(variance + ctx.eps)
        scale = inverse if weight is None else inverse * weight
        slope = -scale * inverse * times_normal
        shift = -scale * total - slope * mean
        of_channels = [1, -1, *[1] * (maps.ndim - 2)]
        scale, slope, shift = (
            each.to(maps.dtype).view(of_channels) for each in (scale, slope, shift)
        )
        gradient = torch.addcmul(shift, maps, slope).addcmul_(gradients[0], scale)
        own = (None, None) if weight is None else (of_weight, of_bias)
        return gradient, *own, None


def _is_drop_path(module: nn.Module) -> bool:
    return type(module).__name__ == "DropPath"


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _replace(
    model: nn.Module,
    is_old: Callable[[nn.Module], bool],
    make: Callable[[nn.Module, int], nn.Module],
) -> int:
    """Replace each module that `is_old` accepts by `make(module, place)`; return how many."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if is_old(child)
    ]
    for place, (parent, name, child) in enumerate(found):
        setattr(parent, name, make(child, place))
    return len(found)


def _stages_of(model: nn.Module) -> list[tuple[str, int]]:
    """The modules that give a network's feature maps, and their numbers of channels."""
    info: Any = getattr(model, "feature_info", None)
    if not info:
        raise ValueError("it names no feature maps")
    stages = [(str(each["module"]), int(each["num_chs"])) for each in info]
    if len({each["reduction"] for each in info}) == 1 and len(stages) > _NUM_BLOCKS:
        stages = stages[len(stages) // _NUM_BLOCKS - 1 :: len(stages) // _NUM_BLOCKS]
    return stages


def _create(
    config: Model, num_outputs: int | None, image_size: int, *, pretrained: bool = False
) -> nn.Module:
    """A timm model; with `num_outputs` None, its head is the pretrained one."""
    if importlib.util.find_spec("timm") is None:
        raise UserError(
            f"model.name = {config.name} needs timm, not installed here: pip install 'xrai[timm]'"
        )
    import timm

    name = config.name.removeprefix(TIMM)
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.partition('_')[0]}*")[:5]
        also = f"; it has {', '.join(near)} and others" if near else ""
        raise ConfigError(f"model.name = {config.name} is not allowed: timm has no {name}{also}")
    options: dict[str, Any] = {"in_chans": _INPUTS[config.input][0], "num_classes": num_outputs}
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if cfg is not None and cfg.fixed_input_size:
        options["img_size"] = image_size
    if config.drop_path:
        options["drop_path_rate"] = config.drop_path
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
        what = "fetched" if pretrained else "made"
        raise UserError(
            f"model.name = {config.name} cannot be {what} with {options}: {_line(error)}"
        ) from error
    return model


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
