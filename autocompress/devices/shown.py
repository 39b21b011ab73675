"""A survey, a check and a list of devices as the terminal shows them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from autocompress.devices.adding import Fact
from autocompress.devices.findings import Finding, Survey
from autocompress.devices.smallnets import INTEGERS, TYPICAL
from autocompress.devices.survey import FORMS, NAMES, NARROW, RANKS
from autocompress.types import Profile
from autocompress.wording import DASH

STYLES = {"pays": "green", "costs": "red", "even": "", "undecided": "yellow", "refused": "dim"}
SIGNS = {"pays": ("+", "green", "What pays"), "costs": ("-", "red", "What does not"), "setting": ("=", "", "Settings")}


def show(survey: Survey, path: Path | None = None) -> RenderableType:
    """Facts, the table of types, the table of ranks, and what to do about it."""
    parts: list[RenderableType] = [_head(survey), Padding(_types(survey), (1, 0, 0, 0))]
    if any(one.about == "ranks" for one in survey.findings):
        parts.append(Padding(_ranks(survey), (1, 0, 0, 0)))
    for sign, (mark, style, title) in SIGNS.items():
        some = [one.text for one in survey.advice if one.sign == sign]
        if some:
            parts.append(Text(f"\n{title}", style="bold"))
            rows = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
            for text in some:
                rows.add_row(Text(mark, style=style), Text(text))
            parts.append(rows)
    name = survey.profile.name
    written = f"\n{path} is written; a job takes it by `devices: [{{profile: {name}, speedup: 2}}]`" if path else ""
    parts.append(Text(f"{written}\n{survey.seconds:.0f} s, fingerprint {survey.profile.fingerprint}", style="dim"))
    return Group(*parts)


def _head(survey: Survey) -> RenderableType:
    profile, facts, found = survey.profile, survey.facts, survey.profile.measured
    memory = facts.get("memory_gib")
    runtime = f"onnxruntime {facts.get('onnxruntime', 'unknown')}, {profile.provider}"
    clock = f"{facts['max_mhz']} MHz" if facts.get("max_mhz") else "frequency not told"
    governor = f"governor {facts['governor']}" if facts.get("governor") else "governor not told"
    rows = (
        ("device", f"{profile.about}{f', {memory} GiB' if memory else ''}"),
        ("runtime", runtime),
        (
            "clock",
            f"{clock}, {governor}; steps of {found['clock_ns']:g} ns; an empty run takes {found['empty_run_us']} us",
        ),
        ("noise", f"{found['noise']}; drift {found['drift_pct']:+g} %"),
    )
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for what, said in rows:
        table.add_row(Text(what, style="bold"), Text(said))
    return table


def _cell(finding: Finding | None) -> Text:
    if finding is None:
        return Text(DASH, style="dim")
    if finding.ratio is None:
        return Text("does not run", style="dim")
    return Text(f"{finding.ratio.value:.2f}", style=STYLES[finding.verdict])


def _types(survey: Survey) -> RenderableType:
    by_name = {one.what: one for one in survey.findings if one.about == "types"}
    table = Table(
        title="Time against float32, less is faster", box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False
    )
    table.add_column("")
    kinds = (*INTEGERS, *NARROW)
    for kind in kinds:
        table.add_column(NAMES.get(kind, kind), justify="right")
    for graph in TYPICAL:
        table.add_row(graph, *(_cell(by_name.get(f"{NAMES.get(kind, kind)}, {graph}")) for kind in kinds))
    return table


def _ranks(survey: Survey) -> RenderableType:
    by_name = {one.what: one for one in survey.findings if one.about == "ranks"}
    table = Table(
        title="Time of two factors against the layer, by share of the full rank",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
    )
    table.add_column("")
    for share in RANKS:
        table.add_column(f"{share:g}", justify="right")
    labels = {"linear": "linear", "1x1": "1x1 convolution"}
    for form in FORMS:
        for name in ("float32", *NAMES.values()):
            row = [by_name.get(f"{name} {form} by factors of {share:g} of the rank") for share in RANKS]
            if any(row):
                table.add_row(f"{labels[form]}, {name}", *map(_cell, row))
    return table


def fact(one: Fact) -> Text:
    """`ok  runtime  onnxruntime 1.31.1`."""
    return Text.assemble(
        ("ok  " if one.ok else "NO  ", "green" if one.ok else "bold red"), f"{one.what:<10} {one.said}"
    )


def listed(profiles: Iterable[tuple[Profile, Path]]) -> RenderableType:
    """A user's devices: how they are reached, what they are, when they were surveyed."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("name", "reached by"):
        table.add_column(column, overflow="fold")
    table.add_column("what", ratio=1)
    for column in ("fingerprint", "surveyed"):
        table.add_column(column, no_wrap=True)
    folders: dict[str, list[str]] = {}
    for one, path in profiles:
        where = one.reach.ssh or one.reach.adb or one.reach.resource
        way = f"{one.device} {where}".strip()
        table.add_row(one.name, way, one.about, one.fingerprint or DASH, str(one.measured.get("surveyed", DASH)))
        folders.setdefault(_short(path), []).append(one.name)
    lines = [
        f"{', '.join(names)} in {folder}" if len(folders) > 1 else f"in {folder}" for folder, names in folders.items()
    ]
    return Group(table, Text("\n".join(lines), style="dim"))


def _short(path: Path) -> str:
    """The folder, `~` for the home."""
    folder = path.resolve().parent
    return f"~/{folder.relative_to(Path.home())}" if folder.is_relative_to(Path.home()) else str(folder)
