"""What the probe found, site by choice, as a picture: quality lost, and milliseconds gained per device (floor F5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autocompress.types import Choice, Facts, Gene, Probed, Space

CELL, ROW = 26, 14
LABEL, GAP, HEAD, TOP = 150, 30, 74, 24
FAINT, KL_LOW, KL_HIGH = 0.06, 1e-3, 1.0  # divergences are drawn between these, by their logarithm
SHORT = {"prune": "prune", "lowrank": "rank", "sparsify": "sparse", "quantize": ""}
"""What stands before a choice that does not speak for itself."""


@dataclass(frozen=True)
class Cell:
    """One choice at one site; two of them share a place where both backgrounds are drawn."""

    x: float
    y: float
    width: float
    kind: str  # lost | gain | slow | none
    strength: float  # opacity, 0 to 1
    title: str


@dataclass(frozen=True)
class Head:
    """Above a column, or before a row."""

    at: float
    label: str


@dataclass(frozen=True)
class Sheet:
    """One measure of all sites and choices."""

    title: str
    x: float
    columns: tuple[Head, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class HeatMap:
    """Sheets side by side, with the same rows."""

    width: float
    height: float
    head: float
    rows: tuple[Head, ...]
    sheets: tuple[Sheet, ...]
    about: str


def heatmap(facts: Facts, space: Space) -> HeatMap | None:
    """Rows are sites from input to output, columns the choices asked there; None where nothing was probed."""
    found = [(one, _asked(one, space)) for one in facts.probe]
    if not any(one.ms or one.best_ms for one, _ in found):
        return None
    asked = {row for _, (row, _) in found}
    inside = {row: [s.depth for s in facts.sites if f"{s.name}.".startswith(f"{row}.")] for row in asked}
    places = sorted(asked, key=lambda row: (min(inside[row], default=-1.0), row))
    columns = list(dict.fromkeys(column for _, (_, column) in sorted(found, key=lambda entry: _order(entry[1][1]))))
    at = {row: TOP + HEAD + ROW * n for n, row in enumerate(places)}
    profiles = tuple(dict.fromkeys(name for one, _ in found for name in (*one.ms, *one.best_ms)))
    wide = CELL * len(columns)
    sheets: list[Sheet] = []
    for n, name in enumerate(("", *profiles)):
        left = LABEL + n * (wide + GAP)
        across = {column: left + CELL * i for i, column in enumerate(columns)}
        most = max((abs(ms) for one, _ in found for ms in (one.ms.get(name), one.best_ms.get(name)) if ms), default=1.0)
        cells: list[Cell] = []
        for one, (row, column) in found:
            x, y = across[column], at[row]
            cells += _quality(one, x, y) if not name else _times(one, name, x, y, most)
        heads = tuple(Head(across[column] + CELL / 2, column) for column in columns)
        sheets.append(Sheet("quality lost" if not name else f"milliseconds gained, {name}", left, heads, tuple(cells)))
    rows = tuple(Head(at[row], row) for row in places)
    width = LABEL + len(sheets) * wide + (len(sheets) - 1) * GAP + 10
    return HeatMap(width, TOP + HEAD + ROW * len(places) + 6, TOP + HEAD - 6, rows, tuple(sheets), _about(facts.probe))


def _asked(one: Probed, space: Space) -> tuple[str, str]:
    """(row, column) of a choice: its site and what is done there; an architecture's knob and value are a row."""
    gene = next((gene for gene in space.genes if gene.name == one.gene), None) or _read(one.gene)
    if gene.kind == "arch":
        return f"{gene.name} {_said(one.choice)}", "whole"
    word = SHORT.get(gene.op)
    choice = _said(one.choice)
    if gene.param == "weights":
        return gene.site, f"weights {choice}"
    if isinstance(one.choice, str) and not word:
        return gene.site, choice
    return gene.site, f"{word or gene.op} {choice}"


def _read(name: str) -> Gene:
    """A gene that left the space, by its name in derived spaces."""
    what, _, site = name.partition("@")
    op, _, param = what.partition(".")
    if not site:
        return Gene(name=name, kind="arch", choices=(0,))
    return Gene(name=name, kind="policy", choices=(0,), site=site, op=op, param=param)


def _said(choice: Choice) -> str:
    if isinstance(choice, bool):
        return str(choice).lower()
    return f"{choice:g}" if isinstance(choice, float) else str(choice)


def _order(column: str) -> tuple[int, str]:
    """Structure before numbers, the whole network first."""
    first = {"whole": 0, "drop": 1, "merge": 2}
    return (first.get(column, 8 if any(kind in column for kind in ("int8", "int4", "float")) else 5), column)


def _title(one: Probed) -> str:
    lines = [f"{one.gene} = {_said(one.choice)}"]
    if one.kl is not None:
        lines.append(f"divergence alone {one.kl:.3g} nats")
    if one.best_kl is not None:
        lines.append(f"divergence beside the others' best {one.best_kl:.3g} nats")
    for name in dict.fromkeys((*one.ms, *one.best_ms)):
        alone, best = one.ms.get(name), one.best_ms.get(name)
        both = ((alone, "among floats"), (best, "among integers"))
        said = [f"{ms:+.4f} ms {where}" for ms, where in both if ms is not None]
        lines.append(f"gained on {name}: {', '.join(said)}")
    if not one.kept:
        lines.append(f"left the space: {one.why}" if one.why else "left the space")
    elif one.why:
        lines.append(one.why)
    return "\n".join(lines)


def _quality(one: Probed, x: float, y: float) -> list[Cell]:
    if one.kl is None:
        return [Cell(x, y, CELL - 2, "none", 1.0, _title(one))]
    share = math.log(max(one.kl, KL_LOW) / KL_LOW) / math.log(KL_HIGH / KL_LOW)
    return [Cell(x, y, CELL - 2, "lost", round(max(FAINT, min(1.0, share)), 3), _title(one))]


def _times(one: Probed, profile: str, x: float, y: float, most: float) -> list[Cell]:
    """Left half among floats, right half among integers; the root of the milliseconds, so that small ones are seen."""
    found: list[Cell] = []
    for half, ms in enumerate((one.ms.get(profile), one.best_ms.get(profile))):
        place, width = x + half * (CELL / 2 - 1), CELL / 2 - 1
        if ms is None:
            found.append(Cell(place, y, width, "none", 1.0, _title(one)))
            continue
        strength = round(max(FAINT, math.sqrt(abs(ms) / max(most, 1e-12))), 3)
        found.append(Cell(place, y, width, "gain" if ms > 0 else "slow", strength, _title(one)))
    return found


def _about(probe: Sequence[Probed]) -> str:
    tried = sum(bool(one.ms or one.best_ms) for one in probe)
    judged = sum(one.kl is not None for one in probe)
    gone = sum(not one.kept for one in probe)
    return (
        f"{tried} of {len(probe)} choices were timed, the quality of {judged} was looked at; "
        f"{gone} left the space because they pay in neither background"
    )
