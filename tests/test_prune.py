"""Coupled pruning: every block kind, receipts through JSON, shapes, equivalence, refusals; the example op."""

from __future__ import annotations

import copy
import json
import random
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from autocompress.models.attention import unfold
from autocompress.models.blocks import KINDS
from autocompress.models.convnet import ConvNet
from autocompress.models.coupling import Coupling
from autocompress.models.groups import choose
from autocompress.ops import Op
from autocompress.ops.importance import IMPORTANCES, learn_gradients, scores
from autocompress.ops.lowrank import LowRank
from autocompress.ops.prune import Prune, keep_count
from autocompress.tasks import InputSpec
from autocompress.tasks.digits import Digits
from autocompress.testing import check_op
from autocompress.types import Profile, Receipt, Rule, TrialFailure, UserError

ROOT = Path(__file__).parents[1]
SMALL = {"resolution": 8, "width.0": 32, "width.1": 48, "width.2": 64}
BUILDER = ConvNet(arch=SMALL)
TASK = Digits()
LEAVE = Profile(name="any")
SIXTEEN = Profile(name="wide", channel_multiple=16)


def rules(ratio: float, *sites: str, importance: str = "l1") -> list[Rule]:
    return [Rule(site=site, op="prune", settings={"ratio": ratio, "importance": importance}) for site in sites]


def through_json(receipt: Receipt) -> Receipt:
    return Receipt.model_validate_json(json.dumps(json.loads(receipt.model_dump_json())))


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def lively(module: nn.Module) -> nn.Module:
    """Batch-norm statistics that fit, so that outputs are of order one."""
    module.train()
    with torch.no_grad():
        for _ in range(3):
            module(torch.rand(16, 1, 8, 8))
    return module.eval()


def network(seed: int = 0, **arch) -> nn.Module:
    torch.manual_seed(seed)
    return lively(BUILDER.build(arch))


class Colour:
    """Digits' words for networks of another input shape."""

    name, metric = "colour", "accuracy"

    def __init__(self, *shape: int) -> None:
        self.input = InputSpec(shape=shape)


# --- every kind -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", ["l1", "l2", "taylor"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_cut_everywhere_and_rebuilt_from_json(kind, importance):
    arch = {f"kind.{stage}": kind for stage in range(3)}
    module = network(**arch)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    receipt = Prune().decide(module, rules(0.5, ".", importance=importance), TASK, LEAVE)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), "decide must leave its subject unchanged"
    assert all(parameter.grad is None for parameter in module.parameters())

    small = Prune().enact(module, through_json(receipt))
    assert small is module
    assert small.stem.conv.out_channels == 16
    assert small.head.in_features == 32
    assert small(torch.rand(3, 1, 8, 8)).shape == (3, 10)
    small.train()(torch.rand(4, 1, 8, 8)).sum().backward()
    untrained = Prune().enact(BUILDER.build(arch), through_json(receipt))
    assert shapes(untrained) == shapes(small)
    untrained.load_state_dict(small.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_cutting_dead_channels_changes_nothing(kind):
    """Silence half of the channels of every inner width: L1 must cut just those, and the outputs stay."""
    arch = {f"kind.{stage}": kind for stage in range(3)}
    module = network(**arch, **{"width.1": 64})
    with torch.no_grad():
        for stage in module.stages:
            for block in stage:
                width = block.bn1.num_features
                dead = torch.arange(width) % (width // 4) // 4 >= width // 32  # as many in every group and residue
                last = block.conv1 if isinstance(block.conv1, nn.Conv2d) else block.conv1[1]
                last.weight[dead] = 0
                block.bn1.weight[dead] = 0
                block.bn1.bias[dead] = 0
    sites = [f"stages.{stage}.{block}.conv1" for stage in range(3) for block in range(2)]
    receipt = Prune().decide(module, rules(0.5, *sites), TASK, LEAVE)
    x = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        expected = module(x)
        found = Prune().enact(copy.deepcopy(module), receipt)(x)
    assert all(entry.achieved["ratio"] == 0.5 for entry in receipt.entries)
    assert torch.allclose(expected, found, atol=1e-4 * float(expected.abs().max()))


def test_l1_keeps_the_loudest_channels():
    module = network()
    order = torch.randperm(32)
    with torch.no_grad():
        block = module.stages[0][0]
        for rank, channel in enumerate(order):
            block.conv1.weight[channel] = 0.01 * (rank + 1)
        block.conv2.weight.fill_(1.0)
        block.bn1.weight.fill_(1.0)
    receipt = Prune().decide(module, rules(0.75, "stages.0.0.conv1"), TASK, LEAVE)
    cut = receipt.entries[0].facts["cuts"][0]
    assert cut["places"][0] == "stages.0.0.conv1.weight:0"
    assert sorted(cut["kept"]) == sorted(order[24:].tolist())


def test_taylor_keeps_what_the_loss_feels():
    module = network()
    with torch.no_grad():
        module.stages[2][1].conv1.weight[::2] *= 50  # loud, and batch norm hides it
        module.stages[2][1].conv2.weight[:, ::2] = 0  # nobody listens
    kept = {}
    for importance in ("l1", "taylor"):
        receipt = Prune().decide(module, rules(0.5, "stages.2.1.conv1", importance=importance), TASK, LEAVE)
        kept[importance] = list(receipt.entries[0].facts["cuts"][0]["kept"])
    assert kept == {"l1": list(range(0, 64, 2)), "taylor": list(range(1, 64, 2))}


# --- what importance means ----------------------------------------------------------------------------------------


def kept(module, importance, site="stages.2.1.conv1", ratio=0.5):
    entry = Prune().decide(module, rules(ratio, site, importance=importance), TASK, LEAVE).entries[0]
    return entry.facts["cuts"][0]["kept"], entry


def test_bn_scale_keeps_the_widest_scales_and_falls_back_to_l1_without_any():
    module = network()
    with torch.no_grad():
        module.stages[2][1].bn1.weight[1::2] *= 5
    assert kept(module, "bn_scale")[0] == list(range(1, 64, 2))
    assert "importance" not in kept(module, "bn_scale")[1].facts
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 4), nn.Flatten()).eval()
    found = {
        importance: Prune().decide(plain, rules(0.5, "0", importance=importance), Colour(3, 6, 6), LEAVE).entries[0]
        for importance in ("bn_scale", "l1")
    }
    assert found["bn_scale"].facts["importance"] == {"0": "l1"}
    assert found["bn_scale"].facts["cuts"] == found["l1"].facts["cuts"]


def test_fpgm_cuts_filters_that_others_can_stand_for():
    module = network()
    with torch.no_grad():
        weight = module.stages[2][1].conv1.weight
        weight[::2] = 20 * weight[:1]  # loud, and all the same
    assert kept(module, "fpgm")[0] == list(range(1, 64, 2))
    assert kept(module, "l1")[0] == list(range(0, 64, 2))


def test_first_order_adds_up_what_taylor_counts_apart():
    module = network()
    learned = copy.deepcopy(module)
    learn_gradients(learned, TASK, 10**6)
    (group,) = Coupling(module, torch.zeros(1, 1, 8, 8)).at("stages.2.1.conv1")
    conv = learned.stages[2][1].conv1
    change = conv.weight * conv.weight.grad
    found = {importance: scores(learned, group, importance).values for importance in ("taylor", "first_order")}
    assert (found["taylor"] >= found["first_order"] - 1e-9).all()
    member = next(member for member in group.members if member.place.tensor == "stages.2.1.conv1.weight")
    alone = replace(group, members=(member,))
    assert torch.allclose(scores(learned, alone, "first_order").values, change.sum((1, 2, 3)).abs())
    assert torch.allclose(scores(learned, alone, "taylor").values, change.abs().sum((1, 2, 3)))


def test_filters_before_a_batch_norm_have_a_first_order_worth_of_their_own():
    """Through a batch's own statistics a filter's scale does nothing, and its gradients add up to zero."""
    module = network()
    stale = copy.deepcopy(module)
    for norm in (part for part in stale.modules() if isinstance(part, nn.BatchNorm2d)):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.fill_(3.0)
        norm.running_var.fill_(100.0)
    found = []
    for learned in (copy.deepcopy(module), stale):
        learn_gradients(learned, TASK, 10**6)
        weight = learned.stages[2][1].conv1.weight
        parts = (weight * weight.grad).detach()
        change = parts.sum((1, 2, 3)).abs()
        assert change.mean() > 0.01 * parts.abs().sum((1, 2, 3)).mean()
        assert not any(part.training for part in learned.modules())
        found.append(change)
    assert torch.allclose(*found, rtol=1e-3, atol=1e-7)  # inherited statistics that do not fit do not matter


def test_random_is_the_sites_own_and_repeatable():
    module = network()
    first, second = (kept(module, "random", site=f"stages.2.{block}.conv1")[0] for block in (0, 1))
    assert first == kept(network(7), "random", site="stages.2.0.conv1")[0]
    assert first != second


@pytest.mark.parametrize(("ratio", "left"), [(16 / 64, [16, 32]), (0.97, [4, 4])])
def test_global_ranking_takes_where_least_is_lost_and_leaves_a_tenth(ratio, left):
    module = network()
    with torch.no_grad():
        block = module.stages[0][0]
        for quiet in (block.conv1.weight[::2], block.bn1.weight[::2], block.conv2.weight[:, ::2]):
            quiet.mul_(1e-3)
    rule = Rule(site="stages.0", op="prune", settings={"ratio": ratio, "scope": "global"})
    receipt = Prune().decide(module, [rule], TASK, LEAVE)
    small = Prune().enact(module, receipt)
    assert [conv.out_channels for conv in (block.conv1, module.stages[0][1].conv1)] == left
    assert block.conv2.out_channels == 32  # the stream begins before the stage
    assert receipt.entries[0].achieved == {"ratio": (64 - sum(left)) / 64, "kept": sum(left), "of": 64}
    assert small(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_global_ranking_leaves_a_channel_multiple():
    rule = Rule(site=".", op="prune", settings={"ratio": 0.95, "scope": "global"})
    small = Prune().enact(network(), Prune().decide(network(), [rule], TASK, SIXTEEN))
    assert {part.num_features for part in small.modules() if isinstance(part, nn.BatchNorm2d)} == {16}


# --- what a rule may ask ------------------------------------------------------------------------------------------


def test_the_op_follows_the_protocol_and_zero_asks_nothing():
    assert isinstance(Prune(), Op)
    assert Prune().params == {"ratio": 0.0, "importance": "l1", "scope": "group", "schedule": "oneshot"}
    assert Prune().decide(network(), rules(0.0, "stem.conv"), TASK, LEAVE) == Receipt(op="prune")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ratio": 1.0}, "ratio 1.0 is no share"),
        ({"ratio": -0.5}, "ratio -0.5"),
        ({"ratio": "half"}, "ratio 'half'"),
        ({"ratio": True}, "ratio True"),
        ({"importance": "l3"}, "choose one of l1, l2, taylor, first_order, bn_scale, fpgm, random"),
        ({"scope": "all"}, "choose one of group, global"),
        ({"schedule": "slow"}, "choose one of oneshot, gradual"),
        ({"ratios": 0.5}, "unknown setting 'ratios'"),
    ],
)
def test_a_bad_setting_is_the_users_error(changes, said):
    rule = Rule(site="stem.conv", op="prune", settings={"ratio": 0.5, **changes})
    with pytest.raises(UserError, match=r"prune at site stem\.conv") as caught:
        Prune().decide(network(), [rule], TASK, LEAVE)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("site", "why"),
    [
        ("head", "the network's output"),
        ("stages.7.0.conv1", "no convolution or linear layer is there"),
        ("stages.0.0.conv2", "the rule for stem.conv has cut these channels"),
    ],
)
def test_what_cannot_be_followed_is_skipped_with_its_reason(site, why):
    receipt = Prune().decide(network(), rules(0.5, "stem.conv", site), TASK, LEAVE)
    assert [entry.status for entry in receipt.entries] == ["done", "skipped"]
    assert why in receipt.entries[1].why


def test_rounding_that_leaves_nothing_to_cut_is_said():
    receipt = Prune().decide(network(), rules(0.1, "stages.0.0.conv1"), TASK, SIXTEEN)
    assert receipt.entries[0].status == "skipped"
    assert "0.1 of 32 channels" in receipt.entries[0].why


def test_a_later_member_speaks_for_the_group_where_no_earlier_one_does():
    receipt = Prune().decide(network(), rules(0.5, "stages.0.1.conv2"), TASK, LEAVE)
    small = Prune().enact(network(), receipt)
    assert small.stem.conv.out_channels == small.stages[0][0].conv2.out_channels == 16


class Stream(nn.Module):
    """Two blocks on a stream that begins at the stem."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.stage = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)) for _ in range(2))
        )

    def forward(self, x):
        x = self.stem(x)
        for block in self.stage:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


def test_a_modules_rule_cuts_what_begins_in_it():
    cut = {}
    for site in ("stage", "stage.0", "stem", "."):
        (entry,) = Prune().decide(Stream(), rules(0.5, site), Colour(3, 8, 8), LEAVE).entries
        cut[site] = {place for raw in entry.facts["cuts"] for place in raw["places"]}
    made = {
        site: {place.removesuffix(".weight:0") for place in found if "weight:0" in place} for site, found in cut.items()
    }
    assert made["stage"] == {"stage.0.0", "stage.1.0"}
    assert made["stage.0"] == {"stage.0.0"}
    assert made["stem"] == {"stem", "stage.0.1", "stage.1.1"}
    assert cut["."] == cut["stage"] | cut["stem"]
    (entry,) = Prune().decide(Stream(), rules(0.5, "stage.0.1"), Colour(3, 8, 8), LEAVE).entries
    assert entry.status == "done"  # a layer speaks for its channels wherever they begin


def test_channel_counts_are_multiples_where_that_leaves_any():
    receipt = Prune().decide(network(), rules(0.4, "."), TASK, SIXTEEN)
    small = Prune().enact(network(), receipt)
    widths = {part.num_features for part in small.modules() if isinstance(part, nn.BatchNorm2d)}
    assert widths == {16, 32}
    achieved = receipt.entries[0].achieved
    assert achieved["ratio"] == pytest.approx(1 - achieved["kept"] / achieved["of"])


@given(st.integers(1, 64), st.floats(0, 0.99), st.integers(1, 16), st.integers(1, 32))
def test_keep_count_is_a_multiple_of_the_unit_and_never_zero(cells, ratio, unit, multiple):
    channels = cells * unit
    keep = keep_count(channels, ratio, unit, multiple)
    assert 0 < keep <= channels
    assert keep % unit == 0
    if channels * (1 - ratio) >= unit * multiple:  # then a multiple of both is near
        assert keep % multiple == 0 or keep == channels


@given(st.data())
def test_choose_keeps_the_same_share_of_every_cell_and_the_best_of_each(data):
    sizes = [data.draw(st.integers(1, 3)) * 4 for _ in range(data.draw(st.integers(1, 4)))]
    order = data.draw(st.permutations(range(sum(sizes))))
    cells = [order[sum(sizes[:at]) : sum(sizes[: at + 1])] for at in range(len(sizes))]
    scores = torch.tensor(data.draw(st.lists(st.floats(0, 1), min_size=len(order), max_size=len(order))))
    quarters = data.draw(st.integers(1, 4))
    kept = choose(scores, cells, len(order) * quarters // 4)
    assert kept == sorted(set(kept))
    for cell in cells:
        mine = set(kept) & set(cell)
        assert len(mine) == len(cell) * quarters // 4
        assert min(scores[list(mine)]) >= max([float(scores[unit]) for unit in set(cell) - mine], default=0.0)


# --- receipts of another network ----------------------------------------------------------------------------------


def test_a_receipt_of_another_network_is_refused_with_site_and_difference():
    receipt = Prune().decide(network(), rules(0.5, "stages.1.0.conv1"), TASK, LEAVE)
    with pytest.raises(UserError, match=r"stages\.1\.0\.conv1\.weight has 32 output channels here and had 48 there"):
        Prune().enact(network(**{"width.1": 32}), receipt)
    deep = Prune().decide(network(), rules(0.5, "stages.1.1.conv1"), TASK, LEAVE)
    with pytest.raises(UserError, match=r"site stages.1.1.conv1: .* stages.1.1.conv1.weight, which is not there"):
        Prune().enact(network(**{"depth.1": 1}), deep)
    with pytest.raises(UserError, match=r"cuts stages.1.0.conv1.weight, which is not there"):
        Prune().enact(network(**{"kind.1": "separable"}), receipt)
    shuffled = Prune().decide(network(**{"kind.0": "shuffle"}), rules(0.5, "stages.0.0.conv1"), TASK, LEAVE)
    with pytest.raises(UserError, match="another network"):
        Prune().enact(network(), shuffled)


def test_a_receipt_of_an_older_version_is_refused():
    receipt = Prune().decide(network(), rules(0.5, "stages.1.0.conv1"), TASK, LEAVE)
    facts = {"cuts": [{"layer": "stages.1.0.conv1", "side": "out", "was": 48, "kept": [0]}]}
    old = receipt.model_copy(update={"entries": (receipt.entries[0].model_copy(update={"facts": facts}),)})
    with pytest.raises(UserError, match="not of this version"):
        Prune().enact(network(), old)


def test_an_impossible_receipt_is_refused():
    receipt = Prune().decide(network(), rules(0.5, "stages.1.0.conv1"), TASK, LEAVE)
    facts = copy.deepcopy(receipt.entries[0].facts)
    facts["cuts"][0]["kept"] = [0, 0, 99]
    entry = receipt.entries[0].model_copy(update={"facts": facts})
    with pytest.raises(UserError, match="not there, or none, or one twice"):
        Prune().enact(network(), receipt.model_copy(update={"entries": (entry,)}))


# --- strangers' networks ------------------------------------------------------------------------------------------


class Padded(nn.Module):
    """Two widths joined by a zero-padded shortcut (option A of He et al.), which torch-pruning pairs wrongly."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = F.relu(self.b(x) + F.pad(x, (0, 0, 0, 0, 4, 4)))
        return self.head(x.mean((2, 3)))


def test_zero_padded_shortcuts_are_followed_channel_by_channel():
    torch.manual_seed(0)
    module, x = Padded(), torch.rand(2, 3, 6, 6)
    receipt = Prune().decide(module, rules(0.5, "a", "b"), Colour(3, 6, 6), LEAVE)
    assert [entry.status for entry in receipt.entries] == ["done", "skipped"]
    assert "which are coupled" in receipt.entries[1].why
    kept = receipt.entries[0].facts["cuts"][0]["kept"]
    gone = sorted(set(range(8)) - set(kept))
    expected = copy.deepcopy(module)
    with torch.no_grad():  # channel i of `a` arrives at i + 4
        expected.b.weight[:, gone] = 0
        expected.head.weight[:, [i + 4 for i in gone]] = 0
        small = Prune().enact(module, receipt)
        assert (small.a.out_channels, small.b.out_channels, small.head.in_features) == (4, 12, 12)
        assert torch.allclose(small(x), expected(x), atol=1e-6)


class Counted(nn.Module):
    """Code that knows a width by heart, and code that puts channels in order of size."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.b(F.relu(self.a(x)))).view(len(x), 8, 36)
        x = F.relu(self.c(x.view(len(x), 8, 6, 6)))
        return self.head(x.mean((2, 3)).sort(1).values)


def test_what_cannot_be_followed_is_left_alone_with_its_reason():
    torch.manual_seed(0)
    receipt = Prune().decide(Counted(), rules(0.5, "a", "b", "c"), Colour(3, 6, 6), LEAVE)
    assert [entry.status for entry in receipt.entries] == ["done", "skipped", "skipped"]
    assert "the network does not run without them" in receipt.entries[1].why
    assert "go through sort, which is not understood" in receipt.entries[2].why


class Joined(nn.Module):
    """Concatenation, flattening and a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(3, 4, 1, bias=False)
        self.c = nn.Conv2d(12, 16, 3, padding=1)
        self.d = nn.Conv2d(16, 8, 3, padding=1, groups=4)
        self.head = nn.Sequential(nn.Linear(8 * 16, 20), nn.ReLU(), nn.Linear(20, 5))

    def forward(self, x):
        x = F.relu(self.c(F.relu(torch.cat([self.a(x), self.b(x)], 1))))
        return self.head(F.adaptive_avg_pool2d(self.d(x), 4).flatten(1))


def test_concatenation_flattening_and_groups():
    torch.manual_seed(0)
    module, task = Joined(), Colour(3, 6, 6)
    receipt = Prune().decide(module, rules(0.5, "a", "b", "c", "d", "head"), task, LEAVE)
    assert [entry.status for entry in receipt.entries] == ["done"] * 5, receipt
    small = Prune().enact(module, through_json(receipt))
    assert (small.c.in_channels, small.c.out_channels, small.d.in_channels, small.d.out_channels) == (6, 8, 8, 4)
    assert (small.head[0].in_features, small.head[0].out_features) == (64, 10)
    assert small.d.weight.shape == (4, 2, 3, 3)
    assert small(torch.rand(2, 3, 6, 6)).shape == (2, 5)


class Broken(nn.Module):
    def forward(self, x):
        raise ValueError("no way")


def test_a_network_that_cannot_run_fails_the_trial():
    with pytest.raises(TrialFailure, match="no way"):
        Prune().decide(Broken(), rules(0.5, "."), Colour(3, 6, 6), LEAVE)


class Sentences:
    """A task of whole numbers, with a mask."""

    name, metric = "sentences", "accuracy"
    input = InputSpec(
        name="words", shape=(6,), dtype="int64", others=(InputSpec(name="mask", shape=(6,), dtype="int64"),)
    )

    def batches(self, split, size, *, limit=None, seed=None):
        words = torch.randint(0, 20, (size, 6), generator=torch.Generator().manual_seed(0))
        yield (words, torch.ones_like(words)), words[:, 0] % 3

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, targets)

    def quality(self, predict, split):
        raise NotImplementedError


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(24, 4, 40, 0.0, batch_first=True)
        self.words, self.body, self.head = nn.Embedding(20, 24), nn.TransformerEncoder(layer, 1), nn.Linear(24, 3)

    def forward(self, words, mask):
        return self.head(self.body(self.words(words), src_key_padding_mask=mask == 0).mean(1))


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_the_contract_holds_on_a_transformer_of_two_inputs_for_every_importance(importance):
    torch.manual_seed(0)
    module, task = Reader().eval(), Sentences()
    unfold(module)
    body = "body.layers.0"
    asked = rules(0.5, "words", f"{body}.self_attn.q", f"{body}.linear1", "head", importance=importance)
    receipt = check_op(Prune(), module, asked, task, LEAVE)
    assert [entry.status for entry in receipt.entries] == ["done", "done", "done", "skipped"]
    attention = f"{body}.self_attn"
    assert receipt.entries[1].facts["attributes"] == {attention: {"heads": 2}}
    small = Prune().enact(module, through_json(receipt))
    inputs, targets = next(task.batches("train", 4))
    assert small(*inputs).shape == (4, 3)
    assert (small.words.embedding_dim, small.body.layers[0].linear1.out_features) == (12, 20)
    task.loss(small.train()(*inputs), targets).backward()


# --- random policies over the whole family ------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6))
def test_random_policies_run_and_rebuild(seed):
    draw = random.Random(seed)
    arch = {f"kind.{stage}": draw.choice(KINDS) for stage in range(3)}
    arch |= {f"depth.{stage}": draw.choice([1, 2]) for stage in range(3)}
    arch |= {"kernel.1": draw.choice([1, 3, 5]), "width.1": draw.choice([32, 48, 80])}
    module, profile = network(seed, **arch), draw.choice([LEAVE, SIXTEEN])
    names = [site.name for site in BUILDER.sites()]
    policy = [rule for name in names for rule in rules(draw.choice([0.0, 0.25, 0.5, 0.9]), name)]
    ranks = [Rule(site=name, op="lowrank", settings={"rank": draw.choice([1.0, 0.5, 0.1])}) for name in names]
    receipts, tensors = [], {}
    for op, asked in ((Prune(), policy), (LowRank(), ranks)):
        receipt = op.decide(module, asked, TASK, profile, tensors)
        module = op.enact(module, receipt, tensors)
        receipts.append((op, receipt))
    x = torch.rand(3, 1, 8, 8)
    assert torch.isfinite(module(x)).all()
    assert all(part.out_channels > 0 for part in module.modules() if isinstance(part, nn.Conv2d))
    again = BUILDER.build(arch)
    for op, receipt in receipts:
        again = op.enact(again, through_json(receipt))
    assert shapes(again) == shapes(module)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again.eval()(x), module(x))


# --- the example op -----------------------------------------------------------------------------------------------


def test_the_example_op():
    op = runpy.run_path(str(ROOT / "examples" / "my_op.py"))["Crop"]()
    assert isinstance(op, Op)
    asked = [Rule(site=site, op=op.name, settings={"margin": 1}) for site in ("stages.0", "head")]
    receipt = through_json(op.decide(network(), asked, TASK, LEAVE))
    assert [entry.status for entry in receipt.entries] == ["done", "skipped"]
    small = op.enact(network(), receipt)
    assert small.stages[0][1].conv2.kernel_size == (1, 1)
    assert small(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(UserError, match="no 3 x 3 convolution here"):
        op.enact(network(**{"kernel.0": 5}), receipt)
