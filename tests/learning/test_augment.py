import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xrai.config import Augment
from xrai.learning.augment import _splitmix64, _splitmix64_of_number, augment, uniform

STILL = Augment(
    rotation_deg=0, scale=0, shift=0, aspect=0, shear=0, gamma=0, contrast=0, blur=0, noise=0
)


def still(**changes: float) -> Augment:
    return Augment(**{**vars(STILL), **changes})


def pictures(count: int, size: int = 24) -> torch.Tensor:
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    return torch.stack(
        [
            0.2 + 0.6 * torch.exp(-8 * ((x - 0.4) ** 2 + (y - 0.01 * k - 0.5) ** 2))
            for k in range(count)
        ]
    )[:, None]


def test_splitmix64_gives_the_published_first_outputs_of_seed_0() -> None:
    golden = -(0x10000000000000000 - 0x9E3779B97F4A7C15)
    states = torch.tensor([0, golden])
    assert [int(word) % 2**64 for word in _splitmix64(states)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
    ]


@given(st.integers(-(2**63), 2**63 - 1))
def test_a_number_is_hashed_as_a_tensor_is(state: int) -> None:
    assert _splitmix64_of_number(state) == int(_splitmix64(torch.tensor(state)))


def test_uniform_numbers_have_the_mean_deviation_and_independence_of_uniform_numbers() -> None:
    draws = uniform(torch.arange(500), 64, seed=3, epoch=5)
    assert draws.min() >= -1 and draws.max() < 1
    assert abs(float(draws.mean())) < 0.02
    assert float(draws.std()) == pytest.approx(1 / math.sqrt(3), abs=0.01)
    correlations = torch.corrcoef(draws.T) - torch.eye(64)
    assert (
        float(correlations.abs().max()) < 0.25
    )  # 1 / sqrt(500) is 0.045, and there are 2,016 pairs


@given(order=st.permutations(range(6)), epoch=st.integers(0, 50), seed=st.integers(0, 2**31 - 1))
def test_an_image_is_changed_alike_whatever_batch_it_stands_in(
    order: list[int], epoch: int, seed: int
) -> None:
    images, rows = pictures(6), torch.arange(100, 106)
    together = augment(images, rows, seed=seed, epoch=epoch, strength=Augment())
    shuffled = augment(images[order], rows[order], seed=seed, epoch=epoch, strength=Augment())
    assert torch.allclose(together[order], shuffled, atol=1e-6)
    alone = augment(images[2:3], rows[2:3], seed=seed, epoch=epoch, strength=Augment())
    assert torch.allclose(together[2:3], alone, atol=1e-6)


def test_seed_epoch_and_image_each_change_the_draw() -> None:
    images, rows = pictures(1).expand(2, -1, -1, -1), torch.tensor([7, 8])
    first = augment(images, rows, seed=0, epoch=0, strength=Augment())
    assert not torch.allclose(first[0], first[1], atol=1e-3)
    assert not torch.allclose(
        first, augment(images, rows, seed=0, epoch=1, strength=Augment()), atol=1e-3
    )
    assert not torch.allclose(
        first, augment(images, rows, seed=1, epoch=0, strength=Augment()), atol=1e-3
    )


def test_no_strength_leaves_images_as_they_are() -> None:
    images = pictures(5)
    changed = augment(images, torch.arange(5), seed=0, epoch=0, strength=STILL)
    assert torch.equal(changed, images)


def test_results_stay_grey_values_and_keep_the_dtype() -> None:
    images = pictures(8).double()
    changed = augment(
        images, torch.arange(8), seed=0, epoch=0, strength=Augment(noise=0.5, contrast=0.9)
    )
    assert changed.dtype == torch.float64 and changed.shape == images.shape
    assert float(changed.min()) >= 0 and float(changed.max()) <= 1


def centre_of_mass(image: torch.Tensor) -> tuple[float, float]:
    weights = (image - 0.2).clamp_min(0)
    y, x = torch.meshgrid(torch.arange(image.shape[0]), torch.arange(image.shape[1]), indexing="ij")
    total = weights.sum()
    return float((weights * y).sum() / total), float((weights * x).sum() / total)


def test_shift_moves_by_at_most_its_share_of_the_side() -> None:
    size = 64
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    image = (0.2 + 0.6 * torch.exp(-40 * (x**2 + y**2)))[None, None].expand(40, -1, -1, -1)
    moved = augment(image, torch.arange(40), seed=1, epoch=0, strength=still(shift=0.1))
    offsets = torch.tensor([centre_of_mass(picture[0]) for picture in moved]) - (size - 1) / 2
    assert float(offsets.abs().max()) <= 0.1 * size + 0.5
    assert float(offsets.abs().max()) > 0.07 * size  # and 80 draws come near it


def test_no_black_border_comes_in_where_an_image_is_moved() -> None:
    image = torch.full((40, 1, 32, 32), 0.6)
    strength = still(rotation_deg=20, scale=0.3, shift=0.2, aspect=0.4, shear=0.2)
    assert torch.allclose(
        augment(image, torch.arange(40), seed=1, epoch=0, strength=strength), image, atol=1e-5
    )


def test_rotation_by_up_to_180_degrees_keeps_a_round_image() -> None:
    size = 48
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    image = (0.6 * torch.exp(-12 * (x**2 + y**2)))[None, None].expand(10, -1, -1, -1)
    turned = augment(image, torch.arange(10), seed=1, epoch=0, strength=still(rotation_deg=180))
    assert torch.allclose(turned, image, atol=0.01)


def test_half_of_the_images_get_noise_of_at_most_the_asked_deviation() -> None:
    image = torch.full((200, 1, 32, 32), 0.5)
    noisy = augment(image, torch.arange(200), seed=1, epoch=0, strength=still(noise=0.05))
    deviations = noisy.std(dim=(1, 2, 3))
    assert float(deviations.max()) < 0.053
    assert float(deviations.mean()) == pytest.approx(0.0125, abs=0.003)
    assert 0.4 < float((deviations == 0).float().mean()) < 0.6
