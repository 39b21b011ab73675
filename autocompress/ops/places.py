"""Where an int8 file rounds the activations of a torch module, as `integers.Plan` has it on the file's graph.

A convolution's output is rounded after its batch norm and, if a ReLU or clip alone reads that, at the range of what
comes after; a matrix product's only if everything behind it leads into integer layers. A layer's input is another
layer's output, or a value of its own: then it is rounded where it is made if the file computes it with integers (so
that every reader gets the rounded form), else only where a layer reads it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from autocompress.ops.flow import Call, Flow, Visit
from autocompress.types import Entry, Record

_SHAPES = ("flatten", "reshape", "view", "transpose", "permute", "squeeze", "unsqueeze", "pad", "chunk", "split")
SHARING = frozenset((*_SHAPES, "__getitem__", "max_pool2d", "avg_pool2d", "interpolate"))
"""What they give has the range of what goes in, and takes its scale."""
_HARD = frozenset(("hardswish", "hardswish_", "hardsigmoid", "hardsigmoid_"))
FOLLOWERS = SHARING | _HARD | frozenset(("adaptive_avg_pool2d", "mean", "leaky_relu", "leaky_relu_", "sigmoid"))
"""One activation goes in: integer where that one is (ReLU and clips too)."""
JOINTS = frozenset(("add", "add_", "mul", "mul_", "cat", "concat"))
"""Several activations go in: integer where most of the activations around them are."""


class Place(Record):
    """One range: whose it is (`<layer>:<side>`), and the modules whose inputs or outputs it rounds."""

    owner: str
    modules: tuple[str, ...]
    after: bool = True  # outputs of the modules, else their inputs
    low: float | None = None  # what a clip that follows lets pass
    high: float | None = None

    @property
    def side(self) -> str:
        """`input` or `output`."""
        return self.owner.rpartition(":")[2]

    def within(self, low: float, high: float) -> tuple[float, float]:
        """A range cut to what passes and widened to 0, which integers represent exactly."""
        low = low if self.low is None else max(low, self.low)
        high = high if self.high is None else min(high, self.high)
        return min(low, 0.0), max(high, 0.0)


class Spot(Record):
    """All that is rounded around one layer."""

    layer: str
    shape: tuple[int, ...]
    norm: str | None = None  # the batch norm that is folded into it
    places: dict[str, Place]  # by side; of another owner where the value is another layer's

    @property
    def own(self) -> list[Place]:
        """The places whose range is this layer's."""
        return [place for side, place in self.places.items() if place.owner == f"{self.layer or '.'}:{side}"]

    @classmethod
    def read(cls, entry: Entry) -> Spot:
        """What a receipt's entry says."""
        return cls.model_validate({name: entry.facts[name] for name in cls.model_fields if name in entry.facts})


def spots(module: nn.Module, flow: Flow, names: Sequence[str]) -> list[Spot | str]:
    """For each layer its spot, or why it has none. `names` are the layers that will be int8."""
    trails = {name: _trail(module, flow, name) for name in names}
    good = [trail for trail in trails.values() if isinstance(trail, _Trail)]
    integers = _Integers(flow, good)
    outputs = {trail.value: trail.place() for trail in good if trail.rounded and integers.made_by(trail)}
    sources = {trail.name: integers.source(trail.read, outputs) for trail in good}
    inputs: dict[int, Place] = {}
    for trail in good:
        value = sources[trail.name]
        if value in outputs:
            inputs[value] = outputs[value]
        elif value not in inputs:
            owner, maker = f"{trail.name or '.'}:input", flow.source(value)
            if maker is not None and flow.maker(value) in integers.calls:
                inputs[value] = Place(owner=owner, modules=(maker,))
            else:
                readers = tuple(other.name for other in good if sources[other.name] == value)
                inputs[value] = Place(owner=owner, modules=readers, after=False)
    found: list[Spot | str] = []
    for name, trail in trails.items():
        if isinstance(trail, str):
            found.append(trail)
            continue
        output = outputs.get(trail.value) if trail.rounded else None
        places = {"input": inputs[sources[name]], **({} if output is None else {"output": output})}
        found.append(Spot(layer=name, shape=trail.shape, norm=trail.norm, places=places))
    return found


class _Trail:
    """A layer's way to its output: what it reads, the value it gives in the end, where that is rounded."""

    def __init__(self, module: nn.Module, flow: Flow, visit: Visit) -> None:
        layer: Any = module.get_submodule(visit.module)
        self.name, self.read, self.value = visit.module, visit.reads[0], visit.makes[0]
        self.call = flow.maker(self.value)
        self.shape = tuple(layer.weight.shape)
        self.product = isinstance(layer, nn.Linear)
        # a matrix product of three axes and more adds its bias in a step of its own, in floats
        self.rounded = not (self.product and layer.bias is not None and len(flow.shapes[self.value]) > 2)
        self.norm: str | None = None
        self.where = self.name
        self.bounds = (-math.inf, math.inf)
        self.made = {self.value} if self.rounded else set[int]()  # what the file has as integers
        norm = None if self.product else _alone(flow, self.value, "batch_norm")
        if norm is not None:
            self.value = norm.makes[0]
            self.norm = _norm_module(module, flow, norm)
            self.where, self.rounded = self.norm or "", self.norm is not None
            self.made.add(self.value)
        follower = _alone(flow, self.value) if self.rounded else None
        if follower is not None and follower.bounds is not None and follower.bounds[0] <= 0 <= follower.bounds[1]:
            self.bounds = follower.bounds
            self.value = follower.makes[0]

    def place(self) -> Place:
        """Where the output is rounded."""
        low, high = (None if math.isinf(bound) else bound for bound in self.bounds)
        return Place(owner=f"{self.name or '.'}:output", modules=(self.where,), low=low, high=high)


class _Integers:
    """What the file computes with integers, grown from the layers as `Plan.of` grows it."""

    def __init__(self, flow: Flow, trails: Sequence[_Trail]) -> None:
        self.flow = flow
        self.seeds = {trail.call for trail in trails}
        self.wanted: set[int] = set()  # values that reach an integer layer through nothing but followers
        for index, call in reversed(list(enumerate(flow.calls))):
            if index in self.seeds or (_follows(call) and any(value in self.wanted for value in call.makes)):
                self.wanted.add(call.reads[0])
        made = {value for trail in trails if self.made_by(trail) for value in trail.made}
        values = {trail.read for trail in trails} | made
        self.calls: set[int] = set()
        growing = True
        while growing:
            growing = False
            for index, call in enumerate(flow.calls):
                if index in self.calls or index in self.seeds:
                    continue
                inputs = [value for value in call.reads if value not in flow.constants]
                around = [*inputs, *call.makes]
                if call.name in JOINTS:
                    fits = any(value in made for value in inputs)
                    fits = fits and 2 * sum(value in values for value in around) > len(around)
                else:
                    pays = call.reads[0] in made or any(value in self.wanted for value in call.makes)
                    fits = _follows(call) and call.reads[0] in values and pays
                if fits:
                    self.calls.add(index)
                    values.update(around)
                    made.update(call.makes)
                    growing = True

    def made_by(self, trail: _Trail) -> bool:
        """Whether a layer answers with integers: convolutions always, products where integer layers alone follow."""
        return not trail.product or (trail.rounded and self._passed_on(trail.made))

    def _passed_on(self, values: set[int]) -> bool:
        for value in values:
            users = [(index, call) for index, call in enumerate(self.flow.calls) if value in call.reads]
            leads = all(
                call.reads[0] == value
                and (index in self.seeds or (_follows(call) and any(made in self.wanted for made in call.makes)))
                for index, call in users
            )
            if value in self.flow.answers or not users or not leads:
                return False
        return True

    def source(self, value: int, outputs: dict[int, Place]) -> int:
        """The value whose scale another one has: that one itself unless it was only moved or pooled."""
        while value not in outputs:
            index = self.flow.maker(value)
            if index is None or index not in self.calls or not _shares(self.flow, self.flow.calls[index]):
                break
            value = self.flow.calls[index].reads[0]
        return value


def _follows(call: Call) -> bool:
    return call.name in FOLLOWERS or (call.bounds is not None and call.bounds[0] <= 0 <= call.bounds[1])


def _shares(flow: Flow, call: Call) -> bool:
    if call.name == "adaptive_avg_pool2d":
        return flow.shapes[call.makes[0]][-2:] != (1, 1)
    return call.name in SHARING


def _trail(module: nn.Module, flow: Flow, name: str) -> _Trail | str:
    visits = flow.visits_of(name)
    if len(visits) != 1:
        return f"{name} runs {len(visits)} times in a forward pass" if visits else f"{name} is not run as a module"
    if len(visits[0].reads) != 1 or not visits[0].plain:
        return f"{name} is not called with one tensor"
    return _Trail(module, flow, visits[0])


def _alone(flow: Flow, value: int, name: str | None = None) -> Call | None:
    """The call that reads a value if only one does (and the value is no answer)."""
    users = flow.users(value)
    alone = len(users) == 1 and value not in flow.answers and (name is None or users[0].name == name)
    return users[0] if alone else None


def _norm_module(module: nn.Module, flow: Flow, call: Call) -> str | None:
    """The batch norm layer that makes a call; None for one written as a function."""
    for visit in flow.visits:
        if visit.makes == call.makes and visit.reads[:1] == call.reads[:1]:
            part: Any = module.get_submodule(visit.module)
            once = len(flow.visits_of(visit.module)) == 1
            if once and isinstance(part, _BatchNorm) and part.running_var is not None:
                return visit.module
    return None
