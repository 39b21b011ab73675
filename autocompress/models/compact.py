"""Cheaper forms of a dense k x k convolution, the shapes alone: separable, shuffle, bottleneck, smaller.

Separable: a depthwise and a 1x1 convolution (Howard et al. 2017, "MobileNets", section 3.1). Shuffle: a channel shuffle
and a grouped convolution (Zhang et al. 2018, "ShuffleNet", section 3.1). Bottleneck: 1x1 to a quarter of the channels,
k x k, 1x1 (He et al. 2016, section 4.1; linear in between). Smaller: two taps less per axis, the middle kept.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autocompress.models.blocks import GROUPS, ShuffledConv
from autocompress.types import Record

Kind = Literal["separable", "shuffle", "bottleneck", "smaller"]
KINDS: tuple[Kind, ...] = ("separable", "shuffle", "bottleneck", "smaller")
SHARE = 4
"""A bottleneck has one in so many channels."""


class Form(Record):
    """What takes the place of the convolution `layer`, whose weight is `shape` (outputs, inputs, height, width).

    `kernel` and `padding` are those of its own k x k part, `groups` a shuffle's, `inner` a bottleneck's channels.
    """

    layer: str
    kind: Kind
    shape: tuple[int, int, int, int]
    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]
    padding_mode: str
    kernel: tuple[int, int]
    groups: int = 1
    inner: tuple[int, int] = (0, 0)

    @property
    def cost(self) -> float:
        """Multiply-adds, as a share of the layer's."""
        outputs, inputs, height, width = self.shape
        taps = self.kernel[0] * self.kernel[1]
        if self.kind == "separable":
            spent = inputs * taps + inputs * outputs
        elif self.kind == "bottleneck":
            first, second = self.inner  # the first works before the stride
            spent = inputs * first * self.stride[0] * self.stride[1] + first * second * taps + second * outputs
        else:
            spent = outputs * inputs * taps // self.groups
        return spent / (outputs * inputs * height * width)


def form(layer: nn.Module, name: str, kind: Kind, multiple: int = 1) -> Form | str:
    """The form that a layer can take, or why it cannot. A bottleneck's channels are rounded to `multiple`."""
    if type(layer) is not nn.Conv2d:
        return f"{name} is a {type(layer).__name__}, no plain convolution"
    if layer.groups > 1:
        return f"{name} has groups already"
    if max(layer.kernel_size) == 1:
        return f"{name} is a 1x1 convolution"
    outputs, inputs, height, width = layer.weight.shape
    kernel, padding, groups, inner = (height, width), layer.padding, 1, (0, 0)
    padding = padding if isinstance(padding, str) else (padding[0], padding[1])
    if kind == "shuffle":
        groups = next((number for number in (GROUPS, 2) if inputs % number == outputs % number == 0), 1)
        if groups == 1:
            return f"{name} has {inputs} and {outputs} channels, which no shuffle divides"
    elif kind == "bottleneck":
        inner = (rounded(inputs / SHARE, multiple), rounded(outputs / SHARE, multiple))
    elif kind == "smaller":
        kernel = (max(height - 2, 1), max(width - 2, 1))
        less = [(was - now) // 2 * step for was, now, step in zip((height, width), kernel, layer.dilation, strict=True)]
        if any((was - now) % 2 for was, now in zip((height, width), kernel, strict=True)):
            return f"{name} is {height} x {width}, which has no middle"
        if not isinstance(padding, str):
            padding = (padding[0] - less[0], padding[1] - less[1])
        if padding == "valid" or (not isinstance(padding, str) and min(padding) < 0):
            return f"{name} has too little padding for a smaller kernel with the same output size"
    found = Form(
        layer=name,
        kind=kind,
        shape=(outputs, inputs, height, width),
        stride=_pair(layer.stride),
        padding=padding,
        dilation=_pair(layer.dilation),
        padding_mode=layer.padding_mode,
        kernel=kernel,
        groups=groups,
        inner=inner,
    )
    return found if found.cost < 1 else f"{kind} costs {found.cost:.2f} times {name}"


def forms(layer: nn.Module) -> tuple[Kind, ...]:
    """The kinds of form that a layer can take."""
    return tuple(kind for kind in KINDS if isinstance(form(layer, "it", kind), Form))


def make(found: Form, like: nn.Conv2d) -> nn.Module:
    """The form as a module, zero-filled, of the type and mode of `like`; its last convolution has a bias."""
    outputs, inputs = found.shape[:2]
    spatial = {
        "kernel_size": found.kernel,
        "stride": found.stride,
        "padding": found.padding,
        "dilation": found.dilation,
        "padding_mode": found.padding_mode,
    }
    if found.kind == "separable":
        made: nn.Module = nn.Sequential(
            _conv(inputs, inputs, groups=inputs, bias=False, **spatial), _conv(inputs, outputs, kernel_size=1)
        )
    elif found.kind == "shuffle":
        made = ShuffledConv(_conv(inputs, outputs, groups=found.groups, **spatial))
    elif found.kind == "bottleneck":
        first, second = found.inner
        made = nn.Sequential(
            _conv(inputs, first, kernel_size=1, bias=False),
            _conv(first, second, bias=False, **spatial),
            _conv(second, outputs, kernel_size=1),
        )
    else:
        made = _conv(inputs, outputs, **spatial)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    return made.to(like.weight).train(like.training)


def spread(found: Form, parts: dict[str, Tensor]) -> Tensor:
    """The dense weight (outputs, inputs * height * width) that a form's weights stand for."""
    outputs, inputs, height, width = found.shape
    if found.kind == "separable":
        depthwise, pointwise = parts["0.weight"], parts["1.weight"]
        return (pointwise.flatten(1)[:, :, None] * depthwise.flatten(1)).flatten(1)
    if found.kind == "bottleneck":
        reduce, middle, expand = (parts[f"{number}.weight"] for number in range(3))
        inner = torch.einsum("bahw,ac->bchw", middle, reduce.flatten(1))
        return expand.flatten(1) @ inner.flatten(1)
    weight = parts["1.weight" if found.kind == "shuffle" else "weight"]
    dense = weight.new_zeros(outputs, inputs, height, width)
    flat = dense.flatten(1)
    for rows, columns in support(found):
        flat[rows[:, None], columns] = weight[rows].flatten(1)
    return flat


def support(found: Form) -> list[tuple[Tensor, Tensor]]:
    """Of a shuffle or a smaller kernel: outputs, and the dense columns (channel, row, column) that they read."""
    outputs, inputs, height, width = found.shape
    columns = torch.arange(inputs * height * width).reshape(inputs, height, width)
    top, left = (height - found.kernel[0]) // 2, (width - found.kernel[1]) // 2
    columns = columns[:, top : top + found.kernel[0], left : left + found.kernel[1]]
    size = outputs // found.groups
    return [
        (torch.arange(group * size, (group + 1) * size), columns[group :: found.groups].flatten())
        for group in range(found.groups)
    ]


def rounded(target: float, multiple: int) -> int:
    """The nearest multiple of `multiple`, or of 1 where that would be none."""
    return math.floor(target / multiple + 0.5) * multiple or max(1, math.floor(target + 0.5))


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    return values[0], values[1]


def _conv(inputs: int, outputs: int, **settings: Any) -> nn.Conv2d:
    made: Any = nn.utils.skip_init(nn.Conv2d, inputs, outputs, **settings)
    return made
