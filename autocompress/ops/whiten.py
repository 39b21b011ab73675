"""Thin factors by the error of a layer's outputs on calibration data rather than of its weight.

Second moments of the inputs whiten the weight before it is truncated (Zhang et al. 2016, "Accelerating Very Deep
Convolutional Networks", section 3.1; for language models Wang et al. 2024, "SVD-LLM", section 3.1), then the later
factors are fitted to what the first one passes on. The inputs are the unchanged network's (Zhang's symmetric case).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.ops.chain import Layer
from autocompress.ops.factors import chained, eigen, evened, orthogonal_sides, refolded, unfolded
from autocompress.ops.fit import RIDGE, Moments, ridge, sample

Chain = list[Tensor]


@dataclass(frozen=True)
class Goal:
    """What a chain has to imitate: `weight` (out, d), as the layer applies it to rows of second moment `xx` (d, d).

    `shape` is the weight's own. Moments are about the means where the layer has a bias, which then follows the chain.
    """

    weight: Tensor
    shape: tuple[int, ...]
    xx: Tensor
    lift: float

    @classmethod
    def of(cls, weight: Tensor, found: Moments, *, biased: bool) -> Goal:
        """The goal of a layer; `weight` (out, in, ...) in any precision. It takes the moments over."""
        xx = found.about_mean() if biased else found.xx
        lift = RIDGE * float(xx.diagonal().mean())
        return cls(weight.double().flatten(1), tuple(weight.shape), xx, lift if lift > 0 else 1.0)

    def error(self, chain: Chain) -> float:
        """Square error of the outputs, summed over rows and channels (of their variance with a bias)."""
        missed = (self.weight - chained([one.double() for one in chain]).flatten(1)).float()
        return float((missed @ self.xx.float() * missed).sum())

    def shift(self, chain: Chain, mean: Tensor) -> Tensor:
        """What to add to the bias (out,) for inputs of this mean (d,)."""
        return (self.weight - chained([one.double() for one in chain]).flatten(1)) @ mean

    def white(self, xx: Tensor) -> Tensor:
        """Lower factor L of L L^T, a second moment lifted a little: no direction is without weight."""
        lift = self.lift
        while True:
            factor, failed = torch.linalg.cholesky_ex(xx + lift * torch.eye(len(xx), dtype=xx.dtype))
            if not int(failed):
                return factor
            lift *= 10  # rounding has made it indefinite; above its trace no finite moment is


class Answers:
    """What layers answer on calibration data, without their bias: `moments` of the outputs, sampled.

    `power` is the mean square of an input value.
    """

    def __init__(self, outputs: int) -> None:
        self.moments = Moments(outputs, 0)
        self.squares, self.values = 0.0, 0

    @property
    def power(self) -> float:
        """Mean square of the input's values."""
        return self.squares / max(self.values, 1)

    def hear(self, layer: Any, x: Tensor, output: Tensor, wanted: int, seed: int) -> None:
        """One call's `wanted` rows."""
        assert isinstance(layer, Layer)
        self.squares += float(torch.linalg.vector_norm(x)) ** 2
        self.values += x.numel()
        axis = -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)
        rows = output.movedim(axis, -1).reshape(-1, len(layer.weight))
        rows = rows[sample(len(rows), wanted, seed)]
        self.moments.add(rows if layer.bias is None else rows - layer.bias.detach())


def principal(weight: Tensor, found: Answers, rank: int, *, biased: bool) -> tuple[Chain, Tensor]:
    """The pair (rank, in, ...) and (out, rank, 1 ...) whose outputs are nearest, and what to add to the bias (out,).

    The exact optimum, a projection on the outputs' principal directions (Zhang et al. 2016, section 3.1). Moments of
    the inputs, k^4 times as large for a k x k kernel, are not needed. Directions without signal count as in the weight
    (`lift`): in that part the plain SVD is best, so that it can never be better on the data.
    """
    outputs, *rest = weight.shape
    flat = weight.double().flatten(1)
    moments = found.moments
    yy = moments.about_mean() if biased else moments.xx
    lift = RIDGE * found.power * found.moments.count
    out = eigen(yy + (lift if lift > 0 else 1.0) * flat @ flat.T)[1][:, :rank]
    chain = [(out.T @ flat).reshape(rank, *rest), out.reshape(outputs, rank, *[1] * (len(rest) - 1))]
    mean = found.moments.x / found.moments.count
    return evened(chain), mean - out @ (out.T @ mean)


def pair(goal: Goal, rank: int) -> Chain:
    """The same optimum from moments of the inputs, smaller where a layer has more outputs than inputs."""
    outputs, *rest = goal.shape
    lower = goal.white(goal.xx)
    mapped = goal.weight @ lower
    side = eigen(mapped.T @ mapped)[1][:, :rank]
    second = (mapped @ side).reshape(outputs, rank, *[1] * (len(rest) - 1))
    return evened([_unwhite(side.T, lower).reshape(rank, *rest), second])


def spatial(goal: Goal, rank: int) -> Chain:
    """kh x 1 by whitened SVD (columns as if independent), then 1 x kw by least squares on what comes through."""
    _, inputs, high, wide = goal.shape
    moment = goal.xx.reshape(inputs * high, wide, inputs * high, wide)
    lower = goal.white(moment.diagonal(dim1=1, dim2=3).sum(-1))
    mapped = unfolded(goal.weight.reshape(goal.shape)) @ lower
    rows_first = mapped.shape[0] <= mapped.shape[1]
    gram = mapped @ mapped.T if rows_first else mapped.T @ mapped
    side = eigen(gram)[1]
    if rows_first:
        second = side[:, :rank]
        first = _unwhite(second.T @ mapped, lower)
    else:
        first, second = _unwhite(side[:, :rank].T, lower), mapped @ side[:, :rank]
    return across(goal, evened(refolded(first, second, goal.shape)))


def across(goal: Goal, chain: Chain) -> Chain:
    """The same first factor, the second fitted to it; `chain`'s own stands where data say nothing."""
    outputs, inputs, high, wide = goal.shape
    rank = len(chain[0])
    down = chain[0].double().reshape(rank, inputs * high)
    cross = torch.tensordot(down, goal.xx.reshape(inputs * high, -1), 1)  # (rank, wide * d), rows (rank, wide)
    cross = cross.reshape(rank * wide, -1)
    seen = torch.einsum("asb,rs->arb", cross.reshape(rank * wide, inputs * high, wide), down)
    fitted = ridge(seen.reshape(rank * wide, rank * wide), cross @ goal.weight.T, chain[1].double().flatten(1))
    return evened([chain[0].double(), fitted.reshape(outputs, rank, 1, wide)])


def tucker(goal: Goal, inner: int, rank: int) -> Chain:
    """1x1 by whitened Tucker-2 (positions as if independent), then core and last 1x1 by reduced-rank regression."""
    _, inputs, *kernel = goal.shape
    area = kernel[0] * kernel[1]
    moment = goal.xx.reshape(inputs, area, inputs, area)
    lower = goal.white(moment.diagonal(dim1=1, dim2=3).sum(-1))
    weight = torch.einsum("oihw,ij->ojhw", goal.weight.reshape(goal.shape), lower)
    into, _ = orthogonal_sides(weight, inner, rank)
    prior = torch.einsum("ojhw,jr->orhw", weight, into)
    return regressed(goal, _unwhite(into.T, lower), prior, rank)


def regressed(goal: Goal, first: Tensor, prior: Tensor, rank: int) -> Chain:
    """Core and last 1x1 of given rank for a first 1x1 (inner, in): least squares, then the outputs' best directions.

    Izenman 1975 ("Reduced-rank regression", section 2). `prior` (out, inner, kh, kw) stands where data say nothing.
    """
    _, inputs, *kernel = goal.shape
    inner, area = len(first), kernel[0] * kernel[1]
    cross = torch.tensordot(first, goal.xx.reshape(inputs, -1), 1).reshape(inner * area, inputs, area)
    seen = torch.einsum("asb,rs->arb", cross, first).reshape(inner * area, inner * area)
    cross = cross.reshape(inner * area, -1)
    whole = ridge(seen, cross @ goal.weight.T, prior.flatten(1))
    out = eigen(whole @ seen @ whole.T + goal.lift * whole @ whole.T)[1][:, :rank]
    core = (out.T @ whole).reshape(rank, inner, *kernel)
    return evened([first[:, :, None, None], core, out[:, :, None, None]])


def better(goal: Goal, one: Chain, other: Chain) -> Chain:
    """The chain that serves the calibration data better, the first where they are equal."""
    return one if goal.error(one) <= goal.error(other) else other


def _unwhite(first: Tensor, lower: Tensor) -> Tensor:
    """(rank, d) on whitened inputs to the same on the inputs themselves: times the inverse of L."""
    return torch.linalg.solve_triangular(lower, first, upper=False, left=False)
