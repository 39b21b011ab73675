"""From raw times to a reading: medians with intervals that hold whatever the distribution (see docs/measuring.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from autocompress.devices import Samples
from autocompress.types import Interval, Reading

NARROW = 0.02  # a ratio's interval narrower than this share of it needs no more samples
NOISY = 0.05  # wider than this it is refused
DISTURBED = 0.25  # share of runs with another process on the core: above it a median says little of the file
MIN_BLOCKS = 8  # six are needed for a 95 % interval of a median at all: 1 - 2 * 0.5**6 = 0.969


@cache
def rank(n: int) -> int:
    """Largest k with P(x_(k) <= median <= x_(n+1-k)) >= 0.95 for n independent samples, 0 if there is none.

    The number of samples below the median is binomial(n, 1/2) whatever their distribution. Source: H. A. David and
    H. N. Nagaraja, Order Statistics, 3rd ed., section 7.1; J.-Y. Le Boudec, Performance Evaluation, theorem 2.1.
    """
    below, k = math.ldexp(1.0, -n) if n < 1000 else 0.0, 0
    if n >= 1000:  # normal approximation, as Le Boudec gives it; 2**-n leaves the range of floats soon after
        return math.floor(n / 2 - 0.98 * math.sqrt(n))
    term = below
    while 1 - 2 * below >= 0.95:
        k += 1
        term *= (n - k + 1) / k
        below += term
    return k


def median(samples: Sequence[float]) -> Interval:
    """Median with its 95 % interval by order statistics; with fewer than six samples from least to greatest."""
    values = np.sort(np.asarray(samples, dtype=np.float64))
    k = max(rank(len(values)), 1)
    return Interval(value=float(np.median(values)), low=float(values[k - 1]), high=float(values[len(values) - k]))


def width(interval: Interval) -> float:
    """Width as a share of the value."""
    return (interval.high - interval.low) / interval.value


def blocks(samples: Samples, path: str) -> np.ndarray:
    """Medians of a file's blocks, shape (blocks,). A device that knows no blocks has its times cut into twelve."""
    times = np.asarray(samples.times_ms[path], dtype=np.float64)
    fewest = min(len(other) for other in samples.times_ms.values())
    parts = samples.blocks or min(12, fewest)
    return np.array([np.median(part) for part in np.array_split(times, parts)])


class Window:
    """What was timed so far of one file against the baseline; grows by the answers of a device."""

    def __init__(self, model: Path, baseline: Path) -> None:
        self._names = (str(model), str(baseline))
        self.times_ms: tuple[list[float], list[float]] = ([], [])  # model, baseline
        self.middles_ms: tuple[list[float], list[float]] = ([], [])  # medians of their blocks
        self.load_ms = 0.0
        self._disturbed = 0.0  # runs

    def add(self, samples: Samples) -> None:
        """Take in one answer."""
        for i, name in enumerate(self._names):
            self.times_ms[i].extend(samples.times_ms[name])
            self.middles_ms[i].extend(float(middle) for middle in blocks(samples, name))
        self._disturbed += samples.disturbed * sum(len(samples.times_ms[name]) for name in self._names)
        self.load_ms = max(self.load_ms, samples.load_ms.get(self._names[0], 0.0))

    @property
    def blocks(self) -> int:
        """Blocks of each file."""
        return len(self.middles_ms[0])

    @property
    def ratio(self) -> Interval:
        """Median of the ratios of neighbouring blocks: what slows the machine for a while slows both of a pair."""
        return median(np.divide(self.middles_ms[0], self.middles_ms[1]).tolist())

    @property
    def disturbed(self) -> float:
        """Share of the runs in which another process had the core."""
        return self._disturbed / sum(map(len, self.times_ms))

    @property
    def narrow(self) -> bool:
        """Whether more samples would not change a decision."""
        return self.blocks >= MIN_BLOCKS and width(self.ratio) < NARROW

    @property
    def noisy(self) -> bool:
        """Whether the ratio is too uncertain to be used, or the times are those of a core that was not ours."""
        return self.blocks < MIN_BLOCKS or width(self.ratio) > NOISY or self.disturbed > DISTURBED

    def reading(self, profile: str, *, seconds: float, quiet: bool, cores: tuple[int, ...], host: str) -> Reading:
        """The reading of this window. Intervals are of block medians: single runs of a block are not independent."""
        return Reading(
            profile=profile,
            ms=median(self.middles_ms[0]),
            p95_ms=float(np.quantile(self.times_ms[0], 0.95)),
            baseline_ms=median(self.middles_ms[1]),
            ratio=self.ratio,
            samples=len(self.times_ms[0]),
            rounds=self.blocks,
            noisy=self.noisy,
            quiet=quiet,
            cores=cores,
            fingerprint=host,
            seconds=round(seconds, 3),
        )
