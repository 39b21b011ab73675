"""What a searcher remembers so that no canonical genotype is proposed twice, and its numbered random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random

from autocompress import space as sp
from autocompress.types import Genotype, Space, Trial

MUTATIONS = 16  # of a genotype that is taken, before the first one left is


def numbered(seed: int, number: int) -> Random:
    """Random numbers of one ask: a function of the seed and the trial's number alone."""
    return Random(f"{seed}:{number}")


class Taken:
    """Canonical genotypes that were asked for, are running or were told."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.genotypes: set[Genotype] = set()

    def add(self, trials: Iterable[Trial]) -> None:
        """Take note of running or ended trials."""
        self.genotypes.update(sp.canonical(self.space, trial.genotype) for trial in trials)

    def fresh(self, draw: Callable[[], Genotype], rng: Random, tries: int = 16) -> Genotype | None:
        """A genotype not taken, from `draw`, else by ever larger mutations of what it drew, else the first left.

        It is taken from then on. None when the space holds no other.
        """
        found = draw()
        for step in range(tries - 1 + MUTATIONS):
            if found not in self.genotypes:
                break
            beyond = step - (tries - 1)
            found = draw() if beyond < 0 else sp.mutate(self.space, found, rng, changes=1.5 + 0.25 * beyond)
        if found in self.genotypes:
            # Ends after at most one step more than there are taken genotypes.
            left = next((g for g in sp.every(self.space) if g not in self.genotypes), None)
            if left is None:
                return None
            found = left
        self.genotypes.add(found)
        return found
