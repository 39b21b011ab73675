"""What a user should hear while a search can still be stopped: budgets nobody meets, metrics that are always alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from autocompress import pareto
from autocompress.types import Facts, Goal, Limit, Quality, State, Trial, UserError
from autocompress.wording import times, wish

MEASURED = 12  # candidates without one that meets a budget, from which it is said
FAILED = 5  # candidates from the first on that failed
ALIKE = 6  # fully trained candidates of exactly one quality


def refuse(quality: Quality) -> None:
    """Raises UserError for a baseline whose quality, or its interval, is no number: nothing could be compared."""
    value = quality.value
    strange = [one for one in (value.value, value.low, value.high) if not math.isfinite(one)]
    if strange:
        what = "is" if not math.isfinite(value.value) else f"is {value.value:g} in an interval that ends at"
        raise UserError(
            f"the unmodified network's {quality.metric} {what} {strange[0]} on the {quality.split} split: "
            "look at its outputs and at the task's `quality`"
        )


def at_the_start(facts: Facts, limit: Limit) -> tuple[str, ...]:
    """Of limits that the network itself does not meet."""
    known = facts.baseline_quality
    if known is None or known.value.value >= limit.floor:
        return ()
    return (f"{limit.metric} {limit.floor:g} is asked for, but the network itself has {known.value.value:.4g}",)


def lines(trials: Sequence[Trial], goals: Sequence[Goal], limit: Limit) -> Mapping[str, str]:
    """By subject, what the trials so far give reason to say; each subject is worth saying once."""
    ended = [trial for trial in trials if trial.number > 0 and trial.state.ended]
    found: dict[str, str] = {}
    if len(ended) >= FAILED and all(trial.state is State.FAILED for trial in ended):
        first = min(ended, key=lambda trial: trial.number)
        found["failed"] = (
            f"all of the first {len(ended)} candidates failed; #{first.number}: {first.outcome.reason or 'no reason'}"
        )
    for goal in goals:
        closest = _closest(ended, goal)
        if closest is not None:
            count, trial, over = closest
            seen = [trial.outcome.readings[budget.profile] for budget in goal.budgets]
            speeds = " and ".join(times(reading.speedup) for reading in seen)
            found[goal.name] = (
                f"{goal.name}: none of {count} candidates measured so far meets {_asked(goal)}; closest is "
                f"#{trial.number} with {speeds}, {100 * over:.0f} % over"
            )
    qualities = [q.value.value for t in ended if t.state is State.DONE for q in list(t.outcome.quality.values())[:1]]
    if len(qualities) >= ALIKE and len(set(qualities)) == 1:
        found["alike"] = (
            f"{limit.metric} is {qualities[0]:g} for all {len(qualities)} candidates so far; "
            "look at the task's `quality`"
        )
    return found


def _closest(ended: Sequence[Trial], goal: Goal) -> tuple[int, Trial, float] | None:
    """(measured, nearest to the budgets, relative excess); None while too few were measured or one meets them."""
    excess: list[tuple[float, Trial]] = []
    free = Limit(metric="", floor=-math.inf)
    for trial in ended:
        # with any quality that is a number, what is left of a violation is the budgets'
        score = pareto.of(trial, goal, free)
        if score is not None:
            known = all(budget.profile in trial.outcome.quality for budget in goal.budgets)
            excess.append((score.violation if known or score.violation != 1.0 else 0.0, trial))
    if len(excess) < MEASURED or any(over <= 0 for over, _ in excess):
        return None
    over, trial = min(excess, key=lambda entry: (entry[0], entry[1].number))
    return len(excess), trial, over


def _asked(goal: Goal) -> str:
    several = len(goal.budgets) > 1
    return ", ".join(f"{wish(budget)}{f' on {budget.profile}' if several else ''}" for budget in goal.budgets)
