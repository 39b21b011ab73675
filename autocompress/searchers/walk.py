"""Walks of the agent through the genes, many at once: what it sees at each, what it may choose, what it chose.

At every gene that applies it sees what the site is like, which question is asked, what it chose before, and what is
believed of each choice: loss of quality and latency with the choice in place, all genes not yet walked standing as in a
good genotype known already (its companion). Each walk has an aim, the latency that it is to reach. A choice after which
no completion could reach it, by what is believed, is barred.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autocompress import space as sp
from autocompress.searchers.agent import BARRED, Agent
from autocompress.searchers.belief import Array, Guess, groups_of
from autocompress.searchers.outlook import Outlook
from autocompress.types import Facts, Gene, Genotype, Site, Space

Whole = NDArray[np.int64]
OPS = ("block", "replace", "prune", "lowrank", "sparsify", "qat", "quantize", "store", "distill", "arch")  # then others
SITE = 7
SEEN = 18  # numbers that change along a walk
WIDTH = SITE + 2 * (len(OPS) + 1) + SEEN


@dataclass(frozen=True)
class Walks:
    """Decisions of many walks: (walks, genes) and, for what could be chosen, (walks, genes, most choices)."""

    chosen: Whole
    features: NDArray[np.float32]  # (walks, genes, most, WIDTH)
    barred: Array
    logs: Array  # (walks, genes) log-probability of what was chosen
    decided: NDArray[np.bool_]  # where there was a choice
    loss: Array  # (walks,) as believed
    latency: Array
    missed: Array  # (walks,) by how much the aim or a budget is believed to be missed

    def genotypes(self) -> list[Genotype]:
        """As tuples; canonical."""
        return [tuple(map(int, row)) for row in self.chosen]


class Believed:
    """One guess along walks: its value for every choice of the gene at hand, kept up to date choice by choice."""

    def __init__(self, guess: Guess, columns: Whole, start: Whole) -> None:
        """`columns` (genes, most): column of each choice, -1 for the first; `start` (walks, genes) genotypes."""
        self.guess, self.columns = guess, columns
        # Row -1 stands for the choice that has no column.
        self.across = np.vstack([guess.across, np.zeros((1, guess.across.shape[1]))])
        self.linear = np.append(guess.linear, 0.0)
        here = columns[np.arange(columns.shape[0])[None, :], start]
        self.near = self.across[here].sum(axis=1)
        self.flat = self.linear[here].sum(axis=1)

    def moved(self, gene: int, before: Whole) -> tuple[Array, Array]:
        """(walks, most, n) and (walks, most): the state with each choice of `gene` instead of what stands there."""
        here, there = self.columns[gene, before], self.columns[gene]
        near = self.near[:, None] + self.across[there][None] - self.across[here][:, None]
        return near, self.flat[:, None] + self.linear[there][None] - self.linear[here][:, None]

    def without(self, near: Array, flat: Array, gene: int, before: Whole, lost: NDArray[np.bool_]) -> None:
        """Take `gene`'s choice out of a moved state where it is `lost` (walks, most)."""
        here = self.columns[gene, before]
        near -= lost[:, :, None] * self.across[here][:, None]
        flat -= lost * self.linear[here][:, None]

    def value(self, near: Array, flat: Array) -> Array:
        """Of a state."""
        return self.guess.mean + flat + (near + self.guess.curved * near**2) @ self.guess.pull


class Walker:
    """Everything about a space that does not change from walk to walk."""

    def __init__(self, space: Space, facts: Facts) -> None:
        self.space, self.knobs = space, sp.knobs(space)
        sizes = [knob.size for knob in self.knobs]
        self.most = max(sizes, default=1)
        self.level = np.arange(self.most)[None, :] / np.maximum(np.array(sizes)[:, None] - 1, 1)
        self.closed = np.where(np.arange(self.most)[None, :] < np.array(sizes)[:, None], 0.0, BARRED)
        starts = np.concatenate([[0], np.cumsum([size - 1 for size in sizes])]).astype(int)[:-1]
        offered = np.arange(self.most)[None, :]
        inside = (offered > 0) & (offered < np.array(sizes)[:, None])
        self.columns: Whole = np.where(inside, starts[:, None] + offered - 1, -1)
        self.group = groups_of(space.genes)
        self.same = [
            [j for j in range(i) if g.site and space.genes[j].site == g.site] for i, g in enumerate(space.genes)
        ]
        self.fixed = _fixed(space, facts.sites, self.level)
        self.children = [
            [j for j, k in enumerate(self.knobs) if any(o == i for o, _ in k.needs)] for i in range(len(sizes))
        ]
        self.heirs = [self._heirs(i) for i in range(len(sizes))]
        self.allowed = [
            [(other, np.isin(np.arange(self.most), sorted(allowed))) for other, allowed in knob.needs]
            for knob in self.knobs
        ]

    def _heirs(self, gene: int) -> list[int]:
        """Genes that may vanish with a choice of this one, in order."""
        found: set[int] = set()
        waiting = [gene]
        while waiting:
            for child in self.children[waiting.pop()]:
                if child not in found:
                    found.add(child)
                    waiting.append(child)
        return sorted(found)

    def walk(
        self,
        agent: Agent,
        outlook: Outlook | None,
        companions: Sequence[Genotype],
        aims: Array,
        *,
        luck: Array | None = None,
        chosen: Sequence[Genotype] | None = None,
        mask: bool = True,
    ) -> Walks:
        """As many walks as there are companions, drawn with `luck` (walks, genes) or along `chosen`.

        `aims` (walks,) are logarithms of latency ratios.
        """
        return _Going(self, agent, outlook, companions, aims, mask=mask).go(luck, chosen)


class _Going:
    def __init__(
        self,
        walker: Walker,
        agent: Agent,
        outlook: Outlook | None,
        companions: Sequence[Genotype],
        aims: Array,
        *,
        mask: bool,
    ) -> None:
        self.walker, self.agent, self.outlook, self.aims, self.mask = walker, agent, outlook, aims, mask
        self.state = np.array(companions, dtype=int).reshape(len(aims), -1)
        self.companion = self.state.copy()
        count, genes = self.state.shape
        self.sums, self.counts = (
            np.zeros((count, walker.group.max(initial=0) + 1)),
            np.zeros(walker.group.max(initial=0) + 1),
        )
        self.last = np.zeros_like(self.sums)
        self.levels = np.zeros((count, genes))
        self.guesses: list[Believed] = []
        self.reach = np.zeros((count, genes + 1))
        self.shrinks: list[Array] = []
        self.unit = np.ones((count, 2))
        if outlook is not None:
            every = (outlook.loss, *outlook.latencies, *outlook.sizes)
            self.guesses = [Believed(guess, walker.columns, self.state) for guess in every]
            self._surroundings(outlook)

    def _surroundings(self, outlook: Outlook) -> None:
        """How much single choices do about each companion: the units of what is seen, and what later genes can win."""
        rows = np.zeros((len(self.state), len(outlook.loss.linear)))
        here = self.walker.columns[np.arange(self.state.shape[1])[None, :], self.state]
        for row, columns in zip(rows, here, strict=True):
            row[columns[columns >= 0]] = 1.0
        loss = outlook.loss.slope(rows)
        latency = np.mean([guess.slope(rows) for guess in outlook.latencies], axis=0)
        self.unit = np.stack([np.abs(loss).mean(axis=1), np.abs(latency).mean(axis=1)], axis=1) + 1e-9
        self.reach = self._won(latency, here)
        self.shrinks = [self._won(guess.slope(rows), here) for guess in outlook.sizes]

    def _won(self, slope: Array, here: Whole) -> Array:
        """(walks, genes + 1): what each gene and all later ones can win at most of what has this slope."""
        padded = np.concatenate([slope, np.zeros((len(slope), 1))], axis=1)
        options = padded[:, self.walker.columns] + np.where(self.walker.closed < 0, np.inf, 0.0)[None]
        wins = np.minimum(options.min(axis=-1) - np.take_along_axis(padded, here, axis=1), 0.0)
        found = np.zeros((len(slope), here.shape[1] + 1))
        found[:, :-1] = np.cumsum(wins[:, ::-1], axis=1)[:, ::-1]
        return found

    def go(self, luck: Array | None, chosen: Sequence[Genotype] | None) -> Walks:
        walker = self.walker
        count, genes = self.state.shape
        given = None if chosen is None else np.array(chosen, dtype=int).reshape(count, genes)
        features = np.zeros((count, genes, walker.most, WIDTH), dtype=np.float32)
        features[..., : WIDTH - SEEN] = walker.fixed
        fixed = self.agent.part(walker.fixed)
        barred = np.tile(walker.closed, (count, 1, 1))
        logs, decided = np.zeros((count, genes)), np.zeros((count, genes), dtype=bool)
        for i, knob in enumerate(walker.knobs):
            if knob.size < 2:
                continue
            decided[:, i] = self._applies(i)
            moved, values = self._believed(i)
            seen = features[:, i, :, WIDTH - SEEN :]
            self._see(i, values, seen)
            if values is not None and self.mask:
                self._bar(i, values, barred[:, i])
            found = self.agent.logs(fixed[i] + self.agent.part(seen, WIDTH - SEEN), barred[:, i])
            if given is not None:
                take = np.where(decided[:, i], given[:, i], 0)
            else:
                assert luck is not None
                take = (np.cumsum(np.exp(found), axis=-1) < luck[:, i, None]).sum(axis=-1)
                take = np.where(decided[:, i], np.minimum(take, knob.size - 1), 0)
                # The last of the likely ones, where rounding left a barred one.
                stuck = barred[np.arange(count), i, take] < 0
                take = np.where(stuck & decided[:, i], found.argmax(axis=-1), take)
            logs[:, i] = np.where(decided[:, i], np.maximum(found[np.arange(count), take], -20.0), 0.0)
            self._choose(i, take, moved, decided[:, i])
        loss, latency, missed = self._end()
        return Walks(self.state, features, barred, logs, decided, loss, latency, missed)

    def _applies(self, gene: int, state: Whole | None = None) -> NDArray[np.bool_]:
        state = self.state if state is None else state
        held = np.ones(state.shape[:-1], dtype=bool)
        for other, allowed in self.walker.allowed[gene]:
            held &= allowed[state[..., other]]
        return held

    def _believed(self, i: int) -> tuple[list[tuple[Array, Array]], Array | None]:
        """States of each guess after each choice, and values (guesses, walks, most)."""
        if not self.guesses:
            return [], None
        moved = [guess.moved(i, self.state[:, i]) for guess in self.guesses]
        if heirs := self.walker.heirs[i]:
            after = np.repeat(self.state[:, None], self.walker.most, axis=1)
            after[:, :, i] = np.arange(self.walker.most)[None, :]
            for heir in heirs:
                lost = ~self._applies(heir, after) & (after[:, :, heir] > 0)
                if lost.any():
                    for guess, (near, flat) in zip(self.guesses, moved, strict=True):
                        guess.without(near, flat, heir, self.state[:, heir], lost)
                    after[:, :, heir] = np.where(lost, 0, after[:, :, heir])
        return moved, np.stack([g.value(near, flat) for g, (near, flat) in zip(self.guesses, moved, strict=True)])

    def _choose(self, i: int, take: Whole, moved: list[tuple[Array, Array]], decided: NDArray[np.bool_]) -> None:
        walks = np.arange(len(take))
        for guess, (near, flat) in zip(self.guesses, moved, strict=True):
            guess.near, guess.flat = near[walks, take], flat[walks, take]
        self.state[:, i] = take
        for heir in self.walker.heirs[i]:
            self.state[:, heir] = np.where(self._applies(heir), self.state[:, heir], 0)
        level, group = self.walker.level[i, take], self.walker.group[i]
        self.levels[:, i] = level
        self.sums[:, group] += np.where(decided, level, 0.0)
        self.counts[group] += 1
        self.last[:, group] = np.where(decided, level, self.last[:, group])

    def _bar(self, i: int, values: Array, barred: Array) -> None:
        """Bar what leaves the aim or a budget out of reach; where that is all, all but the least far."""
        assert self.outlook is not None
        missed = self._slow(values) + self.reach[:, i + 1, None]
        for size, shrinks in zip(self._sizes(values), self.shrinks, strict=True):
            missed = np.maximum(missed, size - 1.0 + shrinks[:, i + 1, None])
        missed = np.where(barred < 0, np.inf, missed)
        least = np.maximum(missed.min(axis=-1, keepdims=True), 0.0)
        barred[missed > least + 1e-9] = BARRED

    def _times(self, values: Array) -> Array:
        assert self.outlook is not None
        return values[1 : 1 + len(self.outlook.latencies)]

    def _sizes(self, values: Array) -> Array:
        assert self.outlook is not None
        return values[1 + len(self.outlook.latencies) :]

    def _mean(self, values: Array) -> Array:
        """Latency of the goal, of its devices'."""
        times = self._times(values)
        return times[0] if len(times) == 1 else times.mean(axis=0)

    def _slow(self, values: Array) -> Array:
        """By how much the aim or a budget of latency is missed."""
        assert self.outlook is not None
        aims = self.aims if values.ndim == 2 else self.aims[:, None]
        over = [value - bound for value, bound in zip(self._times(values), self.outlook.bounds, strict=True)]
        return np.maximum(self._mean(values) - aims, over[0] if len(over) == 1 else np.max(over, axis=0))

    def _missed(self, values: Array) -> Array:
        missed = self._slow(values)
        for size in self._sizes(values):
            missed = np.maximum(missed, size - 1.0)
        return missed

    def _see(self, i: int, values: Array | None, seen: NDArray[np.float32]) -> None:
        """Fill in (walks, most, SEEN)."""
        walker, genes = self.walker, self.state.shape[1]
        own = walker.level[i][None, :]
        group, here = walker.group[i], walker.same[i]
        if self.counts[group]:
            seen[..., 0] = own - (self.sums[:, group] / self.counts[group])[:, None]
            seen[..., 1] = own - self.last[:, group, None]
        if here:
            seen[..., 2] = own * self.levels[:, here].mean(axis=1)[:, None]
        seen[..., 3] = i / genes - 0.5
        seen[..., 4] = np.arange(walker.most)[None, :] == self.state[:, i, None]
        seen[..., 5] = own * (self.aims[:, None] + 0.5)
        seen[..., 6] = self.aims[:, None] + 0.5
        if values is None:
            return
        walks = np.arange(len(self.state))
        loss, latency = values[0], self._mean(values)
        now = latency[walks, self.state[:, i], None]
        lost = (loss - loss[walks, self.state[:, i], None]) / self.unit[:, :1]
        slow = (latency - now) / self.unit[:, 1:]
        far = self.unit[:, 1:] * math.sqrt(genes)
        tight = np.tanh((now - self.aims[:, None]) / far)
        seen[..., 7] = low = np.arcsinh(lost)
        seen[..., 8] = fast = np.arcsinh(slow)
        seen[..., 9] = np.arcsinh(lost + slow)
        seen[..., 10] = fast * tight
        seen[..., 11] = low * tight
        seen[..., 12] = np.tanh((latency - self.aims[:, None]) / far)
        seen[..., 13] = np.tanh(self._missed(values) / self.unit[:, 1:])
        seen[..., 14] = tight
        seen[..., 15] = np.tanh(-0.2 * self.reach[:, i + 1, None] / far)
        seen[..., 16] = np.arcsinh(lost - lost.min(axis=1, keepdims=True))
        seen[..., 17] = 1.0

    def _end(self) -> tuple[Array, Array, Array]:
        if not self.guesses:
            nothing = np.zeros(len(self.state))
            return nothing, nothing, nothing
        values = np.stack([guess.value(guess.near, guess.flat) for guess in self.guesses])
        return values[0], self._mean(values), self._missed(values)


def _fixed(space: Space, sites: Sequence[Site], level: Array) -> Array:
    """(genes, most, features): what the site is like, which op it is and how far each choice goes."""
    known = {site.name: site for site in sites}
    most = max((site.macs for site in sites), default=0)
    kinds = len(OPS) + 1
    found = np.zeros((*level.shape, SITE + 2 * kinds))
    for i, gene in enumerate(space.genes):
        found[i, :, :SITE] = _about(known.get(gene.site), most)
        kind = _kind(gene)
        found[i, 1:, SITE + kind] = 1.0
        found[i, :, SITE + kinds + kind] = level[i]
    return found


def _about(site: Site | None, most: int) -> list[float]:
    if site is None:
        return [0.0] * SITE
    return [
        1.0,
        math.log1p(site.parameters) / 6 - 1.5,
        site.macs / max(1, most),
        site.kernel / 5 - 0.5,
        math.log1p(site.in_channels) / 3 - 1.3,
        math.log1p(site.out_channels) / 3 - 1.3,
        2 * site.depth - 1,
    ]


def _kind(gene: Gene) -> int:
    if gene.kind == "arch":
        return OPS.index("arch")
    return OPS.index(gene.op) if gene.op in OPS else len(OPS)
