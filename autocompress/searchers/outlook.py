"""What is expected of genotypes nobody tried, per goal: loss of quality and latency, from told trials and the probe."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from autocompress import pareto
from autocompress import space as sp
from autocompress.earlier import SOURCE
from autocompress.pareto import Score
from autocompress.searchers.additive import SIZE, Additive, additive
from autocompress.searchers.additive import rows as encoded
from autocompress.searchers.belief import Array, Coding, Fit, Guess, fit
from autocompress.surrogate import ceiling
from autocompress.types import Facts, Goal, Limit, Space, Trial

FEWEST = 6  # told trials that a fit needs
MEMORY = 400  # told trials that a fit takes at most: the latest
AGAIN = 1.2  # growth after which hyperparameters are chosen anew
PAIRS = 4  # trials of an earlier run that were tried again, from which these tell how well it ranks
UNKNOWN = 0.7  # correlation of ranks that an earlier run is taken to have before anything tells
OVER = 10.0  # beyond any loss, which grows as its logarithm
WIDEST = 1.05  # latency ratio up to which a front counts where no budget bounds it
Base = Callable[[Array], Sequence[Array]]
SIZED = "size:"  # before a profile's name: the size of its files


@dataclass(frozen=True)
class Outlook:
    """Functions of rows for one goal. Loss 1 stands at the quality floor, latencies are logarithms of ratios."""

    loss: Guess
    latencies: tuple[Guess, ...]  # one per device of the goal
    bounds: tuple[float, ...]  # their upper bounds, as logarithms
    sizes: tuple[Guess, ...] = ()  # one per device whose budget bounds the file's size, 1 at the bound
    base: Base | None = None  # what the guesses are added to

    def latency(self, rows: Array) -> Array:
        """(n,) logarithm of the ratio, mean over devices."""
        return self.middle(self.values(rows))

    def excess(self, rows: Array) -> Array:
        """(n,) by how much the worst budget is exceeded; negative below all."""
        return self.worst(self.values(rows))

    @staticmethod
    def short(loss: Array, excess: Array) -> Array:
        """(n,) how far from all that is asked for, 0 for what holds it.

        What is over a budget is never trained: whatever its loss, it is farther than all that holds the budgets.
        """
        return np.where(excess > 0, OVER + excess, np.maximum(loss - 1.0, 0.0))

    def values(self, rows: Array) -> list[Array]:
        """(n,) of each latency, then of each size."""
        found = [guess(rows) for guess in (*self.latencies, *self.sizes)]
        return found if self.base is None else [one + two for one, two in zip(found, self.base(rows), strict=True)]

    def middle(self, values: Sequence[Array]) -> Array:
        """`latency` of values at hand."""
        return np.mean(values[: len(self.latencies)], axis=0)

    def worst(self, values: Sequence[Array]) -> Array:
        """`excess` of values at hand."""
        bounds = (*self.bounds, *(1.0 for _ in self.sizes))
        return np.max([value - bound for value, bound in zip(values, bounds, strict=True)], axis=0)


class Beliefs:
    """Everything told, and what was fitted to it."""

    def __init__(self, space: Space, goals: Sequence[Goal], limit: Limit, facts: Facts, *, based: bool = False) -> None:
        """With `based` latencies and sizes are fitted as what differs from a probe's additive model, if there is one.

        That model knows what a product of choices is; its ratios have no slope for relaxed genotypes.
        """
        self.model = additive(space, facts) if based else None
        self.megabytes = facts.baseline_size_mb
        self.space, self.goals, self.limit = space, tuple(goals), limit
        self.profiles = tuple(dict.fromkeys(b.profile for goal in goals for b in goal.budgets))
        known = facts.baseline_quality
        self.top = None if known is None else known.value.value
        self.bounds = [
            tuple(math.log(ceiling(b, facts.baseline.get(b.profile)) or WIDEST) for b in goal.budgets)
            for goal in self.goals
        ]
        self.most_mb = {
            f"{SIZED}{b.profile}": b.size_mb for goal in goals for b in goal.budgets if b.size_mb is not None
        }
        gains = probed(space, facts)
        sized = dict.fromkeys(self.most_mb, gains.get(SIZED))
        named = {name: gains.get(name) for name in ("", *self.profiles)}
        whole = {name for name in (*self.profiles, *self.most_mb) if self._device(name) is not None}
        named |= dict.fromkeys(whole & named.keys())
        sized |= dict.fromkeys(whole & sized.keys())
        self.codings = {name: Coding(space, facts, known) for name, known in (named | sized).items()}
        self.trials: dict[int, Trial] = {}
        self.rows: dict[int, Array] = {}
        self.ratios: dict[int, Array] = {}  # (1, devices) that the additive model expects of each
        self.sources: list[int] = []  # earlier runs of which trials were told
        self.fits: dict[tuple[str, int], Fit] = {}
        self.sizes: dict[tuple[str, int], int] = {}
        self.fresh: dict[tuple[str, int], int] = {}
        self.count = 0

    def tell(self, number: int, trial: Trial) -> None:
        """Take note of a trial, in place of what its number said before."""
        self.trials.pop(number, None)
        self.trials[number] = trial
        self.rows[number] = encoded(self.space, [sp.canonical(self.space, trial.genotype)])[0]
        if self.model is not None:
            self.ratios[number] = self.model.ratios(self.rows[number][None])
        self.count += 1
        source = _source(number, trial)
        if source is not None and source not in self.sources:
            self.sources.append(source)

    def scores(self, goal: int) -> dict[int, Score]:
        """Of the told trials that were measured, by number."""
        found = {n: pareto.of(t, self.goals[goal], self.limit) for n, t in self.trials.items()}
        return {number: score for number, score in found.items() if score is not None}

    def highest(self) -> float:
        """Quality of the parent; the highest told where that is not known."""
        if self.top is not None:
            return self.top
        told = [q.value.value for t in self.trials.values() for q in t.outcome.quality.values()]
        return max((value for value in told if math.isfinite(value)), default=self.limit.floor)

    def lost(self, quality: float) -> float:
        """Loss of quality: 0 for the parent's, 1 at the floor, growing slowly far below it."""
        top = self.highest()
        span = top - self.limit.floor
        span = span if span > 0 else max(abs(self.limit.floor), 1e-9) * 0.01
        drop = (top - quality) / span
        return math.asinh(3.0 * drop) / math.asinh(3.0)

    def about(self, goal: int, rng: np.random.Generator | None = None, width: float = 1.0) -> Outlook | None:
        """What is expected under a goal, or with `rng` one draw of what may be; None while too little is known."""
        fits = [self._fit(budget.profile, 0) for budget in self.goals[goal].budgets]
        latencies = [_function(found, rng, width) for found in fits if found is not None]
        if len(latencies) < len(fits) or not fits:
            return None
        named = [f"{SIZED}{budget.profile}" for budget in self.goals[goal].budgets]
        sizes = [self._fit(name, 0) for name in named if name in self.most_mb]
        told = self._fit("", goal)
        loss = few_cuts(self.codings[""]) if told is None else _function(told, rng, width)
        small = tuple(_function(found, rng, width) for found in sizes if found is not None)
        if self.model is None:
            return Outlook(loss, tuple(latencies), self.bounds[goal], small)
        names = [budget.profile for budget in self.goals[goal].budgets]
        names += [name for name in named if name in self.most_mb and self.fits.get((name, 0)) is not None]
        return Outlook(loss, tuple(latencies), self.bounds[goal], small, self._base(self.model, names))

    def _device(self, what: str) -> int | None:
        """Where the additive model has a profile's latency, or the size; None where it has not."""
        if self.model is None or (not self.megabytes and what in self.most_mb):
            return None
        known = [device.profile for device in self.model.devices]
        name = SIZE if what in self.most_mb else what
        return known.index(name) if name in known else None

    def _base(self, model: Additive, names: Sequence[str]) -> Base:
        """What the additive model says of latencies and sizes, in the units of the fits; 0 for those it lacks."""
        places = [self._device(name) for name in names]

        def base(rows: Array) -> list[Array]:
            ratios = model.ratios(rows)
            return [
                np.zeros(len(rows)) if place is None else self._unit(name, ratios[:, place])
                for name, place in zip(names, places, strict=True)
            ]

        return base

    def _unit(self, what: str, ratios: Array) -> Array:
        """Ratios to the baseline as fits have them."""
        return ratios * self.megabytes / self.most_mb[what] if what in self.most_mb else np.log(ratios)

    def _fit(self, what: str, goal: int) -> Fit | None:
        key = (what, goal)
        if self.fresh.get(key) == self.count:
            return self.fits.get(key)
        self.fresh[key] = self.count
        rows, values, beside, doubt = [], [], [], []
        trust = {source: self.trust(source, what, goal) for source in self.sources}
        told = list(self.trials.items())[-MEMORY:]
        # What more training adds is as large from a tiny share to a small one as from there to all of it. Expected is
        # what candidates reach at the highest share seen: the control, trained before, says nothing of training.
        levels = sorted({trial.outcome.fidelity for number, trial in told if number})[:-1] if not what else []
        for number, trial in told:
            value = self._value(trial, what, goal)
            if value is not None:
                rows.append(self.rows[number])
                values.append(value - self._expected(what, number))
                mine = _source(number, trial)
                below = (float(trial.outcome.fidelity == level) for level in levels)
                beside.append([*below, *(float(s == mine) for s in self.sources)])
                doubt.append(0.0 if mine is None else trust[mine])
        if len(values) < FEWEST:
            self.fits.pop(key, None)
            return None
        like = self.fits.get(key)
        if like is None or len(values) >= AGAIN * self.sizes[key] or len(values) < self.sizes[key]:
            like, self.sizes[key] = None, len(values)
        found = fit(self.codings[what], np.stack(rows), np.array(values), np.array(beside), like, np.array(doubt))
        self.fits[key] = found
        return found

    def _expected(self, what: str, number: int) -> float:
        """What the additive model says of a told trial; 0 where it says nothing."""
        place = self._device(what)
        return 0.0 if place is None else float(self._unit(what, self.ratios[number][:, place])[0])

    def trust(self, source: int, what: str, goal: int) -> float:
        """Variance to allow an earlier run's trials beyond the noise, of 1, by how well they rank here.

        By those that were tried here again where there are enough, else by what the probe lets expect.
        """
        theirs: dict[bytes, float] = {}
        mine: dict[bytes, float] = {}
        for number, trial in self.trials.items():
            value = self._value(trial, what, goal)
            belongs = _source(number, trial)
            if value is not None and belongs in (None, source):
                (mine if belongs is None else theirs)[self.rows[number].tobytes()] = value
        both = [key for key in theirs if key in mine]
        rank = UNKNOWN
        if len(both) >= PAIRS:
            rank = _rank([theirs[key] for key in both], [mine[key] for key in both])
        elif len(theirs) >= FEWEST:
            rows = np.stack([np.frombuffer(key) for key in theirs])
            place = self._device(what)
            if self.model is not None and place is not None:
                rank = _rank(list(theirs.values()), self.model.ratios(rows)[:, place].tolist())
            elif self.codings[what].known.any():
                rank = _rank(list(theirs.values()), (rows @ self.codings[what].known).tolist())
        rank = max(rank, 0.03)
        return max((1.0 - rank**2) / rank**2, 0.01)

    def _value(self, trial: Trial, what: str, goal: int) -> float | None:
        if what in self.most_mb:
            size = trial.outcome.size_mb.get(what[len(SIZED) :])
            return None if size is None else size / self.most_mb[what]
        if what:
            reading = trial.outcome.readings.get(what)
            return None if reading is None else math.log(max(reading.ratio.value, 1e-6))
        score = pareto.of(trial, self.goals[goal], self.limit)
        return None if score is None or not math.isfinite(score.quality) else self.lost(score.quality)


def _function(found: Fit, rng: np.random.Generator | None, width: float) -> Guess:
    return found.mean() if rng is None else found.draw(rng, width)


def few_cuts(coding: Coding) -> Guess:
    """Where no quality is known, since all was over budget so far: the fewer cuts the better."""
    nothing = np.zeros((coding.width, 0))
    return Guess(0.0, np.full(coding.width, 2.0 / max(1, len(coding.space.genes))), nothing, np.zeros(0), 0.0)


def _source(number: int, trial: Trial) -> int | None:
    """Which earlier run a trial comes from; None for this run's own."""
    return int(trial.note.get(SOURCE, 0)) if number < 0 else None


def _rank(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's correlation; 0 where one of them is all alike."""
    if len(set(a)) < 2 or len(set(b)) < 2:
        return 0.0
    first, second = (np.argsort(np.argsort(one, kind="stable")) for one in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


def probed(space: Space, facts: Facts) -> dict[str, list[float]]:
    """Per column of the space, what the probe found: "" the divergence, by profile the share of the latency gained,
    under SIZED that of the size.

    What was looked at in both backgrounds counts by their mean. Empty where nothing was probed.
    """
    seen = {(one.gene, isinstance(one.choice, bool), one.choice): one for one in facts.probe}
    rows = [
        seen.get((gene.name, isinstance(choice, bool), choice)) for gene in space.genes for choice in gene.choices[1:]
    ]
    if not any(one is not None and one.ms for one in rows):
        return {}
    found = {"": [_mean([one.kl, one.best_kl]) if one is not None else 0.0 for one in rows]}
    for profile, reading in facts.baseline.items():
        ms = reading.ms.value
        found[profile] = [
            0.0 if one is None else -_mean([one.ms.get(profile), one.best_ms.get(profile)]) / ms for one in rows
        ]
    if any(one is not None and one.smaller is not None for one in rows):
        found[SIZED] = [0.0 if one is None else -(one.best_smaller or one.smaller or 0.0) for one in rows]
    return found


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0
