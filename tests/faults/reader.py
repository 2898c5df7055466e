"""One rank that reads an epoch and does nothing else: `python -m tests.faults.reader ADDRESS
CACHE`.

It prints a line for each batch, its step and a hash of what it holds, and ends as a command does.
"""

import hashlib
import sys

from xrai.command import run_command
from xrai.dataset.loader import Batch, Loader, LoaderOptions
from xrai.log import setup_logging


def main() -> None:
    """Read the first epoch of train."""
    address, cache = sys.argv[1:]
    setup_logging()
    loader = Loader(
        address,
        split="train",
        batch_size=16,
        shuffle=True,
        options=LoaderOptions(window=2, threads=2, prefetch=1, cache_dir=cache),
    )
    for batch in loader.epoch(0):
        print(batch.step, digest(batch), flush=True)


def digest(batch: Batch) -> str:
    """A hash of what a batch holds."""
    return hashlib.sha256(
        batch.rows.tobytes() + batch.images.tobytes() + batch.labels.tobytes()
    ).hexdigest()[:16]


if __name__ == "__main__":
    run_command(main)
