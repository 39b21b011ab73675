"""The two shelves of YAML files that come with the package: search spaces and hardware profiles."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from autocompress.types import UserError

SPACES = "search_spaces"
PROFILES = "hardware_profiles"
_PACKAGE = Path(__file__).resolve().parent


@cache
def folder(shelf: str) -> Path:
    """Where a shelf lies: beside the package in a checkout (editable install), inside it in a wheel."""
    checkout = _PACKAGE.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / shelf).is_dir():
        return checkout / shelf
    return _PACKAGE / "_shelves" / shelf


def names(shelf: str) -> tuple[str, ...]:
    """Names on a shelf, which are the stems of its files."""
    return tuple(sorted(path.stem for path in folder(shelf).glob("*.yaml")))


def find(shelf: str, name_or_path: str, near: Path | None = None) -> Path:
    """The file of a name on the shelf, or of a path (anything with a slash or ending in .yaml).

    A relative path is looked for beside the file that mentions it (`near` is that file's folder), else from the
    current folder. Raises UserError for what is not there.
    """
    what = shelf.replace("_", " ").removesuffix("s")
    if not is_name(name_or_path):
        try:
            path = (near or Path()) / Path(name_or_path).expanduser()
            there = path.is_file()
        except (OSError, RuntimeError) as error:  # a name too long; `~` of nobody
            raise UserError(f"{what} {name_or_path[:60]!r}: {error}") from error
        if not there:
            raise UserError(f"{what} {name_or_path!r}: there is no file {path}")
        return path
    known = names(shelf)
    if name_or_path not in known:
        raise UserError(f"unknown {what} {name_or_path!r}; {suggest(name_or_path, known)} (or a path ending in .yaml)")
    return folder(shelf) / f"{name_or_path}.yaml"


def is_name(name_or_path: str) -> bool:
    """True for a name on the shelf, False for a path."""
    return "/" not in name_or_path and not name_or_path.endswith((".yaml", ".yml"))


def suggest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` where something is near, else what there is."""
    known = list(known)
    near = get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(repr(one) for one in near) + "?"
    more = f" and {len(known) - 12} more" if len(known) > 12 else ""
    return f"known: {', '.join(known[:12]) or 'none'}{more}"
