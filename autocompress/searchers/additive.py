"""What a probe lets expect of whole candidates: its single choices put together, for many genotypes at once.

Gains are put together as time is spent. The network is cut into places (a block, or a layer outside of any); each has a
time in floats and one in integers. What an op gains at a place is a share of that place's time, so several ops there
shrink it one after another and never add up to more than there is; a dropped block leaves nothing for what is inside.
Each change of number type between neighbouring places costs a border. Divergences add up, per kind of question: what
training wins back differs from op to op, so whoever fits them to trials does so per group.

It steers, it is never a result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from autocompress import space as sp
from autocompress.types import Choice, Facts, Gene, Genotype, Probed, Site, Space

Floats = NDArray[np.float64]
REST = 0.01  # share of the baseline's latency that belongs to no place
SIZE = "(size)"
"""Named like a device: the size of the file, whose parts add up as time does, without borders."""
LEAST, MOST = 0.02, 3.0  # factors on a place's time are kept between these
TYPICAL_INTEGERS = 0.45  # time of a place in integers, where nothing was measured, as a share
NEAREST, NEAR = 9, 0.15  # so many places, and within so much of the logarithm of its time, tell a place's pace
NEARLY_FREE = 0.1  # of a typical cut's divergence: what integers are taken to cost where nobody looked


def groups(space: Space) -> tuple[tuple[int, ...], ...]:
    """Indices of genes that ask the same question at many sites; each architecture knob is a group of its own."""
    found: dict[tuple[str, str], list[int]] = {}
    for i, gene in enumerate(space.genes):
        key = ("", gene.name) if gene.kind == "arch" else (gene.op, gene.param)
        found.setdefault(key, []).append(i)
    return tuple(tuple(members) for members in found.values())


def columns(space: Space) -> tuple[tuple[int, int], ...]:
    """(gene, choice) of each choice that is not a gene's first, in order: the columns of `encoded`."""
    return tuple((i, c) for i, gene in enumerate(space.genes) for c in range(1, len(gene.choices)))


def encoded(space: Space, genotypes: NDArray[np.int64]) -> Floats:
    """One column per choice but the first ones, 1 where it was taken; `genotypes` are (n, genes), canonical."""
    cells = np.asarray(columns(space), dtype=np.int64).reshape(-1, 2)
    return (genotypes[:, cells[:, 0]] == cells[:, 1]).astype(np.float64)


@dataclass(frozen=True, eq=False)
class Device:
    """One profile's share of the model; times are ratios to the baseline's latency, for SIZE to the file's size."""

    profile: str
    floats: Floats  # (places,) time of each
    integers: Floats
    typed: Floats  # (columns, places) share of a place's time that a choice turns into integers
    shrink: Floats  # (columns, places) logarithm of the factor that a choice puts on a place's time, among floats
    shrink_integers: Floats
    whole: Floats  # (columns,) the same on the whole network, for architecture knobs
    border: float
    rest: float = REST  # share that belongs to no place


@dataclass(frozen=True, eq=False)
class Additive:
    """Latency ratios and divergences of canonical genotypes, as the probe's single choices let expect them."""

    space: Space
    places: tuple[str, ...]  # paths, from input to output
    at: tuple[tuple[int, ...], ...]  # per gene the places that it touches
    recipe: tuple[int, ...]  # genes that the probe has nothing to say of: how candidates are trained
    divergence: Floats  # (columns,) nats
    group: NDArray[np.int64]  # (columns,) number of the group that a choice belongs to
    gone: Floats  # (columns, places) 1 where the choice leaves nothing of the place
    typed: Floats  # (columns, places) 1 where the choice makes integers of layers there
    devices: tuple[Device, ...]

    def costs(self, rows: Floats) -> Floats:
        """(n, groups) nats by group, of encoded genotypes."""
        size = int(self.group.max(initial=-1)) + 1
        return (rows * self.divergence) @ np.eye(size)[self.group]

    def ratios(self, rows: Floats) -> Floats:
        """(n, devices) latency (for SIZE the size) as ratios to the baseline's, of encoded genotypes."""
        gone, typed = rows @ self.gone > 0, rows @ self.typed > 0
        found = np.zeros((len(rows), len(self.devices)))
        changes = np.zeros(len(rows))
        before = np.zeros(len(rows), dtype=bool)
        for place in range(len(self.places)):
            changes += (typed[:, place] != before) & ~gone[:, place]
            before = np.where(gone[:, place], before, typed[:, place])
        for d, device in enumerate(self.devices):
            floats = device.floats * np.exp(rows @ device.shrink)
            integers = device.integers * np.exp(rows @ device.shrink_integers)
            part = np.minimum(rows @ device.typed, 1.0)
            spent = np.where(gone, 0.0, (1.0 - part) * floats + part * integers).sum(axis=1)
            found[:, d] = np.exp(rows @ device.whole) * (device.rest + spent) + device.border * changes
        return np.maximum(found, 1e-4)


def additive(space: Space, facts: Facts) -> Additive | None:
    """The model that a probe's table gives; None where the facts hold no gain of any choice of the space."""
    known = {(one.gene, isinstance(one.choice, bool), one.choice): one for one in facts.probe}
    cells = columns(space)
    found = [_of(space.genes[i], c, known) for i, c in cells]
    profiles = tuple(dict.fromkeys(name for one in found if one for name in (*one.ms, *one.best_ms)))
    total = {name: facts.baseline[name].ms.value for name in profiles if name in facts.baseline}
    if not total:
        return None
    if any(one is not None and one.smaller is not None for one in found):
        total[SIZE] = 1.0
    named = {one.gene for one in facts.probe}
    recipe = tuple(i for i, gene in enumerate(space.genes) if gene.name not in named)
    places = _places(space, facts.sites)
    reach: dict[str, set[str]] = {}
    for one in facts.probe:
        reach.setdefault(one.gene, set()).update(one.reach)
    at = tuple(
        _touched(gene, places, reach.get(gene.name, ())) if i not in recipe else ()
        for i, gene in enumerate(space.genes)
    )
    group = np.zeros(len(cells), dtype=np.int64)
    for number, members in enumerate(groups(space)):
        group[[j for j, (i, _) in enumerate(cells) if i in members]] = number
    gone = _gone(space, cells, places, at)
    typed = np.zeros_like(gone)
    for j, (i, c) in enumerate(cells):
        if (space.genes[i].op, space.genes[i].choices[c]) == ("quantize", "int8"):
            typed[j, list(at[i])] = 1.0
    table = _Table(
        space, cells, tuple(found), at, gone, typed, places, facts.sites,
        _shares(places, facts.sites, "macs"), _shares(places, facts.sites, "parameters"), _alike(places, facts.sites),
    )  # fmt: skip
    devices = tuple(table.settled(table.device(name, total[name]), facts.integers.get(name)) for name in total)
    return Additive(space, places, at, recipe, _divergences(space, cells, found, recipe), group, gone, typed, devices)


def _of(gene: Gene, choice: int, known: dict[tuple[str, bool, Choice], Probed]) -> Probed | None:
    value = gene.choices[choice]
    return known.get((gene.name, isinstance(value, bool), value))


# --- places -------------------------------------------------------------------------------------------------------


def _within(inner: str, outer: str) -> bool:
    return outer == "." or f"{inner}.".startswith(f"{outer}.")


def _places(space: Space, sites: Sequence[Site]) -> tuple[str, ...]:
    """Outermost blocks and the layers outside of them, in order of depth; without sites, the genes' own."""
    if not sites:
        asked = tuple(dict.fromkeys(gene.site for gene in space.genes if gene.site not in ("", ".")))
        return tuple(one for one in asked if not any(_within(other, one) for other in asked if other != one))
    blocks = [site.name for site in sites if site.kind == "block"]
    outer = [one for one in blocks if not any(_within(one, other) for other in blocks if other != one)]
    layers = [site.name for site in sites if site.kind != "block" and not any(_within(site.name, b) for b in outer)]
    # a module that stands for several layers is no layer
    layers = [one for one in layers if not any(_within(other, one) for other in layers if other != one)]
    depth = {path: min(s.depth for s in sites if _within(s.name, path)) for path in (*outer, *layers)}
    return tuple(sorted(depth, key=lambda path: (depth[path], path)))


def _touched(gene: Gene, places: Sequence[str], reach: Iterable[str]) -> tuple[int, ...]:
    """Places that a policy gene acts on, and those of layers that it reaches; none for an architecture knob."""
    if gene.kind == "arch":
        return ()
    paths = (gene.site, *reach)
    return tuple(u for u, place in enumerate(places) if any(_within(place, p) or _within(p, place) for p in paths))


def _shares(places: Sequence[str], sites: Sequence[Site], what: Literal["macs", "parameters"]) -> Floats:
    """Of the multiply-adds or weights of all places; equal ones where nobody counted."""
    counts = np.zeros(len(places))
    for u, path in enumerate(places):
        inside = [getattr(s, what) for s in sites if s.kind != "block" and _within(s.name, path)]
        counts[u] = sum(inside) or sum(getattr(s, what) for s in sites if s.name == path)
    counts = counts if counts.sum() > 0 else np.ones(len(places))
    return counts / max(counts.sum(), 1e-12)


def _alike(places: Sequence[str], sites: Sequence[Site]) -> NDArray[np.int64]:
    """(places,) a number that places of equal layers share, whatever their sizes."""
    kinds = [
        tuple(sorted((s.kind, s.kernel) for s in sites if s.kind != "block" and _within(s.name, path)))
        for path in places
    ]
    known = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    return np.array([known[kind] for kind in kinds], dtype=np.int64)


def _gone(space: Space, cells: Sequence[tuple[int, int]], places: Sequence[str], at: Sequence[Sequence[int]]) -> Floats:
    """Places of which a choice leaves nothing: a dropped block, or all whose questions an architecture takes away."""
    found = np.zeros((len(cells), len(places)))
    knobs = sp.knobs(space)
    asked: list[list[int]] = [[i for i in range(len(at)) if u in at[i] and len(at[i]) == 1] for u in range(len(places))]
    for j, (i, c) in enumerate(cells):
        gene = space.genes[i]
        if gene.kind == "arch":
            barred = [any(other == i and c not in allowed for other, allowed in knob.needs) for knob in knobs]
            found[j] = [bool(inside) and all(barred[k] for k in inside) for inside in asked]
        elif (gene.op, gene.choices[c]) == ("block", "drop"):
            found[j] = [_within(path, gene.site) for path in places]
    return found


# --- time ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Table:
    """The probe's records beside the places that they speak of."""

    space: Space
    cells: Sequence[tuple[int, int]]
    found: Sequence[Probed | None]
    at: Sequence[Sequence[int]]
    gone: Floats
    typed: Floats
    places: Sequence[str]
    sites: Sequence[Site]
    macs: Floats  # (places,) shares
    weights: Floats
    alike: NDArray[np.int64]  # (places,) equal for equal layers

    def device(self, profile: str, total: float) -> Device:
        """One profile's times, as ratios to `total` milliseconds."""
        share = self.weights if profile == SIZE else self.macs
        alone = self.gains(profile, total, share, best=False)
        best = self.gains(profile, total, share, best=True)
        floats = self.times(alone, share)
        typed = self.parts("parameters" if profile == SIZE else "macs")
        integers = self.integers(floats, typed, alone, best)
        border = self.border(alone, best)
        rest = 0.0 if profile == SIZE else REST
        scale = (1.0 - rest) / max(floats.sum(), 1e-9)  # the probe knows layers, a network also adds and copies
        arch = np.array([self.space.genes[i].kind == "arch" for i, _ in self.cells], dtype=bool)
        left = 1.0 - self.gone @ (floats * scale)
        whole = np.where(arch, np.log(np.clip((1.0 - np.nan_to_num(alone)) / np.clip(left, LEAST, 1), LEAST, MOST)), 0)
        shrink = self.factors(floats, alone)
        gained = np.where(np.isnan(best), np.nan, best)
        return Device(
            profile=profile,
            floats=floats * scale,
            integers=integers * scale,
            typed=typed,
            shrink=shrink,
            shrink_integers=np.where(np.isnan(gained)[:, None], shrink, self.factors(integers, gained)),
            whole=whole,
            border=border,
            rest=rest,
        )

    def settled(self, device: Device, ratio: float | None) -> Device:
        """The same with its integers in proportion to what the network takes with all of them, if that is known.

        The pieces were looked at one by one; what the network takes between them is not divided like their times.
        """
        if ratio is None:
            return device
        part = np.minimum((self.typed.sum(axis=1) > 0) @ device.typed, 1.0)
        spent = float(part @ device.integers)
        left = ratio - device.rest - device.border * bool(spent) - float((1.0 - part) @ device.floats)
        if spent <= 0 or left <= 0:
            return device
        return replace(device, integers=device.integers * min(max(left / spent, 1 / MOST), MOST))

    def gains(self, profile: str, total: float, share: Floats, *, best: bool) -> Floats:
        """(columns,) share of the baseline's latency; where it was not tried that of its like, NaN if none was."""
        rows = [{} if one is None else _gained(one, best=best) for one in self.found]
        found = np.array([row.get(profile, np.nan) / total for row in rows], dtype=np.float64)
        kinds: dict[tuple[object, ...], list[int]] = {}
        for j, (i, c) in enumerate(self.cells):
            gene = self.space.genes[i]
            if gene.kind == "policy" and gene.op != "quantize":
                kinds.setdefault((gene.op, gene.param, gene.choices[c]), []).append(j)
        touched = np.array([max(share[list(self.at[i])].sum(), 1e-9) for i, _ in self.cells])
        for members in kinds.values():
            tried = [j for j in members if not np.isnan(found[j])]
            rate = float(np.median(found[tried] / touched[tried])) if tried else np.nan
            for j in members:
                found[j] = rate * touched[j] if np.isnan(found[j]) else found[j]
        return found

    def times(self, alone: Floats, share: Floats) -> Floats:
        """(places,) in floats: what dropping it gains, else its `share`; never less than what a choice gains."""
        found = np.full(len(share), np.nan)
        most = np.zeros(len(share))
        for j, (i, _) in enumerate(self.cells):
            if self.space.genes[i].kind == "arch" or len(self.at[i]) != 1 or np.isnan(alone[j]):
                continue
            place = self.at[i][0]
            if self.gone[j, place]:
                found[place] = alone[j]
            most[place] = max(most[place], alone[j])
        seen = ~np.isnan(found)
        pace = found[seen].sum() / max(share[seen].sum(), 1e-9) if seen.any() else 1.0 - REST
        return np.where(seen, np.maximum(found, most), np.maximum(pace * share, 1.05 * most))

    def parts(self, what: Literal["macs", "parameters"]) -> Floats:
        """(columns, places) `typed`, where several questions share a place by what their layers have of it."""
        found = self.typed.copy()
        for u, path in enumerate(self.places):
            columns: list[int] = np.flatnonzero(self.typed[:, u]).tolist()
            asked = {self.space.genes[self.cells[j][0]].site for j in columns}
            inner = sorted(site for site in asked if _within(site, path) and site != path)
            if not inner:
                continue
            sizes = {
                site: sum(getattr(s, what) for s in self.sites if s.kind != "block" and _within(s.name, site))
                for site in inner
            }
            whole = sum(sizes.values())
            for j in columns:
                site = self.space.genes[self.cells[j][0]].site
                if site in sizes:
                    found[j, u] = sizes[site] / whole if whole else 1.0 / len(inner)
        return found

    def integers(self, floats: Floats, typed: Floats, alone: Floats, best: Floats) -> Floats:
        """(places,) in integers: by what dropping gains there, and by what integers gained, alone and undone."""
        rates: list[list[float]] = [[] for _ in floats]
        gained, told_of = np.zeros(len(floats)), np.zeros(len(floats))
        for j, (i, _) in enumerate(self.cells):
            if len(self.at[i]) != 1:
                continue
            place = self.at[i][0]
            if self.gone[j, place] and best[j] > 0 and alone[j] > 0:
                rates[place].append(best[j] / alone[j])
            elif self.typed[j, place]:
                told = [gain for gain in (alone[j], best[j]) if not np.isnan(gain)]
                if told:
                    gained[place] += float(np.mean(told))  # borders cancel where both are known
                    told_of[place] += typed[j, place]
        for place in np.flatnonzero(told_of > 0).tolist():
            if not rates[place]:  # alone, integers have borders; what dropping gains has none
                rates[place] = [1.0 - gained[place] / told_of[place] / floats[place]]
        for j, (i, _) in enumerate(self.cells):  # one question for many places
            told = [gain for gain in (alone[j], best[j]) if not np.isnan(gain)]
            if self.typed[j].sum() > 1 and told and len(self.at[i]) > 1:
                inside = list(self.at[i])
                for place in inside:
                    rates[place] = rates[place] or [1.0 - float(np.mean(told)) / floats[inside].sum()]
        return floats * np.clip(
            self.pooled(np.array([np.mean(one) if one else np.nan for one in rates]), floats), 0.1, MOST
        )

    def pooled(self, rates: Floats, times: Floats) -> Floats:
        """(places,) rates with less noise: a place's own beside the median of NEAREST places of the same layers."""
        known = np.flatnonzero(~np.isnan(rates))
        usual = float(np.median(rates[known])) if len(known) else TYPICAL_INTEGERS
        found = np.full(len(rates), usual)
        logs = np.log(np.maximum(times, 1e-9))
        for place in range(len(rates)):
            like = known[self.alike[known] == self.alike[place]]
            if len(like):
                away = np.abs(logs[like] - logs[place])
                near = like[np.argsort(away, kind="stable")[:NEAREST]]
                near = near[np.abs(logs[near] - logs[place]) <= max(NEAR, away.min())]
                others = float(np.median(rates[near]))
                found[place] = others if np.isnan(rates[place]) else (others + rates[place]) / 2
        return found

    def border(self, alone: Floats, best: Floats) -> float:
        """What a change of number type costs: alone an integer place has two, undone among integers it saves two.

        Where integers pay alone nobody asked what undoing them costs: their borders are next to nothing.
        """
        tried = (self.typed.sum(axis=1) > 0) & ~np.isnan(alone)
        both = tried & ~np.isnan(best)
        return max(0.0, float(np.median((best - alone)[both]) / 4)) * both.sum() / tried.sum() if both.any() else 0.0

    def factors(self, times: Floats, gained: Floats) -> Floats:
        """(columns, places) logarithms of what structural choices leave of the places they touch."""
        found = np.zeros((len(self.cells), len(times)))
        for j, (i, _) in enumerate(self.cells):
            inside = list(self.at[i])
            if inside and not np.isnan(gained[j]) and not self.typed[j].any() and not self.gone[j].any():
                left = 1.0 - gained[j] / max(times[inside].sum(), 1e-9)
                found[j, inside] = math.log(min(max(left, LEAST), MOST))
        return found


def _gained(one: Probed, *, best: bool) -> dict[str, float]:
    """Milliseconds by profile and the share of the size; a file's bytes do not ask what is beside them."""
    if best:
        return one.best_ms if one.best_smaller is None else {**one.best_ms, SIZE: one.best_smaller}
    return one.ms if one.smaller is None else {**one.ms, SIZE: one.smaller}


# --- divergence ---------------------------------------------------------------------------------------------------


def _divergences(
    space: Space, cells: Sequence[tuple[int, int]], found: Sequence[Probed | None], recipe: Sequence[int]
) -> Floats:
    """(columns,) nats; where nobody looked, what is usual for the same choice elsewhere, for its op, for any cut."""
    kl = np.array([np.nan if one is None or one.kl is None else max(one.kl, 1e-6) for one in found])
    by_choice: dict[tuple[object, ...], list[float]] = {}
    by_op: dict[str, list[float]] = {}
    for j, (i, c) in enumerate(cells):
        if not np.isnan(kl[j]):
            gene = space.genes[i]
            by_choice.setdefault((gene.op, gene.param, gene.choices[c]), []).append(float(kl[j]))
            by_op.setdefault(gene.op, []).append(float(kl[j]))
    cuts = [one for op, values in by_op.items() if op not in ("", "quantize") for one in values]
    usual = float(np.median(cuts or [one for values in by_op.values() for one in values] or [0.05]))
    for j, (i, c) in enumerate(cells):
        gene = space.genes[i]
        if i in recipe:
            kl[j] = 0.0
        elif np.isnan(kl[j]):
            like = by_choice.get((gene.op, gene.param, gene.choices[c])) or by_op.get(gene.op)
            kl[j] = np.median(like) if like else usual * (NEARLY_FREE if gene.op == "quantize" else 1.0)
    return kl


def rows(space: Space, genotypes: Sequence[Genotype]) -> Floats:
    """`encoded` of tuples."""
    return encoded(space, np.asarray(genotypes, dtype=np.int64).reshape(len(genotypes), len(space.genes)))
