"""Random search: every gene uniform and independent, no canonical genotype twice. The control arm of all the others."""

from __future__ import annotations

from collections.abc import Sequence

from autocompress import space as sp
from autocompress.searchers.fresh import Taken, numbered
from autocompress.types import Facts, Goal, Limit, Proposal, Space, Trial


class Random:
    """ask/tell. It learns nothing but what is taken; trials of earlier runs are left out of account on purpose."""

    def __init__(self, space: Space, goals: Sequence[Goal], limit: Limit, facts: Facts, seed: int) -> None:  # noqa: ARG002
        self.space = space
        self.seed = seed
        self.taken = Taken(space)

    def ask(self, number: int, pending: Sequence[Trial]) -> Proposal | None:
        """A genotype never taken; None when the space is exhausted."""
        self.taken.add(pending)
        rng = numbered(self.seed, number)
        found = self.taken.fresh(lambda: sp.sample(self.space, rng), rng)
        return None if found is None else Proposal(genotype=found)

    def tell(self, trial: Trial) -> None:
        """Its genotype is taken."""
        self.taken.add([trial])
