"""Tensors of a file into a module."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a state dict that came from a file; every name and shape must fit. Raises RuntimeError where one does not.

    Files of plain tensors do not say which version of a layer wrote them, and some layers refuse what has none
    (torchvision's MNASNet): they are taken to be of the module's own.
    """
    named: OrderedDict[str, Tensor] = OrderedDict(tensors)
    named._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    module.load_state_dict(named)
