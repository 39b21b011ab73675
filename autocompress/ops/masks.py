"""Which weights stay: by magnitude, in a layer or over several, or N of every M along the input channels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

PATTERNS: dict[str, tuple[int, int] | None] = {"unstructured": None, "2:4": (2, 4), "4:8": (4, 8)}
"""Name -> (N, M): at most N of every M weights stay."""


def misfit(shape: Sequence[int], pattern: str) -> str:
    """Why a weight (out, in, ...) cannot follow a pattern, empty where it can."""
    cell = PATTERNS[pattern]
    if cell is not None and shape[1] % cell[1]:
        return f"its {shape[1]} input channels are no multiple of {cell[1]}"
    return ""


@torch.no_grad()
def decide(weights: Mapping[str, Tensor], pattern: str, sparsity: float) -> dict[str, Tensor]:
    """What stays (bool, the weights' shapes) when `sparsity` of all these weights together goes, smallest first.

    With N of M only what the pattern lets go can go, so that a growing sparsity ends at the pattern (Zhou et al.
    2021, "Learning N:M Fine-grained Structured Sparse Neural Networks", section 3.1, without their regrowth). The
    largest weight of a layer always stays. Equal magnitudes go in order of position.
    """
    cell = PATTERNS[pattern]
    ranked = {name: _rank(weight, cell) for name, weight in weights.items()}
    total = sum(weight.numel() for weight in weights.values())
    going = math.floor(sparsity * total + 0.5)
    scores = torch.cat([scores.flatten() for scores in ranked.values()])
    going = min(going, int(torch.isfinite(scores).sum()))
    kept = torch.ones(total, dtype=torch.bool)
    if going:
        kept[torch.sort(scores, stable=True).indices[:going]] = False
    found: dict[str, Tensor] = {}
    for name, part in zip(ranked, kept.split([weight.numel() for weight in weights.values()]), strict=True):
        found[name] = part.reshape(weights[name].shape)
    return found


def _rank(weight: Tensor, cell: tuple[int, int] | None) -> Tensor:
    """Magnitudes, infinite where a weight must stay."""
    size = weight.detach().float().abs().cpu()
    size = torch.where(torch.isfinite(size), size, torch.finfo(size.dtype).max)
    must = torch.zeros(size.shape, dtype=torch.bool)
    if cell is None:
        must.view(-1)[int(size.argmax())] = True
    else:
        most, of = cell
        rows = size.movedim(1, -1)
        cells = rows.reshape(-1, of)
        held = torch.zeros_like(cells, dtype=torch.bool)
        order = torch.sort(cells, dim=1, descending=True, stable=True).indices
        held.scatter_(1, order[:, :most], value=True)
        must = held.reshape(rows.shape).movedim(-1, 1)
    return torch.where(must, torch.inf, size).contiguous()
