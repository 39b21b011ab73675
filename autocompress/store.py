"""Content-addressed files, and where this user's cache lies."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Collection
from pathlib import Path

from autocompress.types import UserError


def cache_dir() -> Path:
    """`AUTOCOMPRESS_CACHE`, else `~/.cache/autocompress`; created if need be. Raises UserError if it cannot be."""
    named = os.environ.get("AUTOCOMPRESS_CACHE")
    folder = Path(named) if named else Path.home() / ".cache" / "autocompress"
    return make_folder(folder, "set AUTOCOMPRESS_CACHE to a folder that can be written")


def make_folder(folder: Path, advice: str) -> Path:
    """Create a folder with its parents; raises UserError with `advice` if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {folder}: {error.strerror}; {advice}") from error
    return folder


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write a whole file or nothing: a reader, and a run after a kill, never sees half of it.

    Raises UserError for a full disk, an exceeded quota or a folder that cannot be written.
    """
    part: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a name must not outlive a power cut that its content does not
            os.fchmod(file.fileno(), 0o644)  # mkstemp gives 0600, but what we write is to be read by others
        Path(part).replace(path)
    except OSError as error:
        if part is not None:
            Path(part).unlink(missing_ok=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "the disk is full; make room and resume" if full else "choose a folder that can be written"
        raise UserError(f"cannot write {path}: {error.strerror or error}; {advice}") from error


class Store:
    """Files under `root`, each named by the sha256 of its content: written once, never changed."""

    def __init__(self, root: Path) -> None:
        self.root = make_folder(root, "choose a folder that can be written")

    def path(self, sha: str) -> Path:
        """Where the file of this sha256 lies (whether it does or not). Raises ValueError for anything but a sha256."""
        if len(sha) != 64 or not set(sha) <= set("0123456789abcdef"):
            raise ValueError(f"not a sha256 in lower-case hexadecimal: {sha!r}")
        return self.root / sha[:2] / sha

    def has(self, sha: str) -> bool:
        """Whether `put` has stored this content."""
        return self.path(sha).is_file()

    def put(self, data: bytes) -> str:
        """Store bytes and return their sha256. Raises UserError for a full disk."""
        sha = hashlib.sha256(data).hexdigest()
        path = self.path(sha)
        if not path.is_file() or path.stat().st_size != len(data):  # or cut off, by a power cut
            write_atomic(path, data)
        return sha

    def get(self, sha: str) -> bytes:
        """The bytes of a sha256. Raises UserError if they are missing or no longer what they were."""
        path = self.path(sha)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing; the run's `work` folder was changed, start the run anew") from error
        if hashlib.sha256(data).hexdigest() != sha:
            raise UserError(f"{path} is damaged (its content is not its name); delete it and start the run anew")
        return data

    def keep_only(self, shas: Collection[str]) -> None:
        """Delete every file but these; used by the one process that owns the folder."""
        for path in self.root.glob("??/*"):
            if path.name not in shas:
                path.unlink(missing_ok=True)
