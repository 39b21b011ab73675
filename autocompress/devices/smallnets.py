"""Small graphs of one kind each, in any type: what a survey times, and what tells wrong sums from right ones.

Weights are drawn from a fixed seed. Integers are written as quantize/dequantize pairs, as `ops.pairs` does.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto, helper, numpy_helper

Kind = Literal["float32", "u8s8", "s8s8", "float16", "bfloat16"]
INTEGERS: tuple[Kind, ...] = ("u8s8", "s8s8")
OPSET, IR = 17, 8
SIDE = 14  # of an image, in most graphs
TOKENS = 64
_NARROW = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
_ACTIVATIONS = {"u8s8": (np.uint8, 0, 128), "s8s8": (np.int8, -128, 0)}  # type, zero from 0 on, zero of both signs


class Net:
    """A graph as it grows: `at` is the last answer, `width` its channels. Layers take `at` and become it."""

    def __init__(self, kind: Kind, shape: tuple[int, ...], batch: int = 1, *, reduced: bool = False) -> None:
        self.kind: Kind = kind
        self.reduced = reduced
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(0)
        self.shape = (batch, *shape)
        self.width = shape[0] if len(shape) == 3 else shape[-1]
        self.at = "x"
        self.steps: dict[str, NDArray[Any]] = {}  # of rounded tensors
        if kind in _NARROW:
            self.at = self.node("Cast", ["x"], to=_NARROW[kind])
        elif kind in INTEGERS:
            self.at = self.pair("x", positive=False)

    def conv(self, width: int, kernel: int = 3, *, stride: int = 1, depthwise: bool = False, relu: bool = True) -> Net:
        """A convolution that keeps the size at stride 1, with a bias."""
        groups = self.width if depthwise else 1
        shape = (width, self.width // groups, kernel, kernel)
        weight = self.weight(shape, 0)
        inputs = [self.at, weight, self.bias(width, weight)]
        pad = kernel // 2
        self.at = self.node("Conv", inputs, strides=[stride] * 2, pads=[pad] * 4, group=groups)
        self.width = width
        if relu:
            self.at = self.node("Relu", [self.at])
        self.at = self.pair(self.at, positive=relu)
        return self

    def linear(self, width: int) -> Net:
        """A product of the last axis by a constant matrix."""
        self.at = self.pair(self.node("MatMul", [self.at, self.weight((self.width, width), 1)]), positive=False)
        self.width = width
        return self

    def plus(self, other: str) -> Net:
        """The sum with an earlier answer, and what is positive of it."""
        self.at = self.pair(self.node("Relu", [self.node("Add", [self.at, other])]), positive=True)
        return self

    def model(self) -> bytes:
        """The file."""
        if self.kind in _NARROW:
            self.at = self.node("Cast", [self.at], to=TensorProto.FLOAT)
        self.nodes.append(helper.make_node("Identity", [self.at], ["y"], "y"))
        given = helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)
        answer = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "small", [given], [answer], self.constants)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
        return onnx.shape_inference.infer_shapes(made).SerializeToString()  # some providers want every shape

    def node(self, operation: str, inputs: list[str], **attributes: Any) -> str:
        """Add a node; the name of its answer."""
        name = f"{operation}{len(self.nodes)}"
        self.nodes.append(helper.make_node(operation, inputs, [f"{name}.y"], name, **attributes))
        return f"{name}.y"

    def constant(self, values: ArrayLike) -> str:
        """Add a constant; its name."""
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def weight(self, shape: tuple[int, ...], axis: int) -> str:
        """A weight that neither blows up nor fades what passes it; integers have a scale per slice of `axis`."""
        values = self.rng.standard_normal(shape) * np.sqrt(2.0 * shape[axis] / np.prod(shape))
        if self.kind not in INTEGERS:
            return self._floats(values)
        most = 64 if self.reduced else 127
        others = tuple(place for place in range(len(shape)) if place != axis)
        step = (np.abs(values).max(axis=others, keepdims=True) / most).astype(np.float32)
        return self.restored(np.clip(np.rint(values / step), -most, most).astype(np.int8), step.ravel(), axis)

    def bias(self, width: int, weight: str) -> str:
        """A bias, whose integers have 32 bits and the step of the products: else onnxruntime keeps it all in floats."""
        if self.kind not in INTEGERS:
            return self._floats(self.rng.standard_normal(width) * 0.1)
        return self.restored(np.zeros(width, np.int32), self.steps[weight] * self.steps[self.at], 0)

    def _floats(self, values: NDArray[Any]) -> str:
        name, wanted = f"c{len(self.constants)}", _NARROW.get(self.kind, TensorProto.FLOAT)
        narrow = values.astype(helper.tensor_dtype_to_np_dtype(wanted))
        self.constants.append(helper.make_tensor(name, wanted, list(values.shape), narrow.tobytes(), raw=True))
        return name

    def restored(self, integers: NDArray[Any], step: NDArray[Any], axis: int) -> str:
        """Constant integers that are read as floats."""
        names = [self.constant(integers), self.constant(step)]
        if integers.dtype != np.int32:
            names.append(self.constant(np.zeros_like(step, integers.dtype)))
        name = self.node("DequantizeLinear", names, axis=axis)
        self.steps[name] = step
        return name

    def pair(self, name: str, *, positive: bool) -> str:
        """Round an activation to eight bits, where the kind is of integers; the name of what comes out."""
        if self.kind not in INTEGERS:
            return name
        dtype, from_zero, both = _ACTIVATIONS[self.kind]
        return self.rounded(name, (4.0 if positive else 8.0) / 255, np.array(from_zero if positive else both, dtype))

    def rounded(self, name: str, step: float, zero: NDArray[Any]) -> str:
        """Quantize and dequantize an activation."""
        names = [self.constant(np.array(step, np.float32)), self.constant(zero)]
        answer = self.node("DequantizeLinear", [self.node("QuantizeLinear", [name, *names]), *names])
        self.steps[answer] = np.array(step, np.float32)
        return answer


# --- what is timed --------------------------------------------------------------------------------------------------


def convolutions(kind: Kind, batch: int = 1, width: int = 64, count: int = 2) -> bytes:
    """3x3 convolutions in a row, all of one width."""
    net = Net(kind, (width, SIDE, SIDE), batch)
    for _ in range(count):
        net.conv(width)
    return net.model()


def separable(kind: Kind, batch: int = 1) -> bytes:
    """Depthwise 3x3 and pointwise convolutions in turn, 96 channels."""
    net = Net(kind, (96, SIDE, SIDE), batch)
    for _ in range(2):
        net.conv(96, depthwise=True).conv(96, 1)
    return net.model()


def linears(kind: Kind, batch: int = 1) -> bytes:
    """Two products of 64 tokens by 256 x 256 matrices."""
    return Net(kind, (TOKENS, 256), batch).linear(256).linear(256).model()


def residual(kind: Kind, batch: int = 1) -> bytes:
    """A small residual network on 32 x 32 images: stem, three stages of one block, average, classifier."""
    net = Net(kind, (3, 32, 32), batch).conv(16)
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        before, channels = net.at, net.width
        net.conv(width, stride=stride).conv(width, relu=False)
        after, shortcut = net.at, before
        if stride > 1:
            net.at, net.width = before, channels
            shortcut = net.conv(width, 1, stride=stride, relu=False).at
        net.at = after
        net.plus(shortcut)
    net.at = net.pair(net.node("GlobalAveragePool", [net.at]), positive=True)
    net.at = net.node("Flatten", [net.at])
    return net.linear(10).model()


TYPICAL = {
    "3x3 convolutions": convolutions,
    "depthwise + pointwise": separable,
    "linear layers": linears,
    "a small residual network": residual,
}


def factored(kind: Kind, form: Literal["linear", "1x1"], rank: int, batch: int = 1) -> bytes:
    """A linear layer of 256 x 256 or a 1x1 convolution of 128 channels by two factors; rank 0: the layer itself."""
    if form == "linear":
        net = Net(kind, (TOKENS, 256), batch)
        return (net.linear(rank).linear(256) if rank else net.linear(256)).model()
    net = Net(kind, (128, SIDE, SIDE), batch)
    return (net.conv(rank, 1, relu=False).conv(128, 1) if rank else net.conv(128, 1)).model()


FULL_RANK = {"linear": 256, "1x1": 128}


def nothing() -> bytes:
    """One negation of one number: what a run costs that computes nothing."""
    net = Net("float32", (1,))
    net.at = net.node("Neg", ["x"])
    return net.model()


def sums(kind: Kind, form: Literal["linear", "1x1"], *, reduced: bool, expected: float = 1.0) -> bytes:
    """A file that runs where large 8-bit products are summed right and is refused by the runtime where they are not.

    All activations are at the top of their range, all weights at theirs, so two neighbouring products exceed 16 bits
    signed. The answer is compared with what is `expected` (1 is right); if it is off by more than a twentieth, a
    Gather beyond its table ends the run. So a device needs no more than to tell whether a file runs.
    """
    width = 64
    net = Net(kind, (width, 4, 4) if form == "1x1" else (4, width), 1, reduced=reduced)
    top, most = (255 if kind == "u8s8" else 127), (64 if reduced else 127)
    ones = net.node("Add", [net.node("Mul", ["x", net.constant(np.float32(0))]), net.constant(np.float32(1))])
    zero = np.array(0, _ACTIVATIONS[net.kind][0])
    rounded = net.rounded(ones, 1.0 / top, zero)
    shape, axis = ((width, width, 1, 1), 0) if form == "1x1" else ((width, width), 1)
    step = np.full(width, 1.0 / (most * width), np.float32)
    weight = net.restored(np.full(shape, most, np.int8), step, axis)
    answer = net.node("Conv" if form == "1x1" else "MatMul", [rounded, weight])
    last = net.rounded(answer, 1.0 / top, zero)
    off = net.node("Abs", [net.node("Sub", [last, net.constant(np.float32(expected))])])
    wrong = net.node("Greater", [net.node("ReduceMax", [off], keepdims=0), net.constant(np.float32(0.05))])
    place = net.node("Cast", [wrong], to=TensorProto.INT64)
    net.at = net.node("Gather", [net.constant(np.zeros(1, np.float32)), place])
    return net.model()
