"""YAML text -> frozen record, with one clear line per problem.

A subset of YAML 1.2 as data: one document, text keys, no anchors, aliases, tags or merge keys. Booleans are `true` and
`false` alone (`no`, `off`, `yes` and `on` stay text, unlike YAML 1.1), numbers are decimal (`1e-3` is one).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from autocompress.shelves import suggest
from autocompress.types import Record, UserError

Place = tuple[str | int, ...]
"""Keys and list indices from the top of the document."""
R = TypeVar("R", bound=Record)

_MAX_BYTES = 1_000_000
_MAX_DEPTH = 20
_INT, _FLOAT, _BOOL, _NULL = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "null"))


class _Loader(yaml.SafeLoader):
    """SafeLoader up to the node tree, with the scalars of YAML 1.2's core schema; values are made by `_value`."""

    yaml_implicit_resolvers: dict[Any, Any] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _problem(
                event.start_mark, "anchors and aliases (& and *) are not used here; quote the text or repeat it"
            )
        if getattr(event, "tag", None) is not None:
            raise _problem(event.start_mark, "tags (!) are not used here; quote the text")
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > _MAX_DEPTH:
            raise _problem(event.start_mark, "nested too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


SCALARS: tuple[tuple[str, re.Pattern[str], list[str]], ...] = tuple(
    (tag, re.compile(rf"^(?:{pattern})$"), list(first))
    for tag, pattern, first in (
        (_BOOL, r"true|True|TRUE|false|False|FALSE", "tTfF"),
        (_NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        (_INT, r"[-+]?[0-9]+", "-+0123456789"),
        (_FLOAT, r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    )
)
"""What is not text: tag, pattern, first characters."""
for _tag, _pattern, _first in SCALARS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)


def _problem(mark: Any, text: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=mark)


def text(path: Path) -> str:
    """The text of a small UTF-8 file. Raises UserError."""
    try:
        if not path.is_file():
            raise UserError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path}: larger than 1 MB, which no job, space or profile is")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a UTF-8 text file (byte {error.start})") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def parse(source: str, where: str) -> tuple[dict[str, Any], dict[Place, int]]:
    """The mapping that a YAML text holds, and the line of every key and list item. Raises UserError with the line."""
    lines: dict[Place, int] = {}
    try:
        loader = _Loader(source)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        if node is None:
            raise UserError(f"{where}: empty")
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{where}: must be keys with values, one `key: value` a line")
        return _value(node, (), lines), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = "more than one document (---)" if "single document" in str(error.context) else error.problem
        raise UserError(f"{where}{line}: {problem or error.context}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error


def _value(node: yaml.Node, place: Place, lines: dict[Place, int]) -> Any:
    lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        made: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = _key(key_node)
            if key in made:
                raise _problem(key_node.start_mark, f"key {key!r} occurs twice (first in line {lines[(*place, key)]})")
            lines[(*place, key)] = key_node.start_mark.line + 1
            made[key] = _value(value_node, (*place, key), lines)
        return made
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*place, index), lines) for index, item in enumerate(node.value)]
    return _scalar(node)


def _key(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise _problem(node.start_mark, "a key must be text (quote what begins with { or [)")
    if node.value == "<<":
        raise _problem(node.start_mark, "merge keys (<<) are not used here; repeat the lines")
    if node.tag in (_INT, _FLOAT, _BOOL, _NULL):
        raise _problem(node.start_mark, f"a key must be text: write '{node.value}' with quotes")
    return str(_scalar(node))


def _scalar(node: yaml.Node) -> Any:
    value = str(node.value)
    if node.tag == _NULL:
        return None
    if node.tag == _BOOL:
        return value.lower() == "true"
    if node.tag in (_INT, _FLOAT):
        if len(value) > 40:
            raise _problem(node.start_mark, "a number of more than 40 characters")
        number = int(value) if node.tag == _INT else float(value)
        if abs(number) > 1e300:
            raise _problem(node.start_mark, f"{value} is out of range")
        return number
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise _problem(node.start_mark, "text with a character that no file name or label can hold")
    return value


def record(path: Path, kind: type[R]) -> R:
    """Read one record from a file. Raises UserError with one line per problem: file, line, key, what is wrong."""
    data, lines = parse(text(path), str(path))
    return check(data, kind, str(path), lines)


def check(data: dict[str, Any], kind: type[R], where: str, lines: dict[Place, int] | None = None) -> R:
    """Plain data (as JSON would hold it) -> record, types taken strictly. Raises UserError, one line per problem."""
    try:
        # Through JSON, because only there strict validation takes lists for tuples.
        return kind.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise _refused(error, kind, where, lines or {}) from error


def fill(data: object, kind: type[R], where: str) -> R:
    """Python objects (records, mappings, numbers that convert without loss) -> record. Raises as `check` does."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _refused(error, kind, where, {}) from error


def _refused(error: ValidationError, kind: type[Record], where: str, lines: dict[Place, int]) -> UserError:
    found = error.errors()
    told = [one for one in found if one["type"] != "too_short" or not one["input"]] or found  # items failed instead
    return UserError("\n".join(dict.fromkeys(_lines(told, kind, where, lines))))


def _lines(errors: list[ErrorDetails], kind: type[Record], where: str, lines: dict[Place, int]) -> Iterator[str]:
    for error in errors:
        place, known, union = _walk(kind, error["loc"])
        line = next((lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in lines), None)
        path = dotted(place)
        what = f"must be true, false, a number or text, not {_short(error['input'])}" if union else _what(error, known)
        yield f"{where}{f':{line}' if line else ''}: {f'{path}: ' if path else ''}{what}"


def _walk(kind: type[Record], loc: Place) -> tuple[Place, list[str], bool]:
    """The place without pydantic's names of union branches, the keys known there, and whether a union was missed."""
    place: list[str | int] = []
    known: list[str] = []
    current: Any = kind
    for part in loc:
        if isinstance(current, type) and issubclass(current, BaseModel):
            known = list(current.model_fields)
            current = current.model_fields[str(part)].annotation if part in known else None
        elif _is_union(current):  # `part` is the name of the branch that pydantic tried
            return tuple(place), known, True
        else:
            known = []
            inner = [one for one in get_args(current) if one is not ...]
            current = inner[-1] if inner else None
        place.append(part)
        if _is_union(current) and len(inner := [one for one in get_args(current) if one is not type(None)]) == 1:
            current = inner[0]
    return tuple(place), known, False


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, UnionType)


def _short(given: Any) -> str:
    shown = json.dumps(given, ensure_ascii=False, default=repr)
    return shown if len(shown) < 60 else f"{shown[:57]}..."


def _what(error: ErrorDetails, known: list[str]) -> str:
    kind = error["type"]
    if kind == "extra_forbidden":
        return f"unknown key; {suggest(str(error['loc'][-1]), known)}"
    if kind == "missing":
        return "missing"
    if kind == "value_error":
        return str(error["msg"]).removeprefix("Value error, ")
    plain = {
        "string_type": "must be text (put it in quotes)",
        "int_type": "must be a whole number",
        "float_type": "must be a number",
        "bool_type": "must be true or false",
        "tuple_type": "must be a list",
        "dict_type": "must be a mapping of keys",
        "model_type": "must be a mapping of keys",
        "model_attributes_type": "must be a mapping of keys",
        "too_short": "must not be empty",
    }.get(kind)
    return f"{plain or str(error['msg']).replace('Input should', 'must')}, not {_short(error['input'])}"


def dotted(place: Place) -> str:
    """`devices[0].latency_ms`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
