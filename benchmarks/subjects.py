"""Networks whose weights do not matter, and files of random policies on them: what `measuring.py` measures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocompress import auto, export
from autocompress import space as sp
from autocompress.models.foreign import Foreign
from autocompress.models.sources import import_torchvision
from autocompress.parts import make_ops
from autocompress.pipeline import Work, export_float, release, shape
from autocompress.searchers.design import spread
from autocompress.store import write_atomic
from autocompress.tasks import InputSpec, Predict
from autocompress.train import reestimate_batchnorm
from autocompress.types import Candidate, Genotype, Interval, Profile, Quality, Space, TrialFailure

OPS = ("block", "replace", "prune", "lowrank", "quantize")
WITHOUT = ("qat", "distill")  # how a candidate is trained is nothing that its file's speed shows


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut without weights (He et al. 2016, section 4.2, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.wider = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, outputs, h / stride, w / stride)."""
        short = x
        if self.wider:
            short = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.wider))
        found = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(found + short)


class ResNet(nn.Module):
    """CIFAR's ResNet of `depth` = 6 n + 2 layers."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        count = (depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        width, stages = 16, []
        for place, outputs in enumerate((16, 32, 64)):
            stage: list[nn.Module] = []
            for index in range(count):
                stage.append(Block(width, outputs, 2 if place and not index else 1))
                width = outputs
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, 32, 32) to (n, 10)."""
        x = self.layer3(self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def mobilenet() -> nn.Module:
    """torchvision's MobileNetV3-small with ten classes."""
    return import_torchvision().models.mobilenet_v3_small(num_classes=10)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet20": (partial(ResNet, 20), 32),
    "resnet56": (partial(ResNet, 56), 32),
    "mobilenetv3s": (mobilenet, 96),
}
"""Name to what makes it and the side of its pictures."""


class Noise:
    """Pictures of nothing: enough for the ranges that integers need."""

    name, metric = "noise", "accuracy"

    def __init__(self, side: int) -> None:
        self.input = InputSpec(shape=(3, side, side))

    def batches(
        self, split: str, size: int, *, limit: int | None = None, seed: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """At most 64 samples; the same for every split."""
        generator = torch.Generator().manual_seed(len(split) if seed is None else seed)
        left = min(limit or 64, 64)
        while left > 0:
            count = min(size, left)
            yield torch.randn((count, *self.input.shape), generator=generator), torch.zeros(count, dtype=torch.int64)
            left -= count

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy."""
        return functional.cross_entropy(outputs, targets)

    def quality(self, predict: Predict, split: str) -> Quality:
        """None to speak of."""
        del predict
        return Quality(metric=self.metric, split=split, value=Interval(value=0.1, low=0.0, high=1.0), samples=64)


@dataclass(frozen=True)
class Subject:
    """A network, its space, and what makes files of it."""

    name: str
    work: Work
    space: Space
    baseline: bytes

    @property
    def profile(self) -> Profile:
        """The one target."""
        return self.work.profiles[0]


def subject(name: str, profile: Profile) -> Subject:
    """A network by name, with the space that is derived from it."""
    make, side = NETWORKS[name]
    torch.manual_seed(0)
    task: Any = Noise(side)
    module = make()
    reestimate_batchnorm(module, task, 4)  # else its outputs are too small to be normal numbers
    builder = Foreign.of(module.eval(), task.input)
    work = Work(builder, task, make_ops(OPS), builder.build({}), (profile,))
    whole = auto.space(builder, multiple=profile.channel_multiple)
    genes = tuple(gene for gene in whole.genes if gene.op not in WITHOUT)
    return Subject(
        name,
        work,
        whole.model_copy(update={"genes": genes, "always": ()}),
        export.compose(export_float(work, work.parent)),
    )


def genotypes(space: Space, count: int, seed: int) -> tuple[Genotype, ...]:
    """Different ones: in turn one that spans the space, a child of such, a random one."""
    rng = Random(f"{seed}:measuring")
    first = spread(space, count, rng)
    found: dict[Genotype, None] = {}
    for index in range(20 * count):
        if len(found) == count:
            break
        turn = index % 3
        one = first[(index // 3) % count]
        if turn == 1:
            one = sp.mutate(space, sp.crossover(space, rng.choice(first), rng.choice(first), rng), rng, 2.0)
        elif turn == 2:
            one = sp.sample(space, rng)
        found.setdefault(one)
    return tuple(found)


def file(made: Subject, genotype: Genotype, kept: Path) -> tuple[bytes, str]:
    """The file of a genotype and its weight-free hash, from the folder `kept` if it was made before.

    Raises TrialFailure.
    """
    asked = json.dumps(
        [made.name, made.profile.numeric.variant, genotype, [g.model_dump(mode="json") for g in made.space.genes]]
    )
    path = kept / f"{hashlib.sha256(asked.encode()).hexdigest()[:16]}.onnx"
    if path.is_file():
        model = path.read_bytes()
    elif (said := path.with_suffix(".failed")).is_file():
        raise TrialFailure(said.read_text())
    else:
        candidate: Candidate = sp.decode(made.space, genotype)
        torch.manual_seed(0)
        try:
            shaped = shape(made.work, candidate)
            found = release(made.work, shaped.module, candidate.policy, first_look=True)
        except TrialFailure as failure:
            write_atomic(said, str(failure).encode())
            raise
        model = found[made.profile.numeric.variant].model
        write_atomic(path, model)
    return model, export.graph_hash(model, weights=False)
