"""Which channels must go together (after DepGraph, Fang et al. 2023), found by following them through one run.

A *unit* is a channel with everything that belongs to it: rows and columns of weights, entries of norms and of bare
parameters; a whole head of attention. A *group* is a set of units that are alike: those that one layer makes first.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from autocompress.models.labels import Labels, Place

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
        """Channels of the root per step."""
        return max(1, self.channels * self.step // self.size)

    @property
    def channels(self) -> int:
        """Channels of the root that these units are."""
        return len(self.members[0].positions)

    def rest(self, kept: Sequence[int]) -> Ints:
        """The units that are not among `kept`."""
        return np.setdiff1d(np.arange(self.size), np.asarray(kept, dtype=np.int64))


def is_depthwise(layer: nn.Module) -> bool:
    """One filter per input channel."""
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return False
    return 1 < layer.groups == layer.in_channels == layer.out_channels


def makes_channels(layer: nn.Module) -> bool:
    """A layer with output channels of its own: a convolution of any kind, a linear layer, an embedding."""
    return isinstance(layer, nn.modules.conv._ConvNd | nn.Linear | nn.Embedding)


def components(trace: Labels) -> Ints:
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


def stuck_units(trace: Labels, of: Ints, tables: Sequence[Ints]) -> tuple[Ints, list[str]]:
    """For each unit the number of the reason why it must stay (-1: it need not), and the reasons."""
    reasons = ["its channels meet padding", "channels that it is bound to by their number must stay"]
    found = np.full(int(of.max()) + 1, -1, dtype=np.int64)
    found[of[0]] = 0
    for labels, why in trace.fixed:
        units = of[labels.numpy()]
        found[units[found[units] < 0]] = len(reasons)
        reasons.append(why)
    spreading = True
    while spreading:  # groups of a convolution stay equally large: where one channel must stay, all must
        spreading = False
        for table in tables:
            must = found[table] >= 0
            if must.any() and not must.all():
                found[table[~must]] = 1
                spreading = True
    return found, reasons


def assemble(
    places: Mapping[Place, Ints],
    order: Sequence[Place],
    free: NDArray[np.bool_],
    tables: Sequence[Ints],
    bonds: Sequence[Ints],
    of: Ints,
) -> list[Group]:
    """Units that are made by the same layer first, or bound to each other by numbers, make a group."""
    names = list(places)
    index = {place: number for number, place in enumerate(names)}
    made = [places[place] for place in order]
    root = np.full(len(free), -1, dtype=np.int64)
    for place in reversed(order):
        root[places[place]] = index[place]
    root[~free] = -1
    tables = [table for table in tables if free[table].all()]
    root = _bound(root, [*tables, *(bond for bond in bonds if free[bond].all())])
    rank = np.full(len(free), -1, dtype=np.int64)  # units in the order in which layers make them
    for units in reversed(made):
        rank[units] = np.arange(len(units))
    alike = _signatures(places, tables, len(free))
    owners = np.repeat(np.arange(len(names)), [len(one) for one in places.values()])
    everyone = np.concatenate([*places.values(), np.zeros(0, dtype=np.int64)])
    pairs = np.unique(root[everyone] * len(names) + owners)
    touching: defaultdict[int, list[int]] = defaultdict(list)
    for group, owner in zip((pairs // len(names)).tolist(), (pairs % len(names)).tolist(), strict=True):
        touching[group].append(owner)
    label_of = np.zeros(len(free), dtype=np.int64)
    label_of[of[::-1]] = np.arange(len(of))[::-1]
    grouped: defaultdict[int, list[int]] = defaultdict(list)
    for unit in np.flatnonzero(root >= 0).tolist():
        grouped[int(root[unit])].append(unit)
    makers = {index[place] for place in order}
    lookup = np.full(len(free), -1, dtype=np.int64)
    found: list[Group] = []
    for number in [index[place] for place in order if index[place] in grouped]:
        units = np.array(grouped[number])
        first = {unit: at for at, unit in reversed(list(enumerate(places[names[number]].tolist())))}
        units = np.array(sorted(units.tolist(), key=lambda unit: (first.get(unit, len(first)), rank[unit], unit)))
        lookup[units] = np.arange(len(units))
        members: list[Member] = []
        for owner in sorted(touching[number], key=lambda one: (one != number, one)):
            mine = np.where(root[places[names[owner]]] == number, lookup[places[names[owner]]], -1)
            positions = np.flatnonzero(mine >= 0)
            members.append(Member(names[owner], positions, mine[positions], owner in makers))
        kinds = alike[units]
        cells = tuple(np.flatnonzero(kinds == kind) for kind in dict.fromkeys(kinds.tolist()))
        found.append(Group(names[number].layer, len(units), tuple(members), cells, torch.from_numpy(label_of[units])))
    return found


def _bound(root: Ints, tables: Sequence[Ints]) -> Ints:
    """Roots whose units stand in one table become one root, the earlier."""
    size = int(root.max(initial=0)) + 1
    left: list[int] = []
    right: list[int] = []
    for table in tables:
        heads = np.unique(root[table])
        heads = heads[heads >= 0].tolist()
        left += heads[1:]
        right += heads[:1] * (len(heads) - 1)
    if not left:
        return root
    links = coo_matrix((np.ones(len(left), dtype=bool), (left, right)), shape=(size, size))
    together = connected_components(links, directed=False)[1]
    earliest = np.full(size, size, dtype=np.int64)
    np.minimum.at(earliest, together, np.arange(size))
    return np.where(root >= 0, earliest[together[np.maximum(root, 0)]], -1)


def _signatures(places: Mapping[Place, Ints], tables: Sequence[Ints], units: int) -> NDArray[np.uint64]:
    """A number per unit, equal for units that stand in the same places and rows equally often: sums of random numbers
    (64 bits, so that different ones are equal once in the age of the universe)."""
    generator = np.random.default_rng(0)
    found = np.zeros(units, dtype=np.uint64)
    for standing in (*places.values(), *(row for table in tables for row in table)):
        np.add.at(found, standing, generator.integers(1, 2**63, dtype=np.uint64) * np.uint64(2) + np.uint64(1))
    return found


def choose(scores: Tensor, cells: Sequence[Sequence[int] | Ints], keep: int) -> list[int]:
    """The `keep` units to keep, in order: the same share of every cell, the best of each."""
    total = sum(len(cell) for cell in cells)
    kept: list[int] = []
    for cell in cells:
        best = sorted((int(unit) for unit in cell), key=lambda unit: (-float(scores[unit]), unit))
        kept += best[: len(cell) * keep // total]
    return sorted(kept)
