"""Chest X-rays in, a trained classifier and readable results out.

import xrai

for row in xrai.load("submit/20261123-031500-a1b2c3").predict(["films/", "more/*.dcm"]):
    print(row.path, row.decision, row.probabilities, row.reason)
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from xrai.pipeline import Pipeline

__version__ = "0.1.0"

_parent = os.getppid()  # before anything slow is loaded; by fork, the process that forked


def _note_parent() -> None:
    global _parent
    _parent = os.getppid()


os.register_at_fork(after_in_child=_note_parent)


def parent_at_start() -> int:
    """The id of the process that started this one, even if that has ended since."""
    return _parent


def load(
    run: str, *more: str, prior: "float | str | Mapping[str, float] | None" = None
) -> "Pipeline":
    """The pipeline of a finished run, ready to predict, given its address: a folder or
    s3://bucket/prefix/ID. Several runs of the same classes or findings predict together, by the
    mean of their calibrated logits; their image sizes may differ.

    `prior` moves the probabilities to the share of images that show what is looked for where they
    come from, such as 0.1; for classes or findings, {name: share}. "estimate" estimates it from the
    images of each `predict`.

    Raises `UserError` for a prior that the run cannot have, `RunError` where there is no finished
    run or two have other names, and the `StoreError` kinds where one cannot be read.
    """
    from xrai.pipeline import load_pipeline  # here: it loads torch, which preprocessing never does

    return load_pipeline(run, *more, prior=prior)
