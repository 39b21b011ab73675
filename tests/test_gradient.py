"""Beliefs fit what is told, relaxed genotypes have right slopes, and the descent finds more than chance does."""

from __future__ import annotations

from functools import partial
from random import Random

import numpy as np
import pytest

from autocompress import space as sp
from autocompress.registry import resolve
from autocompress.searchers.belief import Coding, fit
from autocompress.searchers.design import spread
from autocompress.searchers.gradient import Front, Gradient
from autocompress.searchers.outlook import Beliefs
from autocompress.searchers.relaxed import Relaxed
from autocompress.testing import ClosedForm, check_searcher
from autocompress.types import State, Trial, UserError


def searched(make, problem: ClosedForm, trials: int, seed: int = 0) -> list[Trial]:
    searcher = make(problem.space, problem.goals, problem.limit, problem.facts, seed)
    told: list[Trial] = []
    for number in range(1, trials + 1):
        proposal = searcher.ask(number, [])
        told.append(problem.trial(number, proposal.genotype, proposal.note))
        searcher.tell(told[-1])
    return told


def test_it_keeps_the_contract():
    check_searcher(partial(resolve("searcher", "gradient"), steps=10, targets=4), trials=36)


def test_slopes_of_relaxed_genotypes_are_those_of_small_differences():
    problem = ClosedForm(60)
    relaxed, rng = Relaxed(problem.space), np.random.default_rng(0)
    p = relaxed.soft(rng.normal(size=(2, 60, relaxed.most)), 1.0)
    weights = rng.normal(size=len(relaxed.gene))
    back = relaxed.back(p, relaxed.applies(p), np.tile(weights, (2, 1)))
    for i in range(60):
        for c in range(relaxed.sizes[i]):
            moved = p.copy()
            moved[:, i, c] += 1e-6
            change = (
                (relaxed.rows(moved, relaxed.applies(moved)) - relaxed.rows(p, relaxed.applies(p))) @ weights / 1e-6
            )
            assert change == pytest.approx(back[:, i, c], abs=1e-7)


def test_a_relaxed_genotype_that_is_certain_is_the_canonical_one():
    problem = ClosedForm(60)
    relaxed, coding = Relaxed(problem.space), Coding(problem.space, problem.facts)
    for seed in range(20):
        g = sp.sample(problem.space, Random(seed))
        certain = np.zeros((1, 60, relaxed.most))
        certain[0, np.arange(60), g] = 1.0
        assert (relaxed.rows(certain, relaxed.applies(certain))[0] == coding.row(g)).all()
        assert relaxed.hard(certain * 9.0) == [g]


def test_a_fit_predicts_genotypes_that_were_not_told():
    problem = ClosedForm(60)
    coding, rng = Coding(problem.space, problem.facts), Random(0)
    told = list(spread(problem.space, 60, rng))
    other = [sp.mutate(problem.space, rng.choice(told), rng, 4.0) for _ in range(60)]
    for number in (problem.quality, lambda g: float(np.log(problem.ratio(g)))):
        truth = np.array([number(g) for g in other])
        found = fit(coding, coding.rows(told), np.array([number(g) for g in told]))
        missed = found.mean()(coding.rows(other)) - truth
        assert missed.var() < 0.1 * truth.var()
        # What draws say of its own error is about right, and they lie about the mean.
        unknown = np.stack([found.draw(np.random.default_rng(i))(coding.rows(other)) for i in range(50)])
        assert 0.3 < float(np.sqrt(unknown.var(axis=0).mean())) / np.sqrt(np.mean(missed**2)) < 3.0
        draws = np.stack([found.draw(np.random.default_rng(i))(coding.rows(told)) for i in range(20)])
        assert np.abs(draws.mean(axis=0) - found.mean()(coding.rows(told))).max() < 0.5 * truth.std()


def test_slopes_of_a_guess_are_those_of_small_differences():
    problem = ClosedForm(20)
    coding = Coding(problem.space, problem.facts)
    told = spread(problem.space, 30, Random(1))
    guess = fit(coding, coding.rows(told), np.array([problem.quality(g) ** 2 for g in told])).mean()
    row = coding.rows(told[3:4])
    for column in range(0, coding.width, 5):
        step = np.zeros((1, coding.width))
        step[0, column] = 1e-5
        change = (guess(row + step) - guess(row - step)) / 2e-5
        assert change == pytest.approx(guess.slope(row)[:, column], abs=1e-6)


def test_what_a_genotype_would_add_is_its_area():
    front = Front(np.array([[0.5, np.log(0.4)], [0.2, np.log(0.6)], [0.6, np.log(0.5)]]), np.log(0.8))
    assert len(front.points) == 2
    added = front.gains(np.array([0.3, 0.5, 0.9, 0.1]), np.log([0.5, 0.4, 0.3, 0.9]))
    assert added == pytest.approx([0.1 * 0.2, 0.0, 0.1 * 0.1, 0.0])
    empty = Front(np.zeros((0, 2)), np.log(0.8))
    assert empty.gains(np.array([0.5]), np.log([0.4])) == pytest.approx([0.2])


def test_beliefs_forget_what_a_later_tell_replaces():
    problem = ClosedForm(20)
    beliefs = Beliefs(problem.space, problem.goals, problem.limit, problem.facts)
    assert beliefs.about(0) is None
    for number, g in enumerate(spread(problem.space, 10, Random(0)), 1):
        beliefs.tell(number, problem.trial(number, g))
    assert beliefs.about(0) is not None
    for number in range(1, 11):
        beliefs.tell(number, Trial(number=number, genotype=sp.parent(problem.space), state=State.FAILED))
    assert beliefs.about(0) is None
    assert beliefs.scores(0) == {}


def test_the_descent_finds_more_than_chance():
    for seed in range(2):
        problem = ClosedForm(60, seed=seed)
        random = problem.hypervolume(searched(resolve("searcher", "random"), problem, 60, seed))
        found = problem.hypervolume(searched(Gradient, problem, 60, seed))
        assert found > random + 0.3


def test_wrong_options_are_the_users_errors():
    problem = ClosedForm(10)
    with pytest.raises(UserError):
        Gradient(problem.space, problem.goals, problem.limit, problem.facts, 0, cold=0.0)
