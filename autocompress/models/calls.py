"""What a forward pass shows of a module's parts: their calls; and passes in which layers only pretend."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


@dataclass(frozen=True)
class Call:
    """One call of a submodule. `x` is its main input, kept apart from whatever is done in place."""

    x: Tensor
    args: tuple[Any, ...]
    named: dict[str, Any]
    key: int | str  # which argument `x` is
    shape: tuple[int, ...]  # of the main output
    form: int  # 0: a tensor comes out, n: a tuple of n, -1: a tuple that holds more than its first tensor
    before: int = 0  # convolutions and linear layers that were done when it began

    def again(self, block: Callable[..., Any]) -> Tensor:
        """The main output of another call with these inputs."""
        args, named = list(self.args), dict(self.named)
        if isinstance(self.key, int):
            args[self.key] = self.x.clone()
        else:
            named[self.key] = self.x.clone()
        outputs = block(*args, **named)
        return outputs if isinstance(outputs, Tensor) else outputs[0]


@dataclass
class Seen:
    """What one forward pass showed."""

    calls: dict[str, list[Call]] = field(default_factory=lambda: defaultdict(list))
    odd: set[str] = field(default_factory=set)  # called with no tensor first, or answering with something else
    macs: dict[str, int] = field(default_factory=dict)  # of convolutions and linear layers, whole batch
    leaves: list[str] = field(default_factory=list)  # in order of their first call


def watch(module: nn.Module, inputs: tuple[Any, ...], names: Collection[str]) -> Seen:
    """Run `module` on `inputs` and note the calls of its submodules `names`.

    Without gradients, in whatever mode each part is.
    """
    seen = Seen()
    hooks = []
    started: dict[str, list[tuple[Any, ...]]] = defaultdict(list)

    def begin(name: str) -> Callable[..., None]:
        def note(part: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:  # noqa: ARG001
            key = main(args, named)
            x = None if key is None else (args[key] if isinstance(key, int) else named[key]).detach().clone()
            started[name].append((x, args, named, key, len(seen.leaves)))

        return note

    def end(name: str) -> Callable[..., None]:
        def note(part: nn.Module, args: Any, named: Any, outputs: Any) -> None:  # noqa: ARG001
            x, given, kept, key, before = started[name].pop()
            answer, form = _form(outputs)
            if x is None or answer is None:
                seen.odd.add(name)
                return
            seen.calls[name].append(Call(x, given, kept, key, tuple(answer.shape), form, before))

        return note

    def reached(name: str) -> Callable[..., None]:
        def note(part: nn.Module, args: Any, outputs: Any) -> None:  # noqa: ARG001
            if isinstance(part, nn.Conv2d | nn.Linear) and name not in seen.leaves:
                seen.leaves.append(name)
            if isinstance(outputs, Tensor):
                assert isinstance(part.weight, Tensor)
                seen.macs[name] = seen.macs.get(name, 0) + outputs.numel() * part.weight[0].numel()

        return note

    for name, part in module.named_modules():
        if isinstance(part, nn.Linear) or (isinstance(part, _ConvNd) and not part.transposed):
            hooks.append(part.register_forward_hook(reached(name)))
        if name in names:
            hooks.append(part.register_forward_pre_hook(begin(name), with_kwargs=True))
            hooks.append(part.register_forward_hook(end(name), with_kwargs=True))
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def main(args: tuple[Any, ...], named: Mapping[str, Any]) -> int | str | None:
    """Which argument is a block's main input: the first if it is a tensor of numbers, else the first named one."""
    if args:
        return 0 if isinstance(args[0], Tensor) and args[0].is_floating_point() else None
    return next((key for key, one in named.items() if isinstance(one, Tensor) and one.is_floating_point()), None)


def _form(outputs: Any) -> tuple[Tensor | None, int]:
    if isinstance(outputs, Tensor):
        return outputs, 0
    if isinstance(outputs, tuple) and outputs and isinstance(outputs[0], Tensor):
        return outputs[0], len(outputs) if all(one is None for one in outputs[1:]) else -1
    return None, -1


@contextmanager
def pretending(answers: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within, these parts answer with what the functions make of their inputs, and compute nothing."""
    try:
        for part, answer in answers.items():
            part.forward = answer
        yield
    finally:
        for part in answers:
            del part.forward


def plain_leaves(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The Conv2d and Linear among them that have no forward of their own."""
    return [part for part in modules if type(part) in (nn.Conv2d, nn.Linear) and "forward" not in vars(part)]


def idle(module: nn.Module) -> AbstractContextManager[None]:
    """Within, convolutions and linear layers answer with zeros: shapes and calls are the same, in a fraction of time.

    Raises RuntimeError, there, where a layer would not take its input's shape.
    """
    return pretending({leaf: partial(_zeros, leaf) for leaf in plain_leaves(module.modules())})


def _zeros(layer: nn.Module, x: Tensor) -> Tensor:
    axis, channels = (-1, layer.in_features) if isinstance(layer, nn.Linear) else (-3, layer.in_channels)
    shape = answer_shape(layer, x)
    if x.shape[axis] != channels or min(shape) < 1:
        raise RuntimeError(f"{layer} does not take an input of shape {tuple(x.shape)}")
    return x.new_zeros(shape)


def answer_shape(layer: nn.Module, x: Tensor) -> tuple[int, ...]:
    """Shape of a Conv2d's or Linear's output, not computed."""
    if isinstance(layer, nn.Linear):
        return (*x.shape[:-1], layer.out_features)
    assert isinstance(layer, nn.Conv2d)
    before, after = (
        layer._reversed_padding_repeated_twice[::2][::-1],
        layer._reversed_padding_repeated_twice[1::2][::-1],
    )
    sizes = [
        math.floor((x.shape[axis - 2] + before[axis] + after[axis] - d * (k - 1) - 1) / s) + 1
        for axis, (k, s, d) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True))
    ]
    return (*x.shape[:-3], layer.out_channels, *sizes)
