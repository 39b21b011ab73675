"""The two shelves of YAML files that come with the package: search spaces and hardware profiles.

A user's own profiles lie on shelves of theirs, which come first: `hardware_profiles/` beside the job, the same in the
current folder, then `~/.config/autocompress/profiles` (`XDG_CONFIG_HOME` is honoured), where `device add` writes.
"""

from __future__ import annotations

import os
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
    """Names on a shelf of the package, which are the stems of its files."""
    return tuple(sorted(path.stem for path in folder(shelf).glob("*.yaml")))


def own_profiles() -> Path:
    """Where this user's devices lie, for every job in any folder; it need not exist."""
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "autocompress" / "profiles"


def files(shelf: str, near: Path | None = None) -> dict[str, Path]:
    """Name -> file, of everything that can be named: the first of a name counts, the user's before the package's."""
    places = [folder(shelf)]
    if shelf == PROFILES:
        beside = [near / shelf] if near else []
        places = [*beside, Path(shelf), own_profiles(), *places]
    found: dict[str, Path] = {}
    for place in places:
        for path in sorted(place.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def ours(shelf: str, path: Path) -> bool:
    """Whether a file comes with the package: such a one goes by its name wherever it is spoken of."""
    return path.resolve().parent == folder(shelf)


def find(shelf: str, name_or_path: str, near: Path | None = None) -> Path:
    """The file of a name on the shelves, or of a path (anything with a slash or ending in .yaml).

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
    known = files(shelf, near)
    if name_or_path not in known:
        raise UserError(f"unknown {what} {name_or_path!r}; {suggest(name_or_path, known)} (or a path ending in .yaml)")
    return known[name_or_path]


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
