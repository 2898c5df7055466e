"""The rule of review: an image unlike the training images gets no class; a person looks at it."""

from typing import Final

import numpy as np
import numpy.typing as npt

REVIEW: Final = "review"  # the decision that stands beside the names of the classes


def needs_review(atypicality: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Which atypicalities (N,), or whether one, are above the limit of 1; NaN is."""
    return ~np.less_equal(np.asarray(atypicality, np.float64), 1)
