"""What operators do to the labels of channels, second part: sums over channels end them, statistics tie them."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from autocompress.models.labelrules import RULES, Rule, axis_of, pointwise, rule, unknown
from autocompress.models.labels import Call, Labels


def rule_of(call: Call) -> Rule:
    """The rule of an operator; in-place variants go by the name of the others."""
    found = RULES.get(call.name) or RULES.get(call.name.rstrip("_"))
    if found is not None:
        return found
    return pointwise if torch.Tag.pointwise in call.func.tags else unknown


def _axes(call: Call, tensor: Tensor) -> list[int]:
    """The axes a reduction sums over."""
    given = call.get("dim")
    if given is None or (isinstance(given, list | tuple) and not given):
        return list(range(tensor.dim()))
    return [axis_of(axis, tensor) for axis in (given if isinstance(given, list | tuple) else [given])]


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
    elif call.get("dim") is None or axis_of(call["dim"], tensor) in trace.axes(tensor):
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
    labels = axes.pop(axis_of(call["dim"], tensor), None)
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
    axes, axis = dict(trace.axes(tensor)), axis_of(call["dim"], tensor)
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
