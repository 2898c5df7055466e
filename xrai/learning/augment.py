"""Random augmentation of the training images, on the device, a batch at a time.

Every image's draw is a pure function of (seed, epoch, image): a counter-based hash replaces a
generator's state, so a draw does not depend on the batch, the world size, the order or an
interruption. Geometry (one affine resampling) and intensity (gamma, contrast, blur, noise) vary as
between X-ray rooms. Images are never flipped, because the heart is on one side.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from xrai.config import Augment

_DRAWS = 10  # uniform numbers per image


def augment(images: Tensor, rows: Tensor, *, seed: int, epoch: int, strength: Augment) -> Tensor:
    """Return grey values (B, 1, H, W) float in [0, 1], each image changed by its own draw.

    `images` is (B, 1, H, W) float in [0, 1]; `rows` (B,) int64 are the images' positions in their
    split, on the same device. The result keeps dtype and device.
    """
    if len(rows) == 0:
        return images
    draws = uniform(rows, _DRAWS, seed=seed, epoch=epoch).to(images.dtype)  # (B, 10) in [-1, 1)
    changed, of = images, strength
    if of.rotation_deg or of.scale or of.shift or of.aspect or of.shear:
        changed = _warp(changed, draws[:, :6], strength)
    if of.gamma or of.contrast or of.blur:
        changed = _expose(changed, draws[:, 6:9], strength)
    return _add_noise(changed, rows, draws[:, 9], seed=seed, epoch=epoch, strength=strength)


def _warp(images: Tensor, draws: Tensor, strength: Augment) -> Tensor:
    """One affine resampling, bilinear. draws (B, 6) in [-1, 1).

    Outside the image its edge is repeated: black would be a border that only training images have,
    and the network learned to rely on it (docs/decisions/0005-recipe.md).
    """
    angle = draws[:, 0] * math.radians(strength.rotation_deg)
    scale = 1 + draws[:, 1] * strength.scale
    stretch = torch.sqrt(1 + draws[:, 2] * strength.aspect)
    shear = draws[:, 3] * strength.shear
    shift_x = 2 * strength.shift * draws[:, 4]  # a side is 2 units long
    shift_y = 2 * strength.shift * draws[:, 5]
    cos, sin = torch.cos(angle), torch.sin(angle)
    wide, high = stretch / scale, 1 / (stretch * scale)
    theta = torch.stack(
        [
            torch.stack([cos * wide, (shear * cos - sin) * wide, shift_x], dim=1),
            torch.stack([sin * high, (shear * sin + cos) * high, shift_y], dim=1),
        ],
        dim=1,
    )  # (B, 2, 3)
    grid = _affine_grid(theta, *images.shape[2:])
    return functional.grid_sample(
        images, grid, mode="bilinear", padding_mode="border", align_corners=False
    )


def _affine_grid(theta: Tensor, height: int, width: int) -> Tensor:
    """Where each pixel of the changed images comes from, (B, H, W, 2), for theta (B, 2, 3).

    As `functional.affine_grid` without its matrix product, which takes six times as long on a CPU.
    """
    down, across = (
        (torch.arange(size, dtype=theta.dtype, device=theta.device) * 2 + 1) / size - 1
        for size in (height, width)
    )  # centers of pixels, in [-1, 1]
    along, below, shift = theta[:, None, None].unbind(dim=4)  # (B, 1, 1, 2) each
    return along * across[:, None] + (below * down[:, None, None] + shift)


def _expose(images: Tensor, draws: Tensor, strength: Augment) -> Tensor:
    """Gamma, contrast about the mean and, in half of the images, some 3x3 binomial blur."""
    gamma, contrast, blur = (column[:, None, None, None] for column in draws.unbind(dim=1))
    changed = images.clamp_min(1e-4).pow(torch.exp(gamma * strength.gamma))
    mean = changed.mean(dim=(1, 2, 3), keepdim=True)
    changed = (changed - mean) * (1 + contrast * strength.contrast) + mean
    blurred = functional.pad(changed, (1, 1, 1, 1), mode="replicate")
    for _ in range(2):  # the binomial 1, 2, 1 is 1, 1 twice: sums are faster than a convolution
        blurred = blurred[:, :, 1:] + blurred[:, :, :-1]
        blurred = blurred[..., 1:] + blurred[..., :-1]
    return torch.lerp(changed, blurred / 16, blur.clamp_min(0) * strength.blur)


def _add_noise(
    images: Tensor, rows: Tensor, draws: Tensor, *, seed: int, epoch: int, strength: Augment
) -> Tensor:
    """Clip to [0, 1] and, in half of the images, uniform noise. draws (B,)."""
    if strength.noise == 0:
        return images.clamp(0, 1)
    height, width = images.shape[2:]
    noise = uniform(rows, height * width, seed=seed + 1, epoch=epoch).to(images.dtype)
    deviation = draws[:, None, None, None].clamp_min(0) * strength.noise
    # a uniform number on [-1, 1) has standard deviation 1 / sqrt(3)
    return (images + noise.view(-1, 1, height, width) * deviation * math.sqrt(3)).clamp(0, 1)


def uniform(rows: Tensor, count: int, *, seed: int, epoch: int) -> Tensor:
    """(B, count) float64 in [-1, 1), a pure function of (seed, epoch, row, column).

    Four 16-bit numbers come from each 64-bit output of SplitMix64 (Steele, Lea, Flood 2014), a
    bijective hash of a counter.
    """
    words = -(-count // 4)
    key = _splitmix64_of_number(_splitmix64_of_number(seed) + epoch)
    streams = _splitmix64(rows + key)[:, None]  # (B, 1)
    hashed = _splitmix64(streams + torch.arange(words, device=rows.device))  # (B, words)
    parts = torch.stack([(hashed >> shift) & 0xFFFF for shift in (0, 16, 32, 48)], dim=2)
    return parts.flatten(1)[:, :count].to(torch.float32) / 32768 - 1


def _splitmix64(state: Tensor) -> Tensor:
    """The SplitMix64 output function on int64 words, whose products wrap like unsigned ones."""
    state = state + (0x9E3779B97F4A7C15 - 2**64)
    state = (state ^ ((state >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    state = (state ^ ((state >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return state ^ ((state >> 31) & (2**33 - 1))


def _splitmix64_of_number(state: int) -> int:
    """The same for one number, without a tensor that would have to be copied to the device."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
    state ^= state >> 31
    return state - 2**64 if state >= 2**63 else state
