"""Intervals for measured qualities, and for what of one is lost (tasks report quality with one)."""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from autocompress.types import Interval, Quality

Z95 = 1.959963984540054
"""97.5 % point of the standard normal distribution."""


def wilson(successes: int, samples: int) -> Interval:
    """Two-sided 95 % score interval of a share (Wilson 1927; Brown, Cai and DasGupta 2001 for why not Wald's).

    Raises ValueError unless 0 <= successes <= samples and samples > 0.
    """
    if not 0 <= successes <= samples or samples == 0:
        raise ValueError(f"{successes} successes in {samples} samples is not a share")
    share, square = successes / samples, Z95 * Z95
    centre = (share + square / (2 * samples)) / (1 + square / samples)
    half = Z95 / (1 + square / samples) * sqrt(share * (1 - share) / samples + square / (4 * samples * samples))
    # at 0 and 1 the bounds are the share itself, up to rounding
    return Interval(value=share, low=max(0.0, min(share, centre - half)), high=min(1.0, max(share, centre + half)))


def mean_of(scores: NDArray[Any], metric: str, split: str) -> Quality:
    """Quality as the mean of what each sample scores, shape (n,): Wilson's interval of booleans, else the normal one.

    Raises ValueError where there is no sample.
    """
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"scores of shape {scores.shape}: not one number for each of one sample or more")
    if scores.dtype == np.bool_:
        value = wilson(int(scores.sum()), len(scores))
    else:
        mean = float(scores.mean(dtype=float))
        half = Z95 * float(scores.std(dtype=float, ddof=1)) / sqrt(len(scores)) if len(scores) > 1 else 0.0
        value = Interval(value=mean, low=mean - half, high=mean + half)
    return Quality(metric=metric, split=split, value=value, samples=len(scores))


def paired(before: NDArray[Any], after: NDArray[Any]) -> Interval:
    """What is lost on the same samples, shapes (n,) and (n,): mean of before - after, with its 95 % interval.

    Of booleans the score interval of matched pairs (Tango 1998, Statistics in Medicine 17:891, equations 11 and 14),
    which has a width where no two answers differ; else the normal one. Raises ValueError where they are no pairs.
    """
    if before.shape != after.shape or before.ndim != 1 or not len(before):
        raise ValueError(f"scores of shapes {before.shape} and {after.shape} are not pairs")
    lost = before.astype(float) - after.astype(float)
    count, value = len(lost), float(lost.mean())
    if before.dtype == after.dtype == np.bool_:
        worse, better = int((lost > 0).sum()), int((lost < 0).sum())
        return Interval(value=value, low=-_most(better, worse, count), high=_most(worse, better, count))
    half = Z95 * float(lost.std(ddof=1)) / sqrt(count) if count > 1 else 0.0
    return Interval(value=value, low=value - half, high=value + half)


def _most(worse: int, better: int, count: int) -> float:
    """The upper bound of Tango's interval for (worse - better) / count."""
    value = (worse - better) / count

    def beyond(share: float) -> float:
        """Above 0 while the data are likely enough, were `share` lost."""
        linear = (2 * count - worse + better) * share - worse - better
        constant = -better * share * (1 - share)
        won = (sqrt(linear * linear - 8 * count * constant) - linear) / (4 * count)  # the likeliest share of `better`
        variance = max(count * (2 * won + share * (1 - share)), 0.0)
        return Z95 * sqrt(variance) - count * (share - value)

    least = value + 1e-9  # at the value itself the variance may be estimated as nothing
    if least >= 1 or beyond(1.0) >= 0:
        return 1.0
    root: Any = brentq(beyond, least, 1.0)
    return max(value, float(root))
