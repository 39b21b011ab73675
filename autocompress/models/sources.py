"""Networks that are named: torchvision's, timm's, Hugging Face's encoders. Nothing is downloaded unless asked for."""

from __future__ import annotations

from typing import Any

from torch import nn


def torchvision(name: str, **options: Any) -> nn.Module:
    """`torchvision.models.NAME(**options)`."""
    raise NotImplementedError(name, options)
