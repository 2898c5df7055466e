"""The rule of review: an image unlike the training images gets no class; a person looks at it."""

from typing import Final, overload

import numpy as np
import numpy.typing as npt

REVIEW: Final = "review"  # the decision that stands beside the names of the classes


@overload
def needs_review(atypicality: float) -> bool: ...
@overload
def needs_review(atypicality: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]: ...
def needs_review(atypicality: float | npt.NDArray[np.float64]) -> bool | npt.NDArray[np.bool_]:
    """Whether an atypicality, or each of (N,), is above the limit of 1; NaN is."""
    is_typical = np.less_equal(atypicality, 1)
    return bool(not is_typical) if np.isscalar(atypicality) else ~is_typical
