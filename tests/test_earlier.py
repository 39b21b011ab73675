"""An earlier run's trials in the words of this one, and what a searcher makes of them."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest

from autocompress import earlier, pareto
from autocompress import space as sp
from autocompress.auto import reduce
from autocompress.controller import Controller, Header, run_serial
from autocompress.journal import Journal
from autocompress.registry import resolve
from autocompress.searchers.evolution import Evolution
from autocompress.testing import ClosedForm
from autocompress.types import Cost, Facts, Fidelity, SearchPlan, Space, Trial, UserError


def searched(folder: Path, problem: ClosedForm, trials: int, **changes: object) -> Path:
    """A finished run of `problem` in `folder`."""
    header = Header(
        space=problem.space,
        goals=problem.goals,
        limit=problem.limit,
        plan=SearchPlan(cost=Cost(trials=trials), fidelity=Fidelity(rungs=(1.0,))),
        facts=problem.facts,
    )

    def make(h: Header) -> Evolution:
        return Evolution(h.space, h.goals, h.limit, h.facts, h.plan.seed)

    with Journal.create(folder / earlier.FILE, header.event()) as journal:
        controller = Controller.begin(journal, make)
        controller.control(problem.trial(0, sp.parent(problem.space)).outcome)
        run_serial(controller, problem)
    return folder


def test_the_same_space_and_device_comes_back_as_it_was(tmp_path):
    problem = ClosedForm(20, speedup=2.0, fail_one_in=6)
    out = searched(tmp_path / "a", problem, 30)
    found = earlier.trials([out], problem.space, problem.facts)
    told = {trial.genotype: trial for trial in found.trials}
    assert 15 < len(told) <= 30
    assert [trial.number for trial in found.trials] == list(range(1, len(told) + 1))
    for g, trial in told.items():
        was = problem.trial(1, g)
        assert trial.state == was.state
        assert trial.outcome.readings["device-a"].ratio == was.outcome.readings["device-a"].ratio
        assert trial.outcome.quality == was.outcome.quality
        assert trial.note == {"source": 0, "share": 1.0}
    assert found.notes == (f"begins with {len(told)} of {len(told)} measured trials of {out}",)


def test_another_device_counts_by_its_ratios_another_model_by_what_it_lost(tmp_path):
    one, two = ClosedForm(20, devices=2, seed=1), ClosedForm(20, seed=1)
    out = searched(tmp_path / "a", two, 12)
    there = one.facts.baseline["device-b"]
    facts = Facts(
        baseline={"device-b": there.model_copy(update={"fingerprint": "other"})},
        baseline_quality=one.facts.baseline_quality.model_copy(
            update={"value": one.facts.baseline_quality.value.model_copy(update={"value": 0.5})}
        ),
    )
    found = earlier.trials([out / earlier.FILE], one.space, facts)
    for trial in found.trials:
        reading = trial.outcome.readings["device-b"]
        assert reading.ratio.value == pytest.approx(two.ratio(trial.genotype))
        assert reading.ms.value == pytest.approx(two.ratio(trial.genotype) * there.ms.value)
        lost = two.quality(sp.parent(two.space)) - two.quality(trial.genotype)
        assert all(q.value.value == pytest.approx(0.5 - lost) for q in trial.outcome.quality.values())
    assert "measured on another device than device-b" in found.notes[0]


def test_of_another_space_the_genes_in_common_are_used_and_said_in_one_line(tmp_path):
    problem = ClosedForm(20, seed=1)
    out = searched(tmp_path / "a", problem, 15)
    gone = [(g.name, c) for g in problem.space.genes if g.name in ("side", "stages.0.1.rank") for c in g.choices[1:]]
    less = reduce(problem.space, gone)
    assert len(less.genes) == 17  # stage0.depth has one choice and goes too
    found = earlier.trials([out], less, problem.facts)
    assert len({trial.genotype for trial in found.trials}) == len(found.trials)
    assert all(sp.canonical(less, trial.genotype) == trial.genotype for trial in found.trials)
    assert {trial.note["share"] for trial in found.trials} > {1.0}
    assert "17 of its 20 genes are here (not side ...)" in found.notes[0]
    nothing = Space(name="other", genes=(problem.space.genes[0].model_copy(update={"name": "else"}),))
    assert earlier.trials([out], nothing, problem.facts).trials == ()


def test_what_is_no_journal_is_the_users_error(tmp_path):
    problem = ClosedForm(10)
    (tmp_path / "bad.jsonl").write_text('{"number":0,"state":"header","format":1,"space":3}\n')
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "bad.jsonl"):
        with pytest.raises(UserError):
            earlier.trials([path], problem.space, problem.facts)


def warmed(problem: ClosedForm, trials: tuple[Trial, ...]) -> Facts:
    return problem.facts.model_copy(update={"warm": trials})


def reached(problem: ClosedForm, facts: Facts, trials: int, name: str = "evolution") -> float:
    searcher = resolve("searcher", name)(problem.space, problem.goals, problem.limit, facts, 3)
    told = []
    for number in range(1, trials + 1):
        told.append(problem.trial(number, searcher.ask(number, []).genotype))
        searcher.tell(told[-1])
    return problem.hypervolume(told)


def test_a_warm_search_is_ahead_and_a_misleading_run_does_little_harm(tmp_path):
    problem = ClosedForm(60, seed=2)
    out = searched(tmp_path / "a", problem, 60)
    right = earlier.trials([out], problem.space, problem.facts).trials
    cold = reached(problem, problem.facts, 25)
    assert reached(problem, warmed(problem, right), 25) > cold + 0.1
    luck = Random(0)
    outcomes = [trial.outcome for trial in right]
    luck.shuffle(outcomes)
    wrong = tuple(t.model_copy(update={"outcome": o}) for t, o in zip(right, outcomes, strict=True))
    searcher = Evolution(problem.space, problem.goals, problem.limit, warmed(problem, wrong), 3)
    believed = searcher.beliefs.trust(0, "device-a", 0)
    for number in range(1, 21):
        searcher.tell(problem.trial(number, searcher.ask(number, []).genotype))
    assert searcher.beliefs.trust(0, "device-a", 0) > 5 * believed  # variance: what was found here says otherwise
    honest = Evolution(problem.space, problem.goals, problem.limit, warmed(problem, right), 3)
    for number in range(1, 21):
        honest.tell(problem.trial(number, honest.ask(number, []).genotype))
    assert honest.beliefs.trust(0, "device-a", 0) == pytest.approx(0.01)


def test_the_probe_says_how_far_to_trust_before_anything_was_tried_again(tmp_path):
    problem = ClosedForm(60, seed=2, probe=True)
    trials = earlier.trials([searched(tmp_path / "a", problem, 30)], problem.space, problem.facts).trials
    facts = warmed(problem, trials)
    searcher = Evolution(problem.space, problem.goals, problem.limit, facts, 0)
    assert searcher.beliefs.trust(0, "device-a", 0) < 0.3
    assert len(searcher.populations[0].members) == 0  # nothing was measured in this run yet
    best = pareto.best(trials, problem.goals[0], problem.limit, 1)[0]
    assert best.genotype in searcher.first[:20]
    assert np.isfinite(searcher.beliefs.about(0).loss(searcher.beliefs.codings[""].rows([best.genotype]))).all()
