"""How long a file would take on a device, predicted from those that were measured there (floor F1).

It steers, it is never a result. A file is an amount of work of some kinds (multiply-adds of integer convolutions,
numbers that cross a border between types ...); what a unit of each kind takes is fitted to the readings, no unit less
than nothing. Relative errors count, and a reading far off counts little (Huber's weights). Intervals are those of
errors on files that a fit had not seen (V. Vovk, Cross-conformal predictors, Annals of Mathematics and Artificial
Intelligence 74, 2015).

The solver is scipy's, which is what scikit-learn's LinearRegression(positive=True) calls: importing that takes 1.5 s.
A table of deviations by exact shape on top, shrunken or as a Gaussian process, gained nothing over this on 112 readings
of ResNet-56 and of MobileNetV3-small: 58 and 63 % within a tenth without, 54 to 62 and 63 to 66 % with.
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
"""Kind of work -> how much of it one run is."""

FEWEST = 24  # readings without which nothing is predicted
FOLDS = 10
SHRINK = 0.1  # weight of the penalty that decides between kinds of work that always come together
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
    kinds, amounts, ratios = _table(measured)
    units, always = _units(amounts, ratios)
    held = np.abs(np.log(held_out(measured) / ratios))
    # the smallest error that the wanted share of further files stays below, for any distribution of errors
    place = min(math.ceil(COVERED * (len(held) + 1)), len(held)) - 1
    factor = float(np.exp(np.sort(held)[place]))
    return LatencyModel(units=dict(zip(kinds, map(float, units), strict=True)), always=float(always), factor=factor)


def held_out(measured: Sequence[Known]) -> NDArray[np.float64]:
    """For every file the prediction of a fit to the others' folds."""
    _, amounts, ratios = _table(measured)
    found = np.zeros(len(measured))
    folds = np.random.default_rng(0).permutation(len(measured)) % FOLDS
    for fold in range(FOLDS):
        test = folds == fold
        units, always = _units(amounts[~test], ratios[~test])
        found[test] = amounts[test] @ units + always
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


def _table(measured: Sequence[Known]) -> tuple[list[str], NDArray[np.float64], NDArray[np.float64]]:
    """Kinds of work that some file has, amounts (files, kinds), ratios."""
    kinds = sorted({kind for one in measured for kind, amount in one.amounts.items() if amount > 0})
    amounts = np.array([[one.amounts.get(kind, 0.0) for kind in kinds] for one in measured], dtype=np.float64)
    return (
        kinds,
        amounts.reshape(len(measured), len(kinds)),
        np.array([one.ratio for one in measured], dtype=np.float64),
    )


def _units(amounts: NDArray[np.float64], ratios: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """What a unit of each kind takes, and what every run takes: least squares of relative errors, none below zero."""
    most = np.maximum(amounts.max(axis=0), 1e-12)
    rows = np.c_[amounts / most, np.ones(len(ratios))] / ratios[:, None]
    penalty = SHRINK * np.eye(rows.shape[1])
    trust, found = np.ones(len(ratios)), np.zeros(rows.shape[1])
    for _ in range(ROUNDS):
        found, _ = nnls(np.r_[rows * trust[:, None], penalty], np.r_[trust, np.zeros(len(penalty))])
        off = np.abs(rows @ found - 1.0)
        usual = max(1.48 * float(np.median(off)), 0.01)
        trust = np.sqrt(np.minimum(1.0, 1.5 * usual / np.maximum(off, 1e-9)))
    return found[:-1] / most, float(found[-1])


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
