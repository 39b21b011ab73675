"""Models whose weights lie apart: the same answers, the same bytes, one clear line where a file is missing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from autocompress import artifact, onnxfile
from autocompress.devices.cores import plan_cores
from autocompress.devices.profiler import site_latency
from autocompress.devices.station import Station
from autocompress.export import Exported, compose, export, graph_hash, parity, predictor
from autocompress.ops.optimize import fused, optimized
from autocompress.ops.quantize import Quantize
from autocompress.ops.storage import restore, storage
from autocompress.ops.store import main as store_main
from autocompress.tasks.digits import Digits
from autocompress.types import Profile, Rule, TrialFailure, UserError

LITTLE = 2000
PROFILE = Profile(name="local-1t")
ZOO = Path(__file__).parent.parent / "benchmarks" / "zoo.py"


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of more than 2 kB lie apart."""
    monkeypatch.setattr(onnxfile, "LIMIT", LITTLE)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Flatten())
        return nn.Sequential(body, nn.Linear(384, 10)).eval()


def images(count: int = 16) -> Any:
    return next(iter(Digits().batches("selection", count)))[0].numpy()


def exported(exporter: Any = "torchscript") -> Exported:
    return export(network(), Digits.input, opset=17, exporter=exporter)


def int8(subject: Exported) -> bytes:
    rules = [Rule(site=one, op="quantize", settings={"bits": "int8"}) for one in ("0.0", "0.2", "1")]
    receipt = Quantize().decide(subject, rules, Digits(), PROFILE, limit=32)
    return compose(Quantize().enact(subject, receipt))


def both(monkeypatch: pytest.MonkeyPatch, make: Callable[[], bytes]) -> tuple[bytes, bytes]:
    """What is made with weights within the graph, and with weights apart."""
    whole = make()
    monkeypatch.setattr(onnxfile, "LIMIT", LITTLE)
    return whole, make()


def constants(model: bytes) -> dict[str, Any]:
    return {one.name: numpy_helper.to_array(one) for one in onnxfile.read(model).graph.initializer}


# --- the same network -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["float", "dynamo", "int8"])
def test_answers_are_those_of_one_file_bit_for_bit(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = {"float": exported, "dynamo": lambda: exported("dynamo"), "int8": exported}[form]
    finish = int8 if form == "int8" else compose
    whole, apart = both(monkeypatch, lambda: finish(make()))
    assert len(onnxfile.files("m.onnx", whole)) == 1
    assert len(onnxfile.files("m.onnx", apart)) == 2
    assert predictor(apart)(images()).tobytes() == predictor(whole)(images()).tobytes()
    ours, theirs = constants(apart), constants(whole)
    assert set(ours) == set(theirs)
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    for weights in (True, False):
        assert graph_hash(apart, weights=weights) == graph_hash(whole, weights=weights)


def test_the_module_agrees_and_equal_graphs_give_equal_bytes(little: None) -> None:
    first, second = exported(), exported()
    assert parity(network(), compose(first), images()) < 1e-5
    assert compose(first) == compose(second)
    assert onnxfile.write(onnxfile.read(compose(first))) == compose(first)


def test_weights_are_aligned_and_what_shapes_depend_on_stays(little: None) -> None:
    model = compose(exported())
    graph = onnxfile.read(model, weights=False).graph
    outside = [one for one in graph.initializer if one.data_location == TensorProto.EXTERNAL]
    assert {one.name for one in outside} == {"0.2.weight", "1.weight"}  # the others have less than a kilobyte
    for one in outside:
        assert int({entry.key: entry.value for entry in one.external_data}["offset"]) % onnxfile.PAGE == 0
        assert list(one.dims) == list(constants(model)[one.name].shape)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["f4", "f2", "i1", "u1", "i8", "f8"]), st.lists(st.integers(0, 40), max_size=3)),
        max_size=6,
    ),
    st.integers(0, 5000),
)
def test_any_constants_come_back(kinds: list[tuple[str, list[int]]], limit: int) -> None:
    rng = np.random.default_rng(len(kinds))
    values = [(rng.standard_normal(shape) * 100).astype(kind) for kind, shape in kinds]
    tensors = [numpy_helper.from_array(np.asarray(one), f"c{place}") for place, one in enumerate(values)]
    tensors.append(helper.make_tensor("listed", TensorProto.FLOAT, [600], [1.0] * 600))
    model = helper.make_model(helper.make_graph([], "g", [], [], tensors), producer_name="p", doc_string="d")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxfile, "LIMIT", limit)
        data = onnxfile.write(model)
        assert onnxfile.read(data) == model
        assert onnxfile.write(onnxfile.read(data)) == data
        assert sum(len(one) for one in onnxfile.files("m", data).values()) <= len(data) + 1024


def test_what_was_read_from_other_files_is_written(little: None, tmp_path: Path) -> None:
    """Above 2 GB torch writes every weight into a file of its own; reading them leaves marks."""
    model = onnxfile.read(compose(exported()))
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0, location="all")
    found = onnx.load_model(tmp_path / "m.onnx")
    assert any(one.HasField("data_location") for one in found.graph.initializer)
    assert predictor(onnxfile.write(found))(images()).tobytes() == predictor(compose(exported()))(images()).tobytes()


def test_one_line_for_a_disk_without_room(little: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compose(exported())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(onnxfile, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(TrialFailure, match=r"needs that much in \S+, where 0.0 GB are free; set AUTOCOMPRESS_CACHE"):
        predictor(model)


def test_no_scratch_is_left(little: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path))
    predict = predictor(int8(exported()))
    optimized(compose(exported()), PROFILE)
    assert list(tmp_path.iterdir()) == []
    assert np.isfinite(predict(images())).all()  # the weights are mapped, though their file is gone


# --- on disk --------------------------------------------------------------------------------------------------------


def test_files_are_read_back_and_run_by_onnxruntime_itself(little: None, tmp_path: Path) -> None:
    model = compose(exported())
    for name in ("model.onnx", "model-other.onnx"):
        onnxfile.save(tmp_path / name, model)
        assert onnxfile.load(tmp_path / name) == model
        session = onnxruntime.InferenceSession(str(tmp_path / name), providers=["CPUExecutionProvider"])
        assert session.run(None, {"input": images()})[0].tobytes() == predictor(model)(images()).tobytes()
        onnx.checker.check_model(str(tmp_path / name))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model-other.onnx",
        "model-other.onnx.data",
        "model.onnx",
        "model.onnx.data",
    ]
    onnxfile.remove(tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx.data").exists()


def test_missing_and_truncated_weights_are_one_line(little: None, tmp_path: Path) -> None:
    path, beside = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    onnxfile.save(path, compose(exported()))
    whole = beside.read_bytes()
    beside.write_bytes(whole[:-4])
    with pytest.raises(UserError, match=rf"model.onnx.data: {len(whole) - 4} bytes where model.onnx has {len(whole)};"):
        onnxfile.load(path)
    beside.unlink()
    with pytest.raises(UserError, match=r"model.onnx.data: missing; model.onnx has its weights there"):
        onnxfile.load(path)
    path.rename(tmp_path / "other.onnx")
    with pytest.raises(UserError, match=r"other.onnx: weight '\S+' lies in 'model.onnx.data', not other.onnx.data"):
        onnxfile.load(tmp_path / "other.onnx")
    with pytest.raises(UserError, match="cannot be read"):
        onnxfile.load(path)


def test_a_graph_that_does_not_say_where_its_weights_lie(tmp_path: Path) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="model.onnx.data")
    model = helper.make_model(helper.make_graph([], "g", [], [], [tensor]))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="'w' lies apart, but the model does not say where"):
        onnxfile.load(tmp_path / "model.onnx")


# --- beside the pipeline --------------------------------------------------------------------------------------------


def test_stored_models_come_back_bit_for_bit(little: None, tmp_path: Path) -> None:
    model = compose(exported())
    stored = storage(model, {"": "zstd", "0.2.weight": "zstd", "1.weight": "zstd"})
    assert len(stored) < len(model)
    assert restore(stored) == model
    (tmp_path / "model.store").write_bytes(stored)
    assert store_main(["restore", str(tmp_path / "model.store")]) == 0
    assert onnxfile.load(tmp_path / "model.onnx") == model
    assert (tmp_path / "model.onnx.data").is_file()


@pytest.mark.parametrize("form", ["float", "int8"])
def test_the_runtime_optimizes_and_profiles_them(form: str, little: None) -> None:
    subject = exported()
    model = int8(subject) if form == "int8" else compose(subject)
    made = optimized(model, PROFILE)
    assert np.allclose(predictor(made)(images()), predictor(model)(images()), rtol=1e-4, atol=1e-5)
    assert fused(model, made)["nodes"] < 0
    assert len(onnxfile.files("optimized.onnx", made)) == 2
    assert site_latency(model, subject.parts[0].nodes, seconds=0.01).total > 0


def test_a_station_measures_them(little: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "cache"))
    baseline = compose(exported())
    onnxfile.save(tmp_path / "baseline" / "model.onnx", baseline)
    station = Station([PROFILE], plan_cores([PROFILE]), tmp_path / "baseline" / "model.onnx")
    try:
        reading = station.measure("local-1t", int8(exported()), seconds=0.2, again=False)
        same = station.measure("local-1t", tmp_path / "baseline" / "model.onnx", seconds=0.2, again=False)
    finally:
        station.close()
    assert reading.ms.value > 0
    assert 0.5 < same.ratio.value < 2
    assert list((tmp_path / "cache" / "measuring").iterdir()) == []


def test_a_network_goes_the_whole_way(little: None, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("zoo", ZOO)
    assert spec is not None
    assert spec.loader is not None
    zoo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    state = torch.get_rng_state()
    try:
        row = zoo.conform("hf:distilbert", 0, tmp_path)
    finally:
        torch.set_rng_state(state)
    assert row["reload_error"] == 0.0
    assert row["byte_equal"]
    folder = tmp_path / "again"
    read = artifact.read(folder)
    assert {"model.onnx", "model.onnx.data"} < set(read.manifest.files)
    subprocess.run([sys.executable, "-I", str(folder / "infer.py")], check=True, capture_output=True, cwd="/")
    whole = (folder / "model.onnx.data").read_bytes()
    (folder / "model.onnx.data").write_bytes(whole[:-1] + b"\x01")
    with pytest.raises(UserError, match=r"model.onnx.data: changed since it was written"):
        artifact.read(folder)
    (folder / "model.onnx.data").unlink()
    with pytest.raises(UserError, match=r"model.onnx.data: missing"):
        artifact.read(folder)
