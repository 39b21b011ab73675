"""Times ONNX files against one another; stand-alone (numpy and onnxruntime only), started as `python -I bench.py`.

A server: one JSON object per line on stdin, one JSON object per line on stdout. It runs in a process of its own so
that a crash of the runtime ends only this process, and it can be copied to a target that has nothing else.

    first line   {"threads": 1, "provider": "CPUExecutionProvider", "options": {}, "batch": 1}
              -> {"onnxruntime": "1.31.1", "providers": ["CPUExecutionProvider"]}
    then         {"models": [path, ...], "rounds": 16, "seconds": 1.0, "cores": [3]}
              -> {"times_ms": {path: [...]}, "load_ms": {path: 12.3}, "blocks": 16, "disturbed": 0.0}
              or {"error": "load" | "run", "model": path, "reason": "..."}

One round is one block of each file, in the order A B B A ..., so that a linear drift of the clock cancels. A block is
about BLOCK_MS long, starts with one run that is thrown away (the other file has emptied the caches) and has the same
number of runs of a file in every round. Sessions stay loaded until a request does not name them or their file changes.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import resource
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

# On a machine at load 4, one second gave the ratio intervals of 1.5, 1.1, 2.3, 3.2 % with blocks of 2, 4, 8, 16 ms.
BLOCK_MS = 4.0
WARM_GROUP_MS = 10.0  # warm-up goes on while a group of this length is still getting faster ...
WARM_GAIN = 0.02  # ... by more than this share ...
WARM_MS = 400.0  # ... and at most this long
INTEGERS = {"int64": np.int64, "int32": np.int32, "int16": np.int16, "int8": np.int8, "uint8": np.uint8}
FLOATS = {"float": np.float32, "double": np.float64, "float16": np.float16}


class RefusedError(Exception):
    """A file that cannot be loaded or run here; `stage` is "load" or "run"."""

    def __init__(self, stage: str, model: str, reason: str) -> None:
        super().__init__(reason)
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


class Loaded:
    """A session with its input, its load time and, after `warm`, the number of runs of one block."""

    def __init__(self, path: str, setup: dict[str, Any], shared_pool: bool) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        if shared_pool:
            options.use_per_session_threads = False
        else:
            options.intra_op_num_threads = setup["threads"]
            options.inter_op_num_threads = 1
        self.identity = identity(path)
        began = time.perf_counter()
        try:
            chosen = [(setup["provider"], setup["options"])]
            self.session = ort.InferenceSession(path, options, providers=chosen)
            if self.session.get_providers()[0] != setup["provider"]:
                raise RuntimeError(f"onnxruntime does not run it on {setup['provider']}")
            inputs = self.session.get_inputs()
            self.feed = {i.name: values(i.name, i.type, i.shape, setup["batch"]) for i in inputs}
        except Exception as error:
            raise RefusedError("load", path, str(error)) from error
        self.load_ms = (time.perf_counter() - began) * 1e3
        self.path = path
        self.runs = 1
        self.warmed = False

    def run(self, times: int) -> list[float]:
        """Milliseconds of single runs."""
        clock, run, feed, taken = time.perf_counter_ns, self.session.run, self.feed, []
        try:
            for _ in range(times):
                began = clock()
                run(None, feed)
                taken.append((clock() - began) / 1e6)
        except Exception as error:
            raise RefusedError("run", self.path, str(error)) from error
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
        self.runs = max(1, round(BLOCK_MS / min(best, middle)))
        self.warmed = True

    def block(self) -> tuple[list[float], int]:
        """One block: a run thrown away (unless a run is as long as a block), then `runs` that count.

        A run in which another process was put on our core tells of that process: up to `runs` of them are taken
        again, after one that refills the caches. Also returns how many such runs remain.
        """
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


def preemptions() -> int:
    """How often the system took a core from a thread of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def measure(models: list[Loaded], rounds: int, seconds: float) -> dict[str, Any]:
    """Interleaved blocks; at least one round, whatever `seconds` says."""
    for model in models:
        if not model.warmed:
            model.warm()
    times: dict[str, list[float]] = {model.path: [] for model in models}
    until = time.perf_counter() + seconds
    done = disturbed = 0
    gc.disable()
    try:
        while done == 0 or (done < rounds and time.perf_counter() < until):
            for model in models if done % 2 == 0 else reversed(models):
                taken, lost = model.block()
                times[model.path] += taken
                disturbed += lost
            done += 1
    finally:
        gc.enable()
    share = disturbed / sum(map(len, times.values()))
    load_ms = {model.path: model.load_ms for model in models}
    return {"times_ms": times, "load_ms": load_ms, "blocks": done, "disturbed": share}


def keep_to(cores: Iterable[int]) -> None:
    """Keep all threads of this process on these cores; those started later inherit it."""
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


def requests() -> queue.Queue[str]:
    """Lines of stdin. A thread reads them, so that this process ends with its parent even in the middle of a run."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return lines


def main() -> None:
    """Serve until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what native code prints must not look like an answer
    lines = requests()
    setup = json.loads(lines.get())
    inherited = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    # One pool for all sessions: with a pool each, one session's idle workers spin on the cores that the next one needs
    # (two threads, a small file beside a larger one, interleaved over alone: 1.17 with a pool each, 1.00 with one).
    shared_pool = setup["threads"] > 1 and hasattr(ort, "set_global_thread_pool_sizes")
    if shared_pool:
        ort.set_global_thread_pool_sizes(setup["threads"], 1)
    hello = {"onnxruntime": ort.__version__, "providers": ort.get_available_providers()}
    answers.write(json.dumps(hello) + "\n")
    loaded: dict[str, Loaded] = {}
    cores: list[int] = []
    while True:
        request = json.loads(lines.get())
        if request["cores"] != cores:
            cores = request["cores"]
            keep_to(cores or inherited)
        wanted: list[str] = request["models"]
        try:
            loaded = {path: old for path, old in loaded.items() if path in wanted and old.identity == identity(path)}
            loaded |= {path: Loaded(path, setup, shared_pool) for path in wanted if path not in loaded}
            answer = measure([loaded[path] for path in wanted], request["rounds"], request["seconds"])
        except RefusedError as refused:
            answer = refused.answer
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
