"""How unlike the training images an image is; above a limit it goes to review without a class.

A network gives every image a probability, even a photograph. The score here says whether the image
is in distribution. It is the largest of several numbers, each scaled to 0 for the median validation
image and 1 for the 99th percentile:

- the mean of two Mahalanobis distances from the training images: of the network's features, after
  each block (Lee et al. 2018, https://arxiv.org/abs/1807.03888), and of the image's fine detail.
  Images of adults are moderately unlike in both; the mean counts as 1 at its 92nd percentile,
- the same distance of the image itself, reduced to 16 x 16,
- where a site has given images to be sent to review, how far it lies in the direction of those,
- for each way to spoil an image in `SPOILED` (inverted, turned, cut out, ...): how far it lies in
  the direction in which training images move when they are spoiled so (Fisher's linear
  discriminant). Outliers made from training images stand in for real ones (outlier exposure,
  Hendrycks et al. 2019, https://arxiv.org/abs/1812.04606).

Everything is fitted in closed form from sums over training images, so it does not depend on the
number of ranks; the limit is chosen on validation images. docs/decisions/0008-review.md and
0025-adult-films.md say what was tried, what it finds and what it misses.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from xrai.config import Augment
from xrai.dataset.unlike import Unlike
from xrai.learning.augment import augment, uniform
from xrai.learning.batch import Loader, to_grey
from xrai.learning.distributed import Ranks
from xrai.learning.network import Network, Standardize

SHIFT_SEED = 20_180_222  # the draws that stand for other hospitals are the same in every run
REVIEW_SHARE = 0.06  # of validation images, augmented ones included, that the limit sends to review
# How X-rays of one kind may differ; independent of the recipe's augmentation, which may be stronger
VARIATION = Augment(
    rotation_deg=10.0,
    scale=0.12,
    shift=0.10,
    aspect=0.08,
    shear=0.06,
    gamma=0.4,
    contrast=0.3,
    blur=0.5,
    noise=0.04,
)
_THUMBNAIL_SIZE = 16
_NUM_PLACES = 8  # along each side, in which fine detail is measured
_NUM_DETAIL = _NUM_PLACES**2  # numbers of the last group of a description
_MAX_CHANNELS = 512  # of all stages together; where there are more, each stage gets an equal share
_NUM_FITTED = 8192  # training images behind mean and covariance, at most
_NUM_SPOILED = 1024  # training images that are spoiled, at most
# The quantiles of validation images at which these numbers count as 1, in place of the 99th
# percentile: the lower it is, the more of what goes to review is due to that number
_MEAN_QUANTILE = 0.92  # the mean of two distances
_MEAN_QUANTILE_BESIDE_UNLIKE = 0.96  # the same where there is a direction of `Unlike`
_UNLIKE_QUANTILE = 0.97  # this direction
_NUM_DRAWS = 2  # augmented copies of each validation image
_DISTANCE_SHRINKAGE = 0.01  # of each variance, added to it, so that none is 0 in any direction
_DIRECTION_SHRINKAGE = 0.03
_DIRECTION_RIDGE = 0.1
_FARTHEST = 20.0  # standard deviations at which a spoiled image's pull on its direction is capped


class Typicality(nn.Module):
    """The fitted score, made by `fit_typicality`. Its tensors are constants, given by name.

    Besides those below there are `whitening_0` and so on, (d, d), one for each group of the
    description. A score that an earlier version of xrai fitted lacks `both`: it has no distance of
    the detail, and its maximum is over M = 2 + K numbers.
    """

    mean: Tensor  # (D,)
    directions: Tensor  # (D, K)
    offset: Tensor  # (M,), M = 3 + K: medians of distances and directions
    scale: Tensor  # (M,) 99th percentiles less medians
    both: Tensor  # (2,) median of the mean of two scaled distances, and a percentile less this
    limit: Tensor  # ()

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    @property
    def has_detail(self) -> bool:
        """Whether the score measures fine detail, as those of model.pt from version 5 do."""
        return hasattr(self, "both")

    def atypicality(self, network: Network, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C) and scores (B,) of grey values (B, 1, H, W) in [0, 1]; above 1: review.

        A score is at least 0, finite for any image, and does not depend on the rest of the batch.
        """
        logits, groups = describe(network, images)
        scaled = self.measure(groups).sub(self.offset).div(self.scale)
        if self.has_detail:
            scaled = _with_mean(scaled, self.both)
        return logits, scaled.amax(dim=1).div(self.limit).clamp_min(0)

    def measure(self, groups: list[Tensor]) -> Tensor:
        """The distances of features, image and detail and the positions along all directions,
        (B, M), not yet scaled.
        """
        used = groups if self.has_detail else groups[:-1]
        centered = torch.cat(used, dim=1) - self.mean  # (B, D)
        whitenings = [own for name, own in self.named_buffers() if name.startswith("whitening_")]
        parts = centered.split([len(whitening) for whitening in whitenings], dim=1)
        squares = [
            (part @ own).square().mean(dim=1) for part, own in zip(parts, whitenings, strict=True)
        ]
        num_features = len(squares) - (2 if self.has_detail else 1)
        features = torch.stack(squares[:num_features]).mean(dim=0)
        distances = torch.stack([features, *squares[num_features:]], dim=1).sqrt()
        return torch.cat([distances, centered @ self.directions], dim=1)


def _with_mean(scaled: Tensor, both: Tensor) -> Tensor:
    """Scaled distances and directions (B, M), with the distances of features and of detail replaced
    by their mean, which `both` scales again: (B, M - 1).
    """
    mean = (scaled[:, :1] + scaled[:, 2:3]) / 2
    return torch.cat([(mean - both[0]) / both[1], scaled[:, 1:2], scaled[:, 3:]], dim=1)


def describe(network: Network, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The network's logits (B, C) and the description of grey values (B, 1, H, W) in [0, 1].

    The description is a group (B, d) for each stage, logarithms of the means and standard
    deviations of its maps, one for the standardized image at 16 x 16, and one for its fine detail.
    """
    logits, stages = network.look(images)
    num_channels = sum(maps.shape[1] for maps in stages)
    share = num_channels if num_channels <= _MAX_CHANNELS else _MAX_CHANNELS // len(stages)
    groups = [_summarize(maps, share) for maps in stages]
    standardized = Standardize()(images)
    small = functional.adaptive_avg_pool2d(standardized, _THUMBNAIL_SIZE).flatten(1)  # (B, 256)
    centered = small - small.mean(dim=1, keepdim=True)
    deviation = centered.square().mean(dim=1, keepdim=True).sqrt()
    return logits, [*groups, centered / (deviation + 1e-2), _detail(standardized)]


def _detail(standardized: Tensor) -> Tensor:
    """Logarithms (B, 64) of the root mean square, in 8 x 8 places, of what a binomial filter of
    5 x 5 takes away from images (B, 1, H, W).
    """
    smooth = functional.pad(standardized, (2, 2, 2, 2), mode="reflect")
    for side in (2, 3):
        for _ in range(4):  # sums of neighbours: an eighth of the time of conv2d on a CPU
            num = smooth.shape[side] - 1
            smooth = smooth.narrow(side, 0, num) + smooth.narrow(side, 1, num)
    energy = functional.adaptive_avg_pool2d((standardized - smooth / 256).square(), _NUM_PLACES)
    return energy.flatten(1).add(1e-4).log() / 2


def _summarize(maps: Tensor, max_channels: int) -> Tensor:
    """Log mean of the positive part and log standard deviation of each map of (B, C, h, w), as
    (B, 2 C). With more than `max_channels` maps, both are first averaged over neighbouring maps.
    """
    deviation = (maps - maps.mean(dim=(2, 3), keepdim=True)).square().mean(dim=(2, 3))
    numbers = torch.stack([maps.relu().mean(dim=(2, 3)), deviation.add(1e-6).sqrt()], dim=1)
    if maps.shape[1] > max_channels:
        numbers = functional.adaptive_avg_pool1d(numbers, max_channels)
    return numbers.flatten(1).clamp_min(0).add(0.02).log()


Draws = Tensor  # (B, 56) in [-1, 1), a row for each image
Range = tuple[float, float]
Change = Callable[[Tensor, Draws], Tensor]  # of images (B, 1, H, W)
Pixels = tuple[NDArray[np.uint8], NDArray[np.int64]]  # (n, 1, H, W), and (n,) numbers in the split


def _resize(images: Tensor, draws: Draws, *, width: Range, height: Range, shift: float) -> Tensor:
    """Images magnified by factors from the two ranges and shifted; beyond the edge, mirrored."""
    theta = images.new_zeros(len(images), 2, 3)
    for axis, (low, high) in enumerate((width, height)):
        theta[:, axis, axis] = 1 / (low + (high - low) * (draws[:, axis] + 1) / 2)
        theta[:, axis, 2] = shift * draws[:, 2 + axis]
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _enlarge(coarse: Tensor, like: Tensor, mode: str) -> Tensor:
    return functional.interpolate(coarse, size=like.shape[2:], mode=mode, align_corners=False)


def _shuffle(images: Tensor, draws: Draws) -> Tensor:
    """Images as 4 x 4 tiles in another order."""
    tall, wide = (side // 4 for side in images.shape[2:])
    tiles = images[:, 0, : 4 * tall, : 4 * wide].unflatten(2, (4, wide)).unflatten(1, (4, tall))
    tiles = tiles.transpose(2, 3).flatten(1, 2)  # (B, 16, tall, wide)
    order = draws[:, 4:20].argsort(dim=1)[:, :, None, None].expand_as(tiles)
    mixed = tiles.gather(1, order).unflatten(1, (4, 4)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return functional.interpolate(mixed[:, None], size=images.shape[2:], mode="nearest")


# Ways to make images (B, 1, H, W) in [0, 1] out-of-distribution. Chests that are too narrow are not
# among them, because a wide image squashed to a square looks like this
SPOILED: Mapping[str, Change] = {
    "inverted": lambda images, draws: 1 - images,
    "turned left": lambda images, draws: images.rot90(1, (2, 3)),
    "turned right": lambda images, draws: images.rot90(-1, (2, 3)),
    "upside down": lambda images, draws: images.flip((2, 3)),
    "upside down in the mirror": lambda images, draws: images.flip(2),
    "cut out": partial(_resize, width=(1.4, 3.0), height=(1.4, 3.0), shift=0.4),
    "too wide": partial(_resize, width=(1.25, 1.6), height=(1.0, 1.25), shift=0.05),
    "too small": partial(_resize, width=(0.4, 0.7), height=(0.4, 0.7), shift=0.2),
    "shuffled": _shuffle,
    "clouds": lambda images, draws: _enlarge(
        (draws[:, 20:].reshape(-1, 1, 6, 6) + 1) / 2, images, "bicubic"
    ).clamp(0, 1),
    "blurred": lambda images, draws: _enlarge(
        functional.adaptive_avg_pool2d(images, 8), images, "bilinear"
    ),
}


@torch.no_grad()
def fit_typicality(
    network: Network,
    train: Loader,
    val: Loader,
    *,
    ranks: Ranks,
    share: float = REVIEW_SHARE,
    unlike: Unlike | None = None,
) -> Typicality:
    """Fit the score on the training split and its limit on the validation split, over all ranks.

    The limit sends the share `share` of the validation images, as they are and changed by
    `VARIATION`, to review. Memory does not grow with the training split. `unlike` adds a direction,
    towards those of its images that are not held out. It does not raise the share of validation
    images that go to review, neither of all nor of the unchanged ones.
    """
    network = network.eval().for_inference()
    fit = _Fit(network, ranks, next(train.epoch(0)).images.shape[-1])
    mean, covariance, sample = fit.moments(train)
    whole = _whitening(covariance, _DIRECTION_SHRINKAGE)  # (D, D), upper triangular
    whitening = whole[:-_NUM_DETAIL, :-_NUM_DETAIL]  # so this one whitens all but the detail
    spoiled = [
        fit.direction(change, sample, mean[:-_NUM_DETAIL], whitening) for change in SPOILED.values()
    ]
    directions = list(functional.pad(torch.stack(spoiled), (0, _NUM_DETAIL)))
    if unlike is not None:
        directions.append(fit.direction_to(unlike.images[unlike.is_fitted], mean, whole))
    tensors = {"mean": mean, "directions": torch.stack(directions, dim=1)}
    ends = pairwise(np.cumsum([0, *fit.sizes]))
    whitenings = {
        f"whitening_{number}": _whitening(covariance[low:high, low:high], _DISTANCE_SHRINKAGE)
        for number, (low, high) in enumerate(ends)
    }
    unscaled = Typicality(**tensors, **whitenings, both=mean.new_tensor([0.0, 1.0])).to(fit.dtype)
    scaling = _scaling(fit.measured(unscaled, val), share, has_unlike=unlike is not None)
    tensors |= {name: each.to(mean.device) for name, each in scaling.items()}
    return Typicality(**tensors, **whitenings).to(fit.dtype)


def _scaling(values: Tensor, share: float, *, has_unlike: bool) -> dict[str, Tensor]:
    """Offsets, scales and the limit, float64, from the measurements (n, 3, M) of validation images,
    the first of three without changes. `has_unlike`: the last direction is that of `Unlike`.
    """
    flat = values.flatten(0, 1)
    offset, scale = _offset_and_scale(flat, 0.99)
    if has_unlike:
        offset[-1:], scale[-1:] = _offset_and_scale(flat[:, -1:], _UNLIKE_QUANTILE)
    scaled = (flat - offset) / scale
    usual = scaled[:, :-1] if has_unlike else scaled
    both = _scale_of_mean(usual, _MEAN_QUANTILE)
    largest = _with_mean(usual, both).amax(dim=1)
    limit = _quantile(largest, 1 - share)
    if has_unlike:
        passed = _unchanged(largest <= limit, values).double().mean()
        both = _scale_of_mean(usual, _MEAN_QUANTILE_BESIDE_UNLIKE)
        largest = _with_mean(scaled, both).amax(dim=1)
        of_unchanged = _quantile(_unchanged(largest, values), float(passed))
        limit = max(_quantile(largest, 1 - share), of_unchanged)
    assert math.isfinite(limit)
    limits = flat.new_tensor(max(limit, 1e-6))
    return {"offset": offset, "scale": scale, "both": both, "limit": limits}


def _scale_of_mean(scaled: Tensor, quantile: float) -> Tensor:
    """`Typicality.both`, (2,), from scaled distances and directions (n, M)."""
    means = _with_mean(scaled, scaled.new_tensor([0.0, 1.0]))[:, :1]
    return torch.cat(_offset_and_scale(means, quantile))


def _unchanged(flat: Tensor, values: Tensor) -> Tensor:
    """The entries for unchanged images, (N,), of `flat`, which has one for each of `values`
    (N, 3, M).
    """
    unchanged: Tensor = flat.unflatten(0, values.shape[:2])[:, 0]
    return unchanged


def _quantile(values: Tensor, quantile: float) -> float:
    return float(np.quantile(values.numpy(), quantile))


def _offset_and_scale(values: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """The median of each column of (n, M), and how far the quantile is above it."""
    offset, top = np.quantile(values.numpy(), (0.5, quantile), axis=0)
    return torch.from_numpy(offset), torch.from_numpy(np.maximum(top - offset, 1e-6))


@torch.inference_mode()
def count_review(network: Network, typicality: Typicality, unlike: Unlike, *, ranks: Ranks) -> int:
    """How many of the images of `unlike` that are held out go to review; each rank counts all."""
    dtype = next(network.parameters()).dtype
    held_out = unlike.images[~unlike.is_fitted]
    num = 0
    for start in range(0, len(held_out), 64):
        grey = to_grey(held_out[start : start + 64], ranks.device, dtype)
        grey = grey.contiguous(memory_format=torch.channels_last)
        num += int((typicality.atypicality(network, grey)[1] > 1).sum())
    return num


class _Fit:
    """The passes over images that a fit takes."""

    def __init__(self, network: Network, ranks: Ranks, image_size: int) -> None:
        self._network, self._ranks = network, ranks
        self.dtype = next(network.parameters()).dtype
        blank = torch.zeros(1, 1, image_size, image_size, device=ranks.device, dtype=self.dtype)
        self.sizes = [group.shape[1] for group in describe(network, blank)[1]]

    def moments(self, train: Loader) -> tuple[Tensor, Tensor, list[Pixels]]:
        """Mean (D,) and covariance (D, D) of training images, as they are and augmented.

        Also returns this rank's sample of them to spoil.
        """
        sums = _Sums(sum(self.sizes), self._ranks.device)
        sample: list[Pixels] = []
        stride, spoiled_every = _strides(train.num_images)
        for pixels, numbers in _every(stride, train):
            images, rows = self._to_device(pixels, numbers)
            augmented = augment(images, rows, seed=SHIFT_SEED, epoch=0, strength=VARIATION)
            for seen in (images, augmented):
                sums.add(torch.cat(self._describe(seen), dim=1))
            chosen = numbers // stride % spoiled_every == 0
            sample.append((pixels[chosen], numbers[chosen]))
        return *sums.reduce(self._ranks), sample

    def direction(
        self, change: Change, sample: list[Pixels], mean: Tensor, whitening: Tensor
    ) -> Tensor:
        """The direction (D,) that best separates images spoiled by `change` from training images.

        The covariance of training images is 1 after whitening.
        """
        sums = _Sums(len(mean), self._ranks.device)
        for pixels, numbers in _rebatch(sample):
            images, rows = self._to_device(pixels, numbers)
            draws = uniform(rows, 56, seed=SHIFT_SEED, epoch=0).to(self.dtype)
            spoiled = torch.cat(self._describe(change(images, draws))[:-1], dim=1)
            sums.add(((spoiled.double() - mean) @ whitening).clamp(-_FARTHEST, _FARTHEST))
        return _discriminant(*sums.reduce(self._ranks), whitening)

    def direction_to(self, unlike: NDArray[np.uint8], mean: Tensor, whitening: Tensor) -> Tensor:
        """The same towards images (n, 1, H, W) that every rank has."""
        sums = _Sums(len(mean), self._ranks.device)
        own = unlike[self._ranks.rank :: self._ranks.world_size]
        for start in range(0, len(own), 256):
            grey = to_grey(own[start : start + 256], self._ranks.device, self.dtype)
            described = torch.cat(self._describe(grey), dim=1).double()
            sums.add(((described - mean) @ whitening).clamp(-_FARTHEST, _FARTHEST))
        return _discriminant(*sums.reduce(self._ranks), whitening)

    def measured(self, fitted: Typicality, val: Loader) -> Tensor:
        """What `fitted` measures on all validation images, as they are and augmented, (N, 3, M)
        float64.
        """
        found = []
        for pixels, numbers in _every(1, val):
            images, rows = self._to_device(pixels, numbers)
            augmented = [
                augment(images, rows, seed=SHIFT_SEED, epoch=draw, strength=VARIATION)
                for draw in range(_NUM_DRAWS)
            ]
            each = [fitted.measure(self._describe(seen)) for seen in (images, *augmented)]
            found.append(torch.stack(each, dim=1).double().cpu().numpy())
        parts = [part for own in self._ranks.gather(found) for part in own]
        return torch.from_numpy(np.concatenate(parts))

    def _to_device(
        self, pixels: NDArray[np.uint8], numbers: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor]:
        device = self._ranks.device
        return to_grey(pixels, device, self.dtype), torch.from_numpy(numbers).to(device)

    def _describe(self, images: Tensor) -> list[Tensor]:
        return describe(self._network, images.contiguous(memory_format=torch.channels_last))[1]


def _discriminant(moved: Tensor, spread: Tensor, whitening: Tensor) -> Tensor:
    """Fisher's linear discriminant (D,) from mean and covariance of whitened images; that of
    training images is 1.
    """
    pooled = (spread + torch.eye(len(moved), dtype=torch.float64, device=moved.device)) / 2
    pooled.diagonal().add_(_DIRECTION_RIDGE)
    direction: Tensor = whitening @ torch.linalg.solve(pooled, moved)
    return direction


class _Sums:
    """Count, sum and products of vectors (n, D), in float64."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._count = 0
        self._total = torch.zeros(size, dtype=torch.float64, device=device)
        self._products = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, vectors: Tensor) -> None:
        vectors = vectors.double()
        self._count += len(vectors)
        self._total += vectors.sum(dim=0)
        self._products += vectors.T @ vectors

    def reduce(self, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D) over all ranks."""
        count = torch.tensor([self._count], dtype=torch.float64)
        own = torch.cat([count, self._total.cpu(), self._products.flatten().cpu()])
        sums = ranks.sum(own).to(ranks.device)
        mean = sums[1 : len(self._total) + 1] / sums[0]
        products = sums[len(mean) + 1 :].view_as(self._products) / sums[0]
        return mean, products - torch.outer(mean, mean)


def _whitening(covariance: Tensor, shrinkage: float) -> Tensor:
    """The matrix (D, D) that gives centered rows unit covariance; variances are raised first."""
    raised = covariance + torch.diag(covariance.diagonal().clamp_min(0) * shrinkage + 1e-8)
    whitening: Tensor = torch.linalg.inv(torch.linalg.cholesky(raised)).T.contiguous()
    return whitening


def _strides(num_images: int) -> tuple[int, int]:
    """(n, m): every n-th training image is fitted, and every m-th of these is spoiled."""
    stride = math.ceil(num_images / _NUM_FITTED)
    return stride, math.ceil(math.ceil(num_images / stride) / _NUM_SPOILED)


def _every(stride: int, loader: Loader) -> Iterator[Pixels]:
    """This rank's images of a split whose number is a multiple of `stride`."""
    for batch in loader.epoch(0):
        chosen = batch.rows % stride == 0
        if chosen.any():
            yield batch.images[chosen], batch.rows[chosen]


def _rebatch(parts: list[Pixels]) -> Iterator[Pixels]:
    """The same images in batches of 256: parts may be too small to compute efficiently."""
    if parts:
        pixels, numbers = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        for start in range(0, len(numbers), 256):
            yield pixels[start : start + 256], numbers[start : start + 256]
