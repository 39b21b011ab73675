"""Where one file's time goes, site by site, by onnxruntime's own profiler on this machine's processor.

It steers and explains; what is promised is what a station measures.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime

from autocompress import onnxfile
from autocompress.devices.bench import values
from autocompress.types import TrialFailure

SECONDS = 0.4
WARM, FEWEST, MOST = 2, 5, 100  # runs
BLOCK_MS = 3.0  # of runs of one file
WEIGHTED = frozenset(("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"))
WEIGHTED |= {"QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "DynamicQuantizeMatMul"}
WEIGHTED |= {"MatMulIntegerToFloat", "MatMulNBits"}
# What onnxruntime appends to the name of a node that it made of others: `conv1/Conv_token_12`, `Relu_3_nchwc`.
_MADE = re.compile(r"(_kernel_time|_nchwc|_token_\d+|_quant)$")


@dataclass(frozen=True)
class Times:
    """Milliseconds of one run. `rest` is whatever belongs to no site: additions, pooling, borders, the runtime."""

    sites: Mapping[str, float]
    rest: float

    @property
    def total(self) -> float:
        """Milliseconds of the whole run."""
        return sum(self.sites.values()) + self.rest


def site_latency(
    model: bytes, nodes: Mapping[str, Sequence[str]], threads: int = 1, *, batch: int = 1, seconds: float = SECONDS
) -> Times:
    """Time of every site of a file. `nodes` maps sites, and modules that hold some, to their nodes (`Part.nodes`).

    The mean of the faster half of all runs: what disturbs a run makes it slower only. Raises TrialFailure if
    onnxruntime cannot run the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        events = profile(model, threads, batch, seconds, Path(folder))
    runs = [event["dur"] for event in events if event["name"] == "model_run"]
    took: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            took[event["name"], event["args"].get("op_name", "")].append(event["dur"])
    owners = Owners(model, nodes)
    exact = {owner for name, _ in took if (owner := owners.of(name))}
    sites: defaultdict[str, float] = defaultdict(float)
    for (name, kind), spent in took.items():
        owner = owners.of(name) or (owners.near(name, exact) if kind in WEIGHTED else None)
        if owner is not None:
            often = max(round(len(spent) / len(runs)), 1)
            sites[owner] += often * fast(spent) / 1e3
    total = fast(runs) / 1e3
    return Times(dict(sites), max(total - sum(sites.values()), 0.0))


def fast(spent: Sequence[float]) -> float:
    """Mean of the faster half."""
    best = sorted(spent)[: (len(spent) + 1) // 2]
    return sum(best) / len(best)


class Loaded:
    """A session with random inputs of the right shapes."""

    def __init__(self, model: bytes, threads: int, batch: int, profile: Path | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        if threads > 1:  # else a session's idle threads spin on cores that another one needs
            options.add_session_config_entry("session.force_spinning_stop", "1")
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        self.session = onnxfile.session(model, options, ["CPUExecutionProvider"])
        inputs = self.session.get_inputs()
        self.feed = {one.name: values(one.name, one.type, one.shape, batch) for one in inputs}

    def run(self) -> float:
        """Milliseconds of one run."""
        began = time.perf_counter()
        self.session.run(None, self.feed)
        return (time.perf_counter() - began) * 1e3


def ratio(model: bytes, reference: bytes, threads: int = 1, *, batch: int = 1, seconds: float = SECONDS) -> float:
    """Latency of a file over another's, in blocks in turn. Raises TrialFailure if onnxruntime cannot run one of them.

    Run by run a small file would find the caches full of the other one: int8 of a ResNet-56 then takes 0.49 of its
    float file, in blocks 0.41, and 0.43 by a station. A ResNet-20 on four threads, eight samples at once, came to
    anything from 0.2 to 2.3 while idle threads spun, to 0.56 to 0.57 without; a station says 0.64.
    """
    took: tuple[list[float], list[float]] = ([], [])
    try:
        loaded = [Loaded(one, threads, batch) for one in (model, reference)]
        began = time.perf_counter()
        while len(took[0]) < WARM + FEWEST or time.perf_counter() - began < seconds:
            for one, times in zip(loaded, took, strict=True):
                times.append(_block(one))
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise TrialFailure(f"onnxruntime cannot run the file: {_line(error)}") from error
    first, second = (fast(times[WARM:]) for times in took)
    return first / second


def _block(loaded: Loaded) -> float:
    """Of runs in a row; the first, which finds the caches as the other file left them, counts only if it is alone."""
    runs = [loaded.run()]
    while sum(runs) < BLOCK_MS:
        runs.append(loaded.run())
    return fast(runs[1:] or runs)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def profile(model: bytes, threads: int, batch: int, seconds: float, folder: Path) -> list[dict[str, Any]]:
    """What onnxruntime's profiler says of some runs, after two to warm up. Raises TrialFailure."""
    try:
        loaded = Loaded(model, threads, batch, folder / "profile")
        began, done = time.perf_counter(), 0
        while done < WARM + FEWEST or (done < WARM + MOST and time.perf_counter() - began < seconds):
            loaded.run()
            done += 1
        events = json.loads(Path(loaded.session.end_profiling()).read_bytes())
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise TrialFailure(f"onnxruntime cannot profile the file: {_line(error)}") from error
    starts = sorted(event["ts"] for event in events if event["name"] == "model_run")
    return [event for event in events if event["ts"] >= starts[WARM] and "dur" in event]


class Owners:
    """Which site a node that ran belongs to."""

    def __init__(self, model: bytes, nodes: Mapping[str, Sequence[str]]) -> None:
        graph = onnxfile.read(model, weights=False).graph
        self.sites: dict[str, str] = {}
        for site in sorted(nodes, key=lambda name: 0 if name == "." else len(name)):  # inner ones come last
            self.sites |= dict.fromkeys(nodes[site], site)
        makers = {output: node for node in graph.node for output in node.output}
        self.before = {node.name: [makers[name].name for name in node.input if name in makers] for node in graph.node}

    def of(self, name: str) -> str | None:
        """The site of a node that kept its name."""
        while True:
            if name in self.sites:
                return self.sites[name]
            if name in self.before or not (shorter := _MADE.sub("", name)) or shorter == name:
                return None
            name = shorter

    def near(self, name: str, claimed: Collection[str]) -> str | None:
        """The nearest site before a node that took another one's name (a fused activation's) that is not `claimed`."""
        while name not in self.before:
            shorter = _MADE.sub("", name)
            if shorter == name:
                return None
            name = shorter
        waiting, seen = deque([name]), {name}
        while waiting:
            for earlier in self.before[waiting.popleft()]:
                if (site := self.sites.get(earlier)) is not None:
                    if site not in claimed:
                        return site
                elif earlier not in seen:
                    seen.add(earlier)
                    waiting.append(earlier)
        return None
