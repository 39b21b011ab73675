"""The frozen table as a problem for `searchers.py`: real evaluations, looked up (`table_make.py` made them).

What the table lacks is said by extremely randomised trees fitted to what it has (scikit-learn); `error` says how well
they would say what it has, by cross-validation. The true front is the table's own. Latency is its one reading of each
file, quality its accuracy on 2,000 images: 0.7 points of standard error that every searcher sees alike.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.model_selection import cross_val_predict

from autocompress import pareto
from autocompress import space as sp
from autocompress.types import (
    Budget,
    Facts,
    Genotype,
    Goal,
    Interval,
    Limit,
    Outcome,
    Quality,
    Reading,
    Space,
    State,
    Trial,
)

FILE = Path(__file__).parent / "table.json.gz"
SPEEDUP = 1.25  # the budget, that of the closed forms
DROP = 0.2  # the quality that may be lost: 150 steps leave even an unchanged structure five points below the network


class Looked(Protocol):
    """A problem whose candidates are each evaluated once: `space`, `goals`, `limit` and `facts` are what it is."""

    space: Space
    facts: Facts
    goals: tuple[Goal, ...]
    limit: Limit

    def of(self, g: Genotype) -> tuple[float, float] | None:
        """(quality, latency over the network's own) of a genotype; None of one that failed."""
        ...


def asked(facts: Facts, drop: float = DROP) -> tuple[tuple[Goal, ...], Limit]:
    """The goals and the limit that hold for such a problem, where so much quality may be lost."""
    assert facts.baseline_quality is not None
    goals = pareto.goals([Budget(profile=name, speedup=SPEEDUP) for name in facts.baseline])
    return goals, Limit(metric="accuracy", floor=facts.baseline_quality.value.value - drop)


def reference(problem: Looked) -> tuple[float, float]:
    """Reference point of the hypervolume: the quality floor and the latency budget."""
    return problem.limit.floor, 1 / SPEEDUP


def front(problem: Looked, every: Iterable[tuple[float, float] | None]) -> tuple[tuple[float, float], ...]:
    """Of (quality, ratio) those that hold budget and floor and that none of the others beats, fastest first."""
    floor, most = reference(problem)
    held = sorted((one[1], -one[0]) for one in every if one and one[0] >= floor and one[1] <= most)
    best, found = -np.inf, []
    for ratio, lost in held:
        if -lost > best:
            best = -lost
            found.append((best, ratio))
    return tuple(found)


def trial(problem: Looked, number: int, g: Genotype, note: dict[str, object] | None = None) -> Trial:
    """The ended trial of a genotype: done, infeasible by its latency, or failed."""
    g = sp.canonical(problem.space, g)
    found = problem.of(g)
    if found is None:
        return Trial(number=number, genotype=g, state=State.FAILED, outcome=Outcome(reason="failed"))
    quality, ratio = found
    readings = {name: _reading(name, whole.ms.value, ratio) for name, whole in problem.facts.baseline.items()}
    if number and ratio > 1 / SPEEDUP:
        outcome = Outcome(readings=readings, reason="over every budget")
        return Trial(number=number, genotype=g, state=State.INFEASIBLE, outcome=outcome, note=note or {})
    said = Quality(metric="accuracy", split="selection", value=_exact(quality), samples=2000)
    outcome = Outcome(fidelity=1.0, readings=readings, quality=dict.fromkeys(readings, said))
    return Trial(number=number, genotype=g, state=State.DONE, outcome=outcome, note=note or {})


class FrozenTable:
    """The problem: `space`, `goals`, `limit`, `facts`; without `probe` the facts are what a network says of itself."""

    def __init__(self, *, probe: bool = False, path: Path = FILE) -> None:
        told = json.loads(gzip.decompress(path.read_bytes()))
        self.space = Space.model_validate(told["space"])
        facts = Facts.model_validate(told["facts"])
        self.facts = facts if probe else facts.model_copy(update={"probe": (), "integers": {}})
        self.rows = {_digits(g): (quality, ratio) for g, quality, _, ratio, _ in told["rows"]}
        self.failed = {_digits(g) for g in told["failed"]}
        self.looks = told["seconds"]["probe"] / told["seconds"]["evaluation"] if probe else 0.0
        self.goals, self.limit = asked(facts)

    def of(self, g: Genotype) -> tuple[float, float] | None:
        """(quality, latency over the network's own) of a genotype; None of one that failed."""
        g = sp.canonical(self.space, g)
        if g in self.failed:
            return None
        return self.rows[g] if g in self.rows else self.lacking[g]

    def quality(self, g: Genotype) -> float:
        """Accuracy of a genotype, 0 of one that failed."""
        found = self.of(g)
        return found[0] if found else 0.0

    def ratio(self, g: Genotype) -> float:
        """Latency over the network's own."""
        found = self.of(g)
        return found[1] if found else 1.0

    def trial(self, number: int, g: Genotype, note: dict[str, object] | None = None) -> Trial:
        """See `trial`."""
        return trial(self, number, g, note)

    def reference(self) -> tuple[float, float]:
        """See `reference`."""
        return reference(self)

    def front(self) -> tuple[tuple[float, float], ...]:
        """(quality, ratio) of what no candidate of the whole space beats, those that hold budget and floor."""
        return front(self, map(self.of, sp.every(self.space)))

    @cached_property
    def lacking(self) -> dict[Genotype, tuple[float, float]]:
        """What the table has not, as the trees say it."""
        absent = [g for g in sp.every(self.space) if g not in self.rows and g not in self.failed]
        if not absent:
            return {}
        inputs, targets = self._arrays()
        said = _trees().fit(inputs, targets).predict(np.array(absent, float))
        return {g: (float(quality), float(np.exp(ratio))) for g, (quality, ratio) in zip(absent, said, strict=True)}

    def error(self) -> dict[str, float]:
        """Mean absolute error of the trees, held against rows they were not fitted to: points, and share of latency."""
        inputs, targets = self._arrays()
        wrong = np.abs(cross_val_predict(_trees(), inputs, targets, cv=5) - targets).mean(0)
        return {"points": float(100 * wrong[0]), "latency": float(wrong[1])}

    def _arrays(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        inputs = np.array(list(self.rows), float)
        return inputs, np.array([(quality, np.log(ratio)) for quality, ratio in self.rows.values()])


def _reading(name: str, whole: float, ratio: float) -> Reading:
    """Milliseconds and ratio as if they had been read without error."""
    ms = _exact(ratio * whole)
    return Reading(
        profile=name,
        ms=ms,
        p95_ms=ms,
        baseline_ms=_exact(whole),
        ratio=_exact(ratio),
        samples=100,
        rounds=3,
    )


def _trees() -> Any:
    return ExtraTreesRegressor(300, random_state=0)


def _digits(text: str) -> Genotype:
    return tuple(map(int, text))


def _exact(value: float) -> Interval:
    return Interval(value=value, low=value, high=value)
