"""Policy gradient: an agent walks the genes in order and learns from every score (torch; loaded only when asked for).

At each gene that applies the agent sees what the site is (size, work, kernel, depth), which question is asked there,
what it chose before (at this site, at the site before, on the whole so far), whose goal it works for and which
preference between quality and latency it is to follow. A categorical choice is drawn; genes that do not apply are
skipped. One agent so covers the whole front: the preference is an input (Abels et al. 2019, conditioned networks),
and every trial teaches under several preferences, not only under its own (hindsight relabelling).

The update is the clipped surrogate of PPO (Schulman et al. 2017) per gene against the probabilities kept in the
proposal's note, which lets tells come late and in any order. Advantages are ranks among the trials told so far, so no
reward scale has to be tuned; good trials are also imitated (Oh et al. 2018), since 200 trials are little to learn
from. The entropy bonus decays with the number of tells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch import nn

from autocompress import pareto
from autocompress import space as sp
from autocompress.pareto import Score
from autocompress.searchers.design import spread
from autocompress.searchers.fresh import Taken, numbered
from autocompress.types import Facts, Genotype, Goal, Limit, Proposal, Site, Space, Trial, UserError

SEEN = 5  # numbers that describe what was chosen before a gene
GOLDEN = 0.6180339887498949  # its multiples modulo 1 spread evenly, however many there are


class Agent(nn.Module):
    """Logits of every gene's choices: a small network on features, plus a table per gene for what is special to it."""

    features: torch.Tensor
    barred: torch.Tensor

    def __init__(self, features: np.ndarray, sizes: Sequence[int], goals: int, hidden: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        most = max(sizes, default=1)

        def weights(rows: int, columns: int, scale: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, generator=generator) * scale / math.sqrt(max(1, rows)))

        self.register_buffer("features", torch.as_tensor(features, dtype=torch.float32))
        barred = torch.arange(most)[None, :] >= torch.tensor(list(sizes)).reshape(-1, 1)
        self.register_buffer("barred", torch.where(barred, -1e9, 0.0))
        self.site = weights(features.shape[1], hidden, 1.0)
        self.seen = weights(SEEN, hidden, 1.0)
        self.task = weights(goals + 2, hidden, 1.0)
        self.out = weights(hidden, most, 0.3)
        self.table = nn.Parameter(torch.zeros(len(sizes), most))
        self.slope = nn.Parameter(torch.zeros(len(sizes), most))  # how the table turns with the preference

    def forward(self, seen: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """`seen` (N, genes, SEEN) and `task` (N, goals + 2) to log-probabilities (N, genes, most choices)."""
        hidden = torch.tanh((self.features @ self.site)[None] + seen @ self.seen + (task @ self.task)[:, None])
        logits = hidden @ self.out + self.table + self.slope * task[:, None, :1] + self.barred
        return torch.log_softmax(logits, dim=-1)


@dataclass(slots=True)
class Episode:
    """One told trial as the agent walked it, or would have."""

    genotype: Genotype
    scores: tuple[Score | None, ...]  # per goal
    seen: np.ndarray  # (genes, SEEN)
    mask: np.ndarray  # (genes,) 1 where the gene applied and had a choice
    behaviour: np.ndarray  # (genes,) log-probability of the choice when it was made


class PolicyGradient:
    """ask/tell. Options: `design` first asks that span the space, `hidden` width, `rate` of learning, `steps` per tell,
    `entropy` bonus at the start and `decay`, the number of tells after which a third of it is left."""

    def __init__(
        self,
        space: Space,
        goals: Sequence[Goal],
        limit: Limit,
        facts: Facts,
        seed: int,
        *,
        design: int = 20,
        hidden: int = 32,
        rate: float = 0.02,
        steps: int = 2,
        batch: int = 24,
        entropy: float = 0.02,
        decay: float = 120.0,
        elite: float = 0.1,
        memory: int = 400,
    ) -> None:
        if min(design, hidden, steps, batch, memory) < 1 or rate <= 0 or decay <= 0 or entropy < 0:
            raise UserError("policy_gradient: design, hidden, steps, batch, memory, rate and decay must be positive")
        self.space, self.goals, self.limit, self.seed = space, tuple(goals), limit, seed
        self.steps, self.batch, self.entropy, self.decay = steps, batch, entropy, decay
        self.elite, self.memory = elite, memory
        self.knobs = sp.knobs(space)
        self.group, self.same_site = _relations(space)
        self.agent = Agent(_features(space, facts.sites), [k.size for k in self.knobs], len(self.goals), hidden, seed)
        self.optimizer = torch.optim.Adam(self.agent.parameters(), lr=rate)
        self.taken = Taken(space)
        self.numbers: set[int] = set()
        self.episodes: dict[int, Episode] = {}
        self.told = 0
        for i, trial in enumerate(facts.warm):
            self._learn(-1 - i, trial)
        self.first = spread(space, design, Random(f"{seed}:design"))

    # --- asking -----------------------------------------------------------------------------------------------------

    def ask(self, number: int, pending: Sequence[Trial]) -> Proposal | None:
        """The next of the first designs, then a walk of the agent; None when the space is exhausted."""
        self.taken.add(pending)
        self.numbers.update(trial.number for trial in pending)
        rng = numbered(self.seed, number)
        turn = len(self.numbers - {0, number})
        goal = turn % len(self.goals)
        preference = (turn // len(self.goals) * GOLDEN + 0.5) % 1.0
        walk = Walk(self, goal, preference)
        found = self.taken.fresh(lambda: self.first[turn] if turn < len(self.first) else walk.draw(rng), rng, tries=2)
        if found is None:
            return None
        self.numbers.add(number)
        logs = [round(value, 4) for value in walk.logs(found)]
        note = {"goal": self.goals[goal].name, "preference": preference, "tells": self.told, "log_probability": logs}
        return Proposal(genotype=found, note=note)

    # --- learning ---------------------------------------------------------------------------------------------------

    def tell(self, trial: Trial) -> None:
        """Learn from a trial; one that failed only leaves the walk it took less likely."""
        self.taken.add([trial])
        self.numbers.add(trial.number)
        self._learn(trial.number, trial)

    def _learn(self, number: int, trial: Trial) -> None:
        self.told += 1
        genotype = sp.canonical(self.space, trial.genotype)
        scores = tuple(pareto.of(trial, goal, self.limit) for goal in self.goals)
        seen, mask = self._replayed(genotype)
        logs = trial.note.get("log_probability")
        if not isinstance(logs, list) or len(logs) != len(genotype):
            logs = Walk(self, 0, 0.5).logs(genotype)  # told without having been asked: as if it were on policy
        self.episodes.pop(number, None)
        self.episodes[number] = Episode(genotype, scores, seen, mask, np.asarray(logs, dtype=np.float32))
        while len(self.episodes) > self.memory:
            del self.episodes[next(iter(self.episodes))]
        if len(self.episodes) >= 4:
            with _one_thread():
                rng = Random(f"{self.seed}:learn:{self.told}")
                episodes = list(self.episodes.values())
                for step in range(self.steps):
                    self._step((self.told * self.steps + step) % len(self.goals), episodes, rng)

    def _step(self, goal: int, episodes: Sequence[Episode], rng: Random) -> None:
        """One gradient step for a goal: several preferences, under each the best trials and some others."""
        standing = Standing([episode.scores[goal] for episode in episodes])
        chosen: list[int] = []
        advantages: list[float] = []
        preferences: list[float] = []
        each = 6
        for _ in range(max(1, self.batch // each)):
            preference = rng.random()
            order = standing.order(preference)
            best = max(2, round(self.elite * len(order)))
            picks = [min(int(rng.random() ** 2 * best), best - 1) for _ in range(each - 2)]
            picks += [rng.randrange(len(order)) for _ in range(2)]
            for place in picks:
                chosen.append(order[place])
                preferences.append(preference)
                # +1 for the best, 0 at the edge of the elite, then falling to -1 for the worst.
                inside = place < best
                advantages.append(1.0 - place / best if inside else -(place - best) / max(1, len(order) - best))
        seen = torch.from_numpy(np.stack([episodes[i].seen for i in chosen]))
        mask = torch.from_numpy(np.stack([episodes[i].mask for i in chosen]))
        behaviour = torch.from_numpy(np.stack([episodes[i].behaviour for i in chosen]))
        action = torch.tensor([episodes[i].genotype for i in chosen])
        advantage = torch.tensor(advantages)[:, None]
        task = torch.from_numpy(np.stack([self._task(goal, p) for p in preferences]))
        logs = self.agent(seen, task)
        taken = logs.gather(-1, action[..., None])[..., 0]
        ratio = torch.exp(taken - behaviour)
        clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        imitated = advantage.clamp(min=0.0) * taken
        bonus = -(logs.exp() * logs.clamp(min=-30.0)).sum(-1)
        beta = self.entropy * math.exp(-self.told / self.decay)
        loss = -((clipped + imitated + beta * bonus) * mask).sum() / mask.sum().clamp(min=1.0)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.agent.parameters(), 1.0)
        self.optimizer.step()

    # --- what the agent sees ----------------------------------------------------------------------------------------

    def _task(self, goal: int, preference: float) -> np.ndarray:
        task = np.zeros(len(self.goals) + 2, dtype=np.float32)
        task[0] = 2.0 * preference - 1.0
        task[1 + goal] = 1.0
        task[-1] = 1.0
        return task

    def _replayed(self, genotype: Genotype) -> tuple[np.ndarray, np.ndarray]:
        trace = Trace(self)
        seen = np.zeros((len(genotype), SEEN), dtype=np.float32)
        mask = np.zeros(len(genotype), dtype=np.float32)
        for i, (knob, value) in enumerate(zip(self.knobs, genotype, strict=True)):
            if knob.size > 1 and knob.applies(genotype):
                seen[i] = trace.seen(i)
                mask[i] = 1.0
                trace.chose(i, value)
        return seen, mask


class Trace:
    """What was chosen so far on a walk, as numbers: levels run from 0 (left alone) to 1 (the last choice)."""

    def __init__(self, owner: PolicyGradient) -> None:
        self.owner = owner
        groups = max(owner.group, default=0) + 1
        self.levels = [0.0] * len(owner.knobs)
        self.sums, self.counts, self.last = [0.0] * groups, [0] * groups, [0.0] * groups
        self.total, self.steps = 0.0, 0

    def seen(self, i: int) -> tuple[float, ...]:
        """The SEEN numbers before gene `i`, centred about zero."""
        group = self.owner.group[i]
        here = self.owner.same_site[i]
        at_site = sum(self.levels[j] for j in here) / len(here) if here else 0.0
        count = self.counts[group]
        mean = self.sums[group] / count if count else 0.5
        overall = self.total / self.steps if self.steps else 0.5
        return (
            2 * self.last[group] - 1 if count else 0.0,
            2 * mean - 1,
            2 * at_site - 1,
            2 * overall - 1,
            min(count, 1),
        )

    def chose(self, i: int, value: int) -> None:
        """Gene `i`, which applied, got this choice."""
        level = value / (self.owner.knobs[i].size - 1)
        group = self.owner.group[i]
        self.levels[i] = self.last[group] = level
        self.sums[group] += level
        self.counts[group] += 1
        self.total += level
        self.steps += 1


class Walk:
    """The agent's walks for one goal and preference, without torch's overhead per gene."""

    def __init__(self, owner: PolicyGradient, goal: int, preference: float) -> None:
        agent = owner.agent
        task = owner._task(goal, preference)
        self.owner = owner
        with torch.inference_mode(), _one_thread():
            base = agent.features @ agent.site + torch.from_numpy(task) @ agent.task
            table = agent.table + agent.slope * float(task[0]) + agent.barred
        self.base, self.table = base.numpy(), table.numpy()
        self.seen, self.out = agent.seen.detach().numpy(), agent.out.detach().numpy()

    def probabilities(self, i: int, seen: tuple[float, ...]) -> np.ndarray:
        """Of gene `i`'s choices."""
        logits = np.tanh(self.base[i] + np.asarray(seen, dtype=np.float32) @ self.seen) @ self.out + self.table[i]
        odds = np.exp(logits - logits.max())
        return odds / odds.sum()

    def draw(self, rng: Random) -> Genotype:
        """A canonical genotype, gene by gene."""
        trace = Trace(self.owner)
        values: list[int] = []
        for i, knob in enumerate(self.owner.knobs):
            choice = 0
            if knob.size > 1 and knob.applies(values):
                odds = self.probabilities(i, trace.seen(i))
                choice = min(int(np.searchsorted(np.cumsum(odds), rng.random())), knob.size - 1)
                trace.chose(i, choice)
            values.append(choice)
        return tuple(values)

    def logs(self, genotype: Genotype) -> list[float]:
        """Log-probability of each choice of a genotype, 0 where there was none."""
        trace = Trace(self.owner)
        found: list[float] = []
        for i, (knob, value) in enumerate(zip(self.owner.knobs, genotype, strict=True)):
            if knob.size > 1 and knob.applies(genotype):
                found.append(math.log(max(float(self.probabilities(i, trace.seen(i))[value]), 1e-6)))
                trace.chose(i, value)
            else:
                found.append(0.0)
        return found


class Standing:
    """What was scored for one goal so far, ready to be ranked under any preference."""

    def __init__(self, scores: Sequence[Score | None]) -> None:
        missing = Score(-math.inf, math.inf, math.inf)
        rows = [(s.quality, s.latency, s.violation) for s in (score or missing for score in scores)]
        quality, latency, self.violation = np.asarray(rows, dtype=float).reshape(-1, 3).T
        inside = self.violation <= 0
        self.lost, self.slow = np.zeros(len(rows)), np.zeros(len(rows))
        if inside.any():
            top, fast = quality[inside].max(), latency[inside].min()
            wide, long = top - quality[inside].min(), latency[inside].max() - fast
            self.lost[inside] = (top - quality[inside]) / max(wide, 1e-9)
            self.slow[inside] = (latency[inside] - fast) / max(long, 1e-9)

    def order(self, preference: float) -> list[int]:
        """Indices from best to worst: feasible ones by augmented Chebyshev distance to the best seen of each objective,
        weighted by the preference (1 = quality alone), then by violation; those never measured last."""
        lost, slow = preference * self.lost, (1.0 - preference) * self.slow
        return np.lexsort((np.maximum(lost, slow) + 0.05 * (lost + slow), self.violation)).tolist()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one thread: these matrices are small, and the other cores belong to trainers and the station."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _relations(space: Space) -> tuple[list[int], list[list[int]]]:
    """Per gene: the number of its group (one per op and setting, one per kind of architecture knob), and the earlier
    genes of its site."""
    ids: dict[tuple[str, str], int] = {}
    group: list[int] = []
    same: list[list[int]] = []
    for i, gene in enumerate(space.genes):
        # "stage2.kernel" asks the same question as "stage0.kernel".
        key = ("", gene.name.rsplit(".", 1)[-1]) if gene.kind == "arch" else (gene.op, gene.param)
        group.append(ids.setdefault(key, len(ids)))
        same.append([j for j in range(i) if gene.site and space.genes[j].site == gene.site])
    return group, same


def _features(space: Space, sites: Sequence[Site]) -> np.ndarray:
    """(genes, features): what the site is like, and which question is asked there."""
    known = {site.name: site for site in sites}
    group, _ = _relations(space)
    rows: list[list[float]] = []
    count = len(space.genes)
    for i, gene in enumerate(space.genes):
        site = known.get(gene.site)
        about = (
            [
                math.log1p(site.parameters) / 12,
                math.log1p(site.macs) / 16,
                site.kernel / 5,
                math.log1p(site.in_channels) / 6,
                math.log1p(site.out_channels) / 6,
                2 * site.depth - 1,
                float(site.kind == "depthwise"),
            ]
            if site
            else [0.0, 0.0, 0.0, 0.0, 0.0, 2 * i / max(1, count - 1) - 1, 0.0]
        )
        rows.append([1.0, float(site is not None), len(gene.choices) / 4, *about])
    table = np.asarray(rows, dtype=np.float32).reshape(count, 10)
    kinds = np.eye(max(group, default=0) + 1, dtype=np.float32)[np.asarray(group, dtype=int)].reshape(count, -1)
    # Each question sees the site's features with weights of its own as well.
    crossed = (kinds[:, :, None] * table[:, None, 3:]).reshape(count, -1)
    return np.concatenate([table, kinds, crossed], axis=1)
