"""The journal: one append-only file of events with one writer (floor F1). It is the state of a search.

Every line is one JSON object with at least `number` (the trial it speaks of, 0 for the run itself) and `state`; the
first is the header. An event is one unbuffered write, so a killed process loses nothing that was written; fsync
happens at most once a second and at the end, so a power cut costs at most that second.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple, cast

from autocompress.types import UserError

FORMAT = 1
HEADER = "header"
SYNC_SECONDS = 1.0  # an fsync costs about 3.5 ms

Event = dict[str, Any]


class Contents(NamedTuple):
    """What a journal file says: its complete lines, and how many bytes at its end belong to no complete line."""

    events: list[Event]  # the header is the first
    torn: int
    mend: bool  # the last line is whole and lacks only its newline


def read(path: Path) -> Contents:
    """Read without the lock and without changing anything (reports, tests).

    Raises UserError for a file that is missing, is no journal, or is damaged before its last line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the journal ({error.strerror}); give the folder of a run") from error
    return parse(data, path)


def parse(data: bytes, path: Path) -> Contents:
    """Lines of a journal. Only the last may be incomplete: that is what a write cut short looks like."""
    *lines, tail = data.split(b"\n")
    events = [_event(line, at, path) for at, line in enumerate(lines, start=1)]
    mend = False
    if tail:
        try:
            events.append(_event(tail, len(lines) + 1, path))
            mend = True
        except UserError:
            pass  # torn: the writer never saw this write succeed, so nothing was acted upon
    if events:
        _check_header(events[0], path)
    return Contents(events, 0 if mend else len(tail), mend)


def _event(line: bytes, at: int, path: Path) -> Event:
    try:
        event: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}, line {at}: not a line of a journal ({_short(error)}); restore the file from a copy, or cut it "
            f"before this line (`head -n {at - 1}`) to resume from there"
        ) from error
    found = cast("Event", event) if isinstance(event, dict) else {}
    number = found.get("number")
    if type(number) is not int or number < 0 or not isinstance(found.get("state"), str):
        raise UserError(
            f"{path}, line {at}: a journal's line is an object with `number` and `state`; restore the file from a "
            f"copy, or cut it before this line (`head -n {at - 1}`) to resume from there"
        )
    return found


def _check_header(event: Event, path: Path) -> None:
    if event["number"] != 0 or event["state"] != HEADER:
        raise UserError(f"{path}, line 1: not the header of a journal; give the folder of a run")
    if event.get("format") != FORMAT:
        raise UserError(
            f"{path}, line 1: journal format {event.get('format')!r}, this version reads format {FORMAT}; "
            "use the version of autocompress that wrote it"
        )


def _short(error: BaseException) -> str:
    return str(error).splitlines()[0][:80] if str(error) else type(error).__name__


class Journal:
    """The only writer of a journal file, by an exclusive lock that ends with the process."""

    def __init__(self, path: Path, descriptor: int, events: list[Event], size: int, notes: tuple[str, ...]) -> None:
        """Use `create` or `open`."""
        self.path = path
        self.notes = notes  # what was mended on opening, for the user
        self._descriptor = descriptor
        self._events = events
        self._size = size
        self._synced = time.monotonic()
        self._dirty = False

    @classmethod
    def create(cls, path: Path, header: Event) -> Journal:
        """Begin a new journal; `number`, `state` and `format` are added to the header.

        Raises UserError if the file already holds a run, is being written, or cannot be written.
        """
        descriptor = _lock(path, create=True)
        try:
            data = _read_all(descriptor)
            if data and _began(data, path):
                raise UserError(f"{path} holds another run: resume it, or choose another `out`")
            os.ftruncate(descriptor, 0)
            journal = cls(path, descriptor, [], 0, ())
            journal.append({"number": 0, "state": HEADER, "format": FORMAT, **header})
            journal.sync()
            _sync_folder(path.parent)
        except BaseException:
            os.close(descriptor)
            raise
        return journal

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Continue a journal. A torn last line is cut off and said so in `notes`.

        Raises UserError if there is none, it is damaged before its last line, or another process is writing it.
        """
        descriptor = _lock(path, create=False)
        try:
            data = _read_all(descriptor)
            contents = parse(data, path)
            if not contents.events:
                raise UserError(f"{path} holds no complete header, so its run never began: start it again")
            notes: tuple[str, ...] = ()
            size = len(data) - contents.torn
            if contents.torn:
                os.ftruncate(descriptor, size)
                notes = (f"{path}: the last line was cut short ({contents.torn} bytes) and has been removed",)
            journal = cls(path, descriptor, contents.events, size, notes)
            if contents.mend:
                journal._write(b"\n")
            journal.sync()
        except BaseException:
            os.close(descriptor)
            raise
        return journal

    @property
    def header(self) -> Event:
        """The first event."""
        return self._events[0]

    def events(self) -> list[Event]:
        """All events in order, the header first."""
        return list(self._events)

    def append(self, event: Event) -> None:
        """Write one event in one write.

        Raises ValueError for an event that is no JSON (a NaN, say), UserError on a full disk; nothing is half written.
        """
        line = json.dumps(event, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"
        if not isinstance(event.get("number"), int) or not isinstance(event.get("state"), str):
            raise ValueError("an event needs `number` and `state`")
        self._write(line)
        self._events.append(event)
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Force what was written onto the disk."""
        if self._dirty:
            os.fsync(self._descriptor)
            self._dirty = False
        self._synced = time.monotonic()

    def close(self) -> None:
        """Sync and give up the lock. Closing twice does nothing."""
        if self._descriptor >= 0:
            self.sync()
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, line: bytes) -> None:
        if self._descriptor < 0:
            raise ValueError("the journal is closed")
        self._dirty = True
        try:
            written = os.write(self._descriptor, line)
            if written < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(self._descriptor, self._size)
            raise UserError(
                f"{self.path}: cannot write ({error.strerror}); free some space and resume, nothing was lost"
            ) from error
        self._size += len(line)


def _lock(path: Path, *, create: bool) -> int:
    flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    try:
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, flags, 0o644)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no journal; give the folder of a run") from error
    except OSError as error:
        raise UserError(f"{path}: cannot write there ({error.strerror}); choose another `out`") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"{path} is being written by another process: wait for it or stop it") from error
    except OSError as error:
        os.close(descriptor)
        raise UserError(f"{path}: this file system has no locks ({error.strerror}); choose another `out`") from error
    return descriptor


def began(path: Path) -> bool:
    """Whether a run stands there: not where there is no file, or one whose writer died inside its first write."""
    try:
        return _began(path.read_bytes(), path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"{path}: cannot read the journal ({error.strerror})") from error


def _began(data: bytes, path: Path) -> bool:
    """False only for what a writer leaves that died inside its first write: no complete header."""
    try:
        return bool(parse(data, path).events) or not data.startswith(b'{"number":0,"state":"header"'[: len(data)])
    except UserError:
        return True


def _read_all(descriptor: int) -> bytes:
    parts: list[bytes] = []
    os.lseek(descriptor, 0, os.SEEK_SET)
    while part := os.read(descriptor, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
