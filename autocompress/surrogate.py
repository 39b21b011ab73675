"""How long a file would take on a device, predicted from its kernels and the files that were measured (floor F1).

It steers, it is never a result. What a file's kernels take alone is known (`devices/kerneltable.py`). What the
time of each operation makes in a whole file, beside its neighbours and with colder caches, is fitted to the readings:
one factor for all operations, from which each departs as far as the readings ask for, and something per
kernel and per run. Relative errors count, and a reading far off counts little (Huber's weights). Intervals are those of
errors on files that a fit had not seen (V. Vovk, Cross-conformal predictors, Annals of Mathematics and Artificial
Intelligence 74, 2015).

The solver is scipy's, which is what scikit-learn's LinearRegression(positive=True) calls: importing that takes 1.5 s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from autocompress.types import Budget, LatencyModel, Reading, Record, Screen, Trial

Amounts = Mapping[str, float]
"""Operation -> what its kernels in one run take, each alone; and how many kernels there are (KERNELS)."""

KERNELS = "kernels"

FEWEST = 24  # readings without which nothing is predicted
FOLDS = 10
DEPARTS, SMALL = 0.1, 0.02  # weight of an operation's departure from the others, and of what kernels and runs take
ROUNDS = 6  # of weighting anew
COVERED = 0.95
TENTH = 0.1
MARGIN = 1.1  # by which a prediction must be over a budget, beyond its interval


class Error(Record):
    """Of predictions for files that the fit had not seen."""

    readings: int
    median: float  # of relative errors
    p95: float
    within_tenth: float  # share of files
    rank: float  # Spearman's correlation of predicted and measured


@dataclass(frozen=True)
class Known:
    """One measured file."""

    amounts: Amounts
    ratio: float


def fit(measured: Sequence[Known]) -> LatencyModel | None:
    """A model with calibrated intervals; None for too few readings. Equal input gives an equal model."""
    if len(measured) < FEWEST:
        return None
    model = _solved(measured)
    held = np.abs(np.log(held_out(measured) / np.array([one.ratio for one in measured])))
    # the smallest error that the wanted share of further files stays below, for any distribution of errors
    place = min(math.ceil(COVERED * (len(held) + 1)), len(held)) - 1
    return model.model_copy(update={"factor": float(np.exp(np.sort(held)[place]))})


def held_out(measured: Sequence[Known]) -> NDArray[np.float64]:
    """For every file the prediction of a fit to the others' folds."""
    found = np.zeros(len(measured))
    folds = np.random.default_rng(0).permutation(len(measured)) % FOLDS
    for fold in range(FOLDS):
        model = _solved([one for one, at in zip(measured, folds, strict=True) if at != fold])
        for place in map(int, np.flatnonzero(folds == fold)):
            found[place] = model.ratio(measured[place].amounts)
    return np.maximum(found, 1e-6)


def error(measured: Sequence[Known]) -> Error | None:
    """Of cross-validation; None for too few readings."""
    return judged(held_out(measured), [one.ratio for one in measured]) if len(measured) >= FEWEST else None


def judged(predicted: Sequence[float] | NDArray[np.float64], ratios: Sequence[float]) -> Error:
    """Predictions held against readings."""
    off = np.abs(np.asarray(predicted) / np.asarray(ratios) - 1.0)
    order, other = (np.argsort(np.argsort(values)) for values in (predicted, ratios))
    return Error(
        readings=len(off),
        median=float(np.median(off)),
        p95=float(np.quantile(off, 0.95)),
        within_tenth=float(np.mean(off <= TENTH)),
        rank=float(np.corrcoef(order, other)[0, 1]),
    )


def _solved(measured: Sequence[Known]) -> LatencyModel:
    """Least squares of relative errors, no unit below zero. An operation that no file has takes what is usual."""
    names = sorted({name for one in measured for name, amount in one.amounts.items() if amount > 0 and name != KERNELS})
    ratios = np.array([one.ratio for one in measured], dtype=np.float64)
    amounts = np.array([[one.amounts.get(name, 0.0) for name in [*names, KERNELS]] for one in measured]) + 1e-12
    # columns: operations, kernels, runs, and the factor for all operations, which is in no reading but in the penalty
    usual = 1 / np.median(amounts[:, :-1].sum(axis=1) / ratios)
    scale = np.r_[np.full(len(names), usual), np.median(ratios / amounts[:, -1])]
    always = float(np.median(ratios))
    rows = np.c_[amounts * scale, np.full(len(ratios), always), np.zeros(len(ratios))] / ratios[:, None]
    penalty = np.diag([*[DEPARTS] * len(names), SMALL, SMALL])
    penalty = np.c_[penalty, [*[-DEPARTS] * len(names), 0.0, 0.0]]
    trust, found = np.ones(len(ratios)), np.zeros(rows.shape[1])
    for _ in range(ROUNDS):
        found, _ = nnls(np.r_[rows * trust[:, None], penalty], np.r_[trust, np.zeros(len(penalty))])
        off = np.abs(rows @ found - 1.0)
        typical = max(1.48 * float(np.median(off)), 0.01)
        trust = np.sqrt(np.minimum(1.0, 1.5 * typical / np.maximum(off, 1e-9)))
    units = dict(zip([*names, KERNELS], map(float, found[:-2] * scale), strict=True))
    return LatencyModel(units=units, usual=float(found[-1] * usual), always=float(found[-2] * always), factor=1.0)


# --- of trials ------------------------------------------------------------------------------------------------------


def known(trials: Sequence[Trial], profile: str) -> list[Known]:
    """What trials tell of a device, in their order: firm readings beside the work of their files."""
    found: list[Known] = []
    for trial in trials:
        reading, amounts = trial.outcome.readings.get(profile), trial.outcome.amounts.get(profile)
        if reading is not None and amounts and not reading.noisy:
            found.append(Known(amounts, reading.ratio.value))
    return found


def screens(trials: Sequence[Trial], budgets: Sequence[Budget], baseline: Mapping[str, Reading]) -> dict[str, Screen]:
    """A screen per device, by the trials that have ended, in the order in which they did; empty unless all have one.

    Fitted anew whenever the readings have grown by half, so that a function of the trials stays a cheap one.
    """
    found: dict[str, Screen] = {}
    for budget in budgets:
        told, most = known(trials, budget.profile), ceiling(budget, baseline.get(budget.profile))
        model = fit(told[: portion(len(told))]) if most is not None else None
        if model is None or most is None:
            return {}
        found[budget.profile] = Screen(model=model, most=most)
    return found


def portion(count: int) -> int:
    """Readings that a model is fitted to: the largest of 24, 36, 54 ... that there are, 0 below."""
    size = FEWEST
    if count < size:
        return 0
    while size * 3 // 2 <= count:
        size = size * 3 // 2
    return size


def ceiling(budget: Budget, baseline: Reading | None) -> float | None:
    """The ratio to the baseline above which a budget does not hold; None where it bounds no median latency."""
    bounds = [1.0 / budget.speedup] if budget.speedup is not None else []
    if budget.latency_ms is not None and baseline is not None:
        bounds.append(budget.latency_ms / baseline.ms.low)
    return min(bounds, default=None)


def hopeless(screens: Mapping[str, Screen], amounts: Mapping[str, Amounts]) -> bool:
    """Whether a file is over every budget by MARGIN even at the favourable end of its interval."""
    for profile, screen in screens.items():
        least = screen.model.at_least(amounts.get(profile, {})) if profile in amounts else None
        if least is None or least <= MARGIN * screen.most:
            return False
    return bool(screens)
