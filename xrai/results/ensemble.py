"""Several runs as one: the mean of their calibrated logits, and what goes with it; numpy alone.

`xrai.pipeline` uses it. A single run is an ensemble of one, whose results do not change.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from xrai.results.calibration import Floats, calibrated, log_odds, softmax
from xrai.results.types import Output


def scaled_logits(outputs: Sequence[Output], logits: Floats) -> Floats:
    """Calibrated logits (N, C): logit / temperature; for classes that exclude each other, the
    logarithms of their probabilities, because logits that differ by a constant mean the same.
    """
    scaled: Floats = logits / np.array([output.temperature for output in outputs])
    if outputs[0].task != "multiclass":
        return scaled
    scaled = scaled - scaled.max(axis=1, keepdims=True)
    found: Floats = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    return found


def mean_outputs(runs: Sequence[Sequence[Output]]) -> tuple[Output, ...]:
    """How the mean of the runs' `scaled_logits` is read.

    The threshold's logit is the mean of those of the runs, so an output is called where the mean
    distance of the runs' logits to their own thresholds is not negative. A shift of both the logits
    and the threshold of a run changes no call.
    """
    found = []
    for outputs in zip(*runs, strict=True):
        thresholds = [output.threshold for output in outputs if output.threshold is not None]
        found.append(
            replace(
                outputs[0],
                temperature=1.0,
                threshold=_mean_share(thresholds) if thresholds else None,
            )
        )
    return tuple(found)


def mean_priors(runs: Sequence[Sequence[float]], *, is_multiclass: bool) -> tuple[float, ...]:
    """The shares at which the mean of the runs' `scaled_logits` is calibrated, given those of each:
    their means as log odds, or as logarithms for classes. Empty where a run does not know them.
    """
    if not all(runs):
        return ()
    if is_multiclass:
        return tuple(softmax(np.log(runs).mean(axis=0)[None])[0].tolist())
    return tuple(_mean_share(shares) for shares in zip(*runs, strict=True))


def _mean_share(shares: Sequence[float]) -> float:
    """The share whose log odds are the mean of those of `shares`; exact where all are the same."""
    if len(set(shares)) == 1:
        return shares[0]
    return float(calibrated(np.mean([log_odds(share) for share in shares])))


def disagreement(probabilities: Floats) -> Floats:
    """How far the runs' probabilities (M, N, C) of an image are apart, (N,): the largest less the
    smallest, of the class or finding where that is most.
    """
    found: Floats = np.ptp(probabilities, axis=0).max(axis=1)
    return found
