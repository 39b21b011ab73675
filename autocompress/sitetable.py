"""What a network consists of, as `autocompress space` prints it: sites, shapes, work, time, ops (floor F5)."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import thop
import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from autocompress import export
from autocompress.devices.profiler import Times, site_latency
from autocompress.models import Builder
from autocompress.models.trace import count, examples, still
from autocompress.space import cardinality
from autocompress.tasks import InputSpec, several
from autocompress.types import Profile, Site, Space, TrialFailure
from autocompress.wording import DASH, TIMES

CODES = {
    "block": "B",
    "replace": "R",
    "prune": "P",
    "lowrank": "L",
    "sparsify": "S",
    "qat": "T",
    "quantize": "Q",
    "store": "C",
}
"""One letter per op in the table."""
WIDE = 104  # columns from which all is shown
ALONE, MATTERS = 3, 0.01  # layers left alone that are named, and the share of parameters from which they are
GAP, LEAST = 2, 12  # columns between columns, and at least for names


@dataclass(frozen=True)
class Line:
    """One site; a block's time is that of the layers in it."""

    site: Site
    inputs: tuple[int, ...] = ()  # of one example; empty for what is not called with a tensor
    outputs: tuple[int, ...] = ()
    thop: int | None = None  # multiply-adds
    ms: float | None = None


@dataclass(frozen=True)
class Figures:
    """A network's sites and totals. Multiply-adds are those of one example, `ms` of one run of `batch` examples."""

    lines: tuple[Line, ...]
    parameters: int
    macs: int  # by torch's FlopCounterMode
    thop: int
    times: Times | None = None
    alone: tuple[tuple[str, str, int], ...] = ()  # layers that no op acts on: name, type, parameters

    def share(self, line: Line) -> float | None:
        """Of the measured latency."""
        return None if line.ms is None or self.times is None else line.ms / self.times.total


def figures(builder: Builder, spec: InputSpec, profile: Profile | None = None, *, opset: int = 17) -> Figures:
    """Trace the parent; with a profile, export it and see where onnxruntime spends its time on this machine.

    Raises UserError if the network cannot run on `spec`, TrialFailure if it cannot be exported.
    """
    sites = in_order(builder.sites())
    with torch.random.fork_rng(devices=[]):
        module = builder.build({})
    seen = _shapes(module, examples(spec), [site.name for site in sites])
    thop_macs, layers = _by_thop(module, spec)
    times = None
    if profile is not None:
        part = _exported(module, spec, opset).parts[0]
        times = site_latency(part.model, part.nodes, profile.threads, batch=profile.batch)
    lines: list[Line] = []
    for site in sites:
        inside = "" if site.name == "." else f"{site.name}."
        ms = sum(ms for name, ms in times.sites.items() if f"{name}.".startswith(inside)) if times else None
        lines.append(Line(site, *seen.get(site.name, ((), ())), thop=layers.get(site.name), ms=ms))
    macs, parameters = count(module, examples(spec))
    alone = tuple(one for one in _alone(module, [site.name for site in sites]) if one[2] >= MATTERS * parameters)
    return Figures(tuple(lines), parameters, macs, thop_macs, times, alone)


def _alone(module: nn.Module, sites: Sequence[str]) -> tuple[tuple[str, str, int], ...]:
    """Name, type and parameters of what has weights of two axes or more and is no site, largest first."""
    found: list[tuple[str, str, int]] = []
    for name, part in module.named_modules():
        own = list(part.parameters(recurse=False))
        if any(one.ndim > 1 for one in own) and (name or ".") not in sites:
            found.append((name or ".", type(part).__name__, sum(one.numel() for one in own)))
    return tuple(sorted(found, key=lambda one: -one[2]))


def _exported(module: nn.Module, spec: InputSpec, opset: int) -> export.Exported:
    """By the first exporter that can. Raises TrialFailure with the first one's reason if none can."""
    first: TrialFailure | None = None
    for exporter in export.EXPORTERS:
        try:
            return export.export(module, spec, opset=opset, exporter=exporter)
        except TrialFailure as failure:
            first = first or failure
    raise first or TrialFailure("no exporter was asked")


def in_order(sites: Sequence[Site]) -> list[Site]:
    """Layers from input to output, each block before the first layer in it."""
    layers = [site for site in sites if site.kind != "block"]
    found: list[Site] = []
    waiting = sorted((site for site in sites if site.kind == "block"), key=lambda site: len(site.name))
    for layer in layers:
        for block in [block for block in waiting if layer.name.startswith(f"{block.name}.")]:
            waiting.remove(block)
            found.append(block)
        found.append(layer)
    return [*found, *waiting]


_Sizes = tuple[int, ...]


def _shapes(module: nn.Module, inputs: tuple[Tensor, ...], names: Sequence[str]) -> dict[str, tuple[_Sizes, _Sizes]]:
    """Shapes of what goes into modules and comes out, of one example, at their first call."""
    found: dict[str, tuple[_Sizes, _Sizes]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(part: nn.Module, given: tuple[Any, ...], answer: Any) -> None:  # noqa: ARG001
            answer = answer[0] if isinstance(answer, tuple | list) and answer else answer
            if given and isinstance(given[0], Tensor) and isinstance(answer, Tensor):
                found.setdefault(name, (tuple(given[0].shape[1:]), tuple(answer.shape[1:])))

        return hook

    hooks = [module.get_submodule("" if name == "." else name).register_forward_hook(note(name)) for name in names]
    try:
        with still(module):
            module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _by_thop(module: nn.Module, spec: InputSpec) -> tuple[int, dict[str, int]]:
    """thop's multiply-adds: of the network, and by layer."""
    copied = copy.deepcopy(module)  # thop leaves buffers behind
    with torch.no_grad():
        found: Any = thop.profile(copied, inputs=several(examples(spec)), verbose=False, ret_layer_info=True)
    layers: dict[str, int] = {}

    def walk(prefix: str, inner: Mapping[str, Any]) -> None:
        for name, (macs, _, deeper) in inner.items():
            path = f"{prefix}.{name}" if prefix else name
            layers[path] = round(macs)
            walk(path, deeper)

    walk("", found[2])
    return round(found[0]), layers


# --- the table ----------------------------------------------------------------------------------------------------


def show(found: Figures, width: int, title: str, space: Space | None = None) -> RenderableType:
    """The table for a terminal of `width` columns, totals and the space's size under it."""
    wide = width >= WIDE
    layers = [line.site for line in found.lines if line.site.kind != "block" and line.site.macs]
    shared = [op for op in CODES if layers and all(op in site.ops for site in layers)]
    heads = ["kind", "in \u2192 out" if wide else "out", "params", "MACs", *(["thop"] if wide else [])]
    heads += [*(["time"] if found.times is not None else []), "ops"]
    rows = [_cells(found, line, wide, shared) for line in found.lines]
    others = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    room = max(width - sum(others) - GAP * len(others), LEAST)
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("site", no_wrap=True, max_width=room)
    for head in heads:
        right = head in ("params", "MACs", "thop", "time")
        table.add_column(head, justify="right" if right else "left", no_wrap=True, overflow="ellipsis")
    for line, cells in zip(found.lines, rows, strict=True):
        table.add_row(shorten(line.site.name, room), *cells, style="bold" if line.site.kind == "block" else None)
    return Group(Text(title, style="bold"), Text(), table, Text(), *_below(found, shared, space))


def _cells(found: Figures, line: Line, wide: bool, shared: Sequence[str]) -> list[str]:
    site, share = line.site, found.share(line)
    cells = [kind(site), shapes(line) if wide else shape(line.outputs), short(site.parameters), short(site.macs)]
    if wide:
        cells.append(DASH if line.thop is None else short(line.thop))
    if found.times is not None:
        cells.append(DASH if share is None else f"{100 * share:.1f} %")
    return [*cells, letters(site, shared)]


def _below(found: Figures, shared: Sequence[str], space: Space | None) -> list[RenderableType]:
    layers = [line for line in found.lines if line.site.kind != "block"]
    macs = f"{short(found.macs)} MACs by torch, {short(found.thop)} by thop"
    said = [f"{len(layers)} layers, {short(found.parameters)} parameters, {macs}"]
    if found.times is not None:
        rest = found.times.rest / found.times.total
        said.append(f"{found.times.total:.3g} ms a run here, {100 * rest:.0f} % of it outside these layers")
    if found.alone:
        named = [f"{name} ({kind}, {short(number)} parameters)" for name, kind, number in found.alone[:ALONE]]
        more = f" and {len(found.alone) - ALONE} more" if len(found.alone) > ALONE else ""
        said.append(f"left alone, no op acts on its kind: {', '.join(named)}{more}")
    some = [op for op in CODES if op not in shared and any(op in line.site.ops for line in found.lines)]
    if some:
        said.append("ops: " + ", ".join(f"{CODES[op]} {op}" for op in some))
    if shared:
        said.append(f"at every convolution and linear layer: {', '.join(shared)}")
    if space is not None:
        said.append(summary(space))
    return [Text(line) for line in said]


def summary(space: Space) -> str:
    """One line: how many genes of what, and how many candidates they make."""
    asked = Counter(gene.op or "arch" for gene in space.genes)
    size = cardinality(space)
    many = f"{size}" if size < 10**6 else f"10^{len(str(size)) - 1}"
    return f"space {space.name}: {len(space.genes)} genes ({_listed(asked)}), about {many} candidates"


def _listed(asked: Mapping[str, int]) -> str:
    return ", ".join(f"{op} {number}" for op, number in asked.items())


def kind(site: Site) -> str:
    """Kind and kernel: `conv 3x3`, `linear`."""
    return f"{site.kind} {site.kernel}{TIMES}{site.kernel}" if site.kernel > 1 else site.kind


def shapes(line: Line) -> str:
    """What goes in and comes out."""
    return f"{shape(line.inputs)} \u2192 {shape(line.outputs)}" if line.inputs else DASH


def shape(sizes: Sequence[int]) -> str:
    """Channels and sides, a square as its side squared."""
    if len(sizes) == 3 and sizes[1] == sizes[2]:
        return f"{sizes[0]}{TIMES}{sizes[1]}\u00b2" if sizes[1] > 1 else str(sizes[0])
    return TIMES.join(map(str, sizes)) or DASH


def letters(site: Site, shared: Sequence[str] = ()) -> str:
    """The ops that can act, one letter each; not those that can act at every layer."""
    return "".join(code for op, code in CODES.items() if op in site.ops and op not in shared)


def short(number: float) -> str:
    """At most five characters: `864`, `2.36k`, `118M`."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * unit:
            value = number / unit
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{value:.{digits}f}{letter}"
    return f"{number:.0f}"


def shorten(name: str, room: int) -> str:
    """A long name without its middle: the end says most."""
    if len(name) <= room:
        return name
    head = max((room - 1) // 3, 1)
    return f"{name[:head]}\u2026{name[-(room - 1 - head) :]}"
