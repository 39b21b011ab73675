"""Certification: finalists are measured again, alone and in several sessions, and judged by their upper bounds.

Pure on records: how a file is measured is passed in. A budget counts as met only when the 95 % bound on the bad side
is within it. A noisy session widens the pooled interval, sessions that are all noisy certify nothing, and readings of
two different hosts are never pooled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Generic, TypeVar

from scipy.special import stdtrit

from autocompress.devices import Unreachable
from autocompress.pareto import meets, tails
from autocompress.types import Budget, Goal, Interval, Limit, Outcome, Quality, Reading, Record, SearchPlan

T = TypeVar("T")
MORE = ("speedup", "throughput")
"""Budgets of which more is better."""
SESSIONS = SearchPlan().sessions
"""Fresh timing processes per device and finalist, where nobody says otherwise: what one costs is about SESSION_S."""
SAMPLES = 500
"""Of which a device's quality is known well enough; splits are used whole, and a smaller one is said to be."""
SESSION_S = 2.5  # at most, for files that load fast: 1.5 s of timing, a process, two loads


class Bound(Record):
    """One budget on one device against the worse end of what was measured: the lower one where more is better."""

    profile: str
    name: str  # as in Budget: latency_ms, p95_ms, speedup ...
    budget: float
    measured: float | None  # None: not known, which does not meet it
    bound: float | None
    met: bool


class Checked(Record):
    """Where a certificate's quality was measured. Files run on their device's own provider where that is this host."""

    provider: str
    processor: str
    on_device: bool  # False: the device only times files, and another processor answered
    samples: int = 0


class Certificate(Record):
    """The measured proof that ships with an artifact. `reason` is one line and empty exactly when certified."""

    goal: str
    certified: bool
    reason: str = ""
    bounds: tuple[Bound, ...] = ()
    budget_met: bool
    quality_held: bool
    floor: float
    quality: dict[str, Quality] = {}  # selection split, of the ONNX file for each profile
    readings: dict[str, Reading] = {}  # pooled over sessions; `fingerprint` names the host
    sessions: dict[str, int] = {}
    each: dict[str, tuple[Reading, ...]] = {}  # the sessions themselves
    checked: dict[str, Checked] = {}
    size_mb: dict[str, float] = {}


@dataclass(frozen=True)
class Selection(Generic[T]):
    """Which finalist won, and what became of those tried. Without a certified one, `winner` is the closest."""

    winner: T
    certificate: Certificate
    tried: tuple[tuple[T, Certificate], ...]


def pool(readings: Sequence[Reading]) -> Reading:
    """Several sessions of the same file on the same device as one reading.

    Median and ratio are means of logarithms; the half width is the larger of what spread within the sessions and of
    what spread between them allow, the latter with Student's t (the modified Hartung-Knapp interval: Knapp and Hartung
    2003, section 3, equal weights). The worst session gives p95, p99, load time, memory, drift and slowing. Raises
    ValueError for no readings, or of two devices.
    """
    if not readings:
        raise ValueError("no readings to pool")
    first = readings[0]
    if any(reading.profile != first.profile for reading in readings):
        raise ValueError("readings of different profiles cannot be pooled")
    if len(readings) == 1:
        return first
    hosts = sorted({reading.fingerprint for reading in readings})
    return Reading(
        profile=first.profile,
        ms=_pooled([reading.ms for reading in readings]),
        p95_ms=max((reading.p95_ms for reading in readings), key=lambda one: one.high),
        p99_ms=_widest([reading.p99_ms for reading in readings]),
        p50_ms=_widest([reading.p50_ms for reading in readings]),
        worst_ms=_most([reading.worst_ms for reading in readings]),
        inputs=first.inputs,
        baseline_ms=_pooled([reading.baseline_ms for reading in readings]),
        ratio=_pooled([reading.ratio for reading in readings]),
        samples=sum(reading.samples for reading in readings),
        rounds=sum(reading.rounds for reading in readings),
        noisy=all(reading.noisy for reading in readings),  # a single one has widened the interval already
        quiet=any(reading.quiet for reading in readings),
        cores=tuple(sorted({core for reading in readings for core in reading.cores})),
        fingerprint="+".join(hosts),
        seconds=sum(reading.seconds for reading in readings),
        batch=first.batch,
        load_ms=max(reading.load_ms for reading in readings),
        memory_mb=_most([reading.memory_mb for reading in readings]),
        as_is=any(reading.as_is for reading in readings),
        energy_mj=mean(energies) if (energies := [e for r in readings if (e := r.energy_mj) is not None]) else None,
        drift=max((reading.drift for reading in readings), key=abs),
        slowed=max(reading.slowed for reading in readings),
    )


def _widest(intervals: Sequence[Interval | None]) -> Interval | None:
    """The one with the highest upper end; None where none is known."""
    return max((one for one in intervals if one is not None), key=lambda one: one.high, default=None)


def _most(values: Sequence[float | None]) -> float | None:
    return max((one for one in values if one is not None), default=None)


def _pooled(intervals: Sequence[Interval]) -> Interval:
    logs = [math.log(interval.value) for interval in intervals]
    count = len(logs)
    mean = sum(logs) / count
    # Intervals of medians need not be symmetric: the wider side speaks for both.
    within = sum(_half_width(interval) ** 2 for interval in intervals) / count
    between = sum((value - mean) ** 2 for value in logs) / (count - 1)
    quantile = float(stdtrit(count - 1, 0.975))
    half = max(math.sqrt(within / count), quantile * math.sqrt(between / count))
    return Interval(value=math.exp(mean), low=math.exp(mean - half), high=math.exp(mean + half))


def _half_width(interval: Interval) -> float:
    low = max(interval.low, 1e-12)
    return max(math.log(interval.high / interval.value), math.log(interval.value / low), 0.0)


def bounds(budget: Budget, reading: Reading, size_mb: float | None) -> tuple[Bound, ...]:
    """Every bound that a budget states, against the unfavourable end of the interval (the search's own rule)."""
    figures: dict[str, tuple[float | None, float | None]] = {
        "latency_ms": (reading.ms.value, reading.ms.high),
        **tails(reading),
        "speedup": (reading.speedup, 1.0 / reading.ratio.high),
        "throughput": (reading.throughput.value, reading.throughput.low),
        "size_mb": (size_mb, size_mb),
        "memory_mb": (reading.memory_mb, reading.memory_mb),
    }
    return tuple(
        Bound(
            profile=budget.profile,
            name=name,
            budget=getattr(budget, name),
            measured=figures[name][0],
            bound=figures[name][1],
            met=met,
        )
        for name, met in meets(reading, budget, size_mb).items()
    )


def room(bound: Bound) -> float:
    """How far inside its budget a bound lies, as a share of it; negative outside, -1 where it is not known."""
    if bound.bound is None:
        return -1.0
    share = bound.bound / bound.budget
    return share - 1.0 if bound.name in MORE else 1.0 - share


def spare(outcome: Outcome, goal: Goal, *, exact: bool = True) -> float:
    """Room in the tightest budget of a goal; infinite where nothing is bounded.

    Without `exact` a file's size does not count, which no second look changes.
    """
    found = [
        room(bound)
        for budget in goal.budgets
        for bound in bounds(budget, outcome.readings[budget.profile], outcome.size_mb.get(budget.profile))
        if exact or bound.name != "size_mb"
    ]
    return min(found, default=math.inf)


def judge(
    goal: Goal,
    readings: Mapping[str, Reading],
    *,
    quality: Mapping[str, Quality],
    size_mb: Mapping[str, float],
    limit: Limit,
    sessions: Mapping[str, Sequence[Reading]] | None = None,
    checked: Mapping[str, Checked] | None = None,
    away: Mapping[str, str] | None = None,
) -> Certificate:
    """Certificate of one file (or one per profile) for a goal; readings, quality and sizes are keyed by profile.

    The quality floor is held by the point estimate on the selection split, the same rule that steered the search; its
    interval stands beside it. Never raises for a bad candidate: the reason says what is missing.
    """
    profiles = [budget.profile for budget in goal.budgets]
    judged = tuple(
        bound
        for budget in goal.budgets
        if budget.profile in readings
        for bound in bounds(budget, readings[budget.profile], size_mb.get(budget.profile))
    )
    held = all(name in quality and quality[name].value.value >= limit.floor for name in profiles)
    unmeasured = [name for name in profiles if name not in readings]
    gone = away or {}
    reasons = [f"{name} was away ({gone[name]})" if name in gone else f"{name} was not measured" for name in unmeasured]
    reasons += [_says(bound) for bound in judged if not bound.met]
    reasons += [
        f"{limit.metric} {quality[name].value.value:.4f} on {name} is below the floor {limit.floor:.4f}"
        if name in quality
        else f"{limit.metric} on {name} is unknown"
        for name in profiles
        if name not in quality or quality[name].value.value < limit.floor
    ]
    reasons += [f"readings on {name} stayed noisy" for name in profiles if name in readings and readings[name].noisy]
    reasons += [
        f"sessions on {name} ran on different hosts"
        for name in profiles
        if name in readings and "+" in readings[name].fingerprint
    ]
    return Certificate(
        goal=goal.name,
        certified=not reasons,
        reason="; ".join(reasons),
        bounds=judged,
        budget_met=not unmeasured and all(bound.met for bound in judged),
        quality_held=held,
        floor=limit.floor,
        quality={name: quality[name] for name in profiles if name in quality},
        readings={name: readings[name] for name in profiles if name in readings},
        sessions={name: len((sessions or {}).get(name, (0,))) for name in profiles if name in readings},
        each={name: tuple(those) for name, those in (sessions or {}).items()},
        checked={name: checked[name] for name in profiles if name in checked} if checked else {},
        size_mb={name: size_mb[name] for name in profiles if name in size_mb},
    )


def _says(bound: Bound) -> str:
    if bound.bound is None:
        what = {"memory_mb": "memory", "size_mb": "size"}.get(bound.name, bound.name)
        return f"{bound.profile}: {what} unknown, budget {bound.budget:g} MB"
    if bound.name == "speedup":
        return f"{bound.profile}: {bound.bound:.2f}x (lower bound) of the {bound.budget:g}x asked"
    if bound.name == "throughput":
        return f"{bound.profile}: {bound.bound:.4g} samples/s (lower bound) of the {bound.budget:g} asked"
    if bound.name.endswith("_ms"):
        which = "" if bound.name == "latency_ms" else f"{bound.name.removesuffix('_ms')} "
        return f"{bound.profile}: {which}{bound.bound:.3f} ms (upper bound), budget {bound.budget:g} ms"
    what = "memory " if bound.name == "memory_mb" else ""
    return f"{bound.profile}: {what}{bound.bound:.3f} MB, budget {bound.budget:g} MB"


def certify(
    measure: Callable[[str], Reading],
    goal: Goal,
    *,
    quality: Mapping[str, Quality],
    size_mb: Mapping[str, float],
    limit: Limit,
    sessions: int = SESSIONS,
    checked: Mapping[str, Checked] | None = None,
) -> Certificate:
    """Measure a finalist on every device of a goal in `sessions` sessions, pool and judge.

    `measure(profile)` times the file of that profile alone, uncached. Devices take turns, so that sessions on one
    device lie apart in time. A noisy session is taken once more before it counts as noisy. A device that is Unreachable
    in any of them certifies nothing, and the reason says so.
    """
    if sessions < 1:
        raise ValueError("at least one session is needed")
    taken: dict[str, list[Reading]] = {budget.profile: [] for budget in goal.budgets}
    away: dict[str, str] = {}
    for _ in range(sessions):
        for profile, readings in taken.items():
            if profile in away:
                continue
            try:
                reading = measure(profile)
                readings.append(measure(profile) if reading.noisy else reading)
            except Unreachable as gone:
                away[profile] = str(gone)
    taken = {profile: readings for profile, readings in taken.items() if profile not in away}
    pooled = {profile: pool(readings) for profile, readings in taken.items()}
    return judge(
        goal, pooled, quality=quality, size_mb=size_mb, limit=limit, sessions=taken, checked=checked, away=away
    )


def choose(finalists: Sequence[T], certify_one: Callable[[T], Certificate]) -> Selection[T] | None:
    """Certify finalists in order until one passes; None without finalists.

    If none passes, the one that misses least is the winner by name, with its uncertified certificate.
    """
    tried: list[tuple[T, Certificate]] = []
    for finalist in finalists:
        certificate = certify_one(finalist)
        tried.append((finalist, certificate))
        if certificate.certified:
            return Selection(finalist, certificate, tuple(tried))
    if not tried:
        return None
    winner, certificate = min(tried, key=lambda pair: miss(pair[1]))
    return Selection(winner, certificate, tuple(tried))


def miss(certificate: Certificate) -> float:
    """How far a certificate is from holding: sum of relative excesses over budgets and below the floor; 0 if none."""
    total = 0.0
    for bound in certificate.bounds:
        total += max(-room(bound), 0.0)
    for quality in certificate.quality.values():
        total += max(certificate.floor - quality.value.value, 0.0) / max(abs(certificate.floor), 1e-9)
    if not certificate.certified and total == 0.0:
        return math.inf if not certificate.readings else 1e-9  # noisy or mixed hosts: close, but unproven
    return total
