"""The first asks of a search: few candidates that already span the trade-off.

Where a probe was made, they are what its additive model expects to be best (`knapsack`), for every goal, from gentle
to beyond its budget. The model does not know what training wins back from each op, so some of them see the ops'
divergences scaled at random, and blocks are also dropped evenly over each stage: single drops say little of many.

Otherwise they are spread. Genes drawn one by one all look alike: with many sites every candidate is cut about half as
much as it could be. What a person tries first is uniform over the network: everything in int8, everything pruned a
little. So genes are taken in groups (one per op and setting, one for the architecture), each group gets one strength
per candidate by Latin hypercube (McKay, Beckman and Conover 1979), and sites follow it with few exceptions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random

import numpy as np

from autocompress import space as sp
from autocompress.searchers.additive import SIZE, Additive, Floats, additive, groups, rows
from autocompress.searchers.knapsack import CLUMPED, Knapsack, thinned
from autocompress.surrogate import ceiling
from autocompress.types import Facts, Genotype, Goal, Reading, Space

CUTTING = ("block", "replace", "prune", "lowrank", "sparsify")
"""Ops that take something away from the network."""
TOGETHER = 2  # of them in one of the first candidates: cuts of more at once leave nothing to learn from


BEYOND = 4.0  # times a budget's speedup up to which the first candidates go
SCALED = 0.7  # spread of the logarithm of an op's factor
SPARED = 10.0  # factor on the divergence of ops that are to stay away
VIEWS = 8  # at most, of fronts with other factors
DEPTHS, SHARES = 600, 13  # combinations of the stages' depths, at most about so many; with more stages, shares of all
NEAR = (1.1, 1.0, 0.95, 0.9)  # of the bounds: measured, candidates are up to a tenth slower than believed, or faster
SMALL = (0.0, 0.25, 0.5, 0.75)  # of what latency and size count, the latter's shares, where a budget bounds it


def first(space: Space, facts: Facts, goals: Sequence[Goal], count: int, rng: Random) -> tuple[Genotype, ...]:
    """`count` canonical genotypes for a search to begin with, from the probe if the facts hold one, else spread.

    Any few of them in order span the range. From a probe there may be fewer, and no two are near-copies.
    """
    model = additive(space, facts)
    return spread(space, count, rng) if model is None else tuple(fed(model, facts, goals, count, rng))


def spread(space: Space, count: int, rng: Random, exceptions: float = 0.08) -> tuple[Genotype, ...]:
    """`count` canonical genotypes from gentle to strongest compression, some of them perhaps equal.

    The first is what everybody compares with: integers everywhere and nothing else, if there are any. Of the others
    each takes at most TOGETHER of the ops that cut. Four strengths in ten leave their group alone, one in ten is the
    last choice, the rest lie between: cuts of several groups add up, and what loses too much quality teaches little.
    The share `exceptions` of sites leaves its group's strength for a choice of its own.
    """
    columns: list[list[float]] = []
    for _ in groups(space):
        levels = [(i + rng.random()) / count for i in range(count)]
        rng.shuffle(levels)
        columns.append(levels)
    cutting = [op for op in CUTTING if any(gene.op == op for gene in space.genes)]
    designs = common(space)
    for i in range(len(designs), count):
        values = [0] * len(space.genes)
        spared = set(cutting) - set(rng.sample(cutting, min(TOGETHER, len(cutting))))
        for members, levels in zip(groups(space), columns, strict=True):
            if space.genes[members[0]].op in spared:
                continue
            strength = min(1.0, max(0.0, 2.0 * levels[i] - 0.8))
            for j in members:
                last = len(space.genes[j].choices) - 1
                exact = strength * last
                values[j] = int(exact) + (rng.random() < exact % 1)
                if len(members) > 1 and rng.random() < exceptions:
                    values[j] = rng.randint(0, last)
        designs.append(sp.canonical(space, tuple(values)))
    return tuple(designs[:count])


def common(space: Space) -> list[Genotype]:
    """Integers everywhere and nothing else; nothing where no site can be in integers, for that is the parent."""
    return [g for g in (integers(space),) if g != sp.parent(space)]


def integers(space: Space) -> Genotype:
    """Every site that can be int8 in int8, all else left alone."""
    values = [0] * len(space.genes)
    for i, gene in enumerate(space.genes):
        if (gene.op, gene.param) == ("quantize", "bits") and "int8" in gene.choices:
            values[i] = gene.choices.index("int8")
    return sp.canonical(space, tuple(values))


# --- from a probe -------------------------------------------------------------------------------------------------


def fed(model: Additive, facts: Facts, goals: Sequence[Goal], count: int, rng: Random) -> list[Genotype]:
    """Integers everywhere, then in turn for each goal: twice the model's own front and even depths, a scaled front."""
    space, knapsack = model.space, Knapsack(model)
    queues: list[Iterator[Genotype]] = []
    for goal in goals:
        asked = Asked.of(model, goal, facts)
        own = asked.ordered([g for mix in asked.mixes for g in knapsack.front(mix)], count)
        some = list(dict.fromkeys(evenly(space)))
        even = iter(dict.fromkeys((*asked.gentlest(some), *asked.ordered(some, max(2, count // 6)))))
        front = iter(own)
        queues += [front, even, front, even, _scaled(knapsack, asked, count, rng)]
    found = common(space)
    near = max(2, round(0.02 * len(space.genes)))
    while queues and len(found) < count:
        queue = queues.pop(0)
        for g in queue:
            if all(sum(a != b for a, b in zip(g, other, strict=True)) >= near for other in found):
                found.append(g)
                queues.append(queue)
                break
    return [trained(model, g, turn) for turn, g in enumerate(found)]


@dataclass(frozen=True, eq=False)
class Asked:
    """What a goal's budgets ask of a model's candidates."""

    model: Additive
    shares: Floats  # (devices,) how much each device's latency counts
    most: float  # latency ratio
    small: float | None  # size ratio

    @classmethod
    def of(cls, model: Additive, goal: Goal, facts: Facts) -> Asked:
        """The tightest bounds of the goal."""
        return cls(model, device_shares(model, goal), bound(goal, facts.baseline), size_bound(model, goal, facts))

    @property
    def mixes(self) -> tuple[Floats, ...]:
        """(devices,) shares under which the knapsack is solved: of latency alone, or with more and more of the size."""
        if self.small is None:
            return (self.shares,)
        only = np.array([float(device.profile == SIZE) for device in self.model.devices])
        return tuple((1.0 - size) * self.shares + size * only for size in SMALL)

    def ratios(self, found: Sequence[Genotype]) -> Floats:
        """(n,) latency ratios; a file that is farther over its size than its latency counts by its size."""
        known = self.model.ratios(rows(self.model.space, found))
        latency = known @ self.shares
        if self.small is None:
            return latency
        sizes = known[:, [device.profile for device in self.model.devices].index(SIZE)]
        return np.maximum(latency, sizes * self.most / self.small)

    def gentlest(self, found: Sequence[Genotype]) -> Iterator[Genotype]:
        """Those of least divergence within NEAR of the bounds.

        What turns out to be too slow is known in seconds, what was cut too deeply only after its training.
        """
        for near in NEAR if found else ():
            able = [g for g, ratio in zip(found, self.ratios(found), strict=True) if ratio <= near * self.most]
            if able:
                encoded = rows(self.model.space, able)
                yield able[int((self.model.costs(encoded).sum(axis=1) + clumps(self.model, encoded)).argmin())]

    def ordered(self, found: Sequence[Genotype], count: int, weights: Floats | None = None) -> list[Genotype]:
        """From a little above the bounds to far below, evenly in latency, in an order that spans the range early.

        Where several mixes were solved, those only than which none is both gentler and faster.
        """
        if not found:
            return []
        ratios = self.ratios(found)
        if self.small is not None:
            costs = self.model.costs(rows(self.model.space, found))
            found, ratios = _front(found, ratios, costs.sum(axis=1) if weights is None else costs @ weights)
        inside = [i for i in range(len(found)) if ratios[i] <= min(1.0, 1.4 * self.most)] or [int(ratios.argmin())]
        some = list(dict.fromkeys(thinned([found[i] for i in inside], ratios[inside], count, self.most / BEYOND)))
        return [some[i] for i in sorted(range(len(some)), key=lambda i: _reversed_bits(i, len(some)))]


def _front(found: Sequence[Genotype], ratios: Floats, costs: Floats) -> tuple[list[Genotype], Floats]:
    """Not dominated in ratio and cost, by rising ratio."""
    kept: list[int] = []
    for i in np.lexsort((costs, ratios)).tolist():
        if not kept or costs[i] < costs[kept[-1]]:
            kept.append(i)
    return [found[i] for i in kept], ratios[kept]


def _scaled(knapsack: Knapsack, asked: Asked, count: int, rng: Random) -> Iterator[Genotype]:
    """Fronts of models in which each op's divergence counts otherwise, that of all but TOGETHER cutting ones more."""
    space = knapsack.model.space
    cutting = [op for op in CUTTING if any(gene.op == op for gene in space.genes)]
    for _ in range(VIEWS):
        spared = set(cutting) - set(rng.sample(cutting, min(TOGETHER, len(cutting))))
        factors = np.array(
            [
                math.exp(rng.gauss(0.0, SCALED)) * (SPARED if space.genes[members[0]].op in spared else 1.0)
                for members in groups(space)
            ]
        )
        mix = asked.mixes[rng.randrange(len(asked.mixes))] if asked.small is not None else asked.shares
        yield from asked.ordered(knapsack.front(mix, factors), count, factors)


def bound(goal: Goal, baseline: Mapping[str, Reading]) -> float:
    """The lowest latency ratio that a budget of the goal asks for; 1 where none bounds the median latency."""
    asked = (ceiling(budget, baseline.get(budget.profile)) for budget in goal.budgets)
    return min((one for one in asked if one is not None), default=1.0)


def size_bound(model: Additive, goal: Goal, facts: Facts) -> float | None:
    """The lowest size ratio that a budget of the goal asks for; None where none does, or nothing is known of sizes."""
    if facts.baseline_size_mb <= 0 or all(device.profile != SIZE for device in model.devices):
        return None
    asked = (budget.size_mb for budget in goal.budgets if budget.size_mb is not None)
    return min((size / facts.baseline_size_mb for size in asked), default=None)


def device_shares(model: Additive, goal: Goal) -> Floats:
    """(devices,) how much each device's latency counts for a goal; all alike where none of its own was probed."""
    wanted = {budget.profile for budget in goal.budgets}
    found = np.array([float(device.profile in wanted) for device in model.devices])
    if not found.any():
        found = np.array([float(device.profile != SIZE) for device in model.devices])
    return found / found.sum()


def _reversed_bits(i: int, count: int) -> tuple[float, int]:
    """Key of van der Corput's order: 0, 1/2, 1/4, 3/4 ... of a range."""
    bits = max(1, (count - 1).bit_length())
    return int(f"{i:0{bits}b}"[::-1], 2), i


def evenly(space: Space) -> Iterator[Genotype]:
    """So many blocks of each stage dropped, evenly spread over it, in all combinations; what is left in integers.

    Their weights in eight bits, and in four where the space asks.

    With so many stages that there are too many combinations, as large a share of each.
    """
    stages: dict[str, list[int]] = {}
    for i, gene in enumerate(space.genes):
        if gene.op == "block" and "drop" in gene.choices:
            stages.setdefault(gene.site.rpartition(".")[0], []).append(i)
    alone = 2 ** len(stages) <= DEPTHS  # else every stage by the same share
    levels = max(2, int(DEPTHS ** (1 / max(len(stages), 1)))) if alone else SHARES
    counts = [[round(len(members) * level / (levels - 1)) for level in range(levels)] for members in stages.values()]
    plain = integers(space)
    for dropped in product(*map(dict.fromkeys, counts)) if alone else zip(*counts, strict=True):
        for kept in dict.fromkeys((plain, packed(space, plain))):
            values = list(kept)
            for many, members in zip(dropped, stages.values(), strict=True):
                for place in sp.spaced(len(members), many):
                    i = members[place]
                    values[i] = space.genes[i].choices.index("drop")
            if any(dropped):
                yield sp.canonical(space, tuple(values))


def packed(space: Space, g: Genotype) -> Genotype:
    """The same with the weights of integers in four bits, wherever that is asked."""
    chosen = [
        gene.choices.index("int4") if (gene.op, gene.param) == ("quantize", "weights") else value
        for gene, value in zip(space.genes, g, strict=True)
    ]
    return sp.canonical(space, tuple(chosen))


def clumps(model: Additive, encoded: Floats) -> Floats:
    """(n,) nats more than the sum of single drops: one behind so many dropped ones costs CLUMPED of itself for each."""
    each = (encoded * model.divergence) @ model.gone  # (n, places)
    found, run = np.zeros(len(encoded)), np.zeros(len(encoded))
    for place in range(each.shape[1]):
        found += CLUMPED * run * each[:, place]
        run = np.where(each[:, place] > 0, run + 1.0, 0.0)
    return found


def trained(model: Additive, g: Genotype, turn: int) -> Genotype:
    """With another recipe each turn, since the probe says nothing of these; the first turn's is the job's plain one."""
    values = list(g)
    for n, i in enumerate(model.recipe):
        size = len(model.space.genes[i].choices)
        values[i] = (turn * (n + 1) + turn // size * n) % size
    return sp.canonical(model.space, tuple(values))
