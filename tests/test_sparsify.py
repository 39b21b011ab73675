"""Zeros by magnitude: how many, where, when, and that they reach the file."""

import copy
import json

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import nn

from autocompress.export import compose, export
from autocompress.models.convnet import ConvNet
from autocompress.ops import TrainOp, masks
from autocompress.ops.sparsify import RAMP, SORTED_OUT, STRENGTH, Plan, Sparsify
from autocompress.tasks.digits import Digits
from autocompress.testing import check_op
from autocompress.train import Training
from autocompress.types import Profile, Receipt, Rule, UserError

TASK, PROFILE, OP = Digits(), Profile(name="any"), Sparsify()
ARCH = {"width.0": 16, "width.1": 32, "width.2": 32, "depth.0": 1, "depth.1": 1, "depth.2": 1, "resolution": 8}


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ConvNet().build(ARCH)


def rule(site: str = ".", **asked: object) -> Rule:
    return Rule(site=site, op="sparsify", settings=asked)


def zeros(module: nn.Module, name: str) -> float:
    return float((module.get_submodule(name).weight == 0).float().mean())


def train(module: nn.Module, receipt: Receipt, epochs: float = 0.5, **asked: object) -> Training:
    training = Training(module, TASK, epochs, 0, instruments=((OP, receipt),), **asked)
    training.run_to(1.0)
    return training


@pytest.mark.parametrize(
    "asked",
    [
        {"ratio": 0.7},
        {"ratio": 0.7, "scope": "global", "schedule": "gradual"},
        {"ratio": 0.5, "pattern": "2:4"},
        {"ratio": 0.5, "pattern": "4:8", "scope": "global", "schedule": "gradual", "penalty": "l1"},
        {"ratio": 0.5, "penalty": "group"},
    ],
    ids=lambda asked: "-".join(map(str, asked.values())),
)
def test_keeps_the_contract(asked):
    assert isinstance(OP, TrainOp)
    receipt = check_op(OP, network(), [rule(**asked)], TASK, PROFILE)
    assert receipt.entries[0].status == "done"


@given(st.integers(0, 10**6), st.floats(0, 0.99), st.sampled_from(sorted(masks.PATTERNS)))
@settings(max_examples=40, deadline=None)
def test_what_goes_is_the_smallest_and_as_much_as_asked(seed, sparsity, pattern):
    rng = torch.Generator().manual_seed(seed)
    weights = {"a": torch.randn(6, 8, 3, 3, generator=rng), "b": torch.randn(5, 16, generator=rng)}
    kept = masks.decide(weights, pattern, sparsity)
    total = sum(weight.numel() for weight in weights.values())
    gone = sum(int((~mask).sum()) for mask in kept.values())
    cell = masks.PATTERNS[pattern]
    most = total - 2 if cell is None else total // 2
    assert gone == min(round(sparsity * total), most)
    size = torch.cat([weights[name].abs().flatten() for name in kept])
    stays = torch.cat([mask.flatten() for mask in kept.values()])
    if cell is None and 0 < gone < most:
        held = torch.cat([weights[name].abs().flatten() == weights[name].abs().max() for name in kept])  # stay anyway
        assert size[~stays].max() <= size[stays & ~held].min()
    if cell is not None and gone == most:
        for name, mask in kept.items():
            cells = mask.movedim(1, -1).reshape(-1, cell[1])
            assert (cells.sum(1) == cell[0]).all()
            values = weights[name].abs().movedim(1, -1).reshape(-1, cell[1])
            largest = values.where(cells, torch.inf).amin(1) >= values.where(~cells, -torch.inf).amax(1)
            assert largest.all()


def test_one_layer_never_loses_everything():
    kept = masks.decide({"large": torch.full((4, 4), 9.0), "small": torch.full((4, 4), 0.1)}, "unstructured", 0.9)
    assert kept["small"].sum() >= 1
    assert kept["large"].sum() >= 1


def test_a_global_ranking_spares_the_layers_with_large_weights():
    module = network()
    with torch.no_grad():
        module.stem.conv.weight.mul_(100)
    for scope in ("layer", "global"):
        copied = copy.deepcopy(module)
        receipt = OP.decide(copied, [rule(ratio=0.5, scope=scope)], TASK, PROFILE)
        settled = OP.settle(OP.enact(copied, receipt), receipt)
        assert settled.entries[0].achieved["ratio"] == pytest.approx(0.5, abs=0.01)
        stem = settled.entries[0].facts["sparsity"]["stem.conv"]
        assert stem == pytest.approx(0.5, abs=0.01) if scope == "layer" else stem < 0.05


def test_gradual_follows_the_cubic_schedule():
    plan = Plan(ratio=0.8, schedule="gradual")
    assert plan.target(0) == 0
    assert plan.target(RAMP / 2) == pytest.approx(0.8 * (1 - 0.5**3))
    assert plan.target(RAMP) == plan.target(1) == 0.8
    steps = [plan.target(share / 100) for share in range(101)]
    assert steps == sorted(steps)
    module = network()
    receipt = OP.decide(module, [rule(ratio=0.8, schedule="gradual")], TASK, PROFILE)
    OP.enact(module, receipt)
    assert zeros(module, "stages.1.0.conv2") < 0.001
    for share in (RAMP / 2, 1.0):
        OP.advance(module, receipt, share)
        assert zeros(module, "stages.1.0.conv2") == pytest.approx(plan.target(share), abs=0.001)


@pytest.mark.parametrize("schedule", ["oneshot", "gradual"])
def test_what_training_leaves_is_sparse_also_in_the_file(schedule):
    module = network()
    names = dict(module.state_dict())
    receipt = OP.decide(module, [rule(ratio=0.7, schedule=schedule)], TASK, PROFILE)
    OP.enact(module, receipt)
    train(module, receipt, bf16=False)
    settled = OP.settle(module, receipt)
    assert list(module.state_dict()) == list(names)
    assert settled.entries[0].achieved["ratio"] == pytest.approx(0.7, abs=0.001)
    exported = export(module, TASK.input, opset=17)
    model = onnx.load_model_from_string(compose(exported))
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weighted = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    found = sum(int((values[node.input[1]] == 0).sum()) for node in weighted)
    weights = sum(values[node.input[1]].size for node in weighted)
    assert weights == sum(int(np.prod(shape)) for shape in settled.entries[0].facts["layers"].values())
    assert found / weights == pytest.approx(0.7, abs=0.001)


def test_two_of_four_along_the_input_channels_and_what_cannot_follow_is_said():
    module = network()
    receipt = OP.decide(module, [rule(ratio=0.5, pattern="2:4")], TASK, PROFILE)
    (entry,) = receipt.entries
    assert entry.facts["left"] == {"stem.conv": "its 1 input channels are no multiple of 4"}
    settled = OP.settle(OP.enact(module, receipt), receipt)
    assert settled.entries[0].achieved["ratio"] == 0.5
    weight = module.stages[1][0].conv2.weight.detach()
    assert ((weight.movedim(1, -1).reshape(-1, 4) != 0).sum(1) == 2).all()
    alone = OP.decide(network(), [rule("stem.conv", ratio=0.5, pattern="2:4")], TASK, PROFILE).entries[0]
    assert (alone.status, alone.why) == ("skipped", "stem.conv: its 1 input channels are no multiple of 4")


@pytest.mark.parametrize("kind", ["l1", "group"])
def test_a_penalty_starts_at_its_strength_shrinks_weights_and_ends_when_all_is_decided(kind):
    module = network()
    receipt = OP.decide(module, [rule(ratio=0.6, penalty=kind)], TASK, PROFILE)
    OP.enact(module, receipt)
    first = OP.penalty(module, receipt)
    assert first is not None
    assert float(first.detach()) == pytest.approx(STRENGTH, rel=1e-4)
    first.backward()
    assert all(module.get_submodule(name).weight.grad.abs().sum() > 0 for name in receipt.entries[0].facts["layers"])
    assert zeros(module, "head") == 0  # the penalty sorts out before anything is decided
    OP.advance(module, receipt, SORTED_OUT)
    assert OP.penalty(module, receipt) is None
    assert zeros(module, "head") == pytest.approx(0.6, abs=0.01)


def test_going_on_elsewhere_is_the_same_as_never_having_stopped():
    def prepared() -> tuple[Training, Receipt]:
        module = network()
        receipt = OP.decide(module, [rule(ratio=0.7, schedule="gradual", penalty="l1")], TASK, PROFILE)
        return Training(OP.enact(module, receipt), TASK, 1.0, 3, instruments=((OP, receipt),)), receipt

    whole, receipt = prepared()
    whole.run_to(1.0)
    first, _ = prepared()
    first.run_to(0.5)
    halfway = copy.deepcopy(first.module)
    assert 0.1 < OP.settle(halfway, receipt).entries[0].achieved["ratio"] < 0.699
    second = Training(OP.enact(network(seed=9), receipt), TASK, 1.0, 3, instruments=((OP, receipt),))
    second.load(first.state())
    second.run_to(1.0)
    assert second.state() == whole.state()


def test_bad_settings_and_sites_are_said():
    for wrong, message in (
        ({"ratio": 1.0}, "no share"),
        ({"ratio": 0.5, "pattern": "3:4"}, "choose one of unstructured, 2:4, 4:8"),
        ({"ratio": 0.5, "share": 1}, "unknown setting 'share'"),
    ):
        with pytest.raises(UserError, match=message):
            OP.decide(network(), [rule(**wrong)], TASK, PROFILE)
    twice = [rule(ratio=0.5), rule("head", ratio=0.5), rule("nowhere", ratio=0.5), rule("stem", ratio=0.0)]
    receipt = OP.decide(network(), twice, TASK, PROFILE)
    assert [entry.status for entry in receipt.entries] == ["done", "skipped", "skipped"]
    assert [entry.why for entry in receipt.entries[1:]] == ["an earlier rule has it", "no layer is there"]


def test_a_receipt_of_another_network_is_refused():
    receipt = OP.decide(network(), [rule(ratio=0.5)], TASK, PROFILE)
    other = ConvNet().build(ARCH | {"width.2": 48})
    with pytest.raises(UserError, match="another network"):
        OP.enact(other, Receipt.model_validate_json(json.dumps(receipt.model_dump())))
