"""After the search: the best few train on, one after another on all cores, as far as the kept time reaches.

Two rounds, as in successive halving (Jamieson and Talwalkar 2016): a few share the first part of the time alike, then
the best of each goal has what is left. Who they are is decided by quality as it is expected at the highest rung that
corrections lead to (`ranks`). All of it is journalled, so that an interrupted closing goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from autocompress import pareto, ranks
from autocompress.controller import Controller
from autocompress.types import Assignment, Goal, Limit, Outcome, Quality, State, Trial, TrialFailure

COUNT = 3  # of the first round, for each goal
FIRST = 0.4  # of the time, for the first round
MARK_S = 300.0  # a checkpoint at least so often
SLACK = 0.95  # of the time is planned: quality, files and readings take some
LEAST = 1e-4  # of the full training, that a trial goes on by in any case


class Paced(Protocol):
    """What tells how fast training is here."""

    def pace(self, assignment: Assignment) -> float:
        """Seconds of the full training of an assignment that has a checkpoint. Raises TrialFailure."""
        ...


@dataclass(frozen=True)
class Closing:
    """Picks who goes on and how far; `run` does the trials that the controller then asks for."""

    controller: Controller
    goals: tuple[Goal, ...]
    limit: Limit
    evaluator: Paced
    run: Callable[[], None]
    say: Callable[[str], None] = lambda _: None

    def go(self) -> None:
        """Both rounds, or what an interruption has left of them."""
        controller = self.controller
        while not controller.stopped:
            if controller.rounds and not controller.finished:
                self.run()
            elif controller.rounds == 2 or not self.begin():
                return

    def begin(self) -> bool:
        """Start the next round. False: there is nobody, or no time."""
        controller = self.controller
        left = controller.cost.minutes * 60 - controller.elapsed
        if controller.rounds == 0:
            numbers = self.best(COUNT)
            left *= FIRST if len(numbers) > len(self.goals) else 1.0
        else:
            numbers = self.best(1, set(controller.in_finals))
        paths: dict[int, tuple[float, ...]] = {}
        for number in numbers:
            path = self.path(number, SLACK * left / len(numbers))
            if path:
                paths[number] = path
        if not paths:
            return False
        told = ", ".join(f"#{number} to {path[-1]:.1%}" for number, path in paths.items())
        self.say(f"training the best further: {told} of the full training")
        controller.finals(paths)
        return True

    def path(self, number: int, seconds: float) -> tuple[float, ...]:
        """Fidelities that a trial goes through in this time; empty where it has none, or its training is complete."""
        assignment = self.controller.assignment(number)
        at = assignment.rungs[assignment.start - 1]
        if seconds <= 0 or at >= 1:
            return ()
        try:
            whole = self.evaluator.pace(assignment)
        except TrialFailure as failure:
            self.say(f"#{number} cannot go on: {failure}")
            return ()
        return marks(at, min(1.0, max(at + LEAST, at + seconds / max(whole, 1e-9))), whole)

    def best(self, count: int, among: set[int] | None = None) -> tuple[int, ...]:
        """The numbers of the best few of every goal, goals taking turns; those only that can go on."""
        steps = ranks.corrections(self.controller.reached)
        last = len(self.controller.plan.fidelity.rungs) - 1
        able = [
            trial
            for trial in self.controller.trials
            if trial.number > 0
            and trial.state in (State.STOPPED, State.DONE)
            and "checkpoint" in trial.outcome.files
            and (among is None or trial.number in among)
        ]
        if among is None:
            able = [at_the_top(trial, min(trial.rung, last), steps) for trial in able]
        ranked = [order(able, goal, self.limit)[:count] for goal in self.goals]
        turns = [one for place in zip(*(pad(numbers, count) for numbers in ranked), strict=True) for one in place]
        return tuple(dict.fromkeys(number for number in turns if number is not None))


def marks(at: float, to: float, whole: float) -> tuple[float, ...]:
    """Fidelities from `at` (excluded) to `to`, at most MARK_S of training apart, where the whole takes `whole` s."""
    pieces = max(1, math.ceil((to - at) * whole / MARK_S))
    found = (at + (to - at) * piece / pieces for piece in range(1, pieces))
    return tuple(dict.fromkeys((*(round(one, 6) for one in found), round(to, 6))))


def pad(numbers: Sequence[int], count: int) -> tuple[int | None, ...]:
    """As many as asked, None where there are too few."""
    return (*numbers, *(None,) * (count - len(numbers)))


def at_the_top(trial: Trial, rung: int, steps: Sequence[ranks.Correction]) -> Trial:
    """The trial with the quality that is to be expected of it at the highest rung."""
    value, now = ranks.expected(trial.outcome, rung, steps), ranks.quality(trial.outcome)
    if value is None or now is None:
        return trial
    return trial.model_copy(update={"outcome": shifted(trial.outcome, value - now)})


def shifted(outcome: Outcome, by: float) -> Outcome:
    """An outcome whose qualities are better by so much."""

    def moved(quality: Quality) -> Quality:
        value = quality.value
        return quality.model_copy(
            update={
                "value": value.model_copy(
                    update={"value": value.value + by, "low": value.low + by, "high": value.high + by}
                )
            }
        )

    qualities: Mapping[str, Quality] = {name: moved(quality) for name, quality in outcome.quality.items()}
    return outcome.model_copy(update={"quality": qualities})


def order(trials: Sequence[Trial], goal: Goal, limit: Limit) -> list[int]:
    """Numbers by violation, then quality, then latency; one of each genotype."""
    known = [(score, trial) for trial in trials if (score := pareto.score(trial.outcome, goal, limit)) is not None]
    known.sort(key=lambda one: (one[0].violation, -one[0].quality, one[0].latency, one[1].number))
    once: dict[tuple[int, ...], int] = {}
    for _, trial in known:
        once.setdefault(tuple(trial.genotype), trial.number)
    return list(once.values())
