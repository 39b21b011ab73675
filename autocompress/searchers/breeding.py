"""Children of genotypes, many at once: mutations, runs of neighbours moved together, crossover within coupled stages.

The stages of a network are taken from the paths of its genes: all genes under one block, or under one stage, belong
together, and so do all that ask one question in one stage. A crossover hands over such sets whole. All functions take
canonical genotypes as rows of numbers and return such; random numbers come from the generator given.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autocompress import space as sp
from autocompress.searchers.additive import groups
from autocompress.types import Genotype, Space

Rows = NDArray[np.int64]
NEIGHBOUR = 0.5  # chance that a gene of rising or falling numbers takes a neighbouring choice


class Breeder:
    """One space made ready."""

    def __init__(self, space: Space) -> None:
        knobs = sp.knobs(space)
        self.sizes = np.array([knob.size for knob in knobs], dtype=np.int64)
        self.ordered = np.array([knob.ordered and knob.size > 2 for knob in knobs], dtype=bool)
        self.free = np.flatnonzero(self.sizes > 1)
        self.runs = [np.array(m) for m in groups(space) if len(m) > 1 and all(self.sizes[i] > 1 for i in m)]
        self.sets = [np.array(members) for members in coupled(space)]
        by_needs: dict[tuple[tuple[int, frozenset[int]], ...], list[int]] = {}
        for i, knob in enumerate(knobs):
            if knob.needs:
                by_needs.setdefault(knob.needs, []).append(i)
        # Genes that need the same vanish together; those whose needs look at earlier genes come first.
        order = sorted(by_needs, key=lambda needs: max(other for other, _ in needs))
        self.needs = [
            (
                [(o, np.array([c in allowed for c in range(knobs[o].size)])) for o, allowed in needs],
                np.array(by_needs[needs]),
            )
            for needs in order
        ]

    def canonical(self, rows: Rows) -> Rows:
        """(n, genes) with every gene that does not apply at its first choice, in place."""
        for needs, members in self.needs:
            holds = np.ones(len(rows), dtype=bool)
            for other, allowed in needs:
                holds &= allowed[rows[:, other]]
            barred = np.flatnonzero(~holds)
            if len(barred):
                rows[barred[:, None], members] = 0
        return rows

    def applies(self, rows: Rows) -> NDArray[np.bool_]:
        """(n, genes) whether each gene means anything and has a choice."""
        found = np.tile(self.sizes > 1, (len(rows), 1))
        for needs, members in self.needs:
            holds = np.ones(len(rows), dtype=bool)
            for other, allowed in needs:
                holds &= allowed[rows[:, other]]
            found[:, members] &= holds[:, None]
        return found

    def mutated(self, rows: Rows, changes: NDArray[np.float64], rng: np.random.Generator) -> Rows:
        """One gene that applies changes per row, each further one by a chance that makes `changes` (n,) the mean."""
        applies = self.applies(rows)
        count = applies.sum(axis=1)
        chance = np.maximum(changes - 1.0, 0.0) / np.maximum(count - 1, 1)
        chosen = applies & (rng.random(rows.shape) < chance[:, None])
        sure = np.where(applies, rng.random(rows.shape), -1.0).argmax(axis=1)
        chosen[np.arange(len(rows)), sure] = applies[np.arange(len(rows)), sure]
        other = (rng.random(rows.shape) * np.maximum(self.sizes - 1, 1)).astype(np.int64)
        other += (other >= rows) & (self.sizes > 1)
        step = np.where(rng.random(rows.shape) < 0.5, -1, 1)
        step = np.where((rows + step < 0) | (rows + step >= self.sizes), -step, step)
        near = self.ordered & (rng.random(rows.shape) < NEIGHBOUR)
        return self.canonical(np.where(chosen, np.where(near, rows + step, other), rows))

    def swept(self, rows: Rows, rng: np.random.Generator) -> Rows:
        """One setting of neighbouring sites moved together by one step, or all of them set to one choice."""
        found = rows.copy()
        for row in found if self.runs else ():
            members = self.runs[int(rng.integers(len(self.runs)))]
            low, high = sorted(rng.integers(len(members), size=2).tolist())
            inside = members[low : high + 1]
            if rng.random() < 0.5:
                row[inside] = np.clip(row[inside] + rng.choice((-1, 1)), 0, self.sizes[inside] - 1)
            else:
                row[inside] = np.minimum(int(rng.integers(self.sizes[inside].max())), self.sizes[inside] - 1)
        return self.canonical(found)

    def crossed(self, rows: Rows, others: Rows, rng: np.random.Generator) -> Rows:
        """Children of pairs: a third gene by gene, the rest by handing over coupled sets whole."""
        share = rng.random((len(rows), 1))
        taken = rng.random(rows.shape) < share
        for n in np.flatnonzero(rng.random(len(rows)) < (2 / 3 if self.sets else 0.0)):
            taken[n] = False
            for pick in np.flatnonzero(rng.random(len(self.sets)) < max(1.5 / len(self.sets), 0.4 * share[n, 0])):
                taken[n, self.sets[pick]] = True
        # A gene that means something in one parent only is taken from there.
        mine, theirs = self.applies(rows), self.applies(others)
        return self.canonical(np.where(mine == theirs, np.where(taken, others, rows), np.where(theirs, others, rows)))

    def rows(self, genotypes: Sequence[Genotype]) -> Rows:
        """(n, genes)."""
        return np.asarray(genotypes, dtype=np.int64).reshape(len(genotypes), len(self.sizes))


def coupled(space: Space) -> tuple[tuple[int, ...], ...]:
    """Sets of genes that a crossover hands over whole: those under one path, and one question's under one path."""
    found: dict[tuple[str, ...], list[int]] = {}
    for i, gene in enumerate(space.genes):
        atoms = gene.site.split(".") if gene.site not in ("", ".") else []
        for length in range(1, len(atoms) + 1):
            path = ".".join(atoms[:length])
            found.setdefault((path,), []).append(i)
            found.setdefault((path, gene.op, gene.param), []).append(i)
    most = 0.7 * len(space.genes)
    return tuple(dict.fromkeys(tuple(members) for members in found.values() if 1 < len(members) <= most))
