"""Goals and what is better (floor F1): scores with violations, constraint domination, fronts, hypervolume.

Quality is higher-is-better in the metric's own unit. Latency is the ratio to the interleaved baseline, lower is better.
A budget counts as met when the upper bound of the reading's confidence interval is not above it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import moocore  # pyright: ignore[reportMissingTypeStubs]
import numpy as np

from autocompress.types import Budget, Goal, Interval, Limit, Outcome, Reading, State, Trial

ALL_DEVICES = "all-devices"


@dataclass(frozen=True, slots=True)
class Score:
    """One trial under one goal. `violation` 0 means that every budget and the quality floor hold."""

    quality: float  # the lowest over the goal's devices; -inf where it was never measured
    latency: float  # ratio to the baseline, geometric mean over the goal's devices
    violation: float  # relative excess over the bounds, summed over devices, plus the relative shortfall of quality


def goals(budgets: Sequence[Budget]) -> tuple[Goal, ...]:
    """One goal per device, and `all-devices` where there are several."""
    single = tuple(Goal(name=budget.profile, budgets=(budget,)) for budget in budgets)
    return single if len(single) < 2 else (*single, Goal(name=ALL_DEVICES, budgets=tuple(budgets)))


def meets(reading: Reading, budget: Budget, size_mb: float | None) -> dict[str, bool]:
    """Per bound that the budget sets, whether it holds by the upper confidence bound. An unknown size does not hold."""
    return {bound: excess <= 0.0 for bound, excess in _excess(reading, budget, size_mb).items()}


def at_best(reading: Reading) -> Reading:
    """A reading as the favourable end of its interval."""
    figures = {name: getattr(reading, name) for name in ("ms", "p50_ms", "p95_ms", "p99_ms", "ratio")}
    best = {name: one.low for name, one in figures.items() if one is not None}
    return reading.model_copy(update={name: Interval(value=at, low=at, high=at) for name, at in best.items()})


def settled(reading: Reading, budgets: Sequence[Budget]) -> bool:
    """Whether both ends of a reading's interval say the same of its budgets: then noise changes nothing."""
    own = [budget for budget in budgets if budget.profile == reading.profile]
    return bool(own) and all(meets(reading, budget, None) == meets(at_best(reading), budget, None) for budget in own)


def over_every_budget(
    readings: Mapping[str, Reading], budgets: Sequence[Budget], size_mb: Mapping[str, float] | None = None
) -> bool:
    """Whether each device's budget is broken already, so that training is not worth it. False without budgets.

    A bound on size counts only where `size_mb` (profile -> MB) knows the file, one on memory only where the device
    tells it; a device not measured is not over.
    """
    sizes = size_mb or {}
    for budget in budgets:
        reading = readings.get(budget.profile)
        if reading is None:
            return False
        known = meets(reading, budget, sizes.get(budget.profile))
        if budget.profile not in sizes:
            known.pop("size_mb", None)
        if reading.memory_mb is None:
            known.pop("memory_mb", None)
        if all(known.values()):
            return False
    return bool(budgets)


def score(outcome: Outcome, goal: Goal, limit: Limit) -> Score | None:
    """Quality, latency and violation of an outcome under a goal; None where a device of the goal was never measured.

    Without quality (an infeasible trial) quality is -inf and the violation that of the budgets, at least 1 where these
    all hold: such a trial ranks by its violation and never counts as feasible.
    """
    violation, log_ratio = 0.0, 0.0
    lowest = math.inf
    for budget in goal.budgets:
        reading = outcome.readings.get(budget.profile)
        if reading is None:
            return None
        log_ratio += math.log(max(reading.ratio.value, 1e-12))
        size = outcome.size_mb.get(budget.profile)
        violation += sum(max(0.0, excess) for excess in _excess(reading, budget, size).values())
        found = outcome.quality.get(budget.profile)
        value = -math.inf if found is None or math.isnan(found.value.value) else found.value.value
        lowest = min(lowest, value)
    latency = math.exp(log_ratio / len(goal.budgets)) if goal.budgets else 1.0
    if not math.isfinite(lowest):
        return Score(-math.inf, latency, violation if violation > 0 else 1.0)
    if lowest < limit.floor:
        violation += (limit.floor - lowest) / max(abs(limit.floor), 1e-9)
    return Score(lowest, latency, violation)


def of(trial: Trial, goal: Goal, limit: Limit) -> Score | None:
    """Score of a trial; None for one that failed, whatever it had measured before."""
    return None if trial.state is State.FAILED else score(trial.outcome, goal, limit)


def dominates(a: Score, b: Score) -> bool:
    """Constraint domination (Deb et al. 2002, section VI): a strict partial order.

    A feasible score dominates an infeasible one, of two infeasible ones the smaller violation dominates, and of two
    feasible ones that which is no worse in both objectives and better in one.
    """
    if a.violation > 0 or b.violation > 0:
        return a.violation < b.violation
    return a.quality >= b.quality and a.latency <= b.latency and (a.quality > b.quality or a.latency < b.latency)


def sort(scores: Sequence[Score]) -> list[list[int]]:
    """Fronts by constraint domination, the best first, as lists of indices into `scores`; O(n log n).

    Two objectives allow the sweep of Jensen (2003): by falling quality, each score joins the first front whose lowest
    latency so far does not dominate it. Infeasible scores follow, one front per distinct violation.
    """
    feasible = [i for i, s in enumerate(scores) if s.violation <= 0]
    feasible.sort(key=lambda i: (-scores[i].quality, scores[i].latency))
    fronts: list[list[int]] = []
    last: list[float] = []  # per front the lowest latency so far, rising from front to front
    for i in feasible:
        at = bisect_right(last, scores[i].latency)
        # A score equal to the last of the front before does not dominate it: they share that front.
        if at and _same(scores[fronts[at - 1][-1]], scores[i]):
            at -= 1
        if at == len(fronts):
            fronts.append([])
            last.append(math.inf)
        fronts[at].append(i)
        last[at] = scores[i].latency
    by_violation: dict[float, list[int]] = {}
    for i, s in enumerate(scores):
        if s.violation > 0:
            by_violation.setdefault(s.violation, []).append(i)
    return fronts + [by_violation[violation] for violation in sorted(by_violation)]


def crowding(scores: Sequence[Score], front: Sequence[int]) -> list[float]:
    """Crowding distance (Deb et al. 2002, III-B) of each member of `front`, in its order; the ends are infinite."""
    distance = dict.fromkeys(front, 0.0)
    for values in ([s.quality for s in scores], [s.latency for s in scores]):
        order = sorted(front, key=values.__getitem__)
        low, high = values[order[0]], values[order[-1]]
        distance[order[0]] = distance[order[-1]] = math.inf
        if not (math.isfinite(low) and high > low):
            continue
        for before, i, after in zip(order, order[1:], order[2:], strict=False):
            distance[i] += (values[after] - values[before]) / (high - low)
    return [distance[i] for i in front]


def front(trials: Sequence[Trial], goal: Goal, limit: Limit) -> tuple[Trial, ...]:
    """The trade-off of the fully evaluated trials: not dominated in quality and latency, by rising latency.

    Budgets and the floor are left out of account on purpose, so that they can be drawn into the picture.
    """
    known = [(s, t) for t in trials if t.state is State.DONE and (s := of(t, goal, limit)) and math.isfinite(s.quality)]
    free = [Score(s.quality, s.latency, 0.0) for s, _ in known]
    first = sort(free)[0] if free else []
    return tuple(known[i][1] for i in sorted(first, key=lambda i: (free[i].latency, known[i][1].number)))


def best(trials: Sequence[Trial], goal: Goal, limit: Limit, n: int) -> tuple[Trial, ...]:
    """At most `n` finalists: feasible fully evaluated ones by highest quality, then lower latency.

    Where none is feasible, the closest by violation, whatever state their measured trial ended in. One per genotype.
    """
    known = [(s, t) for t in trials if t.state.ended and (s := of(t, goal, limit))]
    chosen = [(s, t) for s, t in known if t.state is State.DONE and s.violation <= 0]
    if chosen:
        chosen.sort(key=lambda entry: (-entry[0].quality, entry[0].latency, entry[1].number))
    else:
        chosen = sorted(known, key=lambda entry: (entry[0].violation, -entry[0].quality, entry[1].number))
    once = {trial.genotype: trial for _, trial in reversed(chosen)}
    return tuple(trial for _, trial in chosen if once[trial.genotype] is trial)[:n]


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Area that (quality, latency) points dominate down to the reference, by moocore. High quality, low latency.

    Points that do not dominate the reference add nothing.
    """
    inside = [point for point in points if point[0] > reference[0] and point[1] < reference[1]]
    if not inside:
        return 0.0
    return float(moocore.hypervolume(np.asarray(inside, dtype=float), ref=list(reference), maximise=[True, False]))


def tails(reading: Reading) -> dict[str, tuple[float | None, float | None]]:
    """Quantiles of single runs by their names in a budget: value and upper bound, None where it was not kept.

    `worst_ms` is of the slowest of the real inputs; of a file that takes one way for all of them, of its median.
    """
    p50, p99, worst = reading.p50_ms or reading.ms, reading.p99_ms, reading.worst_ms or reading.ms.high
    return {
        "p50_ms": (p50.value, p50.high),
        "p95_ms": (reading.p95_ms.value, reading.p95_ms.high),
        "p99_ms": (None, None) if p99 is None else (p99.value, p99.high),
        "worst_ms": (worst, worst),
    }


def _same(a: Score, b: Score) -> bool:
    return a.quality == b.quality and a.latency == b.latency


def _excess(reading: Reading, budget: Budget, size_mb: float | None) -> dict[str, float]:
    """Per bound that is set, the relative excess of the upper confidence bound; not above 0 where it is met."""
    found: dict[str, float] = {}
    if budget.latency_ms is not None:
        found["latency_ms"] = reading.ms.high / budget.latency_ms - 1.0
    for name, (_, high) in tails(reading).items():
        if (asked := getattr(budget, name)) is not None:
            found[name] = 1.0 if high is None else high / asked - 1.0
    if budget.speedup is not None:
        found["speedup"] = reading.ratio.high * budget.speedup - 1.0
    if budget.throughput is not None:
        found["throughput"] = budget.throughput / reading.throughput.low - 1.0
    if budget.size_mb is not None:
        found["size_mb"] = 1.0 if size_mb is None else size_mb / budget.size_mb - 1.0
    if budget.memory_mb is not None:
        found["memory_mb"] = 1.0 if reading.memory_mb is None else reading.memory_mb / budget.memory_mb - 1.0
    return found
