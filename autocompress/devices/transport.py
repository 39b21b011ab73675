"""A target that is not this host, over any connection: what is copied there, what runs there, what its end means."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from autocompress.devices import Kernels, Samples, Unreachable, there
from autocompress.devices.fingerprint import check_expects
from autocompress.devices.local import BENCH, BESIDE, Child, refusal, setup
from autocompress.devices.packed import packed, portions, unpacked
from autocompress.types import Profile, TrialFailure, UserError

SCRIPT = Path(there.__file__).read_bytes()
NEEDS = ("numpy", "onnxruntime")
KEEP_BYTES = 1 << 30  # of models on a target
IDLE_S = 3600.0  # the timing process ends by itself when nobody has asked for that long
PROBE_S = 60.0
SLOW_LINK = 2e5  # bytes per second
SLOW_DISK = 2e7


class Transport(Protocol):
    """A connection that runs commands elsewhere with their stdin and stdout connected."""

    name: str  # of the target, for sentences

    def command(self, argv: Sequence[str]) -> list[str]:
        """What to run here so that `argv` runs there, in the user's home folder, with its exit code (128 + signal).

        Connects if need be. Raises Unreachable, or UserError where waiting does not help.
        """
        ...

    def explain(self, code: int, words: str) -> Exception | None:
        """What the end of such a command means, if it was the connection's."""
        ...

    def close(self) -> None:
        """Let go of the connection; `command` makes a new one."""
        ...


class RemoteDevice:
    """onnxruntime on a target: bench.py runs there, files are copied by content, cores are chosen there.

    Nothing is done before the first question. The target needs Python 3.9 with numpy and onnxruntime, nothing else.
    `patience` is how many seconds an answer may take beyond the seconds of timing. What cannot be mended by waiting is
    a UserError until the target has answered once; after that it is Unreachable, and a search goes on without it.
    """

    def __init__(self, profile: Profile, transport: Transport, *, patience: float = 120.0) -> None:
        self.profile = profile
        self.patience = patience
        self._link = transport
        self._probed: dict[str, Any] | None = None
        self._child: Child | None = None
        self._answered = False
        self._copied: dict[tuple[str, int, int], tuple[str, dict[str, str]]] = {}

    @property
    def where(self) -> str:
        """` on pi`, to complete a sentence."""
        return f" on {self._link.name}"

    def fingerprint(self) -> dict[str, Any]:
        """Facts of the target, its runtime's version and the provider."""
        child = self._ready()
        return {
            **self._facts()["facts"],
            "onnxruntime": child.hello["onnxruntime"],
            "provider": self.profile.provider,
        }

    def time(self, models: Sequence[Path], *, rounds: int, seconds: float, cores: Sequence[int] = ()) -> Samples:
        """See `Device.time`; `cores` are the target's, all of them if none are named or it cannot keep to some."""
        request = {"rounds": rounds, "seconds": seconds, "cores": list(cores)}
        answer, names = self._ask("models", models, request, seconds + self.patience)
        for key in ("times_ms", "load_ms", "energy_mj", "fed"):
            if key in answer:
                answer[key] = {names[path]: found for path, found in answer[key].items()}
        return Samples.model_validate(answer)

    def memory(self, models: Sequence[Path]) -> dict[str, float]:
        """See `TellsMemory.memory`."""
        answer, names = self._ask("memory", models, {}, self.patience)
        return {names[path]: found for path, found in answer["memory_mb"].items()}

    def room(self) -> float | None:
        """See `TellsRoom.room`."""
        return self._ready().hello.get("free_mb")

    def kernels(self, model: Path, wanted: Sequence[str], *, seconds: float, cores: Sequence[int] = ()) -> Kernels:
        """See `TellsKernels.kernels`; `cores` as in `time`."""
        request = {"wanted": list(wanted), "seconds": seconds, "cores": list(cores)}
        answer, _ = self._ask("kernels", [model], request, seconds + self.patience)
        return Kernels.model_validate(answer)

    def answers(self, model: Path, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """See `TellsAnswers.answers`."""
        found: list[list[NDArray[Any]]] = []
        for part in portions(inputs):
            request = {"inputs": list(map(packed, part))}
            limit = self.patience + sum(one.nbytes for one in part) / SLOW_LINK
            answer, _ = self._ask("answers", [model], request, limit)
            found.append(list(map(unpacked, answer["outputs"])))
        return [np.concatenate(one) for one in zip(*found, strict=True)]

    def close(self) -> None:
        """End the timing process and the connection; the device may be used again."""
        child, self._child = self._child, None
        if child is not None:
            child.end()
        self._link.close()
        self._probed = None
        self._copied.clear()

    def _ask(
        self, what: str, models: Sequence[Path], request: dict[str, Any], limit: float
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """The answer, and what the paths in it are called here. A file that is gone there is copied once more."""
        for last in (False, True):
            child = self._ready()
            names: dict[str, str] = {}
            hashes: dict[str, str] = {}
            size = 0
            for model in models:
                path, its = self._copy(child, model)
                while path in names:  # the same content twice: a second spelling tells the two apart
                    folder, _, name = path.rpartition("/")
                    path = f"{folder}/./{name}"
                names[path] = str(model)
                hashes |= its
                size += sum(file.stat().st_size for file in _files(model))
            try:
                answer = child.ask({**request, what: list(names), "sha256": hashes}, limit + size / SLOW_DISK)
            except BaseException:  # a late answer, after Ctrl-C too, must not be taken for the next one's
                self._drop()
                raise
            if "error" not in answer:
                return answer, names
            if answer["error"] != "changed" or last:
                break
            self._copied.clear()
        called = Path(names.get(answer["model"]) or answer["model"]).name
        raise refusal(answer, called, self.where)

    def _ready(self) -> Child:
        """The timing process there, started if need be."""
        if self._child is not None:
            if self._child.alive:
                return self._child
            self._drop()
        try:
            child = self._start()
        except UserError as error:
            self._drop()
            if self._answered:
                raise Unreachable(str(error)) from error
            raise
        except BaseException:
            self._drop()
            raise
        self._child, self._answered = child, True
        return child

    def _drop(self) -> None:
        """What was known of the other side may hold no longer."""
        child, self._child = self._child, None
        self._probed = None
        self._copied.clear()
        if child is not None:
            child.end()

    def _start(self) -> Child:
        told, profile = self._facts(), self.profile
        facts = told["facts"]
        threads = profile.threads or facts["physical_cores"] or facts["cores"]
        if threads > facts["cores"]:
            raise UserError(
                f"profile {profile.name!r} measures with {threads} threads, but {self._link.name} has "
                f"{facts['cores']} cores"
            )
        shas = [_sha(BESIDE), _sha(BENCH)]
        key = f"{there.KEPT}-{hashlib.sha256(' '.join(shas).encode()).hexdigest()[:16]}"
        self._put(key, BESIDE, shas[0], BESIDE.name)
        bench = self._put(key, BENCH, shas[1], BENCH.name)
        child = Child(
            self._link.command([self._python, "-I", bench]),
            setup(profile, idle_s=IDLE_S) | {"threads": threads},
            self.patience,
            explain=self._explain,
            where=self.where,
        )
        if profile.provider not in child.hello["providers"]:
            offered = ", ".join(child.hello["providers"])
            child.end()
            raise UserError(
                f"profile {profile.name!r} wants {profile.provider}, but the onnxruntime{self.where} offers {offered}"
            )
        return child

    @property
    def _python(self) -> str:
        return self.profile.reach.python.removeprefix("~/")  # commands begin in the home folder

    def _facts(self) -> dict[str, Any]:
        """The target's facts; raises UserError where it lacks something or is another than the profile expects."""
        if self._probed is not None:
            return self._probed
        folder = self.profile.reach.folder
        told = self._run(PROBE_S, "probe", folder.removeprefix("~/") or ".", *NEEDS)
        if told["missing"]:
            lacking = " and ".join(told["missing"])
            raise UserError(
                f"{self._link.name}: {self.profile.reach.python} there (Python {told['python']}) has no {lacking}; "
                f"type there: {self.profile.reach.python} -m pip install {' '.join(told['missing'])} (where that is "
                "refused, `python3 -m venv venv`, the same with venv/bin/python, and --python venv/bin/python here)"
            )
        if "error" in told:
            raise UserError(f"{self._link.name}: {told['error']}; set reach.folder in the profile")
        check_expects(self.profile, told["facts"])
        self._probed = told
        return told

    def _copy(self, child: Child, model: Path) -> tuple[str, dict[str, str]]:
        """Where a model lies there, and the hashes of its files by their paths there; copied if it does not."""
        files = _files(model)
        if not files:
            raise TrialFailure(f"no model at {model}")
        seen = files[0].stat()
        mark = (str(model), seen.st_mtime_ns, seen.st_size)
        if mark in self._copied:
            return self._copied[mark]
        shas = [_sha(file) for file in files]
        # A graph finds its weights by their name, so that stays; alone it goes by one that every shell and disk takes.
        names = [file.name for file in files] if len(files) > 1 else ["model.onnx"]
        key = hashlib.sha256(" ".join([*shas, *names]).encode()).hexdigest()[:32]
        folder = f"{self._facts()['folder']}/files/{key}"
        paths = {f"{folder}/{name}": sha for name, sha in zip(names, shas, strict=True)}
        size = sum(file.stat().st_size for file in files)
        known = child.ask({"have": paths}, self.patience + size / SLOW_DISK)["have"]
        for file, name, (path, sha) in zip(files, names, paths.items(), strict=True):
            if not known[path]:
                self._put(key, file, sha, name)
        self._copied[mark] = (f"{folder}/{names[0]}", paths)
        return self._copied[mark]

    def _put(self, key: str, file: Path, sha: str, name: str) -> str:
        """Copy a file; where it lies."""
        size, folder = file.stat().st_size, self._facts()["folder"]
        sized = (str(size), str(max(KEEP_BYTES, 2 * size)))
        told = self._run(PROBE_S + size / SLOW_LINK, "put", folder, key, name, sha, *sized, file=file)
        if "error" in told:
            raise TrialFailure(f"{file.name} cannot be copied to {self._link.name}: {told['error']}")
        return told["path"]

    def _run(self, limit: float, *arguments: str, file: Path | None = None) -> dict[str, Any]:
        """One command of there.py, fed with a file."""
        argv = [self._python, "-I", "-c", there.BOOT, str(len(SCRIPT)), *arguments]
        process = subprocess.Popen(
            self._link.command(argv),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        stdin, process.stdin = process.stdin, None
        assert stdin is not None
        feeder = threading.Thread(target=_feed, args=(stdin, file), daemon=True)
        feeder.start()
        try:
            out, err = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            raise Unreachable(f"{self._link.name} has not answered within {limit:.0f} s") from None
        finally:
            process.kill()
            process.wait()
            feeder.join()
        for line in out.decode(errors="replace").splitlines():
            if line.startswith(there.MARK):
                answer: dict[str, Any] = json.loads(line.removeprefix(there.MARK))
                return answer
        words = err.decode(errors="replace").strip()
        if found := self._link.explain(process.returncode, words):
            raise found
        last = words.splitlines()[-1][:300] if words else f"exit code {process.returncode}"
        if "too old" in last or "Unknown option: -I" in words:
            last = "too old"
        if process.returncode in (126, 127) or last == "too old":
            raise UserError(
                f"{self._link.name}: {self.profile.reach.python} cannot be run there ({last}); install Python 3.9 or "
                "later, or name it in the profile's reach.python"
            )
        raise UserError(f"{self._link.name}: {self.profile.reach.python} there ended: {last}")

    def _explain(self, code: int, words: str) -> Exception | None:
        """The end of the timing process."""
        if found := self._link.explain(code, words):
            return found
        if code <= 128:
            return None
        name = signal.Signals(code - 128).name if code - 128 in set(signal.Signals) else f"signal {code - 128}"
        hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return TrialFailure(f"the timing process{self.where} was ended by {name}{hint}")


def _files(model: Path) -> list[Path]:
    """A model, and its weights where they lie beside it."""
    return [path for path in (model, model.with_name(f"{model.name}.data")) if path.is_file()]


def _sha(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _feed(stdin: IO[bytes], file: Path | None) -> None:
    """The script, then the file; the other side may have ended before it has read them."""
    with suppress(BrokenPipeError, ConnectionResetError):
        stdin.write(SCRIPT)
        if file is not None:
            with file.open("rb") as source:
                shutil.copyfileobj(source, stdin, 1 << 20)
        stdin.flush()
    with suppress(BrokenPipeError):
        stdin.close()
