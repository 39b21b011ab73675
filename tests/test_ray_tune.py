"""The search through Ray Tune, with real processes that really die."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster
from ray.tune.execution.tune_controller import TuneController

from autocompress import journal as journals
from autocompress import pareto, ray_tune
from autocompress.controller import Controller, Header, run_serial
from autocompress.journal import Journal
from autocompress.space import sample
from autocompress.store import Store
from autocompress.types import (
    Assignment,
    Budget,
    Cost,
    Fidelity,
    Gene,
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

pytestmark = pytest.mark.filterwarnings(
    # Ray leaves its processes to the system when a session ends: https://github.com/ray-project/ray/issues/9546
    "ignore:subprocess .* is still running:ResourceWarning",
    "ignore:unclosed:ResourceWarning",
)
SPACE = Space(name="closed", genes=tuple(Gene(name=f"d{i}", kind="arch", choices=(0, 1, 2, 3)) for i in range(4)))


class Dice:
    """Random search."""

    def __init__(self, h: Header) -> None:
        self.space, self.seed = h.space, h.plan.seed

    def ask(self, number: int, pending: Sequence[Trial]) -> Proposal:
        return Proposal(genotype=sample(self.space, random.Random(f"{self.seed}.{number}")))

    def tell(self, trial: Trial) -> None:
        pass


class Closed:
    """Closed form; `killed` are (number, attempts) whose process dies on the way."""

    def __init__(
        self, delay: float = 0.0, killed: dict[int, int] | None = None, files: Any = None, station: Any = None
    ):
        self.delay, self.killed, self.files, self.station = delay, killed or {}, files, station

    def evaluate(self, assignment: Assignment) -> Iterator[tuple[State, Outcome]]:
        g = assignment.genotype
        ratio = 1.0 / (1 + g[0])
        if self.files is not None:
            model = self.files.get(self.files.put(f"model {g}".encode() * 50_000))
            ratio = self.station.measure("p", model).ratio.value
        if g == (3, 3, 3, 3):
            raise TrialFailure("diverged")
        for index in range(assignment.start, len(assignment.rungs)):
            time.sleep(self.delay)
            if assignment.attempt <= self.killed.get(assignment.number, 0):
                os.kill(os.getpid(), signal.SIGKILL)
            quality = (0.9 - 0.05 * g[0] + 0.02 * g[1]) * (1 - 0.2 * (1 - assignment.rungs[index]))
            last = index + 1 == len(assignment.rungs)
            yield State.DONE if last else State.RUNG, outcome(ratio, quality, assignment.rungs[index])


def reading(ratio: float) -> Reading:
    one = Interval(value=ratio, low=ratio, high=ratio)
    base = Interval(value=1.0, low=1.0, high=1.0)
    return Reading(profile="p", ms=one, p95_ms=one, baseline_ms=base, ratio=one, samples=9, rounds=3)


def outcome(ratio: float, quality: float, fidelity: float) -> Outcome:
    value = Interval(value=quality, low=quality, high=quality)
    found = {"p": Quality(metric="accuracy", split="selection", value=value, samples=9)}
    return Outcome(fidelity=fidelity, readings={"p": reading(ratio)}, quality=found)


class Scale:
    """A station that weighs; slow or broken once where a file says so."""

    def __init__(self, marker: Path) -> None:
        self.marker, self.busy = marker, False

    def measure(self, profile_name: str, model: bytes) -> Reading:
        assert not self.busy, "two measurements at once"
        self.busy = True
        try:
            if self.marker.exists():
                order = self.marker.read_text()
                self.marker.unlink()
                if order == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(float(order))
            if model == b"bad":
                raise TrialFailure("cannot be loaded")
            time.sleep(0.005)
            return reading(0.2 + len(model) % 7 / 10)
        finally:
            self.busy = False

    def pid(self) -> int:
        return os.getpid()


def begin(path: Path, trials: int) -> Controller:
    header = Header(
        space=SPACE,
        goals=pareto.goals((Budget(profile="p", speedup=2.0),)),
        limit=Limit(metric="accuracy", floor=0.7),
        plan=SearchPlan(searcher="dice", cost=Cost(trials=trials), fidelity=Fidelity(rungs=(0.3, 1.0))),
    )
    return Controller.begin(Journal.create(path, header.event()), Dice)


def check_journal(path: Path, trials: int) -> list[dict[str, Any]]:
    """Every trial was asked once and ended; every rung was reached once."""
    events = [e for e in journals.read(path).events if e["state"] != "cost"]
    assert [e["number"] for e in events if e.get("why") == "new"] == list(range(1, trials + 1))
    reached = [(e["number"], e["rung"]) for e in events[1:] if e["state"] in ("rung", "stopped", "done")]
    assert len(set(reached)) == len(reached)
    attempts = [(e["number"], e["attempt"]) for e in events[1:] if e["state"] == "running"]
    assert len(set(attempts)) == len(attempts)
    last = {e["number"]: State(e["state"]) for e in events[1:]}
    assert all(state.ended for state in last.values())
    return events


@pytest.fixture(autouse=True, scope="module")
def _by_value() -> Iterator[None]:
    """Workers cannot import a test module, so its classes travel whole."""
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture(scope="class")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ray_tune.Session]:
    with ray_tune.Session(workers=2, store_root=tmp_path_factory.mktemp("store")) as session:
        yield session


class TestLocal:
    """One local Ray for several searches."""

    def test_a_search(self, session: ray_tune.Session, tmp_path: Path) -> None:
        controller = begin(tmp_path / "j.jsonl", 30)
        seen: list[dict[str, Any]] = []
        session.run(controller, Closed, seen.append)
        assert controller.finished
        events = check_journal(tmp_path / "j.jsonl", 30)
        assert seen == events[1:]
        assert {t.state for t in controller.trials} >= {State.DONE, State.STOPPED}
        with Journal.open(_closed(controller)) as journal:
            assert Controller.resume(journal, Dice).trials == controller.trials

    def test_a_killed_worker_is_replaced(self, session: ray_tune.Session, tmp_path: Path) -> None:
        controller = begin(tmp_path / "j.jsonl", 10)
        session.run(controller, partial(Closed, 0.0, {2: 1}))
        events = check_journal(tmp_path / "j.jsonl", 10)
        retries = Counter(e["number"] for e in events if e.get("why") == "retry")
        assert retries == {2: 1}
        assert not [t.outcome.reason for t in controller.trials if t.state is State.FAILED]

    def test_files_and_measurements_travel(self, session: ray_tune.Session, tmp_path: Path) -> None:
        marker = tmp_path / "marker"
        station = session.station(partial(Scale, marker), "scale", timeout=3.0)
        with pytest.raises(TrialFailure, match="cannot be loaded"):
            station.measure("p", b"bad")
        assert station.measure("p", b"1234567").ratio.value == pytest.approx(0.2)
        before = station.call("pid")
        marker.write_text("die")
        assert station.measure("p", b"1234567").samples == 9
        marker.write_text("90")  # far over its time: killed before it is asked again
        started = time.monotonic()
        assert station.measure("p", b"1234567").samples == 9
        assert time.monotonic() - started < 60
        assert station.call("pid") != before
        controller = begin(tmp_path / "j.jsonl", 12)
        session.run(controller, partial(Closed, files=session.files, station=station))
        check_journal(tmp_path / "j.jsonl", 12)
        assert all(t.state in (State.DONE, State.STOPPED) for t in controller.trials)
        sha = session.files.put(b"x" * 3_000_000)
        assert session.store_root is not None
        assert Store(session.store_root).get(sha) == b"x" * 3_000_000
        with pytest.raises(UserError, match="missing"):
            session.files.get("0" * 64)

    def test_a_worker_that_cannot_start_ends_the_search(self, session: ray_tune.Session, tmp_path: Path) -> None:
        def broken() -> Closed:
            raise UserError("no data at the given path: run the download first")

        controller = begin(tmp_path / "j.jsonl", 5)
        with pytest.raises(UserError, match="run the download"):
            session.run(controller, broken)
        with Journal.open(_closed(controller)) as journal:
            again = Controller.resume(journal, Dice)
            session.run(again, Closed)
        check_journal(tmp_path / "j.jsonl", 5)

    def test_a_dead_tune_is_started_again(
        self, session: ray_tune.Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As when Ray's memory monitor kills a worker: the whole fit() dies."""
        calls = [0]
        step = TuneController.step

        def dying(self: TuneController) -> None:
            calls[0] += 1
            if calls[0] == 25:
                raise RuntimeError("Caught unexpected exception")
            step(self)

        monkeypatch.setattr(TuneController, "step", dying)
        controller = begin(tmp_path / "j.jsonl", 12)
        session.run(controller, partial(Closed, 0.05))
        events = check_journal(tmp_path / "j.jsonl", 12)
        assert any(e.get("why") == "retry" for e in events)
        assert calls[0] > 25
        sha = session.files.put(b"after")  # stand-ins still find what they stand for
        assert session.files.get(sha) == b"after"


def _closed(controller: Controller) -> Path:
    controller.journal.close()
    return controller.journal.path


def test_two_raylets(tmp_path: Path) -> None:
    """A running cluster of two nodes; in a process of its own, as its authentication is another than a local Ray's."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_ray_tune import *; on_two_raylets()"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(ray_tune.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    check_journal(tmp_path / "j.jsonl", 8)
    assert "2 nodes 0 failed" in done.stdout


class Where(Closed):
    """Says on which node it ran; nobody ends before both nodes have begun."""

    def evaluate(self, assignment: Assignment) -> Iterator[tuple[State, Outcome]]:
        marks, node = Path(os.environ["MARK"]), ray.get_runtime_context().get_node_id()
        (marks / node).touch()
        give_up = time.monotonic() + 90
        while len(list(marks.iterdir())) < 2 and time.monotonic() < give_up:
            time.sleep(0.05)
        for state, found in super().evaluate(assignment):
            sha = self.files.put(node.encode())
            yield state, found.model_copy(update={"files": {"node": sha}})


def on_two_raylets() -> None:
    """The body of the test above."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        Path("marks").mkdir()
        env = {"MARK": str(Path("marks").resolve())}
        with ray_tune.Session(address=cluster.address, env=env, store_root=Path("store").resolve()) as session:
            assert session.workers == 2
            station = session.station(partial(Scale, Path("none").resolve()))
            controller = begin(Path("j.jsonl"), 8)
            session.run(controller, partial(Where, files=session.files, station=station))
            nodes = {session.files.get(t.outcome.files["node"]) for t in controller.trials if t.outcome.files}
        assert not ray.is_initialized()
        print(len(nodes), "nodes", sum(t.state is State.FAILED for t in controller.trials), "failed")
    finally:
        cluster.shutdown()


def test_an_address_without_a_cluster_is_one_clear_line() -> None:
    for address in ("nonsense", "ray://localhost:10001"):
        with pytest.raises(UserError, match="HOST:PORT"):
            ray_tune.Session(address=address)


DRIVER = """
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
from test_ray_tune import *
path = Path(sys.argv[1])
cloudpickle.register_pickle_by_value(sys.modules["test_ray_tune"])
controller = begin(path, 400)
cores = sorted(os.sched_getaffinity(0))[:1]
ray_tune.run(controller, partial(Closed, 0.05), workers=2, trainer_cores=cores)
assert len(os.sched_getaffinity(0)) >= len(cores)
print("stopped", controller.stopped, len(controller.trials))
"""


def _drive(path: Path) -> subprocess.Popen[str]:
    code = DRIVER.format(tests=str(Path(__file__).parent))
    return subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _wait_for(events: int, path: Path, child: subprocess.Popen[str]) -> None:
    give_up = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < events:
        if child.poll() is not None or time.monotonic() > give_up:
            child.kill()
            pytest.fail(f"the driver did not get going: {child.communicate()}")
        time.sleep(0.02)


def test_kill_the_driver_and_resume(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    child = _drive(path)
    _wait_for(30, path, child)
    child.kill()
    child.communicate()
    before = path.read_bytes()
    before = before[: before.rindex(b"\n") + 1]
    with Journal.open(path) as journal:
        controller = Controller.resume(journal, Dice, spent={"trials": 40})
        run_serial(controller, Closed())
    assert path.read_bytes().startswith(before)
    events = check_journal(path, 40)
    assert any(e.get("why") == "resumed" for e in events)


def test_ctrl_c_and_sigterm_end_in_good_order_and_silence(tmp_path: Path) -> None:
    paths = {signal.SIGINT: tmp_path / "int.jsonl", signal.SIGTERM: tmp_path / "term.jsonl"}
    children = {number: _drive(path) for number, path in paths.items()}
    families: list[psutil.Process] = []
    started: dict[int, float] = {}
    for number, child in children.items():
        _wait_for(20, paths[number], child)
        family = psutil.Process(child.pid).children(recursive=True)
        alive = [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        assert all(len(p.cpu_affinity() or []) == 1 for p in alive)
        families += family
        started[number] = time.monotonic()
        child.send_signal(number)
    for number, child in children.items():
        out, err = child.communicate(timeout=40)
        assert time.monotonic() - started[number] < 30
        assert child.returncode == 0, err
        assert out.startswith("stopped True")
        assert err == ""
        assert not list(Path(ray_tune._short_folder()).glob(f"{ray_tune.PREFIX}-{child.pid}-*"))
        with Journal.open(paths[number]) as journal:
            resumed = Controller.resume(journal, Dice, spent={"trials": 20})
            run_serial(resumed, Closed())
        check_journal(paths[number], len(resumed.trials))
    _, still_there = psutil.wait_procs(families, timeout=10)
    assert not still_there
