"""What single layers cost on this machine, whatever network they are in: a lookup table measured on demand.

One file holds many layers side by side, and onnxruntime's profiler tells them apart. Borders, reordering and what
fuses with a layer are not in it, so a figure is used in proportion to the same site's time in its network.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from autocompress.devices.profiler import WEIGHTED, fast, profile
from autocompress.types import Numeric, TrialFailure

SECONDS = 0.3  # per file
OPSET = 17
WEIGHTS, VALUES = 16_000_000, 8_000_000  # numbers in one file: weights, and inputs with outputs


@dataclass(frozen=True)
class Layer:
    """A convolution (weight (out, in / groups, h, w)) or a matrix product (weight (out, in)) and its input's shape."""

    shape: tuple[int, ...]  # of one example
    weight: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def convolves(self) -> bool:
        """False for a matrix product."""
        return len(self.weight) > 2

    @property
    def output(self) -> tuple[int, ...]:
        """Shape of one example's output."""
        if not self.convolves:
            return (*self.shape[:-1], self.weight[0])
        sizes = zip(self.shape[1:], self.weight[2:], self.stride, self.padding, self.dilation, strict=True)
        return (self.weight[0], *((n + 2 * pad - far * (k - 1) - 1) // step + 1 for n, k, step, pad, far in sizes))


class Table:
    """Milliseconds of layers with `threads`, floats or by `numeric` integers; nothing is measured twice."""

    def __init__(self, threads: int = 1, batch: int = 1) -> None:
        self.threads, self.batch = threads, batch
        self.known: dict[tuple[Layer, Numeric | None], float] = {}

    def learn(self, layers: Iterable[Layer], numeric: Numeric | None = None) -> None:
        """Measure what is not known yet; what onnxruntime refuses stays unknown."""
        missing = [layer for layer in dict.fromkeys(layers) if (layer, numeric) not in self.known]
        for some in _portions(missing, self.batch):
            try:
                self._measure(some, numeric)
            except TrialFailure:
                for layer in some if len(some) > 1 else ():  # which of them it is
                    with suppress(TrialFailure):
                        self._measure([layer], numeric)

    def _measure(self, some: Sequence[Layer], numeric: Numeric | None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            model = network(some, self.batch, numeric)
            events = profile(model, self.threads, self.batch, SECONDS, Path(folder))
        took: defaultdict[int, list[float]] = defaultdict(list)
        for event in events:
            if event.get("cat") == "Node" and event["args"].get("op_name") in WEIGHTED:
                took[int(event["name"].partition("/")[0])].append(event["dur"] / 1e3)
        self.known |= {(some[index], numeric): fast(times) for index, times in took.items()}

    def ms(self, layer: Layer, numeric: Numeric | None = None) -> float | None:
        """None for a layer that was not measured."""
        return self.known.get((layer, numeric))


def _portions(layers: Iterable[Layer], batch: int) -> Iterator[list[Layer]]:
    """Files that are neither too large nor too slow to load."""
    held: list[Layer] = []
    weights = numbers = 0
    for layer in layers:
        more, here = prod(layer.weight), batch * (prod(layer.shape) + prod(layer.output))
        if held and (weights + more > WEIGHTS or numbers + here > VALUES):
            yield held
            held, weights, numbers = [], 0, 0
        held.append(layer)
        weights, numbers = weights + more, numbers + here
    if held:
        yield held


def network(layers: Iterable[Layer], batch: int, numeric: Numeric | None = None) -> bytes:
    """An ONNX file of these layers side by side, each with an input and an output of its own; node N is named N/..."""
    graph = _Graph(numeric)
    for index, layer in enumerate(layers):
        graph.add(str(index), layer, batch)
    made = helper.make_graph(graph.nodes, "layers", graph.inputs, graph.outputs, graph.constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    return model.SerializeToString()


class _Graph:
    def __init__(self, numeric: Numeric | None) -> None:
        self.numeric = numeric
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(0)

    def add(self, name: str, layer: Layer, batch: int) -> None:
        """Input, layer, output."""
        self.inputs.append(_value(f"{name}/x", (batch, *layer.shape)))
        self.outputs.append(_value(f"{name}/y", (batch, *layer.output)))
        weight = layer.weight if layer.convolves else layer.weight[::-1]
        given, answer = f"{name}/x", f"{name}/y"
        if self.numeric is None:
            self.constant(f"{name}/w", self.rng.standard_normal(weight, dtype=np.float32))
        else:
            given, answer = self.pair(f"{name}/x"), f"{name}/z"
            self.integers(f"{name}/w", weight, axis=0 if layer.convolves else 1)
        attributes: dict[str, Any] = {}
        if layer.convolves:
            pads = [*layer.padding, *layer.padding]
            attributes = {"strides": layer.stride, "pads": pads, "dilations": layer.dilation, "group": layer.groups}
        kind = "Conv" if layer.convolves else "MatMul"
        node = helper.make_node(kind, [given, f"{name}/w"], [answer], name=f"{name}/{kind}", **attributes)
        self.nodes.append(node)
        if self.numeric is not None:
            self.nodes += self.around(answer, f"{name}/y")

    def constant(self, name: str, values: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def pair(self, name: str) -> str:
        """Quantize and dequantize an activation; the name of what comes out."""
        self.nodes += self.around(name, f"{name}/q")
        return f"{name}/q"

    def around(self, name: str, answer: str) -> list[onnx.NodeProto]:
        assert self.numeric is not None
        scale = self.constant(f"{answer}/scale", np.array(0.05, np.float32))
        zero = self.constant(
            f"{answer}/zero",
            np.array(128, np.uint8) if self.numeric.activation == "uint8" else np.array(0, np.int8),
        )
        names = [f"{answer}/Quantize", f"{answer}/Dequantize"]
        return [
            helper.make_node("QuantizeLinear", [name, scale, zero], [f"{answer}/i"], name=names[0]),
            helper.make_node("DequantizeLinear", [f"{answer}/i", scale, zero], [answer], name=names[1]),
        ]

    def integers(self, name: str, shape: tuple[int, ...], axis: int) -> None:
        """A weight as integers, with a scale per output channel where the profile has it so."""
        assert self.numeric is not None
        signed = self.numeric.weight == "int8"
        low, kind = (-127, np.int8) if signed else (0, np.uint8)
        per_channel = self.numeric.per_channel
        scale = np.full(shape[axis] if per_channel else (), 0.01, np.float32)
        zero = np.full(shape[axis] if per_channel else (), 0 if signed else 128, kind)
        inputs = [
            self.constant(f"{name}/i", self.rng.integers(low, low + 255, shape).astype(kind)),
            self.constant(f"{name}/scale", scale),
            self.constant(f"{name}/zero", zero),
        ]
        along: dict[str, Any] = {"axis": axis} if per_channel else {}
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [name], name=f"{name}/Dequantize", **along))


def _value(name: str, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
