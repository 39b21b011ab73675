"""What one run of an ONNX file consists of, by kind of work: what a latency model is fitted to.

Read off the graph without weights: shapes, types, and where integers meet floats. An operation counts as an integer one
if its data come from a DequantizeLinear and all that reads its answer is QuantizeLinear, as onnxruntime fuses them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np
import onnx
from onnx import helper

from autocompress import onnxfile
from autocompress.graph import types_of

WEIGHTED = ("Conv", "Gemm", "MatMul")
FREE = frozenset(("Flatten", "Identity", "Squeeze", "Unsqueeze"))
MOVES = frozenset(("Reshape", "Transpose", "Slice", "Pad", "Concat", "Split", "Gather", "Expand"))
CURVES = frozenset(("HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "Erf", "Softmax", "Gelu", "Exp"))
LANES, WIDE, DEPTH = 16, 32, 4
"""Kernels work on so many output channels at once, or on twice as many, and integer ones on so many inputs."""


def amounts(model: bytes) -> dict[str, float]:
    """Kind of work -> amount in one run of one sample."""
    return _Graph(onnxfile.read(model, weights=False)).amounts()


class _Graph:
    """Shapes of tensors, who makes and who reads them."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.nodes = list(graph.node)
        self.weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        self.shapes = {
            name: tuple(axis.dim_value or 1 for axis in kind.shape.dim) for name, kind in types_of(model).items()
        }
        self.makers = {output: node for node in self.nodes for output in node.output}
        self.readers: defaultdict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)
        self.constants = set(self.weights)
        for node in self.nodes:
            if node.input and all(name in self.constants for name in node.input if name):
                self.constants.update(node.output)
        self.found: defaultdict[str, float] = defaultdict(float)

    def amounts(self) -> dict[str, float]:
        integers = {node.output[0] for node in self.nodes if self.is_integer(node)}
        for node in self.nodes:
            if node.output[0] in self.constants or node.op_type in FREE:
                continue
            if node.op_type == "QuantizeLinear":
                if node.input[0] not in integers:
                    self.border("to integers", node)
            elif node.op_type == "DequantizeLinear":
                readers = self.readers[node.output[0]]
                if not readers or any(one.output[0] not in integers for one in readers):
                    self.border("to floats", node)
            else:
                kind = "integer" if node.output[0] in integers else "float"
                if node.op_type in WEIGHTED and node.input[1] in self.constants:
                    self.weighted(node, kind)
                else:
                    self.other(node, kind)
        return {name: value for name, value in sorted(self.found.items()) if value > 0}

    def is_integer(self, node: onnx.NodeProto) -> bool:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            return False
        data = [name for name in node.input if name and name not in self.constants]
        asked = [*data, node.input[1]] if node.op_type in WEIGHTED else data
        from_integers = bool(data) and all(self.is_dequantized(name) for name in asked)
        readers = self.readers[node.output[0]]
        return from_integers and bool(readers) and all(one.op_type == "QuantizeLinear" for one in readers)

    def is_dequantized(self, name: str) -> bool:
        return name in self.makers and self.makers[name].op_type == "DequantizeLinear"

    def size(self, name: str) -> int:
        return int(np.prod(self.shapes.get(name, ())))

    def shape_of_weight(self, name: str) -> tuple[int, ...]:
        while name not in self.weights:
            name = self.makers[name].input[0]
        return self.weights[name]

    def add(self, what: str, **some: float) -> None:
        for unit, amount in some.items():
            self.found[f"{what}: {unit}"] += amount

    def border(self, what: str, node: onnx.NodeProto) -> None:
        self.add(what, nodes=1, numbers=self.size(node.output[0]))

    def other(self, node: onnx.NodeProto, kind: str) -> None:
        op = "moving" if node.op_type in MOVES else "curve" if node.op_type in CURVES else node.op_type
        read = sum(self.size(name) for name in node.input if name and name not in self.constants)
        self.add(f"{kind} {op}", nodes=1, numbers=max(read, self.size(node.output[0])))

    def weighted(self, node: onnx.NodeProto, kind: str) -> None:
        weight = list(self.shape_of_weight(node.input[1])) or [1]
        written = self.size(node.output[0])
        settings: dict[str, Any] = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        if node.op_type != "Conv" or len(weight) < 3:
            rows = max(written // max(weight[0] if settings.get("transB") else weight[-1], 1), 1)
            self.add(f"{kind} product", nodes=1, weights=math.prod(weight), macs=rows * math.prod(weight))
            return
        outputs, inputs, kernel = weight[0], weight[1], math.prod(weight[2:])
        places = written // max(outputs, 1)
        macs = places * outputs * inputs * kernel
        if settings.get("group", 1) > 1:
            self.add(f"{kind} depthwise", nodes=1, macs=macs, numbers=written)
            return
        if places == 1:
            self.add(f"{kind} product", nodes=1, weights=math.prod(weight), macs=macs)
            return
        name = f"{kind} convolution {'1x1' if kernel == 1 else 'wide'}"
        if kind == "float":
            blocked = outputs % 8 == 0 and (inputs % 4 == 0 or inputs < 4)  # onnxruntime's own layout takes these
            padded = places * kernel * _up(outputs, LANES) * _up(inputs, LANES)
            read = self.size(node.input[0])
            what = name if blocked else f"{name}, odd channels"
            self.add(what, nodes=1, macs=macs, padded=padded, numbers=written, read=read)
            return
        self.add(
            name,
            nodes=1,
            macs=macs,
            numbers=written,
            padded=places * _up(outputs, LANES) * _up(kernel * inputs, DEPTH),
            wide=places * _up(outputs, WIDE) * _up(kernel * inputs, DEPTH),
            unfolded=places * kernel * inputs,
            pieces=places * kernel,
            rows=places * math.ceil(outputs / LANES),
            tails=places * (outputs % LANES > 0),
        )


def _up(number: int, step: int) -> int:
    return math.ceil(number / step) * step
