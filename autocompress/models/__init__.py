"""Builders make a network from architecture choices and hand down the parent's weights (protocol)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from autocompress.types import Arch, Choice, Site

if TYPE_CHECKING:
    from torch import nn


@runtime_checkable
class Builder(Protocol):
    """arch -> module. `knobs` are the parent's own choices; `build({})` is the parent, untrained."""

    name: str

    @property
    def knobs(self) -> Mapping[str, Choice]:
        """The parent's own choices by knob; an attribute will do."""
        ...

    def build(self, arch: Arch) -> nn.Module:
        """An untrained module. Missing knobs take the parent's choice; raises UserError for unknown knobs or values."""
        ...

    def sites(self) -> tuple[Site, ...]:
        """The places of the unmodified network that a policy can speak of, from input to output."""
        ...

    def inherit(self, child: nn.Module, parent: nn.Module, arch: Arch) -> None:
        """Fill `child = build(arch)` in place with the parent's weights, as well as they fit."""
        ...
