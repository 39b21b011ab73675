"""The latency model on kernels and readings whose truth is known."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from autocompress import surrogate
from autocompress.controller import Controller, Header, run_serial
from autocompress.journal import Journal
from autocompress.parts import make_searcher
from autocompress.surrogate import Known
from autocompress.testing import ClosedForm
from autocompress.types import (
    Assignment,
    Budget,
    Cost,
    Interval,
    Outcome,
    Reading,
    SearchPlan,
    State,
    Trial,
)

UNITS = {"Conv": 1.1e-3, "QLinearConv": 1.3e-3, "Add": 0.9e-3, surrogate.KERNELS: 1e-4}
ALWAYS = 0.02


def files(count: int, noise: float = 0.0, seed: int = 0) -> list[Known]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        work = {
            "Conv": rng.uniform(0, 300),
            "QLinearConv": rng.uniform(0, 300),
            "Add": rng.uniform(0, 60),
            surrogate.KERNELS: float(rng.integers(20, 200)),
        }
        ratio = ALWAYS + sum(UNITS[kind] * amount for kind, amount in work.items())
        found.append(Known(work, ratio * float(np.exp(noise * rng.standard_normal()))))
    return found


def reading(ratio: float, *, noisy: bool = False) -> Reading:
    one = Interval(value=ratio, low=ratio, high=ratio)
    ms = Interval(value=1.0, low=1.0, high=1.0)
    return Reading(profile="p", ms=one, p95_ms=one, baseline_ms=ms, ratio=one, samples=9, rounds=9, noisy=noisy)


def trials(measured: list[Known]) -> list[Trial]:
    return [
        Trial(
            number=number,
            genotype=(number,),
            state=State.INFEASIBLE,
            outcome=Outcome(readings={"p": reading(one.ratio)}, amounts={"p": dict(one.amounts)}),
        )
        for number, one in enumerate(measured, start=1)
    ]


def test_it_finds_what_a_unit_takes():
    model = surrogate.fit(files(60))
    assert model is not None
    assert {name: model.units[name] for name in ("Conv", "QLinearConv")} == pytest.approx(
        {name: UNITS[name] for name in ("Conv", "QLinearConv")}, rel=0.03
    )
    assert UNITS["Add"] < model.usual < UNITS["QLinearConv"]
    assert model.factor < 1.05
    assert model.ratio({"Resize": 100.0}) == pytest.approx(model.always + 100 * model.usual)  # no file had it
    assert surrogate.fit(files(60)) == model
    assert surrogate.fit(files(surrogate.FEWEST - 1)) is None


def test_the_interval_holds_for_files_that_it_has_not_seen():
    model = surrogate.fit(files(150, noise=0.05))
    assert model is not None
    new = files(400, noise=0.05, seed=1)
    inside = [abs(np.log(one.ratio / model.ratio(one.amounts))) <= np.log(model.factor) for one in new]
    assert 0.91 <= np.mean(inside) <= 0.99
    error = surrogate.error(files(150, noise=0.05))
    assert error is not None
    assert error.within_tenth > 0.9
    assert error.rank > 0.97


def test_readings_far_off_count_little():
    spoilt = files(80)
    for place in range(0, 80, 16):
        spoilt[place] = Known(spoilt[place].amounts, 4 * spoilt[place].ratio)
    model = surrogate.fit(spoilt)
    assert model is not None
    off = [abs(model.ratio(one.amounts) / one.ratio - 1) for one in files(40, seed=2)]
    assert np.median(off) < 0.05


def test_only_what_is_far_over_every_budget_is_left_unmeasured():
    told, baseline = trials(files(60, noise=0.02)), {"p": reading(1.0)}
    screens = surrogate.screens(told, [Budget(profile="p", speedup=4.0)], baseline)
    assert screens["p"].most == 0.25
    model = screens["p"].model
    slow = {"Conv": 400.0}
    assert surrogate.hopeless(screens, {"p": slow})
    near = {"Conv": 0.24 / model.units["Conv"]}
    assert model.ratio(near) > 0.25
    assert not surrogate.hopeless(screens, {"p": near})
    assert not surrogate.hopeless(screens, {"p": {}})
    assert not surrogate.hopeless(screens, {})
    assert not surrogate.hopeless({}, {"p": slow})


def test_no_screen_without_readings_or_without_a_bound_on_latency():
    told, baseline = trials(files(60)), {"p": reading(1.0)}
    assert surrogate.screens(told[:10], [Budget(profile="p", speedup=4.0)], baseline) == {}
    assert surrogate.screens(told, [Budget(profile="p", size_mb=4.0)], baseline) == {}
    both = [Budget(profile="p", speedup=4.0), Budget(profile="other", speedup=4.0)]
    assert surrogate.screens(told, both, baseline) == {}
    noisy = [
        one.model_copy(update={"outcome": one.outcome.model_copy(update={"readings": {"p": reading(1, noisy=True)}})})
        for one in told
    ]
    assert surrogate.known(noisy, "p") == []
    assert surrogate.ceiling(Budget(profile="p", latency_ms=0.5, speedup=1.5), reading(1.0)) == 0.5
    assert [surrogate.portion(count) for count in (23, 24, 35, 36, 100)] == [0, 24, 24, 36, 81]


def test_the_closed_form_has_no_amounts_and_no_screen():
    problem = ClosedForm(10)
    told = [Trial(number=1, genotype=(0,) * len(problem.space.genes), state=State.DONE)] * 40
    assert surrogate.screens(told, [one for goal in problem.goals for one in goal.budgets], {}) == {}


class Weighed:
    """The closed form with one operation, to whose time its latency is proportional; keeps what it was asked."""

    def __init__(self) -> None:
        self.problem, self.asked = ClosedForm(20), {}

    def evaluate(self, assignment: Assignment) -> Iterator[tuple[State, Outcome]]:
        self.asked[assignment.number] = assignment
        for state, outcome in self.problem.evaluate(assignment):
            work = {
                name: {"Conv": 100 * one.ratio.value, surrogate.KERNELS: 9.0} for name, one in outcome.readings.items()
            }
            yield state, outcome.model_copy(update={"amounts": work})


def run(path: Path, *, screen: bool) -> tuple[Controller, Weighed]:
    evaluator = Weighed()
    problem = evaluator.problem
    plan = SearchPlan(searcher="random", screen=screen, cost=Cost(trials=60, minutes=10))
    h = Header(space=problem.space, goals=problem.goals, limit=problem.limit, plan=plan, facts=problem.facts)
    controller = Controller.begin(Journal.create(path, h.event()), make_searcher)
    run_serial(controller, evaluator)
    return controller, evaluator


def test_a_search_screens_only_if_it_is_asked_to_and_by_its_journal_alone(tmp_path: Path):
    controller, evaluator = run(tmp_path / "with.jsonl", screen=True)
    began = [number for number, one in evaluator.asked.items() if one.screen]
    assert surrogate.FEWEST < min(began) <= 2 * surrogate.FEWEST
    last = evaluator.asked[60]
    assert last.screen
    told = [trial for trial in controller.trials if trial.number < 60]
    budgets = [one for goal in controller.goals for one in goal.budgets]
    assert surrogate.screens(told, budgets, controller.facts.baseline) == last.screen
    assert json.loads(last.model_dump_json())["screen"]
    controller.journal.close()
    without, evaluator = run(tmp_path / "without.jsonl", screen=False)
    assert not any(one.screen for one in evaluator.asked.values())
    without.journal.close()


def test_a_dozen_operations_are_no_harder_than_one_where_they_agree():
    rng = np.random.default_rng(0)
    names = [f"op{index}" for index in range(12)]
    found = []
    for _ in range(surrogate.FEWEST + 100):
        amounts = {name: float(rng.exponential(30)) for name in names} | {surrogate.KERNELS: 100.0}
        ratio = 1.1e-3 * sum(amounts[name] for name in names) * float(np.exp(0.02 * rng.standard_normal()))
        found.append(Known(amounts, ratio))
    model = surrogate.fit(found[: surrogate.FEWEST])
    assert model is not None
    off = [abs(model.ratio(one.amounts) / one.ratio - 1) for one in found[surrogate.FEWEST :]]
    assert np.median(off) < 0.025
    assert model.usual == pytest.approx(1.1e-3, rel=0.05)
