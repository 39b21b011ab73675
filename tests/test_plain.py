"""Wrapped, parametrized, lazy and frozen networks become plain ones, and files saved before that fill them."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from autocompress.models.foreign import Foreign
from autocompress.models.plain import copied, plain
from autocompress.parent import load_parent
from autocompress.tasks import InputSpec
from autocompress.types import UserError

IMAGE = InputSpec(shape=(3, 8, 8))


def network(wrap=lambda layer: layer):
    return nn.Sequential(
        wrap(nn.Conv2d(3, 8, 3, padding=1)),
        nn.ReLU(),
        wrap(nn.Conv2d(8, 8, 3, stride=4)),
        nn.Flatten(),
        wrap(nn.Linear(32, 6)),
    )


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


WRAPS = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight norm": old_weight_norm,
    "old spectral norm": nn.utils.spectral_norm,
    "masks": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


def changed(module):
    """As after some training: nothing is as it was drawn, a forward has been run."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    module(torch.randn(2, 3, 8, 8))
    return module.eval()


@pytest.mark.parametrize("kind", WRAPS)
def test_computed_weights_are_computed_once_and_old_files_fill_them(kind, tmp_path):
    torch.manual_seed(0)
    module = changed(network(WRAPS[kind]))
    images = torch.randn(4, 3, 8, 8)
    expected = module(images)
    torch.save({"state_dict": module.state_dict()}, tmp_path / "own.pt")
    builder = Foreign.of(module, IMAGE)
    built = builder.build({})
    assert type(built[0]) is nn.Conv2d
    assert sorted(built.state_dict()) == sorted(network().state_dict())
    assert {"prune", "replace", "lowrank", "quantize"} <= set(builder.sites()[0].ops)
    filled = load_parent(Foreign("mine", lambda: network(WRAPS[kind]), IMAGE).build({}), tmp_path / "own.pt")
    sent = pickle.loads(pickle.dumps(builder)).build({}).eval()
    for one in (built.eval(), filled, sent):
        torch.testing.assert_close(one(images), expected)
    torch.testing.assert_close(module(images), expected)  # the user's own is as it was


def test_weights_after_folding_and_before_are_told_apart(tmp_path):
    def make():
        return network(parametrizations.weight_norm)

    built = Foreign("mine", make, IMAGE).build({})
    torch.save(built.state_dict(), tmp_path / "ours.pt")
    again = load_parent(Foreign("mine", make, IMAGE).build({}), tmp_path / "ours.pt")
    assert torch.equal(again[0].weight, built[0].weight)
    tensors = network(parametrizations.weight_norm).state_dict()
    tensors["0.parametrizations.weight.original1"] = torch.zeros(8, 4, 3, 3)
    torch.save(tensors, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt: weights of another network: 0\.weight is missing"):
        load_parent(Foreign("mine", make, IMAGE).build({}), tmp_path / "other.pt")


def compiled(module):
    return torch.compile(module, backend="eager")


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled, lambda m: nn.Sequential(nn.DataParallel(m))])
def test_wrappers_come_off(wrap, tmp_path):
    module = changed(network())
    wrapped = wrap(copy.deepcopy(module))
    torch.save(wrapped.state_dict(), tmp_path / "wrapped.pt")
    builder = Foreign.of(wrapped, IMAGE)
    assert not any(isinstance(part, nn.DataParallel) for part in builder.build({}).modules())
    assert "_orig_mod" not in "".join(builder.build({}).state_dict())
    found = load_parent(builder.build({}), tmp_path / "wrapped.pt")
    torch.testing.assert_close(found(torch.ones(2, 3, 8, 8)), module(torch.ones(2, 3, 8, 8)))


def test_a_file_of_a_network_that_was_wrapped_in_part(tmp_path):
    module = nn.Sequential(network(), nn.Linear(6, 2))
    inner = {name.replace("0.", "0.module.", 1): tensor for name, tensor in module.state_dict().items()}
    torch.save({"net": inner, "acc": 0.9}, tmp_path / "inner.pt")
    found = load_parent(Foreign.of(module, IMAGE).build({}), tmp_path / "inner.pt")
    assert torch.equal(found[0][0].weight, module[0][0].weight)


@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.zeros(1, 3, 8, 8))])
def test_torchscript_is_one_line(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script = make(network().eval())
    with pytest.raises(UserError, match=r"^model \S+: it is TorchScript, in which nothing can be changed; give the"):
        Foreign.of(script, IMAGE)
    with pytest.raises(UserError, match=r"^model mine: its 0 is TorchScript"):
        Foreign("mine", lambda: nn.Sequential(script), IMAGE).build({})


def lazy():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(5))


def test_lazy_layers_get_their_shapes_from_the_task():
    module = lazy()
    for builder in (Foreign("mine", lazy, IMAGE), Foreign.of(module, IMAGE)):
        assert [site.in_channels for site in builder.sites()] == [3, 144]
        assert builder.build({})[3].weight.shape == (5, 144)
    assert isinstance(module[3], nn.LazyLinear)
    assert isinstance(copied(module)[1], nn.LazyBatchNorm2d)
    flat = InputSpec(shape=(7,))
    with pytest.raises(UserError, match=r"^model mine: its lazy layers cannot get their shapes .* \(7,\): \w+Error: "):
        Foreign("mine", lazy, flat).build({})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_all_is_float32(dtype):
    module = network().to(dtype)
    built = Foreign.of(module, IMAGE).build({})
    assert {tensor.dtype for tensor in built.state_dict().values()} == {torch.float32}
    assert module[0].weight.dtype == dtype


def test_frozen_layers_learn_and_frozen_tensors_of_others_do_not():
    class Place(nn.Module):
        def __init__(self):
            super().__init__()
            self.place = nn.Parameter(torch.zeros(3, 1, 1), requires_grad=False)

        def forward(self, images):
            return images + self.place

    module = nn.Sequential(Place(), network().requires_grad_(False))
    learning = {name for name, one in plain(module, IMAGE, "mine").named_parameters() if one.requires_grad}
    assert learning == {f"1.{name}" for name in network().state_dict()}
