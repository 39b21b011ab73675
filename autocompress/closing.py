"""After the search: the best few train on, as far as the kept time reaches.

As in successive halving (Jamieson and Talwalkar 2016) a few share the first part of the time, one on each worker, or
one after another where there is one worker; then the best of each goal has what is left, on all cores, or on one where
that is faster (others use the machine too). Where threads do not pay (many small layers), the few train side by side
for the whole time. Who they are is decided by quality as it is expected at the highest rung that corrections lead to
(`ranks`), and by what is left of the network. All is journalled: an interrupted closing goes on where it was.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from autocompress import certify, pareto, ranks
from autocompress.controller import Controller
from autocompress.types import Assignment, Goal, Limit, Outcome, Quality, State, Trial, TrialFailure

COUNT = 3  # of the first round, for each goal, at least
FIRST = 0.25  # of the time, for the first round
PAYS = 0.25  # of a core's worth, that each further thread must bring: what counts is how far the best one gets
MARK_S = 300.0  # a checkpoint at least so often
SLACK = 0.92  # of the time is planned: quality, files and readings take some
WORTH = 0.1  # of the kept time: with less left there is no further round
LAGS = 0.05  # of the best quality, that a slower candidate may lack after little training
PAIRED = 1 / 3  # of the interval of one quality, that a difference of two varies by: most answers are the same
EDGE = 0.01  # of a budget, that who trains longest should be within: two processes that load one file differ by as much
ALIKE = 0.02  # of the latency, within which two are as slow: a third of a block of a ResNet-56
LEAST = 1e-4  # of the full training, that a trial goes on by in any case
FAR = 0.02  # of the parent's quality, that who goes on may lack: from there on the whole rate begins anew
LOWEST = 0.25  # of the rate, next to the parent's quality


class Pace(Protocol):
    """What tells how fast training is here."""

    def __call__(self, assignment: Assignment, threads: int) -> float:
        """Seconds of the full training of an assignment that has a checkpoint. Raises TrialFailure."""
        ...


@dataclass(frozen=True)
class Closing:
    """Picks who goes on and how far. `together` and `alone` do the trials that the controller then asks for.

    The former with one thread on each of several `workers`, the latter one after another with as many as it is told.
    """

    controller: Controller
    goals: tuple[Goal, ...]
    limit: Limit
    pace: Pace
    together: Callable[[], None]
    alone: Callable[[int], None]
    workers: int = 1
    threads: int = 1
    crowded: Callable[[], bool] = lambda: os.getloadavg()[0] > (os.cpu_count() or 1)
    say: Callable[[str], None] = lambda _: None

    def go(self) -> None:
        """Both rounds, or what an interruption has left of them; once more for the best where minutes were added."""
        controller = self.controller
        while not controller.stopped:
            if controller.rounds and not controller.finished:
                beside = not controller.narrowed and self.workers > 1
                self.together() if beside else self.alone(self.width)
            elif (controller.narrowed and not controller.extended) or not self.begin():
                return

    def begin(self) -> bool:
        """Start the next round. False: there is nobody, or no time.

        Where all of the first few have failed the next few take their place. Without time the best is finished as it
        is: nobody has been before.
        """
        controller = self.controller
        cost = controller.cost
        left = cost.minutes * 60 - controller.elapsed
        held = set(controller.in_finals) - controller.fell
        if left < WORTH * cost.final * cost.minutes * 60:
            if held or len(controller.fell) > COUNT:
                return False
            numbers, each, threads = self.best(1, self.others), 0.0, self.width
            if numbers:
                self.say("no time is left for the best few: the best is finished as it is")
        elif not held:
            numbers = self.best(max(COUNT, self.workers), self.others)
            if not numbers:
                return False
            waves = math.ceil(len(numbers) / self.workers)
            each = left / waves
            if len(numbers) > len(self.goals) and (self.workers == 1 or self.threads_pay(numbers[0])):
                each *= FIRST
            threads = 1 if self.workers > 1 else self.width
        else:
            numbers = self.best(1, held)
            each, threads = left / max(1, len(numbers)), self.width
        paths = {number: path for number in numbers if (path := self.path(number, SLACK * each, threads))}
        if not paths:
            return False
        told = ", ".join(f"#{number} to {path[-1]:.1%}" for number, path in paths.items())
        self.say(f"training the best further: {told} of the full training")
        controller.finals(paths, {number: self.peak(number) for number in paths})
        return True

    def threads_pay(self, number: int) -> bool:
        """Whether all threads on one network are nearly as much as a network for each."""
        return not self.crowded() and self.gain(number) >= 1 + PAYS * (self.threads - 1)

    @cached_property
    def width(self) -> int:
        """Threads of who trains alone: all where they are faster than one, which they are not beside other work."""
        some = sorted(self.controller.in_finals) or self.best(1, self.others)
        number = next((n for n in some if self.controller.assignment(n).checkpoint), None)
        return self.threads if number is None or self.gain(number) > 1 else 1

    def gain(self, number: int) -> float:
        """How much faster all threads train a trial than one; 0 where that cannot be tried."""
        if self.threads < 2:
            return 0.0
        assignment = self.controller.assignment(number)
        try:
            one, many = self.pace(assignment, 1), self.pace(assignment, self.threads)
        except TrialFailure:
            return 0.0
        found = one / max(many, 1e-9)
        self.say(f"{self.threads} threads train {found:.2f} times as fast as one")
        return found

    def path(self, number: int, seconds: float, threads: int) -> tuple[float, ...]:
        """Fidelities that a trial goes through in this time, LEAST at least; empty where its training is complete."""
        assignment = self.controller.assignment(number)
        at = assignment.rungs[assignment.start - 1]
        if at >= 1:
            return ()
        try:
            whole = self.pace(assignment, threads)
        except TrialFailure as failure:
            self.say(f"#{number} cannot go on: {failure}")
            return ()
        return marks(at, min(1.0, at + max(LEAST, seconds / max(whole, 1e-9))), whole)

    def peak(self, number: int) -> float:
        """The share of the rate at which a trial goes on: the less, the nearer it has come to the parent's quality.

        The whole rate undoes what was learned and needs long to find back: of a ResNet-56 cut to 13 blocks that had
        lost half a point after two epochs, five more at a quarter of the rate came as far as 22 at all of it. From two
        points on half of the rate won nothing, and where little of much has been learned it lost as much again.
        """
        parent = self.controller.facts.baseline_quality
        reached = ranks.quality(next(one for one in self.controller.trials if one.number == number).outcome)
        if parent is None or reached is None or parent.value.value == 0:
            return 1.0
        lost = (parent.value.value - reached) / abs(parent.value.value)
        return round(min(1.0, max(LOWEST, lost / FAR)), 4)

    @property
    def others(self) -> set[int]:
        """Trials that have not gone on yet."""
        return {trial.number for trial in self.controller.trials} - set(self.controller.in_finals)

    def best(self, count: int, among: set[int]) -> tuple[int, ...]:
        """The numbers of the best few of every goal, goals taking turns; those only that can go on."""
        steps = ranks.corrections(self.controller.reached)
        last = len(self.controller.plan.fidelity.rungs) - 1
        able = [
            trial
            for trial in self.controller.trials
            if trial.number > 0
            and trial.state in (State.STOPPED, State.DONE)
            and "checkpoint" in trial.outcome.files
            and trial.number in among
        ]
        fresh = not among & set(self.controller.in_finals)
        if fresh:
            able = [at_the_top(trial, min(trial.rung, last), steps) for trial in able]
        choose = contenders if fresh else first
        ranked = [choose(order(able, goal, self.limit), count) for goal in self.goals]
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


@dataclass(frozen=True)
class Ranked:
    """A trial under one goal."""

    number: int
    score: pareto.Score
    sure: float  # half of the interval of its quality
    room: float = math.inf  # how far within the tightest budget its times are, as a share of that


def contenders(ranked: Sequence[Ranked], count: int) -> list[int]:
    """Who goes on after little training: the best, those that are slower than all better ones, then the others.

    A network of which little is left learns what it can in a moment, one of which more is left gets farther: the first
    rungs prefer what is cut too deeply. Of the slower ones those count that are within LAGS of the best quality.
    """
    if not ranked:
        return []
    chosen = [ranked[0]]
    least = ranked[0].score.quality - LAGS * abs(ranked[0].score.quality)
    for one in ranked[1:]:
        if one.score.latency > chosen[-1].score.latency and one.score.quality >= least:
            chosen.append(one)
    return list(dict.fromkeys(one.number for one in (*chosen, *ranked)))[:count]


def first(ranked: Sequence[Ranked], count: int) -> list[int]:
    """The best; of those whose quality cannot be told from its the slowest, which has most to gain from training.

    Of those that are as slow the one of the highest quality. Who stands at the edge of a budget comes after those that
    do not: its certificate is another measurement.
    """
    if not ranked:
        return []
    best = ranked[0]
    near = best.score.quality - PAIRED * best.sure
    equal = [one for one in ranked if one.score.quality >= near and not _exceeds(one, best)]
    equal = [one for one in equal if one.room >= EDGE] or equal
    slowest = max(one.score.latency for one in equal)
    ahead = next(one for one in equal if one.score.latency >= (1 - ALIKE) * slowest)
    return list(dict.fromkeys((ahead.number, *(one.number for one in ranked))))[:count]


def _exceeds(one: Ranked, best: Ranked) -> bool:
    """Whether it violates more than the best does by its lower quality alone."""
    shortfall = max(0.0, best.score.quality - one.score.quality) / max(abs(best.score.quality), 1e-9)
    return one.score.violation > best.score.violation + 1.1 * shortfall + 1e-9


def order(trials: Sequence[Trial], goal: Goal, limit: Limit) -> list[Ranked]:
    """By violation, then quality, then latency; one of each genotype."""
    known = [(score, trial) for trial in trials if (score := pareto.score(trial.outcome, goal, limit)) is not None]
    known.sort(key=lambda one: (one[0].violation, -one[0].quality, one[0].latency, one[1].number))
    once: dict[tuple[int, ...], Ranked] = {}
    for score, trial in known:
        widths = [one.value.high - one.value.value for one in trial.outcome.quality.values()]
        ranked = Ranked(trial.number, score, max(widths, default=0.0), certify.spare(trial.outcome, goal, exact=False))
        once.setdefault(tuple(trial.genotype), ranked)
    return list(once.values())
