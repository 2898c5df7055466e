"""Pictures that look the same in two splits: what an exact hash can not find. `xrai.dataset.build` lists them.

ImageHash's 256-bit pHash of the fitted picture. Measured on the public training set at 64 pixels (13.6 million pairs):
no two different films are nearer than 37 bits, while a copy saved as JPEG of quality 50 is at most 12 away, one with
another gamma or 30 % more contrast 22, half of those turned by a degree 22 (docs/decisions/0003-data-faults.md).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

MAX_DISTANCE: Final = 32  # bits of 256

_HASH_SIDE = 16  # bits of the hash are its square
_BLOCK = 4096  # hashes compared with as many at a time: 64 MiB


@dataclass(frozen=True, order=True)
class NearPair:
    """Two rows, of different splits, whose pictures are almost the same."""

    distance: int  # bits of 256 that differ
    one: int  # position in the rows given
    other: int


def perceptual_hash(picture: NDArray[np.uint8]) -> str:
    """The pHash of a picture (H, W) uint8: 64 hex digits. Equal or near where pictures look the same."""
    import imagehash  # brings scipy, 0.3 s that only those who hash need spend
    from PIL import Image

    return str(imagehash.phash(Image.fromarray(picture), hash_size=_HASH_SIDE))


def find_near_pairs(
    hashes: Mapping[str, Sequence[str]], *, on_done: Callable[[int], object] = lambda _: None
) -> dict[tuple[str, str], list[NearPair]]:
    """Pairs at most `MAX_DISTANCE` bits apart, nearest first, by pair of splits; `hashes` are those of each split.

    Every hash of one split is compared with every one of the other, as a product of matrices of +1 and -1: 1e8 pairs a
    second on 2 cores. `on_done` is called with the number of pairs compared.
    """
    signs = {split: _signs(texts) for split, texts in hashes.items()}
    found = {}
    splits = list(signs)
    for k, split in enumerate(splits):
        for other in splits[k + 1 :]:
            found[split, other] = sorted(_near(signs[split], signs[other], on_done))
    return found


def num_pairs(hashes: Mapping[str, Sequence[str]]) -> int:
    """How many pairs `find_near_pairs` compares."""
    sizes = [len(texts) for texts in hashes.values()]
    return (sum(sizes) ** 2 - sum(size**2 for size in sizes)) // 2


def _signs(hashes: Sequence[str]) -> NDArray[np.int8]:
    num_bits = _HASH_SIDE**2
    packed = np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(len(hashes), num_bits // 8)
    return np.unpackbits(packed, axis=1).astype(np.int8) * 2 - 1  # (N, 256)


def _near(one: NDArray[np.int8], other: NDArray[np.int8], on_done: Callable[[int], object]) -> Iterator[NearPair]:
    num_bits = _HASH_SIDE**2
    for i in range(0, len(one), _BLOCK):
        left = one[i : i + _BLOCK].astype(np.float32)  # (B, 256)
        for j in range(0, len(other), _BLOCK):
            right = other[j : j + _BLOCK].astype(np.float32)  # (C, 256)
            products = left @ right.T  # (B, C), 256 - 2 * distance, exact in float32
            for a, b in np.argwhere(products >= num_bits - 2 * MAX_DISTANCE).tolist():
                yield NearPair(round((num_bits - float(products[a, b])) / 2), i + a, j + b)
            on_done(len(left) * len(right))
