"""Evolution: NSGA-II (Deb et al. 2002) with constraint domination, steady state, one population per goal.

Every tell enters its trial into each goal's bounded population, from which the most crowded of the last front leaves.
Every ask breeds many children from the population of the goal whose turn it is and proposes one: the one that what was
told so far (`outlook`) expects to add most hypervolume, or to come nearest where nothing is feasible yet. The best of
the children are bred on a few times before, so that a step of the search is more than one mutation wide. How many
genes a mutation changes is inherited, with changes of its own (self-adaptation, Baeck and Schwefel 1993): sizes that
lead to survivors spread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from random import Random
from zlib import crc32

import numpy as np

from autocompress import pareto
from autocompress import space as sp
from autocompress.pareto import Score
from autocompress.searchers.additive import rows as encoded
from autocompress.searchers.breeding import Breeder, Rows
from autocompress.searchers.design import first
from autocompress.searchers.fresh import Taken, numbered
from autocompress.searchers.gradient import Front
from autocompress.searchers.outlook import Beliefs, Outlook
from autocompress.types import Facts, Genotype, Goal, Limit, Proposal, Space, Trial, UserError

LEARNING = 0.3  # spread of the logarithm by which an inherited mutation size changes
WIDEST = 12.0  # genes that a mutation changes at most, on average
ELITE = 8  # children of a generation that are bred on
DRAWS = 4  # functions drawn from what is believed, by which children are judged


@dataclass(frozen=True, slots=True)
class Member:
    """One evaluated genotype in a population, under the number of its trial."""

    number: int
    genotype: Genotype
    score: Score
    changes: float = 2.0  # the mutation size that made it


class Population:
    """At most `size` members, best first by front and crowding."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.members: list[Member] = []

    def enter(self, number: int, genotype: Genotype, score: Score | None, changes: float = 2.0) -> None:
        """Let a trial in (or out: `score` None), replacing what its number said before."""
        members = [member for member in self.members if member.number != number]
        if score is not None:
            members.append(Member(number, genotype, score, changes))
        scores = [member.score for member in members]
        order: list[int] = []
        for front in pareto.sort(scores):
            distances = dict(zip(front, pareto.crowding(scores, front), strict=True))
            order += sorted(front, key=lambda i: (-distances[i], members[i].number))
        self.members = [members[i] for i in order[: self.size]]

    def pick(self, rng: np.random.Generator, count: int) -> list[Member]:
        """Binary tournaments: members stand in order, so the lower of two places wins."""
        size = len(self.members)
        return [self.members[place] for place in (rng.random((count, 2)) * size).astype(int).min(axis=1).tolist()]


class Evolution:
    """ask/tell. Options: `population` per goal, `design` first asks that span the space, `changes` genes per mutation
    to begin with, `crossover` and `sweep` chances (a sweep moves one setting of neighbouring sites together),
    `children` bred in each of `generations` before one is proposed."""

    def __init__(
        self,
        space: Space,
        goals: Sequence[Goal],
        limit: Limit,
        facts: Facts,
        seed: int,
        *,
        population: int = 24,
        design: int = 12,
        changes: float = 2.0,
        crossover: float = 0.6,
        sweep: float = 0.2,
        children: int = 48,
        generations: int = 4,
    ) -> None:
        if population < 2 or design < 1 or changes < 1 or not (0 <= crossover <= 1 and 0 <= sweep <= 1):
            raise UserError(
                "evolution: needs population >= 2, design >= 1, changes >= 1, and crossover and sweep from 0 to 1"
            )
        if children < 1 or generations < 1:
            raise UserError("evolution: needs children >= 1 and generations >= 1")
        self.space, self.goals, self.limit, self.seed = space, tuple(goals), limit, seed
        self.changes, self.crossover, self.sweep = changes, crossover, sweep
        self.children, self.generations = children, generations
        self.breeder = Breeder(space)
        self.taken = Taken(space)
        self.numbers: set[int] = set()
        self.populations = [Population(population) for _ in self.goals]
        self.scores: list[dict[int, Score]] = [{} for _ in self.goals]  # by number
        self.beliefs = Beliefs(space, goals, limit, facts, based=True)
        # The best of earlier runs are asked again, between the first designs: this run has to measure what it returns,
        # and to see how far theirs can be trusted.
        again = self._warmed(facts.warm, max(1, design // 2))
        more = first(space, facts, self.goals, max(1, design - len(again)), Random(f"{seed}:design"))
        pairs = zip_longest(again, more)
        self.first = tuple(dict.fromkeys(g for pair in pairs for g in pair if g is not None))

    def ask(self, number: int, pending: Sequence[Trial]) -> Proposal | None:
        """The next of the first designs, then a child; None when the space is exhausted."""
        self.taken.add(pending)
        self.numbers.update(trial.number for trial in pending)
        rng = numbered(self.seed, number)
        turn = len(self.numbers - {0, number})
        goal = turn % len(self.populations)
        note: dict[str, float] = {}
        if turn < len(self.first):
            planned = self.first[turn]
            found = self.taken.fresh(lambda: planned, rng, tries=1)
        elif self.populations[goal].members:
            child, changes = self._child(goal, number, pending)
            note["changes"] = round(changes, 3)
            found = self.taken.fresh(lambda: child, rng, tries=1)
        else:
            found = self.taken.fresh(lambda: sp.sample(self.space, rng), rng)
        if found is None:
            return None
        self.numbers.add(number)
        return Proposal(genotype=found, note=dict(note))

    def tell(self, trial: Trial) -> None:
        """Let the trial into every goal's population."""
        self.taken.add([trial])
        self.numbers.add(trial.number)
        self._enter(trial.number, trial)

    def _enter(self, number: int, trial: Trial) -> None:
        genotype = sp.canonical(self.space, trial.genotype)
        changes = trial.note.get("changes", self.changes)
        changes = float(changes) if isinstance(changes, int | float) and changes >= 1 else self.changes
        for goal, population, scores in zip(self.goals, self.populations, self.scores, strict=True):
            scores.pop(number, None)
            if (score := pareto.of(trial, goal, self.limit)) is not None:
                scores[number] = score
            population.enter(number, genotype, score, changes)
        self.beliefs.tell(number, trial)

    def _warmed(self, trials: Sequence[Trial], count: int) -> list[Genotype]:
        """What earlier runs tell is believed as far as it proves right; returned are their best for each goal."""
        populations = [Population(count) for _ in self.goals]
        for i, trial in enumerate(trials):
            genotype = sp.canonical(self.space, trial.genotype)
            self.beliefs.tell(-1 - i, trial)  # numbers of an earlier run must not meet this one's
            for goal, population in zip(self.goals, populations, strict=True):
                population.enter(-1 - i, genotype, pareto.of(trial, goal, self.limit))
        each = max(1, count // len(self.goals))
        return list({m.genotype: None for p in populations for m in p.members[:each]})

    # --- breeding ---------------------------------------------------------------------------------------------------

    def _child(self, goal: int, number: int, pending: Sequence[Trial]) -> tuple[Genotype, float]:
        """A genotype not taken yet, if one was bred, and the mutation size that made it."""
        rng = np.random.default_rng(crc32(f"{self.seed}:{number}:children".encode()))
        judge = Judge.of(self.beliefs, goal, self.scores[goal], pending, rng)
        parents = self.populations[goal].pick(rng, self.children)
        others = self.populations[goal].pick(rng, self.children)
        rows, sizes = self._bred([p.genotype for p in parents], [o.genotype for o in others], parents, rng)
        bred: dict[Genotype, float] = {}
        ranked: list[Genotype] = []
        for generation in range(self.generations if judge else 1):
            if generation:
                best = ranked[:ELITE]
                mothers = [best[int(i)] for i in rng.integers(len(best), size=self.children)]
                fathers = [o.genotype for o in self.populations[goal].pick(rng, self.children)]
                rows, sizes = self._bred(mothers, fathers, [bred[g] for g in mothers], rng)
            for g, size in zip(map(tuple, rows.tolist()), sizes.tolist(), strict=True):
                if g not in self.taken.genotypes:
                    bred.setdefault(g, size)
            if not bred:
                return tuple(map(int, rows[0])), float(sizes[0])
            ranked = judge.ranked(list(bred)) if judge else list(bred)
        return ranked[0], bred[ranked[0]]

    def _bred(
        self,
        mothers: Sequence[Genotype],
        fathers: Sequence[Genotype],
        sized: Sequence[Member | float],
        rng: np.random.Generator,
    ) -> tuple[Rows, np.ndarray]:
        """One child of each pair, and the mutation sizes."""
        inherited = np.array([one.changes if isinstance(one, Member) else one for one in sized])
        sizes = np.clip(inherited * np.exp(LEARNING * rng.standard_normal(len(inherited))), 1.0, WIDEST)
        rows, other = self.breeder.rows(mothers), self.breeder.rows(fathers)
        rows = np.where((rng.random(len(rows)) < self.crossover)[:, None], self.breeder.crossed(rows, other, rng), rows)
        sweeps = (rng.random(len(rows)) < self.sweep)[:, None]
        return np.where(sweeps, self.breeder.swept(rows, rng), self.breeder.mutated(rows, sizes, rng)), sizes


class Judge:
    """Ranks genotypes by what draws from the beliefs say of one goal, given what is known and what runs already."""

    def __init__(self, beliefs: Beliefs, outlooks: Sequence[Outlook], fronts: Sequence[Front]) -> None:
        self.beliefs, self.outlooks, self.fronts = beliefs, outlooks, fronts

    @classmethod
    def of(
        cls,
        beliefs: Beliefs,
        goal: int,
        scores: Mapping[int, Score],
        pending: Sequence[Trial],
        rng: np.random.Generator,
    ) -> Judge | None:
        """None while too little is known. Trials that run count as what is expected of them."""
        drawn = [beliefs.about(goal, rng, 0.5) for _ in range(DRAWS)]
        outlooks = [one for one in drawn if one is not None]
        if not outlooks:
            return None
        inside = {number: score for number, score in scores.items() if score.violation <= 0}
        fronts = [Front.of(beliefs, inside, outlook) for outlook in outlooks]
        if pending:
            rows = encoded(beliefs.space, [sp.canonical(beliefs.space, trial.genotype) for trial in pending])
            fronts = [
                Front(
                    np.concatenate([front.points, np.stack([outlook.loss(rows), outlook.latency(rows)], axis=1)]),
                    front.widest,
                )
                for front, outlook in zip(fronts, outlooks, strict=True)
            ]
        return cls(beliefs, outlooks, fronts)

    def ranked(self, genotypes: Sequence[Genotype]) -> list[Genotype]:
        """By falling promise: hypervolume that is expected to be added, then nearness to what is allowed."""
        rows = encoded(self.beliefs.space, genotypes)
        promise = np.zeros(len(genotypes))
        worse = np.zeros(len(genotypes))
        for outlook, front in zip(self.outlooks, self.fronts, strict=True):
            loss, values = outlook.loss(rows), outlook.values(rows)
            excess = outlook.worst(values)
            promise += np.where(excess <= 0, front.gains(loss, outlook.middle(values)), 0.0)
            worse += outlook.short(loss, excess)
        order = np.lexsort((np.arange(len(genotypes)), worse, -promise))
        return [genotypes[i] for i in order]
