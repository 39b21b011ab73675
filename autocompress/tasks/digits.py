"""scikit-learn's handwritten digits: 1797 grey images of 8 x 8 pixels that come with the package, no download."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from math import radians
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from autocompress.tasks import InputSpec, Predict
from autocompress.tasks.intervals import mean_of
from autocompress.types import Quality, UserError

TRAIN, SELECTION, CALIBRATION = 1077, 360, 200
SHIFT, SCALE, TURN = 0.3, 0.08, radians(8.0)
"""Augmentation: largest shift in pixels, relative change of size, rotation in radians."""


def read_digits() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Pixels (1797, 64) from 0 to 16 and labels (1797,), from the file that scikit-learn ships.

    Its loader gives the same, but importing sklearn.datasets takes a second in every worker.
    """
    package = find_spec("sklearn")
    for folder in (package.submodule_search_locations if package else None) or ():
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            table = np.loadtxt(path, delimiter=",", dtype=np.float32)
            return table[:, :-1], table[:, -1]
    raise UserError("task digits: scikit-learn's digits are not installed: pip install scikit-learn")


@cache
def _splits() -> dict[str, tuple[Tensor, Tensor]]:
    """Images (n, 1, 8, 8) in [0, 1] and labels (n,) by split, always the same."""
    images, labels = read_digits()
    # RandomState rather than default_rng: its stream is frozen by NumPy's policy (NEP 19), the split stays for ever
    order = np.random.RandomState(1797).permutation(len(images))
    inputs = torch.from_numpy((images[order] / 16.0).astype(np.float32).reshape(-1, 1, 8, 8))
    targets = torch.from_numpy(labels[order].astype(np.int64))
    bounds = {
        "train": slice(0, TRAIN),
        "calibration": slice(0, CALIBRATION),
        "selection": slice(TRAIN, TRAIN + SELECTION),
        "test": slice(TRAIN + SELECTION, None),
    }
    return {split: (inputs[bound], targets[bound]) for split, bound in bounds.items()}


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, resize and turn every image a little: (n, 1, 8, 8) to the same shape, one bilinear sampling in all."""
    count, size = len(images), images.shape[-1]
    draw = torch.rand(4, count, generator=generator) * 2 - 1
    angle, scale = draw[0] * TURN, 1 + draw[1] * SCALE
    shift = draw[2:] * (2 * SHIFT / size)  # affine_grid counts in half images
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    matrix = torch.stack((cosine, -sine, shift[0], sine, cosine, shift[1])).T.reshape(count, 2, 3)
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


class Digits:
    """Ten classes, 1077 images to train on, 360 to select by, 360 to test; calibration is the first 200 of training."""

    name = "digits"
    metric = "accuracy"
    input = InputSpec(shape=(1, 8, 8), normalisation="pixel / 16", labels=tuple("0123456789"))
    smoothing = 0.1

    def batches(
        self, split: str, size: int, *, limit: int | None = None, seed: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches ((n, 1, 8, 8) float32, (n,) int64), n <= size, of the split's first `limit` samples.

        With a seed they are shuffled and augmented, the same way for the same seed. Raises UserError for an
        unknown split.
        """
        if split not in _splits():
            raise UserError(f"digits: no split {split!r}; there are {', '.join(_splits())}")
        inputs, targets = (part[:limit] for part in _splits()[split])
        if seed is None:
            yield from zip(inputs.split(size), targets.split(size), strict=True)
            return
        generator = torch.Generator().manual_seed(seed)
        for chosen in torch.randperm(len(inputs), generator=generator).split(size):
            yield augment(inputs[chosen], generator), targets[chosen]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy with label smoothing (Szegedy 2016, section 7)."""
        return functional.cross_entropy(outputs, targets, label_smoothing=self.smoothing)

    def quality(self, predict: Predict, split: str) -> Quality:
        """Accuracy with Wilson's 95 % interval."""
        return mean_of(self.scores(predict, split), self.metric, split)

    def scores(self, predict: Predict, split: str) -> NDArray[np.bool_]:
        """Whether each digit is read rightly."""
        return np.concatenate(
            [predict(inputs.numpy()).argmax(axis=1) == targets.numpy() for inputs, targets in self.batches(split, 64)]
        )
