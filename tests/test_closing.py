"""The best few train on after the search: who, how far, and that an interruption changes nothing."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autocompress import journal as journals
from autocompress.certify import spare
from autocompress.closing import FIRST, LEAST, LOWEST, SLACK, Closing, Ranked, contenders, first, marks
from autocompress.controller import Controller, Header, run_serial
from autocompress.devices.cores import CorePlan, at_large, given_back, keep_to
from autocompress.journal import Journal
from autocompress.pareto import Score
from autocompress.types import (
    Assignment,
    Budget,
    Cost,
    Fidelity,
    Goal,
    Interval,
    Outcome,
    Reading,
    SearchPlan,
    State,
    TrialFailure,
    UserError,
)
from tests.test_controller import Closed, Learner, closed_outcome, head, story

RUNGS = Fidelity(rungs=(0.1, 0.2, 1.0), keep=0.5)


class Kept(Closed):
    """As the closed form, with checkpoints; a whole training would take two hours."""

    whole = 7200.0
    threaded = False

    def __init__(self, fall: int = 10**6) -> None:
        super().__init__()
        self.fall = fall

    def evaluate(self, assignment: Assignment) -> Iterator[tuple[State, Outcome]]:
        for state, outcome in super().evaluate(assignment):
            more = {"checkpoint": "c"} if state is State.RUNG or assignment.final else {}
            self.fall -= 1
            if self.fall < 0:
                raise KeyboardInterrupt
            yield state, outcome.model_copy(update={"files": more})

    def pace(self, assignment: Assignment, threads: int) -> float:
        assert assignment.checkpoint == "c"
        return self.whole / (threads if self.threaded else 1)


def header(minutes: float = 60.0, trials: int = 14) -> Header:
    plan = SearchPlan(searcher="learner", seed=3, fidelity=RUNGS, cost=Cost(trials=trials, minutes=minutes, final=0.5))
    return head().model_copy(update={"plan": plan})


def closing(controller: Controller, evaluator: Any) -> Closing:
    h = header()

    def run() -> None:
        run_serial(controller, evaluator)

    return Closing(controller, h.goals, h.limit, evaluator.pace, run, lambda _: run())


def whole(path: Path) -> Controller:
    controller = Controller.begin(Journal.create(path, header().event()), Learner, clock=lambda: 0.0)
    run_serial(controller, Kept())
    closing(controller, Kept()).go()
    controller.journal.close()
    return controller


def test_nobody_is_trained_fully_in_the_search_and_the_best_are_after_it(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    controller = whole(path)
    events = journals.read(path).events
    at = next(i for i, event in enumerate(events) if event["state"] == "finals")
    assert all(event.get("rung", 0) < 2 for event in events[:at])
    assert not any(event["state"] == "done" and event["number"] for event in events[:at])
    done = [trial for trial in controller.trials if trial.number and trial.state is State.DONE]
    assert controller.rounds == 2
    assert len(done) == 3
    before = [t.outcome.quality["p"].value.value for t in done]
    best = max(done, key=lambda trial: trial.outcome.fidelity)
    assert best.outcome.quality["p"].value.value == max(before)
    # an hour: a part of it for three, then (the clock stands still) the whole for one
    first = 0.2 + SLACK * FIRST / 3 / 2
    assert sorted(t.outcome.fidelity for t in done) == pytest.approx([first, first, first + SLACK / 2], abs=1e-5)
    assert controller.finished


@pytest.mark.parametrize("after", range(0, 24, 3))
def test_an_interrupted_closing_goes_on(tmp_path: Path, after: int) -> None:
    path, other = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    whole(path)
    controller = Controller.begin(Journal.create(other, header().event()), Learner, clock=lambda: 0.0)
    run_serial(controller, Kept())
    fallen = Kept(fall=after)
    closing(controller, fallen).go()
    controller.journal.close()
    again = Controller.resume(Journal.open(other), Learner, clock=lambda: 0.0)
    closing(again, Kept()).go()
    again.journal.close()
    assert {t.number: t.outcome for t in again.trials} == {
        t.number: t.outcome for t in Controller.resume(Journal.open(path), Learner).trials
    }
    assert story(other)[-1] == story(path)[-1]


def test_more_minutes_are_for_the_best_of_those_that_went_on(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    whole(path)
    same = Controller.resume(Journal.open(path), Learner, spent={"minutes": 60.0}, clock=lambda: 0.0)
    closing(same, Kept()).go()
    assert same.rounds == 2
    same.journal.close()
    before = {trial.number: trial.outcome.fidelity for trial in same.trials}
    for _ in range(2):  # the second time it has begun already
        more = Controller.resume(Journal.open(path), Learner, spent={"minutes": 70.0}, clock=lambda: 0.0)
        closing(more, Kept()).go()
        more.journal.close()
        assert more.rounds == 3
    (one,) = [trial for trial in more.trials if trial.outcome.fidelity != before[trial.number]]
    assert before[one.number] == max(before.values())
    assert one.outcome.fidelity == 1.0


@pytest.mark.parametrize(("parent", "least", "most"), [(0.71, LOWEST, 0.5), (2.0, 1.0, 1.0), (0.5, LOWEST, LOWEST)])
def test_who_has_come_near_the_parent_goes_on_at_a_lower_rate(
    tmp_path: Path, parent: float, least: float, most: float
) -> None:
    (quality,) = closed_outcome(1.0, parent, 1.0).quality.values()
    h = header()
    h = h.model_copy(update={"facts": h.facts.model_copy(update={"baseline_quality": quality})})
    path = tmp_path / "journal.jsonl"
    controller = Controller.begin(Journal.create(path, h.event()), Learner, clock=lambda: 0.0)
    run_serial(controller, Kept())
    assert closing(controller, Kept()).begin()
    found = {number: controller.assignment(number) for number in controller.in_finals}
    for one in found.values():
        assert len(one.peaks) == len(one.cycles)
        assert set(one.peaks[:-1]) == {1.0}
        assert least <= one.peaks[-1] <= most
    controller.journal.close()
    again = Controller.resume(Journal.open(path), Learner, clock=lambda: 0.0)
    assert {number: again.assignment(number).peaks for number in found} == {n: one.peaks for n, one in found.items()}
    again.journal.close()


class Failing(Kept):
    """Trials of `numbers` fail on their further way."""

    def __init__(self, numbers: Callable[[int], bool]) -> None:
        super().__init__()
        self.numbers = numbers

    def evaluate(self, assignment: Assignment) -> Iterator[tuple[State, Outcome]]:
        if assignment.final and self.numbers(assignment.number):
            raise TrialFailure("diverged")
        yield from super().evaluate(assignment)


def searched(path: Path, clock: Callable[[], float] = lambda: 0.0) -> Controller:
    controller = Controller.begin(Journal.create(path, header().event()), Learner, clock=clock)
    run_serial(controller, Kept())
    return controller


def test_what_fails_on_its_further_way_stands_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    controller = searched(path)
    made = closing(controller, Kept())
    assert made.begin()
    run_serial(controller, Kept())
    before = {trial.number: trial for trial in controller.trials}
    assert made.begin()
    (best,) = [number for number in controller.in_finals if controller.assignment(number).rungs[-1] > 0.5]
    run_serial(controller, Failing(lambda _: True))
    found = {trial.number: trial for trial in controller.trials}
    assert found[best].state is State.DONE
    assert found[best].outcome.files == before[best].outcome.files
    assert "failed: diverged" in found[best].outcome.notes[-1]
    assert controller.fell == {best}
    assert controller.narrowed
    controller.journal.close()
    assert journals.read(path).events[-1]["state"] == "failed"
    again = Controller.resume(Journal.open(path), Learner, clock=lambda: 0.0)
    assert {trial.number: trial for trial in again.trials} == found
    assert again.fell == {best}
    again.journal.close()


def test_where_all_of_the_first_few_fail_the_next_few_go_on(tmp_path: Path) -> None:
    controller = searched(tmp_path / "journal.jsonl")
    made = closing(controller, Kept())
    few = made.best(3, made.others)
    evaluator = Failing(lambda number: number in few)
    made = replace(made, together=lambda: run_serial(controller, evaluator))
    made = replace(made, alone=lambda _: run_serial(controller, evaluator))
    made.go()
    assert controller.fell == set(few)
    done = [trial for trial in controller.trials if trial.number and trial.state is State.DONE]
    assert done
    assert not {trial.number for trial in done} & set(few)
    assert max(trial.outcome.fidelity for trial in done) > 0.5
    controller.journal.close()


def test_without_time_the_best_is_finished_as_it_is(tmp_path: Path) -> None:
    now = [0.0]
    controller = searched(tmp_path / "journal.jsonl", lambda: now[0])
    now[0] = 3590.0
    said: list[str] = []
    replace(closing(controller, Kept()), say=said.append).go()
    (done,) = [trial for trial in controller.trials if trial.number and trial.state is State.DONE]
    assert done.outcome.fidelity == pytest.approx(0.2 + LEAST)
    assert said[0] == "no time is left for the best few: the best is finished as it is"
    controller.journal.close()


def test_what_is_going_on_stands_as_it_was_when_it_is_interrupted(tmp_path: Path) -> None:
    controller = searched(tmp_path / "journal.jsonl")
    made = closing(controller, Kept())
    assert made.begin()
    run_serial(controller, Kept())
    before = {trial.number: trial for trial in controller.trials}
    assert made.begin()
    assignment = controller.ask()
    assert assignment is not None
    assert [t.number for t in controller.trials if t.state is State.RUNNING] == [assignment.number]
    assert {trial.number: trial for trial in controller.standing} == before
    controller.journal.close()


@pytest.mark.parametrize("threaded", [False, True])
def test_where_threads_do_not_pay_the_few_train_side_by_side(tmp_path: Path, threaded: bool) -> None:
    controller = Controller.begin(
        Journal.create(tmp_path / "journal.jsonl", header().event()), Learner, clock=lambda: 0.0
    )
    evaluator = Kept()
    evaluator.threaded = threaded
    run_serial(controller, evaluator)
    made = replace(closing(controller, evaluator), workers=3, threads=3, crowded=lambda: False)
    assert made.begin()
    share = FIRST if threaded else 1.0
    for number in controller.in_finals:
        assert controller.assignment(number).rungs[-1] == pytest.approx(0.2 + SLACK * share / 2, abs=1e-5)
    assert len(controller.in_finals) == 3
    controller.journal.close()


@pytest.mark.parametrize(("factor", "wanted"), [(0.8, 3), (2.0, 1)])
def test_the_last_one_has_one_thread_where_more_are_slower(tmp_path: Path, factor: float, wanted: int) -> None:
    controller = Controller.begin(
        Journal.create(tmp_path / "journal.jsonl", header().event()), Learner, clock=lambda: 0.0
    )
    run_serial(controller, Kept())
    used: list[int] = []

    def alone(threads: int) -> None:
        used.append(threads)
        run_serial(controller, Kept())

    pace = lambda _, threads: 7200.0 * (factor if threads > 1 else 1.0)  # noqa: E731
    replace(closing(controller, Kept()), pace=pace, alone=alone, threads=3).go()
    assert used == [wanted, wanted]  # a single worker's first round has all threads too
    far = max(trial.outcome.fidelity for trial in controller.trials if trial.number)
    assert far == pytest.approx(0.2 + SLACK * (FIRST / 3 + 1) / 2 / min(factor, 1.0), abs=1e-5)
    controller.journal.close()


def test_marks_are_near_enough() -> None:
    assert marks(0.1, 0.2, 1000.0) == (0.2,)
    assert marks(0.0, 1.0, 900.0) == pytest.approx((1 / 3, 2 / 3, 1.0), abs=1e-5)


def test_a_share_needs_a_rung_before_the_last() -> None:
    with pytest.raises(ValueError, match="needs one before it"):
        SearchPlan(fidelity=Fidelity(rungs=(1.0,)), cost=Cost(final=0.5))


def test_what_cannot_go_on_is_refused(tmp_path: Path) -> None:
    controller = whole(tmp_path / "journal.jsonl")
    bad = next(t.number for t in controller.trials if t.state is State.INFEASIBLE)
    with pytest.raises(ValueError, match="has no checkpoint"):
        controller.finals({bad: (1.0,)})
    text = (tmp_path / "journal.jsonl").read_text().replace('"state":"finals"', '"state":"final?"')
    (tmp_path / "broken.jsonl").write_text(text)
    with pytest.raises(UserError, match="does not follow"):
        Controller.resume(Journal.open(tmp_path / "broken.jsonl"), Learner)


def test_the_last_network_trains_on_the_stations_cores_too():
    every = tuple(sorted(os.sched_getaffinity(0)))
    if len(every) < 2:
        pytest.skip("one core is not divided")
    plan = CorePlan(every[-1:], every[:-1], False, "")
    try:
        keep_to(plan.trainers)
        with at_large(plan, len(plan.trainers)):
            assert os.sched_getaffinity(0) == set(plan.trainers)
        with at_large(plan, len(every)):
            assert os.sched_getaffinity(0) == set(every)
        assert os.sched_getaffinity(0) == set(plan.trainers)
    finally:
        keep_to(every)


def test_a_process_has_its_cores_back_whatever_ends_the_work():
    every = os.sched_getaffinity(0)
    if len(every) < 2:
        pytest.skip("one core is not divided")

    @given_back()
    def work() -> None:
        keep_to(sorted(every)[:1])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert os.sched_getaffinity(0) == every


def ranked(*found: tuple[float, float], sure: float = 0.01) -> list[Ranked]:
    """Trials of these qualities and latencies, the floor far above: the shortfall is all that they violate."""
    trials = [Ranked(n, Score(q, t, (1.0 - q)), sure) for n, (q, t) in enumerate(found, start=1)]
    return sorted(trials, key=lambda one: one.score.violation)


def test_after_little_training_slower_candidates_go_on_beside_the_best():
    # 3 is slower than all better ones, 4 is slower still; 2 is faster and worse, 5 lags too far behind
    found = ranked((0.80, 0.10), (0.79, 0.08), (0.785, 0.16), (0.77, 0.20), (0.70, 0.22))
    assert contenders(found, 3) == [1, 3, 4]
    assert contenders(found, 5) == [1, 3, 4, 2, 5]
    assert contenders(found, 1) == [1]
    assert contenders([], 3) == []


def test_of_those_that_cannot_be_told_apart_the_slowest_trains_longest():
    found = ranked((0.800, 0.10), (0.798, 0.14), (0.797, 0.18), (0.794, 0.20), (0.780, 0.22))
    assert first(found, 1) == [3]
    assert first(ranked((0.80, 0.10), (0.78, 0.20)), 1) == [1]
    assert first(ranked((0.800, 0.179), (0.798, 0.18)), 1) == [1]  # as slow
    over = [*found, Ranked(9, Score(0.7995, 0.9, 0.9), 0.01)]  # it breaks a budget
    assert first(over, 1) == [3]
    assert first([], 1) == []


def test_who_stands_at_the_edge_of_a_budget_does_not_train_longest():
    found = [Ranked(1, Score(0.800, 0.10, 0.0), 0.01, 0.4), Ranked(2, Score(0.798, 0.14, 0.0), 0.01, 0.16)]
    edge = Ranked(3, Score(0.799, 0.166, 0.0), 0.01, 0.004)
    assert first([*found, edge], 1) == [2]
    assert first([edge], 1) == [3]  # where there is no other


def test_room_is_that_of_the_times_on_the_tightest_device():
    def reading(profile: str, low: float, high: float) -> Reading:
        spread = Interval(value=(low + high) / 2, low=low, high=high)
        return Reading(profile=profile, ms=spread, p95_ms=spread, baseline_ms=spread, ratio=spread, samples=9, rounds=3)

    outcome = Outcome(
        readings={"a": reading("a", 0.2, 0.25), "b": reading("b", 0.32, 0.33)}, size_mb={"a": 0.2, "b": 0.2}
    )
    goal = Goal(name="all", budgets=(Budget(profile="a", speedup=3, size_mb=0.2), Budget(profile="b", speedup=3)))
    assert spare(outcome, goal) == 0  # as large as it may be
    assert spare(outcome, goal, exact=False) == pytest.approx(1 / 0.33 / 3 - 1)
    sized = Goal(name="a", budgets=(Budget(profile="a", size_mb=0.2),))
    assert spare(outcome, sized, exact=False) == math.inf


class Tight(Kept):
    """Five minutes a trial, over every budget before a certain one."""

    def __init__(self, fits: int) -> None:
        super().__init__()
        self.fits, self.now = fits, 0.0

    def evaluate(self, assignment: Assignment) -> Iterator[tuple[State, Outcome]]:
        if not assignment.final:
            self.now += 300
        if assignment.number < self.fits:
            yield State.INFEASIBLE, closed_outcome(0.9, None, 0.0)
        else:
            yield from super().evaluate(assignment)


@pytest.mark.parametrize(("fits", "asked", "trained"), [(1, 6, True), (8, 8, True), (99, 12, False)])
def test_the_kept_time_is_the_searchs_until_there_is_somebody_to_train(
    tmp_path: Path, fits: int, asked: int, trained: bool
) -> None:
    evaluator = Tight(fits)
    path = tmp_path / "journal.jsonl"
    controller = Controller.begin(Journal.create(path, header(trials=50).event()), Learner, clock=lambda: evaluator.now)
    run_serial(controller, evaluator)
    assert max(trial.number for trial in controller.trials) == asked
    closing(controller, evaluator).go()
    assert bool(controller.in_finals) == trained
    assert controller.finished
    controller.journal.close()
    again = Controller.resume(Journal.open(path), Learner, clock=lambda: 0.0)
    assert again.trials == controller.trials
    assert again.finished
    again.journal.close()
