"""Which channels must go together (after DepGraph, Fang et al. 2023), found by following them through one run.

A *unit* is a channel with everything that belongs to it: rows and columns of weights, entries of norms and of bare
parameters; a whole head of attention. A *group* is a set of units that are alike: those that one layer makes first.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from autocompress.models.heads import attentions
from autocompress.models.labels import Labels, Place
from autocompress.models.slicing import Cut
from autocompress.tasks import several

Ints = NDArray[np.int64]


class Unprunable(Exception):  # noqa: N818  a refusal, not an error
    """Channels that cannot be cut; the message says why."""


@dataclass(frozen=True, eq=False)
class Member:
    """One axis that a group has positions on: position `positions[i]` belongs to unit `units[i]`."""

    place: Place
    positions: Ints
    units: Ints
    made: bool  # outputs of a layer, not what reads or follows them


@dataclass(frozen=True, eq=False)
class Group:
    """Units 0 ... size - 1 in the order of the channels of `root`, the first layer that makes them."""

    root: str
    size: int
    members: tuple[Member, ...]
    cells: tuple[Ints, ...]  # units; every cell must keep the same share
    labels: Tensor  # (size,): a label of each unit

    @property
    def producers(self) -> tuple[str, ...]:
        """Layers whose output channels these are, the root first."""
        return tuple(dict.fromkeys(member.place.layer for member in self.members if member.made))

    @property
    def step(self) -> int:
        """The least number of units that can go or stay at a time: the same share of every cell."""
        sizes = [len(cell) for cell in self.cells]
        return sum(sizes) // math.gcd(*sizes)

    @property
    def width(self) -> int:
        """Channels of the root per unit (heads have many)."""
        return max(1, round(self.channels / self.size))

    @property
    def channels(self) -> int:
        """Channels of the root that these units are."""
        return len(self.members[0].positions)

    def rest(self, kept: Sequence[int]) -> Ints:
        """The units that are not among `kept`."""
        return np.setdiff1d(np.arange(self.size), np.asarray(kept, dtype=np.int64))


def is_depthwise(layer: nn.Module) -> bool:
    """One filter per input channel."""
    return isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels


class Coupling:
    """The groups of a module, found by running it on `example` (one tensor or several); `module` is left as it was.

    What the network's own code raises passes unchanged: the caller knows whose network it is.
    """

    def __init__(self, module: nn.Module, example: Tensor | tuple[Tensor, ...]) -> None:
        self.attentions = attentions(module)
        units = {
            (f"{layer}.{name}", 0): one.units(linear)
            for one in self.attentions
            for layer in one.layers
            if isinstance(linear := module.get_submodule(layer), nn.Linear)
            for name in ("weight", "bias")
        }
        self.trace = Labels(module, units=units)
        _run(self.trace, module, several(example))
        self._assemble()

    def at(self, layer: str) -> tuple[Group, ...]:
        """The groups that a layer's output channels are in.

        Raises:
            Unprunable: it makes none that can be cut; with the reason.
        """
        found = tuple(group for group in self.groups if layer in group.producers)
        if not found:
            raise Unprunable(self.refused.get(layer, "the forward pass does not use it"))
        return found

    def _assemble(self) -> None:
        trace = self.trace
        self.of = _components(trace)  # label -> unit of the whole network
        self.places = {place: self.of[labels.numpy()] for place, labels in trace.places.items()}
        rows = [self.of[rows.numpy()] for rows in trace.equal]
        stuck = _stuck(trace, self.of, rows)
        owner = {int(labels[0]): place for place, labels in trace.places.items()}
        order = list(dict.fromkeys(owner[int(labels[0])] for labels in trace.produced if int(labels[0]) in owner))
        self.groups = tuple(_groups(self.places, order, set(stuck), rows, self.of))
        covered = {producer for group in self.groups for producer in group.producers}
        self.refused: dict[str, str] = {}
        for place in order:
            reasons = [stuck[unit] for unit in self.places[place].tolist() if unit in stuck]
            if place.layer not in covered and reasons:
                self.refused.setdefault(place.layer, reasons[0])

    def mask(self, removed: Mapping[Group, Ints]) -> Tensor:
        """Which labels go, shape (labels,), when the units `removed` of each group go."""
        gone = np.zeros(int(self.of.max()) + 1, dtype=bool)
        for group, units in removed.items():
            gone[self.of[group.labels.numpy()[units]]] = True
        return torch.from_numpy(gone[self.of])

    def plan(self) -> Plan:
        """Nothing cut yet."""
        return Plan(self)


class Plan:
    """Cuts in the making, group after group: positions shift as earlier groups leave the same axes."""

    def __init__(self, coupling: Coupling) -> None:
        self.coupling = coupling
        self.alive: dict[Place, Ints] = {}
        self.removed: dict[Group, Ints] = {}

    def cut(self, group: Group, kept: Sequence[int]) -> tuple[list[Cut], dict[str, dict[str, int]]]:
        """Cuts, and attributes by module, that leave the units `kept` of a group."""
        self.removed[group] = group.rest(kept)
        stays = np.ones(group.size, dtype=bool)
        stays[self.removed[group]] = False
        alike: defaultdict[tuple[int, int, tuple[int, ...]], list[str]] = defaultdict(list)
        for member in group.members:
            place = member.place
            was = self.alive.get(place)
            was = np.arange(len(self.coupling.places[place])) if was is None else was
            left = ~np.isin(was, member.positions[~stays[member.units]])
            self.alive[place] = was[left]
            key = (len(was), place.groups, tuple(np.flatnonzero(left).tolist()))
            alike[key].append(f"{place.tensor}:{place.axis}")
        cuts = [
            Cut(places=tuple(places), was=was, kept=kept, groups=groups)
            for (was, groups, kept), places in alike.items()
        ]
        return cuts, self._attributes(group)

    def _attributes(self, group: Group) -> dict[str, dict[str, int]]:
        """What counts the group's channels on modules that have no tensors to read it from."""
        gone = self.coupling.mask(self.removed)
        concerned = set(self.coupling.of[group.labels.numpy()].tolist())
        found: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for (name, attribute), labels in self.coupling.trace.attributes.items():
            if not concerned.isdisjoint(self.coupling.of[labels.numpy()].tolist()):
                found[name][attribute] = int((~gone[labels]).sum())
        producers = set(group.producers)
        for one in self.coupling.attentions:
            if producers.isdisjoint(one.layers):
                continue
            labels = self.coupling.trace.places[Place(f"{one.layers[0]}.weight", 0)]
            heads = int((~gone[torch.unique(labels)]).sum())
            found[one.name] |= {attribute: heads * each for attribute, each in one.attributes.items()}
        return dict(found)


def _run(trace: Labels, module: nn.Module, example: tuple[Tensor, ...]) -> None:
    """Follow one forward pass in evaluation mode, and one in training mode where that reaches further layers."""
    modes = {part: part.training for part in module.modules()}
    try:
        with torch.no_grad():
            module.eval()
            with trace.watching():
                _close(trace, module(*example))
            if _unreached(trace, module):
                _train(trace, module, example)
    finally:
        for part, training in modes.items():
            part.training = training


def _unreached(trace: Labels, module: nn.Module) -> bool:
    reached = {place.tensor for place in trace.places}
    return any(name not in reached for name, _ in module.named_parameters())


def _train(trace: Labels, module: nn.Module, example: tuple[Tensor, ...]) -> None:
    """Auxiliary heads run only in training; they read the same channels."""
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    module.train()
    try:
        with torch.random.fork_rng(devices=[]), trace.watching():
            _close(trace, module(*(one.repeat(2, *[1] * (one.dim() - 1)) for one in example)))
    except (RuntimeError, ValueError):
        pass  # it cannot be trained on such inputs as it is: nothing to keep in step
    finally:
        for buffer, was in buffers:
            buffer.copy_(was)


def _close(trace: Labels, outputs: Any) -> None:
    """What the network answers keeps its size."""
    if isinstance(outputs, Tensor):
        for labels in trace.axes(outputs).values():
            trace.fix(labels, "its channels are the network's output")
    elif isinstance(outputs, Mapping):
        for one in outputs.values():
            _close(trace, one)
    elif isinstance(outputs, list | tuple):
        for one in outputs:
            _close(trace, one)


def _components(trace: Labels) -> Ints:
    """Units of the whole network by label."""
    pairs = [(one.expand_as(other) if one.numel() == 1 else one, other) for one, other in trace.edges]
    if not pairs:
        return np.arange(trace.count)
    left, right = (torch.cat([pair[side].flatten() for pair in pairs]).numpy() for side in (0, 1))
    both = (left > 0) & (right > 0)
    for nothing, labels in ((left, right), (right, left)):
        if len(lonely := labels[nothing == 0]):
            trace.fix(torch.from_numpy(lonely), "its channels meet padding")
    graph = coo_matrix((np.ones(int(both.sum()), dtype=bool), (left[both], right[both])), shape=(trace.count,) * 2)
    return connected_components(graph, directed=False)[1].astype(np.int64)


def _stuck(trace: Labels, of: Ints, rows: Sequence[Ints]) -> dict[int, str]:
    """Units that must stay, with the first reason."""
    found = {int(of[0]): "its channels meet padding"}
    for labels, why in trace.fixed:
        for unit in np.unique(of[labels.numpy()]).tolist():
            found.setdefault(unit, why)
    while True:  # groups of a convolution stay equally large: where one channel must stay, all must
        size = len(found)
        for table in rows:
            units = np.unique(table).tolist()
            if any(unit in found for unit in units):
                for unit in units:
                    found.setdefault(unit, "channels beside it must stay, and a grouped layer cannot lose some only")
        if len(found) == size:
            return found


def _groups(
    places: Mapping[Place, Ints], order: Sequence[Place], stuck: set[int], rows: Sequence[Ints], of: Ints
) -> list[Group]:
    """Units that are alike, made into groups."""
    index = {place: number for number, place in enumerate(places)}
    units = np.concatenate([*places.values(), np.zeros(0, dtype=np.int64)])
    owners = np.repeat(np.arange(len(places)), [len(one) for one in places.values()])
    pairs, counts = np.unique(np.stack([units, owners]), axis=1, return_counts=True)
    signature: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for unit, owner, count in zip(*pairs.tolist(), counts.tolist(), strict=True):
        if unit not in stuck:
            signature[unit].append((owner, count))
    root: dict[int, int] = {}  # unit -> place that makes it first
    for place in order:
        for unit in places[place].tolist():
            if unit not in stuck:
                root.setdefault(unit, index[place])
    # units of one root go into one group; so do those of roots whose numbers are bound to each other
    bound = {number: number for number in root.values()}

    def head(number: int) -> int:
        while bound[number] != number:
            number = bound[number]
        return number

    tables = [table for table in rows if not stuck.intersection(table.ravel().tolist())]
    for table in tables:
        heads = sorted({head(root[unit]) for unit in table.ravel().tolist() if unit in root})
        for other in heads[1:]:
            bound[other] = heads[0]
    everything: defaultdict[int, list[int]] = defaultdict(list)
    for unit in root:
        everything[head(root[unit])].append(unit)
    standing: defaultdict[int, list[tuple[int, tuple[int, ...]]]] = defaultdict(list)
    for number, table in enumerate(tables):
        for unit in np.unique(table).tolist():
            standing[unit].append((number, tuple((table == unit).sum(1).tolist())))
    names = list(places)
    made = {index[place] for place in order}
    label_of = np.zeros(int(of.max()) + 1, dtype=np.int64)
    label_of[of[::-1]] = np.arange(len(of))[::-1]
    found: list[Group] = []
    for place in order:
        if index[place] in everything:
            mine = everything[index[place]]
            found.append(_group(index[place], mine, signature, standing, places, names, made, label_of))
    return found


def _group(
    root: int,
    units: Sequence[int],
    signature: Mapping[int, list[tuple[int, int]]],
    standing: Mapping[int, list[tuple[int, tuple[int, ...]]]],
    places: Mapping[Place, Ints],
    names: Sequence[Place],
    made: set[int],
    label_of: Ints,
) -> Group:
    number = {unit: at for at, unit in enumerate(units)}
    cells: defaultdict[Any, list[int]] = defaultdict(list)
    for unit, at in number.items():
        cells[tuple(signature[unit]), tuple(standing.get(unit, ()))].append(at)
    touched = sorted({owner for unit in units for owner, _ in signature[unit]}, key=lambda one: (one != root, one))
    lookup = np.full(len(label_of), -1, dtype=np.int64)
    lookup[list(number)] = list(number.values())
    members: list[Member] = []
    for owner in touched:
        mine = lookup[places[names[owner]]]
        positions = np.flatnonzero(mine >= 0)
        members.append(Member(names[owner], positions, mine[positions], owner in made))
    return Group(
        root=names[root].layer,
        size=len(units),
        members=tuple(members),
        cells=tuple(np.array(cell) for cell in cells.values()),
        labels=torch.from_numpy(label_of[np.array(units)]),
    )


def choose(scores: Tensor, cells: Sequence[Sequence[int] | Ints], keep: int) -> list[int]:
    """The `keep` units to keep, in order: the same share of every cell, the best of each."""
    total = sum(len(cell) for cell in cells)
    kept: list[int] = []
    for cell in cells:
        best = sorted((int(unit) for unit in cell), key=lambda unit: (-float(scores[unit]), unit))
        kept += best[: len(cell) * keep // total]
    return sorted(kept)
