"""This host as a device: times files in a child process that may crash or hang without harm to the search."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from autocompress.devices import Samples
from autocompress.devices.fingerprint import check_expects, host
from autocompress.types import Profile, TrialFailure, UserError

BENCH = Path(__file__).with_name("bench.py")


SLOW_DISK = 1e8  # bytes per second


class Unloadable(TrialFailure):
    """The runtime refuses the file: the same file will be refused again, so the verdict may be kept."""


class LocalDevice:
    """onnxruntime on this host. The child is started on first use and again after a crash or a kill.

    `patience` is how many seconds an answer may take beyond the seconds of timing that were asked for (loading,
    warm-up, one slow run). Raises UserError if the processor is not what the profile expects.
    """

    def __init__(self, profile: Profile, *, patience: float = 60.0) -> None:
        self.profile = profile
        self.patience = patience
        self._host = host()
        check_expects(profile, self._host)
        self._child: Child | None = None

    def fingerprint(self) -> dict[str, Any]:
        """Host facts and the runtime's version."""
        child = self._child or self._start()
        return {**self._host, "onnxruntime": child.hello["onnxruntime"], "provider": self.profile.provider}

    def time(self, models: Sequence[Path], *, rounds: int, seconds: float, cores: Sequence[int] = ()) -> Samples:
        """See `Device.time`. At least one round is taken, however few the seconds.

        Raises Unloadable for a file that the runtime refuses, TrialFailure for a crash or no answer in time.
        """
        child = self._child
        if child is None:
            child = self._start()
        names = [str(model) for model in models]
        try:
            answer = child.ask(
                {"models": names, "rounds": rounds, "seconds": seconds, "cores": list(cores)},
                seconds + self.patience + sum(map(_size, models)) / SLOW_DISK,
            )
        except BaseException:  # a late answer, after Ctrl-C too, must not be taken for the next one's
            self.close()
            raise
        if "error" in answer:
            verdict = "cannot be loaded" if answer["error"] == "load" else "cannot be run"
            kind = Unloadable if answer["error"] == "load" else TrialFailure
            raise kind(f"{Path(answer['model']).name} {verdict} by onnxruntime: {answer['reason']}")
        return Samples.model_validate(answer)

    def close(self) -> None:
        """End the child; the device may be used again."""
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def _start(self) -> Child:
        child = self._child = Child(self.profile, self.patience)
        if self.profile.provider not in child.hello["providers"]:
            self.close()
            raise UserError(
                f"profile {self.profile.name!r} wants {self.profile.provider}, but the onnxruntime installed here "
                f"offers {', '.join(child.hello['providers'])}"
            )
        return child


def _size(model: Path) -> int:
    """Bytes of a file and of the weights beside it, 0 for what is not there: loading says so."""
    paths = (model, model.with_name(f"{model.name}.data"))
    return sum(path.stat().st_size for path in paths if path.is_file())


class Child:
    """One running bench.py. Raises TrialFailure from any call once the process is gone."""

    def __init__(self, profile: Profile, patience: float) -> None:
        self._rest = b""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # a pipe that nobody reads would fill up
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(BENCH)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
        )
        setup = {
            "threads": profile.threads,
            "provider": profile.provider,
            "options": profile.provider_options,
            "batch": profile.batch,
        }
        try:
            self.hello = self.ask(setup, patience)
        except BaseException:
            self.end()
            raise

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def ask(self, request: dict[str, Any], limit: float) -> dict[str, Any]:
        """One line out, one line in; TrialFailure after `limit` seconds or when the process ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise TrialFailure(self._obituary()) from error
        until = time.monotonic() + limit
        pieces = [self._rest]
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in pieces[-1]:
                if not selector.select(max(0.0, until - time.monotonic())):
                    raise TrialFailure(f"no answer from the timing process within {limit:.0f} s; it was ended")
                piece = os.read(self._process.stdout.fileno(), 1 << 20)
                if not piece:
                    raise TrialFailure(self._obituary())
                pieces.append(piece)
        line, _, self._rest = b"".join(pieces).partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """Kill and bury; it has nothing to save."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # a request that it did not live to read
                    pipe.close()
        self._log.close()

    def _obituary(self) -> str:
        """Why it died, with the last line it wrote."""
        code = self._process.wait()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self._log.seek(0)
        words = self._log.read().decode(errors="replace").strip().splitlines()
        return f"the timing process ended ({how}){': ' + words[-1][:300] if words else ''}"
