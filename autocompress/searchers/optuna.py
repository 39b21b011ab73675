"""Optuna's samplers behind ask/tell (an optional extra): TPE (Bergstra et al. 2011), NSGA-II and Gaussian processes.

One in-memory study per goal; whose turn it is proposes, and every study is told every trial. Constraints are the
goal's violation. Genes that do not apply are not suggested at all, as Optuna's define-by-run style intends; only
Gaussian processes are told all of them, since they know no such spaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any
from zlib import crc32

from autocompress import pareto
from autocompress import space as sp
from autocompress.pareto import Score
from autocompress.searchers.fresh import Taken, numbered
from autocompress.types import Facts, Genotype, Goal, Limit, Proposal, Space, Trial, UserError

SAMPLERS = {"tpe": "TPESampler", "nsga2": "NSGAIISampler", "gp": "GPSampler"}
REPEATS = 10
NEEDS = "searcher 'optuna' needs Optuna 5 or newer: pip install 'autocompress[optuna]' 'optuna>=5'"


class Optuna:
    """ask/tell. Options: `sampler` ("tpe", "nsga2", or "gp", which needs torch and takes seconds per ask); all others
    go to that sampler's constructor."""

    def __init__(
        self,
        space: Space,
        goals: Sequence[Goal],
        limit: Limit,
        facts: Facts,
        seed: int,
        *,
        sampler: str = "tpe",
        **options: Any,
    ) -> None:
        if sampler not in SAMPLERS:
            raise UserError(f"optuna: sampler {sampler!r} is not one of {', '.join(SAMPLERS)}")
        try:
            self.optuna: Any = import_module("optuna")
        except ImportError as missing:
            raise UserError(NEEDS) from missing
        if not hasattr(self.optuna.trial.Trial, "set_constraint"):
            raise UserError(f"{NEEDS} (found {self.optuna.__version__})")
        self.space, self.goals, self.limit, self.seed = space, tuple(goals), limit, seed
        self.kind, self.options, self.always = sampler, options, sampler == "gp"
        self.knobs = sp.knobs(space)
        # Numbers in order are integers to the sampler, names are categories.
        self.ordered = [knob.ordered and knob.size > 2 for knob in self.knobs]
        kinds = self.optuna.distributions
        self.distributions = [
            kinds.IntDistribution(0, knob.size - 1) if ordered else kinds.CategoricalDistribution(range(knob.size))
            for knob, ordered in zip(self.knobs, self.ordered, strict=True)
        ]
        self.taken = Taken(space)
        self.asked: dict[int, tuple[int, Any]] = {}  # number -> goal and Optuna's running trial
        self.trials: dict[int, Trial] = {-1 - i: trial for i, trial in enumerate(facts.warm)}
        self.results = {sp.canonical(space, trial.genotype): trial for trial in facts.warm}
        self.turn = 0
        self.studies = self._studies()

    def ask(self, number: int, pending: Sequence[Trial]) -> Proposal | None:
        """What the sampler suggests; None when the space is exhausted.

        Samplers repeat themselves: a repetition is answered at once with what is known and costs no evaluation; after
        some of these a neighbour of the last is asked for.
        """
        self.taken.add(pending)
        goal = self.turn % len(self.goals)
        self.turn += 1
        study = self.studies[goal]
        # Random numbers come from (seed, number), so the sampler of this ask is a new one.
        study.sampler = self._sampler(crc32(f"{self.seed}:{number}".encode()))
        suggested = sp.parent(self.space)
        for _ in range(REPEATS):
            running = study.ask()
            suggested = self._walk(running)
            if suggested not in self.taken.genotypes:
                self.taken.genotypes.add(suggested)
                self.asked[number] = (goal, running)
                return Proposal(genotype=suggested)
            known = self.results.get(suggested)
            if known is None:  # still running
                study.tell(running, state=self.optuna.trial.TrialState.FAIL)
            else:
                self._add(study, self.goals[goal], known, running)
        repeated = suggested
        found = self.taken.fresh(lambda: repeated, numbered(self.seed, number), tries=1)
        return None if found is None else Proposal(genotype=found)

    def tell(self, trial: Trial) -> None:
        """Tell every study. A later tell of the same number needs the studies built anew: Optuna's trials are final."""
        self.taken.add([trial])
        again = trial.number in self.trials
        self.trials[trial.number] = trial
        self.results[sp.canonical(self.space, trial.genotype)] = trial
        if again:
            self.asked = {}
            self.studies = self._studies()
            return
        goal, running = self.asked.pop(trial.number, (-1, None))
        for i, study in enumerate(self.studies):
            self._add(study, self.goals[i], trial, running if i == goal else None)

    def _studies(self) -> list[Any]:
        self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)
        made: list[Any] = []
        for goal in self.goals:
            study = self.optuna.create_study(directions=["maximize", "minimize"], sampler=self._sampler(self.seed))
            for trial in self.trials.values():
                self._add(study, goal, trial, None)
            made.append(study)
        return made

    def _sampler(self, seed: int) -> Any:
        kind = getattr(self.optuna.samplers, SAMPLERS[self.kind])
        try:
            return kind(seed=seed, **self.options)
        except (TypeError, ValueError) as wrong:
            raise UserError(f"optuna: sampler {self.kind!r} refuses its options: {wrong}") from wrong

    def _walk(self, running: Any) -> Genotype:
        values: list[int] = []
        for gene, knob, ordered in zip(self.space.genes, self.knobs, self.ordered, strict=True):
            if knob.size < 2 or not (self.always or knob.applies(values)):
                values.append(0)
            elif ordered:
                values.append(running.suggest_int(gene.name, 0, knob.size - 1))
            else:
                values.append(running.suggest_categorical(gene.name, range(knob.size)))
        return sp.canonical(self.space, tuple(values))

    def _add(self, study: Any, goal: Goal, trial: Trial, running: Any) -> None:
        score = pareto.of(trial, goal, self.limit)
        states = self.optuna.trial.TrialState
        state = states.FAIL if score is None else states.COMPLETE
        values = None if score is None else self._values(score)
        if running is not None:
            if score is not None:
                running.set_constraint("violation", score.violation)
            study.tell(running, values, state)
            return
        genotype = sp.canonical(self.space, trial.genotype)
        applies = [knob.size > 1 and (self.always or knob.applies(genotype)) for knob in self.knobs]
        rows = list(zip(self.space.genes, genotype, self.distributions, applies, strict=True))
        found = self.optuna.trial.create_trial(
            state=state,
            values=values,
            params={gene.name: value for gene, value, _, held in rows if held},
            distributions={gene.name: distribution for gene, _, distribution, held in rows if held},
            constraints=None if score is None else {"violation": score.violation},
        )
        study.add_trial(found)

    def _values(self, score: Score) -> list[float]:
        # Optuna wants numbers: without quality (such a trial violates its constraint anyway) far below the floor.
        return [max(score.quality, self.limit.floor - abs(self.limit.floor) - 1.0), score.latency]
