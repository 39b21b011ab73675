"""Operators on a network some of whose channels are ignored: sums skip them, statistics leave them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autocompress.models.labels import Call, Labels

SUMMED: Mapping[str, tuple[str, int]] = {
    "mm": ("self", 1),
    "bmm": ("self", 2),
    "addmm": ("mat1", 1),
    "addmm_": ("mat1", 1),
    "baddbmm": ("batch1", 2),
    "linear": ("input", -1),
    "convolution": ("input", 1),
    "_convolution": ("input", 1),
    "conv1d": ("input", 1),
    "conv2d": ("input", 1),
    "conv3d": ("input", 1),
}
"""Products: the argument and its axis over which they sum."""
REDUCED = ("mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm", "nansum",
           "prod", "logsumexp", "any", "all")  # fmt: skip


def compute(trace: Labels, call: Call) -> Any:
    """The operator's result without the channels that `trace.gone` marks."""
    if call.name in SUMMED:
        name, axis = SUMMED[call.name]
        tensor = call[name]
        axis %= tensor.dim()
        stay = _staying(trace, tensor, [axis]).get(axis)
        if stay is None:
            return call.run()
        mask = torch.zeros(tensor.shape[axis], dtype=tensor.dtype).index_fill_(0, stay, 1)
        return call.run(**{name: tensor * mask.view([-1 if at == axis else 1 for at in range(tensor.dim())])})
    if call.name in REDUCED:
        tensor = call.tensors()[0]
        given = call.get("dim")
        axes = range(tensor.dim()) if given is None or given == [] else given if isinstance(given, list) else [given]
        stays = _staying(trace, tensor, [axis % max(tensor.dim(), 1) for axis in axes])
        return call.run(self=_selected(tensor, stays)) if stays else call.run()
    if call.name.endswith("layer_norm") or call.name.endswith("rms_norm"):
        tensor, shape = call["input"], list(call["normalized_shape"])
        first = tensor.dim() - len(shape)
        stays = _staying(trace, tensor, range(first, tensor.dim()))
        own = {axis - first: stay for axis, stay in stays.items()}
        size = [len(own[at]) if at in own else length for at, length in enumerate(shape)]
        return _normed(call, tensor, stays, own, normalized_shape=size)
    if call.name == "native_group_norm":
        stays = _staying(trace, call["input"], [1])
        own = {0: stays[1]} if stays else {}
        return _normed(call, call["input"], stays, own, C=len(stays[1]) if stays else call["C"])
    if call.name.endswith("batch_norm") or "batch_norm_legit" in call.name:
        tensor = call["input"]
        return _normed(call, tensor, _staying(trace, tensor, [at for at in range(tensor.dim()) if at != 1]), {})
    return call.run()


def _staying(trace: Labels, tensor: Tensor, axes: Sequence[int] | range) -> dict[int, Tensor]:
    """Positions that stay, for those of `axes` that lose some."""
    assert trace.gone is not None
    labels = trace.axes(tensor)
    gone = {axis: trace.gone[labels[axis]] for axis in axes if axis in labels}
    return {axis: (~mask).nonzero().flatten() for axis, mask in gone.items() if bool(mask.any())}


def _selected(tensor: Tensor, stays: Mapping[int, Tensor]) -> Tensor:
    for axis, stay in stays.items():
        tensor = tensor.index_select(axis, stay)
    return tensor


def _normed(call: Call, tensor: Tensor, stays: Mapping[int, Tensor], own: Mapping[int, Tensor], **changes: Any) -> Any:
    """A normalisation of what stays; zero elsewhere."""
    if not stays:
        return call.run()
    for name in ("weight", "bias"):
        if call.get(name) is not None:
            changes[name] = _selected(call[name], own)
    found = call.run(input=_selected(tensor, stays), **changes)
    result = found[0] if isinstance(found, tuple | list) else found
    for axis, stay in stays.items():
        shape = [tensor.shape[at] if at == axis else size for at, size in enumerate(result.shape)]
        result = torch.zeros(shape, dtype=result.dtype).index_copy_(axis, stay, result)
    return (result, *found[1:]) if isinstance(found, tuple | list) else result
