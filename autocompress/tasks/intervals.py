"""Intervals for measured shares (tasks report quality with one)."""

from __future__ import annotations

from math import sqrt

from autocompress.types import Interval

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
