"""What a changed network would take on this machine, without exporting it (floor F5). It steers, it is never a result.

The unmodified network's own file says what each site takes, in floats and in integers; a table of single layers says
in what proportion a changed layer differs from it. So narrow layers that run no faster are seen as such.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from autocompress.devices.layers import Layer, Table
from autocompress.devices.profiler import Times, ratio, site_latency
from autocompress.export import Exported, compose
from autocompress.types import Numeric, Profile, Reading

TIMING_S = 0.15  # per pair of files


@dataclass(frozen=True)
class Used:
    """A layer as one forward pass uses it."""

    name: str
    layer: Layer
    times: int = 1  # calls, and examples that the network itself makes of one (windows)

    @property
    def macs(self) -> int:
        """Multiply-adds per example."""
        return self.times * self.weights * (prod(self.layer.output) // self.layer.weight[0])

    @property
    def weights(self) -> int:
        """Numbers that it multiplies by."""
        return prod(self.layer.weight)


def run(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, tuple[Used, ...]]:
    """Outputs of one pass in evaluation mode, and the convolutions and linear layers it used."""
    size = len(inputs[0])
    used: list[Used] = []

    def note(name: str) -> Any:
        def hook(part: nn.Module, given: tuple[Any, ...], answer: Any) -> None:  # noqa: ARG001
            if given and isinstance(given[0], Tensor):
                used.append(_used(name, part, given[0], size))

        return hook

    hooks = [
        part.register_forward_hook(note(name))
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) or _is_plain(part)
    ]
    module.eval()
    try:
        with torch.no_grad():
            outputs = module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs, tuple(used)


def _is_plain(part: nn.Module) -> bool:
    """A convolution that is not transposed."""
    return isinstance(part, _ConvNd) and not part.transposed


def _used(name: str, part: nn.Module, x: Tensor, size: int) -> Used:
    if _is_plain(part):
        assert isinstance(part, _ConvNd)
        given = part.padding
        padding = tuple(
            (given[n] if not isinstance(given, str) else part.dilation[n] * (k - 1) // 2 if given == "same" else 0)
            for n, k in enumerate(part.kernel_size)
        )
        weight = tuple(part.weight.shape)
        layer = Layer(tuple(x.shape[1:]), weight, part.stride, padding, part.dilation, part.groups)
        return Used(name, layer, max(x.shape[0] // size, 1))
    assert isinstance(part, nn.Linear)
    rows = max(prod(x.shape[:-1]) // size, 1)
    return Used(name, Layer((rows, x.shape[-1]) if rows > 1 else (x.shape[-1],), tuple(part.weight.shape)))


class Proportions:
    """Predicts from the unmodified network's times, of its float file and of the one whose sites are all integers."""

    def __init__(
        self, parent: Sequence[Used], table: Table, numeric: Numeric, floats: Times, integers: Times | None
    ) -> None:
        self.parent, self.table, self.numeric = tuple(parent), table, numeric
        self.times: Mapping[bool, Times] = {False: floats} | ({True: integers} if integers else {})
        self.names = {one.name for one in parent}

    def learn(self, used: Iterable[Used]) -> None:
        """Measure the layers that are new."""
        layers = [one.layer for one in (*self.parent, *used)]
        self.table.learn(layers)
        if True in self.times:
            self.table.learn(layers, self.numeric)

    def gained(self, used: Sequence[Used], *, integers: bool) -> float | None:
        """Milliseconds less than the unmodified network takes; None without a file of integers."""
        if integers not in self.times:
            return None
        before, after = (self._sites(those, integers) for those in (self.parent, used))
        times = self.times[integers].sites
        spent = sum(before.values())
        usual = sum(times.get(site, 0.0) for site in before) / spent if spent else 1.0
        gained = 0.0
        for site in {*before, *after}:
            pace = times[site] / before[site] if before.get(site) and site in times else usual
            gained += pace * (before.get(site, 0.0) - after.get(site, 0.0))
        return gained

    def _sites(self, used: Iterable[Used], integers: bool) -> dict[str, float]:
        """What the table says by site; parts of a split layer count for it, other new layers for themselves."""
        numeric = self.numeric if integers else None
        known = [(self.table.ms(one.layer, numeric), one) for one in self.parent]
        macs = sum(one.macs for ms, one in known if ms is not None)
        pace = sum(one.times * ms for ms, one in known if ms is not None) / macs if macs else 0.0
        found: defaultdict[str, float] = defaultdict(float)
        for one in used:
            ms = self.table.ms(one.layer, numeric)  # a layer that could not be measured counts by its multiply-adds
            found[self._owner(one.name)] += pace * one.macs if ms is None else one.times * ms
        return found

    def _owner(self, name: str) -> str:
        atoms = name.split(".")
        paths = (".".join(atoms[:length]) for length in range(len(atoms), 0, -1))
        return next((path for path in paths if path in self.names), name)


@dataclass(frozen=True)
class Target:
    """Profiles whose files and times on this machine are the same."""

    profile: Profile  # the first of them
    proportions: Proportions
    floats: bytes = field(repr=False)
    scale: Mapping[str, float]  # milliseconds of the baseline on the device, by profile

    @property
    def names(self) -> tuple[str, ...]:
        """The profiles."""
        return tuple(self.scale)

    @property
    def total(self) -> float:
        """Milliseconds of the float file on this machine."""
        return self.proportions.times[False].total

    @property
    def integers_total(self) -> float:
        """Milliseconds of the file whose sites are all integers, the float file's where there is none."""
        return self.proportions.times.get(True, self.proportions.times[False]).total

    def ratio(self, model: bytes, reference: bytes) -> float:
        """Latency of a file over another's on this machine."""
        if model == reference:
            return 1.0
        return ratio(model, reference, self.profile.threads, batch=self.profile.batch, seconds=TIMING_S)


def targets(
    profiles: Sequence[Profile],
    exported: Exported,
    parent: Sequence[Used],
    integers: Callable[[Profile], bytes] | None,
    readings: Mapping[str, Reading],
) -> tuple[Target, ...]:
    """Profile the unmodified network's float file, and its integer file where there is one."""
    found: dict[tuple[object, ...], list[Profile]] = {}
    for profile in profiles:
        found.setdefault((profile.numeric.variant, profile.threads, profile.batch), []).append(profile)
    floats, nodes = compose(exported), exported.parts[0].nodes
    made: list[Target] = []
    for like in found.values():
        first = like[0]
        times = site_latency(floats, nodes, first.threads, batch=first.batch)
        of_integers = None
        if integers is not None:
            with suppress(Exception):  # a network that cannot be all integers, of which the probe says why
                of_integers = site_latency(integers(first), nodes, first.threads, batch=first.batch)
        table = Table(first.threads, first.batch)
        proportions = Proportions(parent, table, first.numeric, times, of_integers)
        scale = {one.name: readings[one.name].ms.value if one.name in readings else times.total for one in like}
        made.append(Target(first, proportions, floats, scale))
    return tuple(made)
