"""Attention written out: fused products become linear layers of their own, so that heads can be pruned and exported."""

from __future__ import annotations

from torch import nn


def unfold(module: nn.Module) -> None:
    """Replace every nn.MultiheadAttention in `module` in place by an equal network of linear layers."""
