"""Times ONNX files against one another; stand-alone (numpy and onnxruntime only), started as `python -I bench.py`.

A server: one JSON object per line on stdin, one JSON object per line on stdout. It runs in a process of its own so
that a crash of the runtime ends only this process, and it can be copied to a target that has nothing else: Python 3.9
or later, Linux, Android or macOS (without affinity, preemption counts or /proc it does without).

    first line   {"threads": 1, "provider": "CPUExecutionProvider", "options": {}, "batch": 1, "idle_s": 3600}
              -> {"onnxruntime": "1.31.1", "providers": ["CPUExecutionProvider"], "affinity": true}
    then         {"models": [path, ...], "rounds": 16, "seconds": 1.0, "cores": [3], "sha256": {path: hash}}
              -> {"times_ms": {path: [...]}, "load_ms": {path: 12.3}, "energy_mj": {path: 1.2}, "blocks": 16,
                  "fed": {path: 64}, "disturbed": 0.0, "waited_s": 0.0}
    or           {"memory": [path, ...], "cores": [3]}
              -> {"memory_mb": {path: 4.5}}
    or           {"kernels": [path], "wanted": [key, ...], "seconds": 10.0, "cores": [3]}
              -> {"counts": {key: 2}, "ratios": {key: 1.5}}
    or           {"answers": [path], "inputs": [text, ...]}
              -> {"outputs": [text, ...]}
    or           {"have": {path: hash, ...}}
              -> {"have": {path: true}}
              or {"error": "load" | "run" | "changed" | "memory" | "host", "model": path, "reason": "..."}
    before it    {"waiting": "pid 123"}, once a second while another process measures on this host

`idle_s` (how long it stays without a request) and `sha256` (what the files must be when they are loaded) may be left
out. `counts` are the kernels of one run (`kernels.py`, which lies beside this file), `ratios` what each of those
`wanted` takes alone, of what a small convolution takes: as many as the seconds suffice for. One measurement runs on a
host at a time, whoever asks: a lock on a file in the folder for temporary files, which the system releases when its
holder ends.

One round is one block of each file, in the order A B B A ..., so that a linear drift of the clock cancels. A block is
about BLOCK_MS long, starts with one run that is thrown away (the other file has emptied the caches) and has the same
number of runs of a file in every round. Sessions stay loaded until a request does not name them or their file changes.
"""

from __future__ import annotations

import base64
import gc
import hashlib
import importlib.util
import io
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

try:
    import fcntl
    import resource
except ImportError:  # no Unix: nobody else's measurement is waited for, no preemption is seen
    fcntl = resource = None

# On a machine at load 4, one second gave the ratio intervals of 1.5, 1.1, 2.3, 3.2 % with blocks of 2, 4, 8, 16 ms.
BLOCK_MS = 4.0
WARM_GROUP_MS = 10.0  # warm-up goes on while a group of this length is still getting faster ...
WARM_GAIN = 0.02  # ... by more than this share ...
WARM_MS = 400.0  # ... and at most this long
MEMORY_RUNS = 3
POLL_S, SAY_S = 0.005, 1.0  # how often a lock is asked for, and how often it is said that it is waited for
SAMPLES = "autocompress.samples."  # before the number of an input, in the metadata of a file that brings inputs
INTEGERS = {"int64": np.int64, "int32": np.int32, "int16": np.int16, "int8": np.int8, "uint8": np.uint8}
FLOATS = {"float": np.float32, "double": np.float64, "float16": np.float16}


SHORT = ("bad_alloc", "bad allocation", "Failed to allocate memory", "out of memory", "Unable to allocate")


class RefusedError(Exception):
    """A file that cannot be loaded or run here; `stage` is the answer's "error", or `short` where memory was."""

    def __init__(self, stage: str, model: str, reason: str) -> None:
        super().__init__(reason)
        stage = "short" if any(sign in reason for sign in SHORT) else stage
        self.answer = {"error": stage, "model": model, "reason": " ".join(reason.split())[:500]}


def values(name: str, kind: str, shape: list[Any], batch: int) -> np.ndarray:
    """Random input of a model input; a first axis without a number is the batch. Raises ValueError if undetermined."""
    sizes = [batch if i == 0 and not isinstance(n, int) else n for i, n in enumerate(shape)]
    unknown = [str(n) for n in sizes if not isinstance(n, int)]
    if unknown:
        raise ValueError(f"input {name!r} has axes of unknown size ({', '.join(unknown)}); only the batch may be open")
    rng = np.random.default_rng(0)
    element = kind.removeprefix("tensor(").removesuffix(")")
    if element in FLOATS:
        return rng.standard_normal(sizes).astype(FLOATS[element])
    if element in INTEGERS:
        return rng.integers(0, 2, sizes).astype(INTEGERS[element])  # 0 and 1 are tokens and indices of any table
    if element == "bool":
        return rng.integers(0, 2, sizes).astype(np.bool_)
    raise ValueError(f"input {name!r} is {kind}, which has no random stand-in")


def identity(path: str) -> tuple[int, int]:
    """Changes when the file does."""
    try:
        facts = Path(path).stat()
    except OSError as error:
        raise RefusedError("load", path, str(error)) from error
    return facts.st_mtime_ns, facts.st_size


def options_of(setup: dict[str, Any], shared_pool: bool) -> Any:
    """Of a session."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    if shared_pool:
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = setup["threads"]
        options.inter_op_num_threads = 1
    return options


class Loaded:
    """A session with its input, its load time and, after `warm`, the number of runs of one block."""

    def __init__(self, path: str, setup: dict[str, Any], shared_pool: bool) -> None:
        options = options_of(setup, shared_pool)
        self.identity = identity(path)
        began = time.perf_counter()
        try:
            chosen = [(setup["provider"], setup["options"])]
            self.session = ort.InferenceSession(path, options, providers=chosen)
            if self.session.get_providers()[0] != setup["provider"]:
                raise RuntimeError(f"onnxruntime does not run it on {setup['provider']}")
            inputs = self.session.get_inputs()
            self.feeds = brought(self.session) or [
                {i.name: values(i.name, i.type, i.shape, setup["batch"]) for i in inputs}
            ]
            self.feed = self.feeds[0]
        except Exception as error:
            raise RefusedError("load", path, str(error)) from error
        self.load_ms = (time.perf_counter() - began) * 1e3
        self.path = path
        self.runs = 1
        self.total = 0  # runs so far
        self.warmed = False

    def run(self, times: int, first: int = 0) -> list[float]:
        """Milliseconds of single runs, with its inputs in turn from the `first`."""
        clock, run, feeds, taken = time.perf_counter_ns, self.session.run, self.feeds, []
        count = len(feeds)
        try:
            for place in range(first, first + times):
                feed = feeds[place % count]
                began = clock()
                run(None, feed)
                taken.append((clock() - began) / 1e6)
        except Exception as error:
            raise RefusedError("run", self.path, str(error)) from error
        self.total += times
        return taken

    def warm(self) -> None:
        """Run until it gets no faster, then fix the number of runs of a block."""
        best, spent, group = float("inf"), 0.0, 1
        while True:
            taken = self.run(group)
            spent += sum(taken)
            middle = float(np.median(taken))
            if spent > WARM_MS or (middle > best * (1 - WARM_GAIN) and spent > WARM_GROUP_MS):
                break
            best = min(best, middle)
            group = max(1, round(WARM_GROUP_MS / middle))
        # a file that brings its inputs takes all of them in every block, whatever that takes
        self.runs = max(1, round(BLOCK_MS / min(best, middle))) if len(self.feeds) == 1 else len(self.feeds)
        self.warmed = True

    def block(self) -> tuple[list[float], int]:
        """One block: a run thrown away (unless a run is as long as a block), then `runs` that count.

        A run in which another process was put on our core tells of that process: up to `runs` of them are taken
        again, after one that refills the caches. Also returns how many such runs remain.
        """
        if len(self.feeds) > 1:
            return self.every()
        clean: list[float] = []
        disturbed: list[float] = []
        refill = self.runs > 1
        for _ in range(2 * self.runs):
            if refill:
                self.run(1)
            before = preemptions()
            taken = self.run(1)
            refill = preemptions() != before
            (disturbed if refill else clean).extend(taken)
            if len(clean) == self.runs:
                break
        missing = self.runs - len(clean)
        return clean + disturbed[:missing], missing

    def every(self) -> tuple[list[float], int]:
        """One run of each of its inputs, taken again once where another process was put on our core."""
        self.run(1, len(self.feeds) - 1)  # the other file has emptied the caches
        taken, lost = [], 0
        for place in range(len(self.feeds)):
            before = preemptions()
            again = self.run(1, place)
            if preemptions() != before:
                before = preemptions()
                again = self.run(1, place)
                lost += preemptions() != before
            taken += again
        return taken, lost


def brought(session: Any) -> list[dict[str, np.ndarray]]:
    """The inputs in a file's metadata, one sample each; none where it has none."""
    found = session.get_modelmeta().custom_metadata_map
    arrays = {
        i.name: unpacked(found[f"{SAMPLES}{n}"]) for n, i in enumerate(session.get_inputs()) if f"{SAMPLES}{n}" in found
    }
    if len(arrays) < len(session.get_inputs()) or not arrays:
        return []
    count = min(len(one) for one in arrays.values())
    return [{name: np.ascontiguousarray(one[i : i + 1]) for name, one in arrays.items()} for i in range(count)]


def preemptions() -> int:
    """How often the system took a core from a thread of this process; 0 where that is not told."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource else 0


class Rapl:
    """Energy of the processor packages, as the kernel's powercap interface tells it (Documentation/power/powercap).

    Counters are microjoules and begin again at their range. `packages` is empty where there are none or they are not
    ours to read (since Linux 5.10 only root may).
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self.packages: list[tuple[Path, int]] = []
        for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
            try:
                if re.fullmatch(r"intel-rapl:\d+", zone.name) and (zone / "name").read_text().startswith("package"):
                    range_ = int((zone / "max_energy_range_uj").read_text())
                    int((zone / "energy_uj").read_text())
                    self.packages.append((zone / "energy_uj", range_))
            except (OSError, ValueError):
                self.packages = []
                return

    def read(self) -> list[int]:
        """Microjoules of every package now."""
        return [int(counter.read_text()) for counter, _ in self.packages]

    def between(self, before: list[int], after: list[int]) -> float:
        """Millijoules from one reading to a later one, less than a whole range apart."""
        spans = [
            end - begin if end >= begin else end - begin + range_
            for begin, end, (_, range_) in zip(before, after, self.packages)  # noqa: B905  Python 3.9
        ]
        return sum(spans) / 1e3


def measure(models: list[Loaded], rounds: int, seconds: float, rapl: Rapl) -> dict[str, Any]:
    """Interleaved blocks; at least one round, whatever `seconds` says."""
    for model in models:
        if not model.warmed:
            model.warm()
    energy, ran = {model.path: 0.0 for model in models}, {model.path: model.total for model in models}
    times: dict[str, list[float]] = {model.path: [] for model in models}
    until = time.perf_counter() + seconds
    done = disturbed = 0
    gc.disable()
    try:
        while done == 0 or (done < rounds and time.perf_counter() < until):
            for model in models if done % 2 == 0 else reversed(models):
                before = rapl.read()
                taken, lost = model.block()
                energy[model.path] += rapl.between(before, rapl.read())
                times[model.path] += taken
                disturbed += lost
            done += 1
    finally:
        gc.enable()
    share = disturbed / sum(map(len, times.values()))
    load_ms = {model.path: model.load_ms for model in models}
    answer = {"times_ms": times, "load_ms": load_ms, "blocks": done, "disturbed": share}
    answer["fed"] = {model.path: len(model.feeds) for model in models if len(model.feeds) > 1}
    if rapl.packages:
        answer["energy_mj"] = {model.path: energy[model.path] / (model.total - ran[model.path]) for model in models}
    return answer


def keep_to(cores: Iterable[int]) -> None:
    """Keep all threads of this process on these cores; those started later inherit it. Nothing where that cannot be."""
    if not AFFINITY:
        return
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


AFFINITY = hasattr(os, "sched_setaffinity") and Path("/proc/self/task").is_dir()


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_mb() -> float:
    """The most megabytes (1e6) that this process had resident."""
    try:
        rows = Path("/proc/self/status").read_text().splitlines()
        return next(int(row.split()[1]) for row in rows if row.startswith("VmHWM:")) * 1024 / 1e6
    except (OSError, StopIteration):  # no Linux; getrusage counts bytes on macOS, kilobytes elsewhere
        if resource is None:
            return 0.0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def forget_peak() -> None:
    """Let the peak begin again from what is resident now, where the kernel can."""
    with suppress(OSError):  # then importing took a little more than it left, and the answer is that much too small
        Path("/proc/self/clear_refs").write_text("5")


def free_mb(root: Path = Path("/")) -> float | None:
    """Megabytes (1e6) that processes may still take by the kernel's own estimate, None where it is not told."""
    try:
        rows = (root / "proc/meminfo").read_text().splitlines()
        return next(int(row.split()[1]) for row in rows if row.startswith("MemAvailable:")) * 1024 / 1e6
    except (OSError, StopIteration):
        return None


def tell_memory() -> None:
    """In a process of its own: what loading and running a file takes, beyond the runtime."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    request = json.loads(sys.stdin.readline())
    forget_peak()
    before = peak_mb()
    try:
        Loaded(request["model"], request["setup"], shared_pool=False).run(MEMORY_RUNS)
        answers.write(json.dumps({"memory_mb": max(peak_mb() - before, 0.0)}) + "\n")
    except RefusedError as refused:
        answers.write(json.dumps(refused.answer) + "\n")


def packed(array: np.ndarray) -> str:
    """An array with its type and shape, as text."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return base64.b64encode(zlib.compress(buffer.getvalue(), 1)).decode("ascii")


def unpacked(text: str) -> np.ndarray:
    """What `packed` made text of."""
    return np.load(io.BytesIO(zlib.decompress(base64.b64decode(text))), allow_pickle=False)


def memory_of(path: str, setup: dict[str, Any]) -> float:
    """Peak of a fresh process. Raises RefusedError where it does not live to tell."""
    request = json.dumps({"model": path, "setup": setup}) + "\n"
    command = [sys.executable, "-I", __file__, "--memory"]
    done = subprocess.run(command, input=request.encode(), stdout=subprocess.PIPE, check=False)
    if not done.stdout:
        end = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise RefusedError("memory", path, f"a process that loads and runs it alone ended ({end})")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise RefusedError(answer["error"], path, answer["reason"])
    return answer["memory_mb"]


# --- kernels ----------------------------------------------------------------------------------------------------------


class Kernels:
    """Of the file that was asked about last."""

    def __init__(self, setup: dict[str, Any], shared_pool: bool) -> None:
        self.setup, self.shared_pool = setup, shared_pool
        place = Path(__file__).with_name("kernels.py")
        spec = importlib.util.spec_from_file_location("kernels", place)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules["kernels"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.module, self.of, self.graph, self.gauge = module, "", None, None

    def answer(self, path: str, wanted: list[str], seconds: float) -> dict[str, Any]:
        """How often each is run, and what those that are wanted take. Raises RefusedError."""
        try:
            named = f"{path} {identity(path)}"
            if self.graph is None or self.of != named:
                self.graph = None
                feed = Loaded(path, self.setup, self.shared_pool).feed
                self.graph = self.module.Graph(path, lambda: options_of(self.setup, self.shared_pool), self.setup, feed)
                self.of = named
            self.gauge = self.gauge or self.module.Gauge(self.graph)
            ratios = self.graph.ratios(wanted, self.gauge, seconds)
        except RefusedError:
            raise
        except Exception as error:
            raise RefusedError("kernels", path, str(error)) from error
        return {"counts": {key: len(nodes) for key, nodes in self.graph.kernels.items()}, "ratios": ratios}


# --- the host's lock --------------------------------------------------------------------------------------------------


def common(name: str) -> int:
    """A file of the folder for temporary files that every user may lock.

    Opened before it is created: in a sticky folder Linux forbids to open another's file with O_CREAT
    (fs.protected_regular).
    """
    folder = "/tmp" if os.access("/tmp", os.W_OK | os.X_OK) else tempfile.gettempdir()
    path, plain = os.path.join(folder, name), getattr(os, "O_NOFOLLOW", 0) | os.O_CLOEXEC  # noqa: PTH118
    for _ in range(100):
        try:
            return os.open(path, os.O_RDWR | plain)
        except FileNotFoundError:
            pass
        try:
            made = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | plain, 0o666)
        except FileExistsError:
            continue
        os.fchmod(made, 0o666)  # whatever the umask
        return made
    raise OSError(f"{path} comes and goes")


@contextmanager
def turn(say: Callable[[str], None]) -> Iterator[float]:
    """Hold this host's lock; gives the seconds that it was waited for.

    Whoever waits holds the place in the queue, so that one that measures again and again lets others in.
    """
    if fcntl is None:
        yield 0.0
        return
    place, lock = common("autocompress-queue.lock"), common("autocompress-measuring.lock")
    try:
        began = said = time.monotonic()
        for descriptor in (place, lock):
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    now = time.monotonic()
                    if now - said > SAY_S:
                        said = now
                        told = os.pread(lock, 20, 0)
                        say(f"pid {int(told)}" if told.isdigit() else "another process")
                    time.sleep(POLL_S)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        fcntl.flock(place, fcntl.LOCK_UN)
        yield time.monotonic() - began
        os.ftruncate(lock, 0)
    finally:
        os.close(place)
        os.close(lock)


# --- the server -------------------------------------------------------------------------------------------------------


def requests() -> queue.Queue[str]:
    """Lines of stdin. A thread reads them, so that this process ends with its parent even in the middle of a run."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return lines


def is_it(path: str, expected: str) -> bool:
    """Whether a file is there and what its sha256 says."""
    found = hashlib.sha256()
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            for piece in iter(lambda: file.read(1 << 20), b""):
                found.update(piece)
    except OSError:
        return False
    return found.hexdigest() == expected


def check(hashes: dict[str, str]) -> None:
    """Raise RefusedError for a file that is not what its sha256 says."""
    for path, expected in hashes.items():
        if not is_it(path, expected):
            raise RefusedError("changed", path, "it is not, or no longer, what was copied there")


class Server:
    """What is loaded, and the answers to requests."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self.setup = setup
        self.inherited = sorted(os.sched_getaffinity(0)) if AFFINITY else []
        # One pool for all sessions: with a pool each, one session's idle workers spin on the cores that the next one
        # needs (two threads, a small file beside a larger one, interleaved over alone: 1.17 with a pool each, 1.00
        # with one).
        self.shared_pool = setup["threads"] > 1 and hasattr(ort, "set_global_thread_pool_sizes")
        if self.shared_pool:
            ort.set_global_thread_pool_sizes(setup["threads"], 1)
        self.rapl = Rapl()
        self.loaded: dict[str, Loaded] = {}
        self.kernels: Kernels | None = None
        self.asked: Loaded | None = None  # whose answers were wanted last
        self.cores: list[int] = []

    def same(self, path: str) -> bool:
        """Whether the file is still what was loaded."""
        return self.loaded[path].identity == identity(path)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Of one request, when it is our turn."""
        if (cores := request.get("cores", self.cores)) != self.cores:
            self.cores = cores
            keep_to(self.cores or self.inherited)
        try:
            if "memory" in request:
                check(request.get("sha256", {}))
                return {"memory_mb": {path: memory_of(path, self.setup) for path in request["memory"]}}
            if "answers" in request:
                return {"outputs": self.outputs(request["answers"][0], request["inputs"], request.get("sha256", {}))}
            if "kernels" in request:
                check(request.get("sha256", {}))
                self.kernels = self.kernels or Kernels(self.setup, self.shared_pool)
                return self.kernels.answer(request["kernels"][0], request.get("wanted", []), request["seconds"])
            wanted: list[str] = request["models"]
            named = request.get("sha256", {})  # such files never change, and may have made room for others
            kept = [path for path in self.loaded if path in wanted]
            loaded = {path: self.loaded[path] for path in kept if path in named or self.same(path)}
            self.loaded = loaded
            missing = [path for path in wanted if path not in loaded]
            if missing:
                check(named)
            for path in missing:
                loaded[path] = Loaded(path, self.setup, self.shared_pool)
            return measure([loaded[path] for path in wanted], request["rounds"], request["seconds"], self.rapl)
        except RefusedError as refused:
            return refused.answer

    def outputs(self, path: str, inputs: list[str], hashes: dict[str, str]) -> list[str]:
        """What a file answers. Raises RefusedError."""
        if self.asked is None or self.asked.path != path or self.asked.identity != identity(path):
            check(hashes)
            self.asked = Loaded(path, self.setup, self.shared_pool)
        session = self.asked.session
        try:
            feed = {one.name: unpacked(text) for one, text in zip(session.get_inputs(), inputs)}  # noqa: B905
            rows = [feed]
            if all(one.shape and one.shape[0] == 1 for one in session.get_inputs()):  # it takes one sample at a time
                count = min(map(len, feed.values()))
                rows = [{name: array[i : i + 1] for name, array in feed.items()} for i in range(count)]
            answers = [session.run(None, row) for row in rows]
            return [packed(np.concatenate([np.asarray(one) for one in part])) for part in zip(*answers)]  # noqa: B905
        except Exception as error:
            raise RefusedError("run", path, str(error)) from error


def main() -> None:
    """Serve until stdin ends, or nobody asks for long."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what native code prints must not look like an answer
    lines = requests()
    setup = json.loads(lines.get())
    server = Server(setup)

    def write(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")

    hello = {"onnxruntime": ort.__version__, "providers": ort.get_available_providers(), "affinity": AFFINITY}
    write({**hello, "free_mb": free_mb()})
    while True:
        try:
            request = json.loads(lines.get(timeout=setup.get("idle_s")))
        except queue.Empty:
            return
        if "have" in request:
            write({"have": {path: is_it(path, expected) for path, expected in request["have"].items()}})
            continue
        try:
            with turn(lambda who: write({"waiting": who})) as waited:
                answer = server.answer(request)
        except OSError as error:
            answer, waited = {"error": "host", "model": "", "reason": str(error)}, 0.0
        write({**answer, "waited_s": waited} if "times_ms" in answer else answer)


if __name__ == "__main__":
    tell_memory() if "--memory" in sys.argv else main()
