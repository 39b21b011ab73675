"""Every form of fewer bits on every kind of graph: transformers, gates, several inputs; what cannot is skipped."""

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional

from autocompress.export import Exported, compose, export, predictor
from autocompress.ops import equalize, shifts
from autocompress.ops.integers import Plan
from autocompress.ops.pairs import Scale, quantized_weight
from autocompress.ops.quantize import Quantize
from autocompress.ops.ranges import BATCH, Look, span, stream
from autocompress.ops.wiring import Wiring
from autocompress.tasks import InputSpec, several
from autocompress.testing import check_op
from autocompress.types import Numeric, Profile, Rule, TrialFailure, UserError

OP = Quantize()
PROFILE = Profile(name="here")
IMAGE = InputSpec(shape=(3, 16, 16))


class Samples:
    """A task of random inputs: images, or whatever its specification says."""

    name, metric = "samples", "accuracy"

    def __init__(self, spec: InputSpec, count: int = 24, zero: bool = False) -> None:
        generator = torch.Generator().manual_seed(7)
        self.input, self.count = spec, count
        self.data = [
            torch.randint(0, 2, (count, *one.shape), generator=generator)
            if one.dtype == "int64"
            else torch.randn((count, *one.shape), generator=generator) * (0.0 if zero else 1.0)
            for one in spec.every
        ]

    def batches(self, split, size, *, limit=None, seed=None):
        count = min(self.count, limit or self.count)
        for start in range(0, count, size):
            rows = tuple(one[start : min(start + size, count)] for one in self.data)
            yield (rows if len(rows) > 1 else rows[0]), torch.zeros(len(rows[0]))

    def loss(self, outputs, targets):
        raise NotImplementedError

    def quality(self, predict, split):
        raise NotImplementedError

    def inputs(self):
        return tuple(one.numpy() for one in self.data)


def exported(module: nn.Module, spec: InputSpec = IMAGE, opset: int = 17) -> Exported:
    return export(module.eval(), spec, opset=opset)


def rules(subject: Exported, bits: str = "int8", **settings) -> list[Rule]:
    nodes = subject.parts[0].nodes
    leaves = [site for site in nodes if site != "." and not any(other.startswith(f"{site}.") for other in nodes)]
    return [Rule(site=site, op="quantize", settings={"bits": bits, **settings}) for site in leaves]


def network(settings: dict) -> Rule:
    return Rule(site=".", op="quantize", settings=settings)


def run(subject: Exported, asked: list[Rule], task: Samples, profile: Profile = PROFILE):
    """Receipt, file, error relative to the float answers' spread."""
    receipt = OP.decide(subject, asked, task, profile)
    model = compose(OP.enact(subject, receipt))
    before, after = several(predictor(compose(subject))(task.inputs())), several(predictor(model)(task.inputs()))
    errors = [np.abs(one - two).max() / np.abs(one).max() for one, two in zip(before, after, strict=True)]
    return receipt, model, max(errors)


def running(model: bytes, tmp_path) -> Counter[str]:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "running.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(tmp_path / "running.onnx").graph.node)


def seeded(make, *arguments) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return make(*arguments).eval()


# --- networks -------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Two inputs (tokens and mask), embedding, one attention layer, two answers."""

    spec = InputSpec(
        name="tokens", shape=(12,), dtype="int64", others=(InputSpec(name="mask", shape=(12,), dtype="int64"),)
    )

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 32)
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.norm, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, tokens, mask):
        x = self.table(tokens)
        y = self.norm(x)
        q, k, v = (one(y).unflatten(-1, (4, 8)).transpose(1, 2) for one in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1) / 8**0.5 + (1.0 - mask[:, None, None, :].float()) * -1e4
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return self.head(x[:, 0]), x


class Gated(nn.Module):
    """What MobileNetV3 consists of: hard swish, depthwise convolutions, squeeze and excitation by a hard sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.point = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = functional.hardswish(self.stem(x))
        y = functional.hardswish(self.depth(x))
        gate = functional.hardsigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        x = x + self.point(y * gate)
        return self.head(functional.hardswish(x).mean((2, 3)))


class Chain(nn.Module):
    """Dense, depthwise, dense convolutions of very unequal channels, then two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.three, self.hidden, self.head = nn.Conv2d(8, 16, 1, bias=False), nn.Linear(16, 8), nn.Linear(8, 4)
        with torch.no_grad():
            self.one.weight *= torch.logspace(-2, 1, 8)[:, None, None, None]
            self.one.bias *= torch.logspace(-2, 1, 8)
            self.two.weight /= torch.logspace(-2, 1, 8)[:, None, None, None]

    def forward(self, x):
        x = torch.relu(self.two(torch.relu(self.one(x))))
        return self.head(torch.relu(self.hidden(self.three(x).mean((2, 3)))))


# --- static int8 ----------------------------------------------------------------------------------------------------


def test_transformers_multiply_integers_and_answer_in_floats(tmp_path):
    task = Samples(Encoder.spec)
    subject = exported(seeded(Encoder), Encoder.spec)
    receipt, model, error = run(subject, rules(subject), task)
    assert error < 0.05
    found = running(model, tmp_path)
    assert found["MatMulIntegerToFloat"] + found["QGemm"] == 7
    assert found["MatMul"] + found["FusedMatMul"] == 2  # activations by activations stay float
    assert found["QuantizeLinear"] == 5  # q, k and v read one rounded activation
    assert not found["DequantizeLinear"]
    assert not any(entry.status == "skipped" for entry in receipt.entries)
    tables = [one for one in onnx.load_model_from_string(model).graph.initializer if list(one.dims) == [10, 32]]
    assert [one.data_type for one in tables] == [onnx.TensorProto.FLOAT]  # the embedding is left alone


@pytest.mark.parametrize("activation", ["uint8", "int8"])
def test_gates_are_integers_throughout(activation, tmp_path):
    task = Samples(IMAGE)
    subject = exported(seeded(Gated))
    _, model, error = run(subject, rules(subject), task, Profile(name="p", numeric=Numeric(activation=activation)))
    assert error < 0.1
    if activation == "uint8":
        found = running(model, tmp_path)
        assert (found["QuantizeLinear"], found["DequantizeLinear"]) == (1, 0)
        assert not {"Conv", "HardSwish", "HardSigmoid", "Mul", "GlobalAveragePool"}.intersection(found)


def test_a_float_gate_stays_as_it_was(tmp_path):
    subject = exported(seeded(Gated))
    asked = [rule for rule in rules(subject) if rule.site in ("depth", "point")]
    _, model, error = run(subject, asked, Samples(IMAGE))
    assert error < 0.1
    types = Counter(node.op_type for node in onnx.load_model_from_string(model).graph.node)
    assert types["HardSwish"] >= 1
    assert running(model, tmp_path)["QLinearConv"] == 2


@pytest.mark.parametrize("dimensions", [1, 3])
def test_convolutions_of_one_and_three_dimensions(dimensions):
    kinds = {1: (nn.Conv1d, (4, 32)), 3: (nn.Conv3d, (4, 6, 8, 8))}
    conv, shape = kinds[dimensions]
    spec = InputSpec(shape=shape)
    subject = exported(seeded(lambda: nn.Sequential(conv(4, 16, 3), nn.ReLU(), conv(16, 8, 3))), spec)
    receipt, _, error = run(subject, rules(subject), Samples(spec))
    assert error < 0.05
    assert [entry.status for entry in receipt.entries] == ["done"] * 3


def test_transposed_convolutions_are_left_with_the_reason():
    module = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3)))
    subject = exported(module)
    receipt, _, error = run(subject, rules(subject), Samples(IMAGE))
    assert error < 0.05
    assert {entry.site: entry.why for entry in receipt.entries if entry.status == "skipped"} == {
        "2": "onnxruntime has no integer ConvTranspose, and a float one between roundings is slower"
    }


def test_the_runtime_still_has_no_integer_transposed_convolution(tmp_path):
    rng = np.random.default_rng(0)
    constants = {
        "step": np.float32(0.02),
        "zero": np.uint8(128),
        "weight_q": rng.integers(-127, 127, (8, 4, 3, 3), np.int8),
        "weight_zero": np.int8(0),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["x_q"]),
        helper.make_node("DequantizeLinear", ["x_q", "step", "zero"], ["x_r"]),
        helper.make_node("DequantizeLinear", ["weight_q", "step", "weight_zero"], ["weight"]),
        helper.make_node("ConvTranspose", ["x_r", "weight"], ["raw"]),
        helper.make_node("QuantizeLinear", ["raw", "step", "zero"], ["y_q"]),
        helper.make_node("DequantizeLinear", ["y_q", "step", "zero"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 6, 6])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    held = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "up", [x], [y], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert running(model.SerializeToString(), tmp_path)["ConvTranspose"] == 1  # else `integers.refusal` has no ground


class Branches(nn.Module):
    """Splits, padding, slices, clips with one open end, a layer called twice, constants that are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(26, 8, 1)
        self.register_buffer("fixed", torch.linspace(-1, 1, 2 * 16 * 16).reshape(1, 2, 16, 16))

    def forward(self, x):
        x = functional.pad(torch.clamp(self.stem(x), min=-0.5), (0, 0, 0, 0, 0, 0))
        a, b = x.chunk(2, 1)
        a = functional.leaky_relu(self.twice(functional.relu6(self.twice(a))))
        b = functional.pad(b[:, :, ::2, ::2], (4, 4, 4, 4))
        joined = torch.cat((a, b, torch.sigmoid(a), self.fixed.expand(x.shape[0], -1, -1, -1)), 1)
        return self.last(joined), b


def test_every_kind_of_branch():
    subject = exported(seeded(Branches))
    _, _, error = run(subject, rules(subject), Samples(IMAGE))
    assert error < 0.06


def test_activations_of_no_width_give_no_nan():
    subject = exported(seeded(Chain))
    _, model, _ = run(subject, rules(subject), Samples(IMAGE, zero=True))
    assert np.isfinite(predictor(model)(np.ones((2, 3, 16, 16), np.float32))).all()
    dead = seeded(Chain)
    with torch.no_grad():
        dead.one.weight.zero_()
        dead.one.bias.zero_()
    subject = exported(dead)
    for method in ("minmax", "entropy", "percentile"):
        _, model, error = run(subject, rules(subject, calibration=method), Samples(IMAGE))
        assert error < 0.05, method


def test_learned_ranges_take_the_place_of_calibrated_ones():
    subject = exported(seeded(Chain))
    learned = {"two": {"input": (0.0, 3.0), "output": (0.0, 5.0)}, "three": {"input": (0.0, 4.0)}}
    receipt = OP.decide(replace(subject, learned=learned), rules(subject), Samples(IMAGE), PROFILE)
    ranges = {k: tuple(v) for entry in receipt.entries for k, v in entry.facts["model"]["ranges"].items()}
    assert ranges["Relu:output"] == (0.0, 3.0)
    assert ranges["Relu_1:output"] == (0.0, 4.0)  # what is read outranks what was given
    plain = OP.decide(subject, rules(subject), Samples(IMAGE), PROFILE)
    calibrated = {k: tuple(v) for entry in plain.entries for k, v in entry.facts["model"]["ranges"].items()}
    assert ranges.keys() == calibrated.keys()
    assert {k for k in ranges if ranges[k] != calibrated[k]} == {"Relu:output", "Relu_1:output"}


def test_a_site_has_its_own_granularity_and_calibration():
    subject = exported(seeded(Chain))
    asked = [
        Rule(site="one", op="quantize", settings={"bits": "int8", "granularity": "tensor"}),
        Rule(site="two", op="quantize", settings={"bits": "int8", "calibration": "percentile"}),
        Rule(site="three", op="quantize", settings={"bits": "int8", "granularity": "channel"}),
    ]
    task = Samples(IMAGE)
    receipt, model, _ = run(subject, asked, task)
    scales = {t.name: list(t.dims) for t in onnx.load_model_from_string(model).graph.initializer}
    assert (scales["one.weight_scale"], scales["two.weight_scale"], scales["three.weight_scale"]) == ([], [8], [16])
    plain = OP.decide(
        subject, [rule.model_copy(update={"settings": {"bits": "int8"}}) for rule in asked], task, PROFILE
    )
    one, two = (
        {k: tuple(v) for entry in found.entries for k, v in entry.facts["model"]["ranges"].items()}
        for found in (receipt, plain)
    )
    assert {key for key in one if one[key] != two[key]} == {"Relu_1:output"}
    assert receipt.entries[1].asked == {"bits": "int8", "calibration": "percentile"}


def test_the_rule_of_fewer_layers_holds():
    subject = exported(seeded(Gated))
    asked = [
        network({"bits": "int8"}),
        Rule(site="stem", op="quantize", settings={"bits": "float"}),
        Rule(site="head", op="quantize", settings={"bits": "int8-dynamic"}),
    ]
    receipt, model, _ = run(subject, asked, Samples(IMAGE))
    assert [(entry.site, entry.asked.get("bits")) for entry in receipt.entries] == [
        (".", "int8"),
        ("head", "int8-dynamic"),
        (".", None),
    ]
    names = {tensor.name for tensor in onnx.load_model_from_string(model).graph.initializer}
    assert "stem.weight" in names
    assert "point.weight_quantized" in names
    every = [*asked, *rules(subject)]
    assert (
        OP.decide(subject, every, Samples(IMAGE), PROFILE).entries[0].why == "every layer of it has a rule of its own"
    )


# --- other forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", ["int8", "int8-dynamic", "int4", "float16"])
def test_every_form_keeps_the_contract(bits):
    profile = Profile(name="p", types=("float32", "int8", "float16"))
    subject = exported(seeded(Encoder), Encoder.spec)
    receipt = check_op(OP, subject, rules(subject, bits), Samples(Encoder.spec), profile)
    assert {entry.achieved["bits"] for entry in receipt.entries if entry.site != "."} == {
        {"int8": 8.0, "int8-dynamic": 8.0, "int4": 4.0, "float16": 16.0}[bits]
    }
    _, model, error = run(subject, rules(subject, bits), Samples(Encoder.spec), profile)
    assert error < {"int8": 0.05, "int8-dynamic": 0.05, "int4": 0.35, "float16": 0.005}[bits]
    assert len(model) < len(compose(subject))


def test_forms_are_mixed_and_run_as_what_they_are(tmp_path):
    subject = exported(seeded(Encoder), Encoder.spec)
    kinds = {
        "q": "int8",
        "k": "int8-dynamic",
        "v": "int8-dynamic",
        "up": "int4",
        "head": "int4",
        "down": "int8-dynamic",
    }
    asked = [Rule(site=site, op="quantize", settings={"bits": bits}) for site, bits in kinds.items()]
    check_op(OP, subject, asked, Samples(Encoder.spec), PROFILE)
    _, model, error = run(subject, asked, Samples(Encoder.spec))
    assert error < 0.3
    found = running(model, tmp_path)
    assert found["MatMulNBits"] == 2
    assert found["DynamicQuantizeMatMul"] + found["MatMulIntegerToFloat"] == 4
    onnx.checker.check_model(
        onnx.load_model_from_string(
            compose(OP.enact(subject, OP.decide(subject, asked[:3], Samples(Encoder.spec), PROFILE)))
        )
    )


@pytest.mark.parametrize(
    ("bits", "why"),
    [
        ("int4", "Conv is no matrix product"),
        ("int8-dynamic", "Conv is no matrix product"),
        ("float16", "profile here does not run float16 (its `types` are float32, int8)"),
        ("bfloat16", "profile here does not run bfloat16 (its `types` are float32, int8)"),
    ],
)
def test_what_cannot_be_is_skipped_with_the_reason(bits, why):
    subject = exported(seeded(Chain))
    asked = [Rule(site="one", op="quantize", settings={"bits": bits})]
    receipt = check_op(OP, subject, asked, Samples(IMAGE), PROFILE)
    assert [(entry.status, entry.why) for entry in receipt.entries] == [("skipped", why)]
    assert OP.enact(subject, receipt) == subject


def test_odd_sizes_in_four_bits():
    spec = InputSpec(shape=(45,))
    subject = exported(seeded(lambda: nn.Sequential(nn.Linear(45, 7), nn.ReLU(), nn.Linear(7, 3, bias=False))), spec)
    _, _, error = run(subject, rules(subject, "int4"), Samples(spec))
    assert error < 0.3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": "int3"}, "bits = 'int3'; choose float, int8, int8-dynamic"),
        ({"bits": "int8", "calibration": "best"}, "calibration = 'best'"),
        ({"bits": "int8", "granularity": 1}, "granularity = 1"),
        ({"bits": "int8", "scheme": "x"}, "scheme = 'x'; choose no such setting"),
        ({"bits": "int8", "equalize": True}, "equalize is for the whole network"),
    ],
)
def test_unknown_settings_are_named(settings, words):
    subject = exported(seeded(Chain))
    with pytest.raises(UserError, match=words):
        OP.decide(subject, [Rule(site="one", op="quantize", settings=settings)], Samples(IMAGE), PROFILE)


# --- equalization and bias ------------------------------------------------------------------------------------------


def test_equalization_leaves_float_answers_as_they_are_and_levels_the_channels():
    subject = exported(seeded(Chain))
    wiring = Wiring.of(subject.parts[0].model)
    assert equalize.pairs(wiring) == [
        ("one/Conv", "two/Conv"),
        ("two/Conv", "three/Conv"),
        ("hidden/Gemm", "head/Gemm"),
    ]
    decided = equalize.decide(wiring, frozenset(wiring.nodes))
    before = [np.abs(wiring.value(name)).reshape(8, -1).max(1) for name in ("one.weight", "two.weight")]
    equalize.enact(wiring, decided)
    after = [np.abs(wiring.value(name)).reshape(8, -1).max(1) for name in ("one.weight", "two.weight")]
    spread = [float(np.log2(values.max() / values.min())) for values in (before[0], after[0])]
    assert spread[1] < 0.6 * spread[0]
    task = Samples(IMAGE)
    plain, level = predictor(compose(subject)), predictor(wiring.model.SerializeToString())
    assert np.array_equal(plain(task.inputs()[0]), level(task.inputs()[0]))  # powers of two: bit for bit


def test_equalization_helps_where_one_scale_is_for_all_channels():
    profile = Profile(name="p", numeric=Numeric(per_channel=False))
    subject, task = exported(seeded(Chain)), Samples(IMAGE)
    _, _, plain = run(subject, rules(subject), task, profile)
    receipt, _, level = run(subject, [*rules(subject), network({"equalize": True})], task, profile)
    assert level < 0.75 * plain
    last = receipt.entries[-1]
    assert (last.site, last.asked) == (".", {"equalize": True})
    pair = last.facts["model"]["equalized"][0]
    assert (pair["first"], len(pair["exponents"])) == ("one/Conv", 8)
    check_op(OP, subject, [*rules(subject), network({"equalize": True, "correct_bias": True})], task, profile)


def test_no_layer_is_equalized_across_a_branch_or_a_bounded_activation():
    class Bounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

        def forward(self, x):
            x = self.b(functional.relu6(self.a(x)))
            return self.c(torch.relu(x)) + x

    assert equalize.pairs(Wiring.of(exported(seeded(Bounded)).parts[0].model)) == []


def test_bias_correction_moves_the_mean_of_answers_back():
    spec = InputSpec(shape=(64,))
    task = Samples(spec, 64)
    task.data[0] += 1.0
    profile = Profile(name="p", numeric=Numeric(per_channel=False, reduce_range=True))
    module = seeded(lambda: nn.Sequential(nn.Linear(64, 6)))
    with torch.no_grad():  # one large weight, so that all others are rounded coarsely
        module[0].weight[0, 0] = 6.0
    subject = exported(module, spec)
    expected = predictor(compose(subject))(task.inputs()[0]).mean(0)
    errors = []
    for asked in (rules(subject), [*rules(subject), network({"correct_bias": True})]):
        receipt = OP.decide(subject, asked, task, profile)
        found = predictor(compose(OP.enact(subject, receipt)))(task.inputs()[0]).mean(0)
        errors.append(float(np.abs(found - expected).max()))
    assert errors[1] < 0.05 * errors[0]


def test_layers_without_a_bias_get_one():
    subject = exported(seeded(Chain))
    receipt, model, error = run(subject, [*rules(subject), network({"correct_bias": True})], Samples(IMAGE))
    assert error < 0.05
    widths = {name: len(values) for name, values in receipt.entries[-1].facts["model"]["shifts"].items()}
    assert widths == {"one/Conv": 8, "two/Conv": 8, "three/Conv": 16, "hidden/Gemm": 8, "head/Gemm": 4}
    assert "three/Conv.bias_quantized" in {t.name for t in onnx.load_model_from_string(model).graph.initializer}


def test_products_are_corrected_through_the_addition_that_follows_them():
    subject = exported(seeded(Encoder), Encoder.spec)
    receipt, _, error = run(subject, [*rules(subject), network({"correct_bias": True})], Samples(Encoder.spec))
    assert error < 0.05
    assert set(receipt.entries[-1].facts["model"]["shifts"]) == {
        f"{name}/MatMul" for name in ("q", "k", "v", "out", "up", "down")
    } | {"head/Gemm"}


def test_receipts_of_other_networks_are_refused():
    subject = exported(seeded(Chain))
    asked = [*rules(subject), network({"equalize": True, "correct_bias": True})]
    receipt = OP.decide(subject, asked, Samples(IMAGE), PROFILE)
    with pytest.raises(UserError, match="which part 'model' of this network does not have"):
        OP.enact(exported(seeded(Gated)), receipt)
    wiring = Wiring.of(exported(seeded(Gated)).parts[0].model)
    with pytest.raises(UserError, match="equalizes 'one/Conv'"):
        equalize.enact(wiring, receipt.entries[-1].facts["model"]["equalized"])
    with pytest.raises(UserError, match="shifts the bias of 'one/Conv'"):
        shifts.enact(wiring, receipt.entries[-1].facts["model"]["shifts"])


# --- looking at data ------------------------------------------------------------------------------------------------


def test_calibration_streams_in_few_samples_where_activations_are_large(monkeypatch):
    subject = exported(seeded(Chain))
    plan = Plan.of(wiring := Wiring.of(subject.parts[0].model), frozenset(("one/Conv", "two/Conv")))
    look = Look(wiring.model, tuple(plan.keys.values()))
    held = [sum(one.nbytes for one in seen.values()) for (seen,) in stream((look,), Samples(IMAGE, 24), 24)]
    assert len(held) == 2  # one sample to see how large they are, then all
    monkeypatch.setattr("autocompress.ops.ranges.MEMORY", 4 * held[0])
    few = [sum(one.nbytes for one in seen.values()) for (seen,) in stream((look,), Samples(IMAGE, 24), 24)]
    assert max(few) <= 4 * held[0]
    assert sum(few) == sum(held)
    assert BATCH >= 24


def test_histograms_do_not_depend_on_the_order_of_magnitudes():
    generator = np.random.default_rng(0)
    small, large = generator.normal(size=(8, 1000)).astype(np.float32), generator.normal(size=(8, 1000)) * 1e6
    for method in ("percentile", "entropy"):
        one = span(method)
        for values in (np.zeros((2, 4)), small * 1e-20, small, large):
            assert one.add(values.astype(np.float32))
        low, high = one.range()
        assert -5e6 < low < -1e6
        assert 1e6 < high < 5e6
        assert not span(method).add(np.array([np.nan], np.float32))


def test_entropy_keeps_what_is_dense_and_cuts_what_is_far():
    values = np.random.default_rng(0).normal(size=(16, 4096)).astype(np.float32)
    values[0, 0] = 60.0
    spans = {method: span(method) for method in ("minmax", "percentile", "entropy")}
    for one in spans.values():
        one.add(values)
    assert spans["minmax"].range()[1] == 60.0
    assert 3.0 < spans["percentile"].range()[1] < 6.0
    assert 3.0 < spans["entropy"].range()[1] < 12.0


def test_scales_have_an_exact_zero_and_weights_a_step_their_bias_fits():
    assert Scale.of((0.0, 0.0), "uint8") == Scale(np.float32(1), np.uint8(0))
    scale = Scale.of((0.5, 2.55), "uint8")
    assert (int(scale.zero), float(scale.step)) == (0, pytest.approx(0.01))
    assert int(Scale.of((-1.0, 1.0), "int8").zero) in (-1, 0)
    values = np.array([[1.0, -2.0], [0.0, 0.0]], np.float32)
    integers, step, _ = quantized_weight(values, 0, "int8", False, np.array([0.0, 0.5]))
    assert integers.tolist() == [[64, -127], [0, 0]]
    assert step.tolist() == pytest.approx([2 / 127, 0.5])


def test_what_is_not_finite_names_the_node():
    subject = exported(seeded(Chain))
    task = Samples(IMAGE)
    task.data[0][3, 0, 0, 0] = float("inf")
    with pytest.raises(TrialFailure, match="one/Conv:input is not finite"):
        OP.decide(subject, rules(subject), task, PROFILE)
