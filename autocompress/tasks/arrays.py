"""Images of one size in memory: from .npz and from idx files (the MNIST format)."""

from __future__ import annotations

import gzip
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from autocompress.tasks.frame import Draws, Frame
from autocompress.tasks.pictures import PARTS, as_labels, line
from autocompress.tasks.splits import Indices
from autocompress.types import UserError


class Arrays:
    """Images of one size in memory, opened when they are first read."""

    def __init__(
        self,
        where: str,
        labels: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        kind: str,
        load: Callable[[str], NDArray[Any]],
        names: tuple[str, ...] = (),
    ) -> None:
        """`shapes` are those of the arrays, images first; `load` gives the array of a part."""
        self.where, self.names, self.kind, self._load = where, names, kind, load
        self._arrays: dict[str, NDArray[Any]] = {}
        self._axis = {part: _channel_axis(shape, f"{where}: {part}") for part, shape in shapes.items()}
        self.parts = {part: as_labels(found, f"{where}: labels of {part}") for part, found in labels.items()}
        sizes = {part: _size(shape, self._axis[part]) for part, shape in shapes.items()}
        self.shape = sizes["train"]
        for part, shape in shapes.items():
            if sizes[part] != self.shape:
                raise UserError(f"{where}: images of {part} are {_by(sizes[part])}, those of train {_by(self.shape)}")
            if shape[0] != len(self.parts[part]):
                raise UserError(f"{where}: {part} has {shape[0]} images and {len(self.parts[part])} labels")

    def read(
        self, part: str, indices: Indices, frame: Frame, draws: Draws | None
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """As the protocol says."""
        if part not in self._arrays:
            array, axis = self._load(part), self._axis[part]
            self._arrays[part] = array[..., None] if axis is None else np.moveaxis(array, axis, -1)
        return frame.pictures(self._arrays[part][indices], draws), np.ones(len(indices), dtype=bool)


def npz(path: Path) -> Arrays:
    """An .npz with x_train, y_train, x_test, y_test or train_images, train_labels, ..., and perhaps a part `val`.

    Raises UserError for files that are none and for arrays that are missing or of the wrong kind.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            heads = {
                name.removesuffix(".npy"): _head(archive, name) for name in archive.namelist() if name.endswith(".npy")
            }
        found: dict[str, tuple[str, str]] = {}
        for part, aliases in PARTS.items():
            pairs = [(f"x_{one}", f"y_{one}") for one in aliases] + [(f"X_{one}", f"y_{one}") for one in aliases]
            pairs += [(f"{one}_images", f"{one}_labels") for one in aliases]
            there = [pair for pair in pairs if set(pair) <= heads.keys()]
            if there:
                found[part] = there[0]
        if "train" not in found:
            raise UserError(
                f"{path}: holds the arrays {', '.join(sorted(heads)) or 'none'}; needed are x_train, y_train, x_test, "
                "y_test (or train_images, train_labels, ...)"
            )
        for images, labels in found.values():
            for name in (images, labels):
                if heads[name][1].hasobject:
                    raise UserError(f"{path}: {name} holds Python objects, which are not loaded; save plain numbers")
        with np.load(path) as file:
            labels = {part: file[pair[1]] for part, pair in found.items()}
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not readable as .npz ({line(error)})") from error

    def load(part: str) -> NDArray[Any]:
        try:
            with np.load(path) as file:
                return file[found[part][0]]
        except (zipfile.BadZipFile, OSError, ValueError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: {found[part][0]} is not readable ({line(error)})") from error

    kinds = {str(heads[pair[0]][1]) for pair in found.values()}
    if len(kinds) > 1 or not kinds <= {"uint8", "float32"}:
        raise UserError(f"{path}: images are {', '.join(sorted(kinds))}; save them as uint8 (or float32, taken as is)")
    return Arrays(str(path), labels, {part: heads[pair[0]][0] for part, pair in found.items()}, kinds.pop(), load)


def _head(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array in an archive, without reading it."""
    with archive.open(name) as file:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, kind = read(file)
    return shape, kind


def idx(folder: Path) -> Arrays:
    """train-images-idx3-ubyte[.gz], train-labels-idx1-ubyte[.gz] and the same of t10k or test (the MNIST format).

    Raises UserError for missing, cut off or other files.
    """
    files: dict[str, tuple[Path, Path]] = {}
    for part, aliases in PARTS.items():
        images, labels = (_idx_file(folder, aliases, what) for what in ("images", "labels"))
        if (images is None) != (labels is None):
            raise UserError(f"{folder}: there are {'labels' if images is None else 'images'} of {part} alone")
        if images is not None and labels is not None:
            files[part] = (images, labels)
    if "train" not in files:
        raise UserError(f"{folder}: there is no train-images-idx3-ubyte with train-labels-idx1-ubyte")
    heads = {part: _idx_head(pair[0]) for part, pair in files.items()}
    labels = {part: _read_idx(pair[1]) for part, pair in files.items()}
    return Arrays(str(folder), labels, heads, "uint8", lambda part: _read_idx(files[part][0]))


def is_idx(folder: Path) -> bool:
    """Whether a folder holds images in the MNIST format."""
    return _idx_file(folder, PARTS["train"], "images") is not None


def _idx_file(folder: Path, aliases: Sequence[str], what: str) -> Path | None:
    form = re.compile(rf"({'|'.join(aliases)})-{what}[.-]idx\d-ubyte(\.gz)?")
    return next((path for path in sorted(folder.iterdir()) if form.fullmatch(path.name)), None)


def _idx_head(path: Path) -> tuple[int, ...]:
    """The shape in a file's first bytes."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            magic = file.read(4)
            if len(magic) < 4 or magic[:3] != b"\x00\x00\x08":
                raise UserError(f"{path}: is no idx file of bytes (it begins with {magic.hex()})")
            return tuple(int.from_bytes(file.read(4), "big") for _ in range(magic[3]))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not readable ({line(error)})") from error


def _read_idx(path: Path) -> NDArray[np.uint8]:
    shape = _idx_head(path)
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not readable ({line(error)})") from error
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape))
    if len(values) != np.prod(shape):
        raise UserError(f"{path}: is cut off: {len(values)} bytes, its head says {' x '.join(map(str, shape))}")
    return values.reshape(shape)


def _channel_axis(shape: tuple[int, ...], what: str) -> int | None:
    """Which axis has the channels; None where there is none."""
    if len(shape) == 3:
        return None
    if len(shape) == 4:
        for axis in (3, 1):
            if shape[axis] in (1, 3, 4):
                return axis
    raise UserError(f"{what}: images of shape {shape}; needed is (n, h, w), (n, h, w, channels) or (n, channels, h, w)")


def _size(shape: tuple[int, ...], axis: int | None) -> tuple[int, int, int]:
    if axis is None:
        return shape[1], shape[2], 1
    high, wide = (shape[2], shape[3]) if axis == 1 else (shape[1], shape[2])
    return high, wide, shape[axis]


def _by(shape: tuple[int, int, int]) -> str:
    return " x ".join(map(str, shape))
