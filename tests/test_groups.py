"""Channels followed through networks of many kinds: which belong together; cutting them equals ignoring them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.models import proof, trace
from autocompress.models.attention import unfold
from autocompress.models.coupling import Coupling
from autocompress.models.groups import Unprunable
from autocompress.models.proof import couple, faults, prunable
from autocompress.models.slicing import Mismatch, apply
from autocompress.models.sources import import_torchvision
from autocompress.models.trace import sites


def network(name: str) -> nn.Module:
    options = {"init_weights": False} if name == "googlenet" else {}
    return import_torchvision().models.get_model(name, weights=None, **options).eval()


def cut(module: nn.Module, inputs: tuple[Tensor, ...], share: float = 0.5) -> nn.Module:
    """Every group of a copy that can be cut, the first units left; in place of what an op decides."""
    coupling = couple(module, inputs)
    kept = {
        group: sorted(unit for cell in group.cells for unit in cell[: max(1, round(len(cell) * share))])
        for group in coupling.groups
        if group.step < group.size
    }
    bad = faults(module, coupling, kept, tuple(torch.cat([one, one]) for one in inputs))
    plan, small = coupling.plan(), copy.deepcopy(module)
    for group, units in kept.items():
        if group not in bad:
            apply(small, *plan.cut(group, units))
    return small


# --- who belongs together -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vgg11_bn"])
def test_groups_are_those_of_torch_pruning_where_it_can_read_the_network(name):
    torch.manual_seed(0)
    module, x = network(name), torch.zeros(1, 3, 32, 32)
    ours = {group.root: {member.place.layer for member in group.members} for group in Coupling(module, x).groups}
    graph = tp.DependencyGraph().build_dependency(copy.deepcopy(module), x, verbose=False)
    names = {part: name for name, part in graph.model.named_modules()}
    for root, layers in ours.items():
        layer = graph.model.get_submodule(root)
        pruner = graph.get_pruner_of_module(layer)
        theirs = graph.get_pruning_group(layer, pruner.prune_out_channels, [0])
        found = {names[dependency.target.module] for dependency, _ in theirs if dependency.target.module in names}
        assert layers == {one for one in found if list(graph.model.get_submodule(one).parameters())}


NETWORKS = {
    "convnext_tiny": 22,
    "densenet121": 120,
    "efficientnet_b0": 40,
    "googlenet": 57,
    "mnasnet0_5": 25,
    "mobilenet_v3_small": 27,
    "regnet_y_400mf": 53,
    "shufflenet_v2_x0_5": 20,
    "squeezenet1_1": 25,
    "swin_t": 16,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_torchvision_are_cut_and_run(name):
    """Concatenation, squeeze and excitation, layer scale, shuffles, shifted windows, auxiliary heads."""
    torch.manual_seed(0)
    module, x = network(name), torch.zeros(1, 3, 64, 64)
    found = sites(module, x)
    assert sum("prune" in site.ops for site in found) >= NETWORKS[name]
    small = cut(module, (x,))
    assert small(x).shape == (1, 1000)
    assert sum(one.numel() for one in small.parameters()) < 0.5 * sum(one.numel() for one in module.parameters())
    small.train()(torch.rand(2, 3, 64, 64))
    state = {tensor: tuple(value.shape) for tensor, value in small.state_dict().items()}
    for part, layer in small.named_modules():  # what a layer says of itself is what its tensors are
        if isinstance(layer, nn.Conv2d):
            assert state[f"{part}.weight"][:2] == (layer.out_channels, layer.in_channels // layer.groups)
        elif isinstance(layer, nn.Linear):
            assert state[f"{part}.weight"] == (layer.out_features, layer.in_features)
        elif isinstance(layer, nn.BatchNorm2d):
            assert state[f"{part}.running_mean"] == (layer.num_features,)


class Kinds(nn.Module):
    """Most layers that have channels, with and without weights of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 12)
        self.place = nn.Parameter(torch.randn(1, 6, 12))
        self.first = nn.Parameter(torch.randn(1, 1, 12))
        self.plain = nn.LayerNorm(12, elementwise_affine=False)
        self.conv = nn.Conv1d(12, 16, 3, padding=1)
        self.group = nn.GroupNorm(4, 16)
        self.act = nn.PReLU(16)
        self.image = nn.Conv3d(16, 8, (1, 1, 3), padding=(0, 0, 1))
        self.instance = nn.InstanceNorm3d(8)
        self.bare = nn.BatchNorm3d(8, affine=False)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.scale = nn.Parameter(torch.rand(6, 1, 1))
        self.register_buffer("shift", torch.rand(6, 1, 1))
        self.gate = nn.Linear(6, 10)
        self.head = nn.Linear(5, 3)

    def forward(self, words: Tensor, picture: Tensor) -> Tensor:
        x = torch.cat([self.first.expand(len(words), -1, -1), self.words(words) + self.place], 1)
        x = self.act(self.group(self.conv(self.plain(x).transpose(1, 2))))
        x = self.bare(self.instance(self.image(x[:, :, None, None] * picture[:, None])))
        x = self.up(x.squeeze(2)) * self.scale + self.shift
        return self.head(F.glu(self.gate(x.mean((2, 3)))))


def test_every_kind_of_layer_is_cut_and_says_so():
    torch.manual_seed(0)
    module = Kinds().eval()
    inputs = torch.randint(0, 20, (1, 6)), torch.rand(1, 1, 1, 7)
    found = {site.name: site for site in sites(module, inputs)}
    assert {name for name, site in found.items() if "prune" in site.ops} == {"words", "conv", "image", "up", "gate"}
    assert found["words"].kind == "embedding"
    assert found["up"].kind == "transposed"
    small = cut(module, inputs)
    assert small(*inputs).shape == (1, 3)
    assert small.words.embedding_dim == small.place.shape[2] == small.first.shape[2] == small.conv.in_channels == 6
    assert small.plain.normalized_shape == (6,)
    assert (small.conv.out_channels, small.group.num_channels, small.act.num_parameters) == (8, 8, 8)
    assert (small.image.out_channels, small.instance.num_features, small.bare.num_features) == (4, 4, 4)
    assert (small.up.in_channels, small.up.out_channels, len(small.scale), len(small.shift)) == (4, 3, 3, 3)
    assert isinstance(small.scale, nn.Parameter)
    assert not isinstance(small.shift, nn.Parameter)
    assert (small.gate.out_features, small.head.in_features) == (4, 2)


class Tied(nn.Module):
    """One matrix as embedding and as output layer, another layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 12)
        self.step = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.out = nn.Linear(12, 20, bias=False)
        self.out.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        return self.out(self.norm(self.step(torch.relu(self.step(x)))))


def test_shared_tensors_stay_shared():
    torch.manual_seed(0)
    words = torch.randint(0, 20, (1, 6))
    small = cut(Tied().eval(), (words,))
    assert small.out.weight is small.words.weight
    assert (small.words.embedding_dim, small.out.in_features, small.step.in_features) == (6, 6, 6)
    assert small(words).shape == (1, 6, 20)


# --- heads --------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, 40, 0.0, batch_first=True)
        self.enter, self.body, self.head = nn.Linear(5, width), nn.TransformerEncoder(layer, 2), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.enter(x)).mean(1))


def test_whole_heads_are_cut_and_counted():
    torch.manual_seed(0)
    module, x = Encoder().eval(), torch.rand(2, 7, 5)
    unfold(module)
    coupling = couple(module, (x[:1],))
    (group,) = coupling.at("body.layers.0.self_attn.k")
    assert (group.root, group.size, group.width) == ("body.layers.0.self_attn.q", 4, 6)
    small = copy.deepcopy(module)
    apply(small, *coupling.plan().cut(group, [0, 2, 3]))
    attention = small.body.layers[0].self_attn
    assert (attention.heads, attention.q.out_features, attention.proj.in_features) == (3, 18, 18)
    with torch.no_grad():
        module.body.layers[0].self_attn.proj.weight[:, 6:12] = 0
        assert torch.allclose(small(x), module(x), atol=1e-6)
    assert {site.name for site in sites(module, x[:1]) if "prune" in site.ops} == {
        "enter", *(f"body.layers.{n}.{name}" for n in range(2) for name in ("self_attn.q", "linear1")),
    }  # fmt: skip


class Windowed(nn.Module):
    """Attention that takes the size of a head from the channels that come in, as Swin and PVT do."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.enter, self.head = nn.Linear(5, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        count, length, width = x.shape
        q, k, v = self.qkv(x).reshape(count, length, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        y = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(count, length, width)
        return self.head((x + self.proj(y)).mean(1))


def test_heads_that_depend_on_the_channels_that_come_in_go_in_step_with_them():
    torch.manual_seed(0)
    module, x = Windowed().eval(), torch.rand(1, 7, 5)
    coupling = couple(module, (x,))
    assert [(group.root, group.size, group.step) for group in coupling.groups] == [("enter", 28, 7)]
    small = cut(module, (x,))
    assert (small.num_heads, small.qkv.in_features, small.qkv.out_features) == (2, 12, 36)
    assert small(x).shape == (1, 3)


def test_encoders_of_hugging_face_lose_heads_widths_and_hidden_units():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    torch.manual_seed(0)
    module = transformers.BertModel(config, add_pooling_layer=False).eval()
    module.config.return_dict = False
    module.register_forward_hook(lambda *call: call[-1][0].mean(1))
    inputs = torch.randint(0, 50, (1, 9)), torch.ones(1, 9, dtype=torch.long)
    small = cut(module, inputs)
    attention = small.encoder.layer[1].attention.self
    assert (attention.num_attention_heads, attention.all_head_size) == (2, 16)
    assert (attention.query.in_features, attention.query.out_features) == (32, 16)  # the width is the answer's
    assert small.encoder.layer[0].intermediate.dense.out_features == 24
    assert small(*inputs).shape == (1, 32)


def test_a_vision_transformer_of_timm_loses_all_of_them():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    module = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5, exportable=True).eval()
    x = torch.rand(1, 3, 32, 32)
    small = cut(module, (x,), 2 / 3)
    attention = small.blocks[1].attn
    assert (attention.num_heads, attention.attn_dim, attention.qkv.out_features) == (2, 128, 384)
    assert (small.cls_token.shape[2], small.pos_embed.shape[2], small.blocks[0].mlp.fc1.out_features) == (128, 128, 512)
    assert small(x).shape == (1, 5)


# --- equal to ignoring --------------------------------------------------------------------------------------------


def test_a_norm_over_channels_runs_over_those_that_are_left():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).eval()
    x, kept = torch.rand(4, 6), [0, 3, 4, 7]
    coupling = couple(module, (x,))
    (group,) = coupling.at("0")
    small = copy.deepcopy(module)
    apply(small, *coupling.plan().cut(group, kept))
    hidden = F.layer_norm(module[0](x)[:, kept], (4,), module[1].weight[kept], module[1].bias[kept])
    assert torch.allclose(small(x), F.linear(hidden, module[2].weight[:, kept], module[2].bias))
    assert not faults(module, coupling, {group: kept}, (x,))


class Sly(nn.Module):
    """Numbers of channels by heart: a reshape that fails, and a slice that runs on with other channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.d, self.head = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.relu(self.a(x)).view(-1, 8))
        return self.head(torch.relu(self.d(torch.relu(self.c(torch.relu(x)))[:, 1:4])))


def test_code_that_counts_channels_by_itself_is_found_out():
    torch.manual_seed(0)
    module, x = Sly().eval(), torch.rand(2, 4)
    found = prunable(module, x)
    assert found.roots == ("b", "d")
    assert "does not run without them" in found.refused["a"]
    coupling = couple(module, (x,))
    (group,) = coupling.at("c")
    bad = faults(module, coupling, {group: [1, 2, 3, 5]}, (x,))
    assert "another way than they can be followed" in bad[group]
    assert not faults(module, coupling, {group: [0, 1, 2, 3]}, (x,))


class Odd(nn.Module):
    """Sorts its channels; picks one; answers with the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).sort(-1).values)
        return self.d(self.c(x) * x[:, 3:4].clone()[:, 0:1])


@pytest.mark.parametrize(
    ("layer", "why"),
    [("a", "sort, which is not understood"), ("d", "the network's output"), ("unused", "does not use it")],
)
def test_layers_that_cannot_be_cut_say_why(layer, why):
    torch.manual_seed(0)
    with pytest.raises(Unprunable, match=why):
        Coupling(Odd().eval(), torch.rand(1, 4)).at(layer)


class Auxiliary(nn.Module):
    """A second head that runs in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head, self.other = nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.a(x))).mean((2, 3))
        return self.head(x) + self.other(x) if self.training else self.head(x)


def test_heads_for_training_stay_in_step():
    module, x = Auxiliary().eval(), torch.rand(1, 3, 6, 6)
    before = copy.deepcopy(module.state_dict())
    small = cut(module, (x,))
    assert (small.head.in_features, small.other.in_features) == (4, 4)
    small.train()(torch.rand(2, 3, 6, 6))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert not module.training


# --- what may go wrong --------------------------------------------------------------------------------------------


def test_a_network_that_cannot_be_followed_keeps_its_other_sites(monkeypatch):
    def fail(*_):
        raise RuntimeError("lost it")

    monkeypatch.setattr(proof, "couple", fail)
    module, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.rand(1, 4)
    assert prunable(module, x).refused == {".": "it cannot be followed: RuntimeError: lost it"}
    assert [site.ops[0] for site in trace.sites(module, x)] == ["lowrank", "lowrank"]


@pytest.mark.parametrize(
    ("attributes", "why"),
    [({"0": {"forward": 1}}, "cannot set 0.forward"), ({"0": {"num_features": True}}, "cannot set"),
     ({"9": {"heads": 2}}, "which is not there")],
)  # fmt: skip
def test_receipts_set_numbers_that_they_may_set(attributes, why):
    with pytest.raises(Mismatch, match=why):
        apply(nn.Sequential(nn.InstanceNorm1d(4)), (), attributes)
