"""Which samples a split has: cut once, by index, the same for ever.

Data come in named parts (`train`, perhaps `val` and `test`) with a class per sample. The order of each split is a
fixed shuffle of its part's: files are often sorted by class, and whoever asks for the first n wants all classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.types import UserError

Indices = NDArray[np.int64]
SHARE, MOST, CALIBRATION = 0.1, 5000, 512
"""What is held out of a part where nobody says how much: this share, at most so many; samples to calibrate on."""
_RANGE = re.compile(r"([a-z]+)(?:\[(-?\d+)?:(-?\d+)?\])?")


@dataclass(frozen=True)
class Cut:
    """The samples of one split: indices into one part of the data, in the order in which they are read."""

    part: str
    indices: Indices

    def first(self, limit: int | None) -> Cut:
        """The first `limit` of them."""
        return Cut(self.part, self.indices[:limit])


def cut(
    parts: Mapping[str, Indices],
    where: str,
    *,
    train: Any = None,
    selection: Any = None,
    test: Any = None,
    calibration: Any = None,
    limit: Any = None,
) -> dict[str, Cut]:
    """The splits train, calibration, selection and test of data whose parts have these classes per sample.

    `selection` and `test` are each a range of a part ("test[1000:5000]", "val"), or a share or number of samples that
    is taken from the end of every class of the train part. By default test is the part `test`, else `val`, else a
    tenth of train; selection is the part `val` if test is not, else a tenth of train, at most 5000. Train is what is
    left of its part, or of the range that `train` gives. `calibration` is a number of samples of train, `limit` the
    most samples of train, selection and test (one number, or a mapping by split).

    Raises UserError, naming `where` and the key, for what is no range, overlaps, or leaves a split empty.
    """
    if "train" not in parts:
        raise UserError(f"{where}: has no part `train`, only {', '.join(parts) or 'none'}")
    given = test is not None
    if not given:
        test = next((name for name in ("test", "val") if name in parts), None)
    if selection is None and "val" in parts and not str(test).startswith("val"):
        selection = "val"
    asked = {"train": "train" if train is None else train, "selection": selection, "test": test}
    found: dict[str, Cut] = {}
    for split, value in asked.items():
        if isinstance(value, str):
            found[split] = _range(parts, value, f"{where}: data.{split}")
    if "train" not in found or found["train"].part != "train":
        raise UserError(f"{where}: data.train: {train!r} is no range of the part train, e.g. train[:45000]")
    if not given and {"test", "selection"} <= found.keys():  # a default gives way to what is asked for
        found["test"] = _without(found["test"], found["selection"])
    if train is None:
        for split in ("selection", "test"):
            if split in found:
                found["train"] = _without(found["train"], found[split])
    for split in ("test", "selection"):
        if split not in found:
            found[split] = _tails(parts["train"], found["train"], asked[split], f"{where}: data.{split}")
            found["train"] = _without(found["train"], found[split])
    _apart(found, where)
    found = {split: Cut(one.part, _mixed(one.indices)) for split, one in found.items()}
    found = {split: one.first(_most(limit, split, where)) for split, one in found.items()}
    found["calibration"] = found["train"].first(_number(calibration, CALIBRATION, f"{where}: data.calibration"))
    for split, one in found.items():
        if not len(one.indices):
            raise UserError(f"{where}: the split {split!r} is empty; give more data or other ranges under `data:`")
    return {split: found[split] for split in ("train", "calibration", "selection", "test")}


def classes_of(parts: Mapping[str, Indices], names: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Names of the classes; numbers where none are given.

    Raises UserError for a label that no name stands for, or, without names, unless train has every class from 0 on.
    """
    present = np.unique(parts["train"]).tolist()
    if not present:
        raise UserError(f"{where}: train is empty")
    if not names:
        gap = next((index for index, label in enumerate(present) if label != index), None)
        if gap is not None:
            raise UserError(
                f"{where}: labels of train must count from 0 without gaps: there is no {gap}, but {present[gap]}"
                " (or name all classes under `data: {labels: [...]}`)"
            )
        names = tuple(map(str, present))
    for part, labels in parts.items():
        if strange := [label for label in np.unique(labels).tolist() if not 0 <= label < len(names)]:
            raise UserError(f"{where}: {part} has the label {strange[0]}; the classes are 0 to {len(names) - 1}")
    return names


def whole(value: Any) -> bool:
    """Whether it is a whole number above zero."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _range(parts: Mapping[str, Indices], text: str, where: str) -> Cut:
    match = _RANGE.fullmatch(text.replace(" ", ""))
    if match is None or match[1] not in parts:
        raise UserError(f"{where}: {text!r} is no range of {', '.join(parts)}; write e.g. test[1000:5000]")
    first, last = (None if bound is None else int(bound) for bound in match.groups()[1:])
    return Cut(match[1], np.arange(len(parts[match[1]]), dtype=np.int64)[first:last])


def _tails(labels: Indices, pool: Cut, asked: Any, where: str) -> Cut:
    """The last samples of every class in the pool, of each as many as its share of the pool."""
    size = len(pool.indices)
    if asked is None:
        count = min(max(1, round(SHARE * size)), MOST)
    elif whole(asked):
        count = asked
    elif isinstance(asked, float) and 0 < asked < 1:
        count = max(1, round(asked * size))
    else:
        raise UserError(f"{where}: {asked!r} is no share below 1, number of samples or range such as train[45000:]")
    if count >= size:
        raise UserError(f"{where}: {count} samples to be taken from train, which has {size}")
    from_end = np.empty(size)
    for label in np.unique(labels[pool.indices]):
        own = np.flatnonzero(labels[pool.indices] == label)
        from_end[own] = (np.arange(len(own), 0, -1) - 0.5) / len(own)
    return Cut(pool.part, np.sort(pool.indices[np.argsort(from_end, kind="stable")[:count]]))


def _without(one: Cut, other: Cut) -> Cut:
    return Cut(one.part, np.setdiff1d(one.indices, other.indices)) if one.part == other.part else one


def _apart(found: Mapping[str, Cut], where: str) -> None:
    for one, other in (("train", "selection"), ("train", "test"), ("selection", "test")):
        if found[one].part == found[other].part:
            shared = len(np.intersect1d(found[one].indices, found[other].indices))
            if shared:
                raise UserError(f"{where}: data.{one} and data.{other} share {shared} samples of {found[one].part}")


def _mixed(indices: Indices) -> Indices:
    # RandomState rather than default_rng: its stream is frozen by NumPy's policy (NEP 19), the order stays for ever
    return np.random.RandomState(0).permutation(indices).astype(np.int64)


def _most(limit: Any, split: str, where: str) -> int | None:
    if isinstance(limit, Mapping):
        if strange := set(limit) - {"train", "selection", "test"}:
            raise UserError(f"{where}: data.limit: no split {min(map(str, strange))!r}; use train, selection, test")
        limit = limit.get(split)
    return None if limit is None else _number(limit, 0, f"{where}: data.limit")


def _number(value: Any, default: int, where: str) -> int:
    if value is None:
        return default
    if not whole(value):
        raise UserError(f"{where}: {value!r} is no number of samples above 0")
    return value
