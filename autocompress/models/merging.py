"""Where neighbouring convolutions can become one: everything before a block's last convolution falls silent.

A residual branch conv - norm - activation - conv ... is merged by putting one convolution in the place of the last and
identities in the places of all before it. Whether that leaves the rest of the block alone is found by running it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.models.calls import answer_shape, plain_leaves, pretending


@dataclass(frozen=True)
class Chain:
    """A branch that can become one convolution. Names are relative to the block.

    `kernels` are the sizes that cost less than the branch (`macs` per example), from that of its largest convolution
    to the whole receptive field.
    """

    layer: str
    silenced: tuple[str, ...]
    kernels: tuple[int, ...]
    stride: int
    inputs: int
    outputs: int
    size: tuple[int, int]  # of the output
    macs: int

    def cost(self, kernel: int) -> int:
        """Multiply-adds per example of one convolution in the place of all."""
        return kernel**2 * self.inputs * self.outputs * self.size[0] * self.size[1]


@dataclass
class _Step:
    """One call of a part: when it began and ended, and for layers what came out."""

    began: int
    ended: int = -1
    single: bool = True  # one tensor in
    shape: tuple[int, ...] = ()


Again = Callable[[Callable[..., Any]], Tensor]
"""Calls a block again with the inputs that really arrive there; the main output."""


def chain(block: nn.Module, again: Again, x: Tensor) -> Chain | str:
    """How the block's convolutions become one, or why they cannot. `x` is the block's main input, as `again` gives it.

    The block must be in evaluation mode; parts with hooks or subclassed convolutions are left alone.
    """
    if x.ndim != 4:
        return "its input is no image"
    try:
        return _chain(block, again, x)
    except Exception as error:  # noqa: BLE001  a stranger's forward may not bear noise, whatever it raises
        return f"it cannot be tried out: {type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _chain(block: nn.Module, again: Again, x: Tensor) -> Chain | str:
    parts = dict(block.named_modules())
    steps: dict[str, list[_Step]] = {}
    with pretending(_fakes(block, parts)):
        _follow(block, parts, again, steps)
    ends = sorted(
        (steps[name][0].ended, name)
        for name, part in parts.items()
        if type(part) is nn.Conv2d and len(steps.get(name, ())) == 1 and len(steps[name][0].shape) == 4
    )
    reasons: list[str] = []
    for _, name in reversed(ends):
        found = _before(block, parts, name, again, x, steps)
        if isinstance(found, Chain):
            return found
        reasons.append(found)
    return reasons[0] if reasons else "no convolution of it is called just once"


def _before(
    block: nn.Module,
    parts: dict[str, nn.Module],
    layer: str,
    again: Again,
    x: Tensor,
    steps: dict[str, list[_Step]],
) -> Chain | str:
    """The chain that ends in `layer`, or why there is none."""
    began, shape = steps[layer][0].began, steps[layer][0].shape
    silenced = [name for name in _candidates(block, "", layer) if _only_before(steps.get(name, ()), began)]
    last = parts[layer]
    assert isinstance(last, nn.Conv2d)
    for attempt in range(2):
        held = {name: parts[name] for site in silenced for name in parts if name == site or name.startswith(f"{site}.")}
        convs = [part for part in held.values() if type(part) is nn.Conv2d]
        if not convs:
            return "it has a single convolution"
        found = _affordable(layer, silenced, last, held, steps, x, shape)
        if isinstance(found, str):
            return found
        fakes = _fakes(block, {**held, layer: last})
        silent = {parts[name]: _first for name in silenced}
        arrived: list[Tensor] = []
        with pretending(fakes):
            expected = again(block)
        with pretending({**silent, last: partial(_ending, arrived, fakes[last], shape)}):
            answered = _attempt(again, block)
        if not arrived or arrived[0].shape != x.shape or not torch.equal(arrived[0], x):
            return "what lies before its last convolution cannot all be taken away (an activation, padding, a branch)"
        if answered is not None and answered.shape == expected.shape and torch.allclose(answered, expected, atol=1e-5):
            return found
        if attempt:
            break
        with pretending(fakes):
            silenced = [name for name in silenced if not _matters(parts[name], again, block, expected)]
    return "what lies before its last convolution is used elsewhere too"


def _affordable(
    layer: str,
    silenced: Sequence[str],
    last: nn.Conv2d,
    held: dict[str, nn.Module],
    steps: dict[str, list[_Step]],
    x: Tensor,
    shape: tuple[int, ...],
) -> Chain | str:
    height, width = shape[-2:]
    stride = max(1, round(x.shape[-2] / height))
    cost, reach, largest = 0, 1, 1
    for name, part in {**held, layer: last}.items():
        if not isinstance(part, nn.Conv2d | nn.Linear) or name not in steps:
            continue
        for step in steps[name]:
            cost += part.weight[0].numel() * torch.Size(step.shape).numel() // len(x)
            if isinstance(part, nn.Conv2d) and (step.shape[-2] > 1 or x.shape[-2] == 1):
                wide = max(d * (k - 1) for k, d in zip(part.kernel_size, part.dilation, strict=True))
                reach, largest = reach + wide, max(largest, wide + 1)
    if any((size - 1) // stride + 1 != out for size, out in zip(x.shape[-2:], (height, width), strict=True)):
        return "its output is of a size that no single convolution gives"
    possible = range(largest + 1 - largest % 2, max(reach, largest) + 1, 2)
    if not possible:
        return "its largest kernel is even"
    found = Chain(layer, tuple(silenced), tuple(possible), stride, x.shape[1], last.out_channels, (height, width), cost)
    kernels = tuple(kernel for kernel in possible if found.cost(kernel) < cost)
    if not kernels:
        return f"one dense convolution costs {found.cost(possible[0]) / max(cost, 1):.2f} times what it replaces"
    return Chain(layer, found.silenced, kernels, stride, found.inputs, found.outputs, found.size, cost)


def _candidates(part: nn.Module, name: str, layer: str) -> list[str]:
    """The largest parts that do not hold `layer`, in order."""
    found: list[str] = []
    for child_name, child in part.named_children():
        full = f"{name}.{child_name}" if name else child_name
        if full == layer:
            continue
        if layer.startswith(f"{full}.") or isinstance(child, nn.ModuleList | nn.ModuleDict):
            found += _candidates(child, full, layer)
        else:
            found.append(full)
    return found


def _only_before(calls: Sequence[_Step], began: int) -> bool:
    return len(calls) == 1 and calls[0].single and 0 <= calls[0].ended < began


def _follow(block: nn.Module, parts: dict[str, nn.Module], again: Again, steps: dict[str, list[_Step]]) -> None:
    """Run the block and note when each part began and ended."""
    clock = [0]
    hooks = []

    def begin(name: str) -> Callable[..., None]:
        def note(part: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:  # noqa: ARG001
            clock[0] += 1
            single = len(args) == 1 and isinstance(args[0], Tensor) and not named
            steps.setdefault(name, []).append(_Step(clock[0], single=single))

        return note

    def end(name: str) -> Callable[..., None]:
        def note(part: nn.Module, args: Any, outputs: Any) -> None:  # noqa: ARG001
            clock[0] += 1
            step = steps[name][-1]
            step.ended, step.shape = clock[0], tuple(outputs.shape) if isinstance(outputs, Tensor) else ()

        return note

    for name, part in parts.items():
        hooks.append(part.register_forward_pre_hook(begin(name), with_kwargs=True))
        hooks.append(part.register_forward_hook(end(name)))
    try:
        again(block)
    finally:
        for hook in hooks:
            hook.remove()


def _fakes(block: nn.Module, parts: dict[str, nn.Module]) -> dict[nn.Module, Callable[..., Tensor]]:
    """Layers of `parts` answer with noise of their own, whatever comes in: nothing flows through them."""
    number = {part: position for position, part in enumerate(block.modules())}
    return {leaf: partial(_noise, leaf, number[leaf]) for leaf in plain_leaves(parts.values())}


def _noise(layer: nn.Module, seed: int, x: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or answer_shape(layer, x), generator=generator).to(x.dtype)


def _ending(arrived: list[Tensor], noise: Callable[..., Tensor], shape: tuple[int, ...], x: Tensor) -> Tensor:
    arrived.append(x.clone())
    return noise(x, shape)


def _first(x: Tensor) -> Tensor:
    return x


def _attempt(again: Again, block: nn.Module) -> Tensor | None:
    try:
        return again(block)
    except Exception:  # noqa: BLE001  shapes that do not fit: whatever was silenced is used elsewhere
        return None


def _matters(part: nn.Module, again: Again, block: nn.Module, expected: Tensor) -> bool:
    """True where the block's answer changes once `part` hands its input on."""
    was = part.__dict__.get("forward")
    part.forward = _first
    try:
        found = again(block)
    except Exception:  # noqa: BLE001  its own branch no longer fits together: that says nothing about the others
        return False
    finally:
        if was is None:
            del part.forward
        else:
            part.forward = was
    return found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-5)
