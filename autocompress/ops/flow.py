"""What flows between the layers of a torch module, found by running it once: which values each call reads and makes.

Torch functions are recorded where a program calls them (`torch.overrides`), so functional ReLUs, additions and
concatenations are seen as well as modules, and no network has to be traceable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autocompress.models.trace import still

SAME = frozenset(("contiguous", "to", "float", "dropout", "detach", "type_as", "requires_grad_"))
"""May give back the tensor that they got."""


@dataclass(frozen=True)
class Call:
    """One torch function. Values are numbers: a tensor that is changed in place becomes another value."""

    name: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    bounds: tuple[float, float] | None = None  # of ReLU and clip: nothing outside passes


@dataclass(frozen=True)
class Visit:
    """One run of a module: what went in (by position) and came out, and the calls [began, ended) that it made."""

    module: str
    began: int
    ended: int
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    plain: bool  # what came out is one tensor, not in a tuple or mapping


@dataclass
class Flow:
    """Calls in order, and visits in the order in which they ended."""

    calls: list[Call] = field(default_factory=list)
    visits: list[Visit] = field(default_factory=list)
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)  # of values
    constants: set[int] = field(default_factory=set)  # weights and buffers

    @classmethod
    def of(cls, module: nn.Module, inputs: Sequence[Tensor]) -> Flow:
        """Run `module(*inputs)` once, in evaluation mode and without gradients; the module is as before."""
        flow = cls()
        watch = _Watch(flow)
        flow.constants = {watch.number(tensor) for tensor in (*module.parameters(), *module.buffers())}
        handles: list[Any] = []
        for name, part in module.named_modules():
            handles.append(part.register_forward_pre_hook(watch.enter))
            handles.append(part.register_forward_hook(watch.leave(name)))
        try:
            with still(module), watch:
                module(*inputs)
        finally:
            for handle in handles:
                handle.remove()
        return flow

    def visits_of(self, module: str) -> list[Visit]:
        """The runs of one module."""
        return [visit for visit in self.visits if visit.module == module]

    def users(self, value: int) -> list[Call]:
        """Calls that read a value."""
        return [call for call in self.calls if value in call.reads]

    def maker(self, value: int) -> int | None:
        """Index of the call that makes a value, None for the network's inputs and weights."""
        return next((index for index, call in enumerate(self.calls) if value in call.makes), None)

    @property
    def answers(self) -> tuple[int, ...]:
        """What the network gives."""
        return self.visits[-1].makes

    def source(self, value: int) -> str | None:
        """The innermost module that runs once, makes this value itself and gives it alone; None if there is none."""
        made = self.maker(value)
        for visit in self.visits:
            inside = made is not None and visit.began <= made < visit.ended
            gives = visit.plain and visit.makes == (value,)
            if inside and gives and visit.module and len(self.visits_of(visit.module)) == 1:
                return visit.module
        return None


class _Watch(TorchFunctionMode):
    """Writes down what happens while it is active."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow
        self.numbers: dict[int, int] = {}
        self.alive: list[Tensor] = []  # a tensor that is gone would leave its id to another
        self.count = 0
        self.open: list[tuple[int, tuple[int, ...]]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        sources = tensors((args, tuple(kwargs.values())))
        reads = tuple(self.number(tensor) for tensor in sources)
        found = func(*args, **kwargs)
        results = tensors(found)
        if not results or not reads or (name in SAME and any(found is source for source in sources)):
            return found
        makes = tuple(self.number(tensor, fresh=True) for tensor in results)
        self.flow.calls.append(Call(name, reads, makes, bounds(name, args, kwargs)))
        return found

    def number(self, tensor: Tensor, *, fresh: bool = False) -> int:
        if fresh or id(tensor) not in self.numbers:
            self.alive.append(tensor)
            self.numbers[id(tensor)] = self.count
            self.flow.shapes[self.count] = tuple(tensor.shape)
            self.count += 1
        return self.numbers[id(tensor)]

    def enter(self, module: nn.Module, args: Any) -> None:  # noqa: ARG002  a hook
        self.open.append((len(self.flow.calls), tuple(self.number(tensor) for tensor in tensors(args))))

    def leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, outputs: Any) -> None:  # noqa: ARG001
            began, reads = self.open.pop()
            makes = tuple(self.number(tensor) for tensor in tensors(outputs))
            plain = isinstance(outputs, Tensor)
            self.flow.visits.append(Visit(name, began, len(self.flow.calls), reads, makes, plain))

        return hook


def tensors(values: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and mappings, in order."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, Mapping):
        values = tuple(values.values())
    return [one for value in values for one in tensors(value)] if isinstance(values, tuple | list) else []


def bounds(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[float, float] | None:
    """What a ReLU or clip lets pass, None for other functions."""
    if name in ("relu", "relu_"):
        return 0.0, math.inf
    if name in ("relu6", "hardtanh", "hardtanh_", "clamp", "clamp_", "clip"):
        keys = ("min", "max") if name.startswith("cl") else ("min_val", "max_val")
        defaults = {"relu6": (0.0, 6.0), "hardtanh": (-1.0, 1.0), "hardtanh_": (-1.0, 1.0)}.get(name, (None, None))
        ends = [
            args[place] if len(args) > place else kwargs.get(key, default)
            for place, key, default in zip((1, 2), keys, defaults, strict=True)
        ]
        if any(isinstance(end, Tensor) for end in ends):
            return None
        return (-math.inf if ends[0] is None else float(ends[0]), math.inf if ends[1] is None else float(ends[1]))
    return None
