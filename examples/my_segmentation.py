"""Segmentation with a network and a task of your own: what is disc, square or background, pixel by pixel.

python -m examples.my_segmentation        # or name both in a job: `task: examples.my_segmentation:Shapes`,
                                          # `model: {builder: examples.my_segmentation:UNet}`
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

SIZE, CLASSES = 24, ("background", "disc", "square")
COUNTS = {"train": 512, "calibration": 64, "selection": 96, "test": 96}
FIRST = {"train": 0, "calibration": 0, "selection": 10_000, "test": 20_000}  # calibration is a part of train


def draw(number: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """A noisy grey image (1, 24, 24) with a disc and a square, and the class of each pixel (24, 24)."""
    rng = np.random.default_rng(number)
    down, across = np.mgrid[:SIZE, :SIZE]
    classes = np.zeros((SIZE, SIZE), dtype=np.int64)
    y, x, half = (int(rng.integers(*bounds)) for bounds in ((5, SIZE - 5), (5, SIZE - 5), (2, 6)))
    classes[max(0, y - half) : y + half, max(0, x - half) : x + half] = 2
    y, x, radius = *rng.uniform(5, SIZE - 5, 2), rng.uniform(2.5, 6)
    classes[(down - y) ** 2 + (across - x) ** 2 < radius**2] = 1
    image = np.choose(classes, (0.0, 0.6, 1.0)) + rng.normal(0, 0.25, (SIZE, SIZE))
    return image[None].astype(np.float32), classes


class Shapes:
    """Targets are a class per pixel; the metric is the mean over classes of intersection over union."""

    name, metric = "shapes", "miou"
    input = InputSpec(shape=(1, SIZE, SIZE), normalisation="brightness from 0 to 1", labels=CLASSES)
    training = {"optimizer": "adamw", "lr": 0.01, "batch": 32}

    def count(self, split: str) -> int:
        """Optional: spares a training one pass to count its steps."""
        return COUNTS[split]

    def batches(
        self, split: str, size: int, *, limit: int | None = None, seed: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (n, 1, 24, 24) and classes (n, 24, 24); mirrored at random where a seed asks for shuffling."""
        if split not in COUNTS:
            raise UserError(f"{self.name}: no split {split!r}; there are {', '.join(COUNTS)}")
        numbers = np.arange(COUNTS[split])[:limit] + FIRST[split]
        rng = None if seed is None else np.random.default_rng(seed)
        numbers = numbers if rng is None else rng.permutation(numbers)
        for start in range(0, len(numbers), size):
            images, classes = (np.stack(part) for part in zip(*map(draw, numbers[start : start + size]), strict=True))
            if rng is not None and rng.random() < 0.5:
                images, classes = images[..., ::-1].copy(), classes[..., ::-1].copy()
            yield torch.from_numpy(images), torch.from_numpy(classes)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Outputs are logits (n, classes, 24, 24)."""
        return functional.cross_entropy(outputs, targets)

    def quality(self, predict: Predict, split: str) -> Quality:
        """Intersection over union of all images together, with a bootstrap interval over images (Efron 1979)."""
        found = ((predict(images.numpy()).argmax(1), classes.numpy()) for images, classes in self.batches(split, 32))
        counts = np.concatenate([_overlaps(classes, wanted) for classes, wanted in found])
        draws = np.random.default_rng(0).integers(len(counts), size=(200, len(counts)))
        low, high = np.quantile([_miou(counts[chosen]) for chosen in draws], [0.025, 0.975])
        mean = _miou(counts)
        value = Interval(value=mean, low=min(float(low), mean), high=max(float(high), mean))
        return Quality(metric=self.metric, split=split, value=value, samples=len(counts))


def _overlaps(found: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Per image and class: pixels in both, pixels in either; (n, classes, 2)."""
    pairs = [(found == c, wanted == c) for c in range(len(CLASSES))]
    return np.stack([np.stack(((a & b).sum((1, 2)), (a | b).sum((1, 2))), 1) for a, b in pairs], 1)


def _miou(counts: NDArray[np.int64]) -> float:
    both, either = counts.sum(0).T
    return float((both / np.maximum(either, 1)).mean())


class UNet(nn.Module):
    """Two levels with a skip connection (Ronneberger et al. 2015): (n, 1, 24, 24) to logits (n, 3, 24, 24)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down = _convolutions(1, width)
        self.bottom = _convolutions(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.join = _convolutions(2 * width, width)
        self.head = nn.Conv2d(width, len(CLASSES), 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits per pixel."""
        fine = self.down(images)
        coarse = self.up(self.bottom(functional.max_pool2d(fine, 2)))
        return self.head(self.join(torch.cat((fine, coarse), 1)))


def _convolutions(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


if __name__ == "__main__":
    autocompress.search(
        UNet(),
        Shapes(),
        epochs=6,  # it has no weights yet
        devices=[{"profile": "local-1t", "speedup": 2}],
        quality={"metric": "miou", "max_drop": 0.02},
        fidelity={"full_epochs": 3, "rungs": [0.34, 1.0]},
        trials=30,
        minutes=1,
        out="runs/segmentation",
    )
