"""Weights of a convolution's compact forms: from the dense weights alone, then by least squares on calibration data."""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress.models.compact import Form, support
from autocompress.ops.fit import Centred, Sampled, ridge

ROUNDS = 4
"""Turns of alternating least squares; a large problem takes fewer, its steps cost the cube of its columns."""
LARGE = 1500
UNKNOWNS = 2048
"""A bottleneck's first factor is solved again where it has at most so many weights."""


def start(found: Form, weight: Tensor) -> dict[str, Tensor]:
    """The form nearest to the dense `weight` (outputs, inputs, height, width) in least squares of weights."""
    outputs, inputs, height, width = found.shape
    if found.kind == "separable":
        # best rank-1 pair per input channel (Eckart-Young): a 1x1 column times a spatial filter
        u, s, v = torch.linalg.svd(weight.transpose(0, 1).flatten(2), full_matrices=False)
        root = s[:, :1].sqrt()
        return {
            "0.weight": (v[:, 0] * root).reshape(inputs, 1, height, width),
            "1.weight": (u[:, :, 0] * root).T.reshape(outputs, inputs, 1, 1),
        }
    if found.kind == "bottleneck":
        # HOSVD (De Lathauwer et al. 2000): the leading directions of inputs and of outputs
        into, out = (
            _leading(weight.transpose(0, 1).flatten(1), found.inner[0]),
            _leading(weight.flatten(1), found.inner[1]),
        )
        return _bottleneck(into.T, torch.einsum("ochw,ca,ob->bahw", weight, into, out), out)
    name = "1.weight" if found.kind == "shuffle" else "weight"
    flat = weight.flatten(1)
    return {name: _written(found, [flat[rows[:, None], columns] for rows, columns in support(found)])}


def refine(found: Form, parts: dict[str, Tensor], held: Centred | Sampled) -> dict[str, Tensor]:
    """The form's weights that explain the layer's outputs best, from those of `start` on."""
    if found.kind == "separable":
        return _separable(found, parts, held)
    if found.kind == "bottleneck":
        return _narrow(found, parts, held)
    (name, weight), *_ = parts.items()
    solved: list[Tensor] = []
    for rows, columns in support(found):
        xx, xy = held.part(columns)
        solved.append(ridge(xx, xy[:, rows], weight[rows].flatten(1)))
    return {name: _written(found, solved)}


def _separable(found: Form, parts: dict[str, Tensor], held: Centred | Sampled) -> dict[str, Tensor]:
    outputs, inputs, height, width = found.shape
    taps = height * width
    depthwise, pointwise = parts["0.weight"].reshape(inputs, taps), parts["1.weight"].reshape(outputs, inputs)
    for turn in range(ROUNDS if inputs * taps <= LARGE else 1):
        if turn:  # the 1x1 part fixed: one filter per channel, all channels together
            normal = held.xx * (pointwise.T @ pointwise).repeat_interleave(taps, 0).repeat_interleave(taps, 1)
            wanted = (held.xy.reshape(inputs, taps, outputs) * pointwise.T[:, None]).sum(2).reshape(-1, 1)
            depthwise = ridge(normal, wanted, depthwise.reshape(1, -1)).reshape(inputs, taps)
        # the filters fixed: what comes out of them is an ordinary regression
        pointwise = ridge(*held.filtered(depthwise), pointwise)
    return {
        "0.weight": depthwise.reshape(inputs, 1, height, width),
        "1.weight": pointwise.reshape(outputs, inputs, 1, 1),
    }


def _narrow(found: Form, parts: dict[str, Tensor], held: Centred | Sampled) -> dict[str, Tensor]:
    outputs, inputs, height, width = found.shape
    taps, (first, second) = height * width, found.inner
    into = parts["0.weight"].reshape(first, inputs)
    middle, out = parts["1.weight"].flatten(1), parts["2.weight"].flatten(1)
    for turn in range(ROUNDS):
        if turn:
            if first * inputs > UNKNOWNS:
                break
            joint = (out @ middle).reshape(outputs, first, taps)
            square = torch.einsum("oat,obs->atbs", joint, joint)
            between = held.xx.reshape(inputs, taps, inputs, taps)
            normal = torch.einsum("atbs,ctds->acbd", square, between).reshape(first * inputs, -1)
            right = torch.einsum("oat,cto->ac", joint, held.xy.reshape(inputs, taps, outputs)).reshape(-1, 1)
            into = ridge(normal, right, into.reshape(1, -1)).reshape(first, inputs)
        # the first factor fixed: regression of reduced rank (Izenman 1975), in closed form
        xx, xy = held.narrowed(into)
        full = ridge(xx, xy, out @ middle)
        out = torch.linalg.eigh(full @ xx @ full.T)[1][:, -second:]  # the leading directions of what is answered
        middle = out.T @ full
    return _bottleneck(into, middle.reshape(second, first, height, width), out)


def _leading(rows: Tensor, count: int) -> Tensor:
    """The `count` leading left singular vectors of a matrix, (rows, count)."""
    return torch.linalg.eigh(rows @ rows.T)[1][:, -count:].flip(1)


def _bottleneck(into: Tensor, middle: Tensor, out: Tensor) -> dict[str, Tensor]:
    """Weights of the three convolutions, rows of the first scaled to length one so that none of them grows."""
    length = into.norm(dim=1).clamp_min(1e-12)
    return {
        "0.weight": (into / length[:, None])[:, :, None, None],
        "1.weight": middle * length[:, None, None],
        "2.weight": out[:, :, None, None],
    }


def _written(found: Form, solved: list[Tensor]) -> Tensor:
    """Groups' rows below each other, as a convolution's weight."""
    return torch.cat(solved).reshape(found.shape[0], found.shape[1] // found.groups, *found.kernel)
