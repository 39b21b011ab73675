"""The first asks of a search: few candidates that already span the trade-off.

Genes drawn one by one all look alike: with many sites every candidate is cut about half as much as it could be. What
a person tries first is uniform over the network: everything in int8, everything pruned a little. So genes are taken
in groups (one per op and setting, one for the architecture), each group gets one strength per candidate by Latin
hypercube (McKay, Beckman and Conover 1979), and sites follow it with few exceptions.
"""

from __future__ import annotations

from random import Random

from autocompress import space as sp
from autocompress.types import Genotype, Space

CUTTING = ("block", "replace", "prune", "lowrank", "sparsify")
"""Ops that take something away from the network."""
TOGETHER = 2  # of them in one of the first candidates: cuts of more at once leave nothing to learn from


def groups(space: Space) -> tuple[tuple[int, ...], ...]:
    """Indices of genes that ask the same question at many sites; each architecture knob is a group of its own."""
    found: dict[tuple[str, str], list[int]] = {}
    for i, gene in enumerate(space.genes):
        key = ("", gene.name) if gene.kind == "arch" else (gene.op, gene.param)
        found.setdefault(key, []).append(i)
    return tuple(tuple(members) for members in found.values())


def spread(space: Space, count: int, rng: Random, exceptions: float = 0.08) -> tuple[Genotype, ...]:
    """`count` canonical genotypes from gentle to strongest compression, some of them perhaps equal.

    The first is what everybody compares with: integers everywhere and nothing else. Of the others each takes at most
    TOGETHER of the ops that cut. Four strengths in ten leave their group alone, one in ten is the last choice, the rest
    lie between: cuts of several groups add up, and what loses too much quality teaches little. The share `exceptions`
    of sites leaves its group's strength for a choice of its own.
    """
    columns: list[list[float]] = []
    for _ in groups(space):
        levels = [(i + rng.random()) / count for i in range(count)]
        rng.shuffle(levels)
        columns.append(levels)
    cutting = [op for op in CUTTING if any(gene.op == op for gene in space.genes)]
    designs = [integers(space)]
    for i in range(1, count):
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


def integers(space: Space) -> Genotype:
    """Every site that can be int8 in int8, all else left alone."""
    values = [0] * len(space.genes)
    for i, gene in enumerate(space.genes):
        if (gene.op, gene.param) == ("quantize", "bits") and "int8" in gene.choices:
            values[i] = gene.choices.index("int8")
    return sp.canonical(space, tuple(values))
