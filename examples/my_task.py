"""A task of your own: is the digit even? Write `task: examples.my_task:EvenDigits` in a job, or pass an object."""

from collections.abc import Iterator

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import f1_score
from torch import Tensor
from torch.nn.functional import cross_entropy

from autocompress.tasks import InputSpec, Predict
from autocompress.types import Interval, Quality, UserError

SPLITS = {"train": (0, 1100), "calibration": (0, 200), "selection": (1100, 1450), "test": (1450, 1797)}


class EvenDigits:
    """Two classes, another metric, another interval."""

    name, metric = "even-digits", "f1"
    input = InputSpec(shape=(1, 8, 8), normalisation="pixel / 16", labels=("odd", "even"))

    def batches(
        self, split: str, size: int, *, limit: int | None = None, seed: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """In order, or shuffled the same way for the same seed."""
        if split not in SPLITS:
            raise UserError(f"{self.name}: no split {split!r}; there are {', '.join(SPLITS)}")
        images, digits = load_digits(return_X_y=True)
        chosen = np.arange(*SPLITS[split])[:limit]
        if seed is not None:
            chosen = np.random.default_rng(seed).permutation(chosen)
        inputs = torch.tensor(images[chosen] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
        yield from zip(inputs.split(size), torch.tensor(digits[chosen] % 2 == 0).long().split(size), strict=True)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Scalar."""
        return cross_entropy(outputs, targets)

    def quality(self, predict: Predict, split: str) -> Quality:
        """F1 with a bootstrap interval (Efron 1979)."""
        pairs = [(predict(inputs.numpy()).argmax(1), targets.numpy()) for inputs, targets in self.batches(split, 64)]
        found, true = (np.concatenate(part) for part in zip(*pairs, strict=True))
        draws = np.random.default_rng(0).integers(len(true), size=(200, len(true)))
        low, high = np.quantile([f1_score(true[draw], found[draw]) for draw in draws], [0.025, 0.975])
        value = Interval(value=float(f1_score(true, found)), low=float(low), high=float(high))
        return Quality(metric=self.metric, split=split, value=value, samples=len(true))
