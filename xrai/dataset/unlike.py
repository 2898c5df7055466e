"""Images that a site has given to be sent to review: `xrai.ingest.unlike` reads them, and
`xrai.learning.typicality` fits review to them.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Unlike:
    """The images, sorted by the hashes of their files; the same on every rank."""

    source: str
    hashes: tuple[str, ...]  # SHA-256 of the files, as a manifest has them
    images: NDArray[np.uint8]  # (n, 1, H, W)
    is_fitted: NDArray[np.bool_]  # (n,), false for patients that are held out to test review with
    num_patients: int
    num_without_patient: int = 0  # images whose patient is unknown; each counts as a patient

    @property
    def sha256(self) -> str:
        """The hash of the hashes of all files, in order."""
        return hashlib.sha256("".join(self.hashes).encode()).hexdigest()
