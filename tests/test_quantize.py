"""Static int8: everything fuses, receipts rebuild the bytes, the file is faster and still right."""

import hashlib
import json
import logging
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from autocompress.export import Exported, Part, compose, export, graph_hash, predictor
from autocompress.models.convnet import ConvNet
from autocompress.ops import Op, pairs
from autocompress.ops.quantize import Quantize
from autocompress.tasks import InputSpec
from autocompress.tasks.digits import Digits
from autocompress.train import Training, reestimate_batchnorm
from autocompress.types import Numeric, Profile, Receipt, Rule, TrialFailure, UserError

VNNI = Profile(name="vnni")
ARCH = {"width.0": 16, "width.1": 32, "width.2": 32, "depth.0": 1, "depth.2": 1}
MIXED = ARCH | {"kind.0": "plain", "kind.1": "shuffle", "kind.2": "separable", "resolution": 12}
OP = Quantize()
PARAMS = {
    "bits": "float",
    "calibration": "profile",
    "granularity": "profile",
    "weights": "profile",
    "equalize": False,
    "correct_bias": False,
}


def network(arch=ARCH, seed: int = 0, epochs: float = 0.0) -> Exported:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = ConvNet().build(arch)
    if epochs:
        Training(module, Digits(), epochs, seed).run_to(1.0)
    else:
        reestimate_batchnorm(module, Digits(), 4)
    return export(module, Digits.input, opset=17)


def rules(exported: Exported, *floats: str) -> list[Rule]:
    """Int8 for every leaf but `floats`."""
    names = [site for part in exported.parts for site in part.nodes if not any(f"{site}." in o for o in part.nodes)]
    names = [name for name in names if name != "."]
    return [Rule(site=n, op="quantize", settings={"bits": "float" if n in floats else "int8"}) for n in names]


def optimised(model: bytes, folder: Path) -> Counter[str]:
    """Operations of the graph that onnxruntime really runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)


def inputs(count: int = 360) -> np.ndarray:
    return next(Digits().batches("selection", count))[0].numpy()


@pytest.fixture(scope="module")
def trained() -> Exported:
    return network(epochs=8)


def test_keeps_the_contract():
    assert isinstance(OP, Op)
    assert (OP.name, OP.phase, OP.params) == ("quantize", "numeric", PARAMS)


@pytest.mark.parametrize("arch", [ARCH, MIXED], ids=["residual", "mixed"])
def test_everything_between_integer_layers_is_integer(arch, tmp_path):
    exported = network(arch)
    receipt = OP.decide(exported, rules(exported), Digits(), VNNI)
    found = optimised(compose(OP.enact(exported, receipt)), tmp_path)
    assert found["QLinearConv"] == len(exported.parts[0].nodes["."]) - 1
    assert found["QGemm"] == 1
    assert (found["QuantizeLinear"], found["DequantizeLinear"]) == (1, 0)  # in; the product answers in floats
    assert found["QLinearGlobalAveragePool"] == 1
    assert not {"Conv", "FusedConv", "Gemm", "Relu", "Add", "GlobalAveragePool"}.intersection(found)


def test_quality_holds(trained):
    task = Digits()
    receipt = OP.decide(trained, rules(trained), task, VNNI)
    before = task.quality(predictor(compose(trained)), "selection").value.value
    model = compose(OP.enact(trained, receipt))
    after = task.quality(predictor(model), "selection").value.value
    assert before > 0.93
    assert after > before - 0.02
    assert len(model) < 0.45 * len(compose(trained))


@pytest.mark.parametrize("seed", range(8))
def test_what_is_named_is_integer_and_nothing_else(trained, tmp_path, seed):
    """onnxruntime by itself quantizes float layers between integer ones, with one scale for all channels."""
    every = rules(trained)
    chosen = random.Random(seed).sample(every, k=1 + seed)
    model = compose(OP.enact(trained, OP.decide(trained, chosen, Digits(), VNNI, limit=32)))
    found = optimised(model, tmp_path)
    integer = found["QLinearConv"] + found["QGemm"]
    assert integer == len(chosen)
    assert integer + found["Conv"] + found["FusedConv"] + found["Gemm"] + found["FusedGemm"] == len(every)
    expected, got = predictor(compose(trained))(inputs(32)), predictor(model)(inputs(32))
    assert np.abs(expected - got).max() < 0.1 * np.abs(expected).max()


def test_float_sites_stay_float(trained, tmp_path):
    float_sites = ("stem.conv", "stages.1.0.conv1", "head")
    receipt = OP.decide(trained, rules(trained, *float_sites), Digits(), VNNI)
    assert not {entry.site for entry in receipt.entries} & set(float_sites)
    found = optimised(compose(OP.enact(trained, receipt)), tmp_path)
    assert found["Conv"] + found["FusedConv"] == 2
    assert found["QLinearConv"] == len(trained.parts[0].nodes["."]) - 3
    assert found["Gemm"] + found["FusedGemm"] == 1


def test_a_float_neighbour_reads_exact_values(trained):
    """The shortcut beside an integer convolution adds what the float network computed, not its rounded form."""
    one = [Rule(site="stages.1.1.conv1", op="quantize", settings={"bits": "int8"})]
    model = onnx.load_model_from_string(compose(OP.enact(trained, OP.decide(trained, one, Digits(), VNNI))))
    joint = next(node for node in model.graph.node if node.op_type == "Add" and node.name == "Add_2")
    assert not any("Dequantize" in name for name in joint.input)


def test_one_layer_alone_takes_its_relu_along(trained, tmp_path):
    one = [Rule(site="stages.1.1.conv1", op="quantize", settings={"bits": "int8"})]
    receipt = OP.decide(trained, one, Digits(), VNNI)
    found = optimised(compose(OP.enact(trained, receipt)), tmp_path)
    assert (found["QLinearConv"], found["QuantizeLinear"], found["DequantizeLinear"]) == (1, 1, 1)
    assert [entry.site for entry in receipt.entries] == ["stages.1.1.conv1", "."]


def test_a_site_is_a_prefix_of_its_leaves():
    exported = network(MIXED)
    receipt = OP.decide(
        exported, [Rule(site="stages.2.0.conv1", op="quantize", settings={"bits": "int8"})], Digits(), VNNI
    )
    nodes = receipt.entries[0].facts["model"]["nodes"]
    assert nodes == ["stages.2.0.conv1.0/Conv", "stages.2.0.conv1.1/Conv"]


def test_nothing_asked_nothing_done(trained):
    for asked in ([], rules(trained, *[rule.site for rule in rules(trained)])):
        receipt = OP.decide(trained, asked, Digits(), VNNI)
        assert receipt.entries == ()
        assert OP.enact(trained, receipt) == trained


def test_sites_without_weights_are_skipped_with_the_reason(trained):
    asked = [Rule(site="stages.9.9.conv1", op="quantize", settings={"bits": "int8"})]
    receipt = OP.decide(trained, asked, Digits(), VNNI)
    assert [(entry.status, entry.why) for entry in receipt.entries] == [("skipped", "no weights in the file")]
    assert OP.enact(trained, receipt) == trained
    with pytest.raises(UserError, match="bits = 'int3'"):
        OP.decide(trained, [Rule(site="head", op="quantize", settings={"bits": "int3"})], Digits(), VNNI)


def test_receipts_rebuild_the_bytes(trained):
    receipt = OP.decide(trained, rules(trained, "head"), Digits(), VNNI)
    assert receipt == OP.decide(trained, rules(trained, "head"), Digits(), VNNI)
    told = Receipt.model_validate(json.loads(json.dumps(receipt.model_dump(mode="json"))))
    assert OP.enact(trained, told) == OP.enact(trained, receipt)
    assert OP.enact(trained, receipt).parts[0].nodes == trained.parts[0].nodes


def test_bytes_do_not_depend_on_the_hash_seed(trained, tmp_path):
    receipt = OP.decide(trained, rules(trained), Digits(), VNNI)
    (tmp_path / "float.onnx").write_bytes(compose(trained))
    (tmp_path / "receipt.json").write_text(receipt.model_dump_json())
    program = (
        "import sys, pathlib, hashlib\n"
        "from autocompress.export import Exported, Part\n"
        "from autocompress.ops.quantize import Quantize\n"
        "from autocompress.types import Receipt\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "subject = Exported((Part('model', (folder / 'float.onnx').read_bytes()),), 17, 'torchscript')\n"
        "receipt = Receipt.model_validate_json((folder / 'receipt.json').read_text())\n"
        "print(hashlib.sha256(Quantize().enact(subject, receipt).parts[0].model).hexdigest())\n"
    )
    expected = hashlib.sha256(compose(OP.enact(trained, receipt))).hexdigest()
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={"PYTHONHASHSEED": "4242", "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == [expected]
    assert run.stderr == ""


def test_ranges_are_what_the_float_file_computes(trained):
    receipt = OP.decide(trained, rules(trained), Digits(), VNNI, limit=64)
    ranges = {k: v for entry in receipt.entries for k, v in entry.facts["model"]["ranges"].items()}
    model = onnx.load_model_from_string(compose(trained))
    model.graph.output.append(onnx.ValueInfoProto(name="Relu_2"))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    images = next(Digits().batches("calibration", 64))[0].numpy()
    found = session.run(["Relu_2"], {"input": images})[0]
    assert ranges["Relu_2:output"] == pytest.approx((float(found.min()), float(found.max())), rel=1e-5)
    # a convolution that only feeds a ReLU has the ReLU's range and none of its own
    assert "stages.1.1.conv1/Conv:output" not in ranges
    assert len(ranges) == len({json.dumps(k) for k in ranges})


def test_latency_first_needs_one_batch(trained):
    few, many = (OP.decide(trained, rules(trained), Digits(), VNNI, limit=limit) for limit in (32, 200))
    assert few != many
    hashes = {graph_hash(compose(OP.enact(trained, receipt)), weights=False) for receipt in (few, many)}
    assert len(hashes) == 1


def test_graph_hash_of_new_weights_is_the_same():
    hashes = set()
    for seed in (0, 1):
        exported = network(seed=seed)
        hashes.add(graph_hash(compose(OP.enact(exported, OP.decide(exported, rules(exported), Digits(), VNNI))), False))
    assert len(hashes) == 1


@pytest.mark.parametrize("calibration", ["percentile", "entropy"])
def test_other_calibrations_cut_outliers_and_keep_quality(trained, calibration):
    profile = Profile(name="p", numeric=Numeric(calibration=calibration))
    asked = rules(trained)
    plain = OP.decide(trained, asked, Digits(), VNNI, limit=64).entries[-1].facts["model"]["ranges"]
    receipt = OP.decide(trained, asked, Digits(), profile, limit=64)
    cut = receipt.entries[-1].facts["model"]["ranges"]
    assert plain.keys() == cut.keys()
    assert all(plain[key][0] <= cut[key][0] <= cut[key][1] <= plain[key][1] for key in plain)
    assert any(cut[key][1] < plain[key][1] for key in plain)
    quality = Digits().quality(predictor(compose(OP.enact(trained, receipt))), "selection")
    assert quality.value.value > 0.93


@pytest.mark.parametrize(
    "numeric",
    [
        Numeric(activation="int8"),
        Numeric(per_channel=False),
        Numeric(reduce_range=True),
        Numeric(weight="uint8", per_channel=False),
    ],
    ids=lambda numeric: numeric.variant,
)
def test_every_variant_answers(trained, numeric):
    receipt = OP.decide(trained, rules(trained), Digits(), Profile(name="p", numeric=numeric))
    model = compose(OP.enact(trained, receipt))
    assert Digits().quality(predictor(model), "selection").value.value > 0.93
    graph = onnx.load_model_from_string(model).graph
    weight = next(tensor for tensor in graph.initializer if tensor.name == "stem.conv.weight_quantized")
    expected = onnx.TensorProto.INT8 if numeric.weight == "int8" else onnx.TensorProto.UINT8
    assert weight.data_type == expected
    scale = next(tensor for tensor in graph.initializer if tensor.name == "stem.conv.weight_scale")
    assert list(scale.dims) == ([16] if numeric.per_channel else [])
    if numeric.reduce_range:
        assert np.abs(onnx.numpy_helper.to_array(weight)).max() <= 64


def test_receipts_of_other_networks_are_refused(trained):
    receipt = OP.decide(trained, rules(trained), Digits(), VNNI)
    other = network(ARCH | {"depth.1": 1})
    with pytest.raises(UserError, match=r"quantize stages\.1\.1\.conv1: .*node 'stages\.1\.1\.conv1/Conv'"):
        OP.enact(other, receipt)
    plain = network(ARCH | {"kind.1": "plain"})
    with pytest.raises(UserError, match="quantize"):
        OP.enact(plain, receipt)
    renamed = Exported((Part("body", trained.parts[0].model, trained.parts[0].nodes),), 17, "torchscript")
    with pytest.raises(UserError, match="part 'model'"):
        OP.enact(renamed, receipt)


def test_what_is_not_finite_is_a_failed_trial(trained):
    model = onnx.load_model_from_string(compose(trained))
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "stem.conv.weight")
    weight.CopyFrom(onnx.numpy_helper.from_array(np.full(tuple(weight.dims), np.nan, np.float32), weight.name))
    broken = Exported((Part("model", model.SerializeToString(), trained.parts[0].nodes),), 17, "torchscript")
    with pytest.raises(TrialFailure, match="not finite"):
        OP.decide(broken, rules(broken), Digits(), VNNI)


def test_dynamo_graphs_fuse_as_well(tmp_path):
    torch.manual_seed(0)
    module = ConvNet().build(ARCH)
    reestimate_batchnorm(module, Digits(), 4)
    exported = export(module, Digits.input, opset=17, exporter="dynamo")
    found = optimised(compose(OP.enact(exported, OP.decide(exported, rules(exported), Digits(), VNNI))), tmp_path)
    assert found["QLinearConv"] == len(exported.parts[0].nodes["."]) - 1
    assert (found["QuantizeLinear"], found["DequantizeLinear"]) == (1, 0)


def test_matrix_products_and_concatenation_are_integer(tmp_path):
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Conv2d(1, 16, 3), nn.Conv2d(1, 16, 3), nn.Linear(32, 16)

        def forward(self, x):
            joined = torch.cat((torch.relu(self.one(x)), self.two(x)), 1)
            return self.head(joined.flatten(2).transpose(1, 2))

    torch.manual_seed(0)
    exported = export(Tokens().eval(), Digits.input, opset=17)
    receipt = OP.decide(exported, rules(exported), Digits(), VNNI)
    model = compose(OP.enact(exported, receipt))
    found = optimised(model, tmp_path)
    assert found["QLinearConv"] == 2
    assert found["QLinearConcat"] == 1
    assert found["QLinearMatMul"] + found["MatMulIntegerToFloat"] == 1
    expected, got = predictor(compose(exported))(inputs(16)), predictor(model)(inputs(16))
    assert np.abs(expected - got).max() < 0.05 * np.abs(expected).max()


def test_parts_are_calibrated_in_a_row():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten()).eval()
    head = nn.Sequential(nn.Linear(576, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    parts = tuple(
        Part(name, (done := export(module, InputSpec(shape=shape), opset=17).parts[0]).model, done.nodes)
        for name, module, shape in (("body", body, (1, 8, 8)), ("head", head, (576,)))
    )
    exported = Exported(parts, 17, "torchscript")
    asked = [Rule(site=site, op="quantize", settings={"bits": "int8"}) for site in ("0", "2")]
    receipt = OP.decide(exported, asked, Digits(), VNNI)
    assert set(receipt.entries[0].facts) == {"body", "head"}  # site "0" is in both
    quantized = OP.enact(exported, receipt)
    expected, got = predictor(compose(exported))(inputs(64)), predictor(compose(quantized))(inputs(64))
    assert np.abs(expected - got).max() < 0.1 * np.abs(expected).max()


def test_nothing_is_printed_and_logging_stays_as_it_was(trained, capfd):
    before = list(logging.getLogger().handlers)
    for calibration in ("minmax", "entropy"):
        profile = Profile(name="p", numeric=Numeric(calibration=calibration))
        OP.enact(trained, OP.decide(trained, rules(trained), Digits(), profile, limit=32))
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger().handlers == before


def test_an_empty_calibration_split_is_named(trained):
    class Empty(Digits):
        def batches(self, split, size, *, limit=None, seed=None):
            return iter(())

    with pytest.raises(UserError, match="task digits: the calibration split is empty"):
        OP.decide(trained, rules(trained), Empty(), VNNI)


class Padded(nn.Module):
    """An image's first layer, and a shortcut that fills up channels (He et al. 2016, option A)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        shortcut = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.head(torch.relu(self.body(x) + shortcut).mean((2, 3)))


class Pictures(Digits):
    """Digits of several channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.input = InputSpec(shape=(channels, 8, 8))

    def batches(self, split, size, **settings):
        for images, targets in super().batches(split, size, **settings):
            yield images * torch.linspace(1, -1, self.input.shape[0]).view(1, -1, 1, 1), targets


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_few_channels_are_filled_up_and_shortcuts_are_padded_as_integers(channels, tmp_path, monkeypatch):
    task = Pictures(channels)
    torch.manual_seed(0)
    exported = export(Padded(channels).eval(), task.input, opset=17)
    receipt = OP.decide(exported, rules(exported), task, VNNI)
    model = compose(OP.enact(exported, receipt))
    found = optimised(model, tmp_path)
    assert (found["QLinearConv"], found["QGemm"], found["DequantizeLinear"]) == (2, 1, 0)
    assert found["Pad"] == (2 if channels < 4 else 1)  # the shortcut's, and the filled up image's
    weights = {one.name: list(one.dims) for one in onnx.load_from_string(model).graph.initializer}
    assert weights["stem.weight_quantized"] == [8, 4, 3, 3]
    images = next(task.batches("selection", 64))[0].numpy()
    float_answers = predictor(compose(exported))(images)
    answers = predictor(model)(images)
    assert np.abs(answers - float_answers).mean() < 0.03 * np.abs(float_answers).mean()
    monkeypatch.setattr(pairs, "FILLED", 0)
    np.testing.assert_array_equal(answers, predictor(compose(OP.enact(exported, receipt)))(images))
