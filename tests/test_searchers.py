"""Searchers keep their contract, and learn; the closed-form problem is what it says."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pytest

from autocompress import pareto
from autocompress import space as sp
from autocompress.controller import Controller, Header, run_serial
from autocompress.journal import Journal, read
from autocompress.registry import resolve
from autocompress.searchers import Searcher
from autocompress.searchers.design import common, spread
from autocompress.searchers.evolution import Evolution
from autocompress.searchers.fresh import Taken
from autocompress.testing import ClosedForm, check_searcher
from autocompress.types import (
    Cost,
    Facts,
    Fidelity,
    Gene,
    Proposal,
    SearchPlan,
    Space,
    State,
    Trial,
    UserError,
)

ROOT = Path(__file__).parents[1]


def run(make, problem: ClosedForm, trials: int, seed: int = 0) -> list[Trial]:
    searcher = make(problem.space, problem.goals, problem.limit, problem.facts, seed)
    told: list[Trial] = []
    for number in range(1, trials + 1):
        proposal = searcher.ask(number, [])
        told.append(problem.trial(number, proposal.genotype, proposal.note))
        searcher.tell(told[-1])
    return told


# --- contract -------------------------------------------------------------------------------------------------------


LIGHT = {
    "random": {},
    "evolution": {},
    "policy_gradient": {"walks": 8},
    "gradient": {"steps": 8, "targets": 4},
    "portfolio": {"design": 6, "options": {"policy_gradient": {"walks": 8}, "gradient": {"steps": 8, "targets": 4}}},
}


@pytest.mark.parametrize("name", LIGHT)
def test_built_in_searchers_keep_the_contract(name):
    check_searcher(partial(resolve("searcher", name), **LIGHT[name]), trials=32)


@pytest.mark.parametrize("name", LIGHT)
def test_a_space_without_questions_has_no_answer(name):
    problem = ClosedForm(20)
    space = Space(name="empty", genes=())
    searcher = resolve("searcher", name)(space, problem.goals, problem.limit, Facts(), 0, **LIGHT[name])
    control = problem.trial(0, sp.parent(problem.space))
    searcher.tell(control.model_copy(update={"genotype": ()}))
    assert searcher.ask(1, []) is None


def test_what_is_taken_is_replaced_by_a_neighbour_not_by_the_first_one_left():
    space = Space(name="s", genes=[Gene(name=f"g{i}", kind="arch", choices=(0, 1, 2, 3)) for i in range(8)])
    for seed in range(10):
        taken = Taken(space)
        taken.genotypes |= {(3,) * 8, (0,) * 8}
        found = taken.fresh(lambda: (3,) * 8, Random(seed), tries=1)
        assert found is not None
        assert sum(value != 3 for value in found) <= 6
        assert found in taken.genotypes


def test_integers_everywhere_come_first_where_there_are_any():
    asked = {"kind": "policy", "choices": (0.0, 0.5), "op": "prune", "param": "ratio"}
    floats = tuple(Gene(name=f"g{i}", site=f"s{i}", **asked) for i in range(3))
    bits = Gene(name="b", kind="policy", choices=("float", "int8"), site="s0", op="quantize", param="bits")
    assert common(Space(name="floats", genes=floats)) == []
    assert common(Space(name="both", genes=(*floats, bits))) == [(0, 0, 0, 1)]


@pytest.mark.parametrize("name", [*LIGHT, "optuna"])
def test_an_interrupted_search_equals_an_uninterrupted_one(name, tmp_path):
    if name == "optuna":
        pytest.importorskip("optuna")
    problem = ClosedForm(20, devices=2, speedup=2.0, fail_one_in=7)
    plan = SearchPlan(
        searcher=name,
        options=LIGHT.get(name, {}),
        cost=Cost(trials=22),
        fidelity=Fidelity(rungs=(0.3, 1.0)),
    )
    first = Header(space=problem.space, goals=problem.goals, limit=problem.limit, plan=plan, facts=problem.facts)

    def make(h: Header) -> Searcher:
        return resolve("searcher", name)(h.space, h.goals, h.limit, h.facts, h.plan.seed, **h.plan.options)

    whole = tmp_path / "whole.jsonl"
    with Journal.create(whole, first.event()) as journal:
        run_serial(Controller.begin(journal, make), problem)
    lines = whole.read_bytes().splitlines(keepends=True)
    for cut in (3, len(lines) // 2, len(lines) - 4):
        path = tmp_path / f"cut{cut}.jsonl"
        path.write_bytes(b"".join(lines[:cut]))
        with Journal.open(path) as journal:
            controller = Controller.resume(journal, make)
            run_serial(controller, problem)
            assert controller.notes == list(journal.notes)  # it asked again as it had
        assert asked(path) == asked(whole)


def asked(path: Path) -> dict[int, tuple[object, object]]:
    """What was proposed under each number, and how it ended."""
    events = read(path).events
    asks = {e["number"]: (e["genotype"], e.get("note")) for e in events if e.get("why") == "new"}
    ends = {e["number"]: (e["state"], e.get("outcome")) for e in events if e["number"] and e["state"] != "running"}
    return {number: (asks[number], ends[number]) for number in asks}


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "gp"])
def test_optuna_keeps_the_contract(sampler):
    pytest.importorskip("optuna")
    check_searcher(partial(resolve("searcher", "optuna"), sampler=sampler), trials=5 if sampler == "gp" else 16)


def test_the_example_keeps_the_contract():
    check_searcher(runpy.run_path(str(ROOT / "examples" / "my_searcher.py"))["Climber"])


class Broken:
    """Does one thing wrong at a time."""

    def __init__(self, space, goals, limit, facts, seed, *, fault):
        self.space, self.fault, self.seed, self.told = space, fault, seed, []

    def ask(self, number, pending):
        rng = Random() if self.fault == "own random numbers" else Random(f"{self.seed}:{number}")
        g = sp.sample(self.space, rng)
        if self.fault == "not canonical":
            g = tuple(len(gene.choices) - 1 for gene in self.space.genes)
        if self.fault == "repeats":
            g = sp.parent(self.space)
        if self.fault == "gives up" and number > 10:
            return None
        return Proposal(genotype=g, note={"at": (1, 2)} if self.fault == "note" else {})

    def tell(self, trial):
        self.told.append(trial)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("own random numbers", "replay differs"),
        ("not canonical", "is not canonical"),
        ("repeats", "repeats a genotype"),
        ("gives up", "not exhausted"),
        ("note", "survive JSON"),
    ],
)
def test_the_check_finds_what_is_wrong(fault, says):
    with pytest.raises(AssertionError, match=says):
        check_searcher(partial(Broken, fault=fault))


def test_importing_the_checks_and_the_searchers_loads_nothing_heavy():
    code = (
        "import sys, autocompress.testing, autocompress.searchers.evolution, autocompress.searchers.random;"
        "import autocompress.searchers.policy_gradient, autocompress.searchers.gradient;"
        "print([m for m in ('torch', 'ray', 'onnxruntime', 'optuna', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_wrong_options_are_the_users_errors():
    problem = ClosedForm(10)
    for name, options in [
        ("evolution", {"population": 1}),
        ("policy_gradient", {"rate": 0}),
        ("optuna", {"sampler": "tp"}),
        ("optuna", {"populatoin_size": 3}),
    ]:
        with pytest.raises(UserError):
            resolve("searcher", name)(problem.space, problem.goals, problem.limit, problem.facts, 0, **options)


def test_missing_optuna_says_how_to_install_it(monkeypatch):
    problem = ClosedForm(10)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'autocompress\[optuna\]'"):
        resolve("searcher", "optuna")(problem.space, problem.goals, problem.limit, problem.facts, 0)


# --- they learn -----------------------------------------------------------------------------------------------------


def shares(make, seeds: int, trials: int) -> list[float]:
    found = []
    for seed in range(seeds):
        problem = ClosedForm(60, seed=seed)
        found.append(problem.hypervolume(run(make, problem, trials, seed)))
    return found


def light(**options):
    return partial(resolve("searcher", "policy_gradient"), walks=16, updates=2, **options)


def test_evolution_beats_random_on_every_seed():
    random, evolution = (shares(resolve("searcher", name), 3, 80) for name in ("random", "evolution"))
    assert all(a > b + 0.1 for a, b in zip(evolution, random, strict=True))


def test_the_agent_beats_random_and_itself_without_learning():
    problem = ClosedForm(20, seed=1)
    learned, still, chance = (
        problem.hypervolume(run(make, problem, 40))
        for make in (light(), light(rate=1e-12), resolve("searcher", "random"))
    )
    assert learned > still + 0.05
    assert learned > chance + 0.1


def test_several_goals_are_all_served():
    problem = ClosedForm(20, devices=2, speedup=2.5, seed=3)
    for make, trials in ((resolve("searcher", "evolution"), 90), (light(), 40)):
        told = run(make, problem, trials)
        for goal in problem.goals:
            assert pareto.of(pareto.best(told, goal, problem.limit, 1)[0], goal, problem.limit).violation == 0


def test_evolution_is_quick_at_trial_2000_too():
    problem = ClosedForm(60, devices=2)
    searcher = Evolution(problem.space, problem.goals, problem.limit, problem.facts, 0)
    trials = [problem.trial(n, sp.sample(problem.space, Random(n))) for n in range(1, 2001)]
    start = time.process_time()
    for trial in trials:
        searcher.tell(trial)
    assert time.process_time() - start < 3.0  # 0.5 ms per tell, three goals
    start = time.process_time()
    for number in range(2001, 2031):
        searcher.ask(number, trials[:3])
    assert time.process_time() - start < 30 * 0.15  # 20 to 40 ms on a quiet machine


def test_the_first_designs_span_the_trade_off():
    problem = ClosedForm(60)
    designs = spread(problem.space, 16, Random(0))
    drawn = [sp.sample(problem.space, Random(i)) for i in range(16)]
    spans = [max(found) - min(found) for found in ([problem.ratio(g) for g in gs] for gs in (designs, drawn))]
    assert spans[0] > 1.3 * spans[1]
    reached = [problem.hypervolume([problem.trial(1, g) for g in gs]) for gs in (designs, drawn)]
    assert reached[0] > reached[1] + 0.1


def test_a_warm_start_asks_the_best_of_the_earlier_run_again():
    problem = ClosedForm(20, speedup=2.0)
    told = run(Evolution, problem, 60)
    best = pareto.best(told, problem.goals[0], problem.limit, 1)[0]
    warm = problem.facts.model_copy(update={"warm": tuple(told)})
    searcher = Evolution(problem.space, problem.goals, problem.limit, warm, 1)
    asked = [searcher.ask(number, []).genotype for number in range(1, 12)]
    assert best.genotype in asked
    for name in ("random", "policy_gradient", "gradient", "portfolio", "optuna"):
        other = resolve("searcher", name)(problem.space, problem.goals, problem.limit, warm, 1)
        assert isinstance(other, Searcher)
        assert other.ask(1, []) is not None


def test_a_later_tell_replaces_the_earlier():
    problem = ClosedForm(20)
    g = sp.sample(problem.space, Random(1))
    done = problem.trial(1, g)
    failed = Trial(number=1, genotype=g, state=State.FAILED)
    searcher = Evolution(problem.space, problem.goals, problem.limit, problem.facts, 0)
    searcher.tell(failed)
    assert searcher.populations[0].members == []
    searcher.tell(done)
    assert [member.number for member in searcher.populations[0].members] == [1]
    searcher.tell(done)
    assert len(searcher.populations[0].members) == 1
    searcher.tell(failed)
    assert searcher.populations[0].members == []


def test_a_space_of_one_is_asked_once():
    problem = ClosedForm(10)
    one = Space(name="one", genes=(Gene(name="a", kind="arch", choices=(1,)),))
    for name in ("random", "evolution", "policy_gradient", "gradient", "portfolio", "optuna"):
        searcher = resolve("searcher", name)(one, problem.goals, problem.limit, Facts(), 0)
        assert searcher.ask(1, []).genotype == (0,)
        assert searcher.ask(2, []) is None


# --- the closed form ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [0, 1])
def test_the_front_is_exact_where_all_can_be_listed(device):
    problem = ClosedForm(10, devices=2, seed=5)
    points = [(problem.quality(g), problem.ratio(g, device)) for g in sp.every(problem.space)]
    least: list[tuple[float, float]] = []
    for quality, ratio in sorted(points, key=lambda p: (p[1], -p[0])):
        if ratio <= 1.0 and (not least or quality > least[-1][0]):
            least.append((quality, ratio))
    assert np.asarray(problem.front(device)) == pytest.approx(np.asarray(least))


@pytest.mark.parametrize("size", [20, 60])
def test_nothing_sampled_lies_beyond_the_front(size):
    problem = ClosedForm(size, seed=1)
    front = problem.front()
    for i in range(300):
        g = sp.sample(problem.space, Random(i))
        quality, ratio = problem.quality(g), problem.ratio(g)
        assert max(q for q, r in front if r <= ratio) >= quality
    assert len(problem.space.genes) == size
    assert problem.ratio(sp.parent(problem.space)) == 1.0


def test_rungs_rise_and_a_slow_candidate_costs_no_training():
    problem = ClosedForm(20, speedup=2.0)
    parent = sp.parent(problem.space)
    slow = problem.assignment(1, parent)
    assert [state for state, _ in problem.evaluate(slow)] == [State.INFEASIBLE]
    control = problem.assignment(0, parent).model_copy(update={"rungs": (0.3, 1.0)})
    steps = list(problem.evaluate(control))
    assert [state for state, _ in steps] == [State.RUNG, State.DONE]
    values = [outcome.quality["device-a"].value.value for _, outcome in steps]
    assert values[0] < values[1] == problem.quality(parent)
    again = problem.evaluate(control.model_copy(update={"start": 1}))
    assert [outcome.fidelity for _, outcome in again] == [1.0]


def test_failures_are_the_same_every_time():
    problem = ClosedForm(20, fail_one_in=4)
    genotypes = [sp.sample(problem.space, Random(i)) for i in range(100)]
    states = [problem.trial(i + 1, g).state for i, g in enumerate(genotypes)]
    assert 10 < states.count(State.FAILED) < 45
    assert states == [problem.trial(i + 1, g).state for i, g in enumerate(genotypes)]


def test_the_benchmark_prints_and_writes_its_figures(tmp_path):
    target = tmp_path / "figures.json"
    script = str(ROOT / "benchmarks" / "searchers.py")
    picture = tmp_path / "curves.svg"
    options = ["--seeds", "2", "--trials", "12", "--genes", "20", "--only", "random", "evolution", "optuna-nsga2"]
    options += ["--json", str(target), "--svg", str(picture)]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "genes-20-probed" in done.stdout
    problems = json.loads(target.read_text())["problems"]
    found = problems["genes-20"]["evolution"]
    assert found["hv_ci"][0] <= found["hv_median"] <= found["hv_ci"][1] <= 1.0
    assert found["trials_to_best_peer"] is None or 1 <= found["trials_to_best_peer"] <= 12
    # The probe's looks come first, and cost trials.
    assert problems["genes-20-probed"]["evolution"]["curve"][0] == 0.0
    assert list(problems["genes-20-probed"]) == ["evolution"]
    assert picture.read_text().count("<path") > 5
