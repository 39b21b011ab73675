"""Thin factors of a layer's weight: truncated SVD, spatial SVD and Tucker-2, with their spectra remembered by content.

A factorisation is a chain of two or three weights whose layers, run one after the other, compute the truncated layer.
Decompositions are eigenproblems of the smaller Gram matrix in double precision: on ResNet-50 a fifth of the time of a
thin SVD in single precision, and as exact.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

SWEEPS = 2
"""Sweeps of higher-order orthogonal iteration after the HOSVD; on trained kernels a third changes the fourth digit."""


class Spectra:
    """Decompositions by the content of what was decomposed, the least recently used forgotten beyond `most` bytes."""

    def __init__(self, most: int = 256 * 2**20) -> None:
        self.most, self.bytes = most, 0
        self._held: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()

    def remember(self, what: str, tensor: Tensor, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """`make()`, or what it gave before for these bytes; `what` names the decomposition and its settings."""
        content = tensor.detach().contiguous().flatten().view(torch.uint8)
        key = hashlib.sha256(content.cpu().numpy().data)
        key.update(f"{what} {tuple(tensor.shape)} {tensor.dtype}".encode())
        name = key.hexdigest()
        if name not in self._held:
            self._held[name] = make()
            self.bytes += _bytes(self._held[name])
        self._held.move_to_end(name)
        found = self._held[name]
        while self.bytes > self.most and self._held:
            self.bytes -= _bytes(self._held.popitem(last=False)[1])
        return found

    def __len__(self) -> int:
        """How many decompositions are held."""
        return len(self._held)


SPECTRA = Spectra()
"""The process's own: a search meets the same layers again and again."""


def _bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n), largest first and none below zero, and eigenvectors (n, n) of a symmetric matrix."""
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def halves(matrix: Tensor, rank: int, spectra: Spectra = SPECTRA) -> tuple[Tensor, Tensor]:
    """The best (rank, columns) and (rows, rank) in least squares, their product in reverse is near `matrix`.

    Eckart-Young; singular values are shared out evenly, so that both train at one learning rate.
    """
    rows, columns = matrix.shape

    def decompose() -> tuple[Tensor, ...]:
        wide = matrix.double() if rows <= columns else matrix.double().T
        values, vectors = eigen(wide @ wide.T)
        return values.sqrt().to(matrix.dtype), vectors.to(matrix.dtype)

    values, vectors = spectra.remember("gram", matrix, decompose)
    side, root = vectors[:, :rank], values[:rank].sqrt()
    root = torch.where(root > 0, root, 1)
    if rows <= columns:
        return side.T @ matrix / root[:, None], side * root
    return (side * root).T, matrix @ side / root


def pair(weight: Tensor, rank: int, spectra: Spectra = SPECTRA) -> list[Tensor]:
    """Truncated SVD of (out, in, ...): a layer of the same kernel to `rank` channels, then a 1x1.

    Denton et al. 2014 ("Exploiting linear structure", section 3); Zhang et al. 2016 (section 3.1) without data.
    """
    outputs, *rest = weight.shape
    first, second = halves(weight.reshape(outputs, -1), rank, spectra)
    return [first.reshape(rank, *rest), second.reshape(outputs, rank, *[1] * (len(rest) - 1))]


def spatial(weight: Tensor, rank: int, spectra: Spectra = SPECTRA) -> list[Tensor]:
    """Spatial SVD of (out, in, kh, kw): kh x 1 to `rank` channels, then 1 x kw.

    Jaderberg et al. 2014 (section 2, scheme 2), in closed form as Tai et al. 2016 (theorem 1).
    """
    first, second = halves(unfolded(weight), rank, spectra)
    return refolded(first, second, weight.shape)


def unfolded(weight: Tensor) -> Tensor:
    """(out, in, kh, kw) to the (out * kw, in * kh) matrix whose rank is the number of channels between two passes."""
    outputs, inputs, high, wide = weight.shape
    return weight.permute(0, 3, 1, 2).reshape(outputs * wide, inputs * high)


def refolded(first: Tensor, second: Tensor, shape: torch.Size | tuple[int, ...]) -> list[Tensor]:
    """Factors of `unfolded(weight)` as weights (rank, in, kh, 1) and (out, rank, 1, kw)."""
    outputs, inputs, high, wide = shape
    rank = len(first)
    across = second.reshape(outputs, wide, rank).permute(0, 2, 1).unsqueeze(2)
    return [first.reshape(rank, inputs, high, 1), across.contiguous()]


def tucker(weight: Tensor, inner: int, rank: int, spectra: Spectra = SPECTRA) -> list[Tensor]:
    """Tucker-2 of (out, in, kh, kw): 1x1 to `inner` channels, kh x kw to `rank` channels, 1x1 to the outputs.

    Kim et al. 2016 ("Compression of deep CNNs for fast and low power mobile applications", section 3.1): HOSVD, then
    `SWEEPS` sweeps of orthogonal iteration (De Lathauwer et al. 2000).
    """

    def decompose() -> tuple[Tensor, ...]:
        into, out = orthogonal_sides(weight.double(), inner, rank)
        return into.to(weight.dtype), out.to(weight.dtype)

    into, out = spectra.remember(f"tucker {inner} {rank}", weight, decompose)
    core = torch.einsum("oihw,ir,os->srhw", weight, into, out)
    return evened([into.T[:, :, None, None], core, out[:, :, None, None]])


def orthogonal_sides(weight: Tensor, inner: int, rank: int) -> tuple[Tensor, Tensor]:
    """Bases (in, inner) and (out, rank) of the channels that hold most of the kernel."""
    outputs, inputs = weight.shape[:2]
    by_input = weight.transpose(0, 1).reshape(inputs, -1)
    into = eigen(by_input @ by_input.T)[1][:, :inner]
    out = weight.new_zeros(outputs, 0)
    for sweep in range(SWEEPS + 1):
        seen = torch.einsum("oihw,ir->orhw", weight, into).reshape(outputs, -1)
        out = eigen(seen @ seen.T)[1][:, :rank]
        if sweep < SWEEPS:
            seen = torch.einsum("oihw,os->ishw", weight, out).reshape(inputs, -1)
            into = eigen(seen @ seen.T)[1][:, :inner]
    return into, out


def evened(weights: list[Tensor]) -> list[Tensor]:
    """The same chain with weights of equal norm, so that all train at one learning rate."""
    norms = torch.stack([weight.norm() for weight in weights])
    if not bool((norms > 0).all()):
        return weights
    mean = norms.log().mean().exp()
    return [weight * (mean / norm) for weight, norm in zip(weights, norms, strict=True)]


def chained(weights: list[Tensor]) -> Tensor:
    """The one weight that a chain computes: no two kernels of it reach along one axis."""
    whole = weights[0]
    for weight in weights[1:]:
        size = [max(a, b) for a, b in zip(whole.shape[2:], weight.shape[2:], strict=True)]
        before, after = (one.reshape(*one.shape[:2], -1) for one in (whole, weight))
        # kh x 1 and then 1 x kw: every position of one with every position of the other
        product = torch.einsum("orx,riy->oiyx", after, before)
        whole = product.reshape(weight.shape[0], whole.shape[1], *size)
    return whole
