"""This host as a device: times files in a child process that may crash or hang without harm to the search."""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.devices import Kernels, Samples
from autocompress.devices.fingerprint import check_expects, host
from autocompress.devices.packed import packed, portions, unpacked
from autocompress.types import Profile, TrialFailure, UserError

BENCH = Path(__file__).with_name("bench.py")
BESIDE = Path(__file__).with_name("kernels.py")  # which it loads where kernels are asked for
SLOW_DISK = 1e8  # bytes per second
WAIT_S = 600.0  # for other measurements on the host to end
SILENT_S = 60.0  # between two lines that say that another measurement is waited for
LOG = logging.getLogger(__name__)


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
        names = [str(model) for model in models]
        request = {"models": names, "rounds": rounds, "seconds": seconds, "cores": list(cores)}
        answer = self._ask(request, seconds + self.patience, models)
        return Samples.model_validate(answer)

    def memory(self, models: Sequence[Path]) -> dict[str, float]:
        """See `TellsMemory.memory`."""
        return self._ask({"memory": [str(model) for model in models]}, self.patience, models)["memory_mb"]

    def room(self) -> float | None:
        """See `TellsRoom.room`."""
        return (self._child or self._start()).hello.get("free_mb")

    def kernels(self, model: Path, wanted: Sequence[str], *, seconds: float, cores: Sequence[int] = ()) -> Kernels:
        """See `TellsKernels.kernels`."""
        request = {"kernels": [str(model)], "wanted": list(wanted), "seconds": seconds, "cores": list(cores)}
        return Kernels.model_validate(self._ask(request, seconds + self.patience, [model]))

    def answers(self, model: Path, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """See `TellsAnswers.answers`."""
        found: list[list[NDArray[Any]]] = []
        for part in portions(inputs):
            request = {"answers": [str(model)], "inputs": list(map(packed, part))}
            found.append(list(map(unpacked, self._ask(request, self.patience, [model])["outputs"])))
        return [np.concatenate(one) for one in zip(*found, strict=True)]

    def _ask(self, request: dict[str, Any], limit: float, models: Sequence[Path]) -> dict[str, Any]:
        child = self._child or self._start()
        try:
            answer = child.ask(request, limit + sum(map(_size, models)) / SLOW_DISK)
        except BaseException:  # a late answer, after Ctrl-C too, must not be taken for the next one's
            self.close()
            raise
        if "error" in answer:
            raise refusal(answer, Path(answer["model"]).name)
        return answer

    def close(self) -> None:
        """End the child; the device may be used again."""
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def _start(self) -> Child:
        child = self._child = Child([sys.executable, "-I", str(BENCH)], setup(self.profile), self.patience)
        if self.profile.provider not in child.hello["providers"]:
            self.close()
            raise UserError(
                f"profile {self.profile.name!r} wants {self.profile.provider}, but the onnxruntime installed here "
                f"offers {', '.join(child.hello['providers'])}"
            )
        return child


def setup(profile: Profile, **more: Any) -> dict[str, Any]:
    """The first line that bench.py reads."""
    return {
        "threads": profile.threads,
        "provider": profile.provider,
        "options": profile.provider_options,
        "batch": profile.batch,
        **more,
    }


def refusal(answer: dict[str, Any], name: str, where: str = "") -> TrialFailure:
    """What an answer with an error means: Unloadable where the same file will be refused again."""
    verdicts = {
        "load": "cannot be loaded",
        "memory": "cannot be loaded and run by a process of its own",
        "kernels": "cannot be timed kernel by kernel",
    }
    verdict, kind = verdicts.get(answer["error"], "cannot be run"), answer["error"]
    if kind == "short":  # there may be more another time
        return TrialFailure(f"{name} needs more memory than is free{where}: {answer['reason']}")
    if kind == "host":
        return TrialFailure(f"the lock of measurements{where} cannot be had: {answer['reason']}")
    failure = Unloadable if kind in ("load", "kernels") else TrialFailure
    return failure(f"{name} {verdict} by onnxruntime{where}: {answer['reason']}")


def _size(model: Path) -> int:
    """Bytes of a file and of the weights beside it, 0 for what is not there: loading says so."""
    paths = (model, model.with_name(f"{model.name}.data"))
    return sum(path.stat().st_size for path in paths if path.is_file())


_TOLD: dict[str, float] = {}  # target -> when it was last said that another measurement is waited for there


class Child:
    """One running bench.py. Raises TrialFailure from any call once the process is gone.

    `command` starts it, here or elsewhere. `explain` makes of its end (exit code, negative for a signal, and the last
    of what it wrote on stderr) what is raised; without it the end is the process's own. `where` completes sentences.
    """

    def __init__(
        self,
        command: Sequence[str],
        first: dict[str, Any],
        patience: float,
        *,
        explain: Callable[[int, str], Exception | None] | None = None,
        where: str = "",
    ) -> None:
        self._rest = b""
        self._explain, self._where = explain, where
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # a pipe that nobody reads would fill up
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, start_new_session=bool(explain)
        )
        try:
            self.hello = self.ask(first, patience)
        except BaseException:
            self.end()
            raise

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def ask(self, request: dict[str, Any], limit: float) -> dict[str, Any]:
        """One line out, one line in; TrialFailure after `limit` seconds or when the process ends.

        Time for which it says that it waits for another measurement does not count, up to WAIT_S.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._obituary() from error
        began = time.monotonic()
        until = began + limit
        while True:
            answer = self._line(until)
            if "waiting" not in answer:
                return answer
            if time.monotonic() - _TOLD.get(self._where, -SILENT_S) > SILENT_S:
                LOG.warning("waiting for another measurement%s to end (%s)", self._where, answer["waiting"])
                _TOLD[self._where] = time.monotonic()
            if time.monotonic() - began > WAIT_S:
                raise TrialFailure(
                    f"could not measure{self._where}: another measurement still runs after {WAIT_S:.0f} s"
                )
            until = time.monotonic() + limit

    def _line(self, until: float) -> dict[str, Any]:
        """The next answer. What a login shell prints before the first is passed over."""
        assert self._process.stdout is not None
        began = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while True:
                pieces = [self._rest]
                while b"\n" not in pieces[-1]:
                    if not selector.select(max(0.0, until - time.monotonic())):
                        raise TrialFailure(
                            f"no answer from the timing process{self._where} within {until - began:.0f} s; it was ended"
                        )
                    piece = os.read(self._process.stdout.fileno(), 1 << 20)
                    if not piece:
                        raise self._obituary()
                    pieces.append(piece)
                line, _, self._rest = b"".join(pieces).partition(b"\n")
                if line.startswith(b"{"):
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

    def _obituary(self) -> Exception:
        """Why it died, with the last line it wrote."""
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._log.seek(0)
        words = self._log.read().decode(errors="replace").strip()
        if self._explain and (found := self._explain(code, words)):
            return found
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        last = f": {words.splitlines()[-1][:300]}" if words else ""
        return TrialFailure(f"the timing process{self._where} ended ({how}){last}")
