from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from xrai.ingest.greys import distinct_values, grey_range, num_levels


@given(arrays(st.sampled_from([np.uint8, np.int16, np.uint16]), (3, 7)))
def test_distinct_values_are_those_of_numpy(samples: np.ndarray) -> None:
    np.testing.assert_array_equal(distinct_values(samples), np.unique(samples))


@pytest.mark.parametrize("bits", range(8, 17))
def test_an_image_that_uses_all_of_its_bits_has_their_range(bits: int) -> None:
    full = np.arange(1 << bits)
    assert grey_range(full) == (0, 2**bits - 1)
    assert grey_range(full[: round(0.61 * len(full))]) == (
        (0, 255) if bits < 9 else (0, 2**bits - 1)
    )
    assert grey_range(full - (1 << (bits - 1)))[0] == -(1 << (bits - 1))


def test_the_range_grows_without_a_step_and_the_largest_value_is_bright() -> None:
    ranges = [grey_range(np.arange(count))[1] for count in range(256, 1 << 16, 7)]
    for count, (white, next_white) in zip(range(256, 1 << 16, 7), pairwise(ranges), strict=False):
        assert white <= next_white <= white + 6 * 7
        assert 0.6 * white < count <= white + 1


@pytest.mark.parametrize(
    ("num_used", "claim", "levels"),
    [
        (2100, 4096, 4096),
        (2048, 4096, 4096),
        (1843.2, 4096, 3072),
        (1500, 4096, 2048),
        (900, 9e9, 1024),
    ],
)
def test_a_claim_is_believed_where_half_of_it_is_used(
    num_used: float, claim: float, levels: float
) -> None:
    assert num_levels(num_used, [claim]) == pytest.approx(levels)


def test_a_claim_is_believed_without_a_step() -> None:
    found = [num_levels(count, [4096]) for count in range(1000, 5000)]
    assert max(after - before for before, after in pairwise(found)) <= 11


@pytest.mark.parametrize("others", [[65535], [40000, 65535], list(range(60000, 60100))])
def test_burned_in_text_and_borders_do_not_darken_the_rest(others: list[int]) -> None:
    assert grey_range(np.array([*range(4000), *others])) == (0, 4095)


def test_a_few_bright_values_count_where_the_file_claims_their_range() -> None:
    assert grey_range(np.array([*range(900), 4095]), [4096]) == (0, 4095)


def test_a_border_at_the_negative_end_does_not_lighten_the_rest() -> None:
    assert grey_range(np.array([-32768, *range(4000)])) == (-1, 4095)


def test_signed_samples_with_an_offset_have_the_range_of_those_without() -> None:
    for bits in range(8, 16):
        values = np.arange(1 << bits)
        assert grey_range(values + 32768) == (32768, 32768 + 2**bits - 1)


def test_an_offset_moves_black_without_a_step() -> None:
    ranges = [np.array(grey_range(np.arange(lowest, 40000))) for lowest in range(28000, 35000, 16)]
    assert tuple(ranges[0]) == grey_range(np.arange(40000))
    assert max(np.abs(after - before).max() for before, after in pairwise(ranges)) <= 16 * 9
