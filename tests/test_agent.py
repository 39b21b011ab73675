"""The agent's network learns by right slopes, travels between spaces in a file, and its walks see what is true."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest

from autocompress import space as sp
from autocompress.searchers.agent import BARRED, FILE, Agent
from autocompress.searchers.design import spread
from autocompress.searchers.outlook import Beliefs
from autocompress.searchers.policy_gradient import PolicyGradient
from autocompress.searchers.walk import WIDTH, Walker
from autocompress.testing import ClosedForm
from autocompress.types import UserError


def told(problem: ClosedForm, count: int = 40) -> Beliefs:
    beliefs = Beliefs(problem.space, problem.goals, problem.limit, problem.facts)
    for number, g in enumerate(spread(problem.space, count, Random(0)), 1):
        beliefs.tell(number, problem.trial(number, g))
    return beliefs


def test_the_slopes_are_those_of_small_differences():
    agent, rng = Agent(7, 5, 0), np.random.default_rng(0)
    agent.weights = {name: rng.normal(size=value.shape) for name, value in agent.weights.items()}
    features, weights = rng.normal(size=(4, 3, 7)), rng.normal(size=(4, 3))

    def total() -> float:
        one = np.tanh(features @ agent.weights["in"] + agent.weights["in0"])
        two = np.tanh(one @ agent.weights["mid"] + agent.weights["mid0"])
        return float(((two @ agent.weights["out"]) * weights).sum())

    _, (one, two) = agent.scores(features @ agent.weights["in"])
    slopes = agent._slopes(features, one, two, weights)
    for name, slope in slopes.items():
        before, flat = total(), agent.weights[name].reshape(-1)
        for i in range(0, flat.size, 3):
            flat[i] += 1e-6
            assert (total() - before) / 1e-6 == pytest.approx(slope.reshape(-1)[i], rel=1e-3, abs=1e-4)
            flat[i] -= 1e-6


def test_it_learns_which_choice_is_rewarded_and_not_what_is_barred():
    agent, rng = Agent(4, 16, 0), np.random.default_rng(0)
    features = np.tile(np.eye(4)[:3][None], (64, 1, 1))
    barred = np.zeros((64, 3))
    barred[:, 2] = BARRED
    for _ in range(150):
        logs = agent.logs(agent.part(features), barred)
        action = (rng.random(64) > np.exp(logs[:, 0])).astype(int)
        gain = np.where(action == 1, 1.0, -1.0)
        agent.learn(features, barred, action, logs[np.arange(64), action], gain, rate=0.01, entropy=0.0)
    odds = np.exp(agent.logs(agent.part(features[:1]), barred[:1]))[0]
    assert odds[1] > 0.9
    assert odds[2] == 0.0


@pytest.mark.parametrize("size", [20, 60])
def test_walks_are_canonical_and_what_they_believe_is_what_is_believed(size):
    problem = ClosedForm(size, devices=2)
    beliefs, walker, rng = told(problem), Walker(problem.space, problem.facts), np.random.default_rng(1)
    outlook = beliefs.about(2)  # both devices
    assert outlook is not None
    starts = [sp.sample(problem.space, Random(i)) for i in range(12)]
    aims = np.linspace(-1.0, -0.2, 12)
    walks = walker.walk(Agent(WIDTH, 8, 0), outlook, starts, aims, luck=rng.random((12, size)))
    rows = beliefs.codings[""].rows(walks.genotypes())
    for g in walks.genotypes():
        assert sp.canonical(problem.space, g) == g
    assert walks.loss == pytest.approx(outlook.loss(rows), abs=1e-6)
    assert walks.latency == pytest.approx(outlook.latency(rows), abs=1e-6)
    assert walks.missed == pytest.approx(np.maximum(outlook.latency(rows) - aims, outlook.excess(rows)), abs=1e-6)
    applied = [sp.active(problem.space, g) for g in walks.genotypes()]
    sizes = np.array([len(gene.choices) for gene in problem.space.genes])
    assert (walks.decided == (np.array(applied) & (sizes > 1))).all()
    # Along the same choices the same agent finds the same probabilities.
    again = walker.walk(Agent(WIDTH, 8, 0), outlook, starts, aims, chosen=walks.genotypes())
    assert again.logs == pytest.approx(walks.logs, abs=1e-4)
    assert again.genotypes() == walks.genotypes()


def test_barred_choices_keep_the_budget_in_reach():
    problem = ClosedForm(60, speedup=6.0)
    beliefs, walker = told(problem, 60), Walker(problem.space, problem.facts)
    outlook = beliefs.about(0)
    assert outlook is not None
    starts = [sp.parent(problem.space)] * 16
    luck = np.random.default_rng(0).random((16, 60))
    aims = np.full(16, math.log(1 / 6))
    reached = [
        walker.walk(Agent(WIDTH, 8, 0), outlook, starts, aims, luck=luck, mask=mask).missed for mask in (True, False)
    ]
    masked, free = (np.maximum(missed, 0.0) for missed in reached)
    assert np.median(masked) < 0.1
    assert masked.mean() < 0.6 * free.mean()


def test_an_agent_travels_to_another_space(tmp_path):
    small, large = ClosedForm(10), ClosedForm(20)
    searcher = PolicyGradient(small.space, small.goals, small.limit, small.facts, 0, walks=8, updates=1)
    for number in range(1, 20):
        searcher.tell(small.trial(number, searcher.ask(number, []).genotype))
    searcher.save(tmp_path)
    arguments = (large.space, large.goals, large.limit, large.facts, 0)
    other = PolicyGradient(*arguments, agent=str(tmp_path))
    assert other.origin["space"] == "closed-form-10"
    for name, value in searcher.agent.weights.items():
        assert (other.agent.weights[name] == value).all()
    with pytest.raises(UserError, match="hidden"):
        PolicyGradient(*arguments, agent=str(tmp_path / FILE), hidden=8)
    (tmp_path / "damaged").write_bytes(b"no tensors")
    for wrong in ("damaged", "missing"):
        with pytest.raises(UserError, match="is no agent"):
            PolicyGradient(*arguments, agent=str(tmp_path / wrong))
