"""Who goes on to the next rung: asynchronous successive halving over several goals (floor F1).

ASHA (Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning", algorithm 2) never waits for a rung to
fill: a trial goes on if it stands in the best share `keep` of all that have reached its rung so far, and one that was
stopped goes on later if it has come to stand there. Standing under one goal is the number of rung mates that dominate
a trial by constraints (Fonseca and Fleming 1993, with the domination of Deb et al. 2002); equals are ordered as
finalists are, by quality, then latency. Goals take turns, so the best on one device is not lost to the others'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from autocompress import pareto
from autocompress.types import Fidelity, Goal, Limit, Outcome, State, Trial

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Ladder:
    """Where every trial stood when it reached each rung. Grows with the journal; their order is all it knows."""

    def __init__(self, fidelity: Fidelity, goals: Sequence[Goal], limit: Limit, *, held: int = 0) -> None:
        """`held`: how many of the last rungs nobody is promoted to."""
        self.fidelity, self.goals, self.limit = fidelity, tuple(goals), limit
        self._open = len(fidelity.rungs) - 1 - held
        self._rungs = [_Rung(max(1, len(self.goals))) for _ in fidelity.rungs[:-1]]
        self._reached: list[dict[int, Outcome]] = [{} for _ in self._rungs]

    @property
    def reached(self) -> tuple[Mapping[int, Outcome], ...]:
        """Per rung but the last, outcomes by trial number."""
        return tuple(self._reached)

    def reach(self, number: int, rung: int, outcome: Outcome) -> None:
        """Trial `number` has reached `rung` (0 first) with `outcome`. A last rung needs no decision and is ignored."""
        if rung < len(self._rungs):
            self._rungs[rung].add(number, self._scores(outcome))
            self._reached[rung][number] = outcome

    def complete(self, number: int, outcome: Outcome) -> None:
        """Readings that were missing when the trial reached its rungs are known now: it stands where they put it."""
        for at, reached in enumerate(self._reached):
            before = reached.get(number)
            if before is None:
                continue
            reached[number] = before.model_copy(update={"readings": {**outcome.readings, **before.readings}})
            old = self._rungs[at]
            new = self._rungs[at] = _Rung(max(1, len(self.goals)))
            for other, known in reached.items():
                new.add(other, self._scores(known))
                new.set_waiting(other, bool(old.waiting[old.index[other]]))

    def _scores(self, outcome: Outcome) -> list[pareto.Score | None]:
        return [pareto.score(outcome, goal, self.limit) for goal in self.goals] or [None]

    def goes_on(self, number: int, rung: int) -> bool:
        """Whether a trial that has reached `rung` stands in the best share there now."""
        if rung >= self._open:
            return False
        found = self._rungs[rung]
        return bool(found.standing()[found.index[number]] < found.places(self.fidelity.keep))

    def wait(self, number: int, rung: int) -> None:
        """The trial was stopped at `rung`, and may be promoted later."""
        if 0 <= rung < len(self._rungs):
            self._rungs[rung].set_waiting(number, True)

    def leave(self, number: int, rung: int) -> None:
        """The trial was promoted from `rung`."""
        if 0 <= rung < len(self._rungs):
            self._rungs[rung].set_waiting(number, False)

    def promotable(self) -> int | None:
        """The stopped trial that now deserves to go on: highest rung first, then best standing."""
        for rung in reversed(self._rungs[: self._open]):
            number = rung.first_waiting(self.fidelity.keep)
            if number is not None:
                return number
        return None


class _Rung:
    """Columns of one rung: a row per trial in the order of arrival, a column per goal."""

    def __init__(self, goals: int) -> None:
        self.index: dict[int, int] = {}
        self.goals, self.size = goals, 0
        self.numbers: Ints = np.zeros(64, np.int64)
        self.waiting = np.zeros(64, np.bool_)
        self.values: Floats = np.zeros((3, goals, 64))  # quality, latency, violation
        self.above: Ints = np.zeros((goals, 64), np.int64)  # how many dominate
        self._standing: Ints | None = None
        self._stale = True

    def add(self, number: int, scores: Sequence[pareto.Score | None]) -> None:
        if number in self.index:
            raise ValueError(f"trial {number} reached this rung before")
        if self.size == len(self.numbers):
            self._grow()
        at, n = self.size, self.size
        for goal, score in enumerate(scores):
            # Never measured under this goal: behind every other, and equal to its like.
            q, lat, v = (score.quality, score.latency, score.violation) if score else (-math.inf, math.inf, math.inf)
            quality, latency, violation = self.values[:, goal, :n]
            if v > 0:
                below = violation > v
                over = violation < v
            else:
                free = violation <= 0
                below = ~free | ((q >= quality) & (lat <= latency) & ((q > quality) | (lat < latency)))
                over = free & (quality >= q) & (latency <= lat) & ((quality > q) | (latency < lat))
            self.above[goal, :n] += below
            self.above[goal, at] = np.count_nonzero(over)
            self.values[:, goal, at] = q, lat, v
        self.numbers[at], self.waiting[at] = number, False
        self.index[number] = at
        self.size += 1
        self._standing, self._stale = None, True

    def standing(self) -> Ints:
        """Place of every row, 0 the best, goals taking turns."""
        if self._standing is None:
            n = self.size
            turn: Ints = np.full(n, np.iinfo(np.int64).max)
            for goal in range(self.goals):
                quality, latency, _ = self.values[:, goal, :n]
                order = np.lexsort((self.numbers[:n], latency, -quality, self.above[goal, :n]))
                place = np.empty(n, np.int64)
                place[order] = np.arange(n)
                turn = np.minimum(turn, place * self.goals + goal)
            self._standing = np.empty(n, np.int64)
            self._standing[np.argsort(turn)] = np.arange(n)
        return self._standing

    def places(self, keep: float) -> int:
        """How many may go on; the first to arrive always may, so that a search has a full result early."""
        return max(1, math.floor(self.size * keep + 1e-9))

    def set_waiting(self, number: int, waiting: bool) -> None:
        self.waiting[self.index[number]] = waiting
        self._stale = True

    def first_waiting(self, keep: float) -> int | None:
        if not self._stale:
            return None  # asked before, and nothing has changed since
        rows = np.flatnonzero(self.waiting[: self.size])
        if len(rows):
            standing = self.standing()[rows]
            best = int(np.argmin(standing))
            if standing[best] < self.places(keep):
                return int(self.numbers[rows[best]])
        self._stale = False
        return None

    def _grow(self) -> None:
        size = len(self.numbers)
        self.numbers = np.concatenate([self.numbers, np.zeros(size, np.int64)])
        self.waiting = np.concatenate([self.waiting, np.zeros(size, np.bool_)])
        self.values = np.concatenate([self.values, np.zeros((3, self.goals, size))], axis=2)
        self.above = np.concatenate([self.above, np.zeros((self.goals, size), np.int64)], axis=1)


def goes_on(
    trials: Sequence[Trial], trial: Trial, rung: int, fidelity: Fidelity, goals: Sequence[Goal], limit: Limit
) -> bool:
    """Whether `trial` goes on from `rung` (0 first) beside `trials`: records as they were when they reached a rung."""
    ladder = Ladder(fidelity, goals, limit)
    for other in trials:
        if other.number != trial.number and other.rung == rung:
            ladder.reach(other.number, rung, other.outcome)
    ladder.reach(trial.number, rung, trial.outcome)
    return ladder.goes_on(trial.number, rung)


def promotable(trials: Sequence[Trial], fidelity: Fidelity, goals: Sequence[Goal], limit: Limit) -> Trial | None:
    """The stopped one of `trials` that now deserves to go on. A trial's last record of a rung counts."""
    ladder = Ladder(fidelity, goals, limit)
    last = {trial.number: trial for trial in trials}
    for (number, rung), trial in {(trial.number, trial.rung): trial for trial in trials if trial.rung >= 0}.items():
        ladder.reach(number, rung, trial.outcome)
        if last[number].state is State.STOPPED and last[number].rung == rung:
            ladder.wait(number, rung)
    number = ladder.promotable()
    return None if number is None else last[number]
