"""Matrix products by a constant in other forms: activations rounded while running, or weights of four bits.

Each function gives the nodes and constants that take one product's place; the last node has the product's answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper
from onnxruntime.capi._pybind_state import quantize_matmul_4bits  # type: ignore[attr-defined]

from autocompress.ops.pairs import quantized_weight
from autocompress.ops.wiring import Wiring, constant, matrix
from autocompress.types import Numeric

MICROSOFT = "com.microsoft"
BLOCK = 32
"""Weights of a column that share a scale in four bits."""
ACCURACY = 4
"""MatMulNBits may compute with 8-bit activations inside: as fast as float on x86 with VNNI, faster where it is not."""


@dataclass(frozen=True)
class Form:
    """What takes a node's place."""

    nodes: tuple[onnx.NodeProto, ...]
    constants: tuple[onnx.TensorProto, ...]


def dynamic(wiring: Wiring, node: onnx.NodeProto, numeric: Numeric, channel: bool) -> Form:
    """8-bit product whose activations get their range from each batch: DynamicQuantizeLinear and MatMulInteger.

    onnxruntime fuses the nodes into DynamicQuantizeMatMul, or MatMulIntegerToFloat where several products read one
    activation.
    """
    source, answer, name = node.input[0], node.output[0], node.name
    integers, step, zero = quantized_weight(
        matrix(wiring, node), 1 if channel else None, numeric.weight, numeric.reduce_range, None
    )
    weight = node.input[1]
    names = [f"{weight}_quantized", f"{weight}_zero_point", f"{weight}_scale"]
    constants = [constant(one, two) for one, two in zip(names, (integers, zero, step), strict=True)]
    rounded = [f"{source}_dynamic", f"{source}_dynamic_scale", f"{source}_dynamic_zero_point"]
    bias = node.input[2] if len(node.input) > 2 and node.input[2] else ""
    product = f"{name}.product" if bias else answer
    nodes = [
        helper.make_node("DynamicQuantizeLinear", [source], rounded, f"{source}/dynamic"),
        helper.make_node("MatMulInteger", [rounded[0], names[0], rounded[2], names[1]], [f"{name}.integer"], name),
        helper.make_node("Cast", [f"{name}.integer"], [f"{name}.cast"], f"{name}/cast", to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", [rounded[1], names[2]], [f"{name}.scale"], f"{name}/scale"),
        helper.make_node("Mul", [f"{name}.cast", f"{name}.scale"], [product], f"{name}/rescale"),
    ]
    if bias:
        nodes.append(helper.make_node("Add", [product, bias], [answer], f"{name}/bias"))
    return Form(tuple(nodes), tuple(constants))


def four_bits(wiring: Wiring, node: onnx.NodeProto) -> Form:
    """Float product of a 4-bit weight: MatMulNBits, one scale and zero for every `BLOCK` weights of a column."""
    values = matrix(wiring, node)
    rows, columns = values.shape
    blocks = -(-rows // BLOCK)
    packed = np.zeros((columns, blocks, BLOCK // 2), np.uint8)
    scales = np.zeros((columns, blocks), np.float32)
    zeros = np.zeros((columns, -(-blocks // 2)), np.uint8)
    padded = np.pad(values, ((0, blocks * BLOCK - rows), (0, 0)))
    quantize_matmul_4bits(packed, padded, scales, zeros, BLOCK, columns, rows, False)
    name, weight = node.name, node.input[1]
    names = [f"{weight}_4bit", f"{weight}_scales", f"{weight}_zero_points"]
    constants = tuple(
        constant(one, two) for one, two in zip(names, (packed, scales.ravel(), zeros.ravel()), strict=True)
    )
    bias = node.input[2] if len(node.input) > 2 and node.input[2] else ""
    product = f"{name}.product" if bias else node.output[0]
    facts = {"K": rows, "N": columns, "bits": 4, "block_size": BLOCK, "accuracy_level": ACCURACY}
    nodes = [helper.make_node("MatMulNBits", [node.input[0], *names], [product], name, domain=MICROSOFT, **facts)]
    if bias:
        nodes.append(helper.make_node("Add", [product, bias], [node.output[0]], f"{name}/bias"))
    return Form(tuple(nodes), constants)


def narrow_floats(wiring: Wiring, node: onnx.NodeProto, kind: str) -> Form:
    """A layer in float16 or bfloat16, with casts around it; the runtime takes those between two such layers away."""
    wanted = onnx.TensorProto.FLOAT16 if kind == "float16" else onnx.TensorProto.BFLOAT16
    own = onnx.NodeProto()
    own.CopyFrom(node)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    for place, name in enumerate(node.input):
        if name in wiring.constants:
            constants.append(_narrow(f"{name}_{kind}", wiring.value(name), wanted))
            own.input[place] = f"{name}_{kind}"
        elif name:
            cast = f"{node.name}.input{place}_{kind}"
            nodes.append(helper.make_node("Cast", [name], [cast], f"{node.name}/cast{place}", to=wanted))
            own.input[place] = cast
    own.output[0] = f"{node.name}.{kind}"
    back = helper.make_node("Cast", [own.output[0]], [node.output[0]], f"{node.name}/back", to=onnx.TensorProto.FLOAT)
    return Form((*nodes, own, back), tuple(constants))


def _narrow(name: str, values: NDArray[np.float32], kind: int) -> onnx.TensorProto:
    narrow = values.astype(helper.tensor_dtype_to_np_dtype(kind))
    return helper.make_tensor(name, kind, list(values.shape), narrow.tobytes(), raw=True)
