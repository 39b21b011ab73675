"""A winner's policy as a picture: every layer of the unmodified network and what is left of it, left to right."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from autocompress.artifact import PolicyFile
from autocompress.types import Candidate, Choice, Site
from autocompress.wording import asks, describe

UNSEEN = {"quantize", "store", "qat", "distill"}
"""Ops that change no layer's shape; what type it computes with is drawn from its bits."""


@dataclass(frozen=True)
class Layer:
    """One layer of the unmodified network as the winner has it."""

    x: float
    full: float  # height of the unmodified layer
    kept: float  # height of what is left, 0 when dropped
    kind: str
    bits: str  # as the op quantize names them
    fill: str  # class of the fill: float, int8, packed, int8-dynamic, int4, half, or none where nothing was done
    rank: str
    form: str  # what took its place: separable ..., merged; else empty
    zeros: str  # of its weights: 50 %, 2:4; else empty
    marks: str  # the three in words, for the label
    title: str
    label: str
    dropped: bool


@dataclass(frozen=True)
class Stage:
    """A run of neighbouring layers with a common prefix; a block that was merged or has a gate; dropped blocks."""

    x: float
    width: float
    label: str


@dataclass(frozen=True)
class Network:
    """A policy as a picture, layers from left to right."""

    width: int
    height: int
    middle: float
    bar: float
    foot: float  # where the labels of layers begin, which hang from there
    layers: tuple[Layer, ...]
    stages: tuple[Stage, ...]
    blocks: tuple[Stage, ...]
    exits: tuple[Stage, ...]  # behind which layers samples may leave, and how many do
    knobs: str
    dropped: int
    int8: int
    factored: int
    pruned: int
    replaced: int
    zeros: int
    fills: tuple[tuple[str, str, int], ...]  # class, words, layers
    kinds: tuple[str, ...]


FILLS = {"float16": "half", "bfloat16": "half"}
PACKED = "int8, weights in 4 bits"
COPY = "little"  # site of the exit of a smaller copy that answers first
_BEFORE = 36.0  # pixels of room for it, left of the first layer
_ROOM = 1054.0  # the page's width in pixels, without margins and _SIDE on either side
_SIDE = 30.0
_GLYPH = 6.0  # pixels that a letter of a label takes


def network(policy: PolicyFile, shapes: Mapping[str, Sequence[int]]) -> Network:
    """The winner's layers. `shapes` are the shipped weights' (name -> shape): what is left is read there."""
    sites = [site for site in policy.sites if site.kind != "block"]
    prefixes = _prefixes([site.name for site in sites])
    breaks = sum(one != other for one, other in pairwise(prefixes))
    gap = 14.0 if breaks * 14.0 < _ROOM / 3 else 6.0
    before = _BEFORE * any(site == COPY for _, site, _ in _routes(policy))
    # as wide as the page, scrolling where labels would touch
    pitch = (_ROOM - before - breaks * gap) / max(len(sites), 1)
    bar = round(min(max(pitch / 1.4, 9.5), 40.0), 1)
    tallest = max((site.out_channels for site in sites), default=1) or 1
    middle, most = 100.0, 150.0
    skipped = {
        (receipt.op, entry.site)
        for receipt in (*policy.receipts, *(r for those in policy.numeric.values() for r in those))
        for entry in receipt.entries
        if entry.status == "skipped"
    }
    layers: list[Layer] = []
    x = _SIDE + before
    for index, site in enumerate(sites):
        x += gap if index and prefixes[index] != prefixes[index - 1] else 0.0
        layers.append(_layer(site, policy, shapes, skipped, round(x, 1), most * math.sqrt(site.out_channels / tallest)))
        x += round(bar * 1.4, 1)
    alive = [layer for layer in layers if not layer.dropped]
    foot = middle + most / 2 + 10
    longest = max((len(layer.label) + len(layer.marks) + 2 * bool(layer.marks) for layer in layers), default=0)
    words = {"none": "not touched", "packed": PACKED}
    counted = Counter((layer.fill, words.get(layer.fill, layer.bits)) for layer in alive)
    return Network(
        width=round(x + _SIDE),
        height=round(foot + longest * _GLYPH + 34),
        middle=middle,
        bar=bar,
        foot=foot,
        layers=tuple(layers),
        stages=tuple(_stages(prefixes, layers, bar, gap)),
        blocks=tuple(_blocks(policy, sites, layers, skipped, bar)),
        exits=tuple(_exits(policy, sites, layers, bar)),
        knobs=describe(Candidate(arch=policy.arch, policy=policy.policy), policy.parent_arch),
        dropped=len(layers) - len(alive),
        int8=sum(layer.bits == "int8" for layer in alive),
        factored=sum(bool(layer.rank) for layer in alive),
        pruned=sum(layer.kept < layer.full - 0.5 for layer in alive),
        replaced=sum(bool(layer.form) for layer in alive),
        zeros=sum(bool(layer.zeros) for layer in alive),
        fills=tuple((fill, bits, count) for (fill, bits), count in counted.most_common()),
        kinds=tuple(dict.fromkeys(layer.kind for layer in layers)),
    )


def _layer(
    site: Site,
    policy: PolicyFile,
    shapes: Mapping[str, Sequence[int]],
    skipped: set[tuple[str, str]],
    x: float,
    height: float,
) -> Layer:
    holding = [
        rule
        for rule in policy.policy.rules
        if (rule.site in (".", site.name) or site.name.startswith(rule.site + "."))
        and (rule.op, rule.site) not in skipped
        and (rule.op, site.name) not in skipped
    ]
    settings: dict[str, dict[str, Choice]] = {}
    for rule in sorted(holding, key=lambda rule: len(rule.site) if rule.site != "." else 0):
        settings[rule.op] = {**settings.get(rule.op, {}), **rule.settings}
    settings = {op: those for op, those in settings.items() if asks(op, those)}
    left = _channels(site, policy, shapes, settings)
    dropped = left == 0
    bits = str(settings.get("quantize", {}).get("bits", "float"))
    rank = settings.get("lowrank", {}).get("rank")
    share = f"{rank:g}" if isinstance(rank, float) else "" if rank is None else str(rank)
    merged = settings.get("block", {}).get("kind") == "merge"
    form = "merged" if merged else str(settings.get("replace", {}).get("kind", ""))
    zeros = _zeros(settings.get("sparsify", {}))
    words = [
        site.name,
        f"{site.kind}, {site.in_channels} to {site.out_channels} channels"
        + (f", kernel {site.kernel}" if site.kernel > 1 else ""),
        ("merged into its block's other layers" if merged else "dropped")
        if dropped
        else f"{left} of {site.out_channels} output channels left",
    ]
    words += [
        f"{op}: {', '.join(f'{key} {value}' for key, value in those.items())}"
        for op, those in settings.items()
        if not dropped and op not in ("qat", "distill")
    ]
    full = max(height, 5.0)  # by the square root, so that narrow layers of wide networks can be seen
    kept = 0.0 if dropped else max(min(left, site.out_channels) / max(site.out_channels, 1) * full, 3.0)
    packed = bits == "int8" and settings["quantize"].get("weights") == "int4"
    same = left >= site.out_channels and bits == "float" and not settings.keys() - UNSEEN
    marks = [f"rank {share}" if share else "", form, f"{zeros} zeros" if zeros else ""]
    return Layer(
        x=x,
        full=round(full, 1),
        kept=round(kept, 1),
        kind=site.kind,
        bits=bits,
        fill="none" if same else "packed" if packed else FILLS.get(bits, bits),
        rank="" if dropped else share,
        form="" if dropped else form,
        zeros="" if dropped else zeros,
        marks="" if dropped else ", ".join(mark for mark in marks if mark),
        title="\n".join(words),
        label=_label(site.name),
        dropped=dropped,
    )


def _zeros(settings: Mapping[str, Choice]) -> str:
    """`50 %`, or the pattern where there is one: 2:4."""
    pattern, ratio = settings.get("pattern", "unstructured"), settings.get("ratio", 0.0)
    return (
        str(pattern)
        if settings and pattern != "unstructured"
        else f"{float(ratio):.0%}".replace("%", " %")
        if ratio
        else ""
    )


def _channels(
    site: Site, policy: PolicyFile, shapes: Mapping[str, Sequence[int]], settings: Mapping[str, Mapping[str, Choice]]
) -> int:
    """Output channels left: of the last weight at the site or below it (factors and separable blocks are sequences)."""
    if shapes:
        inside = [
            (name, shape)
            for name, shape in shapes.items()
            if len(shape) >= 2 and (name == f"{site.name}.weight" or name.startswith(f"{site.name}."))
        ]
        axis = 1 if site.kind in ("embedding", "transposed") else 0  # their weights are (in, out, ...)
        return int(max(inside, key=lambda entry: _natural(entry[0]))[1][axis]) if inside else 0
    arch = {**policy.parent_arch, **policy.arch}
    if any(name in arch and arch[name] not in allowed for name, allowed in site.when.items()):
        return 0
    if settings.get("block", {}).get("kind") == "drop":
        return 0
    ratio = settings.get("prune", {}).get("ratio", 0.0)
    return round(site.out_channels * (1.0 - (float(ratio) if not isinstance(ratio, str) else 0.0)))


def _blocks(
    policy: PolicyFile, sites: Sequence[Site], layers: Sequence[Layer], skipped: set[tuple[str, str]], bar: float
) -> Iterable[Stage]:
    """Blocks that were merged or have a gate, as far as their layers reach; of dropped ones each run."""
    words = {"drop": "dropped", "merge": "merged"}
    told = {("block", rule.site): words.get(str(rule.settings.get("kind")), "") for rule in policy.policy.rules}
    told |= {(op, site): f"{100 * share:.0f} % run" for op, site, share in _routes(policy) if op == "gate"}
    found: list[tuple[int, int, str]] = []  # first and last layer, what is said
    for (op, name), said in told.items():
        inside = [n for n, site in enumerate(sites) if site.name.startswith(name + ".")]
        if said and inside and (op, name) not in skipped:
            found.append((inside[0], inside[-1], said))
    runs: list[tuple[int, int, str]] = []
    for first, last, said in sorted(found):
        if runs and runs[-1][1:] == (first - 1, words["drop"]) and said == words["drop"]:
            first = runs.pop()[0]  # noqa: PLW2901  one box, one label: theirs would touch
        runs.append((first, last, said))
    for first, last, said in runs:
        yield Stage(layers[first].x, round(layers[last].x + bar - layers[first].x, 1), said)


def _exits(policy: PolicyFile, sites: Sequence[Site], layers: Sequence[Layer], bar: float) -> Iterable[Stage]:
    """Exits, behind the last layer of their block; that of a smaller copy, before all layers."""
    for op, name, share in _routes(policy):
        if name == COPY and layers:
            yield Stage(layers[0].x - 22.0, 0.0, f"{100 * share:.0f} % leave")
        inside = [
            layer
            for site, layer in zip(sites, layers, strict=True)
            if site.name == name or site.name.startswith(name + ".")
        ]
        if op == "exit" and inside:
            yield Stage(round(inside[-1].x + 1.2 * bar, 1), 0.0, f"{100 * share:.0f} % leave")


def _routes(policy: PolicyFile) -> Iterable[tuple[str, str, float]]:
    """Kind (exit or gate), block and share of the samples of each decision, by the first variant's receipts."""
    for receipt in next(iter(policy.numeric.values()), ()):
        for entry in receipt.entries if receipt.op == "route" else ():
            if "threshold" in entry.facts:
                site, _, kind = entry.site.rpartition(".")
                yield kind, site, float(entry.achieved.get("share", 0.0))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _label(name: str) -> str:
    """`conv1` of `stages.0.2.conv1`; `shortcut.0` of `stages.0.2.shortcut.0`, where the last part says nothing."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def _prefixes(names: Sequence[str]) -> list[str]:
    """What a reader would call the stage of each layer: `stages.0` of `stages.0.2.conv1`.

    Deeper where most layers would be one stage: `encoder.layers.3` of `encoder.layers.3.mlp.0`.
    """
    depth, most = 2, max((name.count(".") for name in names), default=0)
    found = [_prefix(name, depth) for name in names]
    while depth < most and max(Counter(found).values()) > max(len(names) / 2, 8):
        depth += 1
        found = [_prefix(name, depth) for name in names]
    return found


def _prefix(name: str, depth: int) -> str:
    """At most `depth` parts, and never the layer's own."""
    parts = name.split(".")
    return ".".join(parts[: min(depth, len(parts) - 1)]) or name


def _stages(prefixes: Sequence[str], layers: Sequence[Layer], bar: float, gap: float) -> Iterable[Stage]:
    for prefix, group in groupby(zip(prefixes, layers, strict=True), key=lambda pair: pair[0]):
        members = [layer for _, layer in group]
        width = round(members[-1].x + bar - members[0].x, 1)
        yield Stage(members[0].x, width, _fitting(prefix, width + 1.5 * gap))


def _fitting(name: str, width: float) -> str:
    """As much of a name as there is room for: all, its last part, the number at its end, or nothing."""
    last = name.rpartition(".")[2]
    number = re.search(r"\d+$", last)
    tries = (name, last, number.group() if number and name != last else "")
    return next((one for one in tries if len(one) * 6.6 <= width), "")
