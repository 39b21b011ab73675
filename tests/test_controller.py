"""The loop: what is asked, what the journal says, and that an interrupted search equals an uninterrupted one."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress import journal as journals
from autocompress import pareto
from autocompress.controller import Controller, Header, run_serial, steps
from autocompress.journal import Journal
from autocompress.space import sample
from autocompress.types import (
    Assignment,
    Budget,
    Cost,
    Fidelity,
    Gene,
    Genotype,
    Interval,
    Limit,
    Outcome,
    Proposal,
    Quality,
    Reading,
    SearchPlan,
    Space,
    State,
    Trial,
    TrialFailure,
    UserError,
)

SPACE = Space(
    name="closed",
    genes=(
        *(Gene(name=f"d{i}", kind="arch", choices=(0, 1, 2, 3)) for i in range(3)),
        Gene(name="r", kind="policy", choices=(0.0, 0.5), site="x", op="prune", param="ratio"),
    ),
)


class Learner:
    """Ten lines whose asks depend on everything that was asked and told before."""

    def __init__(self, h: Header) -> None:
        self.space, self.seed, self.seen = h.space, h.plan.seed, ""
        self.told: list[int] = []

    def ask(self, number: int, pending: Sequence[Trial]) -> Proposal | None:
        self.seen += f"?{number}{[(t.number, t.note, t.outcome.fidelity) for t in pending]}"
        return Proposal(
            genotype=sample(self.space, random.Random(f"{self.seed}{self.seen}")), note={"told": len(self.told)}
        )

    def tell(self, trial: Trial) -> None:
        self.seen += f"!{trial.number}{trial.state}{trial.outcome.fidelity}"
        self.told.append(trial.number)


class Closed:
    """Readings and quality in closed form; some genotypes are too slow, some fail."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.closed = 0

    def evaluate(self, assignment: Assignment) -> Iterator[tuple[State, Outcome]]:
        g = assignment.genotype
        ratio = 1.0 / (1 + g[0]) + 0.05 * g[2] - 0.1 * g[3]
        if g[:2] == (3, 3):
            raise TrialFailure("diverged")
        if g[0] == 0 and g[3] == 0:
            yield State.INFEASIBLE, closed_outcome(ratio, None, 0.0)
            return
        try:
            for index in range(assignment.start, len(assignment.rungs)):
                time.sleep(self.delay)
                fidelity = assignment.rungs[index]
                quality = (0.9 - 0.05 * g[0] + 0.02 * g[1]) * (1 - 0.2 * (1 - fidelity))
                last = index + 1 == len(assignment.rungs)
                yield State.DONE if last else State.RUNG, closed_outcome(ratio, quality, fidelity)
        finally:
            self.closed += 1


def closed_outcome(ratio: float, quality: float | None, fidelity: float) -> Outcome:
    one = Interval(value=ratio, low=ratio, high=ratio)
    base = Interval(value=1.0, low=1.0, high=1.0)
    reading = Reading(profile="p", ms=one, p95_ms=one, baseline_ms=base, ratio=one, samples=9, rounds=3)
    found = {}
    if quality is not None:
        value = Interval(value=quality, low=quality, high=quality)
        found = {"p": Quality(metric="accuracy", split="selection", value=value, samples=9)}
    return Outcome(fidelity=fidelity, readings={"p": reading}, quality=found)


def head(**plan: Any) -> Header:
    cost = Cost(trials=plan.pop("trials", 14), minutes=plan.pop("minutes", 60.0))
    fidelity = plan.pop("fidelity", Fidelity(rungs=(0.2, 0.5, 1.0), keep=0.5))
    return Header(
        space=SPACE,
        goals=pareto.goals((Budget(profile="p", speedup=2.0),)),
        limit=Limit(metric="accuracy", floor=0.7),
        plan=SearchPlan(searcher="learner", cost=cost, fidelity=fidelity, **{"seed": 3, **plan}),
    )


def begin(path: Path, **plan: Any) -> Controller:
    return Controller.begin(Journal.create(path, head(**plan).event()), Learner)


def whole_run(path: Path, **plan: Any) -> Controller:
    controller = begin(path, **plan)
    run_serial(controller, Closed())
    controller.journal.close()
    return controller


def story(path: Path) -> list[dict[str, Any]]:
    """The events without their times, and without the attempts that an interruption cut off."""
    return [
        {key: value for key, value in event.items() if key not in ("at", "attempt")}
        for event in journals.read(path).events
        if event.get("why") not in ("resumed", "retry")  # these follow an attempt that was cut off
    ]


def test_a_whole_run(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    controller = whole_run(path)
    assert controller.finished
    assert 0.0 < controller.engine <= controller.elapsed  # asks within tells count once
    assert [t.number for t in controller.trials] == list(range(1, 15))
    assert all(t.state.ended for t in controller.trials)
    states = {t.state for t in controller.trials}
    assert {State.DONE, State.STOPPED, State.INFEASIBLE} <= states
    events = journals.read(path).events
    assert all({"number", "state"} <= set(event) for event in events)
    assert {"number", "state", "attempt", "rung", "outcome", "at"} <= set(events[-1])
    assert Header.model_validate({k: v for k, v in events[0].items() if k != "at"}) == head()
    assert any(event.get("why") == "promoted" for event in events)
    assert all(t.outcome.fidelity == 1.0 and t.rung == 2 for t in controller.trials if t.state is State.DONE)


def test_an_interruption_after_any_event_changes_nothing(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    reference = whole_run(whole)
    expected = story(whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    for cut in range(1, len(lines) + 1):
        path = tmp_path / f"cut{cut}.jsonl"
        path.write_bytes(b"".join(lines[:cut]) + (lines[cut][:17] if cut < len(lines) else b""))
        with Journal.open(path) as journal:
            controller = Controller.resume(journal, Learner)
            run_serial(controller, Closed())
            assert controller.notes == list(journal.notes)
        assert path.read_bytes().startswith(b"".join(lines[:cut]))
        assert story(path) == expected, cut
        assert _without_attempts(controller.trials) == _without_attempts(reference.trials)
        assert controller.searcher.seen == reference.searcher.seen


def _without_attempts(trials: Sequence[Trial]) -> list[Trial]:
    return [trial.model_copy(update={"attempt": 0}) for trial in trials]


def test_kill_and_resume_again_and_again(tmp_path: Path) -> None:
    """Really, with SIGKILL: at six moments of one search, each time in a new process."""
    whole = tmp_path / "whole.jsonl"
    whole_run(whole)
    path = tmp_path / "journal.jsonl"
    Journal.create(path, head().event()).close()
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path; from test_controller import *\n"
        "run_serial(Controller.resume(Journal.open(Path(sys.argv[1])), Learner), Closed(delay=0.02))\n"
    )
    aims = iter((3, 8, 15, 21, 28, 33))
    while True:
        child = subprocess.Popen([sys.executable, "-c", code, str(path)])
        aim = next(aims, None)
        if aim is None:
            assert child.wait() == 0
            break
        while child.poll() is None and len(path.read_bytes().splitlines()) < aim:
            time.sleep(0.002)
        child.kill()
        child.wait()
    assert story(path) == story(whole)
    resumed = [event for event in journals.read(path).events if event.get("why") == "resumed"]
    assert len(resumed) >= 3


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 5))
def test_many_workers_any_order_any_loss(tmp_path_factory: pytest.TempPathFactory, seed: int, workers: int) -> None:
    """A simulated pool: steps interleave, workers are lost, the process dies; no number is lost or told twice."""
    rng = random.Random(seed)
    path = tmp_path_factory.mktemp("pool") / "journal.jsonl"
    Journal.create(path, head(seed=seed).event()).close()
    for _ in range(60):  # processes
        with Journal.open(path) as journal:
            controller = Controller.resume(journal, Learner)
            flying: dict[int, Iterator[tuple[State, Outcome]]] = {}
            while not controller.finished and rng.random() > 0.03:
                if len(flying) < workers and (assignment := controller.ask()) is not None:
                    assert assignment.number not in flying
                    assert assignment.start == 0 or assignment.start == controller._trials[assignment.number].rung + 1
                    flying[assignment.number] = steps(Closed(), assignment)
                    continue
                number = rng.choice(sorted(flying))
                if rng.random() < 0.05:
                    controller.lost(number, "killed")
                    del flying[number]
                    continue
                state, outcome = next(flying[number])
                if state.ended:
                    controller.tell(number, state, outcome)
                    del flying[number]
                elif not controller.rung(number, outcome):
                    del flying[number]
            assert controller.notes == list(journal.notes)
            if controller.finished:
                break
    else:
        pytest.fail("the search does not come to its end")
    events = journals.read(path).events
    assert sorted(e["number"] for e in events if e.get("why") == "new") == list(range(1, 15))
    open_now: dict[int, int] = {}
    rungs_seen: set[tuple[int, int]] = set()
    for event in events[1:]:
        number = event["number"]
        if event["state"] == "running":
            open_now[number] = event["attempt"]
            continue
        assert open_now[number] == event["attempt"]
        if event["state"] in ("rung", "stopped", "done"):
            assert (number, event["rung"]) not in rungs_seen
            rungs_seen.add((number, event["rung"]))
        if event["state"] != "rung":
            del open_now[number]
    assert not open_now
    with Journal.open(path) as journal:
        again = Controller.resume(journal, Learner)
        assert again.finished
        assert again.searcher.seen == controller.searcher.seen
        assert again.trials == controller.trials


def test_a_searcher_of_another_version_is_told_the_trials_alone(tmp_path: Path) -> None:
    class Newer(Learner):
        def __init__(self, h: Header) -> None:
            super().__init__(h)
            self.seen = "newer"

    path = tmp_path / "journal.jsonl"
    whole_run(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-9]))
    with Journal.open(path) as journal:
        controller = Controller.resume(journal, Newer)
        assert len(controller.notes) == 1
        assert "learner would ask otherwise" in controller.notes[0]
        ended = [e["number"] for e in journal.events()[1:] if State(e["state"]).ended]
        assert set(controller.searcher.told) == set(ended)
        assert "?" not in controller.searcher.seen
        run_serial(controller, Closed())
        assert controller.finished
        assert len(controller.notes) == 1


def test_a_lost_worker_is_replaced_twice(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    controller = begin(path, trials=1)
    for attempt in (1, 2, 3):
        assignment = controller.ask()
        assert assignment is not None
        assert (assignment.number, assignment.attempt) == (1, attempt)
        assert controller.lost(1, "killed by signal 9") == (attempt < 3)
    assert controller.ask() is None
    assert controller.finished
    assert controller.trials[0].state is State.FAILED
    assert controller.trials[0].outcome.reason == "worker lost 3 times: killed by signal 9"
    assert [e.get("why") for e in controller.journal.events()[1:]] == ["new", "retry", "retry", None]


def test_losses_are_counted_over_resumes(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    controller = begin(path, trials=1)
    for _ in range(2):
        controller.ask()
        assert controller.lost(1, "gone")
    controller.ask()
    controller.journal.close()
    with Journal.open(path) as journal:
        controller = Controller.resume(journal, Learner)
        assignment = controller.ask()
        assert assignment is not None
        assert assignment.attempt == 4
        assert not controller.lost(1, "gone")


def test_cost_in_minutes_is_summed_over_resumes(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    now = [100.0]
    clock = lambda: now[0]  # noqa: E731
    controller = Controller.begin(Journal.create(path, head(minutes=1.0).event()), Learner, clock=clock)
    first = controller.ask()
    assert first is not None
    now[0] += 40
    controller.tell(first.number, State.FAILED, Outcome(reason="x"))
    second = controller.ask()
    assert second is not None
    controller.journal.close()
    now[0] += 1000  # nobody pays for the time between
    with Journal.open(path) as journal:
        controller = Controller.resume(journal, Learner, clock=clock)
        assert controller.elapsed == pytest.approx(40)
        assert not controller.finished
        third = controller.ask()
        assert third is not None
        assert third.number == second.number
        now[0] += 21
        assert controller.finished
        assert controller.ask() is None
        assert not controller.rung(third.number, closed_outcome(0.3, 0.9, 0.2))  # late: stopped at its rung
    with Journal.open(path) as journal:
        assert Controller.resume(journal, Learner, clock=clock).finished
        more = Controller.resume(journal, Learner, spent={"trials": 2, "minutes": 5.0}, clock=clock)
        assert not more.finished
        promoted = more.ask()  # the one that was stopped for lack of time
        assert promoted is not None
        assert (promoted.number, promoted.start) == (second.number, 1)
    with Journal.open(path) as journal:
        assert Controller.resume(journal, Learner, clock=clock).cost == Cost(trials=2, minutes=5.0)


def test_a_cost_is_renewed_field_by_field_and_never_to_nonsense(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    whole_run(path, trials=2).journal.close()
    with Journal.open(path) as journal:
        Controller.resume(journal, Learner, spent={"trials": 3})
    with Journal.open(path) as journal:
        cost = Controller.resume(journal, Learner, spent={"minutes": 90.0}).cost
    assert (cost.trials, cost.minutes) == (3, 90.0)
    before = path.read_bytes()
    for strange, told in (({"trials": 0}, "trials 0"), ({"minutes": math.nan}, "minutes nan")):
        with Journal.open(path) as journal, pytest.raises(UserError, match=told):
            Controller.resume(journal, Learner, spent=strange)
    assert path.read_bytes() == before


def test_stop_leaves_what_flies_in_flight(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    controller = begin(path)
    seen: list[dict[str, Any]] = []

    def watch(event: dict[str, Any]) -> None:
        seen.append(event)
        if len(seen) == 6:
            raise KeyboardInterrupt

    run_serial(controller, Closed(), watch)
    assert controller.finished
    assert controller.ask() is None
    controller.journal.close()
    with Journal.open(path) as journal:
        run_serial(Controller.resume(journal, Learner), Closed())
    whole = tmp_path / "whole.jsonl"
    whole_run(whole)
    assert story(path) == story(whole)


def test_failures_are_data(tmp_path: Path) -> None:
    class Broken:
        def evaluate(self, assignment: Assignment) -> Iterator[tuple[State, Outcome]]:
            if assignment.number == 1:
                raise ValueError("first line\nsecond line")
            if assignment.number == 2:
                raise MemoryError
            if assignment.number == 3:
                return
            if assignment.number == 4:
                yield State.DONE, closed_outcome(0.3, float("nan"), 1.0)
            if assignment.number == 5:
                yield State.RUNG, closed_outcome(0.3, float("nan"), 0.2)
            if assignment.number == 6:
                yield State.RUNG, closed_outcome(0.3, 0.9, 0.2)
                raise TrialFailure("loss is NaN after 3 steps")

    controller = begin(tmp_path / "journal.jsonl", trials=6)
    kept: list[bytes] = []
    run_serial(controller, Broken(), keep=lambda log: kept.append(log) or "a" * 64)
    assert all(t.state is State.FAILED for t in controller.trials)
    reasons = [t.outcome.reason for t in controller.trials]
    assert reasons[:3] == ["ValueError: first line", "MemoryError", "the evaluation ended without a result"]
    assert reasons[3] == reasons[4] == "outcome.quality.p.value.value is not a finite number"
    assert reasons[5] == "loss is NaN after 3 steps"
    assert controller.trials[5].outcome.readings["p"].ratio.value == 0.3  # what was known stays known
    assert b"Traceback" in kept[0]
    assert controller.trials[0].outcome.files == {"log": "a" * 64}


def test_the_users_error_ends_the_search_and_loses_nothing(tmp_path: Path) -> None:
    class Full(Closed):
        def evaluate(self, assignment: Assignment) -> Iterator[tuple[State, Outcome]]:
            if assignment.number == 3:
                raise UserError("the disk is full; make room and resume")
            yield from super().evaluate(assignment)

    path = tmp_path / "journal.jsonl"
    controller = begin(path)
    with pytest.raises(UserError, match="disk is full"):
        run_serial(controller, Full())
    controller.journal.close()
    whole = tmp_path / "whole.jsonl"
    whole_run(whole)
    with Journal.open(path) as journal:
        run_serial(Controller.resume(journal, Learner), Closed())
    assert story(path) == story(whole)


def test_an_exhausted_searcher_ends_the_search(tmp_path: Path) -> None:
    class Three(Learner):
        def ask(self, number: int, pending: Sequence[Trial]) -> Proposal | None:
            return None if number > 3 or len(pending) > 1 else super().ask(number, pending)

    controller = Controller.begin(Journal.create(tmp_path / "j.jsonl", head(seed=3).event()), Three)
    first, second = controller.ask(), controller.ask()
    assert first is not None
    assert second is not None
    assert controller.ask() is None  # it waits
    assert not controller.finished
    for one in (first, second):
        controller.tell(one.number, State.FAILED, Outcome(reason="x"))
    run_serial(controller, Closed())
    assert controller.finished
    assert len(controller.trials) == 3


def test_a_stopped_evaluation_is_closed(tmp_path: Path) -> None:
    evaluator = Closed()
    controller = begin(tmp_path / "j.jsonl")
    run_serial(controller, evaluator)
    attempts = [e for e in controller.journal.events() if e["state"] == "running"]
    short = sum(t.state in (State.INFEASIBLE, State.FAILED) for t in controller.trials)
    assert evaluator.closed == len(attempts) - short


def test_the_control_is_recorded_once(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    controller = begin(path, trials=2)
    controller.control(closed_outcome(1.0, 0.95, 1.0))
    run_serial(controller, Closed())
    assert [t.number for t in controller.trials] == [0, 1, 2]
    controller.journal.close()
    with Journal.open(path) as journal:
        again = Controller.resume(journal, Learner)
        again.control(closed_outcome(1.0, 0.95, 1.0))
        assert again.trials == controller.trials
        assert [e["number"] for e in journal.events()].count(0) == 2


def test_telling_what_is_not_in_flight_is_a_bug(tmp_path: Path) -> None:
    controller = begin(tmp_path / "j.jsonl")
    with pytest.raises(ValueError, match="not in flight"):
        controller.tell(1, State.DONE, Outcome())
    assignment = controller.ask()
    assert assignment is not None
    with pytest.raises(ValueError, match="no end"):
        controller.tell(1, State.RUNG, Outcome())


def test_a_proposal_outside_the_space_is_refused(tmp_path: Path) -> None:
    class Wrong(Learner):
        def ask(self, number: int, pending: Sequence[Trial]) -> Proposal | None:
            bad: Genotype = (9, 9, 9, 9)
            return Proposal(genotype=bad)

    controller = Controller.begin(Journal.create(tmp_path / "j.jsonl", head().event()), Wrong)
    with pytest.raises(UserError):
        controller.ask()
    assert len(controller.journal.events()) == 1


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_damaged_journal_is_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Lines dropped, doubled, swapped or changed: resumed, or one line that names the place; never a traceback."""
    folder = tmp_path_factory.mktemp("damaged")
    source = _damaged_source(tmp_path_factory)
    lines = list(source)
    at = data.draw(st.integers(0, len(lines) - 1))
    kind = data.draw(st.sampled_from(["drop", "double", "swap", "key", "value"]))
    if kind == "drop":
        del lines[at]
    elif kind == "double":
        lines.insert(at, lines[at])
    elif kind == "swap":
        other = data.draw(st.integers(0, len(lines) - 1))
        lines[at], lines[other] = lines[other], lines[at]
    else:
        event = json.loads(lines[at])
        key = data.draw(st.sampled_from(sorted(event)))
        if kind == "key":
            del event[key]
        else:
            event[key] = data.draw(st.sampled_from([None, -1, 3, "x", [], {}, [9, 9, 9, 9], 1e400]))
        lines[at] = json.dumps(event).encode() + b"\n"
    path = folder / "journal.jsonl"
    path.write_bytes(b"".join(lines))
    said = f"{path}"
    try:
        with Journal.open(path) as journal:
            Controller.resume(journal, Learner)
    except UserError as error:
        said = str(error)
    assert "\n" not in said
    assert str(path) in said


_SOURCE: list[bytes] = []


def _damaged_source(factory: pytest.TempPathFactory) -> list[bytes]:
    if not _SOURCE:
        path = factory.mktemp("source") / "journal.jsonl"
        whole_run(path, trials=6)
        _SOURCE.extend(path.read_bytes().splitlines(keepends=True))
    return _SOURCE
