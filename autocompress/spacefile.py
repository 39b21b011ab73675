"""A space back into its file: the rows that `load.space` reads as the same genes (floor F1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import yaml

from autocompress import reader
from autocompress.load import Knob, Row, SpaceFile, among, holder
from autocompress.types import Choice, Gene, Site, Space


def of(space: Space, builder: str, about: str = "", *, sites: Sequence[Site] = ()) -> SpaceFile:
    """The file of a space: an arch row per knob, a policy row per run of genes that ask the same at several sites.

    Read again for the same network it gives equal genes in the same order, as long as arch genes come first. With the
    network's `sites`, conditions that these bring along are left out.
    """
    knobs = {gene.name: gene.choices for gene in space.genes if gene.kind == "arch"}

    def question(gene: Gene) -> _Question:
        place = next((site for site in sites if site.name == gene.site), None) or holder(gene.site, sites, gene.op)
        brought = {key: among(knobs.get(key, ()), values) for key, values in (place.when if place else {}).items()}
        return _question(gene, {key: values for key, values in gene.when.items() if brought.get(key) != values})

    arch = {gene.name: Knob(choices=gene.choices, when=gene.when) for gene in space.genes if gene.kind == "arch"}
    rows: list[Row] = []
    for (op, param, choices, when), run in groupby((g for g in space.genes if g.kind == "policy"), key=question):
        places = tuple(gene.site for gene in run)
        values = {key: tuple(value for _, value in found) for key, found in when}
        rows.append(Row(sites=places, op=op, param=param, choices=tuple(c for _, c in choices), when=values))
    return SpaceFile(name=space.name, about=about, builder=builder, arch=arch, policy=tuple(rows), always=space.always)


_Typed = tuple[tuple[bool, Choice], ...]
_Question = tuple[str, str, _Typed, tuple[tuple[str, _Typed], ...]]


def _question(gene: Gene, when: Mapping[str, tuple[Choice, ...]]) -> _Question:
    """What a gene asks apart from its site; a condition on the same site is written without naming it."""
    here = f"@{gene.site}"
    conditions = tuple((key.removesuffix(here), _typed(values)) for key, values in when.items())
    return gene.op, gene.param, _typed(gene.choices), conditions


def _typed(values: tuple[Choice, ...]) -> _Typed:
    return tuple((isinstance(value, bool), value) for value in values)  # for Python, True == 1


def text(file: SpaceFile) -> str:
    """YAML that a person can edit; sites in full, as globs would say more than was found."""
    lines = [f"name: {flow(file.name)}"]
    lines += [f"about: {flow(file.about)}"] if file.about else []
    lines += [f"builder: {flow(file.builder)}"]
    if file.arch:
        lines += ["", "arch:  # the first choice is the network's own"]
    for name, knob in file.arch.items():
        value = {"choices": list(knob.choices), "when": _lists(knob.when)} if knob.when else list(knob.choices)
        lines.append(f"  {flow(name)}: {flow(value)}")
    if file.policy:
        lines += ["", "policy:  # the first choice leaves a site alone; a module's name stands for all sites under it"]
    last = ""
    for row in file.policy:
        lines += [""] if last and last != row.op else []
        lines += _row(row)
        last = row.op
    if file.always:
        lines += ["", "always:  # rules of every candidate"]
    for rule in file.always:
        lines += [f"  - {flow({'op': rule.op, 'site': rule.site, 'settings': dict(rule.settings)})}"]
    return "\n".join(lines) + "\n"


def _row(row: Row) -> list[str]:
    """One line, or one per key where the sites are many."""
    value = {"op": row.op, "param": row.param, "choices": list(row.choices)}
    value |= {"when": _lists(row.when)} if row.when else {}
    value["sites"] = row.sites[0] if len(row.sites) == 1 else list(row.sites)
    whole = flow(value)
    if "\n" not in whole:
        return [f"  - {whole}"]
    first, *others = (f"{key}: {flow(part)}" for key, part in value.items())
    return [f"  - {first}", *(f"    {other}" for other in others)]


def _lists(when: dict[str, tuple[Choice, ...]]) -> dict[str, Any]:
    return {key: values[0] if len(values) == 1 else list(values) for key, values in when.items()}


def flow(value: object) -> str:
    """A value as YAML on one line, or on few."""
    dumped = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=96, allow_unicode=True)
    return dumped.removesuffix("...\n").removesuffix("\n").replace("\n", "\n     ")


class _Dumper(yaml.SafeDumper):
    """Quotes what our reader, or another one, would take for something else than text."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002
        return True  # the reader knows no anchors


for _tag, _pattern, _first in reader.SCALARS:
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)
