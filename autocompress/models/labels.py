"""Channels followed through a network: every axis of every parameter gets labels, and each operator that runs says
which labels it puts together.

The idea of DepGraph (Fang et al. 2023, section 3: layers that must be pruned together) carried down to single
channels and to ATen operators, so that concatenations, flattening, shuffles, padding and bare parameters need no case
of their own. Here are the labels and what is known of an operator's call; `following` runs a network, and what an
operator does to labels is in `labelrules` and `sumrules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from autocompress.models.slicing import WIDTHS


class Place(NamedTuple):
    """An axis of a parameter or buffer. `groups` > 1: the input channels of a grouped convolution (axis 1)."""

    tensor: str
    axis: int
    groups: int = 1

    @property
    def layer(self) -> str:
        """The module that holds the tensor."""
        return self.tensor.rpartition(".")[0]


@dataclass(frozen=True)
class Layout:
    """Labels along axes of a tensor, (size,) each; other axes have no channels. `weight`: made of parameters alone."""

    axes: Mapping[int, Tensor] = field(default_factory=dict)
    weight: bool = False


class Call:
    """One operator at work: arguments by their names in the schema."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, dict(kwargs)
        self.name: str = func._schema.name.rpartition("::")[2]
        self.values: dict[str, Any] = {}
        for position, argument in enumerate(func._schema.arguments):
            given = args[position] if position < len(args) else self.kwargs.get(argument.name, argument.default_value)
            self.values[argument.name] = given

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def get(self, name: str) -> Any:
        """An argument, None where the operator has none of that name."""
        return self.values.get(name)

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, those in lists too."""
        found: list[Tensor] = []
        for value in self.values.values():
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, list | tuple):
                found += [one for one in value if isinstance(one, Tensor)]
        return found

    def run(self, /, **changes: Any) -> Any:
        """The operator, with some arguments replaced."""
        if not changes:
            return self.func(*self.args, **self.kwargs)
        names = [argument.name for argument in self.func._schema.arguments]
        args = [changes.get(name, value) for name, value in zip(names, self.args, strict=False)]
        late = {name: value for name, value in changes.items() if name in names[len(args) :]}
        return self.func(*args, **{**self.kwargs, **late})


class Labels:
    """What is known of a network's channels while it is followed. Label 0 marks where there is no channel (padding).

    `units` gives parameter axes labels of their own choice: numbers from 0 that repeat where channels belong together
    from the start (heads). With `gone` (a mask of labels, `known` from an earlier run) channels are ignored instead:
    whoever sums over them skips them, whoever normalises by them leaves them out.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        units: Mapping[tuple[str, int], Tensor] | None = None,
        known: Mapping[Place, Tensor] | None = None,
        gone: Tensor | None = None,
    ) -> None:
        self.gone = gone
        self.count = 1  # labels given so far
        self.places: dict[Place, Tensor] = dict(known or {})
        self.produced: list[Tensor] = []  # labels of outputs of layers, in the order they run
        self.edges: list[tuple[Tensor, Tensor]] = []  # labels that belong together
        self.fixed: list[tuple[Tensor, str]] = []  # labels that must stay, and why
        self.equal: list[Tensor] = []  # (rows, n) labels: every row keeps equally many
        self.attributes: dict[tuple[str, str], Tensor] = {}  # (module, attribute): what it counts
        self._units = dict(units or {})
        self._known = known is not None
        self._modules = {part: name for name, part in module.named_modules()}
        self._stack: list[nn.Module] = []
        self._layouts = WeakTensorKeyDictionary()
        self._names: dict[int, str] = {}
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point():
                self._names.setdefault(id(tensor), name)

    def enter(self, module: nn.Module) -> None:
        """A module's forward pass begins."""
        self._stack.append(module)

    def leave(self, module: nn.Module) -> None:
        """It ends, and with it those that it had begun."""
        if module in self._stack:
            while self._stack.pop() is not module:
                pass

    # --- what rules ask and say ---------------------------------------------------------------------------------

    def layout(self, tensor: Tensor) -> Layout | None:
        """The labels of a tensor, None for one without channels."""
        found = self._layouts.get(tensor)
        if found is None and id(tensor) in self._names:
            name = self._names[id(tensor)]
            axes = {axis: self.place(name, axis, size) for axis, size in enumerate(tensor.shape) if size > 1}
            found = self._layouts[tensor] = Layout(axes, weight=True)
        return found

    def axes(self, tensor: Tensor | None) -> Mapping[int, Tensor]:
        """Labels by axis, empty for None and for a tensor without channels."""
        found = None if tensor is None else self.layout(tensor)
        return {} if found is None else found.axes

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor is made of parameters alone."""
        found = self.layout(tensor)
        return found is not None and found.weight

    def name(self, tensor: Tensor | None) -> str:
        """The parameter's name, empty for other tensors."""
        return self._names.get(id(tensor), "")

    def place(self, name: str, axis: int, size: int, groups: int = 1) -> Tensor:
        """The labels of a parameter's axis, new ones the first time."""
        place = Place(name, axis, groups)
        if place not in self.places:
            units = self._units.get((name, axis)) if groups == 1 else None
            units = torch.arange(size) if units is None else units
            self.places[place] = units + self.count
            if not self._known:  # a later run that meets a new place has no labels to give it
                self.count += int(units.max()) + 1
            else:
                self.places[place] = torch.zeros(size, dtype=torch.long)
        return self.places[place]

    def give(self, tensor: Tensor, axes: Mapping[int, Tensor], *, weight: bool = False) -> None:
        """Label a result."""
        self._layouts[tensor] = Layout({axis: axes[axis] for axis in sorted(axes)}, weight)

    def join(self, one: Tensor | None, other: Tensor | None, why: str) -> Tensor | None:
        """Labels that meet, position by position; where one side has none, the other's must stay. Returns either."""
        if one is None or other is None:
            labels = one if other is None else other
            if labels is not None:
                self.fixed.append((labels, why))
            return labels
        if one is not other:
            self.edges.append((one, other))
        return one

    def fix(self, labels: Tensor, why: str) -> None:
        """These must stay."""
        self.fixed.append((labels, why))

    def inside(self) -> tuple[str, nn.Module] | None:
        """Name and module whose forward pass is running."""
        return (self._modules.get(self._stack[-1], ""), self._stack[-1]) if self._stack else None

    def counts(self, attribute: str, labels: Tensor) -> None:
        """The running module's `attribute` says how many of these there are."""
        inside = self.inside()
        if inside is not None and inside[1] in self._modules:
            self.attributes.setdefault((inside[0], attribute), labels)

    def reshaped(self, labels: Tensor) -> None:
        """An axis came out of a reshape: look for the attribute by which the module may have asked for its size."""
        inside = self.inside()
        if inside is not None:
            for attribute in WIDTHS:
                if vars(inside[1]).get(attribute) == len(labels):
                    self.counts(attribute, labels)
