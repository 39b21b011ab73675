"""A network's coupled channels, and what cutting some of them means for every tensor: cuts as receipts hold them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.models.following import following
from autocompress.models.groups import Group, Ints, Unprunable, assemble, components, stuck_units
from autocompress.models.heads import Attention, attentions
from autocompress.models.labels import Labels, Place
from autocompress.models.slicing import Cut
from autocompress.tasks import several


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
        self._assemble(())

    def bind(self, kinds: Collection[type[nn.Module]]) -> None:
        """Assemble the groups again, for attention of these classes that computes the size of its heads from the
        channels that come in: both then lose the same share."""
        self._assemble([one for one in self.attentions if one.kind in kinds])

    def at(self, layer: str) -> tuple[Group, ...]:
        """The groups that a layer's output channels are in.

        Raises:
            Unprunable: it makes none that can be cut; with the reason.
        """
        found = tuple(group for group in self.groups if layer in group.producers)
        if not found:
            raise Unprunable(self.refused.get(layer, "the forward pass does not use it"))
        return found

    def _assemble(self, bound: Sequence[Attention]) -> None:
        trace = self.trace
        self.of = components(trace)  # label -> unit of the whole network
        self.places = {place: self.of[labels.numpy()] for place, labels in trace.places.items()}
        tables = [self.of[table.numpy()] for table in trace.equal]
        weights = [f"{one.layers[0]}.weight" for one in bound]
        bonds = [np.concatenate([self.places[Place(weight, axis)] for axis in (0, 1)]) for weight in weights]
        stuck, reasons = stuck_units(trace, self.of, [*tables, *bonds])
        owner = {int(labels[0]): place for place, labels in trace.places.items()}
        order = list(dict.fromkeys(owner[int(labels[0])] for labels in trace.produced if int(labels[0]) in owner))
        self.groups = tuple(assemble(self.places, order, stuck < 0, tables, bonds, self.of))
        covered = {producer for group in self.groups for producer in group.producers}
        self.refused: dict[str, str] = {}
        for place in order:
            why = stuck[self.places[place]]
            if place.layer not in covered and (why >= 0).any():
                self.refused.setdefault(place.layer, reasons[int(why[why >= 0][0])])

    def mask(self, removed: Mapping[Group, Ints]) -> Tensor:
        """Which labels go, shape (labels,), when the units `removed` of each group go."""
        gone = np.zeros(int(self.of.max()) + 1, dtype=bool)
        for group, units in removed.items():
            gone[self.of[group.labels.numpy()[units]]] = True
        return torch.from_numpy(gone[self.of])

    def plan(self) -> Plan:
        """Nothing cut yet."""
        attributes = {name: (self.of[labels.numpy()], 1) for name, labels in self.trace.attributes.items()}
        for one in self.attentions:
            units = self.places.get(Place(f"{one.layers[0]}.weight", 0))
            if units is not None:
                attributes |= {(one.name, name): (np.unique(units), each) for name, each in one.attributes.items()}
        return Plan(self.of, self.places, attributes)


class Plan:
    """Cuts in the making, group after group: positions shift as earlier groups leave the same axes.

    `of`: the network-wide unit of each label; `places`: the unit at each position of an axis; `attributes`: by module
    and name, the units that a number on a module counts, and what each counts for.
    """

    def __init__(
        self, of: Ints, places: Mapping[Place, Ints], attributes: Mapping[tuple[str, str], tuple[Ints, int]]
    ) -> None:
        self.of, self.places, self.attributes = of, places, attributes
        self.alive: dict[Place, Ints] = {}
        self.gone = np.zeros(int(of.max(initial=0)) + 1, dtype=bool)  # units of the whole network

    def units(self, group: Group) -> Ints:
        """Network-wide numbers of a group's units."""
        return self.of[group.labels.numpy()]

    def standing(self, place: Place) -> Ints:
        """The units that still stand along an axis, by position."""
        units = self.places[place]
        return units[self.alive[place]] if place in self.alive else units

    def facts(self, kept: Mapping[Group, Sequence[int]]) -> dict[str, Any]:
        """Cut every group to its units in `kept`: `cuts`, and `attributes` if there are any, as receipts hold them."""
        cuts: list[Cut] = []
        attributes: dict[str, dict[str, int]] = {}
        for group, left in kept.items():
            found, values = self.cut(group, left)
            cuts += found
            for name, mine in values.items():
                attributes.setdefault(name, {}).update(mine)
        facts: dict[str, Any] = {"cuts": [cut.model_dump(mode="json", exclude_defaults=True) for cut in cuts]}
        return facts | ({"attributes": attributes} if attributes else {})

    def cut(self, group: Group, kept: Sequence[int]) -> tuple[list[Cut], dict[str, dict[str, int]]]:
        """Cuts, and attributes by module, that leave the units `kept` of a group."""
        fresh = np.zeros_like(self.gone)
        fresh[self.units(group)[group.rest(kept)]] = True
        self.gone |= fresh
        alike: defaultdict[tuple[int, int, tuple[int, ...]], list[str]] = defaultdict(list)
        for place in (member.place for member in group.members):
            units = self.places[place]
            was = self.alive.get(place)
            was = np.arange(len(units)) if was is None else was
            left = ~fresh[units[was]]
            self.alive[place] = was[left]
            alike[len(was), place.groups, tuple(np.flatnonzero(left).tolist())].append(f"{place.tensor}:{place.axis}")
        cuts = [
            Cut(places=tuple(places), was=was, kept=kept, groups=groups)
            for (was, groups, kept), places in alike.items()
        ]
        return cuts, self._attributes(fresh)

    def _attributes(self, fresh: NDArray[np.bool_]) -> dict[str, dict[str, int]]:
        """What counts channels on modules that have no tensors to read it from, where it has changed."""
        found: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for (name, attribute), (units, times) in self.attributes.items():
            if fresh[units].any():
                found[name][attribute] = int((~self.gone[units]).sum()) * times
        return dict(found)


def _run(trace: Labels, module: nn.Module, example: tuple[Tensor, ...]) -> None:
    """Follow one forward pass in evaluation mode, and one in training mode where that reaches further layers."""
    modes = {part: part.training for part in module.modules()}
    try:
        with torch.no_grad():
            module.eval()
            with following(trace):
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
        with torch.random.fork_rng(devices=[]), following(trace):
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
