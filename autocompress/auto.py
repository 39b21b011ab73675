"""`space: auto`: the joint space derived from a network's sites."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autocompress.types import Space

if TYPE_CHECKING:
    from autocompress.models import Builder
    from autocompress.tasks import Task

NAME = "auto"


def space(builder: Builder, task: Task) -> Space:  # noqa: ARG001
    """The genes that make sense for this network."""
    return Space(name=NAME, genes=())
