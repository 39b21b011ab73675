"""What onnxruntime makes of a file and what its kernels take, over the timing script, the station and its cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from autocompress.devices import Kernels, TellsKernels
from autocompress.devices import kernels as script
from autocompress.devices.bench import options_of, values
from autocompress.devices.cores import plan_cores
from autocompress.devices.kerneltable import KernelTable
from autocompress.devices.layers import Layer, network
from autocompress.devices.local import LocalDevice, Unloadable
from autocompress.devices.station import Station
from autocompress.surrogate import KERNELS
from autocompress.types import Numeric, Profile
from tests.test_devices import LARGE, SMALL

SETUP: dict[str, Any] = {"threads": 1, "provider": "CPUExecutionProvider", "options": {}, "batch": 1}
PROFILE = Profile(name="local-1t")
LAYERS = [Layer((16, 8, 8), (32, 16, 3, 3), (1, 1), (1, 1), (1, 1))] * 2 + [Layer((24,), (10, 24))]


@pytest.fixture
def device() -> Iterator[LocalDevice]:
    made = LocalDevice(PROFILE)
    yield made
    made.close()


def graph(path: Path, model: bytes) -> script.Graph:
    path.write_bytes(model)
    session = onnxruntime.InferenceSession(path, options_of(SETUP, False), providers=["CPUExecutionProvider"])
    feed = {one.name: values(one.name, one.type, one.shape, 1) for one in session.get_inputs()}
    return script.Graph(str(path), lambda: options_of(SETUP, False), SETUP, feed)


def with_if() -> bytes:
    """A file whose one node holds graphs."""
    value = helper.make_tensor_value_info
    branches = {
        name: helper.make_graph(
            [helper.make_node(op, ["x"], [name])], name, [], [value(name, TensorProto.FLOAT, (1, 4))]
        )
        for name, op in (("then", "Exp"), ("else", "Tanh"))
    }
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "zero"], ["is"]),
        helper.make_node("If", ["is"], ["y"], then_branch=branches["then"], else_branch=branches["else"]),
    ]
    zero = [numpy_helper.from_array(np.array(0, np.float32), "zero")]
    made = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, (1, 4))], [value("y", TensorProto.FLOAT, (1, 4))], zero
    )
    model: onnx.ModelProto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


@pytest.mark.parametrize("numeric", [None, Numeric()])
def test_the_graph_that_runs_is_read_as_onnx_reads_it(tmp_path: Path, numeric: Numeric | None) -> None:
    found = graph(tmp_path / "m.onnx", network(LAYERS, 1, numeric))
    options = options_of(SETUP, False)
    options.optimized_model_filepath = str(tmp_path / "o.onnx")
    onnxruntime.InferenceSession(tmp_path / "m.onnx", options, providers=["CPUExecutionProvider"])
    expected = onnx.load(tmp_path / "o.onnx").graph
    # onnxruntime numbers and orders what it inserts as it likes
    assert sorted((n.op, n.domain, len(n.inputs), len(n.outputs), len(n.attributes)) for n in found.nodes) == sorted(
        (n.op_type, n.domain, len(n.input), len(n.output), len(n.attribute)) for n in expected.node
    )
    assert sorted(found.shapes.values()) == sorted((one.data_type, tuple(one.dims)) for one in expected.initializer)
    convolution = "Conv" if numeric is None else "QLinearConv"
    assert convolution in {node.op for node in found.nodes}
    (twice,) = [nodes for key, nodes in found.kernels.items() if key.startswith(convolution)]
    assert len(twice) == 2  # weights of their own, and all else the same


def test_a_kernel_alone_is_that_node_and_no_other(tmp_path: Path) -> None:
    found = graph(tmp_path / "m.onnx", network(LAYERS, 1, Numeric()))
    for key, (node, *_) in found.kernels.items():
        model, feed = found.alone(node, 3)
        read = onnx.load_model_from_string(model).graph
        assert [one.op_type for one in read.node] == 3 * [key.partition(":")[0]]
        (answer,) = found.session(model).run(None, feed)
        np.testing.assert_array_equal(answer, found.values[node.outputs[0]])


def test_more_work_takes_longer_and_names_tell_kernels_apart(tmp_path: Path, device: LocalDevice) -> None:
    assert isinstance(device, TellsKernels)
    found: list[Kernels] = []
    for name, model in (("small", SMALL), ("large", LARGE)):
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(model)
        listed = device.kernels(path, (), seconds=1)
        assert listed.ratios == {}
        assert sum(listed.counts.values()) >= 8
        found.append(device.kernels(path, list(listed.counts), seconds=5))
        assert found[-1].ratios.keys() == listed.counts.keys()
    assert max(found[1].ratios.values()) > 2 * max(found[0].ratios.values()) > 0
    deepest = [max((key for key in one.counts if "Conv:" in key), key=one.counts.__getitem__) for one in found]
    assert deepest[0] != deepest[1]
    assert found[0].counts[deepest[0]] >= 6  # eight layers, of which the first and perhaps the last differ
    took = device.kernels(tmp_path / "small.onnx", list(found[0].counts), seconds=0)
    assert len(took.ratios) == 1  # there is no time for more


def test_a_node_with_a_graph_of_its_own_is_no_kernel(tmp_path: Path, device: LocalDevice) -> None:
    (tmp_path / "if.onnx").write_bytes(with_if())
    counts = device.kernels(tmp_path / "if.onnx", (), seconds=1).counts
    (held,) = [key for key in counts if key.startswith("If:")]
    with pytest.raises(Unloadable, match=r"kernel by kernel.*If runs a graph of its own"):
        device.kernels(tmp_path / "if.onnx", [held], seconds=1)


class Asked(LocalDevice):
    """Remembers which kernels it was asked to time."""

    def __init__(self, profile: Profile) -> None:
        super().__init__(profile)
        self.wanted: list[str] = []

    def kernels(self, model: Path, wanted: Sequence[str], *, seconds: float, cores: Sequence[int] = ()) -> Kernels:
        """As it is, in small portions."""
        found = super().kernels(model, wanted, seconds=seconds / 1e4, cores=cores)
        self.wanted += found.ratios
        return found


def test_no_kernel_is_timed_twice_for_a_device(tmp_path: Path) -> None:
    (tmp_path / "large.onnx").write_bytes(LARGE)
    made: list[Asked] = []

    def make(profile: Profile) -> Asked:
        made.append(Asked(profile))
        return made[-1]

    def station() -> Station:
        return Station([PROFILE], plan_cores([PROFILE]), tmp_path / "large.onnx", tmp_path / "cache", device=make)

    one = station()
    seen = one.kernels(PROFILE.name, SMALL)
    assert one.kernels(PROFILE.name, SMALL) == seen
    assert seen[KERNELS] >= 8
    assert any("Conv" in name for name in seen)
    first = made[0].wanted
    assert len(first) == len(set(first)) > 1
    one.kernels(PROFILE.name, LARGE)
    assert made[0].wanted[: len(first)] == first
    assert len(made[0].wanted) == len(set(made[0].wanted))
    one.close()
    again = station()
    assert again.kernels(PROFILE.name, SMALL) == seen
    assert made[1].wanted == []
    with pytest.raises(Unloadable):
        again.kernels(PROFILE.name, with_if())
    asked = len(made[1].wanted)
    with pytest.raises(Unloadable):  # the verdict is kept
        again.kernels(PROFILE.name, with_if())
    assert len(made[1].wanted) == asked
    again.close()


def test_a_device_that_cannot_time_kernels_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "large.onnx").write_bytes(LARGE)

    class Plain:
        def __init__(self, profile: Profile) -> None:
            self.profile, self.local = profile, LocalDevice(profile)
            self.fingerprint, self.time, self.close = self.local.fingerprint, self.local.time, self.local.close

    one = Station([PROFILE], plan_cores([PROFILE]), tmp_path / "large.onnx", tmp_path / "cache", device=Plain)
    assert one.kernels(PROFILE.name, SMALL) == {}
    one.close()


def test_a_table_outlives_its_object_and_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "table.jsonl"
    KernelTable(path).add({"Conv:1": 2.0, "Add:1": 0.5})
    with path.open("a") as lines:
        lines.write('\n["Conv:2", 7')
    table = KernelTable(path)
    assert table.ratios == {"Conv:1": 2.0, "Add:1": 0.5}
    table.add({"Conv:1": 9.0, "Conv:2": 3.0})  # another search was here first
    again = KernelTable(path)
    assert again.ratios == {"Conv:1": 2.0, "Add:1": 0.5, "Conv:2": 3.0}
    assert again.amounts({"Conv:1": 2, "Conv:2": 1, "Add:1": 4}) == {"Conv": 7.0, "Add": 2.0, KERNELS: 7.0}
    assert table.missing({"Conv:1": 1, "Mul:1": 1}) == ["Mul:1"]
    again.add({"Mul:1": 4.0})
    assert table.missing({"Mul:1": 1}) == []  # the other object timed it
    with pytest.raises(KeyError):
        again.amounts({"Sub:1": 1})
