"""A target over ssh: a real OpenSSH server on loopback, the system's client, and what goes wrong between them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from autocompress.devices import Device, TellsMemory
from autocompress.devices.fingerprint import host
from autocompress.devices.ssh import CONFIG, SshDevice
from autocompress.types import Profile, Reach
from tests import sshd as servers

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
    """INT_MIN modulo -1, which onnxruntime hands to the processor as it is: the process ends by SIGFPE."""
    numbers = {"low": -(2**31), "minus": -1}
    weights = [numpy_helper.from_array(np.array([value], np.int32), name) for name, value in numbers.items()]
    nodes = [
        helper.make_node("Sub", ["input", "input"], ["zero"]),  # so that nothing is worked out while loading
        helper.make_node("Add", ["zero", "low"], ["a"]),
        helper.make_node("Add", ["zero", "minus"], ["b"]),
        helper.make_node("Mod", ["a", "b"], ["out"]),
    ]
    return model(nodes, weights, TensorProto.INT32, ["batch", 8], "out")


def model(nodes: list, weights: list, kind: int, shape: list, last: str) -> bytes:
    inputs = [helper.make_tensor_value_info("input", kind, shape)]
    outputs = [helper.make_tensor_value_info(last, kind, [None] * len(shape))]
    graph = helper.make_graph(nodes, "net", inputs, outputs, weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(made)
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
    running = [one.cmdline() for one in there.sessions()]
    assert any(str(there.home / ".cache/autocompress/files/bench-") in " ".join(line) for line in running)
    device.close()
    assert not there.sessions()
    assert device.time([files["small"]], rounds=2, seconds=5).blocks == 2


def test_the_fingerprint_is_the_targets(device: SshDevice) -> None:
    told = device.fingerprint()
    here = host()
    assert {key: told[key] for key in here} == here  # the target is this machine, asked without psutil
    assert told["onnxruntime"]
    assert told["provider"] == "CPUExecutionProvider"
