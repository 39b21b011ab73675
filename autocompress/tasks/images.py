"""Image classification on the user's data: .npz and idx files, folders of image files, torchvision's data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from autocompress.shelves import suggest
from autocompress.tasks import InputSpec, Predict, several
from autocompress.tasks.arrays import idx, is_idx, npz
from autocompress.tasks.files import data_set, folders
from autocompress.tasks.frame import Frame, mirrored, shifted
from autocompress.tasks.intervals import mean_of
from autocompress.tasks.pictures import Pictures, as_path
from autocompress.tasks.recipe import Recipe
from autocompress.tasks.splits import Cut, classes_of, cut, whole
from autocompress.types import Quality, UserError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of red, green and blue that torchvision's, timm's and most other networks are fed by."""
AUGMENT = ("none", "flip", "crop")
METRICS = {"accuracy": 1, "top5": 5}
SMALL = 64  # pixels; larger images are cropped and resized rather than shifted
BATCH_FLOATS = 4_000_000  # of a batch whose quality is measured: 16 MB


class Images:
    """Task `images`: every option is a key under `data:` in the job.

    path         an .npz, a folder of idx files, or a folder root/train/CLASS/*.jpg with root/val or root/test
    dataset, root, download, options   instead of a path: a data set of torchvision, its folder, its own arguments
    size         height and width that the network is fed (one number or two); default: the images' own
    resize       pixels of the shorter side before the centre of `size` is cut out; default: `size`
    channels     1 or 3; default: the arrays' own, 3 for files
    mean, std    (pixel / 255 - mean) / std; default: ImageNet's for 3 channels, 0 and 1 for others
    augment      none, flip, or crop: with flips, small images are shifted by up to 4 pixels, large ones cropped
    labels       names of the classes in the order of their numbers; default: folders' names, else the numbers
    train, selection, test, calibration, limit   which samples a split has, see `splits.cut`
    metric       accuracy, or top5
    smoothing    of labels in the loss (Szegedy et al. 2016, section 7); default 0
    skip_broken  leave out image files that cannot be read instead of stopping there
    training     optimizer, lr, batch ..., see `recipe.Recipe`
    """

    name = "images"

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        dataset: str | None = None,
        root: str | Path = ".",
        download: bool = False,
        options: Mapping[str, Any] | None = None,
        size: int | Sequence[int] | None = None,
        resize: int | None = None,
        channels: int | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        augment: str = "none",
        labels: Sequence[str] | None = None,
        train: str | None = None,
        selection: str | float | None = None,
        test: str | float | None = None,
        calibration: int | None = None,
        limit: int | Mapping[str, int] | None = None,
        metric: str = "accuracy",
        smoothing: float = 0.0,
        skip_broken: bool = False,
        training: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises UserError naming the file and the key for whatever cannot be used; decodes no image but the first."""
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        if (path is None) == (dataset is None):
            raise UserError("data: task images needs either `path` or `dataset` (with `root`)")
        file, folder = as_path("." if path is None else path, "path"), as_path(root, "root")
        # what a worker process makes the task again from
        self._given = {**given, "path": None if path is None else file, "root": folder, "download": False}
        if augment not in AUGMENT:
            raise UserError(f"data.augment: {augment!r}; {suggest(str(augment), AUGMENT)}")
        if metric not in METRICS:
            raise UserError(f"data.metric: {metric!r}; {suggest(str(metric), METRICS)}")
        if channels not in (None, 1, 3):
            raise UserError(f"data.channels: {channels!r}; choose 1 or 3")
        if not isinstance(smoothing, int | float) or not 0 <= smoothing < 1:
            raise UserError(f"data.smoothing: {smoothing!r} must lie between 0 and 1")
        self.metric, self.augment, self.smoothing = metric, augment, float(smoothing)
        self.augments = augment != "none"  # where no image changes, a teacher answers each once
        self.training = Recipe.of(training, "data")
        reading = {"channels": channels or 3, "fixed": size is None, "skip_broken": skip_broken}
        if dataset is not None:
            if not isinstance(options or {}, Mapping):
                raise UserError(f"data.options: {options!r} is no mapping of arguments of {dataset}")
            self._pictures: Pictures = data_set(dataset, folder, options or {}, download=download, **reading)
        else:
            self._pictures = _at(file, reading)
        where = self._pictures.where
        if labels is not None and not isinstance(labels, list | tuple):
            raise UserError(f"data.labels: {labels!r} is no list of names")
        names = classes_of(self._pictures.parts, tuple(map(str, labels or self._pictures.names)), where)
        self._cuts = cut(
            self._pictures.parts,
            where,
            train=train,
            selection=selection,
            test=test,
            calibration=calibration,
            limit=limit,
        )
        high, wide, stored = self._pictures.shape
        self._channels = channels or stored
        if self._channels < stored:
            raise UserError(f"data.channels: {where} has {stored} channels; only one can be repeated to {channels}")
        self._frame = _frame(size, resize, (high, wide))
        self._scale, self._shift, normalisation = self._normalisation(mean, std)
        shape = (self._channels, self._frame.height, self._frame.width)
        self.input = InputSpec(shape=shape, normalisation=normalisation, labels=names)

    def __reduce__(self) -> tuple[Callable[[], Images], tuple[()]]:
        """Made again from its options: a worker opens the files itself."""
        return partial(Images, **self._given), ()

    @property
    def broken(self) -> Mapping[str, str]:
        """Image files that were left out so far, and why (with `skip_broken`)."""
        return getattr(self._pictures, "broken", {})

    def count(self, split: str) -> int:
        """Samples of a split. Raises UserError for an unknown one."""
        return len(self._cut(split).indices)

    def batches(
        self, split: str, size: int, *, limit: int | None = None, seed: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches ((n, channels, height, width) float32 in channels-last memory, (n,) int64), n <= size.

        In the split's own fixed order, or shuffled and augmented, the same way for the same seed. Only one batch is
        in memory. Raises UserError for an unknown split and for an image that cannot be read, naming its file.
        """
        chosen = self._cut(split).first(limit)
        order, rng = chosen.indices, None
        if seed is not None:
            rng = np.random.default_rng(seed)
            order = rng.permutation(order)
        labels = self._pictures.parts[chosen.part]
        for start in range(0, len(order), size):
            indices = order[start : start + size]
            draws = None if rng is None or self.augment == "none" else rng.random((len(indices), 5))
            crop = draws if self.augment == "crop" and self._large else None
            pixels, kept = self._pictures.read(chosen.part, indices, self._frame, crop)
            if draws is not None:
                move = mirrored if self._large or self.augment == "flip" else shifted
                pixels = move(pixels, draws[kept])
            yield self._tensor(pixels), torch.from_numpy(labels[indices[kept]])

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Cross entropy of the logits (n, classes), of the first output where there are several."""
        logits = several(outputs)[0]
        self._fits(tuple(logits.shape))
        return functional.cross_entropy(logits, targets, label_smoothing=self.smoothing)

    def quality(self, predict: Predict, split: str) -> Quality:
        """Share of images whose class is the first (or among the first five), with Wilson's 95 % interval."""
        return mean_of(self.scores(predict, split), self.metric, split)

    def scores(self, predict: Predict, split: str) -> NDArray[np.bool_]:
        """Whether the class of each image that could be read is the first (or among the first five)."""
        first, right = METRICS[self.metric], list[NDArray[np.bool_]]()
        size = max(1, min(256, BATCH_FLOATS // int(np.prod(self.input.shape))))
        for inputs, targets in self.batches(split, size):
            logits: NDArray[Any] = several(predict(inputs.numpy()))[0]
            self._fits(logits.shape)
            best = np.argsort(-logits, axis=1, kind="stable")[:, :first]  # of equal ones the first, as argmax does
            right.append((best == targets.numpy()[:, None]).any(axis=1))
        return np.concatenate(right)

    @property
    def _large(self) -> bool:
        return max(self._frame.height, self._frame.width) > SMALL

    def _cut(self, split: str) -> Cut:
        if split not in self._cuts:
            raise UserError(f"images: no split {split!r}; there are {', '.join(self._cuts)}")
        return self._cuts[split]

    def _fits(self, shape: tuple[int, ...]) -> None:
        classes = len(self.input.labels)
        if len(shape) != 2 or shape[1] < classes:
            raise UserError(f"images: the network answers with shape {shape}, the data have {classes} classes")

    def _tensor(self, pixels: NDArray[Any]) -> Tensor:
        """(n, h, w, c) as it is stored to (n, c, h, w) as the network wants it, in channels-last memory."""
        images = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).to(torch.float32)
        if images.shape[1] < self._channels:
            images = images.repeat(1, self._channels, 1, 1)
        return images.mul_(self._scale).add_(self._shift).contiguous(memory_format=torch.channels_last)

    def _normalisation(self, mean: Any, std: Any) -> tuple[Tensor, Tensor, str]:
        """Factor and summand per channel, and both in words."""
        floats, channels = self._pictures.kind == "float32", self._channels
        usual = IMAGENET if channels == 3 and not floats else ((0.0,) * channels, (1.0,) * channels)
        means = _per_channel("mean", mean, usual[0])
        stds = _per_channel("std", std, usual[1])
        if min(stds) <= 0:
            raise UserError(f"data.std: {std!r} must be above 0")
        if floats and mean is None and std is None:
            text = "as in the file"
        else:
            text = f"({'value' if floats else 'pixel / 255'} - {_shown(means)}) / {_shown(stds)}"
        text += ", RGB" if channels == 3 else ""
        if self._frame.margin != 1:
            side = round(self._frame.margin * min(self._frame.height, self._frame.width))
            text += f"; shorter side resized to {side}, centre {self._frame.height} x {self._frame.width}"
        mean_, std_ = (torch.tensor(one, dtype=torch.float64).reshape(1, -1, 1, 1) for one in (means, stds))
        return (1 / (std_ * (1 if floats else 255))).float(), (-mean_ / std_).float(), text


def _at(path: Path, reading: dict[str, Any]) -> Pictures:
    if path.is_dir():
        return idx(path) if is_idx(path) else folders(path, **reading)
    if not path.exists():
        raise UserError(f"data.path: there is no file or folder {path}")
    if path.suffix != ".npz":
        raise UserError(f"data.path: {path} is no .npz, no folder of idx files and no folder of class folders")
    return npz(path)


def _frame(size: Any, resize: Any, own: tuple[int, int]) -> Frame:
    pair = own if size is None else (size, size) if whole(size) else size
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(map(whole, pair)):
        raise UserError(f"data.size: {size!r}; write pixels, one number or [height, width]")
    if resize is None:
        return Frame(*pair)
    if not whole(resize) or resize < min(pair):
        raise UserError(f"data.resize: {resize!r} must be a number of pixels, at least the size {min(pair)}")
    return Frame(*pair, margin=resize / min(pair))


def _per_channel(key: str, asked: Any, usual: tuple[float, ...]) -> tuple[float, ...]:
    if asked is None:
        return usual
    values = [asked] * len(usual) if isinstance(asked, int | float) else asked
    if not isinstance(values, list | tuple) or not all(isinstance(one, int | float) for one in values):
        raise UserError(f"data.{key}: {asked!r}; write one number, or a list of one per channel")
    if len(values) != len(usual):
        raise UserError(f"data.{key}: {len(values)} numbers for {len(usual)} channels")
    return tuple(map(float, values))


def _shown(values: tuple[float, ...]) -> str:
    return f"{values[0]:g}" if len(set(values)) == 1 else "[" + ", ".join(f"{one:g}" for one in values) + "]"
