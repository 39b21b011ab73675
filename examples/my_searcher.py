"""A searcher of your own: climbs from the best candidate so far. In a job: `searcher: examples.my_searcher:Climber`."""

from random import Random

from autocompress import pareto, space
from autocompress.types import Proposal


class Climber:
    """Mutates the best trial of the goal whose turn it is, until it finds a genotype not seen before."""

    def __init__(self, search_space, goals, limit, facts, seed, *, tries=200):  # noqa: ANN001, ANN204, ARG002
        self.space, self.goals, self.limit, self.seed, self.tries = search_space, goals, limit, seed, tries
        self.trials, self.seen = {}, set()

    def ask(self, number, pending):  # noqa: ANN001, ANN201
        """The next genotype; random numbers come from the seed and the trial's number."""
        rng = Random(f"{self.seed}:{number}")
        self.seen.update(trial.genotype for trial in pending)
        goal = self.goals[number % len(self.goals)]
        best = pareto.best(tuple(self.trials.values()), goal, self.limit, 1)
        g = best[0].genotype if best else space.parent(self.space)
        for step in range(self.tries):
            if g not in self.seen:
                self.seen.add(g)
                return Proposal(genotype=g)
            g = space.mutate(self.space, g, rng) if step % 4 else space.sample(self.space, rng)
        return None

    def tell(self, trial):  # noqa: ANN001, ANN201
        """Remember it; a later word on the same number replaces the earlier."""
        self.trials[trial.number] = trial
        self.seen.add(trial.genotype)
