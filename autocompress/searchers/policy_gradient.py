"""Policy gradient: an agent walks the genes in order and learns from every trial, told and imagined (numpy, no torch).

One network for all genes and all spaces scores each choice from what is seen there (`walk`); genes that do not apply
are skipped, choices that leave the budget out of reach are barred. Each walk has a latency to reach, so one agent
covers the whole front and every goal; a told trial is a good or bad example for any latency that it could have been
asked for (hindsight, Andrychowicz et al. 2017). The update is PPO's clipped surrogate (Schulman et al. 2017) against
the probabilities at the time of the walk, with the mean of walks towards the same aim as baseline, and an entropy bonus
that decays. 200 trials are little to learn from, so most walks are only imagined: their reward is what told trials let
believe (Sutton 1990, Dyna). What the agent learned does not belong to the network it learned it on: `save` and the
option `agent` carry it to the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from random import Random
from zlib import crc32

import numpy as np

from autocompress import space as sp
from autocompress.pareto import Score
from autocompress.searchers.agent import FILE, Agent
from autocompress.searchers.belief import Array
from autocompress.searchers.design import first
from autocompress.searchers.fresh import Taken, numbered
from autocompress.searchers.gradient import Front
from autocompress.searchers.outlook import Beliefs, Outlook
from autocompress.searchers.walk import WIDTH, Walker, Walks
from autocompress.types import Facts, Genotype, Goal, Limit, Proposal, Space, Trial, UserError

MISSED = 6.0  # what missing the aim by a factor of e costs, in allowed losses of quality
REAL = 12  # told trials in one update


class PolicyGradient:
    """ask/tell. Options: `agent`, a file or OUT folder of an earlier search to start from; `design` first asks that
    span the space; `walks` imagined per update, `updates` per ask, `hidden` width, `rate` of
    learning, `entropy` bonus at the start, `decay`, the number of asks after which a third of it is left, `mask`, and
    `draw`: how far from the mean of what is believed imagined walks are judged."""

    def __init__(
        self,
        space: Space,
        goals: Sequence[Goal],
        limit: Limit,
        facts: Facts,
        seed: int,
        *,
        agent: str = "",
        design: int = 5,
        walks: int = 32,
        updates: int = 1,
        hidden: int = 32,
        rate: float = 0.01,
        entropy: float = 0.03,
        decay: float = 60.0,
        mask: bool = True,
        draw: float = 0.2,
    ) -> None:
        if min(design, walks, hidden) < 1 or updates < 0 or rate <= 0 or decay <= 0 or entropy < 0:
            raise UserError("policy_gradient: design, walks, hidden, rate and decay must be positive")
        self.space, self.goals, self.limit, self.seed = space, tuple(goals), limit, seed
        self.walks, self.updates, self.rate = walks, updates, rate
        self.entropy, self.decay, self.mask, self.draw = entropy, decay, mask, draw
        self.walker = Walker(space, facts)
        self.agent = Agent(WIDTH, hidden, seed)
        self.origin = self.agent.load(Path(agent)) if agent else {}
        self.beliefs = Beliefs(space, goals, limit, facts)
        self.taken = Taken(space)
        self.numbers: set[int] = set()
        self.asked = 0
        for i, trial in enumerate(facts.warm):
            self.beliefs.tell(-1 - i, trial)
        self.first = first(space, facts, self.goals, design, Random(f"{seed}:design"))

    def ask(self, number: int, pending: Sequence[Trial]) -> Proposal | None:
        """The next of the first designs, then the agent's best walk; None when the space is exhausted."""
        self.taken.add(pending)
        self.numbers.update(trial.number for trial in pending)
        rng = numbered(self.seed, number)
        turn = len(self.numbers - {0, number})
        goal = turn % len(self.goals)
        note: dict[str, object] = {"goal": self.goals[goal].name}
        if turn < len(self.first):
            planned = self.first[turn]
        else:
            planned, more = self._walked(goal, number)
            note |= more
        found = self.taken.fresh(lambda: planned, rng, tries=1)
        if found is None:
            return None
        self.numbers.add(number)
        return Proposal(genotype=found, note=note if found == planned else {"goal": self.goals[goal].name})

    def tell(self, trial: Trial) -> None:
        """Learn a trial; the agent itself learns from it when it is asked next."""
        self.taken.add([trial])
        self.numbers.add(trial.number)
        self.beliefs.tell(trial.number, trial)

    def save(self, folder: Path) -> None:
        """Write the agent into a folder, for the option `agent` of another search."""
        about = {"space": self.space.name, "genes": len(self.space.genes), "trials": self.beliefs.count}
        self.agent.save(folder / FILE, about)

    # --- one ask ----------------------------------------------------------------------------------------------------

    def _walked(self, goal: int, number: int) -> tuple[Genotype, dict[str, object]]:
        """Learn, walk, and take the walk that promises most; a likely one where nothing is believed yet."""
        self.asked += 1
        rng = np.random.default_rng(crc32(f"{self.seed}:{number}:walk".encode()))
        outlook = self.beliefs.about(goal, rng, self.draw)
        scores = self.beliefs.scores(goal)
        if outlook is None:
            return self._chosen(self._imagine(None, [sp.parent(self.space)], np.array([-1.0, 0.0]), rng), None, None)
        front = Front.of(self.beliefs, scores, outlook)
        companions, within = self._companions(scores, front)
        for _ in range(self.updates):
            self._learn(self._imagine(outlook, companions, within, rng))
        self._learn_told(outlook, scores, companions, rng)
        return self._chosen(self._imagine(outlook, companions, within, rng), outlook, front)

    def _companions(self, scores: dict[int, Score], front: Front) -> tuple[list[Genotype], Array]:
        """Good told genotypes by rising latency, and the range of logarithms of latency to aim at."""
        order = sorted(scores, key=lambda n: (scores[n].latency, -scores[n].quality))
        inside = [n for n in order if scores[n].violation <= 0]
        if inside:
            best, kept = -math.inf, []
            for n in inside:
                if scores[n].quality > best:
                    best = scores[n].quality
                    kept.append(n)
        else:
            kept = sorted(order, key=lambda n: scores[n].violation)[:4]
        found = [sp.canonical(self.space, self.beliefs.trials[n].genotype) for n in kept] or list(self.first)
        return found, np.array([front.fastest - 0.15, min(front.widest, 0.0)])

    def _imagine(
        self, outlook: Outlook | None, companions: Sequence[Genotype], within: Array, rng: np.random.Generator
    ) -> Walks:
        """Walks in groups of four: same aim, same companion."""
        groups = max(1, self.walks // 4)
        places = (np.arange(groups) + rng.random(groups)) / groups
        aims = np.repeat(within[0] + (within[1] - within[0]) * places, 4)
        picked = np.clip((places * len(companions) + rng.normal(size=groups)).astype(int), 0, len(companions) - 1)
        starts = [companions[i] for i in np.repeat(picked, 4)]
        luck = rng.random((len(starts), len(self.space.genes)))
        return self.walker.walk(self.agent, outlook, starts, aims, luck=luck, mask=self.mask)

    def _learn(self, walks: Walks) -> None:
        """One update on imagined walks: each against the mean of its group."""
        reward = -walks.loss - MISSED * np.maximum(walks.missed, 0.0)
        reward = reward.reshape(-1, 4)
        gain = (reward - reward.mean(axis=1, keepdims=True)).ravel()
        self._update(walks, gain / max(float(gain.std()), 1e-6), walks.logs)

    def _learn_told(
        self, outlook: Outlook, scores: dict[int, Score], companions: Sequence[Genotype], rng: np.random.Generator
    ) -> None:
        """One update on told trials: each as if it had been asked for a latency, ranked among all for that latency."""
        numbers = list(scores)
        if len(numbers) < 4 or not companions:
            return
        lost = np.array([self.beliefs.lost(max(scores[n].quality, -1e9)) for n in numbers])
        slow = np.log([max(scores[n].latency, 1e-6) for n in numbers])
        picked: list[int] = []
        gains: list[float] = []
        aims: list[float] = []
        for _ in range(REAL // 4):
            aim = float(slow[rng.integers(len(numbers))])
            order = np.argsort(lost + MISSED * np.maximum(slow - aim, 0.0) + 0.1 * np.abs(slow - aim))
            best = max(2, len(order) // 10)
            places = [int(rng.integers(best)) for _ in range(3)] + [int(rng.integers(len(order)))]
            picked += [int(order[place]) for place in places]
            gains += [1.0 - place / best if place < best else -place / len(order) for place in places]
            aims += [aim] * 4
        trials = [self.beliefs.trials[numbers[i]] for i in picked]
        chosen = [sp.canonical(self.space, trial.genotype) for trial in trials]
        starts = [companions[int(rng.integers(len(companions)))] for _ in chosen]
        walks = self.walker.walk(self.agent, outlook, starts, np.array(aims), chosen=chosen, mask=False)
        behaviour = walks.logs.copy()
        for row, trial in zip(behaviour, trials, strict=True):
            logs = trial.note.get("log_probability")
            if isinstance(logs, list) and len(logs) == len(row):
                row[:] = logs
        self._update(walks, np.array(gains), behaviour, imitate=0.3)

    def _update(self, walks: Walks, gain: Array, behaviour: Array, imitate: float = 0.0) -> None:
        where = walks.decided
        self.agent.learn(
            walks.features[where],
            walks.barred[where],
            walks.chosen[where],
            behaviour[where],
            np.broadcast_to(gain[:, None], where.shape)[where],
            rate=self.rate,
            entropy=self.entropy * math.exp(-self.asked / self.decay),
            imitate=imitate,
        )

    def _chosen(self, walks: Walks, outlook: Outlook | None, front: Front | None) -> tuple[Genotype, dict[str, object]]:
        """The walk not yet taken that is believed to add most."""
        found = walks.genotypes()
        if outlook is None or front is None:
            order = list(range(len(found)))
        else:
            over = np.maximum(walks.missed, 0.0)
            rows = self.beliefs.codings[""].rows(found)
            promise = np.where(outlook.excess(rows) > 0, 0.0, front.gains(walks.loss, walks.latency))
            order = [int(i) for i in np.lexsort((walks.loss + over, -promise))]
        best = next((i for i in order if found[i] not in self.taken.genotypes), order[0])
        return found[best], {"log_probability": [round(float(value), 4) for value in walks.logs[best]]}
