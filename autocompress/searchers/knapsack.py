"""The candidates that an additive model expects to be best, from gentle to strongest compression.

For one price of latency every place picks on its own the combination of its choices that loses least: the Lagrangian
relaxation of the multiple-choice knapsack problem (Kellerer, Pferschy and Pisinger 2004, chapter 11). Rising prices
walk down the convex front. Two things tie neighbours together, so the picks are found along the chain of places by
dynamic programming: a change of number type costs its border, and a block dropped behind a dropped one costs more,
since divergences of single drops do not add up. Questions for the whole network or for many places at once
(architecture, tied sites) are settled around it one after another, again and again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray

from autocompress import space as sp
from autocompress.searchers.additive import Additive, Floats
from autocompress.types import Genotype

PRICES = 28
CLUMPED = 0.5  # share by which a drop costs more behind another drop
MOST_ITEMS = 600  # combinations at one place; beyond it the questions that gain least stay at their first choice
ROUNDS = 2


@dataclass(frozen=True, eq=False)
class Items:
    """All combinations of the choices that one place has to itself."""

    genes: tuple[int, ...]
    values: NDArray[np.int64]  # (items, genes)
    rows: Floats  # (items, columns)
    gone: NDArray[np.bool_]  # (items,)
    typed: NDArray[np.bool_]
    needs: tuple[tuple[int, NDArray[np.bool_]], ...]  # outer gene, (items, its choices) whether the item goes with it


class Knapsack:
    """Solves for the least `weights` times divergence plus price times latency, under one additive model."""

    def __init__(self, model: Additive) -> None:
        self.model = model
        self.knobs = sp.knobs(model.space)
        single = {i for i, at in enumerate(model.at) if len(at) == 1}
        single -= {i for i in single for other, _ in self.knobs[i].needs if not self._same_place(i, other, single)} & {
            i for i in single if any(o in single for o, _ in self.knobs[i].needs if not self._same_place(i, o, single))
        }
        fixed = {*single, *model.recipe}
        self.outer = tuple(i for i, knob in enumerate(self.knobs) if i not in fixed and knob.size > 1)
        self.cells = {
            cell: j for j, cell in enumerate((i, c) for i, k in enumerate(self.knobs) for c in range(1, k.size))
        }
        self.items = tuple(
            self._items(tuple(sorted(i for i in single if model.at[i] == (u,)))) for u in range(len(model.places))
        )

    def _same_place(self, i: int, other: int, single: set[int]) -> bool:
        return other in single and self.model.at[i] == self.model.at[other]

    def front(self, device_shares: Floats, weights: Floats | None = None, prices: int = PRICES) -> list[Genotype]:
        """Canonical genotypes by rising price of latency, no two equal in a row.

        `device_shares` (devices,) says whose latency counts how much, `weights` (groups,) what a nat of each costs.
        """
        model = self.model
        weighted = model.divergence * (1.0 if weights is None else weights[model.group])
        # From a price at which hardly anything pays to one at which everything does.
        typical = float(np.median(weighted[weighted > 0])) if (weighted > 0).any() else 1.0
        share = 1.0 / max(1, len(model.places))
        found: list[Genotype] = []
        outer = dict.fromkeys(self.outer, 0)
        for price in np.geomspace(0.05, 1000.0, prices) * typical / share / 10:
            solver = _Priced(self, weighted, device_shares, float(price))
            outer = solver.settle(outer)
            g = sp.canonical(model.space, solver.genotype(outer))
            if not found or found[-1] != g:
                found.append(g)
        return found

    def _items(self, genes: tuple[int, ...]) -> Items:
        kept = genes
        while np.prod([self.knobs[i].size for i in kept], dtype=float) > MOST_ITEMS:
            kept = tuple(i for i in kept if i != min(kept, key=self._gain))
        found: dict[tuple[int, ...], None] = {}
        inside = {i: n for n, i in enumerate(kept)}
        for values in product(*(range(self.knobs[i].size) for i in kept)):
            fixed = list(values)
            for n, i in enumerate(kept):
                barred = any(o in inside and fixed[inside[o]] not in allowed for o, allowed in self.knobs[i].needs)
                fixed[n] = 0 if barred else fixed[n]
            found[tuple(fixed)] = None
        values = np.array(list(found), dtype=np.int64).reshape(len(found), len(kept))
        rows = np.zeros((len(found), len(self.model.divergence)))
        needs: dict[int, NDArray[np.bool_]] = {}
        for n, i in enumerate(kept):
            taken = values[:, n] > 0
            for row in np.flatnonzero(taken):
                rows[row, self.cells[i, int(values[row, n])]] = 1.0
            for other, allowed in self.knobs[i].needs:
                if other not in inside:
                    holds = np.array([c in allowed for c in range(self.knobs[other].size)])
                    held = needs.setdefault(other, np.ones((len(found), self.knobs[other].size), dtype=bool))
                    held[taken] &= holds
        gone, typed = ((rows @ table).sum(axis=1) > 0 for table in (self.model.gone, self.model.typed))
        return Items(kept, values, rows, gone, typed, tuple(needs.items()))

    def _gain(self, i: int) -> float:
        """Logarithm of the factor that a gene takes off a device's time, at most."""
        columns = [self.cells[i, c] for c in range(1, self.knobs[i].size)]
        if self.model.gone[columns].any():
            return np.inf
        found: list[float] = []
        for device in self.model.devices:
            pays = np.log(np.maximum(device.floats, 1e-9) / np.maximum(device.integers, 1e-9))
            found.append(float((device.typed[columns] @ pays - device.shrink[columns].sum(axis=1)).max()))
        return max(found)

    @cached_property
    def padded(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
        """(places, items): which there are, which leave nothing, which are integers."""
        shape = (len(self.items), max((len(one.values) for one in self.items), default=0))
        there, gone, typed = (np.zeros(shape, dtype=bool) for _ in range(3))
        for u, one in enumerate(self.items):
            count = len(one.values)
            there[u, :count], gone[u, :count], typed[u, :count] = True, one.gone, one.typed
        return there, gone, typed

    @cached_property
    def parts(self) -> tuple[Floats, ...]:
        """Per device (places, items) share of a place's time that its own choices turn into integers."""
        found: list[Floats] = []
        for device in self.model.devices:
            parts = np.zeros(self.padded[0].shape)
            for u, one in enumerate(self.items):
                parts[u, : len(one.values)] = one.rows @ device.typed[:, u]
            found.append(parts)
        return tuple(found)

    @cached_property
    def shrunk(self) -> tuple[tuple[Floats, Floats], ...]:
        """Per device (places, items) factors on a place's time by its own choices, among floats and among integers."""
        found: list[tuple[Floats, Floats]] = []
        for device in self.model.devices:
            pair = (np.ones(self.padded[0].shape), np.ones(self.padded[0].shape))
            for u, one in enumerate(self.items):
                for factors, table in zip(pair, (device.shrink, device.shrink_integers), strict=True):
                    factors[u, : len(one.values)] = np.exp(one.rows @ table[:, u])
            found.append(pair)
        return tuple(found)


class _Priced:
    """One price: what every place picks, given the outer choices."""

    def __init__(self, of: Knapsack, weighted: Floats, shares: Floats, price: float) -> None:
        self.of, self.model, self.weighted, self.shares, self.price = of, of.model, weighted, shares, price
        self.own = np.zeros(of.padded[0].shape)
        for u, one in enumerate(of.items):
            self.own[u, : len(one.values)] = one.rows @ weighted

    def settle(self, outer: dict[int, int]) -> dict[int, int]:
        """Outer choices, each the best given the others, until none changes."""
        outer = dict(outer)
        best = self.value(outer)
        for _ in range(ROUNDS):
            changed = False
            for i in self.of.outer:
                for choice in range(self.of.knobs[i].size):
                    if choice == outer[i]:
                        continue
                    value = self.value({**outer, i: choice})
                    if value < best - 1e-12:
                        best, outer[i], changed = value, choice, True
            if not changed:
                break
        return outer

    def value(self, outer: dict[int, int]) -> float:
        """Divergence plus price times latency, borders left out."""
        table, constant = self.table(outer)
        return constant + float(table.min(axis=1).sum())

    def table(self, outer: dict[int, int]) -> tuple[Floats, float]:
        """(places, items) what each item costs with these outer choices, and what does not depend on items."""
        model, of = self.model, self.of
        there, gone, _ = of.padded
        row = np.zeros(len(model.divergence))
        values = [0] * len(of.knobs)
        for i in of.outer:  # in the order of the space, so that what vanishes vanishes whole
            values[i] = outer[i] if of.knobs[i].applies(values) else 0
            if values[i]:
                row[of.cells[i, values[i]]] = 1.0
        gone = gone | (row @ model.gone > 0)[:, None]
        found = np.where(there, self.own, np.inf)
        for u, one in enumerate(of.items):
            for other, holds in one.needs:
                found[u, : len(one.values)][~holds[:, values[other]]] = np.inf
        constant = float(row @ self.weighted)
        each = zip(self.shares, model.devices, of.shrunk, of.parts, strict=True)
        for share, device, (floats, integers), parts in each:
            whole = float(np.exp(row @ device.whole))
            in_floats = (device.floats * np.exp(row @ device.shrink))[:, None] * floats
            in_integers = (device.integers * np.exp(row @ device.shrink_integers))[:, None] * integers
            part = np.minimum(parts + (row @ device.typed)[:, None], 1.0)
            spent = np.where(gone, 0.0, (1.0 - part) * in_floats + part * in_integers)
            found = found + self.price * share * whole * spent
            constant += self.price * share * whole * device.rest
        return found, constant

    def genotype(self, outer: dict[int, int]) -> Genotype:
        """The picks along the chain, borders and neighbouring drops paid for."""
        table, _ = self.table(outer)
        border = self.price * float(sum(s * d.border for s, d in zip(self.shares, self.model.devices, strict=True)))
        picks = self.chain(table, border)
        values = [0] * len(self.of.knobs)
        for i, choice in outer.items():
            values[i] = choice
        for one, pick in zip(self.of.items, picks, strict=True):
            for i, choice in zip(one.genes, one.values[pick].tolist(), strict=True):
                values[i] = choice
        return tuple(values)

    def chain(self, table: Floats, border: float) -> list[int]:
        """Per place the item on the cheapest path; the state is the number type in force and whether the last went."""
        _, gone, typed = self.of.padded
        least = {(False, False): 0.0}
        back: list[dict[tuple[bool, bool], tuple[tuple[bool, bool], int]]] = []
        for u in range(len(table)):
            kinds: list[tuple[bool, bool, int]] = []  # integers, gone, the cheapest item of that kind
            for is_gone, is_typed in product((False, True), repeat=2):
                of_kind = np.where((gone[u] == is_gone) & ((typed[u] == is_typed) | is_gone), table[u], np.inf)
                pick = int(of_kind.argmin())
                if np.isfinite(of_kind[pick]):
                    kinds.append((is_typed, is_gone, pick))
            step: dict[tuple[bool, bool], float] = {}
            came: dict[tuple[bool, bool], tuple[tuple[bool, bool], int]] = {}
            for state, cost in least.items():
                for is_typed, is_gone, pick in kinds:
                    after = (state[0], True) if is_gone else (is_typed, False)
                    more = CLUMPED * self.own[u, pick] if is_gone and state[1] else 0.0
                    total = cost + float(table[u, pick]) + more + border * (not is_gone and is_typed != state[0])
                    if total < step.get(after, np.inf):
                        step[after], came[after] = total, (state, pick)
            least = step
            back.append(came)
        state = min(least, key=lambda one: (least[one], one))
        picks: list[int] = []
        for came in reversed(back):
            state, pick = came[state]
            picks.append(pick)
        return picks[::-1]


def thinned(found: Sequence[Genotype], ratios: Floats, count: int, low: float) -> Iterator[Genotype]:
    """At most `count` of a front by falling latency, evenly spaced in its logarithm down to `low`."""
    order = sorted(range(len(found)), key=lambda i: (-ratios[i], i))
    order = [i for i in order if ratios[i] >= low] or order[:1]
    marks = np.linspace(np.log(ratios[order[0]]), np.log(max(ratios[order[-1]], low)), max(count, 1))
    for mark in marks:
        yield found[min(order, key=lambda i: (abs(np.log(ratios[i]) - mark), i))]
