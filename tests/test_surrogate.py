"""The latency model on work and readings whose truth is known, and the graphs it reads."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from autocompress import surrogate
from autocompress.controller import Controller, Header, run_serial
from autocompress.devices.amounts import amounts
from autocompress.devices.layers import Layer, network
from autocompress.export import compose, export
from autocompress.journal import Journal
from autocompress.parts import make_searcher
from autocompress.surrogate import Known
from autocompress.tasks import InputSpec
from autocompress.testing import ClosedForm
from autocompress.types import (
    Assignment,
    Budget,
    Cost,
    Interval,
    Numeric,
    Outcome,
    Reading,
    SearchPlan,
    State,
    Trial,
)

UNITS = {"float convolution: macs": 2e-9, "integer convolution: macs": 5e-10, "to integers: nodes": 0.004}
ALWAYS = 0.02


def files(count: int, noise: float = 0.0, seed: int = 0) -> list[Known]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        work = {
            "float convolution: macs": rng.uniform(0, 3e8),
            "integer convolution: macs": rng.uniform(0, 3e8),
            "to integers: nodes": float(rng.integers(1, 30)),
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
    assert model.units == pytest.approx(UNITS, rel=0.05)
    assert model.factor < 1.05
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
    slow = {"float convolution: macs": 3e8}
    assert surrogate.hopeless(screens, {"p": slow})
    near = {"float convolution: macs": 0.24 / model.units["float convolution: macs"]}
    assert model.ratio(near) > 0.25
    assert not surrogate.hopeless(screens, {"p": near})
    assert not surrogate.hopeless(screens, {"p": {**slow, "never seen": 1.0}})
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
    """The closed form with one kind of work, to which its latency is proportional; keeps what it was asked."""

    def __init__(self) -> None:
        self.problem, self.asked = ClosedForm(20), {}

    def evaluate(self, assignment: Assignment) -> Iterator[tuple[State, Outcome]]:
        self.asked[assignment.number] = assignment
        for state, outcome in self.problem.evaluate(assignment):
            work = {name: {"work": 100 * one.ratio.value} for name, one in outcome.readings.items()}
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


# --- amounts --------------------------------------------------------------------------------------------------------


def test_amounts_of_a_float_network():
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.Conv2d(8, 12, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip
    torch.manual_seed(0)
    found = amounts(compose(export(module, InputSpec(shape=(3, 16, 16)), opset=17)))
    assert found["float convolution wide: macs"] == 256 * 3 * 8 * 9
    assert found["float depthwise: macs"] == 256 * 8 * 9
    assert found["float convolution 1x1, odd channels: macs"] == 256 * 8 * 12
    assert found["float product: weights"] == 60
    assert not any(kind.startswith(("integer", "to ")) for kind in found)


def test_integers_are_told_from_floats_and_borders_counted():
    layer = Layer((16, 8, 8), (32, 16, 3, 3), (1, 1), (1, 1), (1, 1))
    alone = amounts(network([layer], 1, Numeric()))
    assert alone["integer convolution wide: macs"] == 64 * 16 * 32 * 9
    assert alone["to integers: numbers"] == 16 * 64
    assert alone["to floats: numbers"] == 32 * 64
    assert alone["integer convolution wide: rows"] == 64 * 2
    assert "float convolution wide: macs" not in alone


def test_an_unknown_operation_counts_its_numbers():
    value = helper.make_tensor_value_info
    nodes = [helper.make_node("Softplus", ["x"], ["y"])]
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, ("batch", 7))], [value("y", TensorProto.FLOAT, ("batch", 7))]
    )
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert amounts(model.SerializeToString()) == {"float Softplus: nodes": 1.0, "float Softplus: numbers": 7.0}
