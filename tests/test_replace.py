"""Compact forms: nearer after the fit, rebuilt from JSON, skipped where they do not pay; and the fit itself."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autocompress import export as exporting
from autocompress.models.blocks import ShuffledConv
from autocompress.models.compact import KINDS, Form, form, forms, make, spread
from autocompress.models.convnet import ConvNet
from autocompress.models.trace import count, sites
from autocompress.ops import Op
from autocompress.ops.block import Block
from autocompress.ops.fit import Moments, each, images_for, moments, plain, ridge, rows_of
from autocompress.ops.forms import start
from autocompress.ops.replace import Replace
from autocompress.tasks import InputSpec
from autocompress.tasks.digits import Digits
from autocompress.testing import check_op
from autocompress.types import Profile, Receipt, Rule, TrialFailure, UserError

TASK = Digits()
ANY = Profile(name="any")
BUILDER = ConvNet(arch={"resolution": 8, "width.0": 32, "width.1": 48, "width.2": 64})


def rules(kind: str, *found: str) -> list[Rule]:
    return [Rule(site=site, op="replace", settings={"kind": kind}) for site in found]


def through_json(receipt: Receipt) -> Receipt:
    return Receipt.model_validate_json(json.dumps(json.loads(receipt.model_dump_json())))


def small_network(*settings, width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    conv = nn.Conv2d(width, width, *(settings or (3, 1, 1)))
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def images(size: int = 64) -> torch.Tensor:
    return next(iter(TASK.batches("selection", size)))[0]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    around = expected - expected.mean((0, 2, 3), keepdim=True)
    return float((found - expected).square().sum() / around.square().sum())


@pytest.mark.parametrize("kind", KINDS)
def test_the_fit_comes_nearer_than_the_weights_and_holds_on_other_images(kind):
    module, tensors = small_network(), {}
    shapes = check_op(Replace(), module, rules(kind, "2"), TASK, ANY)
    receipt = Replace().decide(module, rules(kind, "2"), TASK, ANY, tensors)
    assert receipt == Replace().decide(module, rules(kind, "2"), TASK, ANY, {})
    assert shapes.entries[0].facts == receipt.entries[0].facts
    achieved = receipt.entries[0].achieved
    assert achieved["error"] < achieved["error_start"]
    assert achieved["macs"] == Form.model_validate(receipt.entries[0].facts["forms"][0]).cost < 1
    x = images()
    with torch.no_grad():
        expected = module[:3](x)
        small = Replace().enact(copy.deepcopy(module), through_json(receipt), tensors)
        assert relative(small[:3](x), expected) < 1.3 * achieved["error"] + 0.01
        bare = Replace().enact(copy.deepcopy(module), through_json(receipt))
        bare.load_state_dict(small.state_dict())
        assert torch.equal(bare(x), small(x))
    exported = exporting.export(small, TASK.input, opset=17)
    exporting.parity(small, exporting.compose(exported), x.numpy())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [(3, 2, 1), (5, 1, 2), ((1, 7), 1, (0, 3)), (3, 1, 2, 2), (3, 1, "same"), (3, 1, 1, 1, 1, True, "reflect")],
    ids=["stride", "5x5", "1x7", "dilation", "same", "reflect"],
)
def test_a_form_gives_what_its_dense_weights_give_in_the_same_size(kind, settings):
    layer = small_network(*settings)[2]
    found = form(layer, "2", kind)
    assert isinstance(found, Form), found
    parts = start(found, layer.weight.detach().double())
    made = make(found, layer)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name in parts:
                parameter.copy_(parts[name])
        dense = copy.deepcopy(layer)
        dense.weight.copy_(spread(found, parts).reshape(layer.weight.shape))
        dense.bias.zero_()
        x = torch.randn(2, 16, 9, 8)
        assert torch.allclose(made(x), dense(x), atol=1e-5)


def test_weights_of_the_form_lose_nothing():
    torch.manual_seed(0)
    for kind in KINDS:
        module, tensors = small_network(), {}
        layer = module[2]
        found = form(layer, "2", kind)
        free = make(found, layer)
        for parameter in free.parameters():
            nn.init.normal_(parameter)
        parts = {name: parameter.detach() for name, parameter in free.named_parameters()}
        layer.weight.data = spread(found, parts).reshape(layer.weight.shape)
        receipt = Replace().decide(module, rules(kind, "2"), TASK, ANY, tensors)
        assert receipt.entries[0].achieved["error"] < 1e-4
        x = images(8)
        with torch.no_grad():
            expected = module[:3](x)
            assert relative(Replace().enact(module, receipt, tensors)[:3](x), expected) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_whole_networks_of_the_family(kind):
    module, tensors = BUILDER.build({}).eval(), {}
    macs, parameters = count(module, torch.zeros(1, 1, 8, 8))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    receipt = Replace().decide(module, rules(kind, "."), TASK, ANY, tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    small = Replace().enact(module, receipt, tensors)
    found = count(small, torch.zeros(1, 1, 8, 8))
    assert found[0] < 0.6 * macs
    assert found[1] < 0.6 * parameters
    assert not any(part.training for part in small.modules())
    names = dict(small.named_modules())
    assert all(layer.split("/")[0] in names for layer in tensors)


def test_sites_say_where_and_which():
    listed = {site.name: site for site in sites(BUILDER.build({}), torch.zeros(1, 1, 8, 8))}
    assert listed["stages.0.0.conv1"].ops[0] == "replace"
    assert listed["stages.0.0.conv1"].choices == {"replace": ("keep", *KINDS)}
    assert listed["stem.conv"].choices == {"replace": ("keep", "separable", "smaller")}
    assert "replace" not in listed["head"].ops
    assert "replace" not in listed["stages.1.0.shortcut.0"].ops


def test_a_shuffle_is_the_one_that_pruning_knows():
    module = small_network()
    small = Replace().enact(module, Replace().decide(module, rules("shuffle", "2"), TASK, ANY))
    assert isinstance(small[2], ShuffledConv)
    assert small[2][1].groups == 4


@pytest.mark.parametrize(
    ("layer", "kind", "why"),
    [
        (nn.Conv2d(16, 16, 1), "separable", "is a 1x1 convolution"),
        (nn.Conv2d(16, 16, 3, groups=2), "separable", "has groups already"),
        (nn.Conv2d(16, 1, 3), "separable", "costs 1.11 times"),
        (nn.Conv2d(3, 16, 3), "shuffle", "has 3 and 16 channels, which no shuffle divides"),
        (nn.Conv2d(16, 16, 3), "smaller", "has too little padding"),
        (nn.Conv2d(16, 16, 2, padding=1), "smaller", "has no middle"),
        (nn.Conv2d(2, 2, 3), "bottleneck", None),
        (nn.Linear(4, 4), "separable", "no convolution is there"),
    ],
)
def test_what_does_not_go_is_skipped_with_its_reason(layer, kind, why):
    module = nn.Sequential(nn.Conv2d(1, getattr(layer, "in_channels", 4), 1), layer)
    if why is None:
        assert form(layer, "1", kind).inner == (1, 1)
        return
    receipt = Replace().decide(module, rules(kind, "1"), TASK, ANY)
    assert receipt.entries[0].status == "skipped"
    assert why in receipt.entries[0].why


def test_a_subclass_with_a_forward_of_its_own_is_left_alone():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    layer = Standardised(16, 16, 3, padding=1)
    assert forms(layer) == ()
    assert not plain(layer)
    receipt = Replace().decide(nn.Sequential(nn.Conv2d(1, 16, 1), layer), rules("smaller", "1"), TASK, ANY)
    assert receipt.entries[0].why == "1 is a Standardised, no plain convolution"


def test_after_a_block_is_dropped_its_layers_are_not_there():
    module = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.Sequential(nn.Conv2d(16, 16, 3, padding=1)))
    drop = [Rule(site="1", op="block", settings={"kind": "drop"})]
    module = Block().enact(module, Block().decide(module, drop, TASK, ANY))
    receipt = Replace().decide(module, rules("separable", "1.0", "1", "0"), TASK, ANY)
    assert [entry.why for entry in receipt.entries][:2] == ["no convolution is there"] * 2


def test_a_layer_is_replaced_once():
    receipt = Replace().decide(BUILDER.build({}), rules("smaller", "stages.0", "stages.0.0.conv1"), TASK, ANY)
    assert [entry.status for entry in receipt.entries] == ["done", "skipped"]
    assert receipt.entries[1].why == "an earlier rule has replaced it"


def test_constant_outputs_are_left_alone():
    module = small_network()
    nn.init.zeros_(module[0].weight)
    receipt = Replace().decide(module, rules("separable", "2"), TASK, ANY, {})
    assert receipt.entries[0].status == "done"  # borders differ from the middle
    nn.init.zeros_(module[2].weight)
    receipt = Replace().decide(module, rules("separable", "2"), TASK, ANY, {})
    assert receipt.entries[0].why == "2 answers with nothing but a constant on the calibration data"


def test_bottlenecks_are_rounded():
    assert form(nn.Conv2d(100, 60, 3), "it", "bottleneck", 16).inner == (32, 16)
    assert form(nn.Conv2d(100, 20, 3), "it", "bottleneck", 16).inner == (32, 5)


def test_settings_are_checked():
    module = small_network()
    with pytest.raises(UserError, match=r"replace at site 2: kind 'tiny'; choose one of keep, separable"):
        Replace().decide(module, rules("tiny", "2"), TASK, ANY)
    with pytest.raises(UserError, match="unknown setting 'form'"):
        Replace().decide(module, [Rule(site="2", op="replace", settings={"form": "smaller"})], TASK, ANY)
    assert Replace().decide(module, rules("keep", "2"), TASK, ANY) == Receipt(op="replace")
    assert isinstance(Replace(), Op)


def test_a_network_that_does_not_run_fails_the_trial():
    with pytest.raises(TrialFailure, match="replace: cannot be fitted: RuntimeError"):
        Replace().decide(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1)), rules("smaller", "0"), TASK, ANY, {})


def test_for_shapes_alone_no_data_is_read(monkeypatch):
    monkeypatch.setattr(TASK, "batches", lambda *_args, **_more: pytest.fail("it reads data"), raising=False)
    receipt = Replace().decide(small_network(), rules("bottleneck", "."), TASK, ANY)
    assert [Form.model_validate(one).layer for one in receipt.entries[0].facts["forms"]] == ["0", "2"]
    assert set(receipt.entries[0].achieved) == {"macs"}


def test_a_receipt_of_another_network_is_refused():
    module, tensors = small_network(), {}
    receipt = Replace().decide(module, rules("separable", "2"), TASK, ANY, tensors)
    assert set(tensors) == {"2/0.weight", "2/1.weight", "2/1.bias"}
    with pytest.raises(UserError, match=r"site 2: .*\(8, 8, 3, 3\) here and was \(16, 16, 3, 3\) there"):
        Replace().enact(small_network(width=8), receipt)
    with pytest.raises(UserError, match=r"stride of 2 is \(2, 2\) here"):
        Replace().enact(small_network(3, 2, 1), receipt)
    with pytest.raises(UserError, match="which is not there"):
        Replace().enact(nn.Sequential(nn.Conv2d(1, 16, 3)), receipt)
    with pytest.raises(UserError, match="which is a Sequential here"):
        Replace().enact(Replace().enact(copy.deepcopy(module), receipt, tensors), receipt)
    with pytest.raises(UserError, match=r"'2/0\.weight' is missing"):
        Replace().enact(copy.deepcopy(module), receipt, {})
    with pytest.raises(UserError, match=r"'2/1\.bias' is \(3,\), not \(16,\)"):
        Replace().enact(copy.deepcopy(module), receipt, {**tensors, "2/1.bias": torch.zeros(3)})


# --- the fit ----------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 3, (1, 3)]),
    st.sampled_from([1, 2, (1, 2)]),
    st.sampled_from([0, 1, (2, 1), "same"]),
    st.sampled_from([1, 2]),
    st.sampled_from(["zeros", "circular"]),
)
def test_rows_are_what_the_convolution_reads(inputs, kernel, stride, padding, dilation, mode):
    if padding == "same":
        stride = 1
    torch.manual_seed(0)
    layer = nn.Conv2d(inputs, 4, kernel, stride, padding, dilation, padding_mode=mode)
    x = torch.randn(3, inputs, 7, 8)
    with torch.no_grad():
        output = layer(x)
        rows, chosen = rows_of(layer, x, output, 20, 0)
        expected = output.permute(0, 2, 3, 1).reshape(-1, 4)[chosen]
        assert torch.allclose(rows @ layer.weight.flatten(1).T + layer.bias, expected, atol=1e-5)


@pytest.mark.parametrize("rows", [64, 100_000], ids=["rows kept", "sums"])
def test_moments_are_those_of_the_rows(rows):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 6, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 5)).eval()
    found = moments(module, ["0", "3"], TASK, images=64, rows=rows)
    x = next(iter(TASK.batches("calibration", 64)))[0]
    with torch.no_grad():
        hidden = module[:3](x)
        answers = module(x)
    linear = found["3"]
    assert linear.count == 64
    for name, expected in (
        ("xx", hidden.T @ hidden),
        ("xy", hidden.T @ answers),
        ("yy", answers.square().sum(0)),
        ("x", hidden.sum(0)),
        ("y", answers.sum(0)),
    ):
        assert torch.allclose(getattr(linear, name).float(), expected, rtol=1e-4, atol=1e-4), name
    held = linear.centred()
    weight = module[3].weight.detach()
    assert held.error(weight) < 1e-5
    assert torch.allclose(held.bias(weight).float(), module[3].bias, atol=1e-4)
    assert found["0"].count == min(rows, 64 * 9)
    assert dict(each(module, ["0", "3"], TASK, images=64, rows=rows))["3"].moments().xy.equal(linear.xy)


def test_portions_give_the_same_as_one_pass(monkeypatch):
    module = small_network()
    whole = moments(module, ["0", "2"], TASK)
    monkeypatch.setattr("autocompress.ops.fit.HELD", 1)
    for name, held in each(module, ["0", "2"], TASK):
        assert torch.equal(held.moments().xx, whole[name].xx)


def test_a_layer_that_is_never_called_has_no_rows():
    module = small_network()
    module.spare = nn.Identity()
    module.spare.unused = nn.Conv2d(2, 3, 3)
    assert moments(module, ["spare.unused"], TASK)["spare.unused"].count == 0


def test_ridge_falls_back_on_the_prior():
    prior = torch.randn(2, 3)
    nothing = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    assert torch.allclose(ridge(*nothing, prior).float(), prior)
    rows = torch.randn(50, 3)
    rows[:, 2] = 0  # a channel that is always zero
    wanted = torch.tensor([[1.0, 2.0, 0.0], [3.0, -1.0, 0.0]])
    held = Moments(3, 2)
    held.add(rows, rows @ wanted.T)
    found = ridge(held.xx, held.xy, prior).float()
    assert torch.allclose(found[:, :2], wanted[:, :2], atol=1e-2)
    assert torch.allclose(found[:, 2], prior[:, 2], atol=1e-4)


def test_large_images_are_few():
    assert images_for(InputSpec(shape=(1, 8, 8))) == 256
    assert images_for(InputSpec(shape=(3, 224, 224))) == 32
