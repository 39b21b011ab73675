import copy
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from autocompress import export
from autocompress.models import Builder
from autocompress.models.attention import Attention
from autocompress.models.foreign import Foreign, answer
from autocompress.models.sources import torchvision
from autocompress.models.trace import count, examples
from autocompress.parent import load_parent, strangers, tied, train_parent
from autocompress.parts import make_builder, make_space
from autocompress.pipeline import Work, export_float, frozen, load_weights, weights_of
from autocompress.tasks import InputSpec
from autocompress.train import Training, reestimate_batchnorm
from autocompress.types import Profile, SearchPlan, TrialFailure, UserError

IMAGE = InputSpec(shape=(3, 32, 32))
FLAT = InputSpec(shape=(4,))


class Small(nn.Module):
    """A little of everything: convolution, batch norm, attention, linear layers."""

    def __init__(self, classes=5):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.norm = nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, classes)

    def forward(self, images):
        rows = functional.relu(self.norm(self.conv(images))).flatten(2).transpose(1, 2)
        return self.head(rows.mean(1) + self.attention(rows, rows, rows, need_weights=False)[0].mean(1))


class Tied(nn.Module):
    """An autoencoder of words whose two ends are one matrix."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.middle = nn.Linear(6, 6)
        self.out = nn.Linear(6, 11)
        self.out.weight = self.words.weight

    def forward(self, words):
        return self.out(self.middle(self.words(words)).mean(1))


class Branching(nn.Module):
    """Two ways, taken by the brightness of what comes in."""

    def __init__(self):
        super().__init__()
        self.dark, self.bright = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, rows):
        if rows.mean() > 0.3:
            return self.bright(rows)
        return self.dark(rows)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        return rows.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Singular(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        return torch.linalg.svdvals(rows.unsqueeze(-1))

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError


class Custom(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.first, self.last = function, nn.Linear(4, 8), nn.Linear(8 if function is Straight else 1, 3)

    def forward(self, rows):
        return self.last(self.function.apply(self.first(rows)))


def seeded(make):
    torch.manual_seed(0)
    return make()


def test_it_is_a_builder_with_the_networks_own_names():
    builder = Foreign("mine", Small, IMAGE)
    assert isinstance(builder, Builder)
    parent = builder.build({}).eval()
    names = [site.name for site in builder.sites() if site.kind != "block"]
    assert names == ["conv", *(f"attention.{layer}" for layer in ("q", "k", "v", "proj")), "head"]
    assert isinstance(parent.attention, Attention)
    child = builder.build({})
    builder.inherit(child, parent, {})
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(child.eval()(images), parent(images))


def test_an_object_gives_copies_of_itself_and_stays_as_it_was():
    module = seeded(Small).eval()
    builder = Foreign.of(module, IMAGE)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(builder.build({}).eval()(images), module(images))
    assert isinstance(module.attention, nn.MultiheadAttention)
    assert not module._forward_hooks
    again = pickle.loads(pickle.dumps(builder))
    assert again.sites() == builder.sites()
    torch.testing.assert_close(again.build({}).eval()(images), module(images))


def test_resolutions_are_those_that_the_network_takes():
    builder = Foreign("mine", Small, IMAGE)
    assert builder.knobs == {"resolution": 32}
    assert builder.choices() == {"resolution": (32, 28, 24, 20, 16)}
    images = torch.randn(2, 3, 32, 32)
    whole, small = builder.build({}).eval(), builder.build({"resolution": 16}).eval()
    builder.inherit(small, whole, {"resolution": 16})
    smaller = functional.interpolate(images, size=(16, 16), mode="bilinear")
    torch.testing.assert_close(small(images), whole(smaller))
    model = export.compose(export.export(small, IMAGE, opset=17))
    assert export.parity(small, model, images.numpy()) < 1e-4


@pytest.mark.parametrize(
    ("make", "spec"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2)), IMAGE),  # one size only
        (lambda: nn.Conv2d(3, 4, 1), IMAGE),  # answers grow with the image
        (lambda: nn.Linear(4, 2), FLAT),
        (Small, InputSpec(shape=(3, 32, 16))),
        (Small, InputSpec(shape=(3, 32, 32), others=(FLAT,))),
    ],
)
def test_no_resolution_where_it_cannot_be_chosen(make, spec):
    builder = Foreign("mine", make, spec)
    assert builder.knobs == {}
    assert builder.choices() == {}


@pytest.mark.parametrize(
    ("arch", "told"),
    [
        ({"depth": 2}, "unknown knob 'depth'; it has resolution"),
        ({"resolution": 64}, "resolution 64 is no number of pixels up to 32"),
        ({"resolution": "small"}, "resolution 'small' is no number"),
        ({"resolution": 0}, "resolution 0 is no number"),
    ],
)
def test_a_choice_that_makes_no_sense_is_one_line(arch, told):
    with pytest.raises(UserError, match=told):
        Foreign("mine", Small, IMAGE).build(arch)


class Text(nn.Module):
    def forward(self, images):
        return "text"


def broken():
    raise ZeroDivisionError("division\nby zero")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (broken, "model mine: cannot be made: ZeroDivisionError: division by zero"),
        (lambda: 3, "model mine: gives a int, not an nn.Module"),
        (lambda: nn.Linear(5, 2), r"does not run on the task's input \(3, 32, 32\): RuntimeError: mat1 and mat2"),
        (Text, "answers with a str that holds no"),
    ],
)
def test_a_network_that_is_none_is_one_line(make, told):
    with pytest.raises(UserError, match=told) as error:
        Foreign("mine", make, IMAGE).sites()
    assert "\n" not in str(error.value)


def test_a_users_function_is_called_with_its_options(tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text(
        "from torch import nn\ndef flat(width, classes=2):\n"
        "    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    builder = make_builder("own_nets:flat", FLAT, {"width": 9})
    assert builder.build({})[2].in_features == 9
    assert builder.name == "own_nets:flat"
    with pytest.raises(UserError, match="has no option 'widht'; did you mean 'width'"):
        make_builder("own_nets:flat", FLAT, {"widht": 9})
    with pytest.raises(
        UserError, match=r"cannot be made: TypeError: .*missing 1 required positional argument: 'width'"
    ):
        make_builder("own_nets:flat", FLAT, {}).build({})
    monkeypatch.delitem(sys.modules, "own_nets")


def test_answers_of_any_form_become_tensors():
    one, other = torch.zeros(2, 3), torch.ones(2, 3)
    record = type("Record", (), {"logits": one})()
    module = nn.Identity()
    assert answer(module, (), one) is one
    assert answer(module, (), record) is one
    assert answer(module, (), {"aux": other, "out": one}) is one
    assert answer(module, (), {"boxes": other, "scores": one}) == (other, one)
    assert answer(module, (), [one, None, other]) == (one, other)
    with pytest.raises(UserError, match="holds no tensor"):
        answer(module, (), {"text": "none"})


def test_a_network_without_a_tensor_in_its_answer_is_said_once():
    class Words(nn.Module):
        def forward(self, images):
            return {"n": 3}

    with pytest.raises(UserError, match=r"^model Words: answers with a dict that holds no tensor; return tensors$"):
        Foreign("mine", Words, IMAGE).sites()


# --- weights ----------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    """Writes tensors (or what holds them) to a file."""

    def write(content, name="weights.pt"):
        path = tmp_path / name
        torch.save(content, path)
        return path

    return write


def loaded(path, make=Small, spec=IMAGE):
    return load_parent(Foreign("mine", make, spec).build({}), path)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: tensors,
        lambda tensors: {"state_dict": tensors, "epoch": 3},
        lambda tensors: {"model": tensors, "optimizer": {"lr": 0.1}},
        lambda tensors: {"model_state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}},
        lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
        lambda tensors: {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()},
        lambda tensors: {"state_dict": {f"model.{name}": tensor for name, tensor in tensors.items()}},
        lambda tensors: {name: tensor for name, tensor in tensors.items() if "num_batches" not in name},
    ],
)
def test_weights_as_training_scripts_save_them(weights, wrap):
    module = seeded(Small).eval()  # saved before its attention is unfolded
    images = torch.randn(2, 3, 32, 32)
    found = loaded(weights(wrap(module.state_dict())))
    torch.testing.assert_close(found(images), module(images))
    assert not found.training


def test_our_own_files_load_too(tmp_path):
    module = Foreign("mine", Small, IMAGE).build({}).eval()
    (tmp_path / "ours.safetensors").write_bytes(weights_of(module))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(tmp_path / "ours.safetensors")(images), module(images))


def test_a_prefix_that_is_the_networks_own_stays(weights):
    def make():
        network = nn.Module()
        network.module = nn.Linear(4, 2)
        network.forward = network.module.forward
        return network

    saved = make()
    found = loaded(weights(saved.state_dict()), make, FLAT)
    assert torch.equal(found.module.weight, saved.module.weight)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"head.weight": torch.zeros(5, 9)}, r"head.weight is \(5, 9\), the network has \(5, 8\)"),
        (
            {"conv.bias": torch.full((8,), float("nan"))},
            r"weights\.pt: conv.bias holds numbers that are not finite; take",
        ),
        ({"norm.running_var": torch.full((8,), torch.inf)}, "norm.running_var holds numbers that are not finite"),
        ({"attention.in_proj_weight": torch.zeros(27, 8)}, r"attention.q.weight is \(9, 8\), the network has \(8, 8\)"),
        ({"extra": torch.zeros(1)}, "extra is not the network's"),
        ({"head.bias": None}, "head.bias is missing"),
    ],
)
def test_weights_of_another_network_name_the_tensor(weights, change, told):
    tensors = {**Small().state_dict(), **change}
    path = weights({name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(UserError, match=told) as error:
        loaded(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [3, {"state_dict": 3}, [torch.zeros(2)], {"model": {"epoch": 1}}])
def test_a_file_without_a_state_dict(weights, content):
    with pytest.raises(UserError, match="does not hold a state dict of tensors"):
        loaded(weights(content))


def test_a_pickled_network_is_not_executed(weights):
    with pytest.raises(UserError, match=r"holds \S*test_foreign\.Small beside tensors, which is not loaded; save the"):
        loaded(weights(Small()))


class Command:
    """Runs when it is unpickled."""

    def __init__(self, ran):
        self.ran = ran

    def __reduce__(self):
        return Path.touch, (self.ran,)


@pytest.mark.parametrize("protocol", [2, 4])  # torch remarks on the second, which is no warning of ours
def test_code_in_a_file_of_weights_is_not_run(tmp_path, protocol):
    path, ran = tmp_path / "weights.pt", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Command(ran), protocol=protocol))
    with pytest.raises(
        UserError, match=r"weights\.pt: (holds \S+ beside tensors|is no weights file).*; save the weights"
    ):
        loaded(path)
    assert not ran.exists()


@pytest.mark.parametrize("content", [b"hello", b""])
def test_a_file_that_is_none_of_weights(tmp_path, content):
    (path := tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"weights\.pt: (is no weights file; save the weights alone|not readable)"):
        loaded(path)


# --- networks that make trouble -----------------------------------------------------------------------------------


WORDS = InputSpec(shape=(7,), dtype="int64")


def test_tied_weights_stay_tied(weights):
    builder = Foreign("mine", Tied, WORDS)
    parent = builder.build({})
    assert tied(parent) == [["words.weight", "out.weight"]]
    child = builder.build({})
    builder.inherit(child, parent, {})
    copies = (child, Foreign.of(parent, WORDS).build({}), load_weights(builder.build({}), weights_of(parent)))
    for one in copies:
        assert one.out.weight is one.words.weight
        assert torch.equal(one.out.weight, parent.out.weight)
    once = {name: tensor for name, tensor in parent.state_dict().items() if name != "out.weight"}
    assert torch.equal(loaded(weights(once), Tied, WORDS).out.weight, parent.words.weight)
    model = export.compose(export.export(parent, WORDS, opset=17))
    assert export.parity(parent, model, np.arange(21).reshape(3, 7) % 11) < 1e-5


def test_two_tensors_for_a_tied_one_are_refused(weights):
    tensors = {**Tied().state_dict(), "out.weight": torch.zeros(11, 6)}
    with pytest.raises(UserError, match=r"out\.weight and words\.weight differ, the network has one tensor"):
        loaded(weights(tensors), Tied, WORDS)


def test_a_branch_on_the_data_is_found_by_parity_and_named():
    """A file keeps one way: as long as no data take the other it is right, and nothing tells them apart."""
    module = seeded(Foreign("mine", Branching, FLAT).make)
    model = export.compose(export.export(module, FLAT, opset=17))
    dark, bright = np.zeros((5, 4), np.float32), np.ones((5, 4), np.float32)
    assert export.parity(module, model, dark) < 1e-6
    with pytest.raises(TrialFailure, match=r"decides at test_foreign.py:\d+ \(if rows.mean\(\) > 0.3:\)") as error:
        export.parity(module, model, bright)
    assert "\n" not in str(error.value)


class Guarded(nn.Module):
    """Looks at its data and goes one way always; asks for shapes too."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, rows):
        if rows.shape[-1] != 4:
            raise ValueError("four, please")
        if torch.isnan(rows).any():
            raise ValueError("not a number")
        return self.head(rows)


class Lit:
    """Rows of which a share is bright."""

    name, metric, input = "rows", "accuracy", FLAT

    def __init__(self, bright):
        self.bright = bright

    def batches(self, split, size, *, limit=None, seed=None):
        rows = torch.rand(32, 4, generator=torch.Generator().manual_seed(0)) * 0.2
        rows[20 : 20 + self.bright] += 1
        for part in rows[:limit].split(size):
            yield part, torch.zeros(len(part), dtype=torch.int64)


@pytest.mark.parametrize(("make", "bright"), [(Branching, 0), (Guarded, 0), (Branching, 8), (Custom, 0)])
def test_a_file_of_a_network_that_decides_by_its_data_is_tried_on_more_of_it(make, bright):
    module = seeded(lambda: make(Straight) if make is Custom else make()).eval()
    work = Work(Foreign("mine", make, FLAT), Lit(bright), {}, module, (Profile(name="any"),))
    model = export.compose(export_float(work, module))
    if bright:
        with pytest.raises(TrialFailure, match=r"decides at test_foreign.py:\d+ \(if rows.mean\(\) > 0.3:\)"):
            frozen(work, model)
        return
    told = {Branching: "if rows.mean() > 0.3:", Guarded: "if torch.isnan(rows).any():"}.get(make)
    assert told in frozen(work, model) if told else frozen(work, model) == ""


def test_a_function_with_a_gradient_of_its_own_is_written_as_what_it_computes():
    builder = Foreign("mine", lambda: Custom(Straight), FLAT)
    module = seeded(lambda: builder.build({}))
    assert [site.name for site in builder.sites()] == ["first", "last"]
    rows = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    assert export.parity(module, export.compose(export.export(module, FLAT, opset=17)), rows) < 1e-5


def test_a_function_that_no_file_can_hold_is_one_line():
    module = Custom(Singular)
    with pytest.raises(
        TrialFailure, match=r"the torch.autograd.Function at test_foreign.py:\d+ computes what ONNX cannot"
    ) as error:
        export.export(module, FLAT, opset=17)
    assert "\n" not in str(error.value)


class Backwards(torch.autograd.Function):
    """A function whose gradient is broken."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no way\nback")


def test_a_function_without_a_gradient_names_its_place():
    class Net(nn.Sequential):
        def forward(self, images):
            return super().forward(Backwards.apply(images + self[1].bias[0]))

    net = Net(nn.Flatten(), nn.Linear(192, 2))
    with (
        pytest.raises(UserError, match=r"^model mine: cannot be trained: RuntimeError at test_foreign.py:\d+: no way"),
        strangers("mine"),
    ):
        train_parent(net, One(), 1, 0)
    with pytest.raises(RuntimeError), strangers("convnet"):
        train_parent(net, One(), 1, 0)


def test_a_network_for_one_sample_only_is_said():
    class Alone(nn.Module):
        def forward(self, rows):
            return rows.view(1, 4)

    with pytest.raises(UserError, match=r"^model mine: runs on one sample but not on a batch of two; let it take any"):
        Foreign("mine", Alone, FLAT).sites()


def test_a_batch_size_written_into_the_file_is_one_line():
    class Fixed(nn.Module):
        def forward(self, rows):
            return rows.reshape(int(rows.shape[0]), 2, 2)

    model = export.compose(export.export(Fixed(), FLAT, opset=17))
    with pytest.raises(TrialFailure, match="parity: the file does not run on a batch of 5") as error:
        export.parity(Fixed(), model, np.zeros((5, 4), np.float32))
    assert "\n" not in str(error.value)


def test_nothing_to_act_on_is_said():
    with pytest.raises(UserError, match=r"^space: auto: model mine has no layer or block that an op could act on$"):
        make_space("auto", Foreign("mine", nn.Flatten, FLAT), (), SearchPlan())


class One:
    """A task whose passes end in a batch of one."""

    name, metric, input = "one", "accuracy", InputSpec(shape=(3, 8, 8))

    def batches(self, split, size, *, limit=None, seed=None):
        generator = torch.Generator().manual_seed(seed or 0)
        for number in (8, 1):
            yield torch.randn(number, 3, 8, 8, generator=generator), torch.zeros(number, dtype=torch.int64)

    def loss(self, outputs, targets):
        return functional.cross_entropy(outputs, targets)


def test_a_batch_of_one_does_not_stop_batch_normalisation():
    module = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    builder = Foreign.of(module, One.input)
    training = Training(builder.build({}), One(), epochs=2, seed=0)
    assert training.run_to(1.0)["steps"] == training.total
    parent = copy.deepcopy(training.module)
    reestimate_batchnorm(parent, One(), 2, size=8)
    assert torch.isfinite(parent[1].running_var).all()
    assert builder.sites()


def test_layers_that_ask_for_the_version_of_their_weights_are_filled_from_plain_files():
    network = torchvision("mnasnet0_5", num_classes=3)
    data = weights_of(network)
    assert torch.equal(
        load_weights(torchvision("mnasnet0_5", num_classes=3), data).classifier[1].weight, network.classifier[1].weight
    )


class Kinds(nn.Module):
    """Convolutions of several kinds, one of them called twice."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.first, self.up, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.Linear(6, 5)

    def forward(self, images):
        return self.head(self.up(self.twice(self.twice(self.first(images)))).mean((2, 3)))


def test_sites_count_as_torch_counts():
    module = Kinds()
    found = {site.name: site.macs for site in Foreign.of(module, IMAGE).sites()}
    assert list(found) == ["first", "twice", "up", "head"]
    assert sum(found.values()) == count(module, examples(IMAGE))[0]


def test_finding_sites_does_not_wait_for_torchs_compiler():
    code = """
import sys
from torch import nn
from autocompress import auto
from autocompress.models.foreign import Foreign
from autocompress.tasks import InputSpec
made = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 30 * 30, 5))
assert auto.space(Foreign.of(made, InputSpec(shape=(3, 32, 32)))).genes
assert "torch._dynamo" not in sys.modules  # 1.5 s
"""
    subprocess.run([sys.executable, "-c", code], check=True)


class Asking(nn.Module):
    """Takes one way or the other by what its convolution answers; zeros make it stop."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, images):
        found = self.conv(images).mean((2, 3))
        if not found.any():
            raise RuntimeError("nothing is there")
        return self.head(found)


def test_a_network_that_needs_true_values_has_its_sites():
    assert [site.name for site in Foreign.of(Asking(), IMAGE).sites()] == ["conv", "head"]


def test_a_layer_that_does_not_fit_its_input_is_said():
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(100, 5))
    with pytest.raises(UserError, match=r"does not run on the task's input \(3, 32, 32\): RuntimeError: mat1 and mat2"):
        Foreign.of(module, IMAGE).sites()
