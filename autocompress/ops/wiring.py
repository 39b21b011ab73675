"""Who makes and who reads every tensor of an ONNX graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from autocompress.onnxfile import read

PRODUCTS = ("Gemm", "MatMul")
WEIGHTED = ("Conv", "ConvTranspose", *PRODUCTS)


class Wiring:
    """A graph that is looked at, not changed: `model` belongs to it alone."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes: Mapping[str, onnx.NodeProto] = {node.name: node for node in model.graph.node}
        self.constants: Mapping[str, onnx.TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        self.makers: Mapping[str, onnx.NodeProto] = {name: node for node in model.graph.node for name in node.output}
        self.inputs = tuple(value.name for value in model.graph.input if value.name not in self.constants)
        self.outputs = frozenset(value.name for value in model.graph.output)

    @classmethod
    def of(cls, model: bytes) -> Wiring:
        """The graph of a file."""
        return cls(read(model))

    @cached_property
    def readers(self) -> Mapping[str, tuple[onnx.NodeProto, ...]]:
        """Nodes that read a tensor, one that reads it twice is there twice."""
        found: defaultdict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.model.graph.node:
            for name in node.input:
                found[name].append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    def sole_reader(self, name: str) -> onnx.NodeProto | None:
        """The one node that reads a tensor, None if there are several or the network answers with it."""
        readers = self.readers.get(name, ())
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def value(self, name: str) -> NDArray[Any]:
        """A constant's values."""
        return numpy_helper.to_array(self.constants[name])

    def bias(self, node: onnx.NodeProto) -> str:
        """The constant that is added to a weighted node's answer, "" where there is none: its own, or an Add's after.

        A matrix product's is one value per column.
        """
        if node.op_type in ("Conv", "ConvTranspose", "Gemm"):
            name = node.input[2] if len(node.input) > 2 else ""
            return name if name in self.constants else ""
        adding = self.sole_reader(node.output[0])
        if adding is None or adding.op_type != "Add":
            return ""
        name = adding.input[1] if adding.input[0] == node.output[0] else adding.input[0]
        columns = self.constants[node.input[1]].dims[-1]
        return name if name in self.constants and list(self.constants[name].dims) == [columns] else ""


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes by name."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def constant(name: str, values: NDArray[Any] | np.generic) -> onnx.TensorProto:
    """An initializer; equal values give equal bytes."""
    return numpy_helper.from_array(np.ascontiguousarray(values) if np.ndim(values) else np.asarray(values), name)


def out_axis(node: onnx.NodeProto) -> int:
    """The axis of a weighted node's weight that its answer's channels come from."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attributes(node).get("transB", 0)):
        return 0
    return 1


def channel_axis(node: onnx.NodeProto) -> int:
    """The axis of a weighted node's answer that has the channels."""
    return -1 if node.op_type in PRODUCTS else 1


def product_refusal(wiring: Wiring, node: onnx.NodeProto) -> str:
    """Why a node is no matrix product by a constant, "" if it is one."""
    if node.op_type not in PRODUCTS:
        return f"{node.op_type} is no matrix product"
    weight = wiring.constants.get(node.input[1])
    if weight is None or len(weight.dims) != 2 or weight.data_type != onnx.TensorProto.FLOAT:
        return "its weight is no constant matrix of floats"
    if node.op_type == "Gemm":
        found = attributes(node)
        plain = not found.get("transA", 0) and found.get("alpha", 1.0) == 1.0 and found.get("beta", 1.0) == 1.0
        if not plain or (len(node.input) > 2 and node.input[2] and not wiring.bias(node)):
            return "its Gemm is scaled, transposed or adds what is no constant"
    return ""


def matrix(wiring: Wiring, node: onnx.NodeProto) -> NDArray[np.float32]:
    """A product's weight as (inputs, outputs)."""
    values = wiring.value(node.input[1])
    return np.ascontiguousarray(values.T if node.op_type == "Gemm" and attributes(node).get("transB", 0) else values)
