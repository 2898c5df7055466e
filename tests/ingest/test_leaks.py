"""Perceptual hashes find copies that were saved anew, and pairs are found as a plain loop finds
them.
"""

import io
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from xrai.ingest import leaks
from xrai.ingest.images import decode
from xrai.ingest.leaks import (
    MAX_DISTANCE,
    NearPair,
    find_near_pairs,
    num_pairs,
    perceptual_hash,
    words_of,
)
from xrai.phantom import draw_phantom, encode, plan


def distance(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()


def words_by_split(hashes: Mapping[str, Sequence[str]]) -> dict[str, leaks.Words]:
    return {split: words_of(map(bytes.fromhex, texts)) for split, texts in hashes.items()}


def hash_of_film(picture: Image.Image, *, image_format: str = "PNG", **options: object) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return perceptual_hash(decode(buffer.getvalue(), size=64, fit="crop", max_pixels=10**8))


FILMS = [
    Image.open(io.BytesIO(encode(3, phantom, draw_phantom(3, phantom), image_format="png")))
    for _, phantom in zip(range(12), plan(3), strict=False)
]

CHANGES: dict[str, Callable[[Image.Image], str]] = {
    "saved as JPEG of low quality": lambda film: hash_of_film(
        film, image_format="JPEG", quality=50
    ),
    "made smaller": lambda film: hash_of_film(
        film.resize((film.width * 2 // 3, film.height * 2 // 3))
    ),
    "made brighter": lambda film: hash_of_film(ImageEnhance.Brightness(film).enhance(1.1)),
    "in colour": lambda film: hash_of_film(film.convert("RGB")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_copy_that_was_changed_a_little_stays_near(name: str) -> None:
    for film in FILMS:
        assert distance(hash_of_film(film), CHANGES[name](film)) <= MAX_DISTANCE


def test_different_images_are_far_from_each_other() -> None:
    hashes = [hash_of_film(film) for film in FILMS]
    distances = [distance(one, other) for k, one in enumerate(hashes) for other in hashes[k + 1 :]]
    assert min(distances) > MAX_DISTANCE


near_hashes = st.lists(
    st.lists(st.integers(0, 255), max_size=40).map(
        lambda bits: (
            f"{sum(1 << bit for bit in set(bits)):064x}"
        )  # at most 40 bits from zero: many pairs are near
    ),
    max_size=12,
)


@given(
    train=near_hashes,
    val=near_hashes,
    test=near_hashes,
    block=st.integers(1, 5),
    max_exact=st.sampled_from([0, 50, 999]),
)
def test_pairs_are_those_that_a_plain_loop_finds(
    train: list[str], val: list[str], test: list[str], block: int, max_exact: int
) -> None:
    hashes = {"train": train, "val": val, "test": test}
    compared: list[int] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("_BLOCK", "_ROWS_A_LOOK", "_MAX_CANDIDATES"):
            monkeypatch.setattr(leaks, name, block)
        monkeypatch.setattr(leaks, "_MAX_EXACT_PAIRS", max_exact)
        found = find_near_pairs(words_by_split(hashes), on_done=compared.append)
    for (split, other), pairs in found.items():
        expected = [
            NearPair(distance(a, b), i, j)
            for i, a in enumerate(hashes[split])
            for j, b in enumerate(hashes[other])
            if distance(a, b) <= MAX_DISTANCE
        ]
        assert pairs == sorted(expected)
    assert set(found) == {("train", "val"), ("train", "test"), ("val", "test")}
    assert sum(compared) == num_pairs(words_by_split(hashes))


# ------------------------------------------------------------------ more pairs than can be compared


def hashes_apart(num: int, *, bits: int, seed: int) -> tuple[list[str], list[str]]:
    """Two lists of random hashes; the k-th of one and the k-th of the other differ in `bits`
    bits.
    """
    generator = np.random.default_rng(seed)
    one = generator.integers(0, 2, (num, 256), dtype=np.uint8)
    other = one.copy()
    for row in other:
        row[generator.permutation(256)[:bits]] ^= 1
    return tuple([np.packbits(row).tobytes().hex() for row in rows] for rows in (one, other))  # type: ignore[return-value]


@pytest.mark.parametrize("recall", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("swapped", [False, True])
def test_sampled_bits_find_the_share_of_pairs_that_is_stated(
    recall: float, swapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaks, "_MAX_EXACT_PAIRS", 0)
    monkeypatch.setattr(leaks, "RECALL", recall)
    one, other = hashes_apart(2000, bits=MAX_DISTANCE, seed=5)
    rest = hashes_apart(500, bits=0, seed=6)[0]
    hashes = (
        {"one": one, "other": other + rest} if not swapped else {"one": other + rest, "other": one}
    )
    pairs = find_near_pairs(words_by_split(hashes))["one", "other"]
    assert all((pair.distance, pair.one) == (MAX_DISTANCE, pair.other) for pair in pairs)
    num_bits = len(other + rest).bit_length()
    tables = leaks._num_tables(num_bits, distance=MAX_DISTANCE, recall=recall)
    agreement = math.comb(256 - MAX_DISTANCE, num_bits) / math.comb(256, num_bits)
    stated = 1 - (1 - agreement) ** tables
    assert stated >= recall
    assert abs(len(pairs) / len(one) - stated) < 4 * math.sqrt(stated * (1 - stated) / len(one))


@pytest.mark.parametrize("bits", [0, 22, MAX_DISTANCE])
def test_sampled_bits_miss_none_of_thousands_of_pairs(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaks, "_MAX_EXACT_PAIRS", 0)
    one, other = hashes_apart(3000, bits=bits, seed=7)
    pairs = find_near_pairs(words_by_split({"one": one, "other": other}))["one", "other"]
    assert pairs == [NearPair(bits, row, row) for row in range(3000)]


def test_sampled_bits_find_no_pair_that_is_too_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "_MAX_EXACT_PAIRS", 0)
    one, other = hashes_apart(1000, bits=MAX_DISTANCE + 1, seed=8)
    assert find_near_pairs(words_by_split({"one": one, "other": other}))["one", "other"] == []


def test_a_bit_sample_has_different_bits_and_never_changes() -> None:
    for table in range(50):
        assert len(set(leaks._sample(24, table).tolist())) == 24
    assert leaks._sample(8, 0).tolist() == [8, 134, 252, 119, 51, 94, 177, 39]


def test_images_that_all_look_alike_are_found_as_by_comparing_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = ([f"{1 << bit:064x}" for bit in range(start, 256, 3)] for start in (0, 1))
    whole = find_near_pairs(words_by_split({"one": one, "other": other}))
    assert len(whole["one", "other"]) == len(one) * len(other)
    monkeypatch.setattr(leaks, "_MAX_EXACT_PAIRS", 0)
    monkeypatch.setattr(leaks, "_MAX_CANDIDATES", 64)
    assert find_near_pairs(words_by_split({"one": one, "other": other})) == whole


@pytest.mark.data
def test_the_public_data_set_holds_no_near_pair_of_different_images(real_images: Path) -> None:
    paths = sorted(real_images.rglob("*.jpeg"))[::4]
    pictures = [decode(path.read_bytes(), size=64, fit="crop", max_pixels=10**8) for path in paths]
    hashes = {"one": [perceptual_hash(picture) for picture in pictures]}
    hashes["other"] = hashes["one"]
    for pair in find_near_pairs(words_by_split(hashes))["one", "other"]:
        same = pair.one == pair.other or np.array_equal(pictures[pair.one], pictures[pair.other])
        assert same, (paths[pair.one], paths[pair.other], pair.distance)


@pytest.mark.data
def test_sampled_bits_find_all_near_pairs_of_the_public_images(
    real_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted(real_images.rglob("*.jpeg"))[::2]
    hashes = [
        perceptual_hash(decode(path.read_bytes(), size=64, fit="crop", max_pixels=10**8))
        for path in paths
    ]
    splits = {"one": hashes[::2], "other": hashes}
    whole = find_near_pairs(words_by_split(splits))
    monkeypatch.setattr(leaks, "_MAX_EXACT_PAIRS", 0)
    assert find_near_pairs(words_by_split(splits)) == whole


Y, X = np.mgrid[:64, :64]
# Hashes of ImageHash 4.3.2 (phash, hash_size=16); coefficients of a flat or striped image tie
STORED = {
    "waves": (
        (X * X + 3 * Y) % 251,
        "800f00fc0fa0aa976d94cc8d57574673958ce59a3ce93685989c3f5f71b5d165",
    ),
    "rings": (((X - 20) ** 2 + (Y - 30) ** 2) // 16 % 256, "aaaa0015" + "80000015" * 7),
    "ramp": (4 * X, "8" + "0" * 63),
    "black": (0 * X, "0" * 64),
    "white": (0 * X + 255, "8" + "0" * 63),
}


@pytest.mark.parametrize("name", STORED)
def test_perceptual_hashes_never_change(name: str) -> None:
    image, stored = STORED[name]
    assert perceptual_hash(image.astype(np.uint8)) == stored


def test_the_perceptual_hash_is_that_of_a_plain_cosine_transform() -> None:
    generator = np.random.default_rng(7)
    sides = [side for side in (16, 64, 64, 100, 224) for _ in range(20)]
    images = [generator.integers(0, 256, (side, side), np.uint8) for side in sides]
    images += [
        np.rint(draw_phantom(3, phantom) * 255).astype(np.uint8) for phantom in islice(plan(3), 20)
    ]
    for image in images:
        small = Image.fromarray(image).resize((64, 64), Image.Resampling.LANCZOS)
        low = scipy.fft.dctn(np.asarray(small, np.float64), type=2)[:16, :16]
        expected = np.packbits(low > np.median(low)).tobytes().hex()
        num_bits = (int(perceptual_hash(image), 16) ^ int(expected, 16)).bit_count()
        assert num_bits <= (0 if len(image) == 64 else 10)


@pytest.mark.parametrize("shape", [(300, 224), (512, 512), (1024, 700)])
def test_the_hash_of_a_large_image_is_that_of_the_image_made_smaller(
    shape: tuple[int, int],
) -> None:
    phantom = np.rint(draw_phantom(3, next(iter(plan(3)))) * 255).astype(np.uint8)
    large = Image.fromarray(phantom).resize(shape[::-1], Image.Resampling.BICUBIC)
    small = large.resize((64, 64), Image.Resampling.LANCZOS)
    ours, expected = perceptual_hash(np.asarray(large)), perceptual_hash(np.asarray(small))
    assert (int(ours, 16) ^ int(expected, 16)).bit_count() <= 6


def test_coefficients_that_tie_are_not_above_the_median() -> None:
    diagonal = np.eye(64, dtype=np.uint8) * 255  # all but 16 coefficients are 0, or nearly
    assert (
        perceptual_hash(diagonal)
        == "8000400020001000080004000200010000800040002000100008000400020001"
    )


def test_a_worker_that_hashes_images_does_not_import_scipy() -> None:
    code = """
import sys
import numpy as np
from xrai.ingest.leaks import perceptual_hash
perceptual_hash(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8))
sys.exit(any(name.split(".")[0] == "scipy" for name in sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
