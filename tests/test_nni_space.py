import copy
import importlib.util
import pickle
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

from autocompress import export
from autocompress.models import Builder
from autocompress.models.nni_space import NniSpace, _overlap
from autocompress.parts import make_builder
from autocompress.tasks import InputSpec
from autocompress.types import TrialFailure, UserError

IMAGE = InputSpec(shape=(3, 32, 32))
WIDTHS = (16, 8, 16, 16, 24, 24, 32, 32, 64)
SPACES = {
    "MobileNetV3Space": {"num_labels": 10, "base_widths": WIDTHS, "width_multipliers": (0.5, 1.0, 2.0)},
    "ShuffleNetSpace": {"num_labels": 10},
    "ProxylessNAS": {"num_labels": 10, "base_widths": WIDTHS},
    "NasBench201": {"num_modules_per_stack": 1},
    "DARTS": {"num_cells": (3, 4), "width": (8, 16)},
    "AutoFormer": {"num_labels": 10, "img_size": 32, "search_depth": (2, 3)},
}
needs_nni = pytest.mark.skipif(importlib.util.find_spec("nni") is None, reason="needs the nni extra")


def settled(module):
    """In evaluation mode with batch statistics as of noise: signals reach the end of an untrained network."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.reset_running_stats()
            part.momentum = None
    with torch.no_grad():
        module.train()(torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    return module.eval()


def space(name):
    return make_builder(f"nni:{name}", IMAGE, SPACES[name])


@needs_nni
@pytest.mark.parametrize("name", SPACES)
def test_a_space_freezes_runs_and_exports(name):
    builder = space(name)
    assert isinstance(builder, NniSpace)
    assert isinstance(builder, Builder)
    choices = builder.choices()
    assert {knob: values[0] for knob, values in choices.items()} == builder.knobs
    assert len([values for values in choices.values() if len(values) > 1]) >= 5
    torch.manual_seed(0)
    parent = builder.build({}).eval()
    draw = random.Random(1)
    arch = {knob: draw.choice(values) for knob, values in choices.items()}
    child = builder.build(arch)
    builder.inherit(child, parent, arch)
    assert sum(p.numel() for p in child.parameters()) < sum(p.numel() for p in parent.parameters())
    settled(child)
    images = np.random.default_rng(0).standard_normal((5, 3, 32, 32)).astype(np.float32)
    exported = export.export(child, IMAGE, opset=17)
    assert export.parity(child, export.compose(exported), images) < 1e-3
    answers = child(torch.from_numpy(images))
    assert answers.shape == (5, 10)
    assert float(answers.detach().std(0).max()) > 1e-3  # the images reach the end
    twin = copy.deepcopy(child)
    assert torch.equal(twin(torch.from_numpy(images)), answers)


@needs_nni
def test_its_sites_are_layers_of_the_parent():
    builder = space("NasBench201")
    parent = builder.build({})
    sites = builder.sites()
    assert len(sites) > 10
    assert {"prune", "lowrank", "quantize"} <= {op for site in sites for op in site.ops}
    for site in sites:
        assert parent.get_submodule(site.name)


@needs_nni
def test_the_parent_is_the_largest_of_everything():
    knobs = space("MobileNetV3Space").knobs
    assert knobs["s0_width_mult"] == 2.0
    assert knobs["s2_depth"] == 4
    assert knobs["s2_i0_se"] == "se"
    assert knobs["resolution"] == 32
    assert {choice for knob, choice in space("NasBench201").knobs.items() if "/" in knob} == {"conv_3x3"}
    darts = space("DARTS").knobs
    assert (darts["normal/op_2_0"], darts["normal/input_2_0"], darts["normal/input_2_1"]) == ("sep_conv_5x5", 1, 0)


@needs_nni
def test_a_child_begins_with_what_fits_of_the_parent():
    builder = space("MobileNetV3Space")
    parent = builder.build({})
    arch = {"s0_width_mult": 1.0, "stem_ks": 3, "s2_depth": 2}
    child = builder.build(arch)
    builder.inherit(child, parent, arch)
    given, found = parent.state_dict(), child.state_dict()
    stem = next(name for name, tensor in found.items() if tensor.ndim == 4)
    assert (given[stem].shape, found[stem].shape) == ((32, 3, 5, 5), (16, 3, 3, 3))
    assert torch.equal(found[stem], given[stem][:16, :, 1:4, 1:4])
    same = [name for name, tensor in found.items() if name in given and given[name].shape == tensor.shape]
    assert len(same) > 100
    for name in same:
        assert torch.equal(found[name], given[name])


@needs_nni
def test_networks_share_nothing_and_a_copy_of_the_builder_makes_the_same():
    builder = space("NasBench201")
    one, other = builder.build({}), builder.build({})
    assert not {p.data_ptr() for p in one.parameters()} & {p.data_ptr() for p in other.parameters()}
    again = pickle.loads(pickle.dumps(builder))
    assert again.choices() == builder.choices()
    assert again.sites() == builder.sites()
    before = torch.random.get_rng_state()
    for name, tensor in again.build({}).state_dict().items():
        assert torch.equal(tensor, one.state_dict()[name])
    assert torch.equal(torch.random.get_rng_state(), before)


@needs_nni
@pytest.mark.parametrize(
    ("arch", "told"),
    [
        ({"cell/0_4": "conv_3x3"}, "unknown knob 'cell/0_4'; did you mean 'cell/0_"),
        (
            {"cell/0_1": "conv_5x5"},
            "cell/0_1 is one of none, skip_connect, conv_1x1, conv_3x3, avg_pool_3x3, not 'conv_5",
        ),
        ({"resolution": 64}, "resolution 64 is no number of pixels up to 32"),
    ],
)
def test_what_the_space_does_not_have_is_one_line(arch, told):
    with pytest.raises(UserError, match=told):
        space("NasBench201").build(arch)


@needs_nni
def test_values_that_do_not_go_together_are_a_failed_trial():
    builder = make_builder("nni:DARTS", IMAGE, {"num_cells": (2, 4), "width": 8})
    with pytest.raises(TrialFailure, match="nni:DARTS: NNI cannot freeze this sample: IndexError") as error:
        builder.build({"depth": 2})
    assert "\n" not in str(error.value)


@needs_nni
@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("MobilNetV3Space", {}, "NNI has no model space 'MobilNetV3Space'; did you mean 'MobileNetV3Space'"),
        ("NasBench201", {"classes": 3}, "nni:NasBench201: cannot be made: TypeError: .*'classes'"),
    ],
)
def test_a_space_that_cannot_be_made_is_one_line(name, options, told):
    with pytest.raises(UserError, match=told):
        make_builder(f"nni:{name}", IMAGE, options)


def test_without_nni_it_is_the_pip_line(monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == "nni"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "nni", None)
    with pytest.raises(UserError, match=r"needs more packages: pip install 'autocompress\[nni\]'"):
        make_builder("nni:DARTS", IMAGE, {})


@pytest.mark.parametrize(
    ("child", "parent"),
    [((4, 2, 3, 3), (8, 4, 5, 5)), ((8, 4, 5, 5), (4, 2, 3, 3)), ((3, 5), (4, 5)), ((2,), (7,)), ((), ())],
)
def test_what_two_tensors_share(child, parent):
    mine, theirs = torch.zeros(child), torch.arange(float(np.prod(parent))).reshape(parent)
    into, where = _overlap(mine, theirs)
    assert mine[into].shape == theirs[where].shape == tuple(map(min, child, parent))
    if len(child) == 4:
        middle = theirs[: mine[into].shape[0], : mine[into].shape[1], parent[2] // 2, parent[3] // 2]
        mine[into] = theirs[where]
        assert torch.equal(mine[: middle.shape[0], : middle.shape[1], child[2] // 2, child[3] // 2], middle)
