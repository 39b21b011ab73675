"""Sentences with labels from TSV and CSV files."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.tasks.pictures import PARTS, line
from autocompress.types import UserError

SUFFIXES = {".tsv": "\t", ".csv": ","}
SENTENCES, LABELS = ("sentence", "text"), ("label", "labels")
"""Names by which a first line is known to be a header."""
LONGEST = 2**24  # characters of a cell


@dataclass(frozen=True)
class Table:
    """Sentences with labels, and the line of the file that each is from."""

    path: Path
    sentences: tuple[str, ...]
    labels: tuple[str, ...]
    lines: tuple[int, ...]


def read_table(path: Path, sentence: str | int | None = None, label: str | int | None = None) -> Table:
    """A TSV (tabs, no quoting) or CSV file. Raises UserError naming file, line and column for what is not there."""
    comma = SUFFIXES.get(path.suffix.lower())
    if comma is None:
        raise UserError(f"{path}: is no .tsv or .csv")
    quoting = csv.QUOTE_NONE if comma == "\t" else csv.QUOTE_MINIMAL
    csv.field_size_limit(LONGEST)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=comma, quoting=quoting)
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not readable as a table of UTF-8 text ({line(error)})") from error
    if not rows:
        raise UserError(f"{path}: is empty")
    head = [cell.strip() for cell in rows[0][1]]
    named = any(isinstance(one, str) for one in (sentence, label))
    titled = {cell.lower() for cell in head}
    if named or (titled & {*SENTENCES} and titled & {*LABELS}):
        rows = rows[1:]
        columns = _named(path, head, "sentence", sentence, SENTENCES), _named(path, head, "label", label, LABELS)
    else:
        columns = _place(0 if sentence is None else sentence), _place(1 if label is None else label)
    for number, row in rows:
        if len(row) <= max(columns):
            raise UserError(f"{path}:{number}: has {len(row)} columns, needed are {max(columns) + 1}")
    sentences, found = ([row[column].strip() for _, row in rows] for column in columns)
    if empty := [number for (number, _), one in zip(rows, found, strict=True) if not one]:
        raise UserError(f"{path}:{empty[0]}: the label is empty")
    return Table(path, tuple(sentences), tuple(found), tuple(number for number, _ in rows))


def _named(path: Path, head: Sequence[str], key: str, asked: str | int | None, usual: Sequence[str]) -> int:
    if isinstance(asked, int):
        return _place(asked)
    lower = [cell.lower() for cell in head]
    for name in usual if asked is None else (asked.lower(),):
        if name in lower:
            return lower.index(name)
    raise UserError(f"{path}: data.{key}: no column {asked or usual[0]!r}; the first line has {', '.join(head)}")


def _place(asked: Any) -> int:
    if not isinstance(asked, int) or isinstance(asked, bool) or asked < 0:
        raise UserError(f"data: column {asked!r}; write a name, or a number from 0")
    return asked


def tables(path: Path) -> dict[str, Path]:
    """Files by part: of a folder train, val (dev) and test, or one file alone. Raises UserError without train."""
    if path.is_file():
        return {"train": path}
    if not path.is_dir():
        raise UserError(f"data.path: there is no file or folder {path}")
    found: dict[str, Path] = {}
    for part, aliases in PARTS.items():
        there = [file for one in aliases for suffix in SUFFIXES if (file := path / f"{one}{suffix}").is_file()]
        if there:
            found[part] = there[0]
    if "train" not in found:
        raise UserError(f"data.path: there is no train.tsv or train.csv in {path}")
    return found


def in_order(labels: Sequence[str]) -> tuple[str, ...]:
    """Distinct labels: sorted, numbers by value."""
    names = set(labels)
    try:
        return tuple(sorted(names, key=float))
    except ValueError:
        return tuple(sorted(names))


def numbers(table: Table, names: tuple[str, ...]) -> NDArray[np.int64]:
    """The labels' places among `names`. Raises UserError for the first line that has another one."""
    known = {name: number for number, name in enumerate(names)}
    for number, one in zip(table.lines, table.labels, strict=True):
        if one not in known:
            what = f"the label {one[:40]!r} is none of {', '.join(names[:8])}"
            raise UserError(f"{table.path}:{number}: {what}; name all under `data: {{labels: [...]}}`")
    return np.array([known[one] for one in table.labels], dtype=np.int64)
