"""Random search: every gene uniform and independent, no canonical genotype twice. The control arm of all the others."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random as Shuffled

from autocompress import space as sp
from autocompress.searchers.design import first
from autocompress.searchers.fresh import Taken, numbered
from autocompress.types import Facts, Goal, Limit, Proposal, Space, Trial


class Random:
    """ask/tell. It learns nothing but what is taken; trials of earlier runs are left out of account on purpose.

    With `design` it asks that many of the first candidates that other searchers begin with, from the probe if there is
    one: a control of what the search adds to these.
    """

    def __init__(
        self,
        space: Space,
        goals: Sequence[Goal],
        limit: Limit,  # noqa: ARG002
        facts: Facts,
        seed: int,
        *,
        design: int = 0,
    ) -> None:
        self.space = space
        self.first = first(space, facts, goals, design, Shuffled(f"{seed}:design")) if design > 0 else ()
        self.numbers: set[int] = set()
        self.seed = seed
        self.taken = Taken(space)

    def ask(self, number: int, pending: Sequence[Trial]) -> Proposal | None:
        """A genotype never taken; None when the space is exhausted."""
        self.taken.add(pending)
        self.numbers.update(trial.number for trial in pending)
        rng = numbered(self.seed, number)
        turn = len(self.numbers - {0, number})
        planned = self.first[turn] if turn < len(self.first) else None
        found = self.taken.fresh(lambda: planned or sp.sample(self.space, rng), rng, tries=1 if planned else 16)
        self.numbers.add(number)
        return None if found is None else Proposal(genotype=found)

    def tell(self, trial: Trial) -> None:
        """Its genotype is taken."""
        self.taken.add([trial])
        self.numbers.add(trial.number)
