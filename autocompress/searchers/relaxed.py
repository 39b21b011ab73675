"""A genotype relaxed: every gene a distribution over its choices, with gradients through genes that may vanish."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autocompress import space as sp
from autocompress.types import Genotype, Space

Array = NDArray[np.float64]
NEVER = -1e9


@dataclass(frozen=True, slots=True)
class Need:
    """One gene and the choices of it that another waits for."""

    gene: int
    allowed: Array  # (most,) 1 for those choices
    by_default: float  # 1 where the first choice is among them


class Relaxed:
    """The space for relaxed genotypes: probabilities (n, genes, most choices) to indicators (n, columns) and back.

    A gene's chance to apply is that of each gene it needs to stand at a choice that lets it, taken as independent.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self.knobs = sp.knobs(space)
        self.sizes = np.array([knob.size for knob in self.knobs], dtype=np.int64)
        self.most = int(self.sizes.max(initial=1))
        self.barred = np.where(np.arange(self.most)[None, :] >= self.sizes[:, None], NEVER, 0.0)
        needs = [knob.needs for knob in self.knobs]
        self.sets = list(dict.fromkeys(needs))
        self.of = np.array([self.sets.index(one) for one in needs])  # which set of needs each gene has
        self.needs = [[self._need(gene, allowed) for gene, allowed in one] for one in self.sets]
        # Sets whose genes are needed by others come first: by the latest gene that they look at.
        self.order = sorted(range(len(self.sets)), key=lambda u: max((n.gene for n in self.needs[u]), default=-1))
        self.gene = np.repeat(np.arange(len(self.sizes)), self.sizes - 1)
        starts = np.concatenate([[0], np.cumsum(self.sizes - 1)])[:-1]
        self.choice = np.arange(len(self.gene)) - starts[self.gene] + 1

    def _need(self, gene: int, allowed: frozenset[int]) -> Need:
        mask = np.zeros(self.most)
        mask[sorted(allowed)] = 1.0
        return Need(gene, mask, mask[0])

    def applies(self, p: Array) -> Array:
        """(n, sets) chance that genes of each set of needs apply."""
        found = np.ones((len(p), len(self.sets)))
        for u in self.order:
            for need in self.needs[u]:
                found[:, u] *= self._held(p, found, need)
        return found

    def rows(self, p: Array, applies: Array) -> Array:
        """(n, columns) expected indicators."""
        return applies[:, self.of[self.gene]] * p[:, self.gene, self.choice]

    def back(self, p: Array, applies: Array, slope: Array) -> Array:
        """(n, genes, most): derivative by the probabilities, from that by the indicators."""
        found = np.zeros_like(p)
        found[:, self.gene, self.choice] = slope * applies[:, self.of[self.gene]]
        by_set = np.zeros_like(applies)
        np.add.at(by_set.T, self.of[self.gene], (slope * p[:, self.gene, self.choice]).T)
        for u in reversed(self.order):
            held = [self._held(p, applies, need) for need in self.needs[u]]
            for k, need in enumerate(self.needs[u]):
                others = np.prod([h for j, h in enumerate(held) if j != k], axis=0) * by_set[:, u]
                mine = applies[:, self.of[need.gene]]
                found[:, need.gene] += (others * mine)[:, None] * need.allowed
                by_set[:, self.of[need.gene]] += others * (p[:, need.gene] @ need.allowed - need.by_default)
        return found

    def _held(self, p: Array, applies: Array, need: Need) -> Array:
        mine = applies[:, self.of[need.gene]]
        return (1.0 - mine) * need.by_default + mine * (p[:, need.gene] @ need.allowed)

    def soft(self, logits: Array, temperature: float) -> Array:
        """Softmax over each gene's choices."""
        z = (logits + self.barred) / temperature
        odds = np.exp(z - z.max(axis=-1, keepdims=True))
        return odds / odds.sum(axis=-1, keepdims=True)

    def hard(self, logits: Array) -> list[Genotype]:
        """The likeliest canonical genotypes."""
        chosen = (logits + self.barred).argmax(axis=-1)
        return [sp.canonical(self.space, tuple(map(int, row))) for row in chosen]
