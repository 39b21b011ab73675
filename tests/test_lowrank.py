"""Low rank: the chain computes the truncated layer, receipts rebuild shapes, what does not pay is skipped."""

from __future__ import annotations

import copy
import json
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from autocompress import export
from autocompress.models.blocks import KINDS
from autocompress.models.convnet import ConvNet
from autocompress.models.trace import count
from autocompress.ops import Op, factors, lowrank
from autocompress.ops.chain import Split, cost, full_ranks, thin
from autocompress.ops.fit import moments
from autocompress.ops.lowrank import METHODS, LowRank
from autocompress.ops.whiten import Goal
from autocompress.tasks import InputSpec
from autocompress.tasks.digits import Digits
from autocompress.testing import check_op
from autocompress.types import Profile, Receipt, Rule, TrialFailure, UserError

BUILDER = ConvNet(arch={"resolution": 8, "width.0": 32, "width.1": 48, "width.2": 64})
TASK = Digits()
LEAVE = Profile(name="any")


class Fed:
    """A task of one input shape; its calibration inputs are coloured noise, so that they have principal directions."""

    name, metric = "fed", "accuracy"

    def __init__(self, *shape: int, images: int = 24) -> None:
        self.input, self.images = InputSpec(shape=shape), images

    def batches(self, split, size, *, limit=None, seed=None):
        generator = torch.Generator().manual_seed(3)
        channels = self.input.shape[0] if len(self.input.shape) > 1 else self.input.shape[-1]
        mix = torch.randn(channels, channels, generator=generator) / torch.arange(1, channels + 1)
        noise = torch.randn(min(self.images, limit or self.images), *self.input.shape, generator=generator)
        axis = 1 if len(self.input.shape) > 1 else -1
        coloured = torch.tensordot(noise, mix, ([axis], [0])).movedim(-1, axis) + 0.3
        yield from ((inputs, torch.zeros(len(inputs))) for inputs in coloured.split(size))

    def loss(self, outputs, targets):
        return outputs.square().mean()

    def quality(self, predict, split):
        raise NotImplementedError


def rules(rank: float, *sites: str, **more) -> list[Rule]:
    return [Rule(site=site, op="lowrank", settings={"rank": rank, **more}) for site in sites]


def through_json(receipt: Receipt) -> Receipt:
    return Receipt.model_validate_json(json.dumps(json.loads(receipt.model_dump_json())))


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def split_by(module: nn.Module, task, *asked: Rule) -> nn.Module:
    """A factorised copy."""
    tensors = {}
    receipt = LowRank().decide(module, asked, task, LEAVE, tensors)
    assert [entry.why for entry in receipt.entries if entry.status == "skipped"] == []
    return LowRank().enact(copy.deepcopy(module), through_json(receipt), tensors).eval()


KINDS_OF_LAYER = [
    (nn.Conv2d(12, 20, 3, stride=2, padding=1), (12, 9, 9)),
    (nn.Conv2d(12, 20, 1, bias=False), (12, 5, 5)),
    (nn.Conv2d(12, 20, 3, padding=2, dilation=2, padding_mode="reflect"), (12, 9, 9)),
    (nn.Conv2d(12, 20, (3, 5), stride=(2, 1), padding=(0, 2), padding_mode="circular"), (12, 9, 9)),
    (nn.Conv2d(12, 20, (2, 4), padding="same"), (12, 9, 8)),
    (nn.Conv2d(12, 20, (1, 7), padding=(0, 3), bias=False), (12, 9, 9)),
    (nn.Conv2d(12, 20, 1, padding=1, stride=2), (12, 5, 5)),
    (nn.Conv1d(12, 20, 5, stride=2, padding=2), (12, 16)),
    (nn.Linear(40, 24), (40,)),
    (nn.Linear(40, 24, bias=False), (7, 40)),
]
NAMES = [
    "strided", "1x1", "dilated", "oblong", "same", "row", "padded-1x1", "conv1d", "linear", "tokens",
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("layer", "shape"), KINDS_OF_LAYER, ids=NAMES)
@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel:UserWarning")  # torch says it once
def test_the_chain_computes_the_layer_that_its_weights_multiply_to(layer, shape, method):
    module, task, x = nn.Sequential(layer), Fed(*shape), torch.randn(2, *shape)
    tensors = {}
    receipt = LowRank().decide(module, rules(0.3, "0", method=method), task, LEAVE, tensors)
    assert receipt.entries[0].status == "done", receipt.entries[0].why
    small = LowRank().enact(copy.deepcopy(module), through_json(receipt), tensors)
    whole = copy.deepcopy(layer)
    with torch.no_grad():
        whole.weight.copy_(factors.chained([part.weight for part in small[0]]))
        torch.testing.assert_close(small(x), whole(x), atol=2e-5, rtol=1e-4)
    assert module[0] is layer
    assert count(small, x)[0] < count(module, x)[0] or layer.stride != 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("layer", "shape"), KINDS_OF_LAYER, ids=NAMES)
def test_at_full_rank_nothing_is_lost(layer, shape, method):
    method = method if layer.weight.ndim == 4 and layer.weight[0, 0].numel() > 1 else "svd"
    ranks = full_ranks(layer.weight.shape, method)
    weight = layer.weight.detach()
    chain = {"svd": factors.pair, "spatial": factors.spatial, "tucker": factors.tucker}[method](weight, *ranks[::-1])
    torch.testing.assert_close(factors.chained(chain), weight, atol=1e-5, rtol=1e-4)
    split = Split(layer="0", shape=weight.shape, rank=ranks[0], method=method, inner=ranks[-1])
    assert [tuple(part.weight.shape) for part in thin(layer, split)] == [tuple(one.shape) for one in chain]


def test_truncation_is_eckart_young():
    weight = torch.randn(20, 12, 3, 3)
    u, s, v = torch.linalg.svd(weight.double().flatten(1), full_matrices=False)
    best = ((u[:, :5] * s[:5]) @ v[:5]).reshape(weight.shape).float()
    torch.testing.assert_close(factors.chained(factors.pair(weight, 5)), best, atol=1e-5, rtol=1e-4)
    tall = torch.randn(50, 12)
    u, s, v = torch.linalg.svd(tall.double(), full_matrices=False)
    torch.testing.assert_close(
        factors.chained(factors.pair(tall, 5)), ((u[:, :5] * s[:5]) @ v[:5]).float(), atol=1e-5, rtol=1e-4
    )


def test_iteration_improves_the_hosvd():
    weight = torch.randn(16, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    by_input, by_output = weight.transpose(0, 1).flatten(1), weight.flatten(1)
    into, out = (factors.eigen(side @ side.T)[1][:, :4] for side in (by_input, by_output))
    plain = torch.einsum("oihw,ir,jr,os,ts->tjhw", weight, into, into, out, out)
    fitted = factors.chained(factors.tucker(weight, 4, 4))
    assert (weight - fitted).norm() < (weight - plain).norm()


def test_a_layer_of_low_rank_loses_nothing():
    layer = nn.Conv2d(16, 32, 3, padding=1)
    with torch.no_grad():
        layer.weight.copy_((torch.randn(32, 4) @ torch.randn(4, 144)).reshape(32, 16, 3, 3))
    module, x = nn.Sequential(layer), torch.randn(2, 16, 6, 6)
    small = split_by(module, Fed(16, 6, 6), *rules(0.125, "0"))
    assert small[0][0].out_channels == 4
    assert torch.allclose(small(x), module(x), atol=1e-4)


def test_a_zero_layer_stays_zero():
    layer = nn.Conv2d(8, 8, 3)
    nn.init.zeros_(layer.weight)
    for method in METHODS:
        for data in (False, True):
            small = split_by(nn.Sequential(layer), Fed(8, 6, 6), *rules(0.25, "0", method=method, data=data))
            assert torch.allclose(small(torch.randn(1, 8, 6, 6)), layer.bias.detach()[:, None, None].expand(8, 4, 4))


# --- data -----------------------------------------------------------------------------------------------------------


def missed(module: nn.Module, small: nn.Module, task) -> float:
    """Square error of outputs on the calibration inputs, relative."""
    with torch.no_grad():
        pairs = [(module(x), small(x)) for x, _ in task.batches("calibration", 8)]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(4, 20), st.integers(4, 20), st.sampled_from([(1, 1), (3, 3), (1, 3), (3, 2)]), st.integers(1, 2),
    st.sampled_from(list(METHODS)), st.booleans(), st.floats(0.1, 0.5), st.integers(0, 99),
)  # fmt: skip
def test_with_data_the_outputs_are_never_worse(inputs, outputs, kernel, stride, method, bias, share, seed):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, padding=(kernel[0] // 2, 0), bias=bias))
    task = Fed(inputs, 4, 4)  # no more positions than a fit reads of an image: all are in the moments
    asked = [rules(share, "0", method=method, data=data) for data in (False, True)]
    if LowRank().decide(module, asked[0], task, LEAVE).entries[0].status == "skipped":
        return
    plain, seeing = (missed(module, split_by(module, task, *one), task) for one in asked)
    assert seeing <= plain * (1 + 1e-4) + 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_with_data_the_outputs_are_much_better_where_inputs_have_directions(method):
    torch.manual_seed(1)
    module, task = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1)), Fed(24, 8, 8)
    share = {"svd": 0.4, "spatial": 0.25, "tucker": 0.5}[method]
    plain, seeing = (
        missed(module, split_by(module, task, *rules(share, "0", method=method, data=data)), task)
        for data in (False, True)
    )
    assert seeing < 0.7 * plain


def test_the_pair_with_data_is_the_best_there_is():
    torch.manual_seed(0)
    module, task = nn.Sequential(nn.Linear(30, 20, bias=False)), Fed(30, images=200)
    x = torch.cat([inputs for inputs, _ in task.batches("calibration", 50)]).double()
    answers = x @ module[0].weight.detach().double().T
    s = torch.linalg.svdvals(answers)
    best = float((s[6:] ** 2).sum() / (s**2).sum())
    small = split_by(module, task, *rules(0.3, "0", data=True))
    assert missed(module, small, task) == pytest.approx(best, rel=0.02)


def test_few_rows_and_silent_channels_leave_the_weight_its_say():
    """A linear layer of more inputs than calibration examples, half of them always zero."""
    torch.manual_seed(0)
    module, task = nn.Sequential(nn.Linear(96, 64)), Fed(96, images=16)
    batches = task.batches
    silent = torch.arange(96) < 48
    task.batches = lambda *a, **k: ((x * silent, y) for x, y in batches(*a, **k))
    small = split_by(module, task, *rules(0.5, "0", data=True))
    assert missed(module, small, task) < 1e-3
    x = torch.randn(500, 96)
    with torch.no_grad():
        plain = split_by(module, task, *rules(0.5, "0"))
        bias = module[0].bias
        error, least = (
            (net(x) - module(x)).square().sum() / (module(x) - bias).square().sum() for net in (small, plain)
        )
    assert error < 2 * least  # elsewhere it is not arbitrary


def test_not_a_number_in_the_calibration_data_leaves_the_plain_factors():
    module, task = nn.Sequential(nn.Linear(16, 16)), Fed(16)
    batches = task.batches
    task.batches = lambda *a, **k: ((x * torch.nan, y) for x, y in batches(*a, **k))
    small, plain = (split_by(module, task, *rules(0.25, "0", data=data)) for data in (True, False))
    assert torch.equal(small[0][0].weight, plain[0][0].weight)
    assert small[0][1].bias.isfinite().all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(12, 24), (5, 12)), (nn.Conv1d(12, 24, 3), (12, 9)), (nn.Conv2d(12, 24, 1), (12, 5, 5))],
)
def test_both_ways_to_the_optimum_agree(layer, shape, bias, monkeypatch):
    """Moments of inputs and of outputs; more outputs than inputs."""
    layer = copy.deepcopy(layer)
    if not bias:
        layer.bias = None
    module, task = nn.Sequential(layer), Fed(*shape)
    errors = []
    for choice in (True, False) if layer.weight.ndim != 3 else (True,):
        monkeypatch.setattr(lowrank, "by_answers", lambda split, choice=choice: choice)
        errors.append(missed(module, split_by(module, task, *rules(0.3, "0", data=True)), task))
    plain = missed(module, split_by(module, task, *rules(0.3, "0")), task)
    assert errors == pytest.approx([errors[0]] * len(errors), rel=1e-3)
    assert errors[0] < plain


def test_the_goal_measures_what_it_says():
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3, padding=1, bias=False)
    module, task = nn.Sequential(layer), Fed(6, 4, 4)
    found = moments(module, ["0"], task)["0"]
    small = split_by(module, task, *rules(0.3, "0"))
    error = Goal.of(layer.weight.detach(), found, biased=False).error([part.weight.detach() for part in small[0]])
    assert error / float(found.yy.sum()) == pytest.approx(missed(module, small, task), rel=1e-3)


# --- whole networks -------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_contract_and_the_file(method, data):
    torch.manual_seed(0)
    module = BUILDER.build({}).eval()
    asked = rules(0.25, ".", method=method, data=data)
    receipt = check_op(LowRank(), module, asked, TASK, LEAVE)
    methods = {split.get("method", "svd") for split in receipt.entries[0].facts["splits"]}
    assert methods == {"svd", method}  # the shortcuts are 1x1
    tensors = {}
    assert LowRank().decide(module, asked, TASK, LEAVE, tensors) == receipt
    small = LowRank().enact(module, through_json(receipt), tensors)
    model = export.compose(export.export(small, TASK.input, opset=17))
    assert export.parity(small, model, torch.rand(4, 1, 8, 8).numpy()) < 1e-4


def test_enact_draws_no_random_number():
    module = nn.Sequential(nn.Conv2d(16, 32, 3))
    receipt = LowRank().decide(module, rules(0.25, "0"), Fed(16, 8, 8), LEAVE)
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


def test_types_frozen_weights_and_modes_are_kept():
    module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).double()
    module[0].requires_grad_(False)
    module[0].eval()
    task = Fed(16)
    task.input = InputSpec(shape=(16,), dtype="float64")
    small = split_by(module, task, *rules(0.25, "."))
    assert {p.dtype for p in small.parameters()} == {torch.float64}
    assert [p.requires_grad for p in small.parameters()] == [False] * 3 + [True] * 3
    half = factors.pair(torch.randn(16, 16).bfloat16().float(), 4)
    assert half[0].dtype == torch.float32


def test_spectra_are_remembered_by_content_and_forgotten_by_size():
    spectra, weight = factors.Spectra(most=40_000), torch.randn(64, 64)
    first = factors.pair(weight, 8, spectra)
    assert len(spectra) == 1
    again = factors.pair(weight.clone(), 16, spectra)
    assert len(spectra) == 1
    assert len(again[0]) == 16
    torch.testing.assert_close(again[1][:, :8], first[1])
    for seed in range(5):
        factors.pair(torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)), 8, spectra)
        assert spectra.bytes <= 40_000
    assert len(spectra) == 2
    assert torch.equal(factors.pair(weight, 8, spectra)[0], first[0])


# --- what is left alone ---------------------------------------------------------------------------------------------


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


class Scaled(nn.Linear):
    def forward(self, x):
        return functional.linear(x, 2 * self.weight, self.bias)


class Odd(nn.Module):
    """Layers that are used in every way that forbids replacing them, and one in the plain way."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(16, 16)
        self.read = nn.Linear(16, 16)  # its weight is used, it is never called
        self.both = nn.Linear(16, 16)  # called, and asked for its features
        self.idle = nn.Linear(16, 16)  # training only
        self.tied = nn.Linear(16, 16, bias=False)
        self.embedding = nn.Embedding(16, 16)
        self.tied.weight = self.embedding.weight
        self.twice = nn.Linear(16, 16)
        self.alias = self.twice
        self.scaled = Scaled(16, 16)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.hooked = nn.Linear(16, 16)
        self.hooked.register_forward_hook(lambda module, inputs, outputs: outputs + 1)
        self.broken = nn.Linear(16, 16)
        nn.init.constant_(self.broken.weight, torch.nan)

    def forward(self, x):
        x = functional.linear(self.plain(x), self.read.weight)
        x = self.both(x) * self.both.in_features**-0.5
        if self.training:
            x = self.idle(x)
        return self.hooked(self.normed(self.scaled(self.alias(self.twice(self.tied(x)))))) + 0 * self.broken(x)


@pytest.mark.parametrize(
    ("site", "why"),
    [
        ("read", "used by its parent in a way"),
        ("both", "used by its parent in a way.*in_features"),
        ("idle", "not called in inference"),
        ("tied", "tied.weight is shared with embedding.weight"),
        ("twice", "shared with"),
        ("scaled", "Scaled, which computes with another weight"),
        ("normed", "computes with another weight"),
        ("hooked", "has hooks"),
        ("broken", "not finite"),
    ],
)
def test_a_layer_that_no_chain_can_stand_for_is_left_alone(site, why):
    module = Odd()
    alone = LowRank().decide(module, rules(0.25, site), Fed(16), LEAVE)
    assert alone.entries[0].status == "skipped"
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(alone.entries[0].why)
    assert isinstance(module.read, nn.Linear)


def test_among_layers_that_cannot_the_others_are_split():
    module = Odd().train()
    receipt = LowRank().decide(module, rules(0.25, "."), Fed(16), LEAVE)
    assert [split["layer"] for split in receipt.entries[0].facts["splits"]] == ["plain"]
    assert module.training
    assert not any(isinstance(part, nn.Sequential) for part in module.modules())
    small = LowRank().enact(module, receipt).eval()
    assert small(torch.zeros(2, 16)).shape == (2, 16)


def test_attention_of_torch_is_left_alone():
    module = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    receipt = LowRank().decide(module, rules(0.25, "self_attn.out_proj", "linear1"), Fed(5, 16), LEAVE)
    assert receipt.entries[0].status == "skipped"
    assert "out_proj" in receipt.entries[0].why


def test_a_network_that_is_one_layer_and_one_that_does_not_run():
    receipt = LowRank().decide(nn.Linear(16, 16), rules(0.25, "."), Fed(16), LEAVE)
    assert receipt.entries[0].why == "it is the whole network"
    with pytest.raises(TrialFailure, match="does not run on the task's input: RuntimeError"):
        LowRank().decide(nn.Sequential(nn.Linear(16, 16)), rules(0.25, "."), Fed(15), LEAVE)


def test_ranks_are_multiples_and_none_below():
    module = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64, 9))
    profile = Profile(name="wide", channel_multiple=16)
    receipt = LowRank().decide(module, rules(0.4, "0", "2"), Fed(64, 3, 3), profile)
    assert receipt.entries[0].facts["splits"][0]["rank"] == 32
    assert receipt.entries[1].why == "rank 3.6 of 2 is less than half the profile's channel multiple 16"
    receipt = LowRank().decide(module, rules(0.4, "0", method="tucker"), Fed(64, 3, 3), profile)
    split = Split.model_validate(receipt.entries[0].facts["splits"][0])
    assert (split.rank, split.inner) == (32, 32)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 24), st.integers(1, 24), st.sampled_from([1, 3, (1, 5)]), st.integers(1, 2),
    st.sampled_from(list(METHODS)), st.floats(0.01, 0.99), st.integers(1, 8),
)  # fmt: skip
def test_a_split_always_costs_less_than_its_layer(inputs, outputs, kernel, stride, method, share, multiple):
    padding = (0, 2) if kernel == (1, 5) else kernel // 2
    layer, example = nn.Conv2d(inputs, outputs, kernel, stride, padding), torch.zeros(1, inputs, 8, 9)
    module = nn.Sequential(layer)
    profile = Profile(name="p", channel_multiple=multiple)
    receipt = LowRank().decide(module, rules(share, "0", method=method), Fed(inputs, 8, 9), profile)
    for entry in receipt.entries:
        for raw in entry.facts.get("splits", ()):
            split = Split.model_validate(raw)
            full = full_ranks(split.shape, split.method)
            assert all(1 <= rank <= most for rank, most in zip((split.rank, split.inner), full, strict=False))
            assert cost(split, (stride, stride)) < layer.weight.numel()
            assert 0 < entry.achieved["macs"] < 1
            small = LowRank().enact(copy.deepcopy(module), receipt)
            assert count(small, example)[0] < count(module, example)[0] or stride > 1


@pytest.mark.parametrize("value", [0.0, 1.5, -1, "half", True])
def test_a_bad_rank_is_the_users_error(value):
    with pytest.raises(UserError, match="no share in"):
        LowRank().decide(BUILDER.build({}), [Rule(site="head", op="lowrank", settings={"rank": value})], TASK, LEAVE)


def test_misspelt_settings_and_rank_one():
    with pytest.raises(UserError, match="unknown setting 'ranks'"):
        LowRank().decide(BUILDER.build({}), [Rule(site="head", op="lowrank", settings={"ranks": 0.5})], TASK, LEAVE)
    with pytest.raises(UserError, match="method 'qr'; choose one of svd, spatial, tucker"):
        LowRank().decide(BUILDER.build({}), rules(0.5, "head", method="qr"), TASK, LEAVE)
    with pytest.raises(UserError, match="data 'yes'; choose true or false"):
        LowRank().decide(BUILDER.build({}), rules(0.5, "head", data="yes"), TASK, LEAVE)
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
    receipt = LowRank().decide(module, rules(0.25, "0"), Fed(16), LEAVE, tensors)
    assert set(tensors) == {"0/0.weight", "0/1.weight", "0/1.bias"}
    with pytest.raises(UserError, match=r"'0/0\.weight' is missing"):
        LowRank().enact(copy.deepcopy(module), receipt, {})
    with pytest.raises(UserError, match=r"0/1\.bias"):
        LowRank().enact(copy.deepcopy(module), receipt, {**tensors, "0/1.bias": torch.zeros(3)})


def test_a_wide_network_is_decided_in_time_and_again_at_once():
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Conv2d(256, 256, 3, padding=1) for _ in range(6))).eval()
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        LowRank().decide(module, rules(0.25, ".", method="tucker"), Fed(256, 4, 4), LEAVE, {})
        seconds.append(time.perf_counter() - began)
    assert seconds[1] < 0.6 * seconds[0]
