"""A small MobileNet for CIFAR-10, trained here once: a network of depthwise layers, whose weights differ in size.

Depthwise convolutions give every channel a scale of its own, which one step per tensor cannot hold (Nagel et al. 2019,
"Data-Free Quantization", section 3): the network on which equalization and bias correction have something to do.
"""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import references as by
import torch
from arms import Arm, all_of, both, rows_of
from cifar10 import Cifar
from mobilenet import WIDTHS, MobileNet
from safetensors.torch import load_file, save_file
from torch import nn

from autocompress.store import cache_dir
from autocompress.train import Training

EPOCHS, RATE, SEED = 10, 0.08, 0


def chain(module: nn.Module) -> list[str]:
    """All layers in a row: each gives to the next through nothing but ReLU and pooling."""
    return [name for name, _ in by.layers_of(module)]


TENSOR = {"bits": "int8", "granularity": "tensor"}
MOBILE_ARMS = (
    Arm(
        "int8, per channel",
        rows_of("quantize", bits="int8"),
        trained=False,
        reference=by.integers(),
        beside="onnxruntime, min-max",
    ),
    Arm(
        "int8, per tensor",
        rows_of("quantize", **TENSOR),
        trained=False,
        reference=by.integers(channel=False),
        beside="onnxruntime, per tensor",
    ),
    Arm(
        "int8, per tensor, equalized",
        both(rows_of("quantize", **TENSOR), all_of("quantize", equalize=True)),
        trained=False,
        reference=by.integers(channel=False, model=by.equalized(chain)),
        beside="equation 11 by hand, then onnxruntime",
    ),
    Arm(
        "int8, per tensor, biases corrected",
        both(rows_of("quantize", **TENSOR), all_of("quantize", correct_bias=True)),
        trained=False,
        reference=by.integers(channel=False, model=by.corrected(channel=False)),
        beside="by hand, then onnxruntime",
    ),
    Arm(
        "int8, per tensor, both",
        both(rows_of("quantize", **TENSOR), all_of("quantize", equalize=True, correct_bias=True)),
        trained=False,
        beside="the two rows above have theirs",
    ),
    Arm(
        "int8, per channel, equalized",
        both(rows_of("quantize", bits="int8"), all_of("quantize", equalize=True)),
        trained=False,
        reference=by.integers(model=by.equalized(chain)),
        beside="equation 11 by hand, then onnxruntime",
    ),
    Arm(
        "int8, per channel, biases corrected",
        both(rows_of("quantize", bits="int8"), all_of("quantize", correct_bias=True)),
        trained=False,
        reference=by.integers(model=by.corrected(channel=True)),
        beside="by hand, then onnxruntime",
    ),
)


def mobilenet() -> nn.Module:
    """The trained network, from the cache folder where it was trained before."""
    told = hashlib.sha256(repr((WIDTHS, EPOCHS, RATE, SEED)).encode()).hexdigest()[:12]
    kept = cache_dir() / "benchmarks" / f"mobile-{told}.safetensors"
    torch.manual_seed(SEED)
    module = MobileNet()
    if not kept.is_file():
        training = Training(module, Cifar(), EPOCHS, SEED, lr=RATE)
        for epoch in range(1, EPOCHS + 1):
            done = training.run_to(epoch / EPOCHS)
            sys.stderr.write(f"MobileNet: epoch {epoch} of {EPOCHS}, loss {done['loss']:.3f}\n")
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: one.detach().contiguous() for name, one in module.state_dict().items()}, kept)
    module.load_state_dict(load_file(kept))
    return module.eval()


SPREAD = 3
"""Channels of the unequal network differ by powers of two up to this one, either way."""


def unequal() -> nn.Module:
    """The same function from channels of unequal size, what training with other recipes leaves behind by itself.

    Every batch norm's channels are multiplied by random powers of two and the next layer's weights divided by them:
    the float answers stay the same, one step per tensor fits no longer (Nagel et al. 2019, figures 2 and 3).
    """
    module = mobilenet()
    generator = torch.Generator().manual_seed(SEED)
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    layers: list[Any] = [part for _, part in by.layers_of(module)][1:]
    with torch.no_grad():
        for norm, layer in zip(norms, layers, strict=True):
            scale = torch.exp2(torch.randint(-SPREAD, SPREAD + 1, norm.weight.shape, generator=generator).float())
            norm.weight.mul_(scale)
            norm.bias.mul_(scale)
            depthwise = isinstance(layer, nn.Conv2d) and layer.groups > 1
            layer.weight.div_(
                scale.view(-1, 1, 1, 1) if depthwise else scale.view(1, -1, *[1] * (layer.weight.ndim - 2))
            )
    return module


if __name__ == "__main__":
    mobilenet()
