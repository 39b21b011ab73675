"""Measuring, on small real models, on a machine that may be busy: only wide margins are asserted on times."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from autocompress import load
from autocompress.devices import Device, Samples
from autocompress.devices.cores import CorePlan, Cores, parse_list, plan_cores, read_cores, read_quota
from autocompress.devices.fingerprint import check_expects, host, resolve_local, short
from autocompress.devices.gate import Gate
from autocompress.devices.local import BENCH, LocalDevice, Unloadable
from autocompress.devices.slowing import VAIN
from autocompress.devices.station import LONGER, RETAKES, Station, measure_file
from autocompress.devices.statistics import MIN_BLOCKS, Window, drift, median, parts, rank, tail, width
from autocompress.types import Budget, Interval, Numeric, Profile, Reading, TrialFailure, UserError

ONE = Profile(name="one", threads=1)
EXAMPLE = Path(__file__).parents[1] / "examples" / "my_device.py"


def conv_net(channels: int, depth: int, size: int, shape: Sequence[Any] | None = None) -> bytes:
    rng = np.random.default_rng(0)
    nodes, weights, last, width_ = [], [], "input", 3
    for i in range(depth):
        kernel = 0.1 * rng.standard_normal((channels, width_, 3, 3)).astype(np.float32)
        weights.append(numpy_helper.from_array(kernel, f"w{i}"))
        nodes.append(helper.make_node("Conv", [last, f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"]))
        last, width_ = f"r{i}", channels
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape or ["batch", 3, size, size])]
    outputs = [helper.make_tensor_value_info(last, TensorProto.FLOAT, ["batch", channels, None, None])]
    graph = helper.make_graph(nodes, "net", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


SMALL = conv_net(16, 8, 16)
LARGE = conv_net(48, 8, 16)  # about six times the work
SLOW = conv_net(64, 8, 48)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    written = {"small": SMALL, "large": LARGE, "slow": SLOW}
    for name, data in written.items():
        (tmp_path / f"{name}.onnx").write_bytes(data)
    return {name: tmp_path / f"{name}.onnx" for name in written}


@pytest.fixture
def device() -> Iterator[LocalDevice]:
    one = LocalDevice(ONE, patience=30)
    yield one
    one.close()


@contextmanager
def station(baseline: Path, *profiles: Profile, **changes: Any) -> Iterator[Station]:
    asked = profiles or (ONE,)
    one = Station(asked, changes.pop("plan", None) or plan_cores(asked), baseline, **changes)
    try:
        yield one
    finally:
        one.close()


@contextmanager
def burning(count: int, cores: Sequence[int]) -> Iterator[None]:
    """Busy processes that share the cores of the measurement."""
    script = "import os, sys\nos.sched_setaffinity(0, eval(sys.argv[1]))\nwhile True: sum(range(1000))"
    with ExitStack() as stack:
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-c", script, repr(set(cores))])
            stack.callback(process.wait)
            stack.callback(process.kill)
        time.sleep(0.2)
        yield


# --- statistics ------------------------------------------------------------------------------------------------------


def test_ranks_are_those_of_the_binomial_distribution() -> None:
    # Le Boudec, Performance Evaluation, table A.1: n = 6, 10, 20, 50, 70
    assert [rank(n) for n in (5, 6, 10, 20, 50, 70)] == [0, 1, 2, 6, 18, 27]
    assert abs(rank(999) - rank(1000)) <= 1  # where the approximation takes over


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=60), st.floats(0.01, 100))
def test_the_median_lies_in_its_interval_and_scales(samples: list[float], factor: float) -> None:
    one, other = median(samples), median([factor * value for value in samples])
    assert min(samples) <= one.low <= one.value <= one.high <= max(samples)
    assert other.value == pytest.approx(factor * one.value)
    assert width(other) == pytest.approx(width(one), abs=1e-9)


def test_intervals_cover_the_true_median_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    for n in (8, 16, 60):
        found = [median(rng.lognormal(0.0, 0.7, n).tolist()) for _ in range(1000)]
        assert np.mean([interval.low <= 1.0 <= interval.high for interval in found]) > 0.935


def window(a: Sequence[float], b: Sequence[float], count: int) -> Window:
    one = Window(Path("a"), Path("b"))
    one.add(Samples(times_ms={"a": tuple(a), "b": tuple(b)}, blocks=count))
    return one


def test_a_disturbance_of_both_files_leaves_the_ratio_alone() -> None:
    slow = np.repeat([1.0, 1.0, 5.0, 1.0, 7.0, 1.0, 3.0, 1.0, 1.0, 2.0], 4)
    one = window(2 * slow, 4 * slow, 10)
    assert one.ratio.value == one.ratio.low == one.ratio.high == 0.5
    assert one.narrow
    assert width(one.reading("p", seconds=1, quiet=False, cores=(), host="h").ms) > 0.5


def test_a_core_that_was_not_ours_is_noise() -> None:
    for share, noisy in ((0.2, False), (0.3, True)):
        one = Window(Path("a"), Path("b"))
        one.add(Samples(times_ms={"a": (1.0,) * 8, "b": (2.0,) * 8}, blocks=8, disturbed=share))
        assert one.disturbed == pytest.approx(share)
        assert one.noisy is noisy


def test_few_blocks_or_a_wide_interval_are_noisy() -> None:
    assert window([1.0] * 7, [1.0] * 7, 7).noisy
    assert not window([1.0] * 8, [1.0] * 8, 8).noisy
    assert window([1.0, 1.1] * 8, [1.0] * 16, 16).noisy


def test_blocks_of_a_device_that_knows_none() -> None:
    given_ = Samples(times_ms={"a": tuple(np.arange(240.0)), "b": tuple(np.arange(120.0))})
    assert len(parts(given_, "a")) == len(parts(given_, "b")) == 12
    assert len(parts(Samples(times_ms={"a": (1.0, 2.0, 3.0), "b": (1.0, 2.0)}), "a")) == 2


def test_the_tail_interval_holds_the_true_quantile_where_runs_of_a_block_are_alike() -> None:
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(200):
        slow = rng.exponential(0.3, size=(40, 1))  # what slows a whole block
        found = tail(list(1.0 + slow + rng.exponential(0.02, size=(40, 12))), 0.95)
        held += found.low <= 1.0 + 0.3 * -np.log(0.05) + 0.03 and found.high >= 1.0 + 0.3 * -np.log(0.05) - 0.03
    assert held > 160  # the percentile bootstrap of a tail is a little short: 95 % would be 190


def test_a_tail_is_the_same_for_the_same_times_and_a_point_for_equal_ones() -> None:
    same = [np.full(10, 2.0)] * 8
    assert tail(same, 0.99) == Interval(value=2.0, low=2.0, high=2.0)
    some = list(np.random.default_rng(0).gamma(4.0, size=(8, 10)))
    assert tail(some, 0.95) == tail(some, 0.95)
    assert tail(some, 0.95).value == pytest.approx(float(np.quantile(np.concatenate(some), 0.95)))


def test_drift_is_what_the_baseline_slowed_down() -> None:
    assert drift([1.0] * 12) == 0.0
    assert drift([1.0] * 4 + [1.05] * 4 + [1.1] * 4) == pytest.approx(0.1)
    assert drift([1.0, 9.0]) == 0.0


# --- cores -----------------------------------------------------------------------------------------------------------


def cores(count: int, *, pairs: bool = False, quota: float | None = None, affinity: bool = True) -> Cores:
    half = count // 2
    twins = {core: frozenset({core % half, core % half + half}) for core in range(count)} if pairs else {}
    return Cores(tuple(range(count)), twins, {}, quota, affinity)


def test_the_station_takes_the_most_threads_and_trainers_the_rest() -> None:
    plan = plan_cores([ONE, Profile(name="two", threads=2)], cores(4))
    assert (plan.station, plan.trainers, plan.quiet) == ((2, 3), (0, 1), False)
    assert plan.why == "measuring on cores 2, 3, training on cores 0, 1"


@pytest.mark.parametrize(
    ("threads", "host_", "why"),
    [
        (2, cores(2), "leaves none"),
        (1, cores(1), "leaves none"),
        (1, cores(2, pairs=True), "leaves none"),  # the other one is a hyper-thread of the same core
        (1, cores(4, affinity=False), "cannot keep processes on cores"),
        (1, cores(4, quota=2.5), "allows 2.5 of 4 cores"),
    ],
)
def test_trainers_pause_where_none_is_left_or_cores_cannot_be_owned(threads: int, host_: Cores, why: str) -> None:
    plan = plan_cores([Profile(name="p", threads=threads)], host_)
    assert plan.quiet
    assert why in plan.why
    assert plan.trainers == (host_.visible if host_.affinity else ())


def test_a_physical_core_is_not_shared() -> None:
    plan = plan_cores([Profile(name="two", threads=2)], cores(8, pairs=True))
    assert plan.station == (6, 7)
    assert plan.trainers == (0, 1, 4, 5)
    assert "2 idle" in plan.why


def test_the_station_takes_the_fast_cores() -> None:
    both = dataclasses.replace(cores(4), capacity={0: 1024, 1: 1024, 2: 400, 3: 400})
    assert plan_cores([ONE], both).station == (1,)


@pytest.mark.parametrize("host_", [cores(2), cores(8, quota=2.0)])
def test_more_threads_than_cores_is_the_users_error(host_: Cores) -> None:
    with pytest.raises(UserError, match="'three' measures with 3 threads, but 2 of"):
        plan_cores([ONE, Profile(name="three", threads=3)], host_)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 16), st.integers(1, 16), st.booleans(), st.none() | st.floats(0.5, 16))
def test_trainers_never_meet_the_station_unless_they_pause(
    n: int, threads: int, pairs: bool, quota: float | None
) -> None:
    found = cores(2 * n, pairs=pairs, quota=quota)
    try:
        plan = plan_cores([Profile(name="p", threads=threads)], found)
    except UserError:
        assert threads > min(2 * n, quota or 2 * n)
        return
    assert len(plan.station) == threads
    assert plan.trainers
    if not plan.quiet:
        for core in plan.station:
            assert not set(plan.trainers) & found.siblings.get(core, frozenset({core}))


def test_a_process_is_kept_on_its_cores() -> None:
    script = """
import os, threading, time
from autocompress.devices.cores import keep_to
threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
last = max(os.sched_getaffinity(0))
before = os.sched_getaffinity(0)
keep_to([])
assert os.sched_getaffinity(0) == before
keep_to([last])
print([sorted(os.sched_getaffinity(int(one))) == [last] for one in os.listdir("/proc/self/task")])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[True, True]"


def write(root: Path, files_: dict[str, str]) -> Path:
    for name, text in files_.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_quotas_of_both_versions_are_read(tmp_path: Path) -> None:
    new = write(
        tmp_path / "new",
        {
            "proc/self/cgroup": "0::/app/inner\n",
            "proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n",
            "sys/fs/cgroup/app/cpu.max": "150000 100000\n",  # the tightest is not the innermost
            "sys/fs/cgroup/app/inner/cpu.max": "max 100000\n",
        },
    )
    old = write(
        tmp_path / "old",
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n0::/\n",
            "proc/self/mountinfo": "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",  # the container sees its own group as the mount
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
    )
    assert read_quota(new) == 1.5
    assert read_quota(old) == 0.5
    (old / "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us").write_text("-1\n")
    assert read_quota(old) is None
    assert read_quota(tmp_path / "nothing") is None


def test_this_hosts_cores_are_read(tmp_path: Path) -> None:
    here = read_cores()
    assert here.visible
    assert all(core in group for core, group in here.siblings.items())
    first = here.visible[0]
    folder = f"sys/devices/system/cpu/cpu{first}"
    root = write(tmp_path, {f"{folder}/topology/core_cpus_list": "0-2,8\n", f"{folder}/cpu_capacity": "512\n"})
    assert read_cores(root).siblings == {first: frozenset({0, 1, 2, 8})}
    assert read_cores(root).capacity == {first: 512}
    assert parse_list("3") == {3}


# --- fingerprint -----------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_stable_and_names_the_processor() -> None:
    facts = host()
    assert facts == host()
    assert facts["processor"]
    assert facts["cores"] >= 1
    assert facts["memory_gib"] >= 1
    assert len(short(facts)) == 12
    assert short(facts) != short({**facts, "kernel": "another"})


def test_arm_is_read_and_gets_signed_activations(tmp_path: Path) -> None:
    told = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm crc32\nCPU part\t: 0xd0c\n"
    facts = host(write(tmp_path, {"proc/cpuinfo": told})) | {"machine": "aarch64"}
    assert facts["flags"] == ["asimd", "asimddp", "i8mm"]
    numeric = resolve_local(Profile(name="p"), facts).numeric
    assert (numeric.activation, numeric.weight, numeric.reduce_range) == ("int8", "int8", False)


@pytest.mark.parametrize(
    ("flags", "reduced"), [(["avx2"], True), (["avx2", "avx_vnni"], False), (["avx512_vnni"], False)]
)
def test_x86_gets_unsigned_activations_and_seven_bits_where_eight_saturate(flags: list[str], reduced: bool) -> None:
    facts = {"machine": "x86_64", "flags": flags}
    numeric = resolve_local(Profile(name="p"), facts).numeric
    assert (numeric.activation, numeric.reduce_range) == ("uint8", reduced)
    stated = Profile(name="p", numeric=Numeric(activation="int8"))
    assert resolve_local(stated, facts) is stated
    assert resolve_local(resolve_local(Profile(name="p"), facts), {"machine": "arm64", "flags": []}).numeric == numeric


def test_the_shelf_has_profiles_that_mean_what_they_say() -> None:
    assert load.profile("local-1t").threads == 1
    assert load.profile("local-2t").threads == 2
    assert "numeric" not in load.profile("local-1t").model_fields_set  # found out at run time
    vnni = load.profile("x86-vnni-1t")
    assert vnni.numeric.variant == "u8s8-pc-minmax"
    for flags in (["avx512_vnni"], ["avx_vnni"]):
        check_expects(vnni, {"flags": flags, "processor": "any"})
    with pytest.raises(UserError, match="expects a processor with avx512_vnni or avx_vnni, which this one"):
        check_expects(vnni, {"flags": ["avx2"], "processor": "old"})


# --- the local device ------------------------------------------------------------------------------------------------


def test_files_are_timed_in_equal_blocks(device: LocalDevice, files: dict[str, Path]) -> None:
    assert isinstance(device, Device)
    samples = device.time([files["large"], files["small"]], rounds=4, seconds=20)
    assert samples.blocks == 4
    for path in (files["large"], files["small"]):
        times = samples.times_ms[str(path)]
        assert len(times) % 4 == 0
        assert min(times) > 0
        assert samples.load_ms[str(path)] > 0
    assert np.median(samples.times_ms[str(files["large"])]) > 1.5 * np.median(samples.times_ms[str(files["small"])])


def test_a_file_that_changed_is_loaded_again(device: LocalDevice, files: dict[str, Path]) -> None:
    first = device.time([files["small"]], rounds=2, seconds=20)
    files["small"].write_bytes(SLOW)
    second = device.time([files["small"]], rounds=2, seconds=20)
    name = str(files["small"])
    assert np.median(second.times_ms[name]) > 3 * np.median(first.times_ms[name])


def test_the_batch_of_the_profile_is_used(files: dict[str, Path]) -> None:
    name, found = str(files["small"]), []
    for batch in (1, 16):
        one = LocalDevice(Profile(name="p", batch=batch))
        found.append(float(np.median(one.time([files["small"]], rounds=2, seconds=20).times_ms[name])))
        one.close()
    assert found[1] > 4 * found[0]


def test_every_input_is_fed_tokens_among_them(device: LocalDevice, tmp_path: Path) -> None:
    """Rows 0 and 1 of a table of two words, gathered by token ids, where a mask says so, plus an image."""
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", 5]),
        helper.make_tensor_value_info("mask", TensorProto.BOOL, ["batch", 5, 1]),
        helper.make_tensor_value_info("image", TensorProto.FLOAT16, ["batch", 1, 4]),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["words"]),
        helper.make_node("Where", ["mask", "words", "zero"], ["kept"]),
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["kept", "pixels"], ["out"]),
    ]
    table, zero = np.ones((2, 4), np.float32), np.zeros(1, np.float32)
    constants = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(zero, "zero")]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", 5, 4])]
    graph = helper.make_graph(nodes, "words", inputs, outputs, constants)
    path = tmp_path / "words.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
    )
    samples = device.time([path], rounds=2, seconds=5)
    assert min(samples.times_ms[str(path)]) > 0


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity here")
def test_the_child_stays_on_its_cores(device: LocalDevice, files: dict[str, Path]) -> None:
    last = max(os.sched_getaffinity(0))
    device.time([files["small"]], rounds=1, seconds=5)
    assert device._child is not None
    pid = device._child.pid
    for cores_ in ([last], []):
        device.time([files["small"]], rounds=1, seconds=5, cores=cores_)
        for thread in psutil.Process(pid).threads():
            assert os.sched_getaffinity(thread.id) == (set(cores_) or os.sched_getaffinity(0))
    assert device._child.pid == pid, "it was started again"


def test_a_killed_child_is_one_failure_and_then_replaced(device: LocalDevice, files: dict[str, Path]) -> None:
    device.time([files["small"]], rounds=1, seconds=5)
    assert device._child is not None
    os.kill(device._child.pid, signal.SIGKILL)
    with pytest.raises(TrialFailure, match="killed by SIGKILL") as caught:
        device.time([files["small"]], rounds=1, seconds=5)
    assert not isinstance(caught.value, Unloadable)
    assert device.time([files["small"]], rounds=1, seconds=5).blocks == 1


def test_a_child_killed_while_it_measures(device: LocalDevice, files: dict[str, Path]) -> None:
    device.time([files["small"]], rounds=1, seconds=5)
    assert device._child is not None
    killer = threading.Timer(0.3, os.kill, (device._child.pid, signal.SIGABRT))
    killer.start()
    with pytest.raises(TrialFailure, match="SIGABRT"):
        device.time([files["small"]], rounds=1_000_000, seconds=20)
    killer.join()
    assert device.time([files["small"]], rounds=1, seconds=5).blocks == 1


def test_a_hung_child_is_ended(files: dict[str, Path]) -> None:
    device = LocalDevice(ONE, patience=0.5)
    device.patience = 30  # for the start
    device.time([files["small"]], rounds=1, seconds=1)
    assert device._child is not None
    pid = device._child.pid
    os.kill(pid, signal.SIGSTOP)
    device.patience = 0.5
    began = time.monotonic()
    with pytest.raises(TrialFailure, match="no answer from the timing process"):
        device.time([files["small"]], rounds=1, seconds=0)
    assert time.monotonic() - began < 5
    assert not psutil.pid_exists(pid)
    device.patience = 30
    assert device.time([files["small"]], rounds=1, seconds=1).blocks == 1
    device.close()


def test_the_child_ends_with_its_parent_even_in_the_middle_of_a_run(files: dict[str, Path], tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from autocompress.devices.local import LocalDevice
from autocompress.types import Profile
device = LocalDevice(Profile(name="p"))
model = Path(sys.argv[1])
device.time([model], rounds=1, seconds=1)
Path(sys.argv[2]).write_text(str(device._child.pid))
device.time([model], rounds=10**9, seconds=600)
"""
    note = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", script, str(files["slow"]), str(note)])
    try:
        until = time.monotonic() + 30
        while not (note.is_file() and note.read_text()):
            assert time.monotonic() < until
            time.sleep(0.02)
        time.sleep(0.2)
    finally:
        parent.kill()
        parent.wait()
    child, until = int(note.read_text()), time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, "the timing process outlived its parent"
        time.sleep(0.02)


def test_what_cannot_be_loaded_says_why(device: LocalDevice, tmp_path: Path, files: dict[str, Path]) -> None:
    broken, vague = tmp_path / "broken.onnx", tmp_path / "vague.onnx"
    broken.write_bytes(b"not a model")
    vague.write_bytes(conv_net(4, 1, 8, ["batch", 3, "height", 8]))
    for path, reason in [(broken, "cannot be loaded"), (vague, "unknown size"), (tmp_path / "none", "No such file")]:
        with pytest.raises(Unloadable, match=reason) as caught:
            device.time([files["small"], path], rounds=1, seconds=1)
        assert "\n" not in str(caught.value)
    assert device.time([files["small"]], rounds=1, seconds=1).blocks == 1


def test_a_provider_that_is_not_installed_is_the_users_error(files: dict[str, Path]) -> None:
    one = LocalDevice(Profile(name="far", provider="NowhereExecutionProvider"))
    with pytest.raises(UserError, match="'far' wants NowhereExecutionProvider"):
        one.time([files["small"]], rounds=1, seconds=1)


# --- the station -----------------------------------------------------------------------------------------------------


def test_sizes_are_ranked_right_beside_busy_processes(files: dict[str, Path], tmp_path: Path) -> None:
    here = sorted(os.sched_getaffinity(0))
    with burning(3, here), station(files["large"], cache=tmp_path / "c") as one:
        reading = one.measure("one", SMALL, seconds=1.0)
    assert 0.03 < reading.ratio.value < 0.7
    assert reading.ratio.low <= reading.ratio.value <= reading.ratio.high
    assert reading.speedup > 1.4


class Scripted:
    """A device whose noise is chosen: each answer is one round of eight blocks."""

    def __init__(self, profile: Profile, spread: Sequence[float]) -> None:
        self.profile, self.spread, self.calls = profile, list(spread), 0

    def fingerprint(self) -> dict[str, Any]:
        return {"scripted": True}

    def time(self, models: Sequence[Path], *, rounds: int, seconds: float, cores: Sequence[int] = ()) -> Samples:
        spread = self.spread[min(self.calls, len(self.spread) - 1)]
        self.calls += 1
        rng = np.random.default_rng(self.calls)
        rows = [tuple(np.exp(spread * rng.standard_normal(8)).tolist()) for _ in models]
        return Samples(times_ms=dict(zip(map(str, models), rows, strict=True)), blocks=8)


def test_a_reading_repeats(files: dict[str, Path], tmp_path: Path) -> None:
    found: list[Reading] = []
    for name in ("c1", "c2"):
        with station(files["large"], cache=tmp_path / name) as one:
            found.append(one.measure("one", SMALL))
            assert not list((tmp_path / name / "measuring").iterdir())
    first, second = found
    assert 0.75 < first.ratio.value / second.ratio.value < 1.33
    assert first.rounds >= MIN_BLOCKS
    assert first.samples >= first.rounds
    assert first.ms.value <= first.p95_ms.value * 1.01
    assert first.cores == plan_cores([ONE]).station
    assert first.seconds > 0


def test_nothing_is_measured_twice(files: dict[str, Path], tmp_path: Path) -> None:
    scripted, cache = Scripted(ONE, [0.001]), tmp_path / "c"
    with station(files["large"], cache=cache, device=lambda _: scripted) as one:
        first = one.measure("one", SMALL, key="graph")
        assert one.measure("one", files["small"], key="graph") == first  # a file is as good as its bytes
        assert len(list((cache / "readings").rglob("*.gz"))) == 1
        assert scripted.calls == 1
    # Another search, another name for the same profile, other bytes of the same graph.
    with station(files["large"], Profile(name="mine", about="same"), cache=cache, device=lambda _: scripted) as one:
        assert one.measure("mine", b"never read", key="graph") == first.model_copy(update={"profile": "mine"})
        assert scripted.calls == 1
        for damage in (b"damaged", gzip.compress(b"{}"), gzip.compress(b"[]"), gzip.compress(b'{"reading": 1}')):
            next((cache / "readings").rglob("*.gz")).write_bytes(damage)
            calls = scripted.calls
            assert one.measure("mine", SMALL, key="graph") != first
            assert scripted.calls == calls + 1
        one.measure("mine", SMALL)  # without a key the bytes are the key
        one.measure("mine", LARGE)
        one.measure("mine", files["large"])
        assert scripted.calls == calls + 3


def test_a_jump_of_the_date_changes_no_reading(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A day on, a day back at every look at the date; the timing process never looks at it."""
    now, jump = time.time(), itertools.cycle([86400.0, -86400.0])
    monkeypatch.setattr(time, "time", lambda: now + next(jump))
    began = time.monotonic()
    with station(files["large"]) as one:
        reading = one.session("one", SMALL, 0.3)
        assert 0 < reading.seconds < time.monotonic() - began
        assert 0 < reading.ratio.value < 1
    assert "time.time" not in BENCH.read_text()


def test_raw_times_are_kept(files: dict[str, Path], tmp_path: Path) -> None:
    with station(files["large"], cache=tmp_path / "c", device=lambda p: Scripted(p, [0.001])) as one:
        one.measure("one", SMALL, key="graph")
    kept = json.loads(gzip.decompress(next((tmp_path / "c" / "readings").rglob("*.gz")).read_bytes()))
    assert kept["key"]["model"] == "graph"
    assert [len(kept["times_ms"][name]) for name in ("model", "baseline")] == [8, 8]
    assert kept["blocks"] == {"model": [1] * 8, "baseline": [1] * 8}


def test_a_different_baseline_or_profile_is_another_reading(files: dict[str, Path], tmp_path: Path) -> None:
    cache = tmp_path / "c"
    with station(files["large"], cache=cache) as one:
        large = one.measure("one", SMALL, key="graph", seconds=0.3)
    with station(files["small"], cache=cache) as one:
        small = one.measure("one", SMALL, key="graph", seconds=0.3)
    with station(files["large"], Profile(name="one", batch=2), cache=cache) as one:
        batch = one.measure("one", SMALL, key="graph", seconds=0.3)
    assert small.ratio.value > 1.3 * large.ratio.value
    assert batch != large


def test_a_noisy_reading_is_taken_once_more_and_never_kept(files: dict[str, Path]) -> None:
    scripted = Scripted(ONE, [0.5, 0.001])
    with station(files["large"], device=lambda _: scripted) as one:
        assert not one.measure("one", SMALL, seconds=0).noisy
        assert scripted.calls == 2
        assert not one.measure("one", SMALL, seconds=0).noisy
        assert scripted.calls == 2
    scripted = Scripted(ONE, [0.5])
    with station(files["small"], device=lambda _: scripted) as one:
        assert one.measure("one", LARGE, seconds=0).noisy
        assert scripted.calls == 2
        assert one.measure("one", LARGE, seconds=0).noisy
        assert scripted.calls == 4


def test_what_leaves_a_budget_open_is_timed_longer(files: dict[str, Path], tmp_path: Path) -> None:
    for speedup, longer in ((1.0, LONGER), (1.5, 1), (0.5, 1)):  # the files are equally fast
        scripted = Scripted(ONE, [0.01])
        budget = Budget(profile="one", speedup=speedup)
        with station(files["large"], cache=tmp_path / f"{speedup}", device=lambda _: scripted, budgets=[budget]) as one:  # noqa: B023
            reading = one.measure("one", SMALL, seconds=0)
            assert (scripted.calls, reading.rounds) == (longer, 8 * longer)
            assert one.measure("one", SMALL, seconds=0) == reading  # kept, though it is open still
            assert one.session("one", SMALL, seconds=0).rounds == 8  # sessions are pooled instead
    scripted, cache = Scripted(ONE, [0.01]), tmp_path / "c"
    with station(files["large"], cache=cache, device=lambda _: scripted) as one:
        assert one.measure("one", SMALL, seconds=0).rounds == 8
    (path,) = (cache / "readings").rglob("*.gz")
    kept = json.loads(gzip.decompress(path.read_bytes()))
    kept["reading"]["seconds"] = 0.0
    path.write_bytes(gzip.compress(json.dumps(kept).encode()))
    near = [Budget(profile="one", speedup=1.0)]
    with station(files["large"], cache=cache, device=lambda _: scripted, budgets=near) as one:
        assert one.measure("one", SMALL, seconds=0).rounds == 8 * LONGER  # what was known does not decide it


def test_real_load_and_no_time_make_a_noisy_reading(files: dict[str, Path]) -> None:
    plan = plan_cores([ONE])
    with burning(3, plan.station), station(files["slow"], plan=plan) as one:
        reading = one.measure("one", conv_net(56, 8, 48), seconds=0.01)
    assert reading.noisy


TRAINER = """
import os, sys, time
from pathlib import Path
from autocompress.devices.gate import Gate
os.sched_setaffinity(0, eval(sys.argv[1]))
gate = Gate()
with gate.working():
    Path(sys.argv[2]).touch()
    while True:
        until = time.monotonic() + 0.02
        while time.monotonic() < until:
            pass
        gate.step()
"""


def test_trainers_that_slow_the_station_pause_for_it(files: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_cores([ONE])
    if plan.quiet:
        pytest.skip("one core: trainers pause for every reading")
    with station(files["slow"], plan=plan) as one:
        before = one.measure("one", SMALL)
        script = [sys.executable, "-c", TRAINER, repr(set(plan.station)), str(tmp_path / "works")]
        with subprocess.Popen(script) as trainer:  # on the station's own core, as a thread of the same one would be
            try:
                while not (tmp_path / "works").exists():
                    time.sleep(0.02)
                beside = one.measure("one", conv_net(56, 8, 48))
            finally:
                trainer.kill()
    assert beside.quiet
    assert beside.baseline_ms.value < 1.5 * before.baseline_ms.value  # two on a core take twice as long


class Throttled(Scripted):
    """A device that becomes slower by itself, and fast again; each answer takes the next of `times`."""

    def __init__(self, profile: Profile, times: Sequence[float]) -> None:
        super().__init__(profile, [0.001])
        self.times = times

    def time(self, models: Sequence[Path], *, rounds: int, seconds: float, cores: Sequence[int] = ()) -> Samples:
        factor = self.times[self.calls]
        found = super().time(models, rounds=rounds, seconds=seconds, cores=cores)
        slower = {name: tuple(factor * ms for ms in row) for name, row in found.times_ms.items()}
        return found.model_copy(update={"times_ms": slower})


def test_a_device_that_is_slow_by_itself_is_said_and_not_kept(files: dict[str, Path], tmp_path: Path) -> None:
    vain, often = (1.2,) * (1 + RETAKES), VAIN // RETAKES
    scripted = Throttled(ONE, [1.0, 1.2, 1.2, 1.0, *vain * often, 1.2, 1.0, 1.2])
    with station(files["large"], cache=tmp_path / "c", device=lambda _: scripted) as one:

        def taken(key: str) -> tuple[float, bool, int]:
            found = one.measure("one", SMALL, key)
            return round(found.slowed, 1), found.quiet, scripted.calls

        assert taken("a") == (0.0, False, 1)
        assert taken("b") == (0.0, True, 4)  # what trainers did outlasts them a little
        for i in range(1, often + 1):
            assert taken("c") == (0.2, True, 4 + i * len(vain))  # not the trainers' doing, perhaps
        calls = scripted.calls
        assert taken("d") == (0.2, False, calls + 1)  # so nobody pauses again for a while
        assert taken("c") == (0.0, False, calls + 2)
        assert taken("d") == (0.2, False, calls + 3)
        assert [taken(key)[2] for key in "abc"] == [calls + 3] * 3


def test_nobody_pauses_for_long_where_ratios_are_the_same(files: dict[str, Path]) -> None:
    scripted = Throttled(ONE, [1.0, *(1.2, 1.0) * VAIN, 1.2])  # a clock that all cores at work keep down
    with station(files["large"], device=lambda _: scripted) as one:
        found = [one.measure("one", SMALL, str(i)) for i in range(2 + VAIN)]
    assert [reading.quiet for reading in found] == [False, *(True,) * VAIN, False]


def test_trainers_that_do_not_pause_hold_nothing_up(files: dict[str, Path], tmp_path: Path) -> None:
    gate, scripted = Gate(tmp_path), Throttled(ONE, [1.0, *(1.2 for _ in range(1 + RETAKES))])
    with gate.working(), station(files["large"], gate=Gate(tmp_path), device=lambda _: scripted) as one:
        one.measure("one", SMALL, "a")
        began = time.monotonic()
        found = one.measure("one", SMALL, "b")
    assert (round(found.slowed, 1), found.quiet, scripted.calls) == (0.2, False, 2 + RETAKES)
    assert time.monotonic() - began < 3


def test_a_refused_file_is_remembered_and_a_crash_is_not(files: dict[str, Path]) -> None:
    with station(files["large"]) as one:
        with pytest.raises(TrialFailure, match="cannot be loaded"):
            one.measure("one", b"not a model", key="broken")
        device = one._devices["one"]
        assert isinstance(device, LocalDevice)
        device.close()
        with pytest.raises(TrialFailure, match="cannot be loaded"):
            one.measure("one", b"not a model", key="broken")
        assert device._child is None, "it was tried again"
        one.measure("one", SMALL, seconds=0.1)
        assert device._child is not None
        os.kill(device._child.pid, signal.SIGKILL)
        with pytest.raises(TrialFailure, match="SIGKILL"):
            one.measure("one", SLOW, key="crash", seconds=0.1)
        assert one.measure("one", SMALL, key="crash", seconds=0.5).rounds >= MIN_BLOCKS


def test_quiet_phases_are_marked(files: dict[str, Path]) -> None:
    plan = CorePlan((), (), True, "no affinity")
    with station(files["large"], plan=plan) as one:
        reading = one.measure("one", SMALL, seconds=0.2)
    assert reading.quiet
    assert reading.cores == ()


def test_certification_takes_fresh_processes_and_no_cache(files: dict[str, Path]) -> None:
    made: list[LocalDevice] = []

    def make(profile: Profile) -> LocalDevice:
        made.append(LocalDevice(profile))
        return made[-1]

    with station(files["large"], device=make) as one:
        readings = one.certify("one", SMALL, sessions=2, seconds=0.2)
        assert len(readings) == 2
        assert len(made) == 3
        assert all(device._child is None for device in made[1:])
        assert not (one._cache / "readings").exists()


def test_a_missing_baseline_and_an_unknown_profile_are_named(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no baseline model at"):
        Station([ONE], plan_cores([ONE]), tmp_path / "none.onnx")
    with station(files["small"]) as one, pytest.raises(UserError, match="no profile 'two', only one"):
        one.measure("two", SMALL)


def test_one_file_is_its_own_baseline(files: dict[str, Path], tmp_path: Path) -> None:
    reading = measure_file(files["large"], "local-1t", seconds=0.5)
    assert 0.7 < reading.ratio.value < 1.4
    assert measure_file(str(files["small"]), ONE, files["large"], seconds=0.5).ratio.value < 0.7
    with pytest.raises(UserError, match="no model at"):
        measure_file(tmp_path / "none.onnx", ONE)


def test_the_example_of_a_device_runs(files: dict[str, Path], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(files["small"])], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert " ms [" in done.stdout
