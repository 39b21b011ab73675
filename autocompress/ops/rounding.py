"""Integers simulated in torch: activations rounded on a learned range, weights as the file's quantization rounds them.

Everything is computed in float32 whatever the activations' type, and the grid is that of onnxruntime.quantization
(zero is exact, ties go to the even integer), so that a simulated network answers as its int8 file does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autocompress.types import Numeric

LEVELS = 255
"""Steps of an 8-bit range. Signed and unsigned activations have the same grid."""
SMALLEST = 1e-8
"""Width of a range that is not empty."""


class Range(nn.Module):
    """Rounds activations of any shape to `LEVELS` steps between two ends, of which those that are not 0 are learned.

    The gradient of an end is that of a learned step size and offset (Esser et al. 2020, "Learned Step Size
    Quantization", section 2.1, with the offset of Bhalgat et al. 2020, "LSQ+"), with their scale 1 / sqrt(N Q), in
    which N are the values of one sample.
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        for name, value in (("low", min(low, 0.0)), ("high", max(high, 0.0))):
            end = torch.tensor(value, dtype=torch.float32)
            if value:
                self.register_parameter(name, nn.Parameter(end))
            else:
                self.register_buffer(name, end)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and type."""
        rounded: Any = _Round.apply(x, self.low, self.high)
        return rounded

    def ends(self) -> tuple[float, float]:
        """(low, high) now."""
        return float(self.low.detach()), float(self.high.detach())

    @torch.no_grad()
    def hold(self, low: float, high: float) -> None:
        """Keep the learned ends of the sign and within 1/32 to 4 times the size that `low` and `high` have."""
        self.low.clamp_(4 * min(low, 0.0), min(low, 0.0) / 32)
        self.high.clamp_(max(high, 0.0) / 32, 4 * max(high, 0.0))


class _Round(torch.autograd.Function):
    """Rounding whose backward pass goes straight through inside the range and teaches its ends.

    Written in whole passes over memory: torch's own fake quantization takes thirty times as long on a processor.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(x, low, high)
        step, zero = _grid(low, high)
        values = x.to(torch.float32, copy=True).div_(step).round_()
        return values.clamp_(-zero, LEVELS - zero).mul_(step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, low, high = ctx.saved_tensors
        step, zero = _grid(low, high)
        values, outside = x.float(), gradients[0].to(torch.float32, copy=True)
        bounded = values.clamp(-(zero + 0.5) * step, (LEVELS - zero + 0.5) * step)
        inside = outside * bounded.eq_(values)
        outside -= inside
        # the error of rounding per step size, spread over the range (Esser et al. 2020, equation 3)
        error = values.div(step).round_().mul_(step).sub_(values)
        stretch = error.mul_(inside).sum() / (step * LEVELS)
        both, difference = outside.sum(), outside.mul_(values.sign()).sum()  # below the range all is negative
        scale = LEVELS**1.5 / max(values[0].numel(), 1) ** 0.5  # theirs for a step is this for the end of a range
        wanted = ctx.needs_input_grad
        return (
            inside.to(x.dtype) if wanted[0] else None,
            ((both - difference) / 2 - stretch) * scale if wanted[1] else None,
            ((both + difference) / 2 + stretch) * scale if wanted[2] else None,
        )


def _grid(low: Tensor, high: Tensor) -> tuple[float, float]:
    """(step, zero point counted from the first integer) that onnxruntime makes of a range."""
    step = max(float(high.detach()) - float(low.detach()), SMALLEST) / LEVELS
    return step, float(round(-float(low.detach()) / step))


@torch.no_grad()
def rounded_weight(weight: Tensor, numeric: Numeric, gain: Tensor | None = None) -> Tensor:
    """A weight (out, ...) as the file has it after quantization; `gain` (out,) is what a batch norm multiplies it by.

    The folded weight is what is rounded (Jacob et al. 2018, section 3.2), and the gain taken out again, since the
    batch norm stays a layer of its own while training. Symmetric int8 from the largest absolute value, uint8 from
    both ends; one step per output channel or one for all; 7 bits where the range is reduced.
    """
    folded = weight.float() if gain is None else weight.float() * _as_column(gain, weight)
    axes = tuple(range(1, weight.ndim)) if numeric.per_channel else tuple(range(weight.ndim))
    if numeric.weight == "int8":
        most = 64 if numeric.reduce_range else 127
        step = folded.abs().amax(axes, keepdim=True) / most
        zero, first, last = torch.zeros_like(step), -most, most
    else:
        first, last = 0, 127 if numeric.reduce_range else 255
        low, high = folded.amin(axes, keepdim=True).clamp_max(0), folded.amax(axes, keepdim=True).clamp_min(0)
        step = (high - low) / last
        zero = torch.round(-low / step.clamp_min(SMALLEST))
    step = torch.where(step > SMALLEST / LEVELS, step, 1.0)
    found = ((folded / step).round() + zero).clamp(first, last).sub(zero) * step
    if gain is not None:
        column = _as_column(gain, weight)
        found = torch.where(column.abs() > SMALLEST, found / column.where(column != 0, 1.0), weight.float())
    return found.to(weight.dtype)


def _as_column(gain: Tensor, weight: Tensor) -> Tensor:
    return gain.float().reshape(-1, *[1] * (weight.ndim - 1))


def gain_of(norm: nn.Module) -> Tensor:
    """(channels,) factor of a batch norm on its running statistics (Krishnamoorthi 2018, section 3.2.2).

    The long-term statistics do not jump from batch to batch; those of the batch act after the convolution.
    """
    variance: Any = norm.running_var
    weight: Any = norm.weight
    eps: Any = norm.eps
    deviation = torch.sqrt(variance + eps)
    return (torch.ones_like(deviation) if weight is None else weight.detach()) / deviation
