"""CIFAR-10 and two trained ResNets for the benchmarks that need real accuracy; not part of the package.

`AUTOCOMPRESS_DATA` names a folder with `cifar10-jpeg/cifar10_jpeg.npz` (JPEG blobs and their offsets, original order)
and `weights/reference_models.py` with `cifar10_resnet20_jpegft.pt` and `cifar10_resnet56_jpegft.pt` beside it.

The protocol: train and calibrate on the train split; of the test split tune thresholds on 0-999, select on 1000-4999,
and report once on 5000-9999.
"""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from autocompress.parent import load_parent
from autocompress.store import cache_dir
from autocompress.tasks import InputSpec, Predict
from autocompress.tasks.intervals import mean_of
from autocompress.types import Quality, UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPLITS = {"tune": slice(0, 1000), "selection": slice(1000, 5000), "test": slice(5000, 10000)}


def folder() -> Path:
    """Where the data lie. Raises UserError if that is not said."""
    named = os.environ.get("AUTOCOMPRESS_DATA", "")
    if not (Path(named) / "cifar10-jpeg" / "cifar10_jpeg.npz").is_file():
        raise UserError(
            "set AUTOCOMPRESS_DATA to the folder that holds cifar10-jpeg/ and weights/ (benchmarks/cifar10.py)"
        )
    return Path(named)


@lru_cache(maxsize=2)
def pixels(part: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (n, 3, 32, 32) and labels (n,) of `train` or `test`, decoded once and kept in the cache folder."""
    kept = cache_dir() / "benchmarks" / f"cifar10-jpeg-{part}.npy"
    packed = np.load(folder() / "cifar10-jpeg" / "cifar10_jpeg.npz")
    if not kept.is_file():
        raw, offsets = packed[f"{part}_blob"].tobytes(), packed[f"{part}_offsets"]
        decoded = [
            np.asarray(Image.open(io.BytesIO(raw[begin:end])).convert("RGB")) for begin, end in pairwise(offsets)
        ]
        kept.parent.mkdir(parents=True, exist_ok=True)
        fresh = kept.with_suffix(f".{os.getpid()}.npy")
        np.save(fresh, np.stack(decoded).transpose(0, 3, 1, 2))
        fresh.rename(kept)
    return np.load(kept, mmap_mode="r"), packed[f"y_{part}"].astype(np.int64)


class Cifar:
    """Ten classes of 32 x 32 pixels; training crops (4 pixels of padding) and mirrors."""

    name, metric = "cifar10-jpeg", "accuracy"
    input = InputSpec(shape=(3, 32, 32), normalisation="(pixel / 255 - mean) / std of ImageNet")
    training = {"lr": 0.05}  # 14 blocks of a ResNet-56: 0.2 points lost after eight epochs on one core

    def __init__(self, train: int = 50_000) -> None:
        """`train`: only the first so many training images."""
        self.train = train

    def arrays(self, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Pixels and labels of a split. Raises UserError for one that is not there."""
        if split in SPLITS:
            images, labels = pixels("test")
            return images[SPLITS[split]], labels[SPLITS[split]]
        if split not in ("train", "calibration"):
            raise UserError(f"{self.name}: no split {split!r}; there are train, calibration, {', '.join(SPLITS)}")
        images, labels = pixels("train")
        size = self.train if split == "train" else 1024
        return images[:size], labels[:size]

    def batches(
        self, split: str, size: int, *, limit: int | None = None, seed: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches ((n, 3, 32, 32) float32, (n,) int64); shuffled and augmented with a seed."""
        images, labels = (part[:limit] for part in self.arrays(split))
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        order = torch.arange(len(images)) if generator is None else torch.randperm(len(images), generator=generator)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        for chosen in order.split(size):
            batch = torch.from_numpy(images[chosen.numpy()]).float().div_(255).sub_(mean).div_(std)
            yield _augment(batch, generator) if generator else batch, torch.from_numpy(labels[chosen.numpy()])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy."""
        return functional.cross_entropy(outputs, targets)

    def scores(self, predict: Predict, split: str) -> NDArray[np.bool_]:
        """Whether each image of a split is classified rightly, shape (n,): what paired differences are made of."""
        return np.concatenate(
            [predict(inputs.numpy()).argmax(1) == targets.numpy() for inputs, targets in self.batches(split, 100)]
        )

    def quality(self, predict: Predict, split: str) -> Quality:
        """Accuracy with Wilson's interval."""
        return mean_of(self.scores(predict, split), self.metric, split)


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    count = len(images)
    padded = functional.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, count), generator=generator)
    rows = (top[:, None] + torch.arange(32))[:, None, :, None]
    columns = (left[:, None] + torch.arange(32))[:, None, None, :]
    mirrored = torch.rand(count, generator=generator) < 0.5
    columns = torch.where(mirrored[:, None, None, None], columns.flip(-1), columns)
    return padded[torch.arange(count)[:, None, None, None], torch.arange(3)[None, :, None, None], rows, columns]


def resnet(depth: int) -> nn.Module:
    """The trained ResNet-20 or ResNet-56 (option-A shortcuts), fine-tuned on the JPEG train split."""
    path = folder() / "weights" / "reference_models.py"
    spec = importlib.util.spec_from_file_location("reference_models", path)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.CifarResNet((depth - 2) // 6)
    return load_parent(network, folder() / "weights" / f"cifar10_resnet{depth}_jpegft.pt")
