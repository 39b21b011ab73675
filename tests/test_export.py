"""Export: the file answers as torch does, sites find their nodes, bytes and hashes are stable."""

import copy
import threading

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autocompress import export as exporting
from autocompress.export import Exported, Part, compose, export, graph_hash, parity, predictor
from autocompress.graph import IR_VERSION
from autocompress.models.convnet import ConvNet
from autocompress.tasks import InputSpec
from autocompress.tasks.digits import Digits
from autocompress.train import reestimate_batchnorm
from autocompress.types import TrialFailure, UserError

EXPORTERS = ("torchscript", "dynamo")
SMALL = {"width.0": 16, "width.1": 16, "width.2": 32, "depth.0": 1, "depth.2": 1, "resolution": 12}
SHUFFLED = SMALL | {"kind.0": "plain", "kind.1": "shuffle", "kind.2": "separable"}


def convnet(arch=SHUFFLED, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = ConvNet().build(arch)
        reestimate_batchnorm(module, Digits(), 2)
    return module.eval()


def images(count: int = 5) -> np.ndarray:
    return next(Digits().batches("selection", count))[0].numpy()


def graph_of(exported: Exported) -> onnx.GraphProto:
    return onnx.load_model_from_string(exported.parts[0].model).graph


class Awkward(nn.Module):
    """Everything that makes scopes ambiguous: containers that are not called, a module called twice, names like _1."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({"a": self.folded(1), "b": nn.Conv2d(1, 4, 1)})
        self.others = nn.ModuleDict({"a": self.folded(4)})
        self.conv, self.conv_1 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.listed = nn.ModuleList([nn.ModuleList([self.folded(4)])])
        self.dead = nn.Conv2d(4, 4, 1)
        self.attention = nn.MultiheadAttention(8, 1, batch_first=True)
        self.linear, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    @staticmethod
    def folded(channels: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(channels, 4, 1, bias=False), nn.BatchNorm2d(4))

    def forward(self, x):
        x = self.branches["a"](x) + self.branches["b"](x)
        self.dead(x)
        x = self.conv_1(self.conv(self.conv(self.others["a"](x))))
        x = self.listed[0][0](x).flatten(2)
        x = x.reshape(x.shape[0], -1, 8)
        x = F.relu(self.linear(self.attention(x, x, x, need_weights=False)[0]))
        return self.head(x.mean(1))


AWKWARD = {
    "branches.a.0": ("branches.a.0/Conv",),
    "branches.b": ("branches.b/Conv",),
    "others.a.0": ("others.a.0/Conv",),
    "conv": ("conv/Conv", "conv/Conv_1"),
    "conv_1": ("conv_1/Conv",),
    "listed.0.0.0": ("listed.0.0.0/Conv",),
    "linear": ("linear/MatMul",),
    "head": ("head/Gemm",),
}


@pytest.fixture(scope="module", params=EXPORTERS)
def exported(request) -> Exported:
    """The same network by either exporter (dynamo takes seconds)."""
    return export(convnet(), Digits.input, opset=17, exporter=request.param)


def test_the_file_answers_as_torch_does_at_any_batch(exported):
    assert (exported.opset, len(exported.parts)) == (17, 1)
    model = compose(exported)
    for count in (1, 2, 7):
        assert parity(convnet(), model, images(count)) < 1e-5
    onnx.checker.check_model(onnx.load_model_from_string(model), full_check=True)


def test_the_graph_is_in_order(exported):
    model = onnx.load_model_from_string(exported.parts[0].model)
    kinds = [node.op_type for node in model.graph.node]
    unwanted = {"BatchNormalization", "Constant", "Identity", "Shape", "Gather", "Slice", "ReduceMean"}
    assert not unwanted.intersection(kinds)
    assert {"Resize", "GlobalAveragePool"} <= set(kinds)
    assert model.ir_version <= IR_VERSION
    assert model.opset_import[0].version == 17
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["input", "output"]
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
    assert len({node.name for node in model.graph.node}) == len(kinds)


def test_every_site_of_the_network_has_its_nodes(exported):
    builder = ConvNet(arch=SHUFFLED)
    nodes = exported.parts[0].nodes
    for site in builder.sites():
        assert nodes[site.name] == (f"{site.name}/{'Gemm' if site.kind == 'linear' else 'Conv'}",)
    assert nodes["stages.2.0.conv1"] == ("stages.2.0.conv1.0/Conv", "stages.2.0.conv1.1/Conv")  # a prefix covers
    assert nodes["stages.1.1.conv2"] == ("stages.1.1.conv2.1/Conv",)
    weighted = [node.name for node in graph_of(exported).node if node.op_type in ("Conv", "Gemm")]
    assert list(nodes["."]) == weighted


def test_equal_modules_give_equal_bytes(exported):
    """Also if training left the weights in another memory layout, and the layout stays."""
    laid_out = convnet().to(memory_format=torch.channels_last)
    again = export(laid_out, Digits.input, opset=17, exporter=exported.exporter)
    assert again == exported
    assert not laid_out.get_parameter("stages.0.0.conv1.weight").is_contiguous()


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_awkward_scopes_are_told_apart(exporter):
    torch.manual_seed(0)
    module = Awkward().eval()
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_()
                part.weight.normal_()
    exported = export(module, InputSpec(shape=(1, 4, 4)), opset=18, exporter=exporter)
    nodes = exported.parts[0].nodes
    assert {site: nodes.get(site) for site in AWKWARD} == AWKWARD
    assert "dead" not in nodes
    assert "attention.out_proj" not in nodes
    assert parity(module, compose(exported), np.random.default_rng(0).normal(size=(3, 1, 4, 4)).astype("f4")) < 1e-5
    # the map speaks the truth: weights whose scale we know are where it says
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph_of(exported).initializer}
    by_name = {node.name: node for node in graph_of(exported).node}
    for site in ("branches.b", "conv", "conv_1"):
        for name in nodes[site]:
            found = weights[by_name[name].input[1]]
            assert np.array_equal(found, module.get_submodule(site).weight.detach().numpy())


def test_exports_in_threads_equal_exports_in_turn():
    arches = [SMALL | {"width.0": width} for width in (16, 32, 48)]
    expected = [export(convnet(arch), Digits.input, opset=17) for arch in arches]
    modules, found = [convnet(arch) for arch in arches], {}

    def work(index: int) -> None:
        found[index] = export(modules[index], Digits.input, opset=17)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(3)] == expected


def test_modes_and_weights_are_left_as_they_were():
    module = convnet().train()
    module.stem.eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    exported = export(module, Digits.input, opset=17)
    parity(module, compose(exported), images())
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_weight_free_hash_sees_shapes_and_not_weights():
    model, other = (compose(export(convnet(seed=seed), Digits.input, opset=17)) for seed in (0, 1))
    assert graph_hash(model, weights=False) == graph_hash(other, weights=False)
    assert graph_hash(model, weights=True) != graph_hash(other, weights=True)
    hashes = {graph_hash(model, weights=False)}
    for change in ({"width.0": 32}, {"resolution": 16}, {"kernel.2": 5}, {"kind.2": "plain"}, {"depth.1": 1}):
        hashes.add(graph_hash(compose(export(convnet(SHUFFLED | change), Digits.input, opset=17)), weights=False))
    assert len(hashes) == 6


def test_weight_free_hash_does_not_depend_on_equal_weights():
    """Fresh networks have many equal biases, which exporters merge; trained ones have none."""
    zero, trained = convnet(), convnet()
    with torch.no_grad():
        for part in zero.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.zero_()
    one, other = (compose(export(module, Digits.input, opset=17)) for module in (zero, trained))
    assert graph_hash(one, weights=False) == graph_hash(other, weights=False)
    assert len(one) == len(other)


def test_hashes_see_no_names():
    model = onnx.load_model_from_string(compose(export(convnet(), Digits.input, opset=17)))
    for node in model.graph.node:
        node.name = f"renamed {node.name}"
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = name if name in ("", "input", "output") else f"x{name}"
    original = compose(export(convnet(), Digits.input, opset=17))
    for tensor in model.graph.initializer:
        tensor.name = f"x{tensor.name}"
    for weights in (False, True):
        assert graph_hash(model.SerializeToString(), weights) == graph_hash(original, weights)


def test_disagreement_is_a_failed_trial():
    module = convnet()
    model = onnx.load_model_from_string(compose(export(module, Digits.input, opset=17)))
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "head.weight")
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.05, "head.weight"))
    with pytest.raises(TrialFailure, match=r"parity: file and torch differ by 0\.0"):
        parity(module, model.SerializeToString(), images())


def test_tiny_outputs_are_compared_by_what_they_are():
    """An untrained network answers with almost nothing: every absolute tolerance would pass."""
    module = convnet()
    with torch.no_grad():
        module.head.weight.mul_(1e-12)
        module.head.bias.zero_()
    model = compose(export(module, Digits.input, opset=17))
    assert parity(module, model, images()) < 1e-5
    with torch.no_grad():
        module.head.weight.mul_(2)
    with pytest.raises(TrialFailure, match="parity"):
        parity(module, model, images())
    with torch.no_grad():
        module.head.weight.zero_()
    with pytest.raises(TrialFailure, match="parity"):
        parity(module, compose(export(module, Digits.input, opset=17)), images())
    with torch.no_grad():
        module.head.weight.fill_(float("nan"))
    with pytest.raises(TrialFailure, match="nan"):
        parity(module, compose(export(module, Digits.input, opset=17)), images())


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return torch.linalg.eigvals(self.conv(x)[:, 0].to(torch.complex64)).real


@pytest.mark.parametrize("module", [Untraceable(), nn.Linear(3, 3)], ids=["operator", "shape"])
def test_what_cannot_be_exported_is_a_failed_trial(module):
    with pytest.raises(TrialFailure, match=r"export \(torchscript\) failed"):
        export(module, Digits.input, opset=17)


def test_a_broken_file_is_a_failed_trial():
    with pytest.raises(TrialFailure, match="cannot load"):
        predictor(b"no model")


def test_parts_compose_into_one_file():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
    head = nn.Sequential(nn.Linear(144, 10), nn.ReLU(), nn.Linear(10, 3))
    parts = []
    for name, module, shape in (("body", body, (1, 8, 8)), ("head", head, (144,))):
        exported = export(module.eval(), InputSpec(shape=shape, name="pixels"), opset=17)
        parts.append(Part(name, exported.parts[0].model, exported.parts[0].nodes))
    model = compose(Exported(tuple(parts), 17, "torchscript"))
    assert parity(nn.Sequential(body, head), model, images(4)) < 1e-5
    graph = onnx.load_model_from_string(model).graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["pixels", "output"]
    assert model == compose(Exported(tuple(parts), 17, "torchscript"))
    with pytest.raises(UserError, match="no part"):
        compose(Exported((), 17, "torchscript"))


def test_a_means_pool_has_an_integer_form():
    class Mean(nn.Module):
        def __init__(self, *, keep: bool) -> None:
            super().__init__()
            self.conv, self.keep = nn.Conv2d(1, 4, 3), keep

        def forward(self, x):
            return self.conv(x).mean((-2, -1), keepdim=self.keep)

    for keep in (False, True):
        module = Mean(keep=keep).eval()
        exported = export(module, Digits.input, opset=17)
        assert "GlobalAveragePool" in [node.op_type for node in graph_of(exported).node]
        assert parity(module, compose(exported), images()) < 1e-5


def test_tolerance_is_documented():
    assert exporting.TOLERANCE == 1e-3


class Cancelling(nn.Module):
    """A small difference of large numbers: single precision keeps three digits of it."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(64, 64)

    def forward(self, x):
        return (self.body(x) + 3000.0).mean(1, keepdim=True) - 3000.0


def test_rounding_that_a_network_magnifies_is_told_from_a_wrong_file():
    torch.manual_seed(0)
    module = Cancelling()
    model = export(module, InputSpec(shape=(64,)), opset=17).parts[0].model
    inputs = torch.randn(16, 64)
    with torch.no_grad():
        exact = copy.deepcopy(module).double()(inputs.double())
        own = float((module(inputs) - exact).abs().max() / exact.abs().max())
    assert own > exporting.TOLERANCE
    assert parity(module, model, inputs.numpy()) <= exporting.ROUNDING * own
    with torch.no_grad():
        module.body.weight[0] += 0.1
    with pytest.raises(TrialFailure, match="differ by"):
        parity(module, model, inputs.numpy())


def test_an_input_that_nothing_reads_stays_an_input():
    class Ignoring(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 2)

        def forward(self, x, mask):
            return self.body(x)

    mask = InputSpec(name="mask", shape=(4,), dtype="int64")
    spec, module = InputSpec(name="x", shape=(4,), others=(mask,)), Ignoring()
    model = export(module, spec, opset=17).parts[0].model
    assert [one.name for one in onnx.load_model_from_string(model).graph.input] == ["x", "mask"]
    inputs = (np.ones((3, 4), np.float32), np.ones((3, 4), np.int64))
    assert parity(module, model, *inputs) < 1e-6
    assert predictor(model)(inputs).shape == (3, 2)
