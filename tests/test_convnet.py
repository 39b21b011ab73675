"""The network family: shapes, knobs, inheritance on real digits, sites and counts, the example builder."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from autocompress import load
from autocompress.models import Builder
from autocompress.models.blocks import KINDS, Shuffle, ShuffledConv, slot
from autocompress.models.convnet import PARENT, ConvNet
from autocompress.models.inheritance import read, resize_kernel, write
from autocompress.models.trace import count, leaves, sites, thop_count
from autocompress.space import cardinality, parent
from autocompress.tasks.digits import Digits
from autocompress.types import UserError

ROOT = Path(__file__).parents[1]
SMALL = {"resolution": 8, "width.0": 32, "width.1": 48, "width.2": 64}
TASK = Digits()


def estimate(module: nn.Module) -> None:
    """Batch-norm statistics from the training split, as one average."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
            part.momentum = None
    module.train()
    with torch.no_grad():
        for inputs, _ in TASK.batches("train", 128):
            module(inputs)
    module.eval()


@torch.no_grad()
def accuracy(module: nn.Module) -> float:
    inputs, targets = next(TASK.batches("selection", 360))
    return float((module(inputs).argmax(1) == targets).float().mean())


@pytest.fixture(scope="module")
def trained() -> tuple[ConvNet, nn.Module]:
    torch.manual_seed(0)
    builder = ConvNet(arch=SMALL)
    module = builder.build({}).to(memory_format=torch.channels_last)
    steps = 8 * 34
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps, pct_start=0.25)
    for epoch in range(8):
        for inputs, targets in TASK.batches("train", 32, seed=epoch):
            loss = TASK.loss(module(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    module.eval()
    assert accuracy(module) > 0.95
    return builder, module


# --- building ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", [{}, {"depth.0": 1, "kernel.1": 1, "width.2": 32}, {"resolution": 12, "kernel.0": 5}])
def test_every_kind_builds_and_gives_one_row_of_logits_per_image(kind, arch):
    builder = ConvNet(arch=SMALL)
    module = builder.build(arch | {f"kind.{stage}": kind for stage in range(3)})
    assert module(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_input_and_classes_follow_the_arguments_not_the_resolution():
    builder = ConvNet(in_channels=3, classes=7, size=(10, 20), arch=SMALL)
    module = builder.build({})
    assert module.resize == (8, 16)
    assert module(torch.zeros(2, 3, 10, 20)).shape == (2, 7)


def test_the_builder_follows_the_protocol_and_its_knobs_are_the_parents():
    builder = ConvNet()
    assert isinstance(builder, Builder)
    assert builder.knobs == PARENT
    assert ConvNet(arch={"width.1": 96}).knobs == {**PARENT, "width.1": 96}


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ({"widht.0": 32}, "unknown knob 'widht.0'"),
        ({"kind.1": "dense"}, "kind.1 = 'dense'"),
        ({"kernel.0": 2}, "choose an odd number"),
        ({"depth.2": 0}, "depth.2 = 0"),
        ({"depth.2": True}, "depth.2 = True"),
        ({"width.0": 32.0}, "width.0 = 32.0"),
        ({"resolution": 2}, "resolution = 2"),
        ({"kind.1": "shuffle", "width.0": 40}, "width.0 to be a multiple of 16"),
    ],
)
def test_a_bad_choice_is_named(arch, said):
    with pytest.raises(UserError, match="builder convnet") as caught:
        ConvNet().build(arch)
    assert said in str(caught.value)


def test_shortcuts_are_identities_or_projections_and_plain_has_none():
    module = ConvNet(arch=SMALL).build({"kind.2": "plain"})
    assert isinstance(module.stages[0][0].shortcut, nn.Identity)
    assert isinstance(module.stages[1][0].shortcut, nn.Sequential)
    assert isinstance(module.stages[1][1].shortcut, nn.Identity)
    assert module.stages[2][0].shortcut is None


# --- slots: dense weights read and written ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_slot_computes_what_its_dense_weight_says(kind):
    torch.manual_seed(1)
    part, x = slot(kind, 16, 32, 3, 2), torch.randn(2, 16, 6, 6)
    assert torch.allclose(part(x), nn.functional.conv2d(x, read(part), stride=2, padding=1), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_writing_what_was_read_changes_nothing(kind):
    torch.manual_seed(2)
    part = slot(kind, 16, 32, 3, 1)
    other, x = slot(kind, 16, 32, 3, 1), torch.randn(2, 16, 6, 6)
    with torch.no_grad():
        write(other, read(part))
    assert torch.allclose(other(x), part(x), atol=1e-5)


def test_separable_is_the_best_rank_one_fit():
    torch.manual_seed(3)
    dense, part = torch.randn(32, 16, 3, 3), slot("separable", 16, 32, 3, 1)
    with torch.no_grad():
        write(part, dense)
    singular = torch.linalg.svdvals(dense.transpose(0, 1).reshape(16, 32, 9))
    assert float((read(part) - dense).square().sum()) == pytest.approx(float(singular[:, 1:].square().sum()), rel=1e-4)


def test_shuffle_sends_channel_q_to_group_q_mod_groups():
    x = torch.arange(12.0).reshape(1, 12, 1, 1)
    assert Shuffle(4)(x).flatten().tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


def test_kernels_are_cropped_or_padded_around_their_centre():
    weight = torch.arange(9.0).reshape(1, 1, 3, 3)
    assert resize_kernel(weight, 1).item() == 4
    assert torch.equal(resize_kernel(resize_kernel(weight, 7), 3), weight)


# --- inheritance on real data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "least"),
    [
        ({"width.0": 16}, 0.3),
        ({"width.1": 32}, 0.5),
        ({"width.0": 24, "width.1": 40, "width.2": 48}, 0.5),
        ({"kernel.2": 1}, 0.4),
        ({"depth.2": 1}, 0.5),
        ({"depth.0": 1, "depth.1": 1, "depth.2": 1}, 0.3),
        ({"kind.0": "plain"}, 0.5),
        ({"kind.2": "separable"}, 0.3),
        ({"kind.2": "shuffle"}, 0.3),
    ],
    ids=str,
)
def test_an_heir_is_far_better_than_chance_before_any_training(trained, arch, least):
    builder, giver = trained
    torch.manual_seed(4)
    heir = builder.build(arch)
    stranger = copy.deepcopy(heir)
    builder.inherit(heir, giver, arch)
    estimate(heir)
    estimate(stranger)
    assert accuracy(heir) >= least
    assert accuracy(heir) > accuracy(stranger) + 0.2


@pytest.mark.parametrize(
    "arch",
    [{}, {"kernel.0": 5, "kernel.1": 7}, {"width.0": 48, "width.1": 64, "width.2": 80}, {"depth.1": 3, "depth.2": 4}],
    ids=str,
)
def test_a_child_that_can_hold_the_parent_computes_the_same(trained, arch):
    builder, giver = trained
    child = builder.build(arch)
    builder.inherit(child, giver, arch)
    child.eval()
    inputs, _ = next(TASK.batches("selection", 64))
    with torch.no_grad():
        expected, found = giver(inputs), child(inputs)
    assert torch.allclose(expected, found, atol=1e-4 * float(expected.abs().max()))


def test_inheriting_is_deterministic_and_leaves_the_parent_alone(trained):
    builder, giver = trained
    before = {name: tensor.clone() for name, tensor in giver.state_dict().items()}
    arch = {"width.1": 32, "kind.1": "separable"}
    torch.manual_seed(5)
    children = [builder.build(arch), builder.build(arch)]
    for child in children:
        builder.inherit(child, giver, arch)
    for name, tensor in children[0].state_dict().items():
        assert torch.equal(tensor, children[1].state_dict()[name]), name
    for name, tensor in giver.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_inherits_from_every_kind(kind):
    giver_builder = ConvNet(arch={**SMALL, **{f"kind.{stage}": kind for stage in range(3)}})
    giver = giver_builder.build({})
    for other in KINDS:
        arch = {f"kind.{stage}": other for stage in range(3)}
        child = giver_builder.build(arch)
        giver_builder.inherit(child, giver, arch)
        assert torch.isfinite(child.eval()(torch.zeros(1, 1, 8, 8))).all()


def test_inheriting_from_a_stranger_is_refused():
    builder = ConvNet(arch=SMALL)
    with pytest.raises(UserError, match="Linear"):
        builder.inherit(builder.build({}), nn.Linear(2, 2), {})
    with pytest.raises(UserError, match="widths"):
        builder.inherit(builder.build({}), builder.build({}), {"width.0": 16})


# --- sites and counts -------------------------------------------------------------------------------------------


def test_sites_run_from_input_to_output_and_know_when_they_exist():
    found = {site.name: site for site in ConvNet().sites()}
    names = list(found)
    assert names[0] == "stem.conv"
    assert names[-1] == "head"
    assert len(names) == 16
    assert [site.depth for site in found.values()] == sorted(site.depth for site in found.values())
    assert found["stages.1.0.conv1"].when == {}
    assert found["stages.1.1.conv2"].when == {"depth.1": (2,)}
    assert found["stages.2.0.shortcut.0"].when == {"kind.2": ("residual", "separable", "shuffle")}
    deep = {site.name: site for site in ConvNet(arch={**SMALL, "depth.1": 4}).sites()}
    assert deep["stages.1.1.conv1"].when == {"depth.1": (2, 3, 4)}
    assert deep["stages.1.3.conv2"].when == {"depth.1": (4,)}


def test_prune_stands_at_the_first_producer_of_each_group_only():
    found = {site.name for site in ConvNet().sites() if "prune" in site.ops}
    inner = {f"stages.{stage}.{block}.conv1" for stage in range(3) for block in range(2)}
    assert found == inner | {"stem.conv", "stages.1.0.conv2", "stages.2.0.conv2"}


def test_sites_add_up_to_the_whole_network_and_asking_leaves_the_seed_alone():
    builder = ConvNet()
    torch.manual_seed(6)
    before = torch.random.get_rng_state()
    found = builder.sites()
    assert torch.equal(before, torch.random.get_rng_state())
    macs, parameters = count(builder.build({}), torch.zeros(1, 1, 8, 8))
    assert sum(site.macs for site in found) == macs
    assert macs > 50e6
    norms = sum(2 * part.num_features for part in builder.build({}).modules() if isinstance(part, nn.BatchNorm2d))
    assert sum(site.parameters for site in found) + norms == parameters


def test_sites_of_a_strangers_module():
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(32, 5))
    module.train()
    found = sites(module, torch.zeros(2, 3, 6, 6))
    assert [(site.name, site.kind) for site in found] == [("0", "conv"), ("2", "depthwise"), ("4", "linear")]
    always = ("sparsify", "qat", "quantize", "store")
    assert [site.ops for site in found] == [("replace", "prune", "lowrank", *always), always, ("lowrank", *always)]
    assert found[0].macs == 8 * 3 * 9 * 16
    assert module.training


@pytest.mark.parametrize("kind", KINDS)
def test_thop_and_torch_count_alike(kind):
    """thop adds batch norm, pooling and resizing: 0.6 % of the parent, more where the convolutions are light."""
    module, example = ConvNet().build({f"kind.{stage}": kind for stage in range(3)}), torch.zeros(1, 1, 8, 8)
    macs, parameters = count(module, example)
    thop_macs, thop_parameters = thop_count(module, example)
    assert parameters == thop_parameters
    assert macs <= thop_macs <= macs * (1.01 if kind in ("plain", "residual") else 1.06)
    assert not any("total_ops" in name for name in module.state_dict())


def test_counts_are_per_example_and_leave_modes_alone():
    module = ConvNet(arch=SMALL).build({}).train()
    module.stem.eval()
    assert count(module, torch.zeros(4, 1, 8, 8)) == count(module, torch.zeros(1, 1, 8, 8))
    assert module.training
    assert not module.stem.training
    assert int(module.stages[0][0].bn1.num_batches_tracked) == 0


def test_leaves_are_found_at_and_under_a_site():
    module = ConvNet(arch=SMALL).build({"kind.1": "separable"})
    assert leaves(module, "stages.1.0.conv1") == ("stages.1.0.conv1.0", "stages.1.0.conv1.1")
    assert leaves(module, "stages.0.0.conv1") == ("stages.0.0.conv1",)
    assert leaves(module, "stages.0.0.conv") == ()
    assert len(leaves(module, ".")) == 16 + 4
    assert isinstance(ConvNet().build({"kind.0": "shuffle"}).stages[0][0].conv1, ShuffledConv)


# --- shelf and example --------------------------------------------------------------------------------------------


def test_the_space_on_the_shelf_fits_the_builder():
    space = load.space("convnet", ConvNet())
    assert 40 <= len(space.genes) <= 70
    assert cardinality(space) > 10**12
    assert parent(space) == (0,) * len(space.genes)
    ops = {gene.op for gene in space.genes if gene.kind == "policy"}
    assert ops == {"prune", "lowrank", "quantize", "distill"}


def test_the_example_builder():
    builder = runpy.run_path(str(ROOT / "examples" / "my_builder.py"))["Perceptron"]()
    assert isinstance(builder, Builder)
    giver, child = builder.build({}), builder.build({"hidden": 32})
    builder.inherit(child, giver, {"hidden": 32})
    assert child(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert [site.name for site in builder.sites()] == ["1", "3"]
    assert builder.sites()[0].ops == ("prune", "lowrank", "sparsify", "qat", "quantize", "store")
    with pytest.raises(UserError, match="no knob 'depth'"):
        builder.build({"depth": 2})
