"""The network: a small residual network for one-channel images, without normalization layers.

Images are grey values in [0, 1] of any height and width from 16 up; standardization is the
network's first layer, so that training, serving and export cannot differ in it. The outputs are one
logit for each thing that is looked for, with two classes a single one; above 0 is evidence for it.

Batch statistics would make an image's result depend on the rest of its batch, and so on the number
of ranks. Weights are standardized instead (Brock, De, Smith 2021, https://arxiv.org/abs/2101.08692),
which trained as well here and needs no communication; docs/decisions/0002-no-batch-statistics.md
has the measurements.
"""

import copy
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional

_BLOCKS_PER_STAGE = {"resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2)}
# 1 / 0.5838, the standard deviation of relu(x) for normal x; keeps the variance across layers
_RELU_GAIN = 1.7139588594436646
_FIRST_BRANCH_GAIN = 0.2  # residual branches begin small


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

    def forward(self, features: Tensor) -> Tensor:
        """(B, C_in, h, w) to (B, C_out, h / stride, w / stride)."""
        filters, padding = self.filters(), self.padding
        if features.shape[2:] == (1, 1) and self.stride != (1, 1):
            # Only the filter's center meets a map of one pixel. Of the rest, oneDNN's gradient in
            # bfloat16 is memory that nothing has written (PyTorch 2.13; images of 16 x 16)
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


class ResNet(nn.Module):
    """A 5x5 convolution, max pool, four stages of basic blocks, average pool, a linear head."""

    def __init__(self, *, name: str = "resnet10", width: int = 16, num_outputs: int = 1) -> None:
        super().__init__()
        self.standardize = Standardize()
        self.stem = nn.Sequential(
            StandardizedConv2d(1, width, 5, stride=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        blocks: list[nn.Module] = []
        channels = width
        for stage, num_blocks in enumerate(_BLOCKS_PER_STAGE[name]):
            for block in range(num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(BasicBlock(channels, width * 2**stage, stride=stride))
                channels = width * 2**stage
        self.stages = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, num_outputs)

    def features(self, images: Tensor) -> Tensor:
        """Grey values (B, 1, H, W) in [0, 1] to the last feature maps.

        They are (B, 8 x width, ceil(H / 32), ceil(W / 32)).
        """
        out: Tensor = self.stages(self.stem(self.standardize(images)))
        return out

    def maps(self, standardized: Tensor) -> list[Tensor]:
        """The feature maps of standardized images (B, 1, H, W): of the stem and of each block."""
        maps = self.stem(standardized)
        return list(accumulate(self.stages, lambda maps, block: block(maps), initial=maps))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, H, W) grey values in [0, 1] to logits (B, num_outputs)."""
        pooled = self.features(images).mean(dim=(2, 3))  # (B, 8 x width)
        logits: Tensor = self.head(pooled)
        return logits


def fold_filters(network: ResNet) -> ResNet:
    """A copy for inference with the same outputs, whose filters are standardized once.

    The stem's max pool comes before its ReLU: the same maps for a quarter of the work.
    """
    folded = copy.deepcopy(network)
    for parent in list(folded.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, StandardizedConv2d):
                plain = nn.Conv2d(
                    child.in_channels,
                    child.out_channels,
                    child.weight.shape[2],
                    stride=child.stride[0],
                    padding=int(child.padding[0]),
                    device="meta",
                )
                plain.weight = nn.Parameter(child.filters().detach(), requires_grad=False)
                plain.bias = child.bias
                setattr(parent, name, plain)
    convolution, relu, pool = folded.stem
    assert isinstance(relu, nn.ReLU) and isinstance(pool, nn.MaxPool2d)
    folded.stem = nn.Sequential(convolution, pool, nn.ReLU(inplace=True))
    return folded.requires_grad_(False)
