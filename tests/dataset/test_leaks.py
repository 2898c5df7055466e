"""Perceptual hashes find copies that were saved anew, and pairs are found as a plain loop finds them."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from xrai.dataset import leaks
from xrai.dataset.images import decode
from xrai.dataset.leaks import MAX_DISTANCE, NearPair, find_near_pairs, num_pairs, perceptual_hash
from xrai.dataset.phantom import draw_film, encode, plan


def distance(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()


def hash_of_film(picture: Image.Image, *, image_format: str = "PNG", **options: object) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return perceptual_hash(decode(buffer.getvalue(), size=64, fit="crop", max_pixels=10**8))


FILMS = [
    Image.open(io.BytesIO(encode(3, phantom, draw_film(3, phantom), image_format="png")))
    for _, phantom in zip(range(12), plan(3), strict=False)
]

CHANGES: dict[str, Callable[[Image.Image], str]] = {
    "saved as JPEG of low quality": lambda film: hash_of_film(film, image_format="JPEG", quality=50),
    "made smaller": lambda film: hash_of_film(film.resize((film.width * 2 // 3, film.height * 2 // 3))),
    "made brighter": lambda film: hash_of_film(ImageEnhance.Brightness(film).enhance(1.1)),
    "in colour": lambda film: hash_of_film(film.convert("RGB")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_copy_that_was_changed_a_little_stays_near(name: str) -> None:
    for film in FILMS:
        assert distance(hash_of_film(film), CHANGES[name](film)) <= MAX_DISTANCE


def test_different_films_are_far_from_each_other() -> None:
    hashes = [hash_of_film(film) for film in FILMS]
    distances = [distance(one, other) for k, one in enumerate(hashes) for other in hashes[k + 1 :]]
    assert min(distances) > MAX_DISTANCE


near_hashes = st.lists(
    st.lists(st.integers(0, 255), max_size=40).map(
        lambda bits: f"{sum(1 << bit for bit in set(bits)):064x}"  # at most 40 bits from zero: many pairs are near
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(train=near_hashes, val=near_hashes, test=near_hashes, block=st.integers(1, 5))
def test_pairs_are_those_that_a_plain_loop_finds(train: list[str], val: list[str], test: list[str], block: int) -> None:
    hashes = {"train": train, "val": val, "test": test}
    compared: list[int] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(leaks, "_BLOCK", block)
        found = find_near_pairs(hashes, on_done=compared.append)
    for (split, other), pairs in found.items():
        expected = [
            NearPair(distance(a, b), i, j)
            for i, a in enumerate(hashes[split])
            for j, b in enumerate(hashes[other])
            if distance(a, b) <= MAX_DISTANCE
        ]
        assert pairs == sorted(expected)
    assert set(found) == {("train", "val"), ("train", "test"), ("val", "test")}
    assert sum(compared) == num_pairs(hashes)


@pytest.mark.data
def test_the_public_images_hold_no_near_pair_of_different_films(real_images: Path) -> None:
    paths = sorted(real_images.rglob("*.jpeg"))[::4]
    pictures = [decode(path.read_bytes(), size=64, fit="crop", max_pixels=10**8) for path in paths]
    hashes = {"one": [perceptual_hash(picture) for picture in pictures]}
    hashes["other"] = hashes["one"]
    for pair in find_near_pairs(hashes)["one", "other"]:
        same = pair.one == pair.other or np.array_equal(pictures[pair.one], pictures[pair.other])
        assert same, (paths[pair.one], paths[pair.other], pair.distance)
