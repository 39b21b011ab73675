"""Gradient: policies relaxed to distributions over choices, descended by Gumbel-softmax (Jang, Gu and Poole 2017).

What is descended is what is believed of the network, not the network: loss of quality and latency per device, each a
smooth function that told trials and the probe shape (`belief`). Every ask draws one such function from the posterior
(Thompson 1933), descends towards a row of latency targets at once with falling temperature, rounds, and proposes the
genotype that promises the largest gain of hypervolume under the draw (Bradford, Schweidtmann and Lapkin 2018).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from zlib import crc32

import numpy as np

from autocompress import space as sp
from autocompress.pareto import Score
from autocompress.searchers.belief import Array
from autocompress.searchers.design import first
from autocompress.searchers.fresh import Taken, numbered
from autocompress.searchers.outlook import Beliefs, Outlook
from autocompress.searchers.relaxed import Relaxed
from autocompress.types import Facts, Genotype, Goal, Limit, Proposal, Space, Trial, UserError


class Gradient:
    """ask/tell. Options: `design` first asks that span the space, `targets` latencies descended to at once, `steps` of
    each descent, its `rate`, `hot` and `cold` temperatures, and `draw`: how far from the mean of what is believed (0) a
    function is drawn (1: as far as it is uncertain)."""

    def __init__(
        self,
        space: Space,
        goals: Sequence[Goal],
        limit: Limit,
        facts: Facts,
        seed: int,
        *,
        design: int = 10,
        targets: int = 16,
        steps: int = 40,
        rate: float = 0.3,
        hot: float = 1.0,
        cold: float = 0.2,
        draw: float = 0.2,
    ) -> None:
        if min(design, targets, steps) < 1 or rate <= 0 or not 0 < cold <= hot:
            raise UserError("gradient: design, targets and steps must be positive, rate too, and 0 < cold <= hot")
        self.space, self.goals, self.limit, self.seed = space, tuple(goals), limit, seed
        self.targets, self.steps, self.rate, self.hot, self.cold, self.draw = targets, steps, rate, hot, cold, draw
        self.relaxed = Relaxed(space)
        self.beliefs = Beliefs(space, goals, limit, facts)
        self.taken = Taken(space)
        self.numbers: set[int] = set()
        for i, trial in enumerate(facts.warm):
            self.beliefs.tell(-1 - i, trial)
        self.first = first(space, facts, self.goals, design, Random(f"{seed}:design"))

    def ask(self, number: int, pending: Sequence[Trial]) -> Proposal | None:
        """The next of the first designs, then where a descent ends; None when the space is exhausted."""
        self.taken.add(pending)
        self.numbers.update(trial.number for trial in pending)
        rng = numbered(self.seed, number)
        turn = len(self.numbers - {0, number})
        goal = turn % len(self.goals)
        ranked: list[Genotype] = []
        if turn < len(self.first):
            ranked = [self.first[turn]]
        else:
            ranked = self._descended(goal, number) or [sp.sample(self.space, rng)]
        planned = next((g for g in ranked if g not in self.taken.genotypes), ranked[0])
        found = self.taken.fresh(lambda: planned, rng, tries=1)
        if found is None:
            return None
        self.numbers.add(number)
        return Proposal(genotype=found, note={"goal": self.goals[goal].name})

    def tell(self, trial: Trial) -> None:
        """Learn a trial; one that failed was never measured and teaches nothing."""
        self.taken.add([trial])
        self.numbers.add(trial.number)
        self.beliefs.tell(trial.number, trial)

    def _descended(self, goal: int, number: int) -> list[Genotype]:
        """Genotypes by falling promise; none while too little is known."""
        rng = np.random.default_rng(crc32(f"{self.seed}:{number}:descent".encode()))
        outlook = self.beliefs.about(goal, rng, self.draw)
        if outlook is None:
            return []
        scores = self.beliefs.scores(goal)
        if not scores:
            return []
        front = Front.of(self.beliefs, scores, outlook)
        found = self._descend(outlook, front, self._starts(scores, rng), rng)
        fresh = [g for g in dict.fromkeys(found) if g not in self.taken.genotypes]
        if not fresh:
            return []
        rows = self.beliefs.codings[""].rows(fresh)
        loss, values = outlook.loss(rows), outlook.values(rows)
        latency, excess = outlook.middle(values), outlook.worst(values)
        promise = np.where(excess > 0, 0.0, front.gains(loss, latency))
        order = np.lexsort((loss + latency, outlook.short(loss, excess), -promise))
        return [fresh[i] for i in order]

    def _starts(self, scores: dict[int, Score], rng: np.random.Generator) -> Array:
        """(targets, genes, most) logits that lean to the best of the told trials."""
        order = sorted(scores, key=lambda n: (scores[n].violation, scores[n].latency))
        order = [n for n in order if scores[n].violation <= 0] or order[:4]
        logits = np.zeros((self.targets, len(self.relaxed.sizes), self.relaxed.most))
        for row in logits:
            chosen = self.beliefs.trials[order[int(rng.integers(len(order)))]].genotype
            row[np.arange(len(chosen)), sp.canonical(self.space, chosen)] += 1.5
        return logits

    def _descend(self, outlook: Outlook, front: Front, logits: Array, rng: np.random.Generator) -> list[Genotype]:
        """Adam on the relaxed loss, each row towards a latency of its own; its multiplier rises while it is missed."""
        count = len(logits)
        low, high = front.fastest - 0.15, min(front.widest, 0.0)
        aims = low + (high - low) * (np.arange(count) + rng.random(count)) / count
        weight = np.ones(count)
        first, second = np.zeros_like(logits), np.zeros_like(logits)
        found: list[Genotype] = []
        for step in range(1, self.steps + 1):
            share = (step - 1) / max(1, self.steps - 1)
            temperature = self.hot * (self.cold / self.hot) ** share
            p = self.relaxed.soft(logits + rng.gumbel(size=logits.shape) * 0.5, temperature)
            applies = self.relaxed.applies(p)
            rows = self.relaxed.rows(p, applies)
            slope, missed = _slopes(outlook, rows, aims, weight)
            weight = np.clip(weight * np.exp(2.0 * missed), 0.05, 50.0)
            by_p = self.relaxed.back(p, applies, slope)
            by_logit = p * (by_p - (p * by_p).sum(axis=-1, keepdims=True)) / temperature
            size = np.sqrt((by_logit**2).sum(axis=(1, 2), keepdims=True)) + 1e-12
            by_logit = by_logit / size
            first = 0.9 * first + 0.1 * by_logit
            second = 0.98 * second + 0.02 * by_logit**2
            move = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.98**step)) + 1e-3)
            logits = logits - self.rate * move
            if step > self.steps * 2 // 3:
                found += self.relaxed.hard(logits)
        for _ in range(2):
            found += self.relaxed.hard(logits + self.cold * rng.gumbel(size=logits.shape))
        return found


class Front:
    """The best told so far in the belief's own units, and what a genotype would add."""

    def __init__(self, points: Array, widest: float) -> None:
        """`points` (n, 2): loss and logarithm of the latency of feasible trials."""
        order = points[np.lexsort((points[:, 0], points[:, 1]))]
        best = np.minimum.accumulate(order[:, 0]) if len(order) else np.zeros(0)
        kept = np.concatenate([[True], best[1:] < best[:-1]]) if len(order) else np.zeros(0, dtype=bool)
        self.points, self.widest = order[kept], widest
        self.fastest = float(self.points[0, 1]) if len(self.points) else widest

    @classmethod
    def of(cls, beliefs: Beliefs, scores: dict[int, Score], outlook: Outlook) -> Front:
        """Of scored trials: feasible ones; where none is, nothing is won yet."""
        points = [
            (beliefs.lost(s.quality), math.log(s.latency))
            for s in scores.values()
            if s.violation <= 0 and s.latency > 0
        ]
        return cls(np.array(points).reshape(-1, 2), float(np.mean(outlook.bounds)))

    def gains(self, loss: Array, latency: Array) -> Array:
        """(n,) area that each would add between the front, loss 1 and the budget, in shares of the baseline."""
        edge = math.exp(self.widest)
        starts = np.concatenate([[0.0], np.exp(self.points[:, 1])])
        ends = np.concatenate([starts[1:], [edge]])
        levels = np.concatenate([[1.0], np.minimum(self.points[:, 0], 1.0)])
        wide = np.clip(ends[None, :] - np.maximum(starts[None, :], np.exp(latency)[:, None]), 0.0, None)
        return (wide * np.clip(levels[None, :] - loss[:, None], 0.0, None)).sum(axis=1)


def _slopes(outlook: Outlook, rows: Array, aims: Array, weight: Array) -> tuple[Array, Array]:
    """Derivative of loss + weight * latency by the indicators, and by how much each row misses its aim."""
    latency = np.array([guess(rows) for guess in outlook.latencies])
    slopes = np.mean([guess.slope(rows) for guess in outlook.latencies], axis=0)
    sizes = [guess(rows) for guess in outlook.sizes]
    missed = np.maximum(latency.mean(axis=0) - aims, outlook.worst([*latency, *sizes]))
    for guess, size in zip(outlook.sizes, sizes, strict=True):
        slopes = slopes + (size > 1.0)[:, None] * guess.slope(rows)
    return outlook.loss.slope(rows) + weight[:, None] * slopes, missed
