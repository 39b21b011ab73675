"""Quiet phases and the host lock, between real processes, some of which are killed."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from autocompress.devices.gate import Gate, HostLock

WORKER = """
import sys, time
from pathlib import Path
from autocompress.devices.gate import Gate
folder, seconds, log = Path(sys.argv[1]), float(sys.argv[2]), open(sys.argv[3], "a", buffering=1)
gate = Gate(folder)
with gate.working():
    while True:
        began = time.monotonic()
        time.sleep(seconds)
        log.write(f"{began} {time.monotonic()}\\n")
        gate.step()
"""
QUIET = """
import sys, time
from pathlib import Path
from autocompress.devices.gate import Gate
with Gate(Path(sys.argv[1])).quiet():
    Path(sys.argv[3]).write_text("in")
    time.sleep(600)
"""
LOCK = """
import sys, time
from pathlib import Path
from autocompress.devices.gate import HostLock
lock = HostLock(Path(sys.argv[1]))
for _ in range(5):
    with lock.held("profile somewhere"), open(sys.argv[3], "a", buffering=1) as log:
        began = time.monotonic()
        time.sleep(float(sys.argv[2]))
        log.write(f"{began} {time.monotonic()}\\n")
"""
FORKS = """
import os, sys, time
from pathlib import Path
from autocompress.devices.gate import Gate
gate = Gate(Path(sys.argv[1]))
with gate.working():
    child = os.fork()
    if child:
        Path(sys.argv[3]).write_text(str(child))
    time.sleep(600)
"""


@contextmanager
def started(script: str, folder: Path, seconds: float, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", script, str(folder), str(seconds), str(log)])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(path: Path) -> None:
    until = time.monotonic() + 20
    while not (path.is_file() and path.read_text()):
        assert time.monotonic() < until, f"nothing in {path}"
        time.sleep(0.01)


def spans(path: Path) -> list[tuple[float, float]]:
    rows = [line.split() for line in path.read_text().splitlines()]
    return [(float(row[0]), float(row[1])) for row in rows if len(row) == 2]


def test_trainers_pause_while_it_is_quiet_and_go_on_after(tmp_path: Path) -> None:
    logs = [tmp_path / f"log{i}" for i in range(3)]
    with (
        started(WORKER, tmp_path, 0.02, logs[0]),
        started(WORKER, tmp_path, 0.005, logs[1]),
        started(WORKER, tmp_path, 0.0, logs[2]),  # one that never rests must not starve the measurement
    ):
        for log in logs:
            wait_for(log)
        gate, phases = Gate(tmp_path), []
        for _ in range(5):
            asked = time.monotonic()
            with gate.quiet(timeout=10):
                began = time.monotonic()
                assert began - asked < 5
                time.sleep(0.1)
                phases.append((began, time.monotonic()))
            time.sleep(0.1)
        gate.close()
    for log in logs:
        steps = spans(log)
        for began, ended in phases:
            assert not [s for s in steps if s[0] < ended and s[1] > began], "somebody worked in a quiet phase"
        assert steps[-1][0] > phases[-1][1], "it did not go on"


def test_those_that_can_stand_still_while_it_is_hushed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    mine, other = Gate(tmp_path), Gate(tmp_path)
    with started(WORKER, tmp_path, 0.01, log):
        wait_for(log)
        with other.hushed(5) as all_stand:
            assert all_stand
        with mine.working():  # never reaches a step
            with other.hushed(0.2) as all_stand:
                began = time.monotonic()
                time.sleep(0.2)
                ended = time.monotonic()
            assert not all_stand
        time.sleep(0.1)
    assert not [span for span in spans(log) if span[0] > began and span[1] < ended], "somebody passed a step"
    assert spans(log)[-1][0] > ended, "it did not go on"
    mine.close()
    other.close()


def test_a_killed_trainer_lets_go(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with started(WORKER, tmp_path, 0.01, log) as worker:
        wait_for(log)
        os.kill(worker.pid, signal.SIGSTOP)  # never reaches its step
        gate = Gate(tmp_path)
        time.sleep(0.1)
        with pytest.raises(TimeoutError), gate.quiet(timeout=0.2):
            pytest.fail("it was not quiet")
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
        with gate.quiet(timeout=2):
            pass
        gate.close()


def test_a_killed_trainer_lets_go_though_a_child_of_it_lives(tmp_path: Path) -> None:
    note = tmp_path / "child"
    with started(FORKS, tmp_path, 0, note) as parent:
        wait_for(note)
        child = int(note.read_text())
        try:
            parent.kill()
            parent.wait()
            os.kill(child, 0)  # it lives
            time.sleep(0.1)
            with Gate(tmp_path).quiet(timeout=2):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_killed_measurement_lets_the_trainers_go_on(tmp_path: Path) -> None:
    entered = tmp_path / "entered"
    with started(QUIET, tmp_path, 0, entered) as station:
        wait_for(entered)
        log = tmp_path / "log"
        with started(WORKER, tmp_path, 0.01, log):
            time.sleep(0.7)
            assert not log.exists() or not log.read_text()
            station.kill()
            station.wait()
            wait_for(log)


def test_a_step_costs_next_to_nothing(tmp_path: Path) -> None:
    gate, costs = Gate(tmp_path), []
    with gate.working():
        for _ in range(2000):
            began = time.perf_counter()
            gate.step()
            costs.append(time.perf_counter() - began)
    gate.close()
    assert statistics.median(costs) < 50e-6


def test_quiet_while_working_is_a_step_boundary(tmp_path: Path) -> None:
    mine, other = Gate(tmp_path), Gate(tmp_path)
    with mine.working():
        with mine.working(), mine.quiet(timeout=1):
            pass
        with pytest.raises(TimeoutError), other.quiet(timeout=0.1):
            pass  # I work again
    with other.quiet(timeout=1):
        pass
    mine.step()  # outside of work there is nothing to let in
    mine.close()
    other.close()


def test_two_measurements_never_overlap(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with started(LOCK, tmp_path, 0.03, log) as one, started(LOCK, tmp_path, 0.03, log) as two:
        assert one.wait(30) == two.wait(30) == 0
    taken = sorted(spans(log))
    assert len(taken) == 10
    assert all(before[1] <= after[0] for before, after in pairwise(taken))


def test_it_says_for_whom_it_waits_and_a_killed_holder_lets_go(tmp_path: Path) -> None:
    heard: list[str] = []
    lock = HostLock(tmp_path, say=heard.append)
    log = tmp_path / "log"
    with started(LOCK, tmp_path, 600, log) as holder:
        until = time.monotonic() + 20
        while not lock.path.is_file() or not lock.path.read_text():
            assert time.monotonic() < until
            time.sleep(0.01)
        with pytest.raises(TimeoutError), lock.held("profile mine", timeout=1.3):
            pass
        assert len(heard) == 1
        assert f"waiting for pid {holder.pid}" in heard[0]
        assert "profile somewhere" in heard[0]
        holder.kill()
        holder.wait()
        with lock.held("profile mine", timeout=1):
            assert f"pid {os.getpid()}" in lock.holder()
    assert lock.path.read_text() == ""
    assert "another process" in lock.holder()
