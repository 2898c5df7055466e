"""The score of review: closed-form fits against plain references, invariants, and what it finds
on phantoms.
"""

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.distributed.ranks import run_ranks
from tests.learning.fakes import DISC, FakeLoader, make_discs
from tests.models import without_detail
from xrai.config import Config, Model, Optim, Train
from xrai.dataset.unlike import Unlike
from xrai.ingest.images import decode
from xrai.learning import loop
from xrai.learning.augment import augment
from xrai.learning.distributed import Ranks
from xrai.learning.network import Network
from xrai.learning.predictor import build_model, predict_split
from xrai.learning.typicality import (
    _NUM_FITTED,
    _NUM_SPOILED,
    SHIFT_SEED,
    SPOILED,
    VARIATION,
    Typicality,
    _strides,
    count_review,
    describe,
    fit_typicality,
)
from xrai.phantom import make_phantoms

Split = tuple[NDArray[np.uint8], NDArray[np.uint8]]  # (N, H, W) and (N,)

ONE = Ranks(0, 1, 0, 1, torch.device("cpu"))
FIT_ON_DISCS = """
import json
import torch
from tests.learning.test_typicality import fit_numbers
from xrai.learning.distributed import join
torch.set_num_threads(1)
with join(timeout_s=60) as ranks:
    print(json.dumps(fit_numbers(ranks, batch_size=32)))
"""


FITTED = ("mean", "offset", "scale", "both", "limit")


def fit_numbers(ranks: Ranks, *, batch_size: int) -> dict[str, list[float]]:
    """What a fit on discs comes to."""
    share: dict[str, Any] = {"rank": ranks.rank, "world_size": ranks.world_size}
    train = FakeLoader(*make_discs(150), batch_size=batch_size, shuffle=True, **share)
    val = FakeLoader(*make_discs(41, seed=1), batch_size=16, **share)
    unlike = make_unlike(37)
    state = fit_typicality(small_network(), train, val, ranks=ranks, unlike=unlike).state_dict()
    return {name: state[name].flatten().tolist() for name in FITTED}


def make_unlike(num_images: int) -> Unlike:
    """Discs that are smoother to the right, every third held out."""
    images = make_discs(num_images, seed=7)[0].astype(np.float64)
    smooth = (images + np.roll(images, 1, axis=1) + np.roll(images, -1, axis=1)) / 3
    images[:, :, 16:] = smooth[:, :, 16:]
    is_fitted = np.arange(num_images) % 3 > 0
    return Unlike("own", ("0" * 64,), images.astype(np.uint8)[:, None], is_fitted, num_images)


def small_network(seed: int = 0, *, name: Literal["resnet10", "resnet18"] = "resnet10") -> Network:
    torch.manual_seed(seed)
    return build_model(Model(name=name, width=8), 1).double().eval()


def fit_on_discs(
    network: Network, *, num_images: int = 150, num_val: int = 60, share: float = 0.05
) -> Typicality:
    train, val = (
        FakeLoader(*make_discs(number, seed=seed), batch_size=32)
        for number, seed in ((num_images, 0), (num_val, 1))
    )
    return fit_typicality(network, train, val, ranks=ONE, share=share)


def to_grey(images: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(images)[:, None].double() / 255


@pytest.mark.parametrize("name", ["resnet10", "resnet18"])
@pytest.mark.parametrize("size", [16, 33, 64])
def test_the_logits_are_the_networks_own(name: Literal["resnet10", "resnet18"], size: int) -> None:
    network = small_network(name=name)
    images = torch.rand(5, 1, size, size, dtype=torch.float64)
    logits, groups = describe(network, images)
    assert torch.allclose(logits, network(images), atol=1e-12, rtol=0)
    assert all(group.shape[0] == 5 and group.isfinite().all() for group in groups)


def test_an_image_has_the_same_score_whatever_stands_beside_it() -> None:
    network = small_network()
    typicality = fit_on_discs(network)
    images = torch.cat(
        [to_grey(make_discs(4, seed=2)[0]), torch.rand(4, 1, 32, 32, dtype=torch.float64)]
    )
    together = typicality.atypicality(network, images)[1]
    alone = torch.cat([typicality.atypicality(network, image[None])[1] for image in images])
    assert torch.allclose(together, alone, atol=1e-10, rtol=1e-10)


def test_any_image_has_a_finite_score_that_is_not_negative() -> None:
    network = small_network()
    typicality = fit_on_discs(network).float()
    network = network.float()
    flat = [torch.full((1, 32, 32), value) for value in (0.0, 1 / 255, 0.5, 1.0)]
    dot = torch.zeros(1, 32, 32)
    dot[0, 7, 9] = 1.0
    checks = (torch.arange(32)[:, None] + torch.arange(32)).remainder(2)[None].float()
    scores = typicality.atypicality(
        network, torch.stack([*flat, dot, checks, torch.rand(1, 32, 32)])
    )[1]
    assert scores.isfinite().all() and (scores >= 0).all()


@pytest.mark.parametrize(("place", "group"), [(1, -2), (2, -1)], ids=["image", "detail"])
def test_distances_are_those_of_mahalanobis(place: int, group: int) -> None:
    network = small_network()
    typicality = fit_on_discs(network)
    train = to_grey(make_discs(150)[0])
    changed = augment(train, torch.arange(150), seed=SHIFT_SEED, epoch=0, strength=VARIATION)
    described = torch.cat([describe(network, part)[1][group] for part in (train, changed)])
    seen = described.detach().numpy()
    covariance = np.cov(seen.T, bias=True)
    covariance += np.diag(np.diag(covariance) * 0.01 + 1e-8)
    groups = describe(network, torch.rand(3, 1, 32, 32, dtype=torch.float64))[1]
    away = groups[group].detach().numpy() - seen.mean(axis=0)
    expected = np.sqrt(
        np.einsum("bi,ij,bj->b", away, np.linalg.inv(covariance), away) / away.shape[1]
    )
    found = typicality.measure(groups)[:, place].detach().numpy()
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("size", [16, 33, 64])
def test_detail_is_what_a_binomial_filter_takes_away(size: int) -> None:
    images = torch.rand(2, 1, size, size, dtype=torch.float64)
    weights = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
    found = describe(small_network(), images)[1][-1].detach().numpy()  # (2, 64)
    for image, own in zip(images[:, 0].numpy(), found, strict=True):
        seen = (image - image.mean()) / (image.std() + 1e-3)
        padded = np.pad(seen, 2, mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5))
        left = (seen - np.einsum("yxij,ij->yx", windows, weights)) ** 2
        step = size / 8  # a place begins and ends with whole pixels
        first = [(int(k * step), math.ceil((k + 1) * step)) for k in range(8)]
        means = [left[top:low, start:stop].mean() for top, low in first for start, stop in first]
        assert own == pytest.approx(np.log(np.array(means) + 1e-4) / 2, abs=1e-9)


def test_the_mean_of_two_distances_stands_in_the_place_of_the_one_of_features() -> None:
    network = small_network()
    typicality = fit_on_discs(network)
    images = to_grey(make_discs(9, seed=3)[0])
    measured = typicality.measure(describe(network, images)[1])
    scaled = (measured - typicality.offset) / typicality.scale
    low, high = typicality.both
    mean = ((scaled[:, 0] + scaled[:, 2]) / 2 - low) / high
    largest = torch.stack([mean, scaled[:, 1], *scaled[:, 3:].T]).amax(dim=0)
    expected = (largest / typicality.limit).clamp_min(0)
    assert torch.allclose(typicality.atypicality(network, images)[1], expected)


def test_the_mean_of_two_distances_is_scaled_at_its_92nd_percentile() -> None:
    network = small_network()
    typicality = fit_on_discs(network)
    val = to_grey(make_discs(60, seed=1)[0])
    copies = [
        augment(val, torch.arange(60), seed=SHIFT_SEED, epoch=draw, strength=VARIATION)
        for draw in (0, 1)
    ]
    measured = typicality.measure(describe(network, torch.cat([val, *copies]))[1])
    mean = ((measured - typicality.offset) / typicality.scale)[:, [0, 2]].mean(dim=1)
    low, high = typicality.both.tolist()
    expected = torch.quantile(mean, torch.tensor([0.5, 0.92], dtype=torch.float64)).tolist()
    assert [low, low + high] == pytest.approx(expected, rel=1e-9)


def test_a_score_without_detail_is_the_maximum_of_its_own_numbers() -> None:
    network = small_network()
    typicality = fit_on_discs(network)
    earlier = Typicality(**without_detail(typicality.state_dict()))
    images = to_grey(make_discs(9, seed=3)[0])
    measured = typicality.measure(describe(network, images)[1])
    scaled = ((measured - typicality.offset) / typicality.scale)[:, [0, 1, *range(3, 14)]]
    expected = (scaled.amax(dim=1) / typicality.limit).clamp_min(0)
    assert torch.allclose(earlier.atypicality(network, images)[1], expected)


def test_the_limit_leaves_the_share_that_was_asked_for() -> None:
    network = small_network()
    val = make_discs(60, seed=1)
    for share in (0.02, 0.2):
        typicality = fit_on_discs(network, share=share)
        loader = FakeLoader(*val, batch_size=16)
        plain = predict_split(network, loader, ranks=ONE, typicality=typicality)
        shifted = predict_split(
            network, loader, ranks=ONE, typicality=typicality, shift=VARIATION, draws=2
        )
        assert plain.atypicality is not None and shifted.atypicality is not None
        scores = np.concatenate([plain.atypicality.ravel(), shifted.atypicality.ravel()])
        assert np.mean(scores > 1) == pytest.approx(share, abs=1 / len(scores))


def test_unlike_images_that_are_held_out_go_to_review_and_no_more_validation_images_do() -> None:
    network, unlike = small_network(), make_unlike(60)
    train, val = (FakeLoader(*make_discs(n, seed=n), batch_size=32) for n in (150, 90))
    usual, fitted = (
        fit_typicality(network, train, val, ranks=ONE, unlike=given) for given in (None, unlike)
    )
    assert count_review(network, fitted, unlike, ranks=ONE) == 20  # all that are held out
    assert fitted.directions.shape[1] == usual.directions.shape[1] + 1
    for shift, draws in ((None, 1), (VARIATION, 2)):
        shares = []
        for typicality in (usual, fitted):
            found = predict_split(
                network, val, ranks=ONE, typicality=typicality, shift=shift, draws=draws
            ).atypicality
            assert found is not None
            shares.append(float(np.mean(found > 1)))
        assert shares[1] <= shares[0] + 1 / 90, shift


def test_one_validation_image_is_enough_to_go_on() -> None:
    network = small_network()
    typicality = fit_on_discs(network, num_images=2, num_val=1)
    scores = typicality.atypicality(network, to_grey(make_discs(3, seed=4)[0]))[1]
    assert scores.isfinite().all()


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_images_are_other_images_and_each_is_spoiled_by_its_own_number(name: str) -> None:
    images = to_grey(make_discs(6)[0])
    draws = torch.rand(6, 56, dtype=torch.float64) * 2 - 1
    spoiled = SPOILED[name](images, draws)
    assert spoiled.shape == images.shape and spoiled.min() >= 0 and spoiled.max() <= 1
    assert (spoiled - images).abs().mean(dim=(1, 2, 3)).min() > 0.01
    assert torch.allclose(SPOILED[name](images[2:3], draws[2:3]), spoiled[2:3], atol=1e-12)


@pytest.mark.parametrize("size", [16, 32, 50])
def test_a_shuffled_image_has_the_same_tiles(size: int) -> None:
    images = torch.arange(size * size, dtype=torch.float64).reshape(1, 1, size, size)
    shuffled = SPOILED["shuffled"](images, torch.linspace(1, -1, 56, dtype=torch.float64)[None])
    if size % 4 == 0:
        assert torch.equal(shuffled.flatten().sort().values, images.flatten())
        tile = size // 4  # these draws turn the order of the tiles round
        assert torch.equal(shuffled[0, 0, :tile, :tile], images[0, 0, -tile:, -tile:])


def test_a_state_gives_the_same_scores() -> None:
    network = small_network()
    typicality = fit_on_discs(network)
    images = torch.rand(4, 1, 32, 32, dtype=torch.float64)
    again = Typicality(**typicality.state_dict())
    assert torch.equal(
        again.atypicality(network, images)[1], typicality.atypicality(network, images)[1]
    )


def test_the_state_of_the_reference_network_is_small() -> None:
    torch.manual_seed(0)
    typicality = fit_on_discs(build_model(Model(), 1))
    assert (
        sum(tensor.numel() * tensor.element_size() for tensor in typicality.buffers()) < 1_000_000
    )


@pytest.mark.distributed
def test_the_fit_does_not_depend_on_the_ranks_and_the_batches() -> None:
    one = fit_numbers(ONE, batch_size=64)
    for other in (fit_numbers(ONE, batch_size=10), *run_ranks(["-c", FIT_ON_DISCS], world_size=2)):
        for name, values in one.items():
            assert other[name] == pytest.approx(values, rel=1e-7, abs=1e-9), name


# ------------------------------------------------------------------------------------ what it finds


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Split]:
    """Phantoms at 32 pixels, of other patients in each split."""
    folder = tmp_path_factory.mktemp("phantoms")
    make_phantoms(folder, num_images=240, seed=5, workers=1)
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".png", ".jpeg", ".jpg"))
    images = np.stack(
        [decode(path.read_bytes(), size=32, fit="crop", max_pixels=10**8) for path in paths]
    )
    labels = np.array(["PNEUMONIA" in str(path) for path in paths], np.uint8)
    part = np.arange(len(images)) % 6
    chosen = {"val": part == 0, "test": part == 1, "train": part >= 2}
    return {name: (images[rows], labels[rows]) for name, rows in chosen.items()}


@pytest.fixture(scope="module")
def trained(phantoms: dict[str, Split]) -> tuple[Network, Typicality]:
    torch.manual_seed(0)
    config = Config(
        model=Model(width=8),
        optim=Optim(ema_decay=0.9),
        train=Train(epochs=4, global_batch_size=32, precision="off"),
    )
    network = build_model(config.model, 1)
    labels = phantoms["train"][1]
    train, val = (
        FakeLoader(*phantoms[split], batch_size=32, shuffle=split == "train")
        for split in ("train", "val")
    )
    setup = loop.Setup(
        config,
        ONE,
        train,
        val,
        labels=DISC,
        counts=((int(labels.sum()), len(labels)),),
        val_labels=phantoms["val"][1],
        after_epoch=lambda result: 0.0,
    )
    loop.fit(network, setup)
    return network, fit_typicality(network, train, val, ranks=ONE)


def share_to_review(trained: tuple[Network, Typicality], images: NDArray[np.uint8]) -> float:
    loader = FakeLoader(images, np.zeros(len(images), np.uint8), batch_size=64)
    scores = predict_split(trained[0], loader, ranks=ONE, typicality=trained[1]).atypicality
    assert scores is not None
    return float(np.mean(scores > 1))


def test_held_out_phantoms_do_not_go_to_review(
    trained: tuple[Network, Typicality], phantoms: dict[str, Split]
) -> None:
    assert share_to_review(trained, phantoms["test"][0]) <= 0.2


@pytest.mark.parametrize("kind", ["inverted", "upside down", "turned", "noise", "gradient", "flat"])
def test_what_is_no_upright_chest_x_ray_goes_to_review(
    kind: str, trained: tuple[Network, Typicality], phantoms: dict[str, Split]
) -> None:
    films = phantoms["test"][0]
    generator = np.random.default_rng(0)
    slope = np.broadcast_to(np.arange(32, dtype=np.uint8) * 8, (8, 32, 32))
    foreign = {
        "inverted": 255 - films,
        "upside down": films[:, ::-1],
        "turned": np.rot90(films, axes=(1, 2)),
        "noise": generator.integers(0, 256, (50, 32, 32), np.uint8),
        "gradient": np.concatenate(
            [slope, slope[:, :, ::-1], slope.swapaxes(1, 2), 255 - slope.swapaxes(1, 2)]
        ),
        "flat": np.repeat(np.array([0, 1, 128, 255], np.uint8), 32 * 32).reshape(4, 32, 32),
    }
    assert share_to_review(trained, np.ascontiguousarray(foreign[kind])) >= 0.9


def test_each_direction_finds_the_images_that_it_was_fitted_for(
    trained: tuple[Network, Typicality], phantoms: dict[str, Split]
) -> None:
    network, typicality = trained
    films = to_grey(phantoms["test"][0]).float()
    draws = torch.rand(len(films), 56, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for place, change in enumerate(SPOILED.values(), start=3):
        plain, spoiled = (
            typicality.measure(describe(network, seen)[1])[:, place]
            for seen in (films, change(films, draws))
        )
        # not by the scale: it is that of the farthest of 40 images, another on another processor
        assert spoiled.median() > plain.quantile(0.9)


@pytest.mark.parametrize("num_images", [100, 5_216, 8_192, 9_000, 86_524, 1_000_000])
def test_of_any_number_of_images_enough_are_fitted_and_spoiled(num_images: int) -> None:
    stride, spoiled_every = _strides(num_images)
    num_fitted = len(range(0, num_images, stride))
    num_spoiled = len(range(0, num_fitted, spoiled_every))
    assert min(num_images, _NUM_FITTED // 2) <= num_fitted <= _NUM_FITTED
    assert min(num_images, _NUM_SPOILED // 2) <= num_spoiled <= _NUM_SPOILED
