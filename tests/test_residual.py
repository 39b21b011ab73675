"""Residual blocks are found by what they do: known networks, hand-made blocks, modules that only look like one."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.models.foreign import Foreign
from autocompress.models.residual import blocks
from autocompress.tasks import InputSpec
from autocompress.vision import import_torchvision

EFFICIENT = ("2.1", "3.1", "4.1", "4.2", "5.1", "5.2", "6.1", "6.2", "6.3")
IMAGE = (torch.zeros(1, 3, 64, 64),)


def names(module: nn.Module, example: tuple[Tensor, ...] = IMAGE) -> list[str]:
    return [site.name for site in blocks(module.eval(), example)]


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return import_torchvision().models.get_model(name, weights=None).eval()


class Basic(nn.Module):
    """As CIFAR ResNets are written, with functional activations."""

    def __init__(self, width: int, activation=F.relu) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.activation = activation

    def forward(self, x):
        return self.activation(x + self.bn2(self.conv2(self.activation(self.bn1(self.conv1(x))))))


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Twice(nn.Module):
    """A block that the forward pass uses two times."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(self.block(x))


class Layer(nn.Module):
    """A layer of a transformer in the older style of Hugging Face: extra inputs, a tuple comes out."""

    def __init__(self, width: int, more: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.more = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), more

    def forward(self, hidden_states, mask=None, *, scale=1.0):
        answer = hidden_states + self.second(F.gelu(self.first(hidden_states))) * scale * mask
        return (answer, answer.mean()) if self.more else (answer,)


class Encoder(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.stem, self.layers = nn.Linear(6, 8), nn.ModuleList(layers)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(hidden_states=x, mask=torch.ones(1), scale=0.5)[0]
        return x


@pytest.mark.parametrize(
    ("name", "expected", "merges"),
    [
        ("resnet18", ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"], True),
        ("resnet50", [f"layer{s}.{b}" for s, count in enumerate((3, 4, 6, 3), 1) for b in range(1, count)], False),
        ("mobilenet_v2", [f"features.{n}" for n in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)], True),
        ("efficientnet_b0", [f"features.{n}" for n in EFFICIENT], None),
        ("convnext_tiny", [f"features.{s}.{b}" for s, n in ((1, 3), (3, 3), (5, 9), (7, 3)) for b in range(n)], False),
        ("swin_t", [f"features.{s}.{b}" for s, n in ((1, 2), (3, 2), (5, 6), (7, 2)) for b in range(n)], False),
        ("densenet121", [], False),
        ("vgg11", [], False),
    ],
)  # fmt: skip
def test_blocks_of_known_networks(name, expected, merges):
    found = blocks(network(name), IMAGE)
    assert [site.name for site in found] == expected
    assert all(site.kind == "block" and site.ops == ("block",) and site.macs > 0 for site in found)
    assert all(site.choices["block"][:2] == ("keep", "drop") for site in found)
    if merges is not None:
        assert all(("merge" in site.choices["block"]) == merges for site in found)


def test_vision_transformer_quickly():
    module = network("vit_b_16")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other count as time spent
    try:
        started = time.process_time()
        found = names(module, (torch.zeros(1, 3, 224, 224),))
        assert time.process_time() - started < 8  # 0.7 s on an idle core
    finally:
        torch.set_num_threads(threads)
    assert found == [f"encoder.layers.encoder_layer_{n}" for n in range(12)]


def test_what_a_site_says():
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Basic(8), Basic(8), nn.Flatten(), nn.LazyLinear(2))
    module(IMAGE[0])
    first, second = blocks(module, IMAGE)
    assert (first.name, second.name) == ("2", "3")
    assert first.macs == 2 * 9 * 8 * 8 * 64 * 64
    assert first.parameters == sum(parameter.numel() for parameter in module[2].parameters())
    assert first.in_channels == first.out_channels == 8
    assert first.depth == 1 / 5
    assert second.depth == 3 / 5


def test_blocks_stand_before_their_layers():
    spec = InputSpec(shape=(3, 16, 16))
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Basic(8), nn.Flatten(), nn.Linear(8 * 256, 2))
    order = [site.name for site in Foreign.of(module, spec).sites()]
    assert order == ["0", "2", "2.conv1", "2.conv2", "4"]


def test_the_module_stays_as_it_was():
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Basic(8)).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.random.get_rng_state()
    assert [site.name for site in blocks(module, IMAGE)] == ["2"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(
        part.training and "forward" not in part.__dict__ and not part._forward_hooks for part in module.modules()
    )
    assert all(part.track_running_stats for part in module.modules() if isinstance(part, nn.BatchNorm2d))


@pytest.mark.parametrize(
    "part",
    [
        Gate(8),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)),
        nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()),
    ],
    ids=["squeeze-excite", "no shortcut", "plain"],
)
def test_what_is_no_block(part):
    assert names(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), part)) == []


def test_a_block_that_is_called_twice_goes_with_what_calls_it():
    assert names(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Twice(Basic(8)))) == ["2"]


def test_a_block_before_any_activation_needs_its_input_to_survive():
    signed = nn.Sequential(nn.Conv2d(3, 8, 3), Basic(8))
    assert names(signed) == []  # relu(x + 0) is not x
    assert names(nn.Sequential(nn.Conv2d(3, 8, 3), Basic(8, torch.nn.Identity()))) == ["1"]


def test_dead_activations_show_nothing():
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 8, 1)))
    nn.init.zeros_(module[0].weight)
    nn.init.zeros_(module[0].bias)
    assert names(module) == []


def test_tuples_and_keywords():
    example = (torch.zeros(1, 5, 6),)
    assert names(Encoder(Layer(8), Layer(8)), example) == ["layers.0", "layers.1"]
    assert names(Encoder(Layer(8, more=True)), example) == []  # what else it answers nobody could give


def test_inner_blocks_beside_the_layer_that_holds_them():
    transformers = pytest.importorskip("transformers")
    import_torchvision()
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=12, **sizes)
    ones = torch.ones(1, 8, dtype=torch.long)
    found = names(transformers.BertForSequenceClassification(config), (ones, ones))
    stem = "bert.encoder.layer"
    assert found == [f"{stem}.0", f"{stem}.0.attention", f"{stem}.1", f"{stem}.1.attention"]


def test_timm_families():
    timm = pytest.importorskip("timm")
    import_torchvision()
    for name, count in (("vit_tiny_patch16_224", 12), ("mixer_s32_224", 8)):
        assert len(names(timm.create_model(name), (torch.zeros(1, 3, 224, 224),))) == count
