"""Stations: devices that vanish and come back, several hosts at a time, one measurement per host."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from autocompress import load, pareto
from autocompress.controller import Controller, run_serial
from autocompress.devices import Unreachable, host_of
from autocompress.devices.cores import plan_cores
from autocompress.devices.station import Station
from autocompress.journal import Event, Journal
from autocompress.models.convnet import ConvNet
from autocompress.parts import make_searcher
from autocompress.run import resume, run
from autocompress.rungs import Ladder
from autocompress.summary import Summary
from autocompress.types import (
    Assignment,
    Budget,
    Fidelity,
    Job,
    Limit,
    Outcome,
    Profile,
    QualityLimit,
    Space,
    State,
    TrialFailure,
    UserError,
)
from tests import small_search
from tests.board import board, spans
from tests.test_controller import Closed, Learner, begin, closed_outcome
from tests.test_devices import conv_net

HERE = Profile(name="local-1t")
SMALL, LARGE = conv_net(16, 8, 16), conv_net(48, 8, 16)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    (tmp_path / "large.onnx").write_bytes(LARGE)
    return tmp_path / "large.onnx"


@contextmanager
def station(baseline: Path, *profiles: Profile, **changes: Any) -> Iterator[Station]:
    one = Station(profiles, plan_cores(profiles), baseline, **changes)
    try:
        yield one
    finally:
        one.close()


def until(holds: Callable[[], object], seconds: float = 120.0) -> None:
    """Wait for something that will be."""
    for _ in range(int(seconds / 0.02)):
        if holds():
            return
        time.sleep(0.02)
    raise AssertionError("it never came")


# --- a device that vanishes ---------------------------------------------------------------------------------------


def test_a_device_that_vanishes_pauses_its_queue_and_comes_back(baseline: Path, tmp_path: Path) -> None:
    profile = board(tmp_path, "alpha")
    cable = tmp_path / "alpha" / "cut"
    with station(baseline, profile, HERE, pause=0.5) as one:
        readings = (one.measure("alpha", SMALL, seconds=0.3) for _ in range(50))
        known = next(reading for reading in readings if not reading.noisy)  # a noisy one is not kept
        threading.Timer(0.6, cable.touch).start()
        with pytest.raises(Unreachable, match="killed by SIGKILL"):  # in the middle of it
            one.certify("alpha", SMALL, sessions=99, seconds=1.0)
        assert list(one.away()) == ["alpha"]
        began = time.monotonic()
        for _ in range(20):
            with pytest.raises(Unreachable):
                one.measure("alpha", conv_net(20, 8, 16))
        assert time.monotonic() - began < 0.4, "it was tried without a pause"
        assert one.measure("alpha", SMALL) == known  # what is known needs no device
        assert one.measure("local-1t", SMALL, seconds=0.3).ms.value > 0
        time.sleep(0.6)
        with pytest.raises(Unreachable, match="the cable is out"):
            one.measure("alpha", conv_net(20, 8, 16))
        cable.unlink()
        time.sleep(0.6)
        with pytest.raises(Unreachable):  # the second pause is longer than the first
            one.measure("alpha", conv_net(20, 8, 16))
        time.sleep(0.6)
        assert one.measure("alpha", conv_net(20, 8, 16), seconds=0.3).ms.value > 0
        assert not one.away()


def test_another_device_in_its_place_is_not_taken_for_it(baseline: Path, tmp_path: Path) -> None:
    profile = board(tmp_path, "alpha")
    cable, name = tmp_path / "alpha" / "cut", tmp_path / "alpha" / "name"
    with station(baseline, profile, pause=0.05) as one:
        cable.touch()
        with pytest.raises(Unreachable):
            one.session("alpha", SMALL)
        name.write_text("another")
        cable.unlink()
        time.sleep(0.1)
        with pytest.raises(Unreachable, match="not what it was before: board changed"):
            one.session("alpha", SMALL)
        name.unlink()
        time.sleep(0.3)
        assert one.session("alpha", SMALL, seconds=0.3).ms.value > 0


def test_a_station_begins_though_a_device_is_away(baseline: Path, tmp_path: Path) -> None:
    profile = board(tmp_path, "alpha")
    (tmp_path / "alpha" / "cut").touch()
    with station(baseline, profile, HERE, pause=0.1) as one:
        assert one.measure("local-1t", SMALL, seconds=0.3).ms.value > 0
        with pytest.raises(Unreachable):
            one.fingerprint("alpha")
        (tmp_path / "alpha" / "cut").unlink()
        time.sleep(0.3)
        assert one.measure("alpha", SMALL, seconds=0.3).fingerprint


def test_a_refused_file_leaves_a_device_reachable(baseline: Path, tmp_path: Path) -> None:
    with station(baseline, board(tmp_path, "alpha")) as one:
        with pytest.raises(TrialFailure, match="cannot be loaded"):
            one.measure("alpha", b"no model")
        assert not one.away()


# --- several hosts --------------------------------------------------------------------------------------------------


def test_hosts_measure_side_by_side_and_one_host_in_turn(baseline: Path, tmp_path: Path) -> None:
    alpha, beta = board(tmp_path, "alpha"), board(tmp_path, "beta")
    again = alpha.model_copy(update={"name": "alpha-8", "batch": 8})  # the same host under another profile
    assert host_of(again) == host_of(alpha) != host_of(beta)
    with station(baseline, alpha, beta, again, HERE) as one, ThreadPoolExecutor(4) as threads:
        names = ("alpha", "beta", "alpha-8", "local-1t")
        began = time.monotonic()
        found = list(threads.map(lambda name: one.session(name, SMALL, seconds=2.0), names))
        took = time.monotonic() - began
    assert [reading.profile for reading in found] == list(names)
    assert took < sum(reading.seconds for reading in found) - 1.0
    assert overlap(spans(tmp_path / "alpha"), spans(tmp_path / "beta")) > 0.3
    rows = sorted(spans(tmp_path / "alpha"))
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(rows))


def overlap(one: list[tuple[float, float, int]], two: list[tuple[float, float, int]]) -> float:
    """Seconds in which both ran."""
    return sum(max(0.0, min(b, d) - max(a, c)) for a, b, _ in one for c, d, _ in two)


MEASURER = """
import sys, time
from pathlib import Path
from autocompress.devices.cores import plan_cores
from autocompress.devices.local import LocalDevice
from autocompress.devices.station import Station
from autocompress.types import Profile

log, model, name, threads = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

class Logged(LocalDevice):
    def time(self, models, **how):
        began = time.monotonic()
        with log.open("a") as file:
            file.write(f"begin {name} {began}\\n")
        found = super().time(models, **how)
        with log.open("a") as file:
            file.write(f"end {name} {time.monotonic()} {began + found.waited_s}\\n")
        return found

profile = Profile(name=name, threads=threads)
station = Station([profile], plan_cores([profile]), model, device=Logged)
while True:
    station.session(name, model, 0.2)
"""


@pytest.mark.slow  # on two cores the other is always waiting already, and the moment to kill hardly comes
@pytest.mark.timeout(600)
def test_two_searches_never_measure_at_once_on_a_host_and_a_killed_one_lets_go(baseline: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()

    def started(name: str, threads: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", MEASURER, str(log), str(baseline), name, str(threads)])

    def rows() -> list[list[str]]:
        return [line.split() for line in log.read_text().splitlines()]

    def ended(name: str) -> int:
        return sum(row[:2] == ["end", name] for row in rows())

    one, two = started("one", 1), started("two", 2)
    try:
        until(lambda: ended("one") > 3 and ended("two") > 3)
        until(lambda: rows()[-1][:2] == ["begin", "one"])
        os.kill(one.pid, signal.SIGKILL)  # in the middle of a measurement
        one.wait()
        killed, before = time.monotonic(), ended("two")
        until(lambda: ended("two") > before + 3, 30.0)
        assert time.monotonic() - killed < 15.0
    finally:
        for process in (one, two):
            process.kill()
            process.wait()
    spans_ = sorted((float(row[3]), float(row[2]), row[1]) for row in rows() if row[0] == "end")
    assert {name for *_, name in spans_} == {"one", "two"}
    for before_, after in itertools.pairwise(spans_):
        assert before_[1] <= after[0] + 0.02, f"{before_} and {after} overlap"


# --- readings that come late, by closed form ------------------------------------------------------------------------


REFUSED = 14


class Partly(Closed):
    """As `Closed`, but the device is away for two trials of three, at every rung."""

    def evaluate(self, assignment: Assignment) -> Iterator[tuple[State, Outcome]]:
        for state, outcome in super().evaluate(assignment):
            if assignment.number % 3 and state is not State.INFEASIBLE:
                yield state, outcome.model_copy(update={"readings": {}, "files": {"later:p": "0" * 64}})
            else:
                yield state, outcome


def run_partly(path: Path) -> Controller:
    """Late readings arrive three events after the end of their trial; one of them is a refusal."""
    controller = begin(path, trials=24)
    waiting: list[tuple[int, Event]] = []
    count = 0

    def on_event(event: Event) -> None:
        nonlocal count
        count += 1
        if "later:p" in event.get("outcome", {}).get("files", {}) and State(event["state"]).ended:
            waiting.append((count, event))
        while waiting and waiting[0][0] + 3 <= count:
            _, old = waiting.pop(0)
            ratio = 1.0 / (2 + old["number"] % 5)
            found = closed_outcome(ratio, None, 1.0).readings
            how: dict[str, Any] = {"readings": found}
            if old["number"] == REFUSED:
                how = {"readings": {}, "reason": "refused"}
            number, attempt = old["number"], old["attempt"]
            controller.post(partial(Controller.late, number=number, attempt=attempt, role="later:p", **how))

    run_serial(controller, Partly(), on_event)
    controller.settle()
    return controller


def test_a_late_reading_is_told_again_and_a_resume_follows_every_step(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    live = run_partly(path)
    live.journal.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    late = [line["number"] for line in lines if "late" in line]
    assert len(late) > 5
    assert all(live.searcher.told.count(number) > 1 for number in late)  # pyright: ignore[reportAttributeAccessIssue]
    assert REFUSED in late
    again = Controller.resume(Journal.open(path), Learner)
    assert not again.notes
    assert again.trials == live.trials
    assert again.searcher.seen == live.searcher.seen  # pyright: ignore[reportAttributeAccessIssue]
    refused = next(trial for trial in again.trials if trial.number == REFUSED)
    assert (refused.state, refused.outcome.reason, refused.outcome.files) == (State.FAILED, "refused", {})
    for before, after in zip(live._ladder._rungs, again._ladder._rungs, strict=True):
        assert before.standing().tolist() == after.standing().tolist()
        assert before.waiting.tolist() == after.waiting.tolist()
    again.journal.close()


def test_a_late_reading_of_a_trial_that_went_on_is_dropped(tmp_path: Path) -> None:
    controller = begin(tmp_path / "journal.jsonl", trials=1)
    assignment = controller.ask()
    assert assignment is not None
    outcome = closed_outcome(0.3, 0.8, 1.0).model_copy(update={"readings": {}, "files": {"later:p": "0" * 64}})
    found = closed_outcome(0.3, 0.8, 1.0).readings
    size = len(controller.journal.events())
    controller.late(1, 1, "later:p", found)  # in flight
    assert len(controller.journal.events()) == size
    controller.tell(1, State.DONE, outcome)
    controller.late(1, 2, "later:p", found)  # of another attempt
    assert not controller.trials[0].outcome.readings
    controller.late(1, 1, "later:p", found)
    controller.late(1, 1, "later:p", found)  # twice
    assert controller.trials[0].outcome.readings == found
    assert len(controller.journal.events()) == size + 2
    controller.journal.close()


def test_a_journal_that_completes_what_has_not_ended_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    controller = begin(path, trials=1)
    controller.ask()
    event = {"number": 1, "state": "done", "rung": 2, "attempt": 1, "late": ["p"], "outcome": {}, "at": 1}
    controller.journal.append(event)
    controller.journal.close()
    with pytest.raises(UserError, match=r"line 3: does not follow .* completed before its end"):
        Controller.resume(Journal.open(path), Learner)


def test_places_at_a_rung_are_those_of_complete_readings() -> None:
    goals = pareto.goals((Budget(profile="p", speedup=2.0),))
    limit, fidelity = Limit(metric="accuracy", floor=0.5), Fidelity(rungs=(0.3, 1.0))
    whole, late = Ladder(fidelity, goals, limit), Ladder(fidelity, goals, limit)
    for number in range(1, 40):
        outcome = closed_outcome(0.1 + number * 7 % 11 / 12, 0.5 + number * 5 % 9 / 20, 0.3)
        whole.reach(number, 0, outcome)
        late.reach(number, 0, outcome.model_copy(update={"readings": {}}) if number % 2 else outcome)
        if number % 3 == 0:
            whole.wait(number, 0)
            late.wait(number, 0)
    for number in range(39, 0, -2):
        late.complete(number, closed_outcome(0.1 + number * 7 % 11 / 12, None, 1.0))
    assert whole.promotable() == late.promotable()
    assert [whole.goes_on(n, 0) for n in range(1, 40)] == [late.goes_on(n, 0) for n in range(1, 40)]


# --- a search whose device vanishes ------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates of short sessions: what they are worth is for other tests."""
    monkeypatch.setattr(Station.session, "__defaults__", (0.2,))


def thin() -> ConvNet:
    """Half as wide as that of `small_search`."""
    return ConvNet(arch={"resolution": 8, "width.0": 8, "width.1": 16, "width.2": 32})


def space(folder: Path) -> Space:
    """The one of `small_search`, for the thin network."""
    (folder / "small.yaml").write_text(small_search.SPACE)
    return load.space(folder / "small.yaml", thin())


def asked(tmp_path: Path, *names: str, trials: int = 5, patience: float = 1.0, **plan: Any) -> Job:
    """Two devices, or one, with budgets that any candidate meets; trained for as little as can be."""
    budgets = tuple(Budget(profile=name, speedup=0.05) for name in names)
    brief = Fidelity(full_epochs=0.2, rungs=(0.5, 1.0), keep=1.0)
    made = small_search.job(tmp_path / "out", patience=patience, fidelity=brief, **plan)
    cost = made.search.cost.model_copy(update={"trials": trials})
    search = made.search.model_copy(update={"cost": cost})
    model = made.model.model_copy(update={"epochs": 0.5})
    quality = QualityLimit(min=0.0)
    return made.model_copy(update={"devices": budgets, "search": search, "model": model, "quality": quality})


def judged(found: Summary) -> dict[str, str]:
    """Goal -> why its best is not certified, but for what a busy machine does to short sessions; empty: it is."""
    reasons = {goal: one.reason for goal, one in found.closest.items()}
    return {
        goal: "" if "noisy" in reasons.get(goal, "") else reasons.get(goal, "") for goal in (*found.winners, *reasons)
    }


def events(out: Path) -> list[dict[str, Any]]:
    path = out / "journal.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def done(out: Path) -> list[int]:
    return [e["number"] for e in events(out) if e["state"] == "done" and "late" not in e and e["number"] > 0]


def missed(out: Path) -> list[int]:
    """Trials that ended without a reading of the device."""
    ended = [e for e in events(out) if e["state"] == "done"]
    return [e["number"] for e in ended if "later:alpha" in e.get("outcome", {}).get("files", {})]


def searched(job: Job, tmp_path: Path, words: StringIO, **how: Any) -> Summary:
    console = Console(file=words, width=200, emoji=False)
    return run(job, builder=thin(), space=space(tmp_path), console=console, **how)


def replayed(out: Path) -> Controller:
    return Controller.resume(Journal.open(out / "journal.jsonl"), make_searcher)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("serial", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_search_goes_on_without_a_device_and_completes_what_it_missed(
    tmp_path: Path, serial: bool, quick: None
) -> None:
    board(tmp_path, "alpha")
    out, cable, words = tmp_path / "out", tmp_path / "alpha" / "cut", StringIO()

    def cut() -> None:
        until(lambda: done(out))
        cable.touch()
        until(lambda: missed(out))
        cable.unlink()

    trials = 5
    threading.Thread(target=cut, daemon=True).start()
    job = asked(tmp_path, "local-1t", str(tmp_path / "alpha.yaml"), trials=trials, workers=2)
    found = searched(job, tmp_path, words, serial=serial)
    assert found.state == "finished"
    told = events(out)
    late = [e for e in told if "late" in e]
    assert late, "nothing was missed, so nothing was tried"
    assert not [e for e in told if e["state"] == "failed"]
    assert {e["state"] for e in told if e["number"] == 0} >= {"away", "back"}
    for event in late:
        those = [e for e in told if e["number"] == event["number"] and "outcome" in e]
        first = next(e for e in those if "later:alpha" in e["outcome"]["files"])
        assert set(first["outcome"]["readings"]) == {"local-1t"}
        assert set(event["outcome"]["readings"]) == {"local-1t", "alpha"}
        assert "later:alpha" not in event["outcome"]["files"]
    controller = replayed(out)
    assert controller.finished
    ended = [trial for trial in controller.trials if trial.state.value in ("done", "stopped")]
    assert len(ended) == trials + 1
    assert all({"alpha", "local-1t"} <= set(trial.outcome.readings) for trial in ended)
    assert words.getvalue().count("alpha is away, its queue pauses") == 1
    assert words.getvalue().count("alpha is back") == 1
    assert judged(found) == {"local-1t": "", "alpha": "", "all-devices": ""}
    controller.journal.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_with_its_only_device_away_a_search_waits_then_stops_and_resumes(tmp_path: Path, quick: None) -> None:
    board(tmp_path, "alpha")
    out, cable, words = tmp_path / "out", tmp_path / "alpha" / "cut", StringIO()

    def cut() -> None:
        until(lambda: done(out))
        cable.touch()

    threading.Thread(target=cut, daemon=True).start()
    job = asked(tmp_path, str(tmp_path / "alpha.yaml"), trials=3, patience=0.02)
    found = searched(job, tmp_path, words, serial=True)
    assert found.state == "interrupted"
    assert "no device has answered for 0.02 minutes (alpha: alpha cannot be reached" in words.getvalue()
    assert not [e for e in events(out) if e["state"] == "failed"]
    assert "alpha was away (alpha cannot be reached: the cable is out)" in found.closest["alpha"].reason
    before = done(out)
    cable.unlink()
    again = resume(out, builder=thin(), space=space(tmp_path), serial=True, console=Console(quiet=True))
    assert again.state == "finished"
    assert judged(again) == {"alpha": ""}
    assert done(out)[: len(before)] == before
    assert [e["number"] for e in events(out) if e.get("why") == "new"] == [1, 2, 3]


@pytest.mark.timeout(600)
def test_with_its_only_device_away_for_a_while_a_search_waits_and_loses_nothing(tmp_path: Path, quick: None) -> None:
    board(tmp_path, "alpha")
    out, cable, words = tmp_path / "out", tmp_path / "alpha" / "cut", StringIO()

    def cut() -> None:
        until(lambda: done(out))
        cable.touch()
        time.sleep(2.0)
        cable.unlink()

    threading.Thread(target=cut, daemon=True).start()
    found = searched(asked(tmp_path, str(tmp_path / "alpha.yaml"), trials=3), tmp_path, words, serial=True)
    assert found.state == "finished"
    assert words.getvalue().count("alpha is away") == 1
    assert [e["number"] for e in events(out) if e["state"] == "running"] == [1, 2, 3]
    assert judged(found) == {"alpha": ""}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_device_that_stays_away_is_named_by_the_certificate_and_measured_on_resume(
    tmp_path: Path, quick: None
) -> None:
    board(tmp_path, "alpha")
    out, cable, words = tmp_path / "out", tmp_path / "alpha" / "cut", StringIO()

    def cut() -> None:
        until(lambda: done(out))
        cable.touch()

    threading.Thread(target=cut, daemon=True).start()
    job = asked(tmp_path, "local-1t", str(tmp_path / "alpha.yaml"), trials=3, patience=0.02)
    found = searched(job, tmp_path, words, serial=True)
    reasons = judged(found)
    assert reasons.pop("local-1t") == ""
    assert set(reasons) == {"alpha", "all-devices"}
    assert all("alpha was away" in reason for reason in reasons.values())
    assert "alpha stayed away" in words.getvalue()
    assert [e for e in events(out) if "later:alpha" in e.get("outcome", {}).get("files", {})]
    cable.unlink()
    again = resume(out, builder=thin(), space=space(tmp_path), serial=True, console=Console(quiet=True))
    assert judged(again) == {"local-1t": "", "alpha": "", "all-devices": ""}
    assert [e for e in events(out) if "late" in e]


def test_a_search_begins_with_every_device(tmp_path: Path) -> None:
    board(tmp_path, "alpha")
    (tmp_path / "alpha" / "cut").touch()
    with pytest.raises(UserError, match="the cable is out; a search begins with a reading on every device"):
        searched(asked(tmp_path, str(tmp_path / "alpha.yaml")), tmp_path, StringIO(), serial=True)
    assert not (tmp_path / "out" / "journal.jsonl").exists()
