"""Several inputs and several outputs: what a robot's camera sees and how far its lens is zoomed in give class and box.

python -m examples.my_regression          # or name both in a job: `task: examples.my_regression:Boxes`,
                                          # `model: {builder: examples.my_regression:TwoHeads}`
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

import autocompress
from autocompress.tasks import InputSpec, Predict
from autocompress.types import Interval, Quality, UserError

SIZE = 20
COUNTS = {"train": 640, "calibration": 64, "selection": 128, "test": 128}
FIRST = {"train": 0, "calibration": 0, "selection": 10_000, "test": 20_000}  # calibration is a part of train


def draw(number: int) -> tuple[NDArray[np.float32], NDArray[np.float32], int, NDArray[np.float32]]:
    """Image (1, 20, 20), zoom (1,), class 0 (frame) or 1 (filled), and the box in the room: centre and half width (3,).

    What stands in the room looks larger the further the lens is zoomed in, so that the box needs both inputs.
    """
    rng = np.random.default_rng(number)
    zoom, kind = rng.uniform(1, 2), int(rng.integers(2))
    half = rng.uniform(0.12, 0.2)
    centre = rng.uniform(-0.25, 0.25, 2)
    down, across = np.mgrid[:SIZE, :SIZE] / (SIZE - 1) * 2 - 1
    distance = np.maximum(abs(down / zoom - centre[0]), abs(across / zoom - centre[1])) / half
    seen = (distance < 1) if kind else (distance < 1) & (distance > 0.55)
    image = seen + rng.normal(0, 0.15, seen.shape)
    return image[None].astype(np.float32), np.array([zoom], np.float32), kind, np.array([*centre, half], np.float32)


class Boxes:
    """Batches give tuples: two inputs, two targets; the metric looks at both outputs."""

    name, metric = "boxes", "score"
    input = InputSpec(
        name="image",
        shape=(1, SIZE, SIZE),
        normalisation="brightness from 0 to 1",
        others=(InputSpec(name="zoom", shape=(1,), layout="", normalisation="1 to 2"),),
    )
    training = {"optimizer": "adamw", "lr": 0.01, "batch": 32}

    def count(self, split: str) -> int:
        """Optional: spares a training one pass to count its steps."""
        return COUNTS[split]

    def batches(
        self, split: str, size: int, *, limit: int | None = None, seed: int | None = None
    ) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
        """((images, zooms), (classes, boxes)); shuffled where there is a seed."""
        if split not in COUNTS:
            raise UserError(f"{self.name}: no split {split!r}; there are {', '.join(COUNTS)}")
        numbers = np.arange(COUNTS[split])[:limit] + FIRST[split]
        numbers = numbers if seed is None else np.random.default_rng(seed).permutation(numbers)
        for start in range(0, len(numbers), size):
            columns = zip(*map(draw, numbers[start : start + size]), strict=True)
            image, zoom, kind, box = (torch.from_numpy(np.stack(column)) for column in columns)
            yield (image, zoom), (kind, box)

    def loss(self, outputs: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy of the class and absolute error of the box, added up."""
        return functional.cross_entropy(outputs[0], targets[0]) + 10 * functional.l1_loss(outputs[1], targets[1])

    def quality(self, predict: Predict, split: str) -> Quality:
        """Mean over images of (1 - 5 x mean absolute error of the box) where the class is right, 0 elsewhere."""
        scores: list[NDArray[np.float64]] = []
        for inputs, (kind, box) in self.batches(split, 32):
            logits, found = predict(tuple(one.numpy() for one in inputs))
            error = abs(found - box.numpy()).mean(1)
            scores.append(np.where(logits.argmax(1) == kind.numpy(), np.clip(1 - 5 * error, 0, 1), 0.0))
        values = np.concatenate(scores)
        mean, margin = float(values.mean()), 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5
        value = Interval(value=mean, low=mean - margin, high=mean + margin)
        return Quality(metric=self.metric, split=split, value=value, samples=len(values))


class TwoHeads(nn.Module):
    """(images (n, 1, 20, 20), zooms (n, 1)) to (logits of the class (n, 2), boxes (n, 3))."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.lens = nn.Linear(1, 8)
        self.mix = nn.Linear(2 * width * 25 + 8, 64)
        self.kind = nn.Linear(64, 2)
        self.box = nn.Linear(64, 3)

    def forward(self, images: Tensor, zooms: Tensor) -> tuple[Tensor, Tensor]:
        """Both heads see both inputs."""
        seen = torch.cat((self.body(images), functional.relu(self.lens(zooms))), 1)
        mixed = functional.relu(self.mix(seen))
        return self.kind(mixed), self.box(mixed)


if __name__ == "__main__":
    autocompress.search(
        TwoHeads(),
        Boxes(),
        epochs=8,  # it has no weights yet
        devices=[{"profile": "local-1t", "speedup": 1.5}],
        quality={"metric": "score", "max_drop": 0.02},
        fidelity={"full_epochs": 4, "rungs": [0.34, 1.0]},
        trials=30,
        minutes=1,
        out="runs/regression",
    )
