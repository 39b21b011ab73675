"""Low rank: the pair computes the truncated layer, receipts rebuild shapes, what does not pay is skipped."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autocompress.models.blocks import KINDS
from autocompress.models.convnet import ConvNet
from autocompress.models.trace import count
from autocompress.ops import Op
from autocompress.ops.lowrank import LowRank, Split, cost
from autocompress.tasks.digits import Digits
from autocompress.types import Profile, Receipt, Rule, UserError

BUILDER = ConvNet(arch={"resolution": 8, "width.0": 32, "width.1": 48, "width.2": 64})
TASK = Digits()
LEAVE = Profile(name="any")


def rules(rank: float, *sites: str) -> list[Rule]:
    return [Rule(site=site, op="lowrank", settings={"rank": rank}) for site in sites]


def through_json(receipt: Receipt) -> Receipt:
    return Receipt.model_validate_json(json.dumps(json.loads(receipt.model_dump_json())))


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(12, 20, 3, stride=2, padding=1), (2, 12, 9, 9)),
        (nn.Conv2d(12, 20, 1, bias=False), (2, 12, 5, 5)),
        (nn.Conv2d(12, 20, 3, padding=2, dilation=2, padding_mode="reflect"), (2, 12, 9, 9)),
        (nn.Linear(40, 24), (3, 40)),
    ],
    ids=["strided", "1x1", "dilated", "linear"],
)
def test_the_pair_computes_the_truncated_layer(layer, shape):
    torch.manual_seed(0)
    module, tensors = nn.Sequential(layer), {}
    receipt = LowRank().decide(module, rules(0.25, "0"), TASK, LEAVE, tensors)
    rank = receipt.entries[0].facts["splits"][0]["rank"]
    u, s, v = torch.linalg.svd(layer.weight.detach().double().flatten(1), full_matrices=False)
    truncated = copy.deepcopy(layer)
    with torch.no_grad():
        truncated.weight.copy_((u[:, :rank] * s[:rank] @ v[:rank]).reshape(layer.weight.shape))
        x = torch.randn(shape)
        expected, found = truncated(x), LowRank().enact(copy.deepcopy(module), through_json(receipt), tensors)(x)
    assert torch.allclose(expected, found, atol=1e-4)
    assert module[0] is layer


def test_a_layer_of_low_rank_loses_nothing():
    layer = nn.Conv2d(16, 32, 3, padding=1)
    with torch.no_grad():
        layer.weight.copy_((torch.randn(32, 4) @ torch.randn(4, 144)).reshape(32, 16, 3, 3))
    module, tensors, x = nn.Sequential(layer), {}, torch.randn(2, 16, 6, 6)
    receipt = LowRank().decide(module, rules(0.125, "0"), TASK, LEAVE, tensors)
    small = LowRank().enact(copy.deepcopy(module), receipt, tensors)
    assert small[0][0].out_channels == 4
    assert torch.allclose(small(x), module(x), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_split_where_it_pays_and_rebuilt_from_json(kind):
    arch = {f"kind.{stage}": kind for stage in range(3)}
    module, tensors = BUILDER.build(arch).eval(), {}
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    receipt = LowRank().decide(module, rules(0.25, "."), TASK, LEAVE, tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    macs, _ = count(module, torch.zeros(1, 1, 8, 8))
    small = LowRank().enact(module, through_json(receipt), tensors)
    assert count(small, torch.zeros(1, 1, 8, 8))[0] < macs
    assert small(torch.rand(3, 1, 8, 8)).shape == (3, 10)
    assert not small.training
    assert all(not part.training for part in small.modules())
    bare = LowRank().enact(BUILDER.build(arch), through_json(receipt))
    assert shapes(bare) == shapes(small)
    bare.load_state_dict(small.state_dict())
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(bare.eval()(x), small(x))


def test_enact_draws_no_random_number():
    module = nn.Sequential(nn.Conv2d(16, 32, 3))
    receipt = LowRank().decide(module, rules(0.25, "0"), TASK, LEAVE)
    before = torch.random.get_rng_state()
    small = LowRank().enact(module, receipt)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(not parameter.detach().any() for name, parameter in small.named_parameters() if "weight" in name)


def test_sites_stay_prefixes_of_their_leaves():
    module = BUILDER.build({})
    receipt = LowRank().decide(module, rules(0.25, "stages.0.0.conv1"), TASK, LEAVE)
    names = dict(LowRank().enact(module, receipt).named_modules())
    assert isinstance(names["stages.0.0.conv1.0"], nn.Conv2d)
    assert names["stages.0.0.conv1.1"].kernel_size == (1, 1)


@pytest.mark.parametrize(
    ("arch", "rank", "site", "why"),
    [
        ({}, 0.95, "stages.0.0.conv1", "times the layer"),
        ({"kind.0": "separable"}, 0.25, "stages.0.0.conv1.0", "depthwise convolution"),
        ({"kind.0": "shuffle"}, 0.25, "stages.0.0.conv1", "grouped convolution"),
        ({"depth.0": 1}, 0.25, "stages.0.1.conv1", "no layer is there"),
    ],
)
def test_what_does_not_pay_is_skipped_with_its_reason(arch, rank, site, why):
    receipt = LowRank().decide(BUILDER.build(arch), rules(rank, site), TASK, LEAVE)
    assert receipt.entries[0].status == "skipped"
    assert why in receipt.entries[0].why


def test_ranks_are_multiples_where_that_leaves_any():
    module = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Linear(64, 9))
    profile = Profile(name="wide", channel_multiple=16)
    receipt = LowRank().decide(module, rules(0.4, "0", "1"), TASK, profile)
    ranks = {entry.site: entry.facts["splits"][0]["rank"] for entry in receipt.entries}
    assert ranks == {"0": 32, "1": 4}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.sampled_from([1, 3]), st.floats(0.01, 0.99), st.integers(1, 8))
def test_a_split_always_costs_less_than_its_layer(inputs, outputs, kernel, share, multiple):
    module = nn.Sequential(nn.Conv2d(inputs, outputs, kernel))
    receipt = LowRank().decide(module, rules(share, "0"), TASK, Profile(name="p", channel_multiple=multiple))
    for entry in receipt.entries:
        for raw in entry.facts.get("splits", ()):
            split = Split.model_validate(raw)
            assert 1 <= split.rank <= min(outputs, inputs * kernel * kernel)
            assert cost(split) < outputs * inputs * kernel * kernel
            assert 0 < entry.achieved["macs"] < 1


@pytest.mark.parametrize("value", [0.0, 1.5, -1, "half", True])
def test_a_bad_rank_is_the_users_error(value):
    with pytest.raises(UserError, match="no share in"):
        LowRank().decide(BUILDER.build({}), [Rule(site="head", op="lowrank", settings={"rank": value})], TASK, LEAVE)


def test_a_misspelt_setting_and_rank_one():
    with pytest.raises(UserError, match="unknown setting 'ranks'"):
        LowRank().decide(BUILDER.build({}), [Rule(site="head", op="lowrank", settings={"ranks": 0.5})], TASK, LEAVE)
    assert LowRank().decide(BUILDER.build({}), rules(1.0, "head"), TASK, LEAVE) == Receipt(op="lowrank")
    assert isinstance(LowRank(), Op)


def test_a_layer_is_split_once():
    receipt = LowRank().decide(BUILDER.build({}), rules(0.25, "stages.0", "stages.0.0.conv1"), TASK, LEAVE)
    assert [entry.status for entry in receipt.entries] == ["done", "skipped"]
    assert "earlier rule" in receipt.entries[1].why


def test_a_receipt_of_another_network_is_refused_with_site_and_difference():
    receipt = LowRank().decide(BUILDER.build({}), rules(0.25, "stages.1.1.conv1"), TASK, LEAVE)
    with pytest.raises(UserError, match=r"site stages.1.1.conv1: .*\(32, 32, 3, 3\) here and was \(48, 48, 3, 3\)"):
        LowRank().enact(BUILDER.build({"width.1": 32}), receipt)
    with pytest.raises(UserError, match="which is not there"):
        LowRank().enact(BUILDER.build({"depth.1": 1}), receipt)
    with pytest.raises(UserError, match="Sequential here"):
        LowRank().enact(BUILDER.build({"kind.1": "separable"}), receipt)


def test_missing_or_foreign_tensors_are_refused():
    module, tensors = nn.Sequential(nn.Linear(16, 16)), {}
    receipt = LowRank().decide(module, rules(0.25, "0"), TASK, LEAVE, tensors)
    assert set(tensors) == {"0/first.weight", "0/second.weight", "0/second.bias"}
    with pytest.raises(UserError, match=r"'0/first\.weight' is missing"):
        LowRank().enact(copy.deepcopy(module), receipt, {})
    with pytest.raises(UserError, match=r"0/second\.bias"):
        LowRank().enact(copy.deepcopy(module), receipt, {**tensors, "0/second.bias": torch.zeros(3)})
