"""From logits to calibrated scores, and to the threshold that calls them; numpy alone.

A score is the probability of an output in [0, 1]: the logistic function of logit / temperature (Guo
et al. 2017, https://arxiv.org/abs/1706.04599). A temperature moves no share: scores are calibrated
at the share that training aimed at, equal ones by default (`xrai.results.prior`). The output is
called where score >= threshold.
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from xrai.errors import XraiError

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
_AT_LIMIT = 1e-6  # relative; the bisection ends closer to a limit than this
_MIN_SCORE = 1e-6  # clips scores before a threshold is chosen, so that logits are within ±14

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def calibrated(logits: npt.ArrayLike, temperature: float = 1.0) -> Floats:
    """The scores of logits, of any shape: the logistic function of logit / temperature."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    scores: Floats = 1 / (1 + np.exp(np.clip(-scaled, -700, 700)))
    return scores


def softmax(logits: npt.ArrayLike, temperature: float = 1.0) -> Floats:
    """The scores of classes that exclude each other, (N, C), of logits (N, C); rows sum to 1."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    scores: Floats = powers / powers.sum(axis=1, keepdims=True)
    return scores


def log_odds(share: float) -> float:
    """The logit of a share in [0, 1], finite at both ends."""
    tiny = float(np.finfo(np.float64).tiny)
    return math.log(max(share, tiny)) - math.log(max(1 - share, tiny))


def move_share(score: float, offset: float) -> float:
    """The score in [0, 1] whose logit is `offset` higher; 0 and 1 stay."""
    return score if score in (0.0, 1.0) else float(calibrated(log_odds(score) + offset))


def fit_temperature(labels: npt.ArrayLike, logits: npt.ArrayLike, *, num_draws: int = 1) -> float:
    """The temperature in [0.05, 20] whose scores have the largest likelihood (Guo et al. 2017), of
    the N / `num_draws` images and of one more, whose labels are as frequent as the scores at
    temperature 1 say.

    The likelihood alone would go to the limit where few images are separated without error; among
    hundreds, one image is not felt (docs/decisions/0026-prior.md). The loss is convex in
    1 / temperature, so its slope is bisected. `labels` (N,) 0 or 1, `logits` (N,), which hold
    `num_draws` copies of each image. Raises `XraiError` unless both classes are present.
    """
    labels, logits = checked(labels, logits, in_unit_range=False)
    _refuse_one_class(labels, "temperature")
    targets = _softened(labels, calibrated(logits), num_images=len(labels) / num_draws)

    def slope(sharpness: float) -> float:
        return float(np.mean((calibrated(logits, 1 / sharpness) - targets) * logits))

    return _bisect(slope)


def fit_softmax_temperature(
    labels: npt.ArrayLike, logits: npt.ArrayLike, *, num_draws: int = 1
) -> float:
    """The same for classes that exclude each other: `labels` (N,) are the classes' numbers,
    `logits` (N, C). Raises `XraiError` for a logit that is not finite, or without images.
    """
    labels, logits = np.asarray(labels, np.int64), np.asarray(logits, np.float64)
    if len(labels) == 0:
        raise XraiError("no temperature can be chosen: there are no images")
    one_hot = labels[:, None] == np.arange(logits.shape[1])
    checked(one_hot.ravel(), logits.ravel(), in_unit_range=False)
    targets = _softened(one_hot, softmax(logits), num_images=len(labels) / num_draws)

    def slope(sharpness: float) -> float:
        return float(np.mean((softmax(logits, 1 / sharpness) - targets) * logits))

    return _bisect(slope)


def explain_limit(temperature: float) -> str:
    """What a temperature at one of its limits means, in words; empty for all others."""
    if temperature <= MIN_TEMPERATURE * (1 + _AT_LIMIT):
        return (
            f"the temperature is at its lower limit, {MIN_TEMPERATURE:g}, and scores may say "
            "too little: the logits of the validation images are too close together"
        )
    if temperature >= MAX_TEMPERATURE * (1 - _AT_LIMIT):
        return (
            f"the temperature is at its upper limit, {MAX_TEMPERATURE:g}, and scores say little: "
            "on the validation images, higher logits do not make a class or finding more likely, "
            "or these images are too few"
        )
    return ""


def _softened(labels: npt.ArrayLike, scores: Floats, *, num_images: float) -> Floats:
    """Labels of `num_images` images and of one with these scores: what a fit aims at."""
    softened: Floats = (num_images * np.asarray(labels) + scores) / (num_images + 1)
    return softened


def _bisect(slope: Callable[[float], float], *, tolerance: float = 1e-12) -> float:
    """The temperature at which the slope in 1 / temperature of a convex loss is 0."""
    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    while high - low > tolerance * high:
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return 2 / (low + high)


def choose_threshold(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """The threshold above which a score is more probable in an image that shows the output than in
    one that does not.

    It is where a logistic regression of the labels on the scores' logits, with equally weighted
    classes, gives 1/2 (Platt 1999, without his smoothing). All images count, where the largest
    sensitivity + specificity (Youden 1950) depends on the few next to it: under shift the calls are
    better and vary less (docs/decisions/0005-recipe.md). The slope is kept in [0.05, 20], so that
    it is finite where the classes are separate, and no threshold is outside of the scores.

    `labels` (N,) 0 or 1, `scores` (N,) in [0, 1]. Raises `XraiError` unless both classes are
    present.
    """
    labels, scores = checked(labels, scores)
    _refuse_one_class(labels, "threshold")
    inside = np.clip(scores, _MIN_SCORE, 1 - _MIN_SCORE)
    logits = np.log(inside) - np.log1p(-inside)
    shares = np.where(labels == 1, 0.5 / labels.sum(), 0.5 / (1 - labels).sum())  # sum to 1

    def slope(sharpness: float) -> float:
        """Of the loss, with the threshold that is best for this sharpness."""
        threshold = _balanced(logits, shares, sharpness)
        residuals = calibrated(logits - threshold, 1 / sharpness) - labels
        return float(np.sum(shares * residuals * (logits - threshold)))

    threshold = _balanced(logits, shares, 1 / _bisect(slope, tolerance=1e-9))
    return float(np.clip(calibrated(threshold), scores.min(), scores.max()))


def _balanced(logits: Floats, shares: Floats, sharpness: float) -> float:
    """The threshold at which the mean of the logistic function of sharpness x (logits - threshold)
    is 1/2; the middle of several, as between classes that are apart.
    """
    ends = []
    for margin in (1e-9, -1e-9):
        low, high = float(logits.min()), float(logits.max())
        for _ in range(40):
            middle = (low + high) / 2
            mean = float(np.sum(shares * calibrated(logits - middle, 1 / sharpness)))
            low, high = (middle, high) if mean > 0.5 + margin else (low, middle)
        ends.append((low + high) / 2)
    return sum(ends) / 2


def checked(
    labels: npt.ArrayLike, scores: npt.ArrayLike, *, in_unit_range: bool = True
) -> tuple[Ints, Floats]:
    """Labels (N,) of 0 and 1 and finite scores (N,) as arrays.

    Raises `XraiError` for a score that is not finite, or not in [0, 1].
    """
    labels = np.asarray(labels, dtype=np.int64)
    scores = np.asarray(scores, dtype=np.float64)
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(
            f"labels {labels.shape} and scores {scores.shape} must be of one length, one dimension"
        )
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, not {sorted(set(labels.tolist()) - {0, 1})}")
    wrong = ~np.isfinite(scores)
    if in_unit_range:
        wrong |= (scores < 0) | (scores > 1)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        allowed = "in [0, 1]" if in_unit_range else "that is finite"
        raise XraiError(
            f"the score of row {row} is {scores[row]} ({int(wrong.sum())} of {len(scores)} are "
            f"wrong): a score is a number {allowed}; this model cannot be measured"
        )
    return labels, scores


def _refuse_one_class(labels: Ints, what: str) -> None:
    if labels.all() or not labels.any():
        missing = "negative" if labels.all() and len(labels) else "positive"
        raise XraiError(
            f"no {what} can be chosen on {len(labels)} images: none of them is {missing}; "
            "it needs both classes"
        )
