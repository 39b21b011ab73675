"""Networks as strangers bring them, one per kind: sites, pruning, low rank and int8, the file, and the way back."""

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from autocompress import auto, export, parts, search
from autocompress.models.foreign import Foreign
from autocompress.parent import export_baseline
from autocompress.pipeline import Work, load_weights, release, rerelease, reshape, shape, training, weights_of
from autocompress.sitetable import figures, show
from autocompress.tasks import InputSpec, several
from autocompress.train import reestimate_batchnorm
from autocompress.types import Candidate, Interval, Policy, Profile, Quality, Rule, UserError

WORDS = 50
IMAGE = InputSpec(shape=(3, 16, 16))
TOKENS = InputSpec(shape=(10,), dtype="int64", layout="")
ROWS = InputSpec(shape=(6, 12), layout="")
OPS = parts.make_ops(("prune", "lowrank", "quantize"))
ASKED = {"prune": {"ratio": 0.5}, "lowrank": {"rank": 0.5}, "quantize": {"bits": "int8"}}


class Noise:
    """Random inputs; outputs are to be small."""

    name, metric = "noise", "none"
    training = {"optimizer": "adamw", "lr": 0.001, "batch": 8}

    def __init__(self, spec):
        self.input = spec

    def batches(self, split, size, *, limit=None, seed=None):
        generator = torch.Generator().manual_seed(seed or 0)
        left = min(limit or 32, 32)
        while left > 0:
            count, left = min(size, left), left - min(size, left)
            inputs = tuple(self.draw(one, count, generator) for one in self.input.every)
            yield inputs if len(inputs) > 1 else inputs[0], torch.zeros(count)

    def draw(self, one, count, generator):
        if one.dtype == "int64":
            return torch.randint(1, WORDS, (count, *one.shape), generator=generator)
        return torch.randn(count, *one.shape, generator=generator)

    def loss(self, outputs, targets):
        return sum((one**2).mean() for one in several(outputs))

    def quality(self, predict, split):
        return Quality(metric="none", split=split, value=Interval(value=0, low=0, high=0), samples=32)


def conv(inputs, outputs, stride=1, **more):
    return nn.Conv2d(inputs, outputs, 3, stride, 1, **more)


def head(width, classes=10):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride=1, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, stride, bias=False), norm(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs, bias=False), norm(outputs)
        same = stride == 1 and inputs == outputs
        self.short = nn.Sequential() if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), norm(outputs))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += self.short(x)
        return F.relu(y, inplace=True)


class Padded(nn.Module):
    """A shortcut of zeros, which couples all stages."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1, self.conv2 = conv(inputs, outputs, 2), conv(outputs, outputs)
        self.more = (outputs - inputs) // 2

    def forward(self, x):
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more, self.more))
        return F.relu(self.conv2(F.relu(self.conv1(x))) + short)


def resnet(norm=nn.BatchNorm2d):
    blocks = (Block(16, 16, norm=norm), Block(16, 32, 2, norm), Block(32, 32, norm=norm))
    return nn.Sequential(conv(3, 16, bias=False), norm(16), nn.ReLU(), *blocks, head(32))


def plain(wrap=lambda layer: layer):
    return nn.Sequential(
        wrap(conv(3, 16)), nn.ReLU(), wrap(conv(16, 32, 2)), nn.ReLU(), nn.Flatten(), wrap(nn.Linear(2048, 10))
    )


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embed, self.rnn = nn.Embedding(WORDS, 24), kind(24, 24, batch_first=True, bidirectional=True)
        self.mid, self.head = nn.Linear(48, 32), nn.Linear(32, 10)

    def forward(self, ids):
        return self.head(F.relu(self.mid(self.rnn(self.embed(ids))[0][:, -1])))


class Attends(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.embed, self.attn = nn.Linear(12, 32), nn.MultiheadAttention(32, 4, batch_first=first)
        self.norm, self.head, self.first = nn.LayerNorm(32), nn.Linear(32, 10), first

    def forward(self, x):
        x = self.embed(x) if self.first else self.embed(x).transpose(0, 1)
        x = self.norm(x + self.attn(x, x, x, need_weights=False)[0])
        return self.head(x.mean(1 if self.first else 0))


class Fused(nn.Module):
    """Attention by hand: one product for queries, keys and values, the second as a sum over letters."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv = nn.Linear(12, 32), nn.Linear(32, 96, bias=False)
        self.out, self.head = nn.Linear(32, 64), nn.Linear(64, 10)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        mixed = torch.einsum("bhnm,bhmd->bhnd", (q @ k.transpose(-1, -2)).mul(8**-0.5).softmax(-1), v)
        return self.head(F.gelu(self.out(mixed.transpose(1, 2).flatten(2))).mean(1))


class Encoder(nn.Module):
    """Causal and padded, positions in a buffer."""

    def __init__(self, **more):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 32)
        self.register_buffer("place", torch.randn(1, 10, 32) / 10)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, **more)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 10)

    def forward(self, ids):
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        return self.head(self.encoder(self.embed(ids) + self.place, mask=mask, src_key_padding_mask=ids == 0)[:, -1])


class Classified(nn.Module):
    """A class token, made as long as the batch by a number that one of torch's exporters takes for a constant."""

    def __init__(self):
        super().__init__()
        self.embed, self.token, self.head = nn.Linear(12, 16), nn.Parameter(torch.randn(1, 1, 16)), nn.Linear(16, 10)

    def forward(self, x):
        return self.head(torch.cat((self.token.expand(len(x), -1, -1), self.embed(x)), 1).mean(1))


class Translates(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, 32), nn.Linear(32, 10)
        self.net = nn.Transformer(32, 4, 1, 1, 64, batch_first=True)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.net(x, x)[:, -1])


class Writes(nn.Module):
    """Buffers of several types, parameters of its own, operations in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.gain = nn.Parameter(torch.ones(1, 32, 1, 1))
        self.a, self.b, self.c, self.head = conv(3, 16), conv(16, 32, 2), conv(32, 32), head(32)

    def forward(self, x):
        y = self.b(self.a(x - self.mean).relu_())
        y *= self.gain
        z = self.c(y.clamp_(min=0))
        z[:, :4] = 0
        return self.head(F.relu_(z.add_(y)))


class Segments(nn.Module):
    """An answer per pixel: interpolation, transposed convolution, pixel shuffle, skip connections."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 16), conv(16, 32, 2), conv(32, 16)
        self.up, self.d, self.shuffle = nn.ConvTranspose2d(32, 16, 2, 2), conv(48, 48), nn.PixelShuffle(2)
        self.e = conv(12, 3)

    def forward(self, x):
        a = F.relu(self.a(x))
        b = F.relu(self.b(a))
        c = F.interpolate(F.relu(self.c(b)), size=a.shape[-2:], mode="bilinear", align_corners=False)
        return self.e(self.shuffle(F.relu(self.d(torch.cat((a, c, F.relu(self.up(b))), 1)))))


class Excited(nn.Module):
    """Squeeze and excitation between depthwise convolutions, and attention over channels by a 1-D convolution."""

    def __init__(self):
        super().__init__()
        self.stem, self.wide, self.deep = conv(3, 16), nn.Conv2d(16, 32, 1), conv(32, 32, groups=32)
        self.gate = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 32), nn.Sigmoid())
        self.thin, self.over, self.last = nn.Conv2d(32, 16, 1), nn.Conv1d(1, 1, 3, padding=1), nn.Conv2d(16, 64, 1)
        self.head = head(64)

    def forward(self, x):
        x = F.hardswish(self.stem(x))
        y = F.silu(self.deep(F.silu(self.wide(x))))
        y = y * self.gate(y.mean((2, 3))).view(y.shape[0], -1, 1, 1)
        x = x + self.thin(y)
        x = x * torch.sigmoid(self.over(x.mean((2, 3)).unsqueeze(1))).squeeze(1)[..., None, None]
        return self.head(F.hardswish(self.last(x)))


class Tied(nn.Module):
    """A layer called three times, and an embedding that is the head's weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(WORDS, 32), nn.Linear(32, 32)
        self.wide, self.back, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for _ in range(3):
            x = x + torch.tanh(self.mix(x))
        return self.head((x + self.back(F.gelu(self.wide(x)))).mean(1))


class Pyramid(nn.Module):
    """One head for two levels, each an answer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 32), conv(32, 32, 2)
        self.head = nn.Sequential(conv(32, 16), nn.ReLU(), nn.Conv2d(16, 5, 1))

    def forward(self, x):
        a = F.relu(self.a(x))
        return self.head(a), self.head(F.relu(self.b(a)))


class TwoByTwo(nn.Module):
    """Two inputs, a mapping of two answers, an argument by keyword alone, a product with a bare parameter."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv(3, 16, 2), nn.ReLU(), conv(16, 32, 2), nn.ReLU(), nn.Flatten())
        self.side, self.mix, self.free = nn.Linear(4, 16), nn.Linear(528, 64), nn.Parameter(torch.randn(64, 64) / 8)
        self.heads = nn.ModuleDict({"kind": nn.Linear(64, 10), "box": nn.Linear(64, 4)})

    def forward(self, images, numbers, *, scale=None):
        both = F.relu(self.mix(torch.cat((self.body(images), F.relu(self.side(numbers))), 1))) @ self.free
        return {name: one(both) for name, one in self.heads.items()}


class Standardised(nn.Conv2d):
    """Computes with another weight than it holds."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Splits(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 32), conv(16, 16), nn.Conv2d(16, 16, 1)
        self.d, self.norm, self.head = nn.Conv2d(32, 64, 1), nn.LayerNorm(32), head(32)

    def forward(self, x):
        x, y = F.relu(self.a(x)).chunk(2, 1)
        x = F.glu(self.d(torch.cat((self.b(x), self.c(y)), 1)), 1)
        return self.head(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


KINDS = {
    "residual": (resnet, IMAGE),
    "group norm": (lambda: resnet(lambda width: nn.GroupNorm(4, width)), IMAGE),
    "zero-padded shortcuts": (lambda: nn.Sequential(conv(3, 16), Padded(16, 32), Padded(32, 64), head(64)), IMAGE),
    "lstm": (lambda: Recurrent(nn.LSTM), TOKENS),
    "gru": (lambda: Recurrent(nn.GRU), TOKENS),
    "one axis": (
        lambda: nn.Sequential(
            nn.Conv1d(4, 32, 7, 2, 3),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.Conv1d(32, 64, 5),
            nn.Flatten(),
            nn.Linear(28 * 64, 10),
        ),
        InputSpec(shape=(4, 64), layout=""),
    ),
    "three axes": (
        lambda: nn.Sequential(
            nn.Conv3d(1, 16, 3, 2), nn.BatchNorm3d(16), nn.ReLU(), nn.Conv3d(16, 8, 2), nn.Flatten(), nn.Linear(256, 10)
        ),
        InputSpec(shape=(1, 8, 12, 12), layout=""),
    ),
    "weight norm": (lambda: plain(parametrizations.weight_norm), IMAGE),
    "spectral norm": (lambda: plain(parametrizations.spectral_norm), IMAGE),
    "weight standardisation": (
        lambda: nn.Sequential(Standardised(3, 16, 3), nn.ReLU(), conv(16, 8), nn.ReLU(), head(8)),
        IMAGE,
    ),
    "attention": (lambda: Attends(True), ROWS),
    "attention, sequence first": (lambda: Attends(False), ROWS),
    "attention by hand": (Fused, ROWS),
    "transformer encoder": (Encoder, TOKENS),
    "transformer encoder, norm first": (lambda: Encoder(norm_first=True, activation="gelu"), TOKENS),
    "transformer": (Translates, TOKENS),
    "buffers, in place": (Writes, IMAGE),
    "segmentation": (Segments, IMAGE),
    "channel attention, depthwise": (Excited, IMAGE),
    "grouped": (
        lambda: nn.Sequential(
            conv(3, 32),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            conv(32, 32, groups=4),
            nn.PReLU(32),
            nn.Conv2d(32, 64, 1),
            head(64),
        ),
        IMAGE,
    ),
    "autoencoder": (
        lambda: nn.Sequential(
            conv(3, 16, 2),
            nn.ReLU(),
            conv(16, 32, 2),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 16, 4, 2, 1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.ConvTranspose2d(16, 3, 4, 2, 1),
        ),
        IMAGE,
    ),
    "shared": (Tied, TOKENS),
    "shared head": (Pyramid, IMAGE),
    "two inputs, two answers": (
        TwoByTwo,
        InputSpec(shape=(3, 16, 16), others=(InputSpec(name="numbers", shape=(4,), layout=""),)),
    ),
    "splits": (Splits, IMAGE),
    "bfloat16": (lambda: plain().bfloat16(), IMAGE),
    "float64": (lambda: plain().double(), IMAGE),
    "data parallel": (lambda: nn.DataParallel(plain()), IMAGE),
    "frozen": (lambda: resnet().requires_grad_(False), IMAGE),
    "perceptron": (
        lambda: nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)),
        InputSpec(shape=(20,), layout=""),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_strangers_network_is_cut_written_and_made_again(kind):
    make, spec = KINDS[kind]
    torch.manual_seed(0)
    task, builder = Noise(spec), Foreign.of(make(), spec)
    parent = builder.build({})
    reestimate_batchnorm(parent, task, 2, size=16)
    sites = builder.sites()
    assert auto.space(builder).genes
    rules = [Rule(site=site.name, op=op, settings=ASKED[op]) for site in sites for op in ASKED if op in site.ops]
    candidate = Candidate(arch={}, policy=Policy(rules=tuple(rules)))
    work = Work(builder=builder, task=task, ops=OPS, parent=parent.eval(), profiles=(Profile(name="p"),), epochs=0.5)
    shaped = shape(work, candidate)
    training(work, shaped, candidate.policy, seed=0).run_to(1.0)
    (file,) = release(work, shaped.module, candidate.policy).values()  # agrees with torch, or fails
    entries = [(receipt.op, entry) for receipt in (*shaped.receipts, *file.receipts) for entry in receipt.entries]
    assert all(entry.why and "\n" not in entry.why for _, entry in entries if entry.status == "skipped")
    done = {op for op, entry in entries if entry.status == "done" and entry.site != "."}
    assert done == set(ASKED), entries
    before, after = (sum(one.numel() for one in module.parameters()) for module in (parent, shaped.module))
    assert after < before
    again = load_weights(reshape(builder, OPS, {}, shaped.receipts), weights_of(shaped.module))
    assert rerelease(work, again, file.receipts).model == file.model


def test_what_no_op_acts_on_is_named():
    found = figures(Foreign.of(Recurrent(nn.LSTM), TOKENS), TOKENS)
    assert [(name, kind) for name, kind, _ in found.alone] == [("rnn", "LSTM"), ("embed", "Embedding")]
    with (console := Console(width=200)).capture() as shown:
        console.print(show(found, 200, "mine"))
    assert "left alone, no op acts on its kind: rnn (LSTM, 9.60k parameters), embed (Embedding, 1.20k" in shown.get()
    assert figures(Foreign.of(resnet(), IMAGE), IMAGE).alone == ()


def test_what_one_exporter_cannot_write_the_other_does(tmp_path):
    module = Classified().eval()
    work = Work(
        builder=Foreign.of(module, ROWS), task=Noise(ROWS), ops=OPS, parent=module, profiles=(Profile(name="p"),)
    )
    key, exporter = export_baseline(work, tmp_path)
    assert (exporter, bool(key)) == ("dynamo", True)
    rows = np.random.default_rng(0).standard_normal((5, 6, 12)).astype(np.float32)
    assert export.parity(module, (tmp_path / "model.onnx").read_bytes(), rows) < 1e-5


@pytest.mark.parametrize("missing", ["loss", "quality"])
def test_a_task_that_fails_is_one_line_with_its_place(missing, tmp_path):
    class Mine(Noise):
        pass

    def fails(*_):
        raise KeyError("mine")

    setattr(Mine, missing, fails)
    told = {"loss": r"^model \S+: cannot be trained: ", "quality": r"^task \S+: its quality cannot be measured: "}
    with pytest.raises(UserError, match=told[missing] + r"KeyError at test_strangers\.py:\d+: 'mine'$"):
        search(
            plain(),
            Mine(IMAGE),
            devices=[{"profile": "local-1t", "speedup": 0.5}],
            quality={"metric": "none", "max_drop": 1.0},
            epochs=0.1 if missing == "loss" else 0,
            out=tmp_path,
            serial=True,
            console=Console(quiet=True),
        )
