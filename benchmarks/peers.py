"""General optimizers behind ask/tell, for `searchers.py`: pymoo's NSGA-II and Syne Tune's MO-REA.

pymoo's population is 20 rather than the default 100, which in 200 trials would hardly begin to evolve: on tuning seeds
that is the better (0.864 against 0.691 on 20 genes); Syne Tune's default is the better one there.
A genotype that was evaluated already is answered from memory and costs no trial. Budgets are constraints for pymoo;
MO-REA knows none, so what violates them has the violation added to both objectives.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from typing import Any

import numpy as np

from autocompress import pareto
from autocompress import space as sp
from autocompress.types import Facts, Genotype, Goal, Limit, Proposal, Space, Trial

WORST = 10.0  # added to both objectives of what was never measured
REPEATS = 200


class Peer(ABC):
    """A generator of genotypes that is sent (quality lost, latency, violation) of each."""

    usual: int  # size of its population

    def __init__(
        self,
        space: Space,
        goals: Sequence[Goal],
        limit: Limit,
        facts: Facts,  # noqa: ARG002
        seed: int,
        *,
        population: int = 0,
    ) -> None:
        self.space, self.goal, self.limit, self.seed, self.population = (
            space,
            goals[0],
            limit,
            seed,
            population or self.usual,
        )
        self.known: dict[Genotype, tuple[float, float, float]] = {}
        self.stream = self.genotypes()
        self.waiting = next(self.stream)

    @abstractmethod
    def genotypes(self) -> Iterator[Genotype]:
        """Yield raw genotypes; `self.known` holds the canonical one's figures when it is resumed."""

    def ask(self, number: int, pending: Sequence[Trial]) -> Proposal | None:  # noqa: ARG002
        """The next that is not known."""
        for _ in range(REPEATS):
            g = sp.canonical(self.space, self.waiting)
            if g not in self.known:
                return Proposal(genotype=g)
            self.waiting = next(self.stream)
        return None

    def tell(self, trial: Trial) -> None:
        """Remember its figures, all to be minimised."""
        score = pareto.of(trial, self.goal, self.limit)
        if score is None:
            self.known[trial.genotype] = (WORST, WORST, WORST)
        else:
            lost = -score.quality if math.isfinite(score.quality) else WORST
            self.known[trial.genotype] = (lost, score.latency, score.violation)

    def figures(self, g: Genotype) -> tuple[float, float, float]:
        """Of a genotype as it was yielded."""
        return self.known[sp.canonical(self.space, g)]


class Pymoo(Peer):
    """NSGA-II (Blank and Deb 2020) on integers, with its constraint."""

    usual = 20

    def genotypes(self) -> Iterator[Genotype]:
        """Generation by generation."""
        nsga2 = import_module("pymoo.algorithms.moo.nsga2").NSGA2
        rounding = import_module("pymoo.operators.repair.rounding").RoundingRepair()
        sbx = import_module("pymoo.operators.crossover.sbx").SBX(vtype=float, repair=rounding)
        pm = import_module("pymoo.operators.mutation.pm").PM(vtype=float, repair=rounding)
        sampling = import_module("pymoo.operators.sampling.rnd").IntegerRandomSampling()
        high = np.array([len(gene.choices) - 1 for gene in self.space.genes])
        problem = import_module("pymoo.core.problem").Problem(
            n_var=len(high), n_obj=2, n_ieq_constr=1, xl=0, xu=high, vtype=int
        )
        algorithm: Any = nsga2(pop_size=self.population, sampling=sampling, crossover=sbx, mutation=pm)
        algorithm.setup(problem, seed=self.seed, verbose=False)
        evaluator = import_module("pymoo.core.evaluator").Evaluator()
        static = import_module("pymoo.problems.static").StaticProblem
        while True:
            children = algorithm.ask()
            rows: list[tuple[float, float, float]] = []
            for x in children.get("X"):
                g = tuple(round(float(value)) for value in x)
                yield g
                rows.append(self.figures(g))
            found = np.array(rows)
            evaluator.eval(static(problem, F=found[:, :2], G=found[:, 2:]), children)
            algorithm.tell(infills=children)


class MoRea(Peer):
    """Multi-objective regularized evolution of Syne Tune (Salinas et al. 2022), after Real et al. 2019."""

    usual = 100

    def genotypes(self) -> Iterator[Genotype]:
        """One by one."""
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # it advertises its extras
            kinds = import_module("syne_tune.config_space")
            module = import_module(
                "syne_tune.optimizer.schedulers.multiobjective.multi_objective_regularized_evolution"
            )
        names = [gene.name for gene in self.space.genes]
        space = {gene.name: kinds.randint(0, len(gene.choices) - 1) for gene in self.space.genes}
        searcher: Any = module.MultiObjectiveRegularizedEvolution(
            space, population_size=self.population, random_seed=self.seed
        )
        trial = 0
        while True:
            configuration = searcher.suggest()
            g = tuple(int(configuration[name]) for name in names)
            yield g
            lost, latency, violation = self.figures(g)
            searcher.on_trial_complete(trial, configuration, [lost + violation, latency + violation])
            trial += 1
