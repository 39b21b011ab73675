"""Thin factors by the error of a layer's outputs on calibration data rather than of its weight.

Second moments of the inputs whiten the weight before it is truncated (Zhang et al. 2016, "Accelerating Very Deep
Convolutional Networks", section 3.1; for language models Wang et al. 2024, "SVD-LLM", section 3.1), then the later
factors are fitted to what the first one passes on. The inputs are the unchanged network's (Zhang's symmetric case).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.ops.factors import SPECTRA, Spectra, chained, eigen, evened, orthogonal_sides, refolded, unfolded
from autocompress.ops.fit import RIDGE, Moments, ridge

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
        """The goal of a layer; `weight` (out, in, ...) in any precision."""
        xx = found.centred().xx if biased else found.xx
        lift = RIDGE * float(xx.diagonal().mean())
        return cls(weight.double().flatten(1), tuple(weight.shape), xx, lift if lift > 0 else 1.0)

    def error(self, chain: Chain) -> float:
        """Share of the outputs' square (variance with a bias) that the chain misses."""
        missed = self.weight - chained([one.double() for one in chain]).flatten(1)
        whole = float((self.weight @ self.xx * self.weight).sum())
        return float((missed @ self.xx * missed).sum()) / whole if whole > 0 else 0.0

    def white(self, xx: Tensor) -> Tensor:
        """Lower factor L of L L^T, a second moment lifted a little: no direction is without weight."""
        lift = self.lift
        while True:
            factor, failed = torch.linalg.cholesky_ex(xx + lift * torch.eye(len(xx), dtype=xx.dtype))
            if not int(failed):
                return factor
            lift *= 10  # rounding has made it indefinite; above its trace no finite moment is


def pair(goal: Goal, rank: int, spectra: Spectra = SPECTRA) -> Chain:
    """The pair (rank, in, ...) and (out, rank, 1 ...) whose outputs are nearest: the exact optimum.

    The outputs' principal directions (Zhang et al. 2016, section 3.1), found on the smaller side.
    """
    outputs, *rest = goal.shape
    if outputs <= goal.weight.shape[1]:
        seen = goal.weight @ goal.xx @ goal.weight.T + goal.lift * goal.weight @ goal.weight.T
        (out,) = spectra.remember("outputs", seen, lambda: (eigen(seen)[1],))
        first, second = out[:, :rank].T @ goal.weight, out[:, :rank]
    else:
        lower = goal.white(goal.xx)
        mapped = goal.weight @ lower
        (side,) = spectra.remember("whitened", mapped, lambda: (eigen(mapped.T @ mapped)[1],))
        first, second = _unwhite(side[:, :rank].T, lower), mapped @ side[:, :rank]
    return evened([first.reshape(rank, *rest), second.reshape(outputs, rank, *[1] * (len(rest) - 1))])


def spatial(goal: Goal, rank: int, spectra: Spectra = SPECTRA) -> Chain:
    """kh x 1 by whitened SVD (columns as if independent), then 1 x kw by least squares on what comes through."""
    _, inputs, high, wide = goal.shape
    moment = goal.xx.reshape(inputs * high, wide, inputs * high, wide)
    lower = goal.white(moment.diagonal(dim1=1, dim2=3).sum(-1))
    mapped = unfolded(goal.weight.reshape(goal.shape)) @ lower
    rows_first = mapped.shape[0] <= mapped.shape[1]
    gram = mapped @ mapped.T if rows_first else mapped.T @ mapped
    (side,) = spectra.remember("spatial", mapped, lambda: (eigen(gram)[1],))
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


def tucker(goal: Goal, inner: int, rank: int, spectra: Spectra = SPECTRA) -> Chain:
    """1x1 by whitened Tucker-2 (positions as if independent), then core and last 1x1 by reduced-rank regression."""
    _, inputs, *kernel = goal.shape
    area = kernel[0] * kernel[1]
    moment = goal.xx.reshape(inputs, area, inputs, area)
    lower = goal.white(moment.diagonal(dim1=1, dim2=3).sum(-1))
    weight = torch.einsum("oihw,ij->ojhw", goal.weight.reshape(goal.shape), lower)
    into, _ = spectra.remember(f"tucker {inner} {rank}", weight, lambda: orthogonal_sides(weight, inner, rank))
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


def better(goal: Goal, plain: Chain, fit: Callable[[], Chain]) -> Chain:
    """What `fit` gives, unless that serves the calibration data worse than `plain` does."""
    fitted = fit()
    return fitted if goal.error(fitted) <= goal.error(plain) else plain


def _unwhite(first: Tensor, lower: Tensor) -> Tensor:
    """(rank, d) on whitened inputs to the same on the inputs themselves: times the inverse of L."""
    return torch.linalg.solve_triangular(lower, first, upper=False, left=False)
