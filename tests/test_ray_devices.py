"""Nodes of a Ray cluster as devices: several raylets on one machine, one of which is killed in the middle."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from rich.console import Console

from autocompress.devices import Unreachable
from autocompress.devices.cores import plan_cores
from autocompress.devices.fingerprint import host
from autocompress.devices.local import LocalDevice
from autocompress.devices.ray_node import RayDevice
from autocompress.devices.station import Station
from autocompress.export import predictor
from autocompress.run import run
from autocompress.testing import check_device
from autocompress.types import Budget, Profile, TrialFailure, UserError
from tests import small_search
from tests.test_devices import conv_net

pytestmark = pytest.mark.filterwarnings(
    # Ray leaves its processes to the system when a session ends: https://github.com/ray-project/ray/issues/9546
    "ignore:subprocess .* is still running:ResourceWarning",
    "ignore:unclosed:ResourceWarning",
)
SMALL, LARGE = conv_net(16, 8, 16), conv_net(48, 8, 16)


def node(name: str, **changes: Any) -> Profile:
    return Profile(name=name, device="ray", reach={"resource": f"device:{name}"}, **changes)  # pyright: ignore[reportArgumentType]


def cluster(*devices: str) -> tuple[Cluster, dict[str, Any]]:
    """A head that trains and a node for each device, which runs nothing else."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    return made, {name: made.add_node(num_cpus=0, resources={f"device:{name}": 1}) for name in devices}


def in_process(function: str, folder: Path) -> str:
    """Run a function of this module in a process of its own: a process has one Ray in its life."""
    code = f"from tests.test_ray_devices import *; {function}()"
    where = str(Path(__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": where, "RAY_AUTH_MODE": "disabled", "AUTOCOMPRESS_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def joined(address: str, name: str) -> Iterator[None]:
    """The node of a device comes back, by the command that a user would give."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={address}", "--num-cpus=0", "--block"]
    resources = json.dumps({f"device:{name}": 1})
    process = subprocess.Popen([*command, f"--resources={resources}"], stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


def kill(raylet: Any) -> None:
    """As a power cut: the node's processes are gone at once."""
    for infos in list(raylet.all_processes.values()):
        for info in infos:
            process = psutil.Process(info.process.pid)
            for one in (*process.children(recursive=True), process):
                one.send_signal(signal.SIGKILL)


# --- one device -----------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_a_node_measures_like_the_host_that_it_is(tmp_path: Path) -> None:
    told = in_process("on_a_node", tmp_path)
    assert "the contract holds" in told
    assert "six at once" in told
    assert "the same host" in told
    assert "no model" in told
    assert "away: b cannot be reached: no node of the Ray cluster holds device:b" in told


def on_a_node() -> None:
    """The body of the test above."""
    made, _ = cluster("a")
    os.environ["RAY_ADDRESS"] = str(made.address)
    try:
        Path("large.onnx").write_bytes(LARGE)
        Path("small.onnx").write_bytes(SMALL)
        device = RayDevice(node("a"))
        check_device(device, Path("small.onnx").resolve())
        print("the contract holds")
        assert device.fingerprint() == LocalDevice(Profile(name="here")).fingerprint()
        assert device.fingerprint()["processor"] == host()["processor"]
        print("the same host")
        inputs = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)
        assert np.array_equal(device.answers(Path("small.onnx"), [inputs])[0], predictor(SMALL)(inputs))
        assert device.room()
        many = [Path(f"{channels}.onnx").resolve() for channels in range(8, 14)]  # as a survey asks
        for channels, path in zip(range(8, 14), many, strict=True):
            path.write_bytes(conv_net(channels, 8, 16))
        assert set(device.time(many, rounds=1, seconds=0.1).times_ms) == set(map(str, many))
        print("six at once")
        device.close()
        profiles = (node("a"), node("b"))
        station = Station(profiles, plan_cores(profiles), Path("large.onnx"))
        found = station.measure("a", SMALL, seconds=0.5)
        assert 0.02 < found.ratio.value < 0.6
        assert station.session("a", SMALL, seconds=0.2).fingerprint == found.fingerprint
        try:
            station.measure("a", b"rubbish")
        except TrialFailure as failure:
            print("no model:", failure)
        print("away:", station.away()["b"])
        station.close()
        ray.shutdown()
    finally:
        made.shutdown()


def test_without_a_resource_or_a_cluster_it_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match="needs `reach: "):
        RayDevice(Profile(name="a", device="ray"))
    with pytest.raises(UserError, match="RAY_ADDRESS"):
        RayDevice(node("a"))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UserError, match="no Ray cluster can be used at"):
        RayDevice(node("a"))
    path = tmp_path / "a.yaml"
    path.write_text(node("a").model_dump_json(exclude_defaults=True))
    job = small_search.job(tmp_path / "out").model_copy(update={"devices": (Budget(profile=str(path), speedup=0.1),)})
    with pytest.raises(UserError, match="a: reached through Ray; name the cluster by --address HOST:PORT"):
        run(job, builder=small_search.builder(), space=small_search.space(tmp_path), console=Console(quiet=True))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_that_is_killed_in_the_middle_is_away_until_it_is_back(tmp_path: Path) -> None:
    told = in_process("killed_in_the_middle", tmp_path)
    assert "back" in told


def killed_in_the_middle() -> None:
    """The body of the test above."""
    made, nodes = cluster("a")
    os.environ["RAY_ADDRESS"] = str(made.address)
    try:
        Path("large.onnx").write_bytes(LARGE)
        station = Station((node("a"),), plan_cores((node("a"),)), Path("large.onnx"), pause=0.5)
        station.measure("a", SMALL)
        threading.Timer(3.0, kill, (nodes["a"],)).start()
        try:
            station.certify("a", SMALL, sessions=99, seconds=1.0)
        except Unreachable as gone:
            print("gone:", gone)
        assert "a" in station.away()
        until = time.monotonic() + 90
        with joined(str(made.address), "a"):
            while time.monotonic() < until:
                try:
                    print("back:", station.session("a", SMALL).ms.value)
                    break
                except Unreachable:
                    time.sleep(0.2)
        assert not station.away()
        station.close()
        ray.shutdown()
    finally:
        made.shutdown()


# --- two searches, one device -----------------------------------------------------------------------------------------


SEARCH = """
import os, sys, time
from pathlib import Path
from autocompress.devices.cores import plan_cores
from autocompress.devices.ray_node import RayDevice
from autocompress.devices.station import Station
from tests.test_ray_devices import SMALL, node

class Logged(RayDevice):
    def time(self, models, **how):
        self.fingerprint(), self._sent(models)  # starting there and sending is not measuring
        began = time.monotonic()
        found = super().time(models, **how)
        print("span", began + found.waited_s, time.monotonic(), found.waited_s, flush=True)
        return found

station = Station((node("a"),), plan_cores((node("a"),)), Path("large.onnx"), device=Logged)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(6):
    station.session("a", SMALL, 0.5)
station.close()
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_searches_that_want_one_device_take_turns(tmp_path: Path) -> None:
    rows = json.loads(in_process("two_searches", tmp_path).splitlines()[-1])
    assert {row[0] for row in rows} == {0, 1}
    rows.sort(key=lambda row: row[1])
    busy = [(began, ended) for _, began, ended, _ in rows]
    assert max(one[1] - two[0] for one, two in itertools.pairwise(busy)) < 0.1  # the answer is some time on its way
    assert max(row[3] for row in rows) > 0.05, "neither ever waited, so nothing was shown"


def two_searches() -> None:
    """The body of the test above."""
    made, _ = cluster("a")
    Path("large.onnx").write_bytes(LARGE)
    env = {**os.environ, "RAY_ADDRESS": made.address}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", SEARCH], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        for one in both:
            assert one.stdout is not None
            while one.stdout.readline() != "ready\n":
                assert one.poll() is None
        outputs: list[str] = ["", ""]
        for one in both:
            assert one.stdin is not None
            one.stdin.write("go\n")
            one.stdin.flush()
        for at, one in enumerate(both):
            outputs[at] = one.communicate(timeout=200)[0]
            assert one.returncode == 0
        lines = [(at, line.split()) for at, text in enumerate(outputs) for line in text.splitlines()]
        print(json.dumps([[at, *map(float, row[1:])] for at, row in lines if row[0] == "span"]))
    finally:
        for one in both:
            one.kill()
        made.shutdown()


# --- a search ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_raylet_killed_in_a_search_pauses_its_queue_and_comes_back(tmp_path: Path) -> None:
    told = in_process("a_search", tmp_path)
    assert "finished" in told


def done(out: Path) -> list[int]:
    path = out / "journal.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [e["number"] for e in events if e["state"] == "done" and "late" not in e and e["number"] > 0]


def a_search() -> None:
    """The body of the test above."""
    made, nodes = cluster("a", "b")
    out, here, words = Path("out"), Path.cwd(), StringIO()
    for name in ("a", "b"):
        Path(f"{name}.yaml").write_text(node(name).model_dump_json(exclude_defaults=True))

    def cut() -> None:
        while not done(out):
            time.sleep(0.02)
        kill(nodes["b"])
        while len(done(out)) < 2:
            time.sleep(0.02)
        with joined(str(made.address), "b"):
            over.wait()

    over = threading.Event()
    back = threading.Thread(target=cut, daemon=True)
    back.start()
    try:
        job = small_search.job(out, workers=2)
        budgets = tuple(Budget(profile=str(here / f"{name}.yaml"), speedup=0.05) for name in ("a", "b"))
        cost = job.search.cost.model_copy(update={"trials": 4})
        job = job.model_copy(
            update={"devices": budgets, "search": job.search.model_copy(update={"cost": cost, "patience": 2.0})}
        )
        console = Console(file=words, width=200, emoji=False)
        space = small_search.space(here)
        found = run(job, builder=small_search.builder(), space=space, address=made.address, console=console)
        events = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
        assert not [e for e in events if e["state"] == "failed"], [e for e in events if e["state"] == "failed"]
        late = [e for e in events if "late" in e]
        assert late, words.getvalue()
        last = {e["number"]: e for e in events if e["state"] in ("done", "stopped")}
        assert len(last) == 5
        assert all(set(e["outcome"]["readings"]) == {"a", "b"} for e in last.values())
        assert words.getvalue().count("b is away, its queue pauses") == 1, words.getvalue()
        assert set(found.winners) == {"a", "b", "all-devices"}, found.closest
        assert not ray.is_initialized()
        print(found.state, len(late), "late")
    finally:
        over.set()
        back.join(60)
        made.shutdown()
