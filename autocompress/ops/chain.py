"""A layer as a chain of thinner ones: what a low-rank receipt says, obeyed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from autocompress.types import Record, UserError

Method = Literal["svd", "spatial", "tucker"]
Layer = nn.Conv2d | nn.Conv1d | nn.Linear


class Split(Record):
    """A layer (`shape` of its weight) becomes a chain with `rank` channels before its last layer.

    A chain of three (`tucker`) has `inner` channels after its first.
    """

    layer: str
    shape: tuple[int, ...]
    rank: int
    method: Method = "svd"
    inner: int = 0


def full_ranks(shape: Sequence[int], method: Method) -> tuple[int, ...]:
    """Most channels between the layers of a chain: before the last, and for `tucker` after the first."""
    outputs, inputs, *kernel = shape
    if method == "spatial":
        return (min(outputs * kernel[1], inputs * kernel[0]),)
    if method == "tucker":
        area = math.prod(kernel)
        return min(outputs, inputs * area), min(inputs, outputs * area)
    return (min(outputs, math.prod(shape[1:])),)


def strides(layer: Layer) -> tuple[int, ...]:
    """Strides along height and width, 1 for a linear layer."""
    return (1, 1) if isinstance(layer, nn.Linear) else tuple(layer.stride)


def cost(split: Split, stride: Sequence[int] = (1, 1)) -> int:
    """Multiply-adds of the chain per output position; layers before the stride see more positions than the output."""
    outputs, inputs, *kernel = split.shape
    if split.method == "spatial":
        return split.rank * (inputs * kernel[0] * stride[1] + outputs * kernel[1])
    if split.method == "tucker":
        core = split.rank * split.inner * math.prod(kernel)
        return inputs * split.inner * math.prod(stride) + core + outputs * split.rank
    return split.rank * (inputs * math.prod(kernel) + outputs)


def put(module: nn.Module, name: str, part: nn.Module) -> None:
    """Set a submodule by its full name."""
    holder, _, child = name.rpartition(".")
    setattr(module.get_submodule(holder), child, part)


def difference(module: nn.Module, split: Split) -> str:
    """Why `split` does not fit `module`, empty where it does."""
    try:
        layer = module.get_submodule(split.layer)
    except AttributeError:
        return f"it splits layer {split.layer}, which is not there"
    if not isinstance(layer, Layer):
        return f"it splits layer {split.layer}, which is a {type(layer).__name__} here"
    if not isinstance(layer, nn.Linear) and layer.groups > 1:
        return f"it splits layer {split.layer}, which has {layer.groups} groups here"
    shape = tuple(layer.weight.shape)
    if shape != split.shape:
        return f"the weight of {split.layer} is {shape} here and was {split.shape} there"
    if split.method != "svd" and len(shape) != 4:
        return f"{split.layer} is a {type(layer).__name__}, which has no {split.method} split"
    full = full_ranks(shape, split.method)
    asked = (split.rank, split.inner)[: len(full)]
    for rank, most in zip(asked, full, strict=True):
        if not 1 <= rank <= most:
            return f"rank {rank} of {split.layer} is not between 1 and {most}"
    return ""


def thin(layer: Layer, split: Split) -> nn.Sequential:
    """The chain in place of a layer, zero-filled: every axis keeps its stride, padding and dilation, the last the bias.

    `svd`: the first layer has the kernel. `spatial`: the first has the rows', the second the columns'. `tucker`: the
    second has the kernel. Layers before the last have no bias: a padding of zeros then means the same to all.
    """
    biased = layer.bias is not None
    if isinstance(layer, nn.Linear):
        chain: list[nn.Module] = [
            nn.utils.skip_init(nn.Linear, layer.in_features, split.rank, bias=False),
            nn.utils.skip_init(nn.Linear, split.rank, layer.out_features, bias=biased),
        ]
    else:
        every = tuple(range(len(layer.kernel_size)))
        axes = {"svd": (every, ()), "spatial": ((0,), (1,)), "tucker": ((), every, ())}[split.method]
        between = (split.inner, split.rank) if split.method == "tucker" else (split.rank,)
        widths = pairwise((layer.in_channels, *between, layer.out_channels))
        last = len(axes) - 1
        chain = [
            _convolution(layer, inputs, outputs, along, bias=biased and place == last)
            for place, (along, (inputs, outputs)) in enumerate(zip(axes, widths, strict=True))
        ]
    whole = nn.Sequential(*chain).to(device=layer.weight.device, dtype=layer.weight.dtype).train(layer.training)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.zero_()
            parameter.requires_grad_(layer.weight.requires_grad)
    return whole


def _convolution(
    layer: nn.Conv2d | nn.Conv1d, inputs: int, outputs: int, axes: Sequence[int], *, bias: bool
) -> nn.Module:
    """A convolution with `layer`'s kernel, stride, padding and dilation along `axes`, of kernel 1 along the others."""

    def along(values: Sequence[int], otherwise: int) -> tuple[int, ...]:
        return tuple(value if axis in axes else otherwise for axis, value in enumerate(values))

    return nn.utils.skip_init(
        nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Conv1d,
        inputs,
        outputs,
        along(layer.kernel_size, 1),
        stride=along(layer.stride, 1),
        padding=layer.padding if isinstance(layer.padding, str) else along(layer.padding, 0),
        dilation=along(layer.dilation, 1),
        bias=bias,
        padding_mode=layer.padding_mode if axes else "zeros",
    )


def fill(chain: nn.Sequential, split: Split, tensors: Mapping[str, Tensor], site: str) -> None:
    """Copy a receipt's tensors into a chain. Raises UserError where one is missing or of another shape."""
    with torch.no_grad():
        for name, parameter in chain.named_parameters():
            key = f"{split.layer}/{name}"
            if key not in tensors:
                raise UserError(f"lowrank at site {site}: tensor {key!r} is missing; give the receipt's own")
            if tensors[key].shape != parameter.shape:
                raise UserError(
                    f"lowrank at site {site}: tensor {key!r} is {tuple(tensors[key].shape)}, "
                    f"not {tuple(parameter.shape)}; give the receipt's own tensors"
                )
            parameter.copy_(tensors[key])
