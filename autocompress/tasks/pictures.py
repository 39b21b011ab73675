"""What all images have in common, wherever they come from: classes per part, and pixels by index.

Parts are `train` and perhaps `val` and `test`. Nothing is held that a worker process can open itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from autocompress.tasks.frame import Draws, Frame
from autocompress.tasks.splits import Indices
from autocompress.types import UserError

PARTS = {
    "train": ("train",),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "t10k"),
}
"""The parts of data, and what files and folders call them."""


class Pictures(Protocol):
    """Images with classes. `where` names them in messages."""

    @property
    def where(self) -> str:
        """A file or folder."""
        ...

    @property
    def parts(self) -> Mapping[str, Indices]:
        """Class numbers by part."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes; empty where the data have none."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images, or of the first one where they differ."""
        ...

    @property
    def kind(self) -> str:
        """`uint8` or `float32`."""
        ...

    def read(
        self, part: str, indices: Indices, frame: Frame, draws: Draws | None
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Images (n, height, width, channels) of the frame's size, and which of `indices` they are.

        With draws (n, 5) random crops. Raises UserError naming a file that cannot be read.
        """
        ...


def as_labels(found: Any, what: str) -> Indices:
    """One class number per image. Raises UserError naming `what` for anything else."""
    labels = np.asarray(found)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iub":
        raise UserError(
            f"{what}: {labels.dtype} of shape {labels.shape}; needed is one whole number per image, counted from 0"
        )
    return labels.astype(np.int64)


def as_path(given: Any, key: str) -> Path:
    """A path from a job, absolute: workers may run elsewhere. Raises UserError naming the key for what is none."""
    if not isinstance(given, str | Path) or not str(given):
        raise UserError(f"data.{key}: {given!r} is no path")
    try:
        return Path(given).expanduser().absolute()
    except RuntimeError as error:  # the home folder of nobody
        raise UserError(f"data.{key}: {given}: {error}") from error


def line(error: BaseException) -> str:
    """An exception's words as one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
