import hashlib

import numpy as np
import pytest

from xrai.dataset.rules import carve_share, grey_histogram, mean_and_std


@pytest.mark.parametrize("num", [0, 1, 5])
def test_grey_levels_are_counted_as_numpy_counts_them(num: int) -> None:
    images = np.random.default_rng(num).integers(0, 256, (num, 8, 8), np.uint8)
    np.testing.assert_array_equal(
        grey_histogram(images), np.bincount(images.ravel(), minlength=256)
    )


def test_mean_and_deviation_are_those_of_all_pixels() -> None:
    images = np.random.default_rng(3).integers(0, 256, (7, 8, 8), np.uint8)
    mean, std = mean_and_std(grey_histogram(images))
    assert mean == pytest.approx(images.mean(), rel=1e-12)
    assert std == pytest.approx(images.std(), rel=1e-12)


def test_the_carving_hash_is_sha256_of_the_patient_and_never_changes() -> None:
    assert carve_share("IM:0115") == int(hashlib.sha256(b"IM:0115").hexdigest()[:13], 16) / 16**13
    assert round(carve_share("IM:0115"), 6) == 0.613989
