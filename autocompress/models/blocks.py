"""The parts of the convolutional family: slots (one 'convolution' in one of several forms), blocks, the network.

A slot keeps its name whatever its form: `stages.0.1.conv1` is a Conv2d in a plain or residual stage and a Sequential
of two in a separable or shuffle stage, so a policy's site stays a prefix of the leaves it speaks of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KINDS = ("residual", "plain", "separable", "shuffle")
GROUPS = 4
"""Groups of a shuffle slot."""
CELL = GROUPS * GROUPS
"""Widths around a shuffle slot are multiples of this, so that every group reads equally from every group before it."""


class Shuffle(nn.Module):
    """Channel q goes to group q mod `groups`: (N, C, H, W) to (N, C, H, W), C a multiple of `groups`.

    After ShuffleNet (Zhang et al. 2018, section 3.1). It holds no channel count, so pruning need not touch it.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        _, channels, height, width = x.shape
        split = x.reshape(-1, channels // self.groups, self.groups, height, width)
        return split.transpose(1, 2).reshape(-1, channels, height, width)


class ShuffledConv(nn.Sequential):
    """A channel shuffle and the grouped convolution that reads it (children `0` and `1`)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(Shuffle(conv.groups), conv)


def slot(kind: str, inputs: int, outputs: int, kernel: int, stride: int) -> nn.Module:
    """One convolution slot, without bias: (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
    pad = kernel // 2
    if kind == "separable":
        return nn.Sequential(
            nn.Conv2d(inputs, inputs, kernel, stride, pad, groups=inputs, bias=False),
            nn.Conv2d(inputs, outputs, 1, bias=False),
        )
    if kind == "shuffle":
        return ShuffledConv(nn.Conv2d(inputs, outputs, kernel, stride, pad, groups=GROUPS, bias=False))
    return nn.Conv2d(inputs, outputs, kernel, stride, pad, bias=False)


@dataclass(frozen=True)
class Stage:
    """What one stage is made of."""

    depth: int
    width: int
    kernel: int
    kind: str
    stride: int


class Block(nn.Module):
    """Two slots with batch norm; every kind but `plain` adds its input, through a 1x1 projection where shapes differ.

    After basic blocks of He et al. 2016 (option B shortcuts: torch-pruning pairs wrong channels on zero-padded ones).
    """

    def __init__(self, inputs: int, stage: Stage, stride: int) -> None:
        super().__init__()
        width = stage.width
        self.conv1 = slot(stage.kind, inputs, width, stage.kernel, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = slot(stage.kind, width, width, stage.kernel, 1)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module | None = None
        if stage.kind != "plain":
            same = inputs == width and stride == 1
            self.shortcut = nn.Identity() if same else projection(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, width, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y if self.shortcut is None else y + self.shortcut(x))


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """1x1 convolution and batch norm for a shortcut whose shapes differ."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class Stem(nn.Module):
    """3x3 convolution, batch norm, ReLU; the stage widths start from its width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H, W)."""
        return F.relu(self.bn(self.conv(x)))


class Network(nn.Module):
    """Resize, stem, stages, mean over positions, linear head: (N, channels, H, W) to (N, classes).

    The input is resized inside the network (bilinear), so the file's input shape never depends on the resolution.
    """

    def __init__(
        self, channels: int, classes: int, size: Sequence[int], resolution: int, stages: Mapping[int, Stage]
    ) -> None:
        super().__init__()
        height, width = size
        resized = (resolution, max(1, round(resolution * width / height)))
        self.resize: tuple[int, int] | None = None if resized == (height, width) else resized
        self.stem = Stem(channels, stages[0].width)
        self.stages = nn.ModuleList()
        inputs = stages[0].width
        for stage in (stages[number] for number in sorted(stages)):
            blocks = nn.Sequential()
            for index in range(stage.depth):
                blocks.append(Block(inputs, stage, stage.stride if index == 0 else 1))
                inputs = stage.width
            self.stages.append(blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to logits (N, classes)."""
        if self.resize is not None:
            x = F.interpolate(x, size=self.resize, mode="bilinear", align_corners=False)
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(torch.flatten(self.pool(x), 1))
