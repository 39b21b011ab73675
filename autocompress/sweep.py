"""What a finished search leaves in its store."""

from __future__ import annotations

from collections.abc import Sequence

from autocompress import pareto
from autocompress.evaluator import Checkpoint, missed
from autocompress.finals import finalists
from autocompress.store import Store
from autocompress.types import Goal, Limit, State, Trial, UserError


def sweep(store: Store, trials: Sequence[Trial], goals: Sequence[Goal], limit: Limit) -> None:
    """Drop what a finished search no longer needs: files of trials that are neither on a front nor waiting.

    Logs of failures stay, checkpoints of stopped trials, which a longer search may promote, and what a device missed.
    """
    fronts = {trial.number for goal in goals for trial in pareto.front(trials, goal, limit)}
    fronts |= {trial.number for goal in goals for trial in finalists(trials, goal, limit)}
    needed: set[str] = set()
    for trial in trials:
        if trial.state is not State.DONE or trial.number in fronts or missed(trial.outcome):
            needed |= set(trial.outcome.files.values())
            needed |= _inside(store, trial.outcome.files.get("checkpoint"))
    store.keep_only(needed)


def _inside(store: Store, sha: str | None) -> set[str]:
    """A checkpoint names a further file."""
    if sha is None or not store.has(sha):
        return set()
    try:
        return {Checkpoint.model_validate_json(store.get(sha)).training}
    except (ValueError, UserError):  # damaged: its trial will be trained anew
        return set()
