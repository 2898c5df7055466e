"""Scores where classes have other shares than in training: known ones, or estimated; numpy alone.

A score holds for the shares of classes that it was calibrated at. Where the shares differ, but the
images of each class look the same, Bayes' rule gives the score: each class's score times its new
share over its old one, divided by the sum of these (Saerens, Latinne, Decaestecker 2002,
https://doi.org/10.1162/089976602753284446). For a logit this is a shift by the difference of the
two shares' log odds. Thresholds move with the scores, so a prior changes no call.

`xrai.pipeline` and `xrai.evaluate` use it; `xrai.run` finds the shares that a run is calibrated at.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from xrai.errors import UserError
from xrai.labels import folded
from xrai.results.calibration import Floats, log_odds
from xrai.results.types import Output

ESTIMATE: Final = "estimate"  # in place of shares
MIN_IMAGES: Final = 50  # to estimate from: fewer say too little (docs/decisions/0026-prior.md)

_TINY = float(np.finfo(np.float64).tiny)
_NUM_ROUNDS = {"fit": 500, "estimate": 5000}
_SMALL_CHANGE = 1e-8  # of a share; iteration ends below it
_MOST = 1e6  # the largest factor on scores
_SLACK = 0.005  # tolerance for the sum of shares that people have rounded

# Shares as people give them: of the class that is looked for, or by name; or `ESTIMATE`
Wanted = float | str | Mapping[str, float]


@dataclass(frozen=True)
class Prior:
    """The shares of images that scores are moved to."""

    shares: Mapping[str, float]  # by class or finding; of two classes, of the one looked for
    source: str  # "given" or "estimated from … images"

    def __str__(self) -> str:
        """For people: "pneumonia 0.100, given"."""
        shares = ", ".join(f"{name} {share:.3f}" for name, share in self.shares.items())
        return f"{shares}, {self.source}"


def read_prior(wanted: Wanted, outputs: Sequence[Output]) -> Prior:
    """The prior that people give: a share of the class looked for (0.1), or by name
    (`A=0.7|B=0.2|C=0.1`): of all classes, or of some findings.

    Raises `UserError` for other names, shares that are not between 0 and 1, and classes whose sum
    is not 1.
    """
    task = outputs[0].task
    names = {folded(output.name): output.name for output in outputs}
    given = f"prior = {wanted if isinstance(wanted, str | float | int) else dict(wanted)!r}"
    if task == "binary" and not isinstance(wanted, Mapping) and "=" not in str(wanted):
        wanted = {outputs[0].name: wanted}  # type: ignore[dict-item]
    if isinstance(wanted, Mapping):
        pairs = [(name, str(share)) for name, share in wanted.items()]
    else:
        pairs = [part.rpartition("=")[::2] for part in str(wanted).split("|")]
    shares: dict[str, float] = {}
    for name, text in pairs:
        if (own := names.get(folded(name))) is None or own in shares:
            fault = "is named twice" if own else "is none of them"
            raise UserError(
                f"{given}: {name.strip()!r} {fault}: it takes {_form(outputs)}, or {ESTIMATE}"
            )
        try:
            shares[own] = float(text)
        except ValueError:
            shares[own] = -1.0
        if not 0 < shares[own] < 1:
            raise UserError(f"{given}: {text.strip()!r} is no share: it is between 0 and 1")
    total = math.fsum(shares.values())  # the same in any order
    if task == "multiclass":
        if len(shares) < len(outputs) or abs(total - 1) > _SLACK:
            raise UserError(
                f"{given}: the shares of all classes, {', '.join(names.values())}, must be given, "
                f"and their sum must be 1"
            )
        shares = {name: shares[name] / total for name in names.values()}
    return Prior(shares, "given")


def _form(outputs: Sequence[Output]) -> str:
    """How a prior for these outputs is written."""
    if outputs[0].task == "binary":
        return f"the share of {outputs[0].name}"
    return "|".join(f"{output.name}=SHARE" for output in outputs)


def move_outputs(
    outputs: Sequence[Output], own: Sequence[float], prior: Prior
) -> tuple[Output, ...]:
    """The outputs with scores and thresholds for a prior, given the shares that they are calibrated
    at. Findings that the prior does not name stay as they are.
    """
    is_multiclass = outputs[0].task == "multiclass"

    def logit(share: float) -> float:
        return float(np.log(share)) if is_multiclass else log_odds(share)

    return tuple(
        output
        if (share := prior.shares.get(output.name)) is None
        else output.move(share, logit(share) - logit(at), prior.source)
        for output, at in zip(outputs, own, strict=True)
    )


def estimate_prior(outputs: Sequence[Output], own: Sequence[float], scores: Floats) -> Prior:
    """The shares among images without labels, from their scores (N, C) at the shares `own`.

    Raises `UserError` for fewer than `MIN_IMAGES`.
    """
    num = len(scores)
    if num < MIN_IMAGES:
        raise UserError(
            f"prior = {ESTIMATE}: {num} images that are not for review are too few to estimate "
            f"shares from: it takes {MIN_IMAGES} at least; or give the shares"
        )
    if outputs[0].task == "multiclass":
        found = estimate_shares(scores, np.asarray(own)).tolist()
    else:
        found = [
            float(estimate_shares(both(column), both(at))[1])
            for column, at in zip(scores.T, own, strict=True)
        ]
    names = [output.name for output in outputs]
    return Prior(dict(zip(names, found, strict=True)), f"estimated from {num} images")


def both(shares: npt.ArrayLike) -> Floats:
    """Scores or shares of a class, of any shape, as those of its absence and presence (…, 2)."""
    present = np.asarray(shares, np.float64)
    return np.stack([1 - present, present], axis=-1)


def estimate_shares(scores: Floats, own: Floats) -> Floats:
    """The shares (C,) under which images with these scores (N, C) are most likely, the scores being
    calibrated at the shares `own` (C,).

    Expectation maximization, as in the paper named above: the new shares are the means of the
    scores at the previous ones. None is less than half an image.
    """
    shares = own
    for _ in range(_NUM_ROUNDS["estimate"]):
        moved = scores * (shares / own)
        found = (moved / moved.sum(axis=1, keepdims=True).clip(_TINY)).mean(axis=0)
        change = float(np.abs(found - shares).max())
        shares = found.clip(1 / (2 * len(scores)))
        shares /= shares.sum()
        if change < _SMALL_CHANGE:
            break
    return shares


def fit_shares(scores: Floats, shares: Floats) -> Floats:
    """The shares (C,) at which scores (N, C) are calibrated, of labelled images of which each class
    has these `shares` (C,).

    A factor on each class's scores, chosen for the largest likelihood of the labels (the bias of
    Alexandari, Kundaje, Shrikumar 2020, https://arxiv.org/abs/1901.06852), makes each class's mean
    score equal its share. The factors are found by iteration, in which rows are normalized, and
    begin at 1: images that tell nothing leave them there. The result is each class's share over its
    factor, normalized.
    """
    shares = shares.clip(1 / (2 * len(scores)))
    shares = shares / shares.sum()
    factors = np.ones_like(shares)
    for _ in range(_NUM_ROUNDS["fit"]):
        moved = scores * factors
        means = (moved / moved.sum(axis=1, keepdims=True).clip(_TINY)).mean(axis=0)
        factors = (factors * shares / means.clip(_TINY)).clip(1 / _MOST, _MOST)
        if np.abs(means - shares).max() < _SMALL_CHANGE:
            break
    found = shares / factors
    within: Floats = (found / found.sum()).clip(1 / _MOST, 1 - 1 / _MOST)
    return within


def shares_of(labels: npt.NDArray[np.int8], scores: Floats, *, is_multiclass: bool) -> list[float]:
    """The shares at which the scores (N, C) of labelled images are calibrated; labels (N, C) are 1,
    0, or -1 for unknown. A finding without images of both kinds has 0.5, from which a prior moves
    it; no report states it (`xrai.results.types.with_shares`).
    """
    if is_multiclass:
        found: list[float] = fit_shares(scores, labels.mean(axis=0)).tolist()
        return found
    shares = []
    for column, own in zip(labels.T, scores.T, strict=True):
        known = column >= 0
        share = column[known].mean() if known.any() else 0.0
        is_told = 0 < share < 1
        fitted = fit_shares(both(own[known]), both(share)) if is_told else both(0.5)
        shares.append(float(fitted[1]))
    return shares
