"""What operators do to the labels of channels: move them, put them together, end them, or say that they must stay.

A rule gets the trace, the call and its output. Operators without a rule fix every label that they touch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from autocompress.models.labels import Call, Labels

Rule = Callable[["Labels", "Call", Any], None]

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a rule under the names of its operators."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return enter


def rule_of(call: Call) -> Rule:
    """The rule of an operator; in-place variants go by the name of the others."""
    found = RULES.get(call.name) or RULES.get(call.name.rstrip("_"))
    if found is not None:
        return found
    return pointwise if torch.Tag.pointwise in call.func.tags else unknown


def unknown(trace: Labels, call: Call, output: Any) -> None:  # noqa: ARG001
    """What we know nothing of keeps all its channels."""
    for tensor in call.tensors():
        for labels in trace.axes(tensor).values():
            trace.fix(labels, f"its channels go through {call.name}, which is not understood")


def _axis(axis: int, tensor: Tensor) -> int:
    return axis % max(tensor.dim(), 1)


def _axes(call: Call, tensor: Tensor) -> list[int]:
    """The axes a reduction sums over."""
    given = call.get("dim")
    if given is None or (isinstance(given, list | tuple) and not given):
        return list(range(tensor.dim()))
    return [_axis(axis, tensor) for axis in (given if isinstance(given, list | tuple) else [given])]


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
        return [_axis(axis, tensor) for axis in call["dims"]]
    if call.name == "transpose":
        one, other = _axis(call["dim0"], tensor), _axis(call["dim1"], tensor)
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
    tensor, axis = call["self"], _axis(call["dim"], call["self"])
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
    tensor, axis = call["self"], _axis(call["dim"], call["self"])
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
    tensor, axis = call["self"], _axis(call["dim"], call["self"])
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
    axis = _axis(call["dim"], output)
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
    for axis in [_axis(one, tensor) for one in call["dims"]]:
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


# --- sums over channels -----------------------------------------------------------------------------------------------


def _product(trace: Labels, one: Tensor, other: Tensor, output: Tensor) -> None:
    """(..., m, k) times (..., k, n): ends the labels on k."""
    left, right = trace.axes(one), trace.axes(other)
    inner = trace.join(left.get(one.dim() - 1), right.get(other.dim() - 2), "it is summed with what is not its own")
    if inner is not None and not (trace.is_weight(one) or trace.is_weight(other)):
        trace.fix(inner, "it is the inside of an attention's heads")
    found: dict[int, Tensor] = {}
    for axis in range(output.dim() - 2):
        if axis in left or axis in right:
            labels = trace.join(left.get(axis), right.get(axis), "its channels meet values that are not theirs")
            assert labels is not None
            found[axis] = labels
    for source, own, target in ((one, one.dim() - 2, output.dim() - 2), (other, other.dim() - 1, output.dim() - 1)):
        labels = trace.axes(source).get(own)
        if labels is not None:
            found[target] = labels
            if trace.is_weight(source):
                trace.produced.append(labels)
    trace.give(output, found, weight=trace.is_weight(one) and trace.is_weight(other))


@rule("mm", "bmm")
def multiplied(trace: Labels, call: Call, output: Tensor) -> None:
    """A matrix product."""
    _product(trace, call["self"], call["mat2"], output)


@rule("addmm", "baddbmm")
def multiplied_and_added(trace: Labels, call: Call, output: Tensor) -> None:
    """A matrix product and what is added to it."""
    one, other = (call["mat1"], call["mat2"]) if call.name.startswith("addmm") else (call["batch1"], call["batch2"])
    _product(trace, one, other, output)
    _added(trace, call["self"], output)


def _added(trace: Labels, bias: Tensor | None, output: Tensor, axis: int | None = None) -> None:
    """A bias on one axis (or aligned from behind) belongs to the output's channels."""
    if bias is None:
        return
    own = trace.axes(bias)
    for at in range(bias.dim()):
        target = output.dim() - bias.dim() + at if axis is None else axis
        if bias.shape[at] > 1:
            trace.join(own.get(at), trace.axes(output).get(target), "its channels meet values that are not theirs")


@rule("linear")
def linear(trace: Labels, call: Call, output: Tensor) -> None:
    """A linear layer that was not taken apart before it came here."""
    inputs, weight = call["input"], call["weight"]
    left, right = trace.axes(inputs), trace.axes(weight)
    trace.join(left.get(inputs.dim() - 1), right.get(1), "it is summed with what is not its own")
    found = {axis: labels for axis, labels in left.items() if axis < inputs.dim() - 1}
    if 0 in right:
        found[output.dim() - 1] = right[0]
        trace.produced.append(right[0])
    trace.give(output, found)
    _added(trace, call.get("bias"), output)


@rule("convolution", "_convolution", "mkldnn_convolution", "conv2d", "conv1d", "conv3d")
def convolved(trace: Labels, call: Call, output: Tensor) -> None:
    """Dense, grouped and depthwise convolutions, transposed ones without groups or depthwise."""
    inputs, weight, groups = call["input"], call["weight"], call["groups"]
    transposed, why = bool(call.get("transposed")), "it is summed with what is not its own"
    labels, own = trace.axes(inputs).get(1), trace.axes(weight)
    channels, made = inputs.shape[1], output.shape[1]
    for axis in (2, 3, 4):
        if axis in trace.axes(inputs):
            trace.fix(trace.axes(inputs)[axis], "it lies along an image's axis")
    if groups == 1:
        rows, columns = (1, 0) if transposed else (0, 1)
        if weight.shape[columns] > 1:
            trace.join(labels, own.get(columns), why)
        outer = own.get(rows)
    elif groups == channels and weight.shape[1] == (made // channels if transposed else 1):
        outer = own.get(0)
        if labels is not None:
            trace.counts("groups", labels)
        if transposed:
            if made != channels and outer is not None:
                trace.fix(outer, "a transposed depthwise convolution makes several channels of one")
            trace.join(labels, outer, why)
            outer = outer if made == channels else None
        else:
            trace.join(None if labels is None else labels.repeat_interleave(made // channels), outer, why)
    else:
        outer = None if transposed else own.get(0)
        name = trace.name(weight)
        if name and not transposed:
            inner = trace.place(name, 1, channels, groups)
            trace.join(labels, inner, why)
            trace.equal.append(inner.view(groups, -1))
        else:
            for stuck in (labels, *own.values()):
                if stuck is not None:
                    trace.fix(stuck, "the weights of a grouped convolution are not a plain parameter")
        if outer is not None:
            trace.equal.append(outer.view(groups, -1))
    found = {} if outer is None else {1: outer}
    if outer is not None:
        trace.produced.append(outer)
    trace.give(output, found)
    _added(trace, call.get("bias"), output, axis=1)


@rule("embedding")
def embedded(trace: Labels, call: Call, output: Tensor) -> None:
    """Rows of a table."""
    own = trace.axes(call["weight"])
    if 0 in own:
        trace.fix(own[0], "words are picked by number")
    if 1 in own:
        trace.produced.append(own[1])
        trace.give(output, {output.dim() - 1: own[1]})


@rule(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
def attended(trace: Labels, call: Call, output: Any) -> None:
    """Attention of (n, heads, length, size) tensors."""
    result = output[0]
    query, key, value = (trace.axes(call[name]) for name in ("query", "key", "value"))
    found: dict[int, Tensor] = {}
    for axis in (0, 1):
        if any(axis in axes for axes in (query, key, value)):
            labels = trace.join(query.get(axis), key.get(axis), "heads meet what has none")
            labels = trace.join(labels, value.get(axis), "heads meet what has none")
            assert labels is not None
            found[axis] = labels
    for axes in (query, key):
        if 3 in axes:
            trace.fix(axes[3], "it is the inside of an attention's heads")
    for axes in (key, value):
        if 2 in axes:
            trace.fix(axes[2], "it lies along a sequence")
    found |= {axis: axes[axis] for axis, axes in ((2, query), (3, value)) if axis in axes}
    mask = call.get("attn_mask") if call.get("attn_mask") is not None else call.get("attn_bias")
    if mask is not None:
        for axis, labels in trace.axes(mask).items():
            trace.join(labels, found.get(axis + 4 - mask.dim()), "heads meet what has none")
    trace.give(result, found)


# --- reductions, normalisation ----------------------------------------------------------------------------------------


@rule(
    "mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm", "prod",
    "logsumexp", "any", "all", "nansum",
)  # fmt: skip
def reduced(trace: Labels, call: Call, output: Any) -> None:
    """Labels end on the axes that go."""
    tensor = call.tensors()[0]
    gone = _axes(call, tensor)
    axes = trace.axes(tensor)
    kept = [axis for axis in range(tensor.dim()) if axis not in gone]
    order = {axis: axis if call.get("keepdim") else new for new, axis in enumerate(kept)}
    for result in output if isinstance(output, tuple | list) else (output,):
        trace.give(result, {order[axis]: axes[axis] for axis in kept if axis in axes}, weight=trace.is_weight(tensor))


@rule("max", "min", "argmax", "argmin", "cummax", "topk", "sort")
def ranked(trace: Labels, call: Call, output: Any) -> None:
    """Like a reduction where the axis has no channels, else not understood."""
    tensor = call.tensors()[0]
    if len(call.tensors()) > 1:
        pointwise(trace, call, output)
    elif call.get("dim") is None or _axis(call["dim"], tensor) in trace.axes(tensor):
        unknown(trace, call, output)
    elif call.name in ("cummax", "topk", "sort"):
        for result in output:
            trace.give(result, trace.axes(tensor))
    else:
        reduced(trace, call, output)


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax", "cumsum", "cumprod", "logcumsumexp")
def shared_out(trace: Labels, call: Call, output: Tensor) -> None:
    """Shares along an axis: what lies on it must stay."""
    tensor = call["self"]
    axes = dict(trace.axes(tensor))
    labels = axes.pop(_axis(call["dim"], tensor), None)
    if labels is not None:
        trace.fix(labels, f"{call.name} runs over its channels")
    trace.give(output, axes, weight=trace.is_weight(tensor))


@rule("native_layer_norm", "rms_norm", "_fused_rms_norm", "layer_norm")
def layer_normed(trace: Labels, call: Call, output: Any) -> None:
    """Statistics over the last axes, a weight and a bias for each position."""
    tensor, shape = call["input"], call["normalized_shape"]
    axes = trace.axes(tensor)
    affine = [one for one in (call.get("weight"), call.get("bias")) if one is not None]
    for own in range(len(shape)):
        axis = tensor.dim() - len(shape) + own
        for one in affine:
            if one.shape[own] > 1:
                trace.join(trace.axes(one).get(own), axes.get(axis), "it is normalised with what is not its own")
        if axis in axes and (not affine or not trace.name(affine[0])):
            if len(shape) == 1:
                trace.counts("normalized_shape", axes[axis])
            else:
                trace.fix(axes[axis], "it is normalised together with an image's axes")
    trace.give(output[0] if isinstance(output, tuple | list) else output, axes, weight=trace.is_weight(tensor))


@rule("native_group_norm", "group_norm")
def group_normed(trace: Labels, call: Call, output: Any) -> None:
    """Statistics over groups of channels, which stay equally large."""
    tensor, groups = call["input"], call.get("group") or call["num_groups"]
    axes = trace.axes(tensor)
    affine = [one for one in (call.get("weight"), call.get("bias")) if one is not None]
    for one in affine:
        trace.join(trace.axes(one).get(0), axes.get(1), "it is normalised with what is not its own")
    if 1 in axes:
        if groups > 1:
            trace.equal.append(axes[1].view(groups, -1))
        if not affine:
            trace.counts("num_channels", axes[1])
    trace.give(output[0] if isinstance(output, tuple | list) else output, axes)


@rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "_batch_norm_impl_index", "_batch_norm_with_update", "_batch_norm_no_update", "batch_norm",
    "_native_batch_norm_legit_functional",
)  # fmt: skip
def batch_normed(trace: Labels, call: Call, output: Any) -> None:
    """Statistics of each channel (also of weights that are standardised so)."""
    tensor = call["input"]
    axes = trace.axes(tensor)
    own = [call.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    for one in own:
        if one is not None and one.numel() > 1:
            trace.join(trace.axes(one).get(0), axes.get(1), "it is normalised with what is not its own")
    if 1 in axes and all(one is None for one in own):
        inside = trace.inside()
        if inside is not None and getattr(inside[1], "num_features", None) == len(axes[1]):
            trace.counts("num_features", axes[1])
    weight = trace.is_weight(tensor)
    trace.give(output[0] if isinstance(output, tuple | list) else output, axes, weight=weight)


@rule("glu")
def gated(trace: Labels, call: Call, output: Tensor) -> None:
    """Half of the channels times the sigmoid of the other half (Dauphin et al. 2017)."""
    tensor = call["self"]
    axes, axis = dict(trace.axes(tensor)), _axis(call["dim"], tensor)
    if axis in axes:
        one, other = axes[axis].chunk(2)
        trace.edges.append((one, other))
        axes[axis] = one
    trace.give(output, axes)


# --- images -----------------------------------------------------------------------------------------------------------


SPATIAL = re.compile(r"(pool|upsample|reflection_pad|replication_pad|grid_sampler|unfold)")


def spatial(trace: Labels, call: Call, output: Any) -> None:
    """Pooling, resizing, padding: nothing happens on the axes of samples and channels."""
    result = output[0] if isinstance(output, tuple | list) else output
    tensor = call.tensors()[0]
    digits = re.findall(r"(\d)d", call.name)
    leading = tensor.dim() - (int(digits[0]) if digits else 2)
    found: dict[int, Tensor] = {}
    for axis, labels in trace.axes(tensor).items():
        if axis < leading and axis < result.dim() and result.shape[axis] == len(labels):
            found[axis] = labels
        else:
            trace.fix(labels, f"it lies along an axis that {call.name} changes")
    for other in call.tensors()[1:]:
        for labels in trace.axes(other).values():
            trace.fix(labels, f"{call.name} computes positions from it")
    trace.give(result, found)


for _names in (
    [f"{kind}_pool{n}d" for kind in ("avg", "adaptive_avg", "_adaptive_avg", "max") for n in (1, 2, 3)],
    [f"{kind}max_pool{n}d" for kind in ("adaptive_", "fractional_") for n in (2, 3)],
    [f"max_pool{n}d_with_indices" for n in (2, 3)],
    [f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "bicubic2d",
                                     "trilinear3d")],
    [f"_upsample_{kind}" for kind in ("nearest_exact1d", "nearest_exact2d", "nearest_exact3d", "bilinear2d_aa",
                                      "bicubic2d_aa")],
    [f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)],
    ["grid_sampler_2d", "grid_sampler_3d"],
):  # fmt: skip
    RULES.update(dict.fromkeys(_names, spatial))
