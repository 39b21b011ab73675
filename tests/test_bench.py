"""The timing script by itself: old Pythons, systems that lack things, energy, memory, the host's lock."""

from __future__ import annotations

import ast
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autocompress.devices import bench, kernels, there
from autocompress.devices.local import BENCH, LocalDevice
from autocompress.types import Profile
from tests.test_devices import SMALL

SETUP = {"threads": 1, "provider": "CPUExecutionProvider", "options": {}, "batch": 1}


def served(command: list[str], *requests: dict[str, Any]) -> list[dict[str, Any]]:
    """Answers of one process, waiting left out."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        answers = []
        for request in (SETUP, *requests):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answers.append(next(one for line in process.stdout if "waiting" not in (one := json.loads(line))))
        process.stdin.close()
    return answers


@pytest.mark.parametrize("script", [bench, kernels, there])
def test_what_goes_to_targets_is_written_for_python_3_9(script: Any) -> None:
    ast.parse(Path(script.__file__).read_text(), feature_version=(3, 9))


def test_a_system_without_affinity_proc_and_resource(tmp_path: Path) -> None:
    path, poor = tmp_path / "small.onnx", tmp_path / "poor.py"
    path.write_bytes(SMALL)
    poor.write_text(
        "import os, sys, runpy\ndel os.sched_setaffinity, os.sched_getaffinity\n"
        f"sys.modules['resource'] = sys.modules['fcntl'] = None\nrunpy.run_path({str(BENCH)!r}, run_name='__main__')\n"
    )
    asked = {"models": [str(path)], "rounds": 2, "seconds": 5, "cores": [0]}
    hello, timed = served([sys.executable, str(poor)], asked)
    assert hello["affinity"] is False
    assert timed["blocks"] == 2
    assert timed["disturbed"] == 0


def test_it_ends_when_nobody_asks_for_long() -> None:
    with subprocess.Popen([sys.executable, "-I", str(BENCH)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        process.stdin.write(json.dumps({**SETUP, "idle_s": 0.1}).encode() + b"\n")
        process.stdin.flush()
        assert process.wait(30) == 0


def test_free_memory_is_what_the_kernel_says(tmp_path: Path) -> None:
    assert bench.free_mb(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 443452 kB\nMemAvailable:     250000 kB\n")
    assert bench.free_mb(tmp_path) == 256.0


def test_memory_between_timings_leaves_the_cores_alone(tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    path.write_bytes(SMALL)
    device, last = LocalDevice(Profile(name="p")), max(os.sched_getaffinity(0))
    device.time([path], rounds=1, seconds=5, cores=[last])
    assert 0 < device.memory([path])[str(path)] < 200
    device.close()


def zone(root: Path, number: str, name: str, now: int, range_: int) -> Path:
    folder = root / "sys/class/powercap" / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    for file, value in (("name", name), ("energy_uj", now), ("max_energy_range_uj", range_)):
        (folder / file).write_text(f"{value}\n")
    return folder / "energy_uj"


def test_energy_is_that_of_the_packages_also_when_a_counter_begins_again(tmp_path: Path) -> None:
    first, second = zone(tmp_path, "0", "package-0", 1_000, 10**6), zone(tmp_path, "1", "package-1", 999_000, 10**6)
    zone(tmp_path, "0:0", "core", 5, 10**6)  # is in its package already
    zone(tmp_path, "2", "psys", 5, 10**6)  # and the packages in it
    rapl = bench.Rapl(tmp_path)
    before = rapl.read()
    first.write_text("3000")
    second.write_text("500")
    assert rapl.between(before, rapl.read()) == pytest.approx((2_000 + 1_500) / 1e3)
    first.write_text("not ours to read")
    assert bench.Rapl(tmp_path).packages == []
    assert bench.Rapl(tmp_path / "none").packages == []


def test_the_lock_is_everybodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"autocompress-test-{os.getpid()}.lock"
    old = os.umask(0o077)
    try:
        descriptor = bench.common(name)
    finally:
        os.umask(old)
    path = Path("/tmp") / name
    try:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        os.close(descriptor)
        os.close(bench.common(name))
        path.unlink()
        path.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(OSError, match="symbolic link"):
            bench.common(name)
        assert not (tmp_path / "elsewhere").exists()
    finally:
        path.unlink()
