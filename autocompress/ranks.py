"""What a short training says of a long one: qualities of one rung corrected to another's (floor F1).

Networks that are cut deep gain more by training on than gentle cuts do, and larger ones more than small ones, so the
order at a low rung is not the order at a high one. What is known at both is fitted: the gain from rung to rung as a
linear function of the quality at the lower one and of the logarithm of the latency, shrunken towards one gain for all.
A correction is used only where, held out one by one, it orders the known pairs better than the lower rung alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from autocompress.types import Outcome, Record

Floats = NDArray[np.float64]
FEWEST = 6  # pairs without which every trial gains the same
SHRINK = 1.0  # weight of the penalty on slopes, in pairs; features have unit variance


class Agreement(Record):
    """How well one rung orders another, over the trials that reached both."""

    low: int  # rung, 0 first
    high: int
    trials: int
    rank: float  # Spearman's correlation of the qualities
    corrected: float  # the same of the corrected ones, each held out
    gain: float  # mean, in units of the metric


class Correction(Record):
    """From the quality at one rung to that at a higher one."""

    agreement: Agreement
    centre: tuple[float, float]
    scale: tuple[float, float]
    slopes: tuple[float, float]  # of the gain; zeros where the features do not help

    def __call__(self, quality: float, latency: float) -> float:
        """The quality expected at the higher rung of a trial with this one at the lower, and this ratio of latency."""
        features = (quality, math.log(max(latency, 1e-12)))
        found = zip(features, self.centre, self.scale, self.slopes, strict=True)
        return quality + self.agreement.gain + sum(slope * (x - mid) / wide for x, mid, wide, slope in found)


def correction(pairs: Sequence[tuple[float, float, float]], low: int = 0, high: int = 1) -> Correction | None:
    """Of (quality at the lower rung, at the higher, ratio of latency); None without any. Equal input, equal result."""
    if not pairs:
        return None
    table = np.asarray(pairs, dtype=float)
    before, after = table[:, 0], table[:, 1]
    features = np.column_stack([before, np.log(np.maximum(table[:, 2], 1e-12))])
    gains = after - before
    raw = spearman(before, after)
    slopes, corrected = np.zeros(2), raw
    centre, scale = features.mean(0), np.where(features.std(0) > 1e-12, features.std(0), 1.0)
    if len(pairs) >= FEWEST:
        held = np.array([before[i] + _gain(features, gains, i) for i in range(len(pairs))])
        if (found := spearman(held, after)) > raw:
            slopes, corrected = _slopes((features - centre) / scale, gains), found
    return Correction(
        agreement=Agreement(
            low=low, high=high, trials=len(pairs), rank=raw, corrected=corrected, gain=float(gains.mean())
        ),
        centre=(float(centre[0]), float(centre[1])),
        scale=(float(scale[0]), float(scale[1])),
        slopes=(float(slopes[0]), float(slopes[1])),
    )


def _slopes(features: Floats, gains: Floats) -> Floats:
    return np.linalg.solve(features.T @ features + SHRINK * np.eye(2), features.T @ (gains - gains.mean()))


def _gain(features: Floats, gains: Floats, without: int) -> float:
    """Of one pair, by a fit to the others."""
    keep = np.arange(len(gains)) != without
    centre, scale = features[keep].mean(0), features[keep].std(0)
    scale = np.where(scale > 1e-12, scale, 1.0)
    slopes = _slopes((features[keep] - centre) / scale, gains[keep])
    return float(gains[keep].mean() + slopes @ ((features[without] - centre) / scale))


def spearman(one: Floats, other: Floats) -> float:
    """Rank correlation; 0 where one of them is constant, or there are fewer than two."""
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])


def quality(outcome: Outcome) -> float | None:
    """The lowest over devices; None where it was never measured."""
    return min((found.value.value for found in outcome.quality.values()), default=None)


def latency(outcome: Outcome) -> float | None:
    """Geometric mean of the ratios to the baseline; None where none was measured."""
    ratios = [reading.ratio.value for reading in outcome.readings.values()]
    return math.exp(sum(math.log(max(one, 1e-12)) for one in ratios) / len(ratios)) if ratios else None


def corrections(reached: Sequence[Mapping[int, Outcome]]) -> tuple[Correction, ...]:
    """From each rung to the next, as far as there are trials that reached both. `reached`: outcomes by trial number."""
    found: list[Correction] = []
    for low, (here, there) in enumerate(pairwise(reached)):
        pairs: list[tuple[float, float, float]] = []
        for number in sorted(here.keys() & there.keys()):
            values = quality(here[number]), quality(there[number]), latency(there[number])
            if values[0] is not None and values[1] is not None and values[2] is not None:
                pairs.append((values[0], values[1], values[2]))
        made = correction(pairs, low, low + 1)
        if made is None:
            break
        found.append(made)
    return tuple(found)


def expected(outcome: Outcome, rung: int, steps: Sequence[Correction]) -> float | None:
    """The quality to be expected at the highest rung that corrections lead to, of an outcome at `rung`."""
    value, ratio = quality(outcome), latency(outcome)
    if value is None or ratio is None:
        return value
    for step in steps[max(rung, 0) :]:
        value = step(value, ratio)
    return value
