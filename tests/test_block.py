"""Blocks fall away or become one convolution; where neither goes, they are left alone with a reason."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autocompress import export as exporting
from autocompress.models.merging import chain
from autocompress.ops import Op
from autocompress.ops.block import Block, Pass
from autocompress.tasks import InputSpec
from autocompress.tasks.digits import Digits
from autocompress.testing import check_op
from autocompress.types import Profile, Receipt, Rule, TrialFailure, UserError

TASK = Digits()
ANY = Profile(name="any")


class Basic(nn.Module):
    """conv - bn - activation - conv - bn and a shortcut, as CIFAR ResNets are written."""

    def __init__(self, width: int, activation=F.relu, *, projection: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(width, width, 1) if projection else None
        self.activation = activation

    def forward(self, x):
        side = x if self.shortcut is None else self.shortcut(x)  # called before the convolutions
        return F.relu(side + self.bn2(self.conv2(self.activation(self.bn1(self.conv1(x))))))


class Inverted(nn.Module):
    """Expansion, depthwise, gate, projection, with activations of their own: a mobile block."""

    def __init__(self, width: int, kernel: int = 3) -> None:
        super().__init__()
        inner = 6 * width
        self.expand = nn.Sequential(nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.SiLU())
        depthwise = nn.Conv2d(inner, inner, kernel, padding=kernel // 2, groups=inner)
        self.spatial = nn.Sequential(depthwise, nn.BatchNorm2d(inner), nn.SiLU(inplace=True))
        self.project = nn.Sequential(nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        return x + self.project(self.spatial(self.expand(x)))


class Named(nn.Module):
    """Takes its input by keyword and answers with a tuple."""

    def __init__(self, width: int, more: bool = False) -> None:
        super().__init__()
        self.conv, self.more = nn.Conv2d(width, width, 1), more

    def forward(self, states, mask=None):
        answer = states + self.conv(states)
        return (answer, answer) if self.more else (answer, None)


class Caller(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(states=x, mask=1)[0]


class Asking(nn.Module):
    """Looks into its block before calling it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if self.inner.conv1.kernel_size == (3, 3) else x


class Table:
    """A made-up task of a few noise images."""

    name, metric, input = "table", "accuracy", InputSpec(shape=(1, 8, 8))

    def batches(self, split, size, *, limit=None, seed=None):
        images = torch.randn(limit or 64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        yield from ((part, torch.zeros(len(part), dtype=torch.long)) for part in images.split(size))


def network(*parts: nn.Module, width: int = 8, relu: bool = True) -> nn.Module:
    stem = [nn.Conv2d(1, width, 3, padding=1), *([nn.ReLU()] if relu else [])]
    module = nn.Sequential(*stem, *parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    module.train()
    with torch.no_grad():
        for inputs, _ in TASK.batches("train", 64, limit=512):
            module(inputs)  # batch-norm statistics
    return module.eval()


def rules(kind: str, *sites: str) -> list[Rule]:
    return [Rule(site=site, op="block", settings={"kind": kind}) for site in sites]


def through_json(receipt: Receipt) -> Receipt:
    return Receipt.model_validate_json(json.dumps(json.loads(receipt.model_dump_json())))


def images(count: int = 32) -> torch.Tensor:
    return next(iter(TASK.batches("selection", count)))[0]


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def whys(module: nn.Module, kind: str, *sites: str) -> list[str]:
    return [entry.why for entry in Block().decide(module, rules(kind, *sites), TASK, ANY).entries]


def test_it_is_an_op_and_keeps_the_contract():
    assert isinstance(Block(), Op)
    module = network(Basic(8), Basic(8), Basic(8))
    mixed = [*rules("drop", "2"), *rules("merge", "3"), *rules("keep", "4")]
    receipt = check_op(Block(), module, mixed, TASK, ANY)
    assert [entry.status for entry in receipt.entries] == ["done", "done"]


def test_a_dropped_block_passes_its_input_on():
    module = network(Basic(8), Basic(8))
    x = images()
    with torch.no_grad():
        expected = nn.Sequential(*(part for number, part in enumerate(module) if number != 3))(x)
        small = Block().enact(module, through_json(Block().decide(module, rules("drop", "3"), TASK, ANY)))
        assert torch.equal(small(x), expected)
    assert isinstance(small[3], Pass)
    assert not small[3].training


def test_drop_answers_in_the_form_of_the_block():
    module = network(Caller(Named(8)))
    receipt = Block().decide(module, rules("drop", "2.inner"), TASK, ANY)
    change = receipt.entries[0].facts["change"]
    assert (change["key"], change["form"]) == ("states", 2)
    small = Block().enact(module, through_json(receipt))
    assert small[2].inner(states=images(), mask=1)[1] is None
    assert small(images()).shape == (32, 10)


def test_a_linear_branch_loses_little_but_its_borders():
    """Without an activation in between one 5 x 5 convolution is all that two 3 x 3 are."""

    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(2, 32, 3, padding=1), nn.Conv2d(32, 2, 3, padding=1))  # 5 x 5 is cheaper
    module = nn.Sequential(nn.Conv2d(1, 2, 1), wide, nn.Flatten(), nn.Linear(128, 10)).eval()
    tensors: dict[str, torch.Tensor] = {}
    receipt = Block().decide(module, rules("merge", "1"), Table(), ANY, tensors)
    change, achieved = receipt.entries[0].facts["change"], receipt.entries[0].achieved
    assert (change["kernel"], change["layer"], change["silenced"]) == (5, "1", ["0"])
    assert achieved["macs"] == 25 * 4 / (2 * 9 * 64)
    small = Block().enact(copy.deepcopy(module), receipt, tensors)
    x = torch.randn(4, 1, 8, 8)
    expected, found = module[:2](x), small[:2](x)
    assert achieved["error"] < 0.06  # borders: the zeros between the convolutions are not those of one
    assert (found - expected)[..., 2:-2, 2:-2].square().mean() < 0.01 * expected.var()


@pytest.mark.parametrize(
    ("part", "silenced"),
    [
        (Basic(8), ["conv1", "bn1"]),
        (Basic(8, nn.SiLU()), ["conv1", "bn1", "activation"]),
        (Inverted(8), ["expand", "spatial"]),
        (Basic(8, projection=True), ["conv1", "bn1"]),
    ],
    ids=["relu", "own activation", "mobile", "projection"],
)
def test_merge_is_nearer_than_drop_and_rebuilt_from_json(part, silenced):
    torch.manual_seed(0)
    module = network(part)
    tensors: dict[str, torch.Tensor] = {}
    receipt = Block().decide(module, rules("merge", "2"), TASK, ANY, tensors)
    assert set(tensors) == {"2/merged.weight", "2/merged.bias"}
    entry = receipt.entries[0]
    assert entry.facts["change"]["silenced"] == silenced
    assert 0 < entry.achieved["error"] < 0.7
    assert entry.achieved["macs"] < 1
    small = Block().enact(copy.deepcopy(module), through_json(receipt), tensors)
    dropped = copy.deepcopy(module)
    dropped[2] = nn.Identity()
    x = images(64)
    with torch.no_grad():
        target = module[:3](x)
        assert (small[:3](x) - target).square().mean() < 0.6 * (dropped[:3](x) - target).square().mean()
        bare = Block().enact(copy.deepcopy(module), through_json(receipt))
        assert shapes(bare) == shapes(small)
        bare.load_state_dict(small.state_dict())
        assert torch.equal(bare(x), small(x))
    exported = exporting.export(small, TASK.input, opset=17)
    exporting.parity(small, exporting.compose(exported), images(16).numpy())


def test_decide_draws_nothing_and_leaves_no_hook():
    module = network(Basic(8), Basic(8))
    before, state = {n: t.clone() for n, t in module.state_dict().items()}, torch.random.get_rng_state()
    Block().decide(module, [*rules("merge", "2"), *rules("drop", "3")], TASK, ANY)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    for part in module.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
        assert "forward" not in part.__dict__


def test_merging_twice_gives_the_same_weights():
    module, first, second = network(Basic(8)), {}, {}
    one = Block().decide(module, rules("merge", "2"), TASK, ANY, first)
    assert one == Block().decide(module, rules("merge", "2"), TASK, ANY, second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_for_shapes_alone_nothing_is_fitted(monkeypatch):
    module = network(Basic(8))
    fitted = Block().decide(module, rules("merge", "2"), TASK, ANY, {})
    monkeypatch.setattr("autocompress.ops.block.fit", lambda *_: pytest.fail("it fits"))
    shapes = Block().decide(module, rules("merge", "2"), TASK, ANY)
    assert shapes.entries[0].facts == fitted.entries[0].facts
    assert set(shapes.entries[0].achieved) == {"macs"}


def test_what_cannot_go_is_left_alone_with_a_reason():
    module = network(
        Basic(8), nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU()), Caller(Named(8, True))
    )
    found = whys(module, "drop", "3", "9", "4.inner", ".", "3.7")
    assert found[0] == "its input is (8, 8, 8) and its output (8, 4, 4)"
    assert found[1] == found[4] == "no block is there"
    assert found[2] == "it answers with more than one tensor"
    assert found[3] == "that is the whole network"


def test_what_cannot_be_merged_is_left_alone_with_a_reason():
    module = network(Basic(8, F.silu), Inverted(8, 7), nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()))
    found = whys(module, "merge", "2", "3", "4")
    assert "cannot all be taken away" in found[0]
    assert "times what it replaces" in found[1]
    assert found[2] == "it has a single convolution"


def test_signed_inputs_do_not_survive_a_functional_relu():
    assert "cannot all be taken away" in whys(network(Basic(8), relu=False), "merge", "1")[0]


def test_one_block_is_changed_once():
    module = network(Basic(8), nn.Sequential(Basic(8), Basic(8)))
    receipt = Block().decide(module, [*rules("drop", "3"), *rules("merge", "3.0"), *rules("drop", "3")], TASK, ANY)
    assert [entry.why for entry in receipt.entries] == ["", "an earlier rule drops 3", "an earlier rule drops 3"]
    small = Block().enact(module, receipt)
    assert whys(small, "drop", "3.0", "3") == ["no block is there", "an earlier change has dropped it"]


def test_a_network_that_looks_into_its_block_keeps_it():
    module = network(Asking(Basic(8)), Basic(8))
    receipt = Block().decide(module, rules("drop", "2.inner", "3"), TASK, ANY)
    assert [entry.status for entry in receipt.entries] == ["skipped", "done"]
    assert "does not run any more: AttributeError" in receipt.entries[0].why
    assert isinstance(module[2].inner, Basic)


def test_settings_are_checked():
    module = network(Basic(8))
    with pytest.raises(UserError, match=r"block at site 2: kind 'halve'; choose one of keep, drop, merge"):
        Block().decide(module, rules("halve", "2"), TASK, ANY)
    with pytest.raises(UserError, match="unknown setting 'kinds'"):
        Block().decide(module, [Rule(site="2", op="block", settings={"kinds": "drop"})], TASK, ANY)
    assert Block().decide(module, rules("keep", "2"), TASK, ANY) == Receipt(op="block")


def test_a_network_that_does_not_run_fails_the_trial():
    with pytest.raises(TrialFailure, match="block: the network does not run: RuntimeError"):
        Block().decide(nn.Sequential(nn.Conv2d(3, 8, 3), Basic(8)), rules("drop", "1"), TASK, ANY)


def test_a_receipt_of_another_network_is_refused():
    tensors: dict[str, torch.Tensor] = {}
    module = network(Basic(8), Basic(8))
    receipt = Block().decide(module, [*rules("merge", "2"), *rules("drop", "3")], TASK, ANY, tensors)
    with pytest.raises(UserError, match=r"site 2: .*\(6, 6, 3, 3\) here and was \(8, 8, 3, 3\) there"):
        Block().enact(network(Basic(6), width=6), receipt)
    with pytest.raises(UserError, match="3 is a Inverted here and was a Basic there"):
        Block().enact(network(Basic(8), Inverted(8)), receipt)
    with pytest.raises(UserError, match=r"site 2: .*it merges 2\.conv1, which is not there"):
        Block().enact(network(Inverted(8)), receipt)
    with pytest.raises(UserError, match=r"tensor '2/merged.weight' is missing"):
        Block().enact(copy.deepcopy(module), receipt, {})
    with pytest.raises(UserError, match=r"'2/merged.bias' is \(3,\), not \(8,\)"):
        Block().enact(copy.deepcopy(module), receipt, {**tensors, "2/merged.bias": torch.zeros(3)})


def test_a_downsampling_branch_keeps_its_stride():
    block = nn.Sequential(nn.Conv2d(8, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1))
    x = torch.rand(2, 8, 9, 9)
    found = chain(block.eval(), lambda part: part(x), x)
    assert (found.stride, found.size, found.outputs, found.kernels) == (2, (5, 5), 16, (3, 5))


class Writes(nn.Module):
    """Its activations write into what they are given, as most published residual networks do."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def forward(self, x):
        found = self.conv2(F.relu(self.conv1(x), inplace=True))
        found += x
        return found


@pytest.mark.parametrize("kind", ["drop", "merge"])
def test_activations_that_write_into_their_input_still_train(kind):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), Writes(), nn.ReLU(inplace=True))
    images = torch.randn(2, 1, 8, 8)
    op = Block()
    rules = [Rule(site="2", op="block", settings={"kind": kind})]

    class Images:
        name, metric, input = "images", "none", InputSpec(shape=(1, 8, 8))

        def batches(self, split, size, *, limit=None, seed=None):
            yield images, torch.zeros(2)

    receipt = op.decide(module, rules, Images(), Profile(name="p"), {})
    assert [entry.status for entry in receipt.entries] == ["done"], receipt
    op.enact(module, receipt)
    module.train()(images).sum().backward()
    assert module[0].weight.grad is not None
