"""Searchers propose genotypes (protocol). Constructed as `Searcher(space, goals, limit, facts, seed, **options)`.

A searcher is a function of those arguments and of the journal's order of asks and tells: resuming replays them into
a fresh one. Random numbers come from (seed, number) alone, so concurrent trials do not disturb one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from autocompress.types import Proposal, Trial


@runtime_checkable
class Searcher(Protocol):
    """ask/tell."""

    def ask(self, number: int, pending: Sequence[Trial]) -> Proposal | None:
        """Propose the genotype of trial `number` while `pending` trials run; None when the space is exhausted."""
        ...

    def tell(self, trial: Trial) -> None:
        """Learn an ended trial (any state, any order). A later tell of the same number replaces the earlier one."""
        ...


@runtime_checkable
class Keeper(Protocol):
    """A searcher that can hand something to the searches after it."""

    def save(self, folder: Path) -> None:
        """Called with the run's folder when a search ends, and again when it ends after it was resumed."""
        ...
