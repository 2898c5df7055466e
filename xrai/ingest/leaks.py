"""Images that look the same in two splits: what an exact hash cannot find.

A 256-bit perceptual hash (pHash) of the fitted image. Measured on the public training set at 64
pixels (13.6 million pairs): no two different images are nearer than 37 bits, while a copy saved as
JPEG of quality 50 is at most 12 bits away, one with another gamma or 30 % more contrast 22, half of
those turned by a degree 22 (docs/decisions/0003-data-faults.md).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_DISTANCE: Final = 32  # bits of 256
RECALL: Final = 1 - 1e-6  # of pairs that far apart, where there are too many to compare them all

_SIDE = 16  # the hash has 16 x 16 bits
_NUM_BITS = _SIDE**2
HASH_BYTES: Final = _NUM_BITS // 8
_SCALED = 4 * _SIDE  # pixels a side of the image that is hashed
_LARGE_SIDE = 128  # pixels; larger images are first averaged in blocks, down to nearly this
_ROUNDING = 5e-7  # of coefficients, 50 times what was seen: they are below 2^22
_BLOCK = 2048  # hashes compared at a time
_OTHERS = 512  # with as many of the other split: 12 MiB in all
_MAX_EXACT_PAIRS = 10**8  # of two splits: 0.4 s on 2 cores
_ROWS_A_LOOK = 1 << 16  # hashes looked up in a table at a time
_MAX_CANDIDATES = 1 << 16  # pairs compared in full at a time: 8 MiB

Words = NDArray[np.uint64]  # (N, 4), the hashes
OnDone = Callable[[int], object]  # called with the number of pairs that were just compared


@dataclass(frozen=True, order=True, slots=True)
class NearPair:
    """Two rows, of different splits, whose images are almost the same."""

    distance: int  # bits of 256 that differ
    one: int  # position in the rows given
    other: int


def perceptual_hash(image: NDArray[np.uint8]) -> str:
    """The pHash of an image (H, W) uint8: 64 hex digits, equal or near for images that look alike.

    Which of the lowest 16 x 16 coefficients of the cosine transform (DCT-II) of the image at 64 x
    64 pixels are above their lower median; equality within rounding counts as not above. At 64 x 64
    pixels, where no coefficients tie, these are the bits of ImageHash's `phash`; at other sizes a
    few of the 256 differ, as scaled values are not rounded (docs/decisions/0014-ingest.md).
    """
    if (factor := min(image.shape) // _LARGE_SIDE) > 1:
        image = np.asarray(Image.fromarray(image).reduce(factor))
    rows, columns = (_transform(side) for side in image.shape)
    coefficients = rows @ image.astype(np.float64) @ columns.T  # (16, 16)
    median = np.sort(coefficients, axis=None)[_NUM_BITS // 2 - 1]
    return np.packbits(coefficients > median + _ROUNDING).tobytes().hex()


@cache
def _transform(side: int) -> NDArray[np.float64]:
    """Scale `side` pixels to 64 with Lanczos' filter, then take the first 16 rows of the cosine
    transform, 2 cos(pi k (2n + 1) / 128): one matrix (16, side).
    """
    each = Image.fromarray(np.eye(side, dtype=np.float32))
    scaling = np.asarray(each.resize((side, _SCALED), Image.Resampling.LANCZOS), np.float64)
    k, n = np.arange(_SIDE)[:, None], np.arange(_SCALED)
    rows: NDArray[np.float64] = 2 * np.cos(np.pi * k * (2 * n + 1) / (2 * _SCALED)) @ scaling
    return rows


def find_near_pairs(
    words: Mapping[str, Words], *, on_done: OnDone = lambda _: None
) -> dict[tuple[str, str], list[NearPair]]:
    """Pairs at most `MAX_DISTANCE` bits apart, nearest first, by pair of splits.

    `words` are the hashes of each split (`words_of`). Two splits of at most 10^8 pairs, as 35,000
    images give, are compared in full, 2.5e8 pairs per second on 2 cores. Of larger ones those pairs
    are compared that agree in one of L sets of k bits drawn from the 256: 2 s for 100,000 images,
    where all pairs take 7, and half an hour for ten million, where they take most of a day
    (docs/scale.md). Pairs at the greatest distance are found with a probability of at least
    `RECALL`, nearer ones with a higher one, equal ones always. The draws are fixed: the same hashes
    give the same pairs.
    """
    found = {}
    splits = list(words)
    for k, split in enumerate(splits):
        for other in splits[k + 1 :]:
            num = len(words[split]) * len(words[other])
            search = _compare_all if num <= _MAX_EXACT_PAIRS else _look_up
            found[split, other] = sorted(search(words[split], words[other], on_done))
    return found


def num_pairs(words: Mapping[str, Words]) -> int:
    """How many pairs `find_near_pairs` covers."""
    sizes = [len(own) for own in words.values()]
    return (sum(sizes) ** 2 - sum(size**2 for size in sizes)) // 2


def words_of(hashes: Iterable[bytes | bytearray]) -> Words:
    """The words of hashes that stand one after the other, `HASH_BYTES` each."""
    return np.frombuffer(b"".join(hashes), np.uint64).reshape(-1, _NUM_BITS // 64)


# --------------------------------------------------------------------------------------- all pairs


def _compare_all(one: Words, other: Words, on_done: OnDone) -> Iterator[NearPair]:
    """As a product of matrices of +1 and -1."""
    for i in range(0, len(one), _BLOCK):
        left = _signs(one[i : i + _BLOCK])  # (B, 256)
        memory = np.empty((len(left), _OTHERS), np.float32)
        for j in range(0, len(other), _OTHERS):
            right = _signs(other[j : j + _OTHERS])  # (C, 256)
            # 256 - 2 * distance, exact in float32
            products = np.matmul(left, right.T, out=memory[:, : len(right)])
            for a, b in np.argwhere(products >= _NUM_BITS - 2 * MAX_DISTANCE).tolist():
                yield NearPair(round((_NUM_BITS - float(products[a, b])) / 2), i + a, j + b)
            on_done(len(left) * len(right))


def _signs(words: Words) -> NDArray[np.float32]:
    return np.unpackbits(words.view(np.uint8), axis=1).astype(np.float32) * 2 - 1  # (N, 256)


# ------------------------------------------------------------------------------------- sampled bits


def _num_tables(num_bits: int, *, distance: int, recall: float) -> int:
    """How many samples of `num_bits` bits find a pair `distance` bits apart with this probability.

    Two hashes agree in a sample with the probability C = (256 - d choose k) / (256 choose k), and
    in one of L with 1 - (1 - C)^L: Indyk and Motwani 1998, bits drawn without replacement.
    """
    agreement = math.comb(_NUM_BITS - distance, num_bits) / math.comb(_NUM_BITS, num_bits)
    return math.ceil(math.log(1 - recall) / math.log(1 - agreement))


def _look_up(one: Words, other: Words, on_done: OnDone) -> Iterator[NearPair]:
    """Each pair once. Takes some 30 bytes per image, on top of the hashes and the pairs found."""
    if len(one) > len(other):
        found = _look_up(other, one, on_done)
        yield from (NearPair(pair.distance, pair.other, pair.one) for pair in found)
        return
    num_bits = max(len(other).bit_length(), 1)  # so that a place in a table holds about one hash
    num_tables = _num_tables(num_bits, distance=MAX_DISTANCE, recall=RECALL)
    num_all = len(one) * len(other)
    seen: set[NearPair] = set()
    for table in range(num_tables):
        for pair in _look_up_once(one, other, _sample(num_bits, table)):
            if pair not in seen:
                seen.add(pair)
                yield pair
        on_done(num_all * (table + 1) // num_tables - num_all * table // num_tables)


def _sample(num_bits: int, table: int) -> NDArray[np.int64]:
    """Different bits of the hash, drawn for a table. NEP 19 promises that raw bits never change."""
    draws = np.random.Philox(np.random.SeedSequence([num_bits, table])).random_raw(_NUM_BITS)
    return np.argsort(draws, kind="stable")[:num_bits]


def _look_up_once(one: Words, other: Words, bits: NDArray[np.int64]) -> Iterator[NearPair]:
    """Near pairs that agree in these bits."""
    keys = _keys(one, bits)
    order = np.argsort(keys, kind="stable")  # rows of `one` by key
    # Of each key: where its rows in `order` end
    ends = np.cumsum(np.bincount(keys, minlength=1 << len(bits)), dtype=np.int32)
    for start in range(0, len(other), _ROWS_A_LOOK):
        wanted = _keys(other[start : start + _ROWS_A_LOOK], bits)
        last = ends[wanted]
        counts = last - np.where(wanted > 0, ends[wanted - 1], 0)
        columns = np.flatnonzero(counts)
        last, counts = last[columns], counts[columns]
        totals = np.cumsum(counts, dtype=np.int64)
        num_candidates = totals[-1] if len(totals) else 0
        cuts = np.searchsorted(totals, np.arange(_MAX_CANDIDATES, num_candidates, _MAX_CANDIDATES))
        for part in np.split(np.arange(len(columns)), np.unique(cuts)):
            repeats = counts[part]
            within = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
            rows = order[np.repeat(last[part] - repeats, repeats) + within]
            yield from _check(one, other, rows, np.repeat(columns[part] + start, repeats))


def _check(
    one: Words, other: Words, rows: NDArray[np.int64], columns: NDArray[np.int64]
) -> Iterator[NearPair]:
    """Those of the pairs (rows[i], columns[i]) that are near."""
    for start in range(0, len(rows), _MAX_CANDIDATES):
        a, b = rows[start : start + _MAX_CANDIDATES], columns[start : start + _MAX_CANDIDATES]
        distances = np.bitwise_count(one[a] ^ other[b]).sum(axis=1, dtype=np.int64)
        near = distances <= MAX_DISTANCE
        yield from map(NearPair, distances[near].tolist(), a[near].tolist(), b[near].tolist())


def _keys(words: Words, bits: NDArray[np.int64]) -> NDArray[np.int64]:
    """(N,) the given bits of each hash, as a number. Bits are numbered as in the words."""
    keys = np.zeros(len(words), np.uint64)
    for start in range(0, len(words), _BLOCK):  # stays in the processor's cache
        columns = words[start : start + _BLOCK].T.copy()  # (4, B)
        found = keys[start : start + _BLOCK]  # (B,)
        for place, bit in enumerate(bits.tolist()):
            shift = np.uint64(abs(bit % 64 - place))
            moved = columns[bit // 64] >> shift if bit % 64 > place else columns[bit // 64] << shift
            found |= moved & np.uint64(1 << place)
    return keys.view(np.int64)
