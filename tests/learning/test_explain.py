"""Heat maps are what the formula says, lie where the network looked, and depend on what it
learned.
"""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from tests.models import train
from xrai.learning.explain import MIN_CELLS, layer_cam
from xrai.learning.network import ResNet


def make_discs(
    num_images: int, *, size: int, seed: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Noise (N, size, size), the first half with a bright disc each, and where those discs are
    (N, size, size).
    """
    generator = np.random.default_rng(seed)
    images = generator.normal(90, 20, (num_images, size, size))
    y, x = np.mgrid[:size, :size]
    discs = np.zeros(images.shape, bool)
    for disc in discs[: num_images // 2]:
        centre_y, centre_x = generator.uniform(size * 0.25, size * 0.75, 2)
        disc[:] = (y - centre_y) ** 2 + (x - centre_x) ** 2 < (size / 7) ** 2
    return (images + 80 * discs).clip(0, 255).astype(np.uint8), discs


@pytest.fixture(scope="module")
def trained() -> ResNet:
    """A network that tells discs from noise."""
    torch.manual_seed(3)
    network = ResNet(width=8)
    images, discs = make_discs(128, size=64)
    train(network, images, np.asarray(discs.any(axis=(1, 2)), np.uint8), num_steps=60)
    return network


def grey(images: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(images)[:, None] / 255


# ---------------------------------------------------------------------------------------- reference


def by_hand(network: ResNet, image: Tensor, num_blocks: int) -> NDArray[np.float64]:
    """LayerCAM of one picture (1, 1, H, W) on the output of the first `num_blocks` blocks, by
    differences and loops.
    """
    with torch.no_grad():
        maps = network.blocks[:num_blocks](network.stem(network.standardize(image)))[0]  # (C, h, w)
        step = 1e-5
        moved = torch.eye(maps.numel(), dtype=maps.dtype).reshape(-1, *maps.shape) * step

        def logits(changed: Tensor) -> NDArray[np.float64]:
            pooled = network.blocks[num_blocks:](changed).mean(dim=(2, 3))
            found: NDArray[np.float64] = network.head(pooled).squeeze(1).numpy()
            return found

        gradients = ((logits(maps + moved) - logits(maps - moved)) / (2 * step)).reshape(maps.shape)
    num_channels, height, width = maps.shape
    coarse = np.zeros((height, width))
    for channel in range(num_channels):
        for i in range(height):
            for j in range(width):
                coarse[i, j] += max(gradients[channel, i, j], 0) * float(maps[channel, i, j])
    fine = np.zeros(image.shape[2:])
    for i in range(fine.shape[0]):
        for j in range(fine.shape[1]):
            y = min(max((i + 0.5) * height / fine.shape[0] - 0.5, 0), height - 1)
            x = min(max((j + 0.5) * width / fine.shape[1] - 0.5, 0), width - 1)
            top, left = math.floor(y), math.floor(x)
            low, right = min(top + 1, height - 1), min(left + 1, width - 1)
            fine[i, j] = (1 - (y - top)) * (
                (1 - (x - left)) * coarse[top, left] + (x - left) * coarse[top, right]
            ) + (y - top) * ((1 - (x - left)) * coarse[low, left] + (x - left) * coarse[low, right])
    scaled: NDArray[np.float64] = fine / fine.max()
    return scaled


@pytest.mark.parametrize(("height", "width", "num_blocks"), [(36, 44, 1), (64, 72, 2)])
def test_a_heat_map_is_what_differences_and_plain_loops_give(
    height: int, width: int, num_blocks: int
) -> None:
    torch.manual_seed(0)
    network = ResNet(width=8).double()
    image = torch.rand(1, 1, height, width, dtype=torch.float64)
    maps = network.blocks[:num_blocks](network.stem(network.standardize(image)))
    assert min(maps.shape[2:]) >= MIN_CELLS > min(maps.shape[2:]) / 2
    np.testing.assert_allclose(
        layer_cam(network, image)[0].numpy(), by_hand(network, image, num_blocks), atol=1e-6
    )


# ------------------------------------------------------------------------------------------ meaning


def test_heat_lies_on_what_the_network_was_taught_to_find(trained: ResNet) -> None:
    images, discs = make_discs(40, size=64, seed=1)
    with torch.no_grad():
        found = np.flatnonzero((trained(grey(images))[:, 0].numpy() > 0) & discs.any(axis=(1, 2)))
    assert len(found) >= 12, "the network has not learned its task"
    heat = layer_cam(trained, grey(images[found])).numpy()
    assert heat[discs[found]].sum() / heat.sum() > 2.5 * discs[found].mean()


def test_another_networks_heat_map_is_another_but_a_little_noise_changes_little(
    trained: ResNet,
) -> None:
    # the sanity check of Adebayo et al. 2018: maps that survive random weights show the picture,
    # not the network
    images = grey(make_discs(8, size=64, seed=2)[0][:4])
    own = layer_cam(trained, images)

    def likeness(scale: float) -> float:
        """Rank correlation with the maps of a network whose weights are mixed with random ones."""
        torch.manual_seed(5)
        other = ResNet(width=8)
        with torch.no_grad():
            for mine, theirs in zip(other.parameters(), trained.parameters(), strict=True):
                mine.mul_(scale).add_(theirs * (1 - scale))
        return float(spearmanr(own.flatten(), layer_cam(other, images).flatten()).statistic)

    assert likeness(0.001) > 0.95
    assert likeness(1.0) < 0.5


# ----------------------------------------------------------------------------------------- promises


def test_each_map_reaches_1_and_does_not_depend_on_the_images_beside_it(trained: ResNet) -> None:
    images = grey(make_discs(6, size=64, seed=4)[0])
    heat = layer_cam(trained, images)
    assert heat.shape == (6, 64, 64) and not heat.requires_grad
    assert float(heat.min()) >= 0 and torch.allclose(heat.amax(dim=(1, 2)), torch.ones(6))
    alone = torch.cat([layer_cam(trained, image[None]) for image in images])
    torch.testing.assert_close(heat, alone, atol=1e-4, rtol=0)


def test_where_nothing_speaks_for_pneumonia_the_map_is_zero(trained: ResNet) -> None:
    network = ResNet(width=8)
    with torch.no_grad():
        network.head.weight.fill_(-1)  # every feature speaks against it: features are not negative
        for name, parameter in network.blocks.named_parameters():
            if "branch_gain" in name or parameter.dim() == 4:  # convolutions
                parameter.zero_()
    assert not layer_cam(network, torch.rand(2, 1, 64, 64)).any()
    assert bool(torch.isfinite(layer_cam(trained, torch.zeros(1, 1, 64, 64))).all())


def test_nothing_of_the_network_is_changed_and_inference_mode_does_not_matter(
    trained: ResNet,
) -> None:
    images = grey(make_discs(2, size=64)[0])
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    expected = layer_cam(trained, images)
    with torch.inference_mode():
        found = layer_cam(trained, images * 1)
    assert torch.equal(found, expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())
    assert all(
        parameter.grad is None or not parameter.grad.isnan().any()
        for parameter in trained.parameters()
    )
    assert not any(block._forward_hooks for block in trained.blocks)
