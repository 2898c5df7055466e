"""The interface of all networks to the loop, scorer, heat maps, typicality and export; and our own.

Images are grey values in [0, 1]; normalization of the input is a network's own first layer, so that
training, serving and export cannot differ in it. The outputs are one logit for each class or
finding, a single one for two classes; above 0 is evidence for it. `predictor.build_model` builds
the network that the config names; no other module knows the class of a network.

Ours is a small residual network without normalization layers, for any height and width from 16 up.
Batch statistics would make an image's result depend on the rest of its batch, and so on the number
of ranks. Weights are standardized instead (Brock, De, Smith 2021,
https://arxiv.org/abs/2101.08692), which trained as well here and needs no communication;
docs/decisions/0002-no-batch-statistics.md has the measurements.
"""

import copy
from importlib.metadata import EntryPoint, entry_points
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from xrai.config import NETWORK_GROUP
from xrai.errors import UserError

_BLOCKS_PER_STAGE = {"resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2)}
# 1 / 0.5838, the standard deviation of relu(x) for normal x; keeps the variance across layers
_RELU_GAIN = 1.7139588594436646
_FIRST_BRANCH_GAIN = 0.2  # residual branches begin small


class Network(nn.Module):
    """The interface of a network. A subclass has `forward` and `stages`, or `look` for both."""

    num_draws = 0  # random numbers per image that a training step takes

    def forward(self, images: Tensor) -> Tensor:
        """Grey values (B, 1, H, W) in [0, 1] to logits (B, outputs)."""
        raise NotImplementedError

    def stages(self, images: Tensor) -> list[Tensor]:
        """The feature maps (B, C, h, w) of grey values (B, 1, H, W), from fine to coarse; the first
        are the stem's.
        """
        return self.look(images)[1]

    def look(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`forward` and `stages` at once. Where the logits are computed from these very maps, heat
        maps show the gradient there.
        """
        return self(images), self.stages(images)

    def for_inference(self) -> "Network":
        """This network, or a copy with the same outputs that is faster and cannot be trained."""
        return self

    def draw(self, numbers: Tensor) -> None:
        """Take the random numbers of the images of the next step, (B, num_draws) in [-1, 1)."""

    def head_prefixes(self) -> tuple[str, ...]:
        """Prefixes of the names of the head's parameters, whose shapes depend on the outputs."""
        *_, (last, _) = self.named_parameters()
        return (last.rpartition(".")[0] + ".",)

    def parameter_layers(self) -> dict[str, int]:
        """The layer of each parameter by its name, from 0 at the input to the head's."""
        return _number_layers(self)


def _number_layers(module: nn.Module) -> dict[str, int]:
    """A layer for each child, and for each of the children of a numbered list."""
    layers: dict[str, int] = {}
    parts: dict[str, int] = {}
    for name, _ in module.named_parameters():
        first, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        part = f"{first}.{number}" if number.isdecimal() else first
        layers[name] = parts.setdefault(part, len(parts))
    return layers


class Standardize(nn.Module):
    """Give each image mean 0 and standard deviation 1: exposure says nothing about the lungs."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, H, W) to (B, 1, H, W); a flat image becomes zeros."""
        centered = images - images.mean(dim=(1, 2, 3), keepdim=True)
        deviation = centered.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()  # (B, 1, 1, 1)
        return centered / (deviation + 1e-3)


class StandardizedConv2d(nn.Conv2d):
    """A convolution whose filters have mean 0, fixed variance and a learned gain each."""

    def __init__(self, channels_in: int, channels_out: int, size: int, *, stride: int = 1) -> None:
        super().__init__(channels_in, channels_out, size, stride=stride, padding=size // 2)
        assert self.bias is not None
        nn.init.zeros_(self.bias)
        self.gain = nn.Parameter(torch.ones(channels_out))

    def filters(self) -> Tensor:
        """The standardized filters, (C_out, C_in, size, size)."""
        over = (1, 2, 3)
        variance, mean = torch.var_mean(self.weight, dim=over, keepdim=True, correction=0)
        scale = torch.rsqrt(variance * self.weight[0].numel() + 1e-6)  # (C_out, 1, 1, 1)
        scale = scale * (self.gain * _RELU_GAIN)[:, None, None, None]
        return (self.weight - mean) * scale

    def folded(self) -> nn.Conv2d:
        """A plain convolution with the same outputs, for inference."""
        size, padding = self.weight.shape[2], int(self.padding[0])
        plain = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            size,
            stride=self.stride[0],
            padding=padding,
            device="meta",
        )
        plain.weight = nn.Parameter(self.filters().detach(), requires_grad=False)
        plain.bias = self.bias
        return plain

    def forward(self, features: Tensor) -> Tensor:
        """(B, C_in, h, w) to (B, C_out, h / stride, w / stride)."""
        filters, padding = self.filters(), self.padding
        if features.shape[2:] == (1, 1) and self.stride != (1, 1):
            # On a map of one pixel only the filter's center counts. For the rest of the filter,
            # oneDNN's bfloat16 gradient is uninitialized memory (PyTorch 2.13; images of 16 x 16)
            middle = filters.shape[2] // 2
            filters, padding = filters[:, :, middle : middle + 1, middle : middle + 1], (0, 0)
        return functional.conv2d(features, filters, self.bias, self.stride, padding)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a learned gain, plus a shortcut (He et al. 2016)."""

    def __init__(self, channels_in: int, channels_out: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = StandardizedConv2d(channels_in, channels_out, 3, stride=stride)
        self.conv2 = StandardizedConv2d(channels_out, channels_out, 3)
        self.branch_gain = nn.Parameter(torch.tensor(_FIRST_BRANCH_GAIN))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = StandardizedConv2d(channels_in, channels_out, 1, stride=stride)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C_in, h, w) to (B, C_out, h / stride, w / stride)."""
        branch = self.conv2(functional.relu(self.conv1(features)))
        return functional.relu(branch * self.branch_gain + self.shortcut(features))


class ResNet(Network):
    """A 5x5 convolution, max pool, four stages of basic blocks, average pool, a linear head."""

    def __init__(self, *, name: str = "resnet10", width: int = 16, num_outputs: int = 1) -> None:
        super().__init__()
        self.standardize = Standardize()
        self.stem = nn.Sequential(
            StandardizedConv2d(1, width, 5, stride=2),
            nn.MaxPool2d(3, stride=2, padding=1),  # before the ReLU: as good, a quarter of the work
            nn.ReLU(),
        )
        blocks: list[nn.Module] = []
        channels = width
        for stage, num_blocks in enumerate(_BLOCKS_PER_STAGE[name]):
            for block in range(num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(BasicBlock(channels, width * 2**stage, stride=stride))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, num_outputs)
        self.register_load_state_dict_pre_hook(_rename_stages)  # type: ignore[no-untyped-call]

    def features(self, images: Tensor) -> Tensor:
        """Grey values (B, 1, H, W) in [0, 1] to the last feature maps.

        They are (B, 8 x width, ceil(H / 32), ceil(W / 32)).
        """
        out: Tensor = self.blocks(self.stem(self.standardize(images)))
        return out

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, H, W) grey values in [0, 1] to logits (B, num_outputs)."""
        return self._classify(self.features(images))

    def look(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the feature maps of the stem and of each block; all are at least 0."""
        maps = self.stem(self.standardize(images))
        stages = list(accumulate(self.blocks, lambda maps, block: block(maps), initial=maps))
        return self._classify(stages[-1]), stages

    def _classify(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head(features.mean(dim=(2, 3)))  # of (B, 8 x width)
        return logits

    def for_inference(self) -> "ResNet":
        """A copy whose filters are standardized once."""
        folded = copy.deepcopy(self)
        for parent in list(folded.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, StandardizedConv2d):
                    setattr(parent, name, child.folded())
        return folded.requires_grad_(False)


def num_products(network: Network, images: Tensor) -> int:
    """How often the convolutions and linear layers multiply for images (B, 1, H, W)."""
    found = []

    def note(layer: nn.Module, _: Any, output: Tensor) -> None:
        assert isinstance(layer.weight, Tensor)
        found.append(output.numel() * layer.weight[0].numel())

    layers = [each for each in network.modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        with torch.inference_mode():
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(found)


def _rename_stages(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename the blocks in weights of earlier versions, which called them stages."""
    for name in [name for name in state if name.startswith(f"{prefix}stages.")]:
        state[f"{prefix}blocks.{name.removeprefix(f'{prefix}stages.')}"] = state.pop(name)


class Registered(Network):
    """A module of an installed package, with `forward` and `stages` as in `Network`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.module(images)
        return logits

    def stages(self, images: Tensor) -> list[Tensor]:
        return list(self.module.stages(images))  # type: ignore[operator]

    def parameter_layers(self) -> dict[str, int]:
        return {f"module.{name}": layer for name, layer in _number_layers(self.module).items()}


def build_registered(name: str, *, num_outputs: int, image_size: int) -> Network:
    """The network that an installed package registers under the entry point group
    `xrai.networks`: a callable with these two keyword arguments.

    Raises `UserError` unless it gives a module with `forward` and `stages`.
    """
    found: EntryPoint = entry_points(group=NETWORK_GROUP)[name]
    try:
        module = found.load()(num_outputs=num_outputs, image_size=image_size)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"model.name = {name} is {found.value} of {NETWORK_GROUP}, which cannot be built for "
            f"{num_outputs} outputs and images of {image_size} x {image_size} pixels: {error}"
        ) from error
    if isinstance(module, Network):
        return module
    if not isinstance(module, nn.Module) or not callable(getattr(module, "stages", None)):
        raise UserError(
            f"model.name = {name} is {found.value} of {NETWORK_GROUP}, which gives "
            f"{type(module).__name__}, not a torch module with forward and stages"
        )
    return Registered(module)
