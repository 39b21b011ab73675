"""A target over ssh: a real OpenSSH server on loopback, the system's client, and what goes wrong between them."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from autocompress import onnxfile
from autocompress.devices import Device, TellsAnswers, TellsMemory, Unreachable, local, packed, ssh, transport
from autocompress.devices.cores import plan_cores
from autocompress.devices.fingerprint import host
from autocompress.devices.local import LocalDevice, Unloadable
from autocompress.devices.ssh import CONFIG, SshDevice
from autocompress.export import predictor
from autocompress.run import run
from autocompress.types import Budget, Cost, Profile, Reach, Reading, TrialFailure, UserError
from tests import sshd as servers
from tests.small_search import builder, job, space

PI = Profile(name="pi", device="ssh", reach=Reach(ssh="pi", python="./python"))


def net(channels: int, depth: int) -> bytes:
    """Convolutions one after another."""
    rng = np.random.default_rng(0)
    nodes, weights, last, before = [], [], "input", 3
    for i in range(depth):
        weights.append(numpy_helper.from_array(rng.standard_normal((channels, before, 3, 3)).astype("f"), f"w{i}"))
        nodes.append(helper.make_node("Conv", [last, f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]))
        last, before = f"c{i}", channels
    return model(nodes, weights, TensorProto.FLOAT, ["batch", 3, 16, 16], last)


def crashing() -> bytes:
    """The least 64-bit number divided by -1, which onnxruntime hands to the processor as it is: it ends by SIGFPE."""
    numbers = {"low": -(2**63), "minus": -1}
    weights = [numpy_helper.from_array(np.array([value], np.int64), name) for name, value in numbers.items()]
    nodes = [
        helper.make_node("Sub", ["input", "input"], ["zero"]),  # so that nothing is worked out while loading
        helper.make_node("Add", ["zero", "low"], ["a"]),
        helper.make_node("Add", ["zero", "minus"], ["b"]),
        helper.make_node("Div", ["a", "b"], ["out"]),
    ]
    return model(nodes, weights, TensorProto.INT64, ["batch", 8], "out")


def model(nodes: list, weights: list, kind: int, shape: list, last: str, result: int | None = None) -> bytes:
    inputs = [helper.make_tensor_value_info("input", kind, shape)]
    outputs = [helper.make_tensor_value_info(last, result or kind, None)]
    graph = helper.make_graph(nodes, "net", inputs, outputs, weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return made.SerializeToString()


SMALL, LARGE = net(16, 4), net(48, 8)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[servers.Sshd]:
    servers.required()
    one = servers.Sshd(tmp_path / "sshd")
    one.start()
    monkeypatch.setenv(CONFIG, str(one.config))
    yield one
    one.stop()


@pytest.fixture
def device(there: servers.Sshd) -> Iterator[SshDevice]:
    one = SshDevice(PI, patience=30)
    yield one
    one.close()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {name: tmp_path / f"{name}.onnx" for name in ("small", "large", "crash")}
    for path, data in zip(found.values(), (SMALL, LARGE, crashing()), strict=True):
        path.write_bytes(data)
    return found


def stored(there: servers.Sshd) -> list[Path]:
    """Models that lie there."""
    return sorted(path for path in (there.home / ".cache/autocompress/files").rglob("*.onnx*") if path.is_file())


def until(holds: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextmanager
def meanwhile(act: Callable[[], object], when: Callable[[], object]) -> Iterator[None]:
    """Do it from a thread as soon as something holds."""

    def wait() -> None:
        until(when, 30.0)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def benches(there: servers.Sshd) -> list[psutil.Process]:
    """Timing processes there."""
    found = []
    for one in there.sessions():
        with suppress(psutil.NoSuchProcess):
            if one.cmdline()[1:2] == ["-I"] and one.cmdline()[2].endswith("bench.py"):
                found.append(one)
    return found


def works(device: SshDevice, path: Path) -> bool:
    return device.time([path], rounds=2, seconds=5).blocks == 2


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- what works ----------------------------------------------------------------------------------------------


def test_files_are_timed_there(device: SshDevice, there: servers.Sshd, files: dict[str, Path]) -> None:
    assert isinstance(device, Device)
    assert isinstance(device, TellsMemory)
    samples = device.time([files["large"], files["small"]], rounds=4, seconds=10)
    assert samples.blocks == 4
    large, small = (samples.times_ms[str(files[name])] for name in ("large", "small"))
    assert np.median(large) > 1.5 * np.median(small)
    assert samples.load_ms[str(files["small"])] > 0
    assert len(stored(there)) == 2
    # What runs there is our copy of bench.py, in a process of the server's.
    assert str(there.home / ".cache/autocompress/files/bench-") in " ".join(benches(there)[0].cmdline())
    device.close()
    until(lambda: not there.sessions())
    assert works(device, files["small"])


def test_answers_come_from_there(device: SshDevice, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(device, TellsAnswers)
    inputs = np.random.default_rng(0).standard_normal((5, 3, 16, 16)).astype(np.float32)
    here = predictor(files["small"].read_bytes())(inputs)
    (there,) = device.answers(files["small"], [inputs])
    assert np.array_equal(here, there)
    monkeypatch.setattr(packed, "MOST", 2 * inputs[0].nbytes)  # in portions of two samples
    with closing(LocalDevice(Profile(name="here"))) as own:
        assert np.array_equal(own.answers(files["small"], [inputs])[0], here)
    with pytest.raises(TrialFailure, match=r"cannot be run by onnxruntime on .+nvalid"):
        device.answers(files["small"], [inputs[:, :2]])
    assert works(device, files["small"])


def test_the_fingerprint_is_the_targets(device: SshDevice) -> None:
    told = device.fingerprint()
    here = host()
    assert {key: told[key] for key in here} == here  # the target is this machine, asked without psutil
    assert told["onnxruntime"]
    assert told["provider"] == "CPUExecutionProvider"


def test_one_login_serves_every_command(device: SshDevice, there: servers.Sshd, files: dict[str, Path]) -> None:
    for name in ("small", "large"):
        works(device, files[name])
    assert (there.folder / "log").read_text().count("Accepted publickey") == 1


def test_a_file_that_is_its_own_baseline_and_one_that_changed(device: SshDevice, files: dict[str, Path]) -> None:
    path = files["small"]
    again = path.parent / ".." / path.parent.name / path.name
    samples = device.time([path, again], rounds=4, seconds=5)
    first, second = (np.median(samples.times_ms[str(one)]) for one in (path, again))
    assert 0.5 < first / second < 2
    path.write_bytes(LARGE)
    assert np.median(device.time([path], rounds=4, seconds=5).times_ms[str(path)]) > 1.5 * first


def test_weights_beside_the_graph_travel_with_it(
    device: SshDevice, there: servers.Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxfile, "LIMIT", 10_000)
    path = tmp_path / "a network's.onnx"
    onnxfile.save(path, onnxfile.write(onnx.load_model_from_string(LARGE)))
    assert path.with_name(f"{path.name}.data").is_file()
    assert works(device, path)
    assert [one.name for one in stored(there)] == [path.name, f"{path.name}.data"]


def test_memory_is_that_of_a_process_that_runs_the_file(device: SshDevice, tmp_path: Path) -> None:
    paths = []
    for name, size in (("less", 1), ("more", 60)):
        table = numpy_helper.from_array(np.ones((size * 250_000, 1), np.float32), "table")
        nodes = [helper.make_node("Gather", ["table", "input"], ["out"])]
        made = model(nodes, [table], TensorProto.INT64, ["batch", 4], "out", TensorProto.FLOAT)
        paths.append(tmp_path / f"{name}.onnx")
        paths[-1].write_bytes(made)
    found = device.memory(paths)
    assert list(found) == [str(path) for path in paths]
    assert 50 < found[str(paths[1])] - found[str(paths[0])] < 300  # the file, and what loading it holds beside it


def test_kernels_are_timed_there(device: SshDevice, files: dict[str, Path]) -> None:
    counts = device.kernels(files["small"], (), seconds=1).counts
    assert sum(counts.values()) >= 4
    found = device.kernels(files["small"], list(counts), seconds=10)
    assert found.counts == counts
    assert found.ratios.keys() == counts.keys()
    assert max(found.ratios.values()) > 0


def test_the_cores_asked_for_are_the_targets(device: SshDevice, there: servers.Sshd, files: dict[str, Path]) -> None:
    last = max(os.sched_getaffinity(0))
    for cores in ([last], []):
        device.time([files["small"]], rounds=1, seconds=5, cores=cores)
        for thread in benches(there)[0].threads():
            assert os.sched_getaffinity(thread.id) == (set(cores) or os.sched_getaffinity(0))


def test_cores_of_this_machine_are_kept_for_profiles_of_this_machine() -> None:
    plan = plan_cores([PI.model_copy(update={"threads": 4096})])
    assert (plan.station, plan.quiet) == ((), False)
    assert plan.trainers == tuple(sorted(os.sched_getaffinity(0)))
    assert plan_cores([PI, Profile(name="one")]) == plan_cores([Profile(name="one")])


def test_all_threads_are_the_targets(there: servers.Sshd, files: dict[str, Path]) -> None:
    device = SshDevice(PI.model_copy(update={"threads": 0}))
    assert works(device, files["small"])
    device.close()


def test_a_login_shell_may_be_talkative(there: servers.Sshd, files: dict[str, Path]) -> None:
    there.stop()
    there.limits = "echo 'welcome to {pi}' && "
    there.start()
    device = SshDevice(PI)
    assert works(device, files["small"])
    device.close()


PROFILE = """
name: pi
device: ssh
reach: {ssh: pi, python: ./python}
"""


def test_measure_by_the_command_line(there: servers.Sshd, files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "pi.yaml").write_text(PROFILE)
    command = [
        sys.executable,
        "-m",
        "autocompress.cli",
        "measure",
        str(files["small"]),
        "--profile",
        "pi.yaml",
        "--json",
    ]
    command += ["--seconds", "0.5", "--baseline", str(files["large"])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reading = Reading.model_validate_json(done.stdout)
    assert (reading.profile, reading.cores) == ("pi", ())
    assert reading.speedup > 1.3
    assert reading.memory_mb is not None
    there.stop()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pi cannot be reached: " in done.stderr
    assert "Connection refused" in done.stderr


def test_a_search_on_this_machine_and_over_ssh(there: servers.Sshd, tmp_path: Path) -> None:
    (tmp_path / "pi.yaml").write_text(PROFILE)
    asked = job(tmp_path / "run", cost=Cost(trials=2, minutes=5))
    remote = Budget(profile=str(tmp_path / "pi.yaml"), speedup=0.2, memory_mb=2000)
    asked = asked.model_copy(update={"devices": (*asked.devices, remote)})
    found = run(asked, builder=builder(), space=space(tmp_path), serial=True, console=Console(quiet=True))
    assert found.state == "finished"
    assert found.counts["done"] >= 1
    events = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    done = [event["outcome"]["readings"] for event in events if event["state"] == "done"]
    assert all(set(readings) == {"local-1t", "pi"} for readings in done)
    assert all(readings["pi"]["memory_mb"] > 0 for readings in done)
    for name in ("local-1t", "pi"):
        certificate = json.loads((tmp_path / "run" / "best" / name / "manifest.json").read_text())["certificate"]
        assert name in certificate["readings"]
        assert certificate["checked"][name]["on_device"] is True
        assert certificate["checked"][name]["processor"] == host()["processor"]


def test_one_measurement_at_a_time_on_the_target(
    device: SshDevice, files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    other = LocalDevice(Profile(name="here"))
    assert works(device, files["small"])
    assert works(other, files["small"])
    spans: list[tuple[float, float]] = []

    def long() -> None:
        began = time.monotonic()
        other.time([files["small"]], rounds=10**6, seconds=2.5)
        spans.append((began, time.monotonic()))

    thread = threading.Thread(target=long)
    device.patience = 1.0  # waiting does not count
    local._TOLD.clear()  # said a while ago it would not be said again
    with caplog.at_level(logging.WARNING):
        thread.start()
        time.sleep(0.3)
        samples = device.time([files["small"]], rounds=2, seconds=0.1)
        ended = time.monotonic()
    thread.join()
    other.close()
    assert ended > spans[0][0] + 2.5
    assert samples.waited_s > 1
    assert "waiting for another measurement on pi to end (pid " in caplog.text


# --- what fails -----------------------------------------------------------------------------------------------


def test_a_file_that_the_runtime_refuses(device: SshDevice, files: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    for ask in (lambda: works(device, broken), lambda: device.memory([broken])):
        with pytest.raises(Unloadable, match=r"broken.onnx cannot be loaded by onnxruntime on pi: ") as caught:
            ask()
        one_line(caught)
    assert works(device, files["small"])


def test_a_model_that_crashes_the_runtime_there(device: SshDevice, there: servers.Sshd, files: dict[str, Path]) -> None:
    works(device, files["small"])
    with pytest.raises(TrialFailure, match="the timing process on pi was ended by SIGFPE") as caught:
        device.time([files["small"], files["crash"]], rounds=1, seconds=1)
    assert not isinstance(caught.value, Unreachable | Unloadable)
    with pytest.raises(TrialFailure, match=r"crash.onnx cannot be loaded and run .* on pi: .*signal 8"):
        device.memory([files["crash"]])
    assert works(device, files["small"])
    assert (there.folder / "log").read_text().count("Accepted publickey") == 1  # the connection has lived through it


def test_a_process_that_the_system_kills_there(device: SshDevice, there: servers.Sshd, files: dict[str, Path]) -> None:
    works(device, files["small"])
    benches(there)[0].kill()
    until(lambda: device._child is not None and not device._child.alive)
    works(device, files["small"])  # it was idle: started again, nobody need know
    timing = benches(there)[0]
    spent = timing.cpu_times().user
    killing = meanwhile(timing.kill, lambda: timing.cpu_times().user > spent + 0.3)  # it is at work by then
    with killing, pytest.raises(TrialFailure, match="SIGKILL, as the system"):
        device.time([files["small"]], rounds=10**6, seconds=20)
    assert works(device, files["small"])


def test_a_connection_cut_in_the_middle(device: SshDevice, there: servers.Sshd, files: dict[str, Path]) -> None:
    works(device, files["small"])
    timing = benches(there)[0]
    began = time.monotonic()
    cutting = meanwhile(there.cut, lambda: time.monotonic() > began + 0.3)
    with cutting, pytest.raises(Unreachable, match="pi cannot be reached: ") as caught:
        device.time([files["small"]], rounds=10**6, seconds=20)
    one_line(caught)
    assert time.monotonic() < began + 10
    until(lambda: not timing.is_running() or timing.status() == psutil.STATUS_ZOMBIE)  # it does not measure on
    assert works(device, files["small"])


def test_a_connection_cut_while_nobody_asks(device: SshDevice, there: servers.Sshd, files: dict[str, Path]) -> None:
    works(device, files["small"])
    there.cut()
    until(lambda: not there.sessions())
    time.sleep(0.2)
    assert works(device, files["small"])


def test_a_connection_that_says_nothing_more(
    there: servers.Sshd, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (ssh.ALIVE_TIMES + 1) * ssh.ALIVE_S <= 15
    monkeypatch.setitem(ssh.OPTIONS, "ServerAliveInterval", "1")
    device = SshDevice(PI)
    works(device, files["small"])
    began = time.monotonic()
    there.freeze()
    with pytest.raises(Unreachable, match=r"pi cannot be reached: .*not responding"):
        device.time([files["small"]], rounds=10**6, seconds=60)
    assert time.monotonic() < began + 8
    there.cut()
    assert works(device, files["small"])
    device.close()


def test_a_server_that_goes_and_comes_back(device: SshDevice, there: servers.Sshd, files: dict[str, Path]) -> None:
    works(device, files["small"])
    there.stop()
    for words in ("", "Connection refused", "Connection refused"):
        with pytest.raises(Unreachable, match=rf"pi cannot be reached: .*{words}"):
            works(device, files["small"])
    there.start()
    assert works(device, files["small"])
    assert len(stored(there)) == 1  # what lies there is not copied again


def test_a_name_that_nobody_knows(there: servers.Sshd) -> None:
    device = SshDevice(PI.model_copy(update={"reach": Reach(ssh="nowhere.invalid")}))
    with pytest.raises(Unreachable, match=r"nowhere.invalid cannot be reached: .*Could not resolve hostname"):
        device.fingerprint()


def test_a_host_key_that_changed(device: SshDevice, there: servers.Sshd, files: dict[str, Path]) -> None:
    works(device, files["small"])
    there.stop()
    there.new_key("host_key")
    there.start()
    with pytest.raises(Unreachable, match="host key is not the known one"):  # in the middle: others go on
        works(device, files["small"])
    fresh = SshDevice(PI)
    with pytest.raises(UserError, match="host key is not the known one") as caught:
        fresh.fingerprint()
    words = one_line(caught)
    assert f"({there.folder}/known_hosts, line 1)" in words
    typed = re.search(r"then (ssh-keygen .*), and (ssh-keyscan .*) >> ~/.ssh/known_hosts", words)
    assert typed
    subprocess.run(shlex.split(typed[1]), check=True, capture_output=True)
    with pytest.raises(UserError, match=r"its host key is not known here; .*ssh-keyscan") as caught:
        fresh.fingerprint()
    one_line(caught)
    keys = subprocess.run(shlex.split(typed[2]), check=True, capture_output=True).stdout
    (there.folder / "known_hosts").write_bytes(keys)
    assert works(fresh, files["small"])
    assert works(device, files["small"])
    fresh.close()


def test_a_key_that_is_not_accepted(there: servers.Sshd, tmp_path: Path) -> None:
    there.new_key("user_key")
    with pytest.raises(UserError, match=r"permission denied \(publickey\).*ssh-copy-id pi") as caught:
        SshDevice(PI).fingerprint()
    one_line(caught)
    named = PI.model_copy(update={"reach": PI.reach.model_copy(update={"identity": str(tmp_path / "none")})})
    with pytest.raises(UserError, match=r"reach.identity: no file"):
        SshDevice(named)


@pytest.mark.parametrize("name", ["", "-oProxyCommand=true", "pi reboot"])
def test_a_host_that_is_none(name: str) -> None:
    with pytest.raises(UserError, match=r"reach.ssh must be"):
        SshDevice(PI.model_copy(update={"reach": Reach(ssh=name)}))


def test_what_the_target_lacks(there: servers.Sshd, tmp_path: Path) -> None:
    def told(**reach: str) -> str:
        asked = PI.model_copy(update={"reach": PI.reach.model_copy(update=reach)})
        with pytest.raises(UserError) as caught:
            SshDevice(asked).fingerprint()
        return one_line(caught)

    bare = there.home / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    assert "type there: ~/bare/bin/python -m pip install numpy onnxruntime" in told(python="~/bare/bin/python")
    assert re.search(r"nopython cannot be run there \(.*not found.*\); install Python 3.9", told(python="nopython"))
    assert "false there ended: exit code 1" in told(python="false")
    (there.home / "file").touch()
    assert re.search(r"cannot use the folder .*/file/x: Not a directory; set reach.folder", told(folder="file/x"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"threads": 4096}, "'pi' measures with 4096 threads, but pi has"),
        (
            {"provider": "FarExecutionProvider"},
            "'pi' wants FarExecutionProvider, but the onnxruntime on pi offers",
        ),
        ({"expects": ("neverheardof",)}, "expects a processor with neverheardof"),
    ],
)
def test_a_profile_that_does_not_fit_the_target(there: servers.Sshd, changes: dict[str, object], words: str) -> None:
    device = SshDevice(PI.model_copy(update=changes))
    with pytest.raises(UserError, match=words):
        device.fingerprint()
    device.close()
    until(lambda: not there.sessions())


def big(folder: Path, megabytes: int) -> Path:
    table = numpy_helper.from_array(np.random.default_rng(megabytes).random((megabytes * 250_000, 1), np.float32), "t")
    nodes = [helper.make_node("Gather", ["t", "input"], ["out"])]
    path = folder / f"big{megabytes}.onnx"
    path.write_bytes(model(nodes, [table], TensorProto.INT64, ["batch", 4], "out", TensorProto.FLOAT))
    return path


def test_a_full_disk_there(there: servers.Sshd, files: dict[str, Path], tmp_path: Path) -> None:
    """A disk of 2 MB where we may mount one; elsewhere no file may be larger, which the kernel tells alike."""
    place, mounted = there.home / "disk", False
    place.mkdir()
    if os.geteuid() == 0:
        command = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)]
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not mounted:
        there.stop()
        there.limits = "ulimit -f 4000 && "
        there.start()
    device = SshDevice(PI.model_copy(update={"reach": PI.reach.model_copy(update={"folder": "disk"})}))
    try:
        assert works(device, files["small"])
        reason = "No space left on device" if mounted else "File too large"
        with pytest.raises(
            TrialFailure, match=rf"big5.onnx cannot be copied to pi: {reason} \(5.0 MB to write"
        ) as caught:
            works(device, big(tmp_path, 5))
        assert not isinstance(caught.value, Unreachable)
        one_line(caught)
        assert not list(place.rglob("*.part"))
        assert works(device, files["small"])
    finally:
        device.close()
        if mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_short_memory_there(there: servers.Sshd, files: dict[str, Path], tmp_path: Path) -> None:
    """Of 2 GB, where a file's output alone takes 4; the file is not remembered as one that the runtime refuses."""
    node = helper.make_node("Tile", ["x", "often"], ["y"])
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name, size in (("x", 1000), ("y", None))
    ]
    often = helper.make_tensor("often", TensorProto.INT64, [2], [1, 10**6])
    graph = helper.make_graph([node], "wide", ends[:1], ends[1:], [often])
    wide = tmp_path / "wide.onnx"
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), wide)
    there.stop()
    there.limits = "ulimit -v 2000000 && "
    there.start()
    device = SshDevice(PI, patience=30)
    try:
        with pytest.raises(TrialFailure, match="needs more memory than is free on pi") as error:
            device.time([wide], rounds=1, seconds=1)
        assert not isinstance(error.value, Unloadable)
        assert works(device, files["small"])
    finally:
        device.close()


def test_what_is_least_lately_used_makes_room(
    device: SshDevice, there: servers.Sshd, tmp_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "KEEP_BYTES", 6_500_000)
    first, second, third = (big(tmp_path, size) for size in (1, 2, 3))
    for path in (first, second, third):
        works(device, path)
        time.sleep(0.02)
    works(device, files["small"])
    assert {round(path.stat().st_size / 1e6) for path in stored(there)} == {0, 1, 2, 3}
    works(device, big(tmp_path, 4))
    assert {round(path.stat().st_size / 1e6) for path in stored(there)} == {0, 3, 4}
    assert works(device, first)  # gone, and so copied once more
    assert benches(there)


def test_a_file_that_was_damaged_there_is_copied_again(
    device: SshDevice, there: servers.Sshd, files: dict[str, Path]
) -> None:
    works(device, files["small"])
    stored(there)[0].write_bytes(LARGE)
    samples = device.time([files["small"], files["large"]], rounds=2, seconds=5)
    small, large = (np.median(samples.times_ms[str(files[name])]) for name in ("small", "large"))
    assert large > 1.5 * small
    assert sorted(path.read_bytes() for path in stored(there)) == sorted([SMALL, LARGE])


def test_half_a_file_is_never_used(
    device: SshDevice, there: servers.Sshd, tmp_path: Path, files: dict[str, Path]
) -> None:
    works(device, files["small"])
    path, folder = big(tmp_path, 200), there.home / ".cache/autocompress/files"
    with meanwhile(there.cut, lambda: list(folder.rglob("*.part"))), pytest.raises(Unreachable):
        works(device, path)
    assert len(stored(there)) == 1
    assert works(device, path)
    assert len(stored(there)) == 2
    assert not list(folder.rglob("*.part"))
