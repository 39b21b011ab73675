"""Int8 simulated in torch: where it acts, what it learns, that nothing of it is left, and that the real file agrees."""

import copy
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

from autocompress.export import compose, export, predictor
from autocompress.models.convnet import ConvNet
from autocompress.models.foreign import Foreign
from autocompress.ops import TrainOp
from autocompress.ops.flow import Flow
from autocompress.ops.places import Spot, spots
from autocompress.ops.qat import FREEZE, Qat
from autocompress.ops.quantize import Quantize
from autocompress.ops.rounding import LEVELS, Range, gain_of, rounded_weight
from autocompress.parts import make_ops
from autocompress.pipeline import Work, rate, release, shape, training
from autocompress.tasks.digits import Digits
from autocompress.testing import check_op
from autocompress.train import Training, reestimate_batchnorm
from autocompress.types import Candidate, Numeric, Policy, Profile, Receipt, Rule, TrialFailure, UserError

TASK, PROFILE, OP = Digits(), Profile(name="any"), Qat()
ARCH = {"width.0": 16, "width.1": 32, "width.2": 32, "depth.0": 1, "depth.1": 1, "depth.2": 1, "resolution": 8}
EVERYWHERE = (Rule(site=".", op="qat", settings={"bits": "int8"}),)
PER_TENSOR = Profile(name="per tensor", numeric=Numeric(per_channel=False))
UNSIGNED = Profile(name="unsigned", numeric=Numeric(weight="uint8", reduce_range=True))


def network(seed: int = 0, arch: dict | None = None) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = ConvNet().build(ARCH | (arch or {}))
    reestimate_batchnorm(module, TASK, 4)
    return module.eval()


def decided(module: nn.Module, rules=EVERYWHERE, profile: Profile = PROFILE) -> Receipt:
    return OP.decide(module, rules, TASK, profile)


def answers(module: nn.Module, inputs: torch.Tensor) -> np.ndarray:
    module.eval()
    with torch.no_grad():
        return module(inputs).numpy()


def places(module: nn.Module, shape: tuple[int, ...], *names: str) -> list[Spot]:
    found = spots(module, Flow.of(module, (torch.zeros(2, *shape),)), names)
    assert all(isinstance(spot, Spot) for spot in found), found
    return [spot for spot in found if isinstance(spot, Spot)]


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0.0, 2.0), (-1.5, 2.0), (-3.0, 0.0)])
def test_activations_are_rounded_as_onnxruntime_rounds_them(low, high):
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 2
    step = np.float32((high - low) / LEVELS)
    zero = np.uint8(np.rint(-low / ((high - low) / LEVELS)))
    graph = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["": 17]>
        g (float[n, c, h, w] x, float s, uint8 z) => (float[n, c, h, w] y)
        { q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z) }"""
    )
    import onnxruntime

    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": x.numpy(), "s": np.asarray(step), "z": np.asarray(zero)})
    np.testing.assert_allclose(Range(low, high)(x).detach().numpy(), expected, atol=1e-6)


def test_the_ends_of_a_range_learn_what_autograd_would_teach_them():
    x = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(1)) * 2
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    low, high = torch.tensor(-51 * 2.5 / 204, requires_grad=True), torch.tensor(2.5, requires_grad=True)  # zero at 51

    def through(value):
        return value + (value.round() - value).detach()

    straight = x.clone().requires_grad_()
    step = (high - low) / LEVELS
    zero = through(-low / step)
    ((torch.clamp(through(straight / step) + zero, 0, LEVELS) - zero) * step).backward(gradient)
    ours, span = x.clone().requires_grad_(), Range(float(low.detach()), float(high.detach()))
    span(ours).backward(gradient)
    scale = LEVELS**1.5 / (3 * 5 * 5) ** 0.5
    assert float(span.low.grad) / scale == pytest.approx(float(low.grad), abs=1e-3)
    assert float(span.high.grad) / scale == pytest.approx(float(high.grad), abs=1e-3)
    torch.testing.assert_close(ours.grad, straight.grad)


def test_ends_at_zero_are_not_learned_and_others_keep_their_sign_and_size():
    span = Range(0.1, 2.0)
    assert [name for name, _ in span.named_parameters()] == ["high"]
    assert span.ends() == (0.0, 2.0)
    wide = Range(-1.0, 2.0)
    with torch.no_grad():
        wide.low.fill_(3.0)
        wide.high.fill_(100.0)
    wide.hold(-1.0, 2.0)
    assert wide.ends() == (-1 / 32, 8.0)


@pytest.mark.parametrize("numeric", [PROFILE.numeric, PER_TENSOR.numeric, UNSIGNED.numeric], ids=["pc", "pt", "u8"])
def test_the_folded_weight_is_what_is_rounded(numeric):
    """The batch norm folded by hand, its weight rounded by onnxruntime's own arithmetic."""
    from onnxruntime.quantization.quant_utils import QuantType, quantize_data

    norm = nn.BatchNorm2d(6).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.running_var.uniform_(0.1, 4.0, generator=rng)
        norm.weight.uniform_(-2.0, 2.0, generator=rng)
    weight = torch.randn(6, 4, 3, 3, generator=rng)
    gain = gain_of(norm)
    found = rounded_weight(weight, numeric, gain) * gain.reshape(-1, 1, 1, 1)
    folded = (weight * gain.reshape(-1, 1, 1, 1)).numpy()
    kind, symmetric = (QuantType.QInt8, True) if numeric.weight == "int8" else (QuantType.QUInt8, False)
    for rows in [[row] for row in range(6)] if numeric.per_channel else [list(range(6))]:
        part = folded[rows]
        zero, step, integers = quantize_data(part, kind.tensor_type, symmetric, numeric.reduce_range)[-3:]
        expected = (integers.astype(np.float32) - np.float32(zero)) * np.float32(step)
        np.testing.assert_allclose(found[rows].numpy(), expected.reshape(part.shape), atol=1e-6)
    if numeric == PROFILE.numeric:  # one step per channel: the gain changes nothing
        torch.testing.assert_close(rounded_weight(weight, numeric), rounded_weight(weight, numeric, gain))


# --- places -----------------------------------------------------------------------------------------------------------


def test_a_chain_has_one_range_between_two_layers_and_none_behind_the_last_product():
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 5)
    ).eval()
    conv, linear = places(module, (3, 6, 6), "0", "5")
    assert conv.norm == "1"
    assert conv.places["input"].modules == ("0",)
    output = conv.places["output"]
    assert (output.modules, output.low, output.high) == (("1",), 0.0, 6.0)
    assert output.within(-3.0, 9.0) == (0.0, 6.0)
    assert linear.places == {"input": output}  # pooled and moved values keep the scale
    assert linear.own == []


class Body(nn.Module):
    """A ReLU that runs twice, the second time behind an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.b(self.relu(self.a(x)))
        y += x
        return self.relu(y)


class Residual(nn.Module):
    """Functional calls between layers; two layers read the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 4, 3, padding=1), Body()
        self.tail, self.other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(functional.relu(self.stem(x)))
        return self.tail(x) + self.other(x)


def test_a_sum_is_rounded_where_it_is_made_for_all_its_readers():
    module = Residual().eval()
    stem, a, b, tail, other = places(module, (3, 6, 6), "stem", "body.a", "body.b", "tail", "other")
    assert stem.places["output"].low == 0.0
    assert a.places["input"] == stem.places["output"]
    assert a.places["output"].low == 0.0
    assert b.places["output"].low is None
    assert tail.places["input"] == other.places["input"]
    assert (tail.places["input"].modules, tail.places["input"].after) == (("body",), True)
    (alone,) = places(module, (3, 6, 6), "tail")  # the sum stays float: rounded only for the layer that reads it
    assert (alone.places["input"].modules, alone.places["input"].after) == (("tail",), False)


class Strange(nn.Module):
    """A layer that runs twice, one that is not run, one whose weight is used by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.hand, self.head = (
            nn.Linear(64, 64),
            nn.Linear(4, 4),
            nn.Linear(64, 8),
            nn.Linear(8, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(x.flatten(1)))
        return self.head(functional.linear(x, self.hand.weight))


def test_what_cannot_be_simulated_is_left_alone_and_said():
    receipt = decided(Strange())
    assert {entry.site: entry.why for entry in receipt.entries} == {
        "twice": "twice runs 2 times in a forward pass",
        "never": "never is not run as a module",
        "hand": "hand is not run as a module",
        "head": "",
    }
    module = OP.enact(Strange(), receipt)
    assert OP.settle(module, receipt).entries[0].status == "skipped"
    assert (
        decided(Strange(), [Rule(site="no", op="qat", settings={"bits": "int8"})]).entries[0].why == "no layer is there"
    )


# --- the op -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", [PROFILE, PER_TENSOR, UNSIGNED], ids=lambda profile: profile.name)
def test_keeps_the_contract(profile):
    assert isinstance(OP, TrainOp)
    receipt = check_op(OP, network(), EVERYWHERE, TASK, profile)
    assert all(entry.status == "done" for entry in receipt.entries)
    assert len(receipt.entries) == sum(isinstance(part, nn.Conv2d | nn.Linear) for part in network().modules())
    for entry in receipt.entries:
        assert all(low <= 0 <= high for low, high in entry.facts["ranges"].values())


def test_training_learns_ranges_freezes_statistics_and_goes_on_elsewhere():
    def prepared() -> tuple[Training, Receipt]:
        module = network()
        receipt = decided(module)
        return Training(OP.enact(module, receipt), TASK, 1.0, 3, lr=0.02, instruments=((OP, receipt),)), receipt

    whole, receipt = prepared()
    whole.run_to(FREEZE + 0.1)
    kept = whole.module.stages[1][0].bn1.running_var.clone()
    whole.run_to(1.0)
    assert torch.equal(whole.module.stages[1][0].bn1.running_var, kept)
    first, _ = prepared()
    first.run_to(0.3)
    second = Training(OP.enact(network(seed=5), receipt), TASK, 1.0, 3, lr=0.02, instruments=((OP, receipt),))
    second.load(first.state())
    second.run_to(1.0)
    assert second.state() == whole.state()
    learned = OP.settle(copy.deepcopy(whole.module), receipt)
    moved = [
        entry.facts["ranges"][side] != other.facts["ranges"][side]
        for entry, other in zip(receipt.entries, learned.entries, strict=True)
        for side in entry.facts["ranges"]
    ]
    assert all(moved)
    shared = {entry.site: entry.facts["ranges"] for entry in learned.entries}
    assert shared["stages.0.0.conv1"]["input"] == shared["stem.conv"]["output"]
    assert "output" not in shared["head"]


def test_simulation_computes_in_float32_under_bfloat16_autocast():
    module = network()
    receipt = decided(module)
    OP.enact(module, receipt)
    seen: list[torch.Tensor] = []
    module.stages[0][0].bn1.register_forward_hook(lambda _part, _inputs, output: seen.append(output))
    inputs = next(TASK.batches("train", 32))[0]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        module(inputs)
    module(inputs)
    narrow, wide = seen
    assert (narrow.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    assert len(wide.unique()) <= LEVELS + 1
    assert len(narrow.unique()) <= LEVELS + 1  # a grid, though each point is rounded to 8 bits of mantissa


def test_a_rule_without_quantize_trains_on_the_grid_and_leaves_a_float_file():
    module = network()
    receipt = decided(module, [Rule(site="stages.1", op="qat", settings={"bits": "int8"})])
    assert {entry.site for entry in receipt.entries} == {f"stages.1.0.{n}" for n in ("conv1", "conv2", "shortcut.0")}
    OP.settle(OP.enact(module, receipt), receipt)
    graph = onnx.load_model_from_string(compose(export(module, TASK.input, opset=17))).graph
    assert "QuantizeLinear" not in {node.op_type for node in graph.node}


def test_in_a_policy_only_what_will_be_int8_is_trained_as_int8():
    asked = [("quantize", ".", "int8"), ("quantize", "stages.1", "float"), ("quantize", "stages.1.0.conv2", "int8")]
    policy = Policy(rules=tuple(Rule(site=site, op=op, settings={"bits": bits}) for op, site, bits in asked))
    rules = [*EVERYWHERE, Rule(site="stages.1.0.conv1", op="qat", settings={"bits": "int8"})]
    narrowed, skipped = OP.narrow(network(), rules, policy)
    sites = {rule.site for rule in narrowed}
    assert {"stem.conv", "stages.1.0.conv2", "head"} <= sites
    assert not {"stages.1.0.conv1", "stages.1.0.shortcut.0"} & sites
    assert [(entry.site, entry.why) for entry in skipped] == [("stages.1.0.conv1", "quantize makes nothing int8 there")]
    narrowed, skipped = OP.narrow(network(), EVERYWHERE, Policy())
    assert (narrowed, len(skipped)) == ([], 1)


def test_bad_settings_and_data_and_strange_receipts_are_said():
    with pytest.raises(UserError, match="bits = 'int3'; choose float or int8"):
        decided(network(), [Rule(site=".", op="qat", settings={"bits": "int3"})])
    with pytest.raises(UserError, match="unknown setting 'width'"):
        decided(network(), [Rule(site=".", op="qat", settings={"width": 8})])
    assert decided(network(), [Rule(site=".", op="qat", settings={"bits": "float"})]).entries == ()
    broken = network()
    with torch.no_grad():
        broken.stem.conv.weight.fill_(float("nan"))
    with pytest.raises(TrialFailure, match="not finite"):
        decided(broken)
    receipt = Receipt.model_validate_json(json.dumps(decided(network()).model_dump()))
    with pytest.raises(UserError, match="another network: the weight is"):
        OP.enact(network(arch={"width.2": 48}), receipt)
    with pytest.raises(UserError, match="another network: there is no"):
        OP.enact(nn.Sequential(), receipt)


# --- the real file ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Work:
    torch.manual_seed(0)
    family = ConvNet(arch=ARCH)
    parent = family.build({})
    Training(parent, TASK, epochs=5, seed=0).run_to(1.0)
    return Work(family, TASK, make_ops(("prune", "sparsify", "qat", "quantize")), parent.eval(), (PROFILE,), epochs=1.0)


def agreement(work: Work, policy: Policy, split: str) -> tuple[float, float, float]:
    """(share of equal predictions, accuracy simulated, accuracy of the file) after training."""
    shaped = shape(work, Candidate(arch={}, policy=policy))
    training(work, shaped, policy, 0).run_to(1.0)
    settled = shaped.settle(work)
    (file,) = release(work, settled.module, policy, learned=settled.ranges()).values()
    predict = predictor(file.model)
    simulated, real, right = [], [], []
    for inputs, targets in work.task.batches(split, 100):
        simulated.append(answers(shaped.module, inputs).argmax(1))
        real.append(predict(inputs.numpy()).argmax(1))
        right.append(targets.numpy())
    one, other, truth = (np.concatenate(found) for found in (simulated, real, right))
    return float((one == other).mean()), float((one == truth).mean()), float((other == truth).mean())


def both(*sites: str) -> Policy:
    ops = [("qat", {"bits": "int8"}), ("quantize", {"bits": "int8"})]
    return Policy(rules=tuple(Rule(site=site, op=op, settings=asked) for op, asked in ops for site in sites))


@pytest.mark.parametrize("sites", [(".",), ("stages.0", "stages.2.0.conv1", "head")], ids=["all", "some"])
def test_simulated_and_real_int8_agree_on_digits(digits, sites):
    equal, simulated, real = agreement(digits, both(*sites), "test")
    assert equal > 0.99
    assert abs(simulated - real) <= 0.003
    assert real > 0.9


def test_ranges_reach_the_file(digits):
    policy = both(".")
    shaped = shape(digits, Candidate(arch={}, policy=policy))
    with torch.no_grad():
        for name, parameter in shaped.module.named_parameters():
            if name.endswith("ranges.output.high"):
                parameter.mul_(0.75)
    settled = shaped.settle(digits)
    exported = export(settled.module, TASK.input, opset=17)
    from dataclasses import replace

    receipt = Quantize().decide(replace(exported, learned=settled.ranges()), policy.of("quantize"), TASK, PROFILE)
    found = {
        key: span for entry in receipt.entries for key, span in entry.facts.get("model", {}).get("ranges", {}).items()
    }
    for site, ranges in settled.ranges().items():
        if "output" in ranges:
            assert list(ranges["output"]) in [list(span) for span in found.values()], site


def test_intact_weights_are_tuned_gently(digits):
    pruned = Rule(site="stages.0.0.conv1", op="prune", settings={"ratio": 0.5})
    sparse = Rule(site=".", op="sparsify", settings={"ratio": 0.5})
    rates = [
        rate(digits, shape(digits, Candidate(arch={}, policy=Policy(rules=rules))))
        for rules in ((), both(".").rules, (sparse, *both(".").rules), (pruned, *both(".").rules))
    ]
    assert rates == pytest.approx([0.002, 0.002, 0.01, 0.08])


def test_simulated_and_real_int8_agree_on_a_trained_resnet(monkeypatch):
    import os

    if not os.environ.get("AUTOCOMPRESS_DATA"):
        pytest.skip("AUTOCOMPRESS_DATA names no folder with CIFAR-10 and trained networks")
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    from cifar10 import Cifar, resnet

    class Part(Cifar):
        def arrays(self, split):
            return tuple(part[:2000] for part in super().arrays(split))

    task = Part(512)
    family = Foreign.of(resnet(20), task.input)
    work = Work(family, task, make_ops(("qat", "quantize")), family.build({}).eval(), (PROFILE,), epochs=1.0)
    equal, simulated, real = agreement(work, both("."), "selection")
    assert equal > 0.99
    assert abs(simulated - real) <= 0.003


class Forgetful(Qat):
    """Settles without removing what rounds a layer's output."""

    def settle(self, module, receipt):
        settled = super().settle(module, receipt)
        module.stem.conv.register_forward_hook(lambda _part, _inputs, output: output)
        return settled


class Sharing(Qat):
    """Settling a copy touches the module that trains on."""

    def enact(self, subject, receipt, tensors=None):
        self.last = super().enact(subject, receipt)
        return self.last

    def settle(self, module, receipt):
        with torch.no_grad():
            self.last.head.weight.zero_()
        return super().settle(module, receipt)


@pytest.mark.parametrize(("op", "message"), [(Forgetful(), "leaves hooks behind"), (Sharing(), "settl")])
def test_the_contract_check_sees_what_an_instrument_leaves(op, message):
    with pytest.raises(AssertionError, match=message):
        check_op(op, network(), EVERYWHERE, TASK, PROFILE)
