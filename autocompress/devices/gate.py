"""Who may compute on this host now: one measurement at a time, and quiet phases in which trainers pause.

Everything is `flock` on files of a host-local folder, so the kernel lets go for a process that was killed.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from autocompress.store import cache_dir, make_folder

Say = Callable[[str], None]
LOG = logging.getLogger(__name__)
POLL_S = 0.002
SAY_AFTER_S = 1.0


def host_folder() -> Path:
    """Where this host's locks lie; a home that several hosts share has a folder for each."""
    folder = cache_dir() / "hosts" / platform.node()
    return make_folder(folder, "set AUTOCOMPRESS_CACHE to a folder that can be written")


class Gate:
    """Many workers or one measurement. One object per process and thread; not for handing to another process.

    Two locks. Workers hold the gate (shared) while they compute. A measurement first takes the turnstile
    (exclusive), which every worker passes on its way in and touches at each step, then the gate (exclusive): from
    then on no worker comes in, and those inside leave at their next step, so it cannot be starved.
    """

    def __init__(self, folder: Path | None = None, *, say: Say = LOG.warning) -> None:
        where = folder or host_folder()
        self._turnstile, self._gate = _open(where / "turnstile"), _open(where / "gate")
        self._say = say
        self._depth = 0
        _ALIVE.add(self)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Hold the gate while computing; waits while somebody measures. May be nested."""
        if self._depth == 0:
            self._enter()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                fcntl.flock(self._gate, fcntl.LOCK_UN)

    def step(self) -> None:
        """At a step boundary: let a waiting measurement in, and go on when it is over. Two system calls otherwise."""
        if self._depth == 0:
            return
        try:
            fcntl.flock(self._turnstile, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(self._gate, fcntl.LOCK_UN)
            self._enter()
        else:
            fcntl.flock(self._turnstile, fcntl.LOCK_UN)

    @contextmanager
    def quiet(self, timeout: float | None = None) -> Iterator[None]:
        """Nobody works inside this block. Raises TimeoutError if a worker does not reach a step boundary in time.

        Asked for while this object itself works, it counts as a step boundary: its own hold is given up meanwhile.
        """
        with self._left():
            _take(self._turnstile, timeout, lambda: self._say("waiting for another measurement on this host to end"))
            _take(self._gate, timeout, lambda: self._say("waiting for trainers to reach a step boundary"))
            yield

    @contextmanager
    def hushed(self, patience: float) -> Iterator[bool]:
        """No worker passes a step boundary inside this block; the rest go on. Says whether all of them stand still.

        They are waited for so many seconds at most.
        """
        with self._left():
            try:
                _take(self._turnstile, patience)
                _take(self._gate, patience)
            except TimeoutError:
                yield False
            else:
                yield True

    @contextmanager
    def _left(self) -> Iterator[None]:
        """Out of the gate while the block lasts, and out of both locks after it."""
        if self._depth:
            fcntl.flock(self._gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(self._gate, fcntl.LOCK_UN)
            fcntl.flock(self._turnstile, fcntl.LOCK_UN)
            if self._depth:
                self._enter()
            else:
                time.sleep(POLL_S)  # the workers that wait are woken before this process asks again

    def close(self) -> None:
        """Let go of everything; the object is of no further use."""
        for descriptor in (self._turnstile, self._gate):
            if descriptor >= 0:
                os.close(descriptor)
        self._turnstile = self._gate = -1
        self._depth = 0

    def _enter(self) -> None:
        fcntl.flock(self._turnstile, fcntl.LOCK_SH)
        fcntl.flock(self._gate, fcntl.LOCK_SH)
        fcntl.flock(self._turnstile, fcntl.LOCK_UN)

    def __del__(self) -> None:
        if getattr(self, "_turnstile", -1) >= 0:
            self.close()


class HostLock:
    """One measurement at a time on this host, whichever search or profile asks. May be used by several threads."""

    def __init__(self, folder: Path | None = None, *, say: Say = LOG.warning) -> None:
        self.path = (folder or host_folder()) / "measuring"
        self._say = say

    @contextmanager
    def held(self, what: str, timeout: float | None = None) -> Iterator[None]:
        """Hold the lock; says whom it waits for after a second. Raises TimeoutError after `timeout` seconds."""
        descriptor = _open(self.path)
        try:
            _take(descriptor, timeout, lambda: self._say(f"waiting for {self.holder()}"))
            started = psutil.Process().create_time()
            note = {"pid": os.getpid(), "started": started, "what": what, "since": time.time()}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(note).encode(), 0)
            yield
            os.ftruncate(descriptor, 0)
        finally:
            os.close(descriptor)

    def holder(self) -> str:
        """Who measures, in words. A note whose process is gone, or whose number was given anew, is passed over."""
        try:
            note = json.loads(self.path.read_text())
            process = psutil.Process(note["pid"])
            if abs(process.create_time() - note["started"]) < 1:
                elapsed = max(time.time() - note["since"], 0.0)  # the date may have been set meanwhile
                return f"pid {note['pid']}, which has been measuring {note['what']} for {elapsed:.0f} s"
        except (OSError, ValueError, KeyError, TypeError, psutil.Error):
            pass  # being written, or left by a process that was killed
        return "another process that measures on this host"


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _take(descriptor: int, timeout: float | None, say: Callable[[], None] | None = None) -> None:
    """An exclusive lock, by asking again and again: that can be interrupted, limited, and told to the user."""
    began, told = time.monotonic(), False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = time.monotonic() - began
            if timeout is not None and waited > timeout:
                raise TimeoutError(f"still waiting after {waited:.0f} s") from None
            if say is not None and waited > SAY_AFTER_S and not told:
                say()
                told = True
            time.sleep(POLL_S)
        else:
            return


_ALIVE: weakref.WeakSet[Gate] = weakref.WeakSet()


def _forget() -> None:
    """A forked child shares its parent's locks: without this it would keep them when the parent is killed."""
    for gate in list(_ALIVE):
        gate.close()


os.register_at_fork(after_in_child=_forget)
