"""Images that are decoded one by one: folders of image files, torchvision's data sets."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from autocompress.registry import optional
from autocompress.shelves import suggest
from autocompress.tasks.arrays import Arrays
from autocompress.tasks.frame import Draws, Frame
from autocompress.tasks.pictures import PARTS, Pictures, as_labels, line
from autocompress.tasks.splits import Indices
from autocompress.types import UserError
from autocompress.vision import import_torchvision

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"))
_log = logging.getLogger(__name__)


class Files:
    """Images that are decoded one by one when they are asked for, by as many threads as torch may use.

    `open_one(part, index)` gives a PIL image, `name(part, index)` its name in messages.
    """

    kind = "uint8"

    def __init__(
        self,
        where: str,
        parts: Mapping[str, Indices],
        names: tuple[str, ...],
        open_one: Callable[[str, int], Any],
        name: Callable[[str, int], str],
        *,
        channels: int = 3,
        fixed: bool = False,
        skip_broken: bool = False,
    ) -> None:
        """`fixed`: images of another size than the first one are refused. `skip_broken`: left out, not refused."""
        self.where, self.parts, self.names = where, parts, names
        self._open, self._name, self._mode = open_one, name, {1: "L", 3: "RGB"}[channels]
        self.fixed, self._skip, self._channels = fixed, skip_broken, channels
        self.broken: dict[str, str] = {}  # what was left out, and why

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the first readable image of train."""
        return self._first

    @cached_property
    def _first(self) -> tuple[int, int, int]:
        for index in range(len(self.parts["train"])):
            image = self._image("train", index)
            if not isinstance(image, str):
                return image.height, image.width, self._channels
            self._left_out("train", index, image)
        raise UserError(f"{self.where}: no image of train can be read")

    def read(
        self, part: str, indices: Indices, frame: Frame, draws: Draws | None
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """As the protocol says; which images are kept is known only after `skip_broken` has seen them."""
        rows = [None] * len(indices) if draws is None else list(draws)
        jobs = [(part, int(index), frame, row) for index, row in zip(indices, rows, strict=True)]
        threads = min(torch.get_num_threads(), len(jobs))
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                found = list(pool.map(self._decoded, jobs))
        else:
            found = list(map(self._decoded, jobs))
        kept = np.array([not isinstance(one, str) for one in found])
        for (_, index, *_), one in zip(jobs, found, strict=True):
            if isinstance(one, str):
                self._left_out(part, index, one)
        if not kept.any():
            raise UserError(
                f"{self.where}: every image of a batch is broken, first {self._name(part, int(indices[0]))}"
            )
        return np.stack([one for one in found if not isinstance(one, str)]), kept

    def _decoded(self, job: tuple[str, int, Frame, Draws | None]) -> NDArray[np.uint8] | str:
        """An image in its frame, or what is wrong with it."""
        part, index, frame, draw = job
        image = self._image(part, index)
        if isinstance(image, str):
            return image
        if self.fixed and (image.height, image.width) != self.shape[:2]:
            return f"is {image.width} x {image.height} pixels, the first {self.shape[1]} x {self.shape[0]}; give a size"
        pixels = frame.picture(image, draw)
        return pixels[..., None] if pixels.ndim == 2 else pixels

    def _image(self, part: str, index: int) -> Any:
        try:
            return self._open(part, index).convert(self._mode)
        except Exception as error:  # noqa: BLE001  decoders raise whatever a broken file makes them raise
            return f"cannot be read ({line(error)})"

    def _left_out(self, part: str, index: int, why: str) -> None:
        name = self._name(part, index)
        if not self._skip:
            raise UserError(f"{name}: {why}; mend or remove it, or set `skip_broken: true` under `data:`")
        if name not in self.broken:
            self.broken[name] = why
            _log.warning("%s: left out, %s", name, why)


def folders(root: Path, *, channels: int, fixed: bool, skip_broken: bool) -> Files:
    """root/train/CLASS/*.jpg with root/val or root/test beside it, or root/CLASS/*.jpg alone.

    Raises UserError for folders without images and classes that train does not have.
    """
    pil = optional("PIL.Image", f"{root}: reading image files")
    tops = {
        part: next((root / one for one in aliases if (root / one).is_dir()), None) for part, aliases in PARTS.items()
    }
    found = {part: top for part, top in tops.items() if top is not None} if tops["train"] else {"train": root}
    names = tuple(sorted(one.name for one in found["train"].iterdir() if one.is_dir() and not one.name.startswith(".")))
    if not names:
        raise UserError(f"{found['train']}: holds no folders; needed is one folder of images per class")
    paths: dict[str, list[Path]] = {}
    labels: dict[str, Indices] = {}
    for part, top in found.items():
        strange = sorted(
            {one.name for one in top.iterdir() if one.is_dir() and not one.name.startswith(".")} - {*names}
        )
        if strange:
            raise UserError(f"{top}: has a class {strange[0]!r} that {found['train']} does not have")
        per_class = [_images(top / name) for name in names]
        empty = [name for name, images in zip(names, per_class, strict=True) if not images]
        if empty and part == "train":
            raise UserError(f"{top / empty[0]}: holds no image ({', '.join(sorted(SUFFIXES))})")
        paths[part] = [path for images in per_class for path in images]
        labels[part] = np.repeat(np.arange(len(names), dtype=np.int64), [len(images) for images in per_class])

    def open_one(part: str, index: int) -> Any:
        with pil.open(paths[part][index]) as image:
            image.load()
            return image

    name = lambda part, index: str(paths[part][index])  # noqa: E731  no name is needed twice
    return Files(str(root), labels, names, open_one, name, channels=channels, fixed=fixed, skip_broken=skip_broken)


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def data_set(
    name: str,
    root: Path,
    options: Mapping[str, Any],
    *,
    download: bool,
    channels: int,
    fixed: bool,
    skip_broken: bool,
) -> Pictures:
    """A classification data set of torchvision: its arrays where it has them, else its images one by one.

    Raises UserError for unknown names, data sets without parts, and data that are not there.
    """
    library = import_torchvision().datasets
    kind = getattr(library, name, None)
    if not isinstance(kind, type) or not issubclass(kind, library.VisionDataset):
        raise UserError(f"data.dataset: torchvision has no data set {name!r}; {suggest(name, library.__all__)}")
    found = {part: one for part in PARTS if (one := _part_of(kind, part, root, options, download)) is not None}
    if "train" not in found:
        raise UserError(f"data.dataset: {name} has no part `train`")
    labels = {part: _targets(one) for part, one in found.items()}
    names = getattr(found["train"], "classes", ())
    names = tuple(map(str, names)) if names and all(isinstance(one, str) for one in names) else ()
    where = f"{name} in {root}"
    arrays = {part: np.asarray(one.data) for part, one in found.items() if _has_array(one)}
    if arrays.keys() == found.keys():
        shapes = {part: array.shape for part, array in arrays.items()}
        return Arrays(where, labels, shapes, "uint8", arrays.__getitem__, names)
    return Files(
        where,
        {part: as_labels(one, f"{where}: labels of {part}") for part, one in labels.items()},
        names,
        lambda part, index: found[part][index][0],
        lambda part, index: f"{where}: {part}[{index}]",
        channels=channels,
        fixed=fixed,
        skip_broken=skip_broken,
    )


def _part_of(kind: Any, part: str, root: Path, options: Mapping[str, Any], download: bool) -> Any:
    """The part of a data set; None where it has no such part."""
    takes = inspect.signature(kind).parameters
    asked: dict[str, Any] = dict(options)
    if "root" in takes:
        asked["root"] = str(root)
    if download:
        asked["download"] = True
    if "train" in takes or ("split" in options and "kwargs" in takes):
        if part == "val":
            return None
        asked["train"] = part == "train"
    elif "split" in takes and "split" not in options:
        asked["split"] = part
    elif part != "train":
        return None
    try:
        return kind(**asked)
    except Exception as error:
        if part != "train" and asked.get("split") == part and isinstance(error, ValueError):
            return None  # it has no split of this name
        more = "" if download else "; set `download: true` under `data:` to fetch it"
        raise UserError(f"data.dataset: {kind.__name__} in {root}: {line(error)}{more}") from error


def _has_array(one: Any) -> bool:
    data = getattr(one, "data", None)
    return isinstance(data, np.ndarray | torch.Tensor) and str(data.dtype).endswith("uint8") and data.ndim in (3, 4)


def _targets(one: Any) -> Any:
    for name in ("targets", "labels", "_labels"):
        if isinstance(found := getattr(one, name, None), list | np.ndarray | torch.Tensor):
            return np.asarray(found)
    return np.asarray([int(one[index][1]) for index in range(len(one))])
