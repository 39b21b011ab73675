"""What is said while a search can still be stopped, and that searchers bear what cannot be met."""

from __future__ import annotations

import pytest

from autocompress import early
from autocompress import space as sp
from autocompress.registry import resolve
from autocompress.searchers.evolution import Evolution
from autocompress.testing import ClosedForm
from autocompress.types import Interval, Limit, Outcome, State, Trial, UserError
from autocompress.wording import wish


def told(problem: ClosedForm, count: int, make=Evolution, change=lambda trial: trial, limit: Limit | None = None):
    searcher = make(problem.space, problem.goals, limit or problem.limit, problem.facts, 0)
    found = []
    for number in range(1, count + 1):
        proposal = searcher.ask(number, [])
        found.append(change(problem.trial(number, proposal.genotype, proposal.note)))
        searcher.tell(found[-1])
    assert len({trial.genotype for trial in found}) == count  # no canonical genotype twice
    assert all(sp.canonical(problem.space, trial.genotype) == trial.genotype for trial in found)
    return found


def alike(trial: Trial, value: float = 0.5) -> Trial:
    same = Interval(value=value, low=value, high=value)
    quality = {name: q.model_copy(update={"value": same}) for name, q in trial.outcome.quality.items()}
    return trial.model_copy(update={"outcome": trial.outcome.model_copy(update={"quality": quality})})


def failed(trial: Trial) -> Trial:
    return Trial(number=trial.number, genotype=trial.genotype, state=State.FAILED, outcome=Outcome(reason="no luck"))


NAMES = ("evolution", "policy_gradient", "gradient", "portfolio", "random")


@pytest.mark.parametrize("probe", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_searchers_go_on_when_all_fail(name, probe):
    trials = told(ClosedForm(20, probe=probe), 26, resolve("searcher", name), failed)
    line = early.lines(trials, ClosedForm(20).goals, Limit(metric="accuracy", floor=0.5))["failed"]
    assert line == "all of the first 26 candidates failed; #1: no luck"


@pytest.mark.parametrize("name", NAMES)
def test_searchers_go_on_when_quality_tells_nothing_apart(name):
    problem = ClosedForm(20, probe=True)
    trials = told(problem, 26, resolve("searcher", name), alike, Limit(metric="accuracy", floor=0.4))
    assert "accuracy is 0.5 for all" in early.lines(trials, problem.goals, problem.limit)["alike"]


@pytest.mark.parametrize("probe", [False, True])
def test_a_budget_that_nobody_meets_is_said_with_the_closest(probe):
    problem = ClosedForm(20, speedup=60.0, probe=probe)
    trials = told(problem, 30)
    assert not early.lines(trials[: early.MEASURED - 1], problem.goals, problem.limit)
    line = early.lines(trials, problem.goals, problem.limit)["device-a"]
    best = min(trials, key=lambda trial: problem.ratio(trial.genotype))
    assert (
        f"none of 30 candidates measured so far meets {wish(problem.budgets[0])}; closest is #{best.number} with"
        in line
    )
    # without a feasible one, the search goes on towards the budget
    late = [problem.ratio(trial.genotype) for trial in trials[20:]]
    before = [problem.ratio(trial.genotype) for trial in trials[:20]]
    assert min(late) <= min(before)
    assert sorted(late)[len(late) // 2] < sorted(before)[len(before) // 2]


def test_a_budget_that_one_meets_is_not_spoken_of():
    problem = ClosedForm(20, devices=2, speedup=1.5)
    assert not early.lines(told(problem, 30), problem.goals, problem.limit)


def test_a_floor_above_the_network_itself_is_said_at_the_start_and_borne():
    problem = ClosedForm(20, probe=True)
    limit = Limit(metric="accuracy", floor=0.999)
    assert "0.999 is asked for, but the network itself has" in early.at_the_start(problem.facts, limit)[0]
    assert early.at_the_start(problem.facts, problem.limit) == ()
    for name in ("evolution", "gradient"):
        told(problem, 26, resolve("searcher", name), limit=limit)


def test_a_baseline_without_a_number_is_refused():
    quality = ClosedForm(20).facts.baseline_quality
    early.refuse(quality)
    none = Interval(value=float("nan"), low=0.0, high=0.0)
    with pytest.raises(UserError, match="accuracy is nan on the selection split"):
        early.refuse(quality.model_copy(update={"value": none}))
    wide = Interval(value=0.5, low=float("nan"), high=0.6)
    with pytest.raises(UserError, match=r"accuracy is 0.5 in an interval that ends at nan on the selection split"):
        early.refuse(quality.model_copy(update={"value": wide}))
