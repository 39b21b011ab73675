"""Channels that go while a network trains: groups as records, and silencing units in place before they are cut.

A silenced unit has zeros wherever it stands in a parameter: nothing makes it and nothing reads it, so that cutting it
out changes nothing, except where a normalisation counts it among its channels (`heard` finds those).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.models.coupling import Coupling, Plan
from autocompress.models.groups import Group, Ints, Member
from autocompress.models.labels import Place
from autocompress.models.proof import EXACT, SAME, lively
from autocompress.models.slicing import Cut, apply, find
from autocompress.types import Record

Kept = Mapping[Group, Sequence[int]]
ROUNDING = 0.05
"""Largest relative difference that single precision may have in a network of very many layers."""
COUNTED = "the network counts silent channels too, as a normalisation over channels does"


class Axis(Record):
    """An axis of a parameter or buffer; `units` is the number of the list that says which unit each position is of."""

    tensor: str
    axis: int
    groups: int = 1
    made: bool = False
    units: int

    @property
    def place(self) -> Place:
        """As groups name it."""
        return Place(self.tensor, self.axis, self.groups)


class Strand(Record):
    """A group: its units by their number in the network, its axes by their number in the sketch."""

    root: str
    units: tuple[int, ...]
    cells: tuple[tuple[int, ...], ...]
    axes: tuple[int, ...]


class Tally(Record):
    """An attribute of a module that holds how many of some units there are, times something."""

    module: str
    attribute: str
    units: int
    times: int = 1


class Sketch(Record):
    """Groups of a network, and all that cutting them takes: no trace is needed any more."""

    lists: tuple[tuple[int, ...], ...]
    axes: tuple[Axis, ...]
    strands: tuple[Strand, ...]
    tallies: tuple[Tally, ...] = ()

    def groups(self) -> tuple[Group, ...]:
        """As they were sketched, units labelled by their numbers in the network."""
        return tuple(map(self._group, self.strands))

    def _group(self, strand: Strand) -> Group:
        own = np.asarray(strand.units, dtype=np.int64)
        local = np.full(max(map(max, self.lists), default=0) + 1, -1, dtype=np.int64)
        local[own] = np.arange(len(own))
        members: list[Member] = []
        for axis in (self.axes[number] for number in strand.axes):
            units = local[np.asarray(self.lists[axis.units], dtype=np.int64)]
            positions = np.flatnonzero(units >= 0)
            members.append(Member(axis.place, positions, units[positions], axis.made))
        cells = tuple(np.asarray(cell, dtype=np.int64) for cell in strand.cells)
        return Group(strand.root, len(own), tuple(members), cells, torch.from_numpy(own))


def sketch(plan: Plan, groups: Sequence[Group]) -> Sketch:
    """Groups of a network from which `plan` has cut others already."""
    lists: dict[tuple[int, ...], int] = {}
    axes: dict[Place, tuple[int, Axis]] = {}
    strands: list[Strand] = []
    touched = np.zeros_like(plan.gone)
    for group in groups:
        own = plan.units(group)
        touched[own] = True
        for member in group.members:
            if member.place not in axes:
                units = lists.setdefault(tuple(plan.standing(member.place).tolist()), len(lists))
                tensor, axis, parts = member.place
                axes[member.place] = (
                    len(axes),
                    Axis(tensor=tensor, axis=axis, groups=parts, made=member.made, units=units),
                )
        strands.append(
            Strand(
                root=group.root,
                units=tuple(own.tolist()),
                cells=tuple(tuple(cell.tolist()) for cell in group.cells),
                axes=tuple(axes[member.place][0] for member in group.members),
            )
        )
    tallies: list[Tally] = []
    for (module, attribute), (counted, times) in plan.attributes.items():
        if touched[counted].any():
            units = lists.setdefault(tuple(counted[~plan.gone[counted]].tolist()), len(lists))
            tallies.append(Tally(module=module, attribute=attribute, units=units, times=times))
    return Sketch(
        lists=tuple(lists),
        axes=tuple(axis for _, axis in axes.values()),
        strands=tuple(strands),
        tallies=tuple(tallies),
    )


def replan(sketches: Sequence[Sketch]) -> Plan:
    """Nothing cut yet of a network, parts of which were sketched at the same time."""
    size = max((max(units, default=0) for one in sketches for units in one.lists), default=0) + 1
    places = {axis.place: _array(one, axis.units) for one in sketches for axis in one.axes}
    tallies = {
        (tally.module, tally.attribute): (_array(one, tally.units), tally.times)
        for one in sketches
        for tally in one.tallies
    }
    return Plan(np.arange(size), places, tallies)


def _array(of: Sketch, number: int) -> Ints:
    return np.asarray(of.lists[number], dtype=np.int64)


@torch.no_grad()
def silence(module: nn.Module, groups: Iterable[tuple[Group, Ints]]) -> None:
    """Set to zero, in place, all that some units of each group are in the module's parameters."""
    for group, units in groups:
        if not len(units):
            continue
        gone = np.zeros(group.size, dtype=bool)
        gone[units] = True
        for member in group.members:
            tensor = find(module, member.place.tensor)
            if not isinstance(tensor, nn.Parameter):
                continue  # running statistics of what is zero do not matter
            positions = torch.from_numpy(member.positions[gone[member.units]]).to(tensor.device)
            if member.place.groups > 1:  # each group of a convolution reads channels of its own
                width, rows = tensor.shape[1], tensor.shape[0] // member.place.groups
                first = positions // width * rows
                tensor[first[:, None] + torch.arange(rows, device=tensor.device), (positions % width)[:, None]] = 0
            else:
                tensor.index_fill_(member.place.axis, positions, 0)


def heard(module: nn.Module, coupling: Coupling, kept: Kept, inputs: tuple[Tensor, ...]) -> dict[Group, str]:
    """The groups whose units beyond `kept` the rest still notices where they are silent, and why.

    These cannot go little by little: what trains with them silent is not the network that is left without them.
    """
    bad = {group: COUNTED for group in kept if any(_counts(module, member.place.layer) for member in group.members)}
    waiting = [[group for group in kept if group not in bad]]
    while waiting:  # by halves, until those that fail stand alone
        groups = waiting.pop()
        if not groups or _alike(module, coupling, {group: kept[group] for group in groups}, inputs):
            continue
        if len(groups) == 1:
            bad[groups[0]] = COUNTED
        else:
            half = len(groups) // 2
            waiting += [groups[half:], groups[:half]]
    return bad


def _counts(module: nn.Module, layer: str) -> bool:
    """Known without trying: a normalisation over channels."""
    return isinstance(module.get_submodule(layer), nn.LayerNorm | nn.GroupNorm | nn.RMSNorm)


def _alike(module: nn.Module, coupling: Coupling, kept: Kept, inputs: tuple[Tensor, ...]) -> bool:
    """Whether units cut are as units silent; double precision decides where single precision does not."""
    try:
        error = _apart(module, coupling, kept, inputs)
        if error <= SAME or error > ROUNDING:
            return error <= SAME
        exact = tuple(one.double() if one.is_floating_point() else one for one in inputs)
        return _apart(copy.deepcopy(module).double(), coupling, kept, exact) <= EXACT
    except Exception:  # noqa: BLE001  a stranger's network may take only all together, or single precision
        return False


@torch.no_grad()
def _apart(module: nn.Module, coupling: Coupling, kept: Kept, inputs: tuple[Tensor, ...]) -> float:
    """Largest difference between units cut and units silent, relative to the largest output."""
    network = lively(copy.deepcopy(module))
    silence(network, ((group, group.rest(left)) for group, left in kept.items()))
    expected = _floats(network(*inputs))
    facts = coupling.plan().facts(kept)
    apply(network, [Cut.model_validate(one) for one in facts["cuts"]], facts.get("attributes", {}))
    found = _floats(network(*inputs))
    if [one.shape for one in expected] != [one.shape for one in found]:
        return math.inf
    pairs = [(one, other) for one, other in zip(expected, found, strict=True) if one.numel()]
    errors = [float((one - other).abs().max() / one.abs().max().clamp_min(1e-30)) for one, other in pairs]
    return max((error if math.isfinite(error) else math.inf for error in errors), default=0.0)


def _floats(outputs: object) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, Mapping):
        outputs = tuple(outputs.values())
    return [one for part in outputs for one in _floats(part)] if isinstance(outputs, list | tuple) else []
