"""What operators do to the labels of channels, first part: element by element, and moving about.

A rule gets the trace, the call and its output. Operators without a rule fix every label that they touch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autocompress.models.labels import Call, Labels

Rule = Callable[[Labels, Call, Any], None]

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a rule under the names of its operators."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return enter


def unknown(trace: Labels, call: Call, output: Any) -> None:  # noqa: ARG001
    """What we know nothing of keeps all its channels."""
    for tensor in call.tensors():
        for labels in trace.axes(tensor).values():
            trace.fix(labels, f"its channels go through {call.name}, which is not understood")


def axis_of(axis: int, tensor: Tensor) -> int:
    """An axis counted from the front."""
    return axis % max(tensor.dim(), 1)


# --- element by element -----------------------------------------------------------------------------------------------


@rule("copy_", "native_dropout", "fill", "hardswish", "hardtanh", "_prelu_kernel", "bernoulli", "rrelu_with_noise")
def pointwise(trace: Labels, call: Call, output: Any) -> None:
    """Channels that meet belong together; broadcasting meets nothing."""
    result = output[0] if isinstance(output, tuple | list) else output
    found: dict[int, Tensor] = {}
    operands = [one for one in call.tensors() if one.dim()]
    for axis, size in enumerate(result.shape):
        here: list[Tensor | None] = []
        for operand in operands:
            own = axis - result.dim() + operand.dim()
            if own >= 0 and operand.shape[own] == size and size > 1:
                here.append(trace.axes(operand).get(own))
        labels = next((one for one in here if one is not None), None)
        if labels is not None:
            for one in here:
                trace.join(one, labels, f"its channels meet values that are not theirs in {call.name}")
            found[axis] = labels
    if found:
        trace.give(result, found, weight=all(trace.is_weight(one) for one in operands))


@rule(
    "clone", "detach", "alias", "_to_copy", "contiguous", "lift_fresh", "lift_fresh_copy", "lift", "positive",
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "zero", "normal", "uniform",
    "dropout", "_to_dense", "to", "_reshape_alias_copy",
)  # fmt: skip
def same(trace: Labels, call: Call, output: Any) -> None:
    """As it comes in."""
    tensor = call.tensors()[0]
    trace.give(output, trace.axes(tensor), weight=trace.is_weight(tensor))


# --- moving about -----------------------------------------------------------------------------------------------------


@rule(
    "new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided", "_local_scalar_dense", "equal", "is_nonzero"
)
def fresh(trace: Labels, call: Call, output: Any) -> None:
    """Nothing of the channels is in the result."""


@rule("as_strided", "resize_as")
def restrided(trace: Labels, call: Call, output: Tensor) -> None:
    """Memory laid out another way; understood where the shape stays."""
    if tuple(call["size"]) == tuple(call["self"].shape):
        same(trace, call, output)
    else:
        unknown(trace, call, output)


@rule("permute", "transpose", "t", "unsqueeze", "squeeze", "expand")
def moved(trace: Labels, call: Call, output: Tensor) -> None:
    """Axes change places."""
    tensor = call.tensors()[0]
    if call.name.endswith("_"):  # in place: the shape from before is gone
        unknown(trace, call, output)
        return
    order = _order(call, tensor, output)
    axes = trace.axes(tensor)
    found = {new: axes[old] for new, old in enumerate(order) if old in axes}
    trace.give(output, found, weight=trace.is_weight(tensor))


def _order(call: Call, tensor: Tensor, output: Tensor) -> list[int]:
    """Which old axis each new axis was, -1 for none."""
    order = list(range(tensor.dim()))
    if call.name == "t":
        return order[::-1]
    if call.name == "permute":
        return [axis_of(axis, tensor) for axis in call["dims"]]
    if call.name == "transpose":
        one, other = axis_of(call["dim0"], tensor), axis_of(call["dim1"], tensor)
        order[one], order[other] = order[other], order[one]
    elif call.name == "unsqueeze":
        order.insert(call["dim"] % (tensor.dim() + 1), -1)
    elif call.name == "expand":
        order = [-1] * (output.dim() - tensor.dim()) + order
    else:  # squeeze: axes of size 1 have no labels, the others stay in order
        left = iter(axis for axis in order if tensor.shape[axis] > 1)
        return [next(left) if size > 1 else -1 for size in output.shape]
    return order


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "view_copy")
def reshaped(trace: Labels, call: Call, output: Tensor) -> None:
    """Axes merge, or split: then one of the new axes follows the number of channels and the others stay as they are.

    It is the longest: groups and heads are fewer than what is in them. Channels that differ only along the others are
    put together, so that whatever is kept can still be split the same way and stands in the same order behind it.
    """
    tensor = call.tensors()[0]
    if call.name == "view" and not isinstance(call.get("size"), list | tuple):
        return same(trace, call, output)  # a view as another type
    old, new = tuple(tensor.shape), tuple(output.shape)
    found: dict[int, Tensor] = {}
    for axis, labels in trace.axes(tensor).items():
        size, inner = old[axis], math.prod(old[axis + 1 :])
        aligned = [at for at, n in enumerate(new) if n == size and math.prod(new[at + 1 :]) == inner]
        if aligned:
            target, moved_labels = aligned[0], labels
            trace.reshaped(labels)
        else:
            shape = [size if at == axis else 1 for at in range(len(old))]
            spread = labels.view(shape).expand(old).reshape(new)
            target, moved_labels = _tied(trace, spread)
        if target in found:
            trace.fix(found.pop(target), "an axis merges two kinds of channels")
            trace.fix(labels, "an axis merges two kinds of channels")
        elif target >= 0:
            found[target] = moved_labels
    trace.give(output, found, weight=trace.is_weight(tensor))
    return None


def _varying(spread: Tensor) -> tuple[list[int], Tensor]:
    """The axes along which labels differ, and the labels with the other axes cut to 1."""
    for axis in range(spread.dim()):
        first = spread.narrow(axis, 0, 1)
        if bool((spread == first).all()):
            spread = first
    return [axis for axis, size in enumerate(spread.shape) if size > 1], spread


def _tied(trace: Labels, spread: Tensor) -> tuple[int, Tensor]:
    """The one axis on which labels stand after a reshape (-1: none is left)."""
    varying, labels = _varying(spread)
    if not varying:
        return -1, labels
    inside = trace.inside()
    groups = getattr(inside[1], "groups", 0) if inside else 0
    free = [axis for axis in varying if labels.shape[axis] != groups] or varying
    longest = max(free, key=lambda axis: (labels.shape[axis], -axis))
    rows = labels.movedim(longest, 0).flatten(1)
    if rows.shape[1] > 1:
        trace.edges.append((rows[:, :1].expand_as(rows[:, 1:]).flatten(), rows[:, 1:].flatten()))
        trace.reshaped(rows[:, 0])
    return longest, rows[:, 0]


@rule("index", "repeat", "tile", "masked_select", "index_select", "take_along_dim")
def picked(trace: Labels, call: Call, output: Tensor) -> None:
    """Positions are picked by number: of axes without channels freely, of others they must stay."""
    tensor = call.tensors()[0]
    found: dict[int, Tensor] = {}
    for axis, labels in trace.axes(tensor).items():
        shape = [size if at == axis else 1 for at, size in enumerate(tensor.shape)]
        varying, spread = _varying(call.run(self=labels.view(shape).expand(tensor.shape)))
        whole = len(varying) == 1 and spread.numel() == len(labels) and bool((spread.flatten() == labels).all())
        if whole and varying[0] not in found:
            found[varying[0]] = labels
        else:
            trace.fix(labels, f"its channels are picked by number in {call.name}")
    for other in call.tensors()[1:]:
        for labels in trace.axes(other).values():
            trace.fix(labels, f"its channels are picked by number in {call.name}")
    trace.give(output, found, weight=trace.is_weight(tensor))


@rule("select")
def selected(trace: Labels, call: Call, output: Tensor) -> None:
    """One position of an axis."""
    tensor, axis = call["self"], axis_of(call["dim"], call["self"])
    axes = trace.axes(tensor)
    if axis in axes:
        trace.fix(axes[axis], "one of its channels is picked by number")
    trace.give(
        output,
        {at - (at > axis): labels for at, labels in axes.items() if at != axis},
        weight=trace.is_weight(tensor),
    )


@rule("slice", "narrow")
def sliced(trace: Labels, call: Call, output: Tensor) -> None:
    """A stretch of an axis; half of the channels stays half of them."""
    tensor, axis = call["self"], axis_of(call["dim"], call["self"])
    axes = dict(trace.axes(tensor))
    if axis in axes and output.shape[axis] < tensor.shape[axis]:
        labels = axes[axis]
        axes[axis] = part = call.run(self=labels, dim=0)
        if call.get("step") in (None, 1):
            rest = labels[~torch.isin(labels, part)]
            if len(rest) == len(part):
                trace.equal.append(torch.stack([part, rest]))
        else:
            trace.fix(labels, "every other channel is picked")
    trace.give(output, axes, weight=trace.is_weight(tensor))


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "unbind", "tensor_split")
def parted(trace: Labels, call: Call, output: Sequence[Tensor]) -> None:
    """Several stretches of an axis, equally long ones stay so."""
    tensor, axis = call["self"], axis_of(call["dim"], call["self"])
    axes = dict(trace.axes(tensor))
    single = call.name == "unbind"
    labels = axes.pop(axis, None)
    if labels is not None and single:
        trace.fix(labels, "its channels are picked by number")
        labels = None
    sizes = [1 if single else part.shape[axis] for part in output]
    pieces = [None] * len(output) if labels is None else list(labels.split(sizes))
    if labels is not None and len(sizes) > 1:
        if len(set(sizes)) == 1:
            trace.equal.append(labels.view(len(sizes), -1))
        else:
            trace.fix(labels, "its channels are split unevenly")
    for part, piece in zip(output, pieces, strict=True):
        here = {at - (single and at > axis): one for at, one in axes.items()}
        if piece is not None and len(piece) > 1:
            here[axis] = piece
        elif piece is not None:
            trace.fix(piece, "its channels are picked one by one")
        trace.give(part, here, weight=trace.is_weight(tensor))


@rule("cat", "concat", "stack")
def joined(trace: Labels, call: Call, output: Tensor) -> None:
    """Side by side along one axis, together along the others."""
    tensors = [one for one in call["tensors"] if one.dim() > 1 or one.numel()]  # cat skips empty ones
    axis = axis_of(call["dim"], output)
    stacked = call.name == "stack"
    found: dict[int, Tensor] = {}
    for at in range(output.dim()):
        if stacked and at == axis:
            continue
        own = at - (stacked and at > axis)
        here = [trace.axes(one).get(own) for one in tensors]
        if all(labels is None for labels in here):
            continue
        if at == axis:
            found[at] = torch.cat(
                [
                    torch.zeros(one.shape[at], dtype=torch.long) if labels is None else labels
                    for one, labels in zip(tensors, here, strict=True)
                ]
            )
            continue
        first = next(labels for labels in here if labels is not None)
        for labels in here:
            trace.join(labels, first, "its channels stand beside values that are not theirs")
        found[at] = first
    trace.give(output, found, weight=all(trace.is_weight(one) for one in tensors))


@rule("constant_pad_nd", "pad")
def padded(trace: Labels, call: Call, output: Tensor) -> None:
    """Positions without a channel before and after."""
    tensor, pad = call["self"], list(call["pad"])
    found: dict[int, Tensor] = {}
    for axis, labels in trace.axes(tensor).items():
        at = 2 * (tensor.dim() - 1 - axis)
        widths = pad[at : at + 2]
        found[axis] = torch.nn.functional.pad(labels, widths) if any(widths) else labels
    trace.give(output, found, weight=trace.is_weight(tensor))


@rule("roll", "flip")
def turned(trace: Labels, call: Call, output: Tensor) -> None:
    """Another order along some axes."""
    tensor = call["self"]
    found = dict(trace.axes(tensor))
    for axis in [axis_of(one, tensor) for one in call["dims"]]:
        if axis in found:
            trace.fix(found.pop(axis), f"its channels are reordered by {call.name}")
    trace.give(output, found, weight=trace.is_weight(tensor))


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "im2col", "col2im")
def regrouped(trace: Labels, call: Call, output: Tensor) -> None:
    """Channels to pixels and back (Shi et al. 2016), shuffles (Zhang et al. 2018), patches."""
    tensor = call["self"]
    axis = tensor.dim() - 3 if call.name.startswith("pixel") or call.name == "im2col" else 1
    labels = trace.axes(tensor).get(axis)
    for at, other in trace.axes(tensor).items():
        if at > axis:
            trace.fix(other, f"goes through {call.name}")
    if labels is None:
        return
    if call.name in ("pixel_unshuffle", "im2col"):
        repeats = output.shape[axis] // len(labels)
        trace.give(output, {axis: labels.repeat_interleave(repeats)})
        return
    if call.name in ("pixel_shuffle", "col2im"):
        rows = labels.view(output.shape[axis], -1)
    else:
        rows = labels.view(call["groups"], -1).T
    trace.edges.append((rows[:, :1].expand_as(rows).flatten(), rows.flatten()))
    first = rows[:, 0]
    trace.give(
        output,
        {
            axis: first.repeat_interleave(len(labels) // len(first))
            if "shuffle" in call.name[6:] and call.name.endswith("channel_shuffle")
            else first
        },
    )
