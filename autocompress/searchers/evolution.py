"""Evolution: NSGA-II (Deb et al. 2002) with constraint domination, steady state, one population per goal.

Every tell enters its trial into each goal's bounded population, from which the most crowded of the last front leaves;
every ask breeds one child from the population of the goal whose turn it is. Both cost the same at trial 20 and 2,000.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from autocompress import pareto
from autocompress import space as sp
from autocompress.pareto import Score
from autocompress.searchers.additive import groups
from autocompress.searchers.design import first
from autocompress.searchers.fresh import Taken, numbered
from autocompress.types import Facts, Genotype, Goal, Limit, Proposal, Space, Trial, UserError


@dataclass(frozen=True, slots=True)
class Member:
    """One evaluated genotype in a population, under the number of its trial."""

    number: int
    genotype: Genotype
    score: Score


class Population:
    """At most `size` members, best first by front and crowding."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.members: list[Member] = []

    def enter(self, number: int, genotype: Genotype, score: Score | None) -> None:
        """Let a trial in (or out: `score` None), replacing what its number said before."""
        members = [member for member in self.members if member.number != number]
        if score is not None:
            members.append(Member(number, genotype, score))
        scores = [member.score for member in members]
        order: list[int] = []
        for front in pareto.sort(scores):
            distances = dict(zip(front, pareto.crowding(scores, front), strict=True))
            order += sorted(front, key=lambda i: (-distances[i], members[i].number))
        self.members = [members[i] for i in order[: self.size]]

    def pick(self, rng: Random) -> Genotype:
        """Binary tournament: members stand in order, so the lower of two places wins."""
        count = len(self.members)
        return self.members[min(int(rng.random() * count), int(rng.random() * count))].genotype


class Evolution:
    """ask/tell. Options: `population` per goal, `design` first asks that span the space, `changes` genes per mutation,
    `crossover` and `sweep` chances (a sweep moves one setting of neighbouring sites together)."""

    def __init__(
        self,
        space: Space,
        goals: Sequence[Goal],
        limit: Limit,
        facts: Facts,
        seed: int,
        *,
        population: int = 16,
        design: int = 20,
        changes: float = 2.0,
        crossover: float = 0.8,
        sweep: float = 0.2,
    ) -> None:
        if population < 2 or design < 1 or changes < 1 or not (0 <= crossover <= 1 and 0 <= sweep <= 1):
            raise UserError(
                "evolution: needs population >= 2, design >= 1, changes >= 1, and crossover and sweep from 0 to 1"
            )
        self.space, self.goals, self.limit, self.seed = space, tuple(goals), limit, seed
        self.changes, self.crossover, self.sweep = changes, crossover, sweep
        self.groups = tuple(members for members in groups(space) if len(members) > 1)
        self.taken = Taken(space)
        self.numbers: set[int] = set()
        self.populations = [Population(population) for _ in self.goals]
        for i, trial in enumerate(facts.warm):
            self._enter(-1 - i, trial)  # numbers of an earlier run must not meet this one's
        # The best of an earlier run are asked again first: this run has to measure what it returns.
        again = {m.genotype: None for p in self.populations for m in p.members[: max(1, design // 2)]}
        self.first = (*again, *first(space, facts, self.goals, max(1, design - len(again)), Random(f"{seed}:design")))

    def ask(self, number: int, pending: Sequence[Trial]) -> Proposal | None:
        """The next of the first designs, then a child; None when the space is exhausted."""
        self.taken.add(pending)
        self.numbers.update(trial.number for trial in pending)
        rng = numbered(self.seed, number)
        turn = len(self.numbers - {0, number})
        population = self.populations[turn % len(self.populations)]
        if turn < len(self.first):
            planned = self.first[turn]
            found = self.taken.fresh(lambda: planned, rng, tries=1)
        elif population.members:
            found = self.taken.fresh(lambda: self._child(population, rng), rng)
        else:
            found = self.taken.fresh(lambda: sp.sample(self.space, rng), rng)
        if found is None:
            return None
        self.numbers.add(number)
        return Proposal(genotype=found)

    def tell(self, trial: Trial) -> None:
        """Let the trial into every goal's population."""
        self.taken.add([trial])
        self.numbers.add(trial.number)
        self._enter(trial.number, trial)

    def _enter(self, number: int, trial: Trial) -> None:
        genotype = sp.canonical(self.space, trial.genotype)
        for goal, population in zip(self.goals, self.populations, strict=True):
            population.enter(number, genotype, pareto.of(trial, goal, self.limit))

    def _child(self, population: Population, rng: Random) -> Genotype:
        child = population.pick(rng)
        if rng.random() < self.crossover:
            child = sp.crossover(self.space, child, population.pick(rng), rng)
        if self.groups and rng.random() < self.sweep:
            return self._swept(child, rng)
        return sp.mutate(self.space, child, rng, self.changes)

    def _swept(self, g: Genotype, rng: Random) -> Genotype:
        """One setting of neighbouring sites moved together by one step: what a border between number types asks for."""
        members = rng.choice(self.groups)
        low, high = sorted((int(rng.random() * len(members)), int(rng.random() * len(members))))
        step = rng.choice((-1, 1))
        values = list(g)
        for i in members[low : high + 1]:
            values[i] = min(len(self.space.genes[i].choices) - 1, max(0, values[i] + step))
        return sp.canonical(self.space, tuple(values))
