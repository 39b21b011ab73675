"""What onnxruntime makes of a file, and what each of its kernels takes alone; `bench.py` loads it where that is asked.

Stand-alone as `bench.py` is (numpy and onnxruntime only, Python 3.9 or later), so that a target needs no onnx: as much
of protobuf's wire format is read and written here as a graph needs (protobuf.dev/programming-guides/encoding).

A kernel is a node of the graph after onnxruntime's own optimization, with its types and shapes: nodes that agree in
these take the same time, in whatever file. So it is timed in a file of its own that holds COPIES of it side by side,
each with weights of its own, as they lie in a network: what starting a run takes is shared by the copies, and no
profiler is in the way (onnxruntime's adds some 3 us to each node, where many take one).

Its time is told as a ratio to a small convolution's, run in turn with it: on a shared machine a core was 1.4 times
slower for minutes, so the times of different minutes could not be added.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

COPIES = 20
WORK = 2e7  # multiply-adds beyond which copies are fewer
EACH_MS = 2.0  # of timing for one kernel ...
FEWEST, MOST = 15, 400  # ... and how many runs
LONG_MS = 100.0  # a kernel so slow is not run FEWEST times
SESSIONS, SMALL = 3, 0.01  # one session in 200 was off by half: more are asked where a kernel is more than this share
ELEMENTS = {"float32": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7, "bool": 9}
ELEMENTS.update({"float16": 10, "float64": 11, "uint32": 12, "uint64": 13})
GRAPH, INTEGERS = 5, 7  # AttributeProto.type of a subgraph, and of a list of integers; 10 of several graphs


# --- protobuf ---------------------------------------------------------------------------------------------------------


def fields(data: memoryview) -> Iterator[tuple[int, Any, memoryview]]:
    """Of a message: number, value (an integer, or bytes), and the whole field as it stands there."""
    at = 0
    while at < len(data):
        began = at
        tag, at = _number(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _number(data, at)
        else:
            size, at = _number(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = data[at : at + size], at + size
        yield tag >> 3, value, data[began:at]


def _number(data: memoryview, at: int) -> tuple[int, int]:
    found = shift = 0
    while True:
        byte = data[at]
        found, at, shift = found | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return found, at


def number(value: int) -> bytes:
    """A varint."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def part(place: int, value: Any) -> bytes:
    """A field: an integer, text, or a message."""
    if isinstance(value, int):
        return number(place << 3) + number(value)
    data = value.encode() if isinstance(value, str) else bytes(value)
    return number(place << 3 | 2) + number(len(data)) + data


# --- a graph ----------------------------------------------------------------------------------------------------------


@dataclass
class Node:
    """A NodeProto; attributes stay as they are written."""

    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    op: str = ""
    domain: str = ""
    attributes: list[bytes] = field(default_factory=list)
    holds_graph: bool = False

    @classmethod
    def read(cls, data: memoryview) -> Node:
        """Of its message."""
        node = cls()
        for place, value, whole in fields(data):
            if place == 5:
                node.attributes.append(bytes(whole))
                kinds = [number_ for at, number_, _ in fields(value) if at == 20]
                node.holds_graph |= any(kind in (GRAPH, 2 * GRAPH) for kind in kinds)
            elif place in (1, 2):
                (node.inputs if place == 1 else node.outputs).append(str(value, "utf-8"))
            elif place == 4:
                node.op = str(value, "utf-8")
            elif place == 7:
                node.domain = str(value, "utf-8")
        node.attributes.sort()
        return node

    def written(self, outputs: Iterable[str]) -> bytes:
        """The message, with other names for what it answers."""
        named = [part(1, name) for name in self.inputs] + [part(2, name) for name in outputs]
        return b"".join([*named, part(4, self.op), *self.attributes, part(7, self.domain)])


class Graph:
    """The graph that onnxruntime runs for a file, with the values of one run. Raises what onnxruntime raises."""

    def __init__(self, path: str, options: Any, setup: dict[str, Any], feed: dict[str, np.ndarray]) -> None:
        """`options` makes fresh ones of a session."""
        self.options, self.providers = options, [(setup["provider"], setup["options"])]
        with tempfile.TemporaryDirectory() as folder:
            chosen = options()
            chosen.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
            ort.InferenceSession(path, chosen, providers=self.providers)
            data = memoryview(Path(chosen.optimized_model_filepath).read_bytes())
        self.head = b""
        self.nodes: list[Node] = []
        self.weights: dict[str, memoryview] = {}  # whole fields
        for place, value, whole in fields(data):
            if place in (1, 8, 25):  # version, operator sets, functions
                self.head += bytes(whole)
            elif place == 7:
                for at, inner, field_ in fields(value):
                    if at == 1:
                        self.nodes.append(Node.read(inner))
                    elif at == 5:
                        name = next(str(text, "utf-8") for number_, text, _ in fields(inner) if number_ == 8)
                        self.weights[name] = field_
        made = [name for node in self.nodes for name in node.outputs if name]
        # messages of one field merge, so that further outputs of the graph may follow the file
        told = bytes(data) + part(7, b"".join(part(12, part(1, name)) for name in made))
        session = self.session(told)
        self.values: dict[str, np.ndarray] = {**feed, **dict(zip(made, session.run(made, feed)))}  # noqa: B905
        self.shapes = {name: _shape(field_) for name, field_ in self.weights.items()}
        self.kernels: dict[str, list[Node]] = {}
        for node in self.nodes:
            self.kernels.setdefault(self.key(node), []).append(node)

    def session(self, model: bytes) -> Any:
        """Of a graph that is optimized already."""
        options = self.options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return ort.InferenceSession(model, options, providers=self.providers)

    def key(self, node: Node) -> str:
        """Operation, and a hash of all that its time depends on."""
        parts = [node.domain, node.op, *map(bytes.hex, node.attributes)]
        for name in [*node.inputs, "", *node.outputs]:
            value = self.values.get(name)
            parts.append(repr(self.shapes.get(name)) if value is None else f"{value.dtype}{value.shape}")
        return f"{node.op}:{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:12]}"

    def work(self, node: Node) -> float:
        """Multiply-adds, about: every number of the answer takes what one channel of the largest weight holds."""
        shapes = [self.shapes[name][1] for name in node.inputs if name in self.shapes]
        largest = max(shapes, key=prod, default=())
        return float(self.values[node.outputs[0]].size) * max(prod(largest[1:]), 1)

    def alone(self, node: Node, copies: int) -> tuple[bytes, dict[str, np.ndarray]]:
        """A model of copies side by side, and what it is fed with."""
        given = {name: self.values[name] for name in node.inputs if name and name not in self.weights}
        body = [part(2, "kernel")]
        body += [part(1, node.written(name and f"{copy}/{name}" for name in node.outputs)) for copy in range(copies)]
        body += [bytes(self.weights[name]) for name in dict.fromkeys(node.inputs) if name in self.weights]
        body += [part(11, _value(name, array)) for name, array in given.items()]
        body.append(part(12, part(1, f"{copies - 1}/{node.outputs[0]}")))
        return self.head + part(7, b"".join(body)), given

    def ratios(self, wanted: list[str], gauge: Gauge, seconds: float) -> dict[str, float]:
        """Of as many kernels as the seconds suffice for, or one: the median of three sessions where it matters."""
        until, took = time.perf_counter() + seconds / SESSIONS, {}
        for key in wanted:
            if took and time.perf_counter() > until:
                break
            took[key] = [self.ratio(key, gauge)]
        shares = {key: len(self.kernels[key]) * found[0] for key, found in took.items()}
        for _ in range(SESSIONS - 1):
            for key, share in shares.items():
                if share > SMALL * sum(shares.values()):
                    took[key].append(self.ratio(key, gauge))
        return {key: round(float(np.median(found)), 6) for key, found in took.items()}

    def ratio(self, key: str, gauge: Gauge) -> float:
        """Of one run of a kernel to the gauge's work. Raises what onnxruntime raises, ValueError."""
        node = self.kernels[key][0]
        if node.holds_graph:
            raise ValueError(f"{node.op} runs a graph of its own, which cannot be timed alone")
        copies = int(min(max(WORK / max(self.work(node), 1.0), 1), COPIES))
        model, feed = self.alone(node, copies)
        return gauge.ratio(self.session(model), feed) / copies


class Gauge:
    """Two sessions that every kernel is run in turn with: one that does nothing, and a convolution of 0.6 million."""

    def __init__(self, graph: Graph) -> None:
        """`graph`: any; a session of it is like those of its kernels."""
        rng = np.random.default_rng(0)
        weight = rng.standard_normal((16, 16, 3, 3)).astype(np.float32)
        image = {"x": rng.standard_normal((1, 16, 16, 16)).astype(np.float32)}
        pads = part(1, "pads") + b"".join(part(8, 1) for _ in range(4)) + part(20, INTEGERS)
        work = Node(["x", "w"], ["y"], "Conv", attributes=[part(5, pads)])
        tensor = (
            b"".join(part(1, size) for size in weight.shape) + part(2, 1) + part(8, "w") + part(9, weight.tobytes())
        )
        self.runs = [
            (self._session(graph, Node(["x"], ["y"], "Identity"), {"x": np.zeros(1, np.float32)}, b"")),
            (self._session(graph, work, image, part(5, tensor))),
        ]

    @staticmethod
    def _session(graph: Graph, node: Node, feed: dict[str, np.ndarray], weights: bytes) -> tuple[Any, Any]:
        body = [part(2, "gauge"), part(1, node.written(node.outputs)), weights]
        body += [part(11, _value(name, array)) for name, array in feed.items()]
        return graph.session(graph.head + part(7, b"".join([*body, part(12, part(1, "y"))]))), feed

    def ratio(self, session: Any, feed: dict[str, np.ndarray]) -> float:
        """What a run takes, of what the work takes; what starting a run takes counts in neither.

        By the fastest of some runs: whatever disturbs a run makes it slower.
        """
        clock = time.perf_counter_ns
        three = [(one.run, [one.get_outputs()[0].name], its) for one, its in [*self.runs, (session, feed)]]
        took: list[tuple[int, ...]] = []
        began = clock()
        while len(took) < MOST:
            times = []
            for run, names, its in three:
                before = clock()
                run(names, its)
                times.append(clock() - before)
            took.append(tuple(times))
            spent = (clock() - began) / 1e6
            if spent > LONG_MS or (spent > EACH_MS and len(took) >= FEWEST):
                break
        start, work, kernel = map(min, zip(*took))  # noqa: B905  Python 3.9
        return max(kernel - start, 0) / max(work - start, 1)


def _shape(field_: memoryview) -> tuple[int, tuple[int, ...]]:
    """Type and shape of an initializer."""
    ((_, tensor, _),) = fields(field_)
    dims: list[int] = []
    kind = 0
    for place, value, _ in fields(tensor):
        if place == 1:  # packed or not
            if isinstance(value, int):
                dims.append(value)
            else:
                at = 0
                while at < len(value):
                    one, at = _number(value, at)
                    dims.append(one)
        elif place == 2:
            kind = value
    return kind, tuple(dims)


def _value(name: str, array: np.ndarray) -> bytes:
    """A ValueInfoProto."""
    shape = b"".join(part(1, part(1, size)) for size in array.shape)
    return part(1, name) + part(2, part(1, part(1, ELEMENTS[array.dtype.name]) + part(2, shape)))
