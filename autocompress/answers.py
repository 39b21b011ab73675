"""How far a network's outputs are from another's: a proxy of quality that needs no training (floor F5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from autocompress.tasks import several


class Answers:
    """The parent's outputs on some samples, and how far others are from them."""

    def __init__(self, parent: Sequence[Tensor], *, classes: bool) -> None:
        self.parent, self.classes = tuple(one.float() for one in parent), classes

    def divergence(self, others: Sequence[Tensor]) -> float:
        """Nats per sample: KL(parent || other) of class scores, or of unit Gaussians around standardised values."""
        pairs = zip(self.parent, others, strict=True)
        return float(sum(self._one(mine, theirs.float()) for mine, theirs in pairs))

    def constant(self) -> float:
        """The divergence of the best answer that is the same for every sample: what knowing nothing costs."""
        if not self.classes:
            return 0.5 * len(self.parent)
        means = [_shares(one).exp().mean(0, keepdim=True).log().expand_as(one) for one in self.parent]
        return self.divergence(means)

    def _one(self, mine: Tensor, theirs: Tensor) -> Tensor:
        if self.classes:
            wanted, found = _shares(mine), _shares(theirs)
            spread = (wanted.exp() * (wanted - found)).sum(_axis(mine))
            return spread.mean()
        return 0.5 * ((mine - theirs) ** 2).mean() / mine.var(correction=0).clamp_min(1e-12)


def _axis(scores: Tensor) -> int:
    """Where the classes are: after the samples in an image of scores, else last."""
    return 1 if scores.ndim == 4 else scores.ndim - 1


def _shares(scores: Tensor) -> Tensor:
    return functional.log_softmax(scores, dim=_axis(scores))


def is_labels(targets: Any) -> bool:
    """Whether targets are numbers of classes; floating numbers are values to be met."""
    first = several(targets)[0] if not isinstance(targets, Mapping) else next(iter(targets.values()))
    return not (isinstance(first, Tensor) and first.is_floating_point())
