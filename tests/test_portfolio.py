"""The portfolio asks whom it should, tells everybody, and pays for what a trial added."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from autocompress import space as sp
from autocompress.searchers.portfolio import Portfolio, Standing
from autocompress.testing import ClosedForm
from autocompress.types import State, Trial, UserError

LIGHT = {"policy_gradient": {"walks": 8}, "gradient": {"steps": 8, "targets": 4}}


def made(problem: ClosedForm, **options) -> Portfolio:
    return Portfolio(problem.space, problem.goals, problem.limit, problem.facts, 0, **options)


def asked(portfolio: Portfolio, problem: ClosedForm, trials: int, first: int = 1) -> Counter[str]:
    by: Counter[str] = Counter()
    for number in range(first, first + trials):
        proposal = portfolio.ask(number, [])
        assert proposal is not None
        by[proposal.note["member"]] += 1
        portfolio.tell(problem.trial(number, proposal.genotype, proposal.note))
    return by


def test_the_first_member_designs_and_nobody_starves():
    problem = ClosedForm(20)
    portfolio = made(problem, design=6, floor=0.1, options=LIGHT)
    assert asked(portfolio, problem, 6) == {"evolution": 6}
    by = asked(portfolio, problem, 34, first=7)
    assert min(by[name] for name in portfolio.names) >= 3


def test_whoever_adds_more_is_asked_more():
    problem = ClosedForm(20)
    portfolio = made(problem, members=["random", "evolution"], design=1, window=40)
    by = asked(portfolio, problem, 80)
    assert by["evolution"] > 1.5 * by["random"]


def test_members_hear_of_every_trial_and_only_of_their_own_notes():
    problem = ClosedForm(20)
    portfolio = made(problem, members=["random", "evolution"], design=1)
    heard: dict[str, list[Trial]] = {name: [] for name in portfolio.names}
    for name, member in portfolio.members.items():
        member.tell = heard[name].append  # type: ignore[method-assign]
    g = sp.sample(problem.space, Random(0))
    trial = problem.trial(1, g, {"member": "random", "x": 1})
    portfolio.tell(trial)
    assert [t.note for t in heard["random"]] == [{"x": 1}]
    assert [t.note for t in heard["evolution"]] == [{}]


def test_a_trial_is_paid_what_it_adds():
    problem = ClosedForm(20, speedup=2.0)
    goal = problem.goals[0]
    standing = Standing(goal, problem.limit, problem.facts)
    trials = [problem.trial(i, sp.sample(problem.space, Random(i))) for i in range(60)]
    over = [t for t in trials if t.state is State.INFEASIBLE]
    done = [t for t in trials if problem.hypervolume([t]) > 0]
    assert standing.enter(-1, Trial(number=0, genotype=over[0].genotype, state=State.FAILED)) == 0.0
    assert standing.enter(0, over[0]) == 0.0
    gains = [standing.enter(number, trial) for number, trial in enumerate(over[1:], 1)]
    assert sum(gain > 0 for gain in gains) < len(gains)
    assert standing.enter(100, done[0]) == pytest.approx(1.0)
    assert standing.enter(101, done[0]) == pytest.approx(0.0)
    before = standing._volume()
    gain = sum(standing.enter(102 + i, trial) > 0 for i, trial in enumerate(done[1:]))
    assert gain > 0
    assert standing._volume() > before


def test_the_agent_of_a_member_is_saved(tmp_path):
    problem = ClosedForm(10)
    made(problem).save(tmp_path)
    assert made(problem, agent=str(tmp_path)).members["policy_gradient"].origin["space"] == "closed-form-10"
    made(problem, members=["random"]).save(tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"members": []},
        {"members": ["random", "random"]},
        {"members": ["portfolio"]},
        {"members": ["nobody"]},
        {"options": {"optuna": {}}},
        {"options": {"evolution": {"populatoin": 3}}},
        {"floor": 0.3},
    ],
)
def test_wrong_options_are_the_users_errors(options):
    with pytest.raises(UserError):
        made(ClosedForm(10), **options)
