"""A small MobileNet, in a module that imports nothing else: worker processes load its class from here."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

WIDTHS = ((32, 2), (64, 1), (64, 1), (128, 2), (128, 1), (128, 1), (256, 2), (256, 1))
"""Channels and stride of the blocks."""


class Separable(nn.Module):
    """Depthwise 3x3 and 1x1, each with batch norm and ReLU (Howard et al. 2017, "MobileNets", figure 3)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
        self.norm1, self.act1 = nn.BatchNorm2d(inputs), nn.ReLU()
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm2, self.act2 = nn.BatchNorm2d(outputs), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, outputs, h / stride, w / stride)."""
        x = self.act1(self.norm1(self.depthwise(x)))
        return self.act2(self.norm2(self.pointwise(x)))


class MobileNet(nn.Sequential):
    """Normalised images (n, channels, h, w); 10 logits."""

    def __init__(self, channels: int = 3) -> None:
        parts: list[tuple[str, nn.Module]] = [
            ("stem", nn.Conv2d(channels, 32, 3, 1, 1, bias=False)),
            ("norm", nn.BatchNorm2d(32)),
            ("act", nn.ReLU()),
        ]
        width = 32
        for place, (outputs, stride) in enumerate(WIDTHS):
            parts.append((f"block{place}", Separable(width, outputs, stride)))
            width = outputs
        parts += [("pool", nn.AdaptiveAvgPool2d(1)), ("flat", nn.Flatten()), ("linear", nn.Linear(width, 10))]
        super().__init__(OrderedDict(parts))
