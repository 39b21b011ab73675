"""From raw times to a reading: medians with intervals that hold whatever the distribution (see docs/measuring.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from autocompress.devices import Samples
from autocompress.types import Interval, Reading, Runs

NARROW = 0.02  # a ratio's interval narrower than this share of it needs no more samples
NOISY = 0.05  # wider than this it is refused
DISTURBED = 0.25  # share of runs with another process on the core: above it a median says little of the file
SLOW = 0.05  # a baseline slower than at its fastest by more: the device is not what it was, nor is the ratio
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


def parts(samples: Samples, path: str) -> list[np.ndarray]:
    """A file's times by blocks. A device that knows no blocks has its times cut into twelve."""
    times = np.asarray(samples.times_ms[path], dtype=np.float64)
    fewest = min(len(other) for other in samples.times_ms.values())
    return np.array_split(times, samples.blocks or min(12, fewest))


def tail(blocks_ms: Sequence[np.ndarray], share: float, draws: int = 400) -> Interval:
    """A quantile of single runs with its 95 % interval: whole blocks are drawn anew, as runs within one are alike.

    The percentile bootstrap (B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3) over
    blocks. What lies beyond the largest time seen it cannot know. The draws are fixed: equal times, equal interval.
    """
    times = np.concatenate(blocks_ms)
    weight = np.concatenate([np.full(len(part), i) for i, part in enumerate(blocks_ms)])
    order = np.argsort(times, kind="stable")
    drawn = np.random.default_rng(0).multinomial(
        len(blocks_ms), np.full(len(blocks_ms), 1 / len(blocks_ms)), size=draws
    )
    reached = np.cumsum(drawn[:, weight[order]], axis=1)
    found = times[order][np.argmax(reached >= share * reached[:, -1:], axis=1)]
    value = float(np.quantile(times, share))
    low, high = (float(end) for end in np.quantile(found, (0.025, 0.975)))
    return Interval(value=value, low=min(low, value), high=max(high, value))


def drift(baseline_ms: Sequence[float]) -> float:
    """How much slower the baseline is in the last third of its blocks than in the first, as a share; 0 below six."""
    third = len(baseline_ms) // 3
    if third < 2:
        return 0.0
    return float(np.median(baseline_ms[-third:]) / np.median(baseline_ms[:third]) - 1.0)


def quotient(model_ms: Sequence[float], baseline_ms: Sequence[float]) -> Interval:
    """Median of the ratios of neighbouring blocks' medians."""
    return median(np.divide(model_ms, baseline_ms).tolist())


def middle(block: np.ndarray | Sequence[float], *, fed: bool) -> float:
    """What a block says: the median of its runs, the mean where each run had another input."""
    return float(np.mean(block) if fed else np.median(block))


def figures(runs: Runs) -> dict[str, Interval | float]:
    """`ms`, `baseline_ms`, `ratio`, `p95_ms` and `p99_ms` as single runs say them.

    Of real inputs `p50_ms` too, and the slowest one's median as `worst_ms`.
    """
    blocks = [np.asarray(part) for part in runs.model]
    middles = [
        [middle(part, fed=fed) for part in parts_]
        for parts_, fed in ((runs.model, runs.inputs > 0), (runs.baseline, False))
    ]
    return {
        "ms": median(middles[0]),
        "baseline_ms": median(middles[1]),
        "ratio": quotient(*middles),
        "p95_ms": tail(blocks, 0.95),
        "p99_ms": tail(blocks, 0.99),
        **({"p50_ms": tail(blocks, 0.5), "worst_ms": slowest(blocks)} if runs.inputs else {}),
    }


def slowest(blocks: Sequence[np.ndarray]) -> float:
    """Median time of the input that takes longest; every block has all inputs in one order."""
    return float(np.median(np.stack(blocks), axis=0).max())


class Window:
    """What was timed so far of one file against the baseline; grows by the answers of a device."""

    def __init__(self, model: Path, baseline: Path) -> None:
        self._names = (str(model), str(baseline))
        self.times_ms: tuple[list[float], list[float]] = ([], [])  # model, baseline
        self.middles_ms: tuple[list[float], list[float]] = ([], [])  # medians of their blocks
        self.parts_ms: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])  # block by block
        self.load_ms = 0.0
        self.waited_s = 0.0  # for other measurements on the target
        self.memory_mb: float | None = None
        self.energy_mj: float | None = None
        self.inputs = 0  # that the model brings; 0: one stand-in
        self._disturbed = 0.0  # runs

    def add(self, samples: Samples) -> None:
        """Take in one answer."""
        self.inputs = samples.fed.get(self._names[0], 0)
        for i, name in enumerate(self._names):
            self.times_ms[i].extend(samples.times_ms[name])
            blocks = parts(samples, name)
            self.parts_ms[i].extend(blocks)
            self.middles_ms[i].extend(middle(part, fed=name in samples.fed) for part in blocks)
        self._disturbed += samples.disturbed * sum(len(samples.times_ms[name]) for name in self._names)
        self.waited_s += samples.waited_s
        self.load_ms = max(self.load_ms, samples.load_ms.get(self._names[0], 0.0))
        self.memory_mb = samples.memory_mb.get(self._names[0], self.memory_mb)
        self.energy_mj = samples.energy_mj.get(self._names[0], self.energy_mj)

    @property
    def runs(self) -> Runs:
        """All single runs."""
        model, baseline = (tuple(tuple(map(float, part)) for part in parts_) for parts_ in self.parts_ms)
        return Runs(model=model, baseline=baseline, inputs=self.inputs)

    @property
    def blocks(self) -> int:
        """Blocks of each file."""
        return len(self.middles_ms[0])

    @property
    def ratio(self) -> Interval:
        """Median of the ratios of neighbouring blocks: what slows the machine for a while slows both of a pair."""
        return quotient(*self.middles_ms)

    @property
    def baseline_ms(self) -> Interval:
        """The baseline's median."""
        return median(self.middles_ms[1])

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

    def worst(self) -> float | None:
        """Median time of the slowest input; None where there is one."""
        if not self.inputs:
            return None
        return slowest(self.parts_ms[0])

    def reading(
        self, profile: str, *, seconds: float, quiet: bool, cores: tuple[int, ...], host: str, batch: int = 1
    ) -> Reading:
        """The reading of this window. Intervals are of block medians: single runs of a block are not independent."""
        return Reading(
            profile=profile,
            ms=median(self.middles_ms[0]),
            p95_ms=tail(self.parts_ms[0], 0.95),
            p99_ms=tail(self.parts_ms[0], 0.99),
            p50_ms=tail(self.parts_ms[0], 0.5) if self.inputs else None,
            worst_ms=self.worst(),
            inputs=self.inputs,
            baseline_ms=self.baseline_ms,
            ratio=self.ratio,
            samples=len(self.times_ms[0]),
            rounds=self.blocks,
            noisy=self.noisy,
            quiet=quiet,
            cores=cores,
            fingerprint=host,
            seconds=round(seconds, 3),
            batch=batch,
            load_ms=round(self.load_ms, 3),
            memory_mb=self.memory_mb,
            energy_mj=self.energy_mj,
            drift=round(drift(self.middles_ms[1]), 4),
        )
