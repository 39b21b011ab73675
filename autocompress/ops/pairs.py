"""Quantize/dequantize pairs around integer nodes: what onnxruntime makes integer kernels of.

Equal graphs, ranges and settings give equal bytes. Float nodes compute on exact values wherever those are float.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from autocompress.graph import replace
from autocompress.ops import fourbits
from autocompress.ops.integers import HARD, Plan
from autocompress.ops.wiring import Wiring, attributes, constant, out_axis
from autocompress.types import Numeric, UserError

Range = tuple[float, float]
"""Smallest and largest value of an activation."""
_STEPS = {"int8": (-128, 127, np.int8), "uint8": (0, 255, np.uint8)}
INT32 = 2.0**31 - 1
FILLED = 4  # channels that integer convolutions take at once


@dataclass(frozen=True)
class Scale:
    """real = (integer - zero) * step."""

    step: np.float32
    zero: np.generic

    @classmethod
    def of(cls, span: Range, kind: str) -> Scale:
        """The scale of a range, zero always being exact in it; a range of no width has step 1."""
        least, most, dtype = _STEPS[kind]
        low, high = min(span[0], 0.0), max(span[1], 0.0)
        step = np.float32((high - low) / (most - least))
        if not step > np.finfo(np.float32).tiny:
            return cls(np.float32(1.0), dtype(0 if kind == "uint8" or low == 0.0 == high else least))
        return cls(step, dtype(np.clip(np.rint(least - low / step), least, most)))


def quantized_weight(
    values: NDArray[np.float32],
    axis: int | None,
    kind: str,
    reduced: bool,
    least_step: NDArray[np.float64] | None,
    four_bits: bool = False,
) -> tuple[NDArray[np.generic], NDArray[np.float32], NDArray[np.generic]]:
    """Integers, steps and zeros of a weight, per slice of `axis` or for all of it; int8 is symmetric.

    `least_step` is what the bias needs: its integers have the weight's step times the input's and 32 bits. `four_bits`,
    for int8, takes fewer and wider steps.
    """
    others = tuple(place for place in range(values.ndim) if place != axis) if axis is not None else None
    low = np.minimum(values.min(axis=others), 0.0).astype(np.float64)
    high = np.maximum(values.max(axis=others), 0.0).astype(np.float64)
    if kind == "int8":
        least, most = (-64, 64) if reduced else (-127, 127)
        high = np.maximum(-low, high)
        if four_bits:
            least, most, high = -fourbits.MOST, fourbits.MOST, fourbits.largest(values, others)
        low = -high
    else:
        least, most = (0, 127) if reduced else (0, 255)
    step = (high - low) / (most - least)
    if least_step is not None:
        step = np.maximum(step, least_step if axis is not None else least_step.max())
    step = np.where(step > np.finfo(np.float32).tiny, step, 1.0).astype(np.float32)
    dtype = _STEPS[kind][2]
    zero = (
        np.clip(np.rint(least - low / step), least, most).astype(dtype)
        if kind != "int8"
        else np.zeros_like(step, dtype)
    )
    wide = [1] * values.ndim
    if axis is not None:
        wide[axis] = -1
    integers = np.rint(values / step.reshape(wide if axis is not None else ())) + zero.reshape(
        wide if axis is not None else ()
    )
    return np.clip(integers, least, most).astype(dtype), step, zero


@dataclass
class _Writing:
    """The graph as it is written, node after node."""

    plan: Plan
    numeric: Numeric
    scales: Mapping[str, Scale]
    channels: Mapping[str, bool]  # node -> whether its weight has a scale per channel
    four_bits: frozenset[str] = frozenset()  # nodes whose weights lie in four bits
    bare: bool = False  # nothing packed, nothing filled up
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    rounded: dict[str, str] = field(default_factory=dict)  # tensor -> its dequantized form
    weights: dict[str, tuple[str, NDArray[np.float32]]] = field(default_factory=dict)

    def walk(self) -> None:
        wiring, tensors = self.plan.wiring, frozenset(self.plan.tensors)
        for name in wiring.inputs:
            if name in tensors:
                self.pair(name, name, f"{name}.rounded")
        vanishing = self.plan.vanishing
        gone = {wiring.readers[before][0].name for before in vanishing}
        for original in wiring.model.graph.node:
            if original.name in gone:
                continue
            if original.op_type in HARD and original.name in self.plan.members:
                self.hard(original)
                continue
            if original.op_type == "Pad" and original.name in self.plan.members:
                self.padded(original)
                continue
            node = onnx.NodeProto()
            node.CopyFrom(original)
            if node.name in self.plan.members:
                self.integer_inputs(node, original)
            else:
                self.float_inputs(node, original)
            self.nodes.append(node)
            for place, name in enumerate(original.output):
                name = vanishing.get(name, name)  # noqa: PLW2901
                if name not in tensors:
                    node.output[place] = name
                elif self.plan.made(name):  # everyone reads the rounded form, under the tensor's own name
                    node.output[place] = raw(name)
                    self.pair(name, raw(name), name)
                else:
                    node.output[place] = name
                    self.pair(name, name, f"{name}.rounded")

    def pair(self, tensor: str, source: str, restored: str) -> None:
        """Round `source` with the scale of `tensor`."""
        scale = self.scales[self.plan.shared.get(tensor, tensor)]
        self.constants += [constant(f"{tensor}_scale", scale.step), constant(f"{tensor}_zero_point", scale.zero)]
        names = [f"{tensor}_scale", f"{tensor}_zero_point"]
        integers = f"{tensor}_quantized"
        self.nodes.append(helper.make_node("QuantizeLinear", [source, *names], [integers], f"{tensor}/quantize"))
        self.nodes.append(helper.make_node("DequantizeLinear", [integers, *names], [restored], f"{tensor}/dequantize"))
        self.rounded[tensor] = restored

    def hard(self, node: onnx.NodeProto) -> None:
        """HardSigmoid(x) = min(max(alpha x + beta, 0), 1): x + beta / alpha, saturated, read with a smaller step.

        HardSwish(x) = x HardSigmoid(x), alpha 1/6, beta 1/2.
        """
        found = attributes(node) if node.op_type == "HardSigmoid" else {"alpha": 1 / 6, "beta": 0.5}
        alpha, beta = found.get("alpha", 0.2), found.get("beta", 0.5)
        source, answer, name = self.rounded[node.input[0]], node.output[0], node.name
        whole, gate = Scale.of((0.0, 1.0 / alpha), self.numeric.activation), f"{name}.gate"
        offset = np.float32(beta / alpha)
        least, most, dtype = _STEPS[self.numeric.activation]
        own = Scale.of((min(0.0, float(offset)), max(0.0, float(offset))), self.numeric.activation)
        integer = np.asarray(np.clip(np.rint(offset / own.step) + own.zero, least, most), dtype)
        self.dequantized(f"{name}.offset", integer, np.asarray(own.step), np.asarray(own.zero), None)
        unit = Scale.of((0.0, 1.0), self.numeric.activation)
        names = [f"{gate}_scale_in", f"{gate}_scale", f"{gate}_zero_point"]
        self.constants += [
            constant(one, two) for one, two in zip(names, (whole.step, unit.step, unit.zero), strict=True)
        ]
        restored = answer if node.op_type == "HardSigmoid" else f"{gate}.rounded"
        self.nodes += [
            helper.make_node("Add", [source, self.rounded[f"{name}.offset"]], [raw(gate)], f"{name}/offset"),
            helper.make_node(
                "QuantizeLinear", [raw(gate), names[0], names[2]], [f"{gate}_quantized"], f"{gate}/quantize"
            ),
            helper.make_node("DequantizeLinear", [f"{gate}_quantized", *names[1:]], [restored], f"{gate}/dequantize"),
        ]
        if node.op_type == "HardSigmoid":
            self.rounded[answer] = answer
        else:
            self.nodes.append(helper.make_node("Mul", [source, restored], [raw(answer)], name))
            self.pair(answer, raw(answer), answer)

    def padded(self, original: onnx.NodeProto) -> None:
        """A Pad on the integers themselves: the runtime has no integer form of one between roundings."""
        source, answer = original.input[0], original.output[0]
        scale = self.scales[self.plan.shared.get(source, source)]
        names = [f"{answer}_scale", f"{answer}_zero_point"]
        self.constants += [constant(names[0], scale.step), constant(names[1], scale.zero)]
        node = onnx.NodeProto()
        node.CopyFrom(original)
        replace(node.input, [self.integers(source), original.input[1], names[1], *original.input[3:]])
        node.output[0] = f"{answer}_quantized"
        self.nodes += [
            node,
            helper.make_node("DequantizeLinear", [node.output[0], *names], [answer], f"{answer}/dequantize"),
        ]
        self.rounded[answer] = answer

    def filled(self, node: onnx.NodeProto, source: str, missing: int) -> None:
        """Channels of nothing beside a layer's own, `missing` many: its integer kernel takes them in fours.

        An image's three channels cost the first layer of a small network half of its time, of a large one a quarter.
        """
        names = [f"{source}_scale", f"{source}_zero_point"]
        own, pads = f"{node.name}.filled", f"{node.name}.fill"
        self.constants.append(constant(pads, np.array([0, 0, 0, 0, 0, missing, 0, 0], np.int64)))
        self.nodes += [
            helper.make_node("Pad", [self.integers(source), pads, names[1]], [f"{own}_quantized"], f"{node.name}/fill"),
            helper.make_node("DequantizeLinear", [f"{own}_quantized", *names], [own], f"{own}/dequantize"),
        ]
        node.input[0] = own

    def integer_inputs(self, node: onnx.NodeProto, original: onnx.NodeProto) -> None:
        weighted = node.name in self.channels
        joint = not weighted and len(node.input) > 1 and original.op_type in ("Add", "Mul", "Concat")
        for place, name in enumerate(original.input):
            if name in self.rounded and (place == 0 or joint):
                node.input[place] = self.rounded[name]
            elif joint and name in self.plan.wiring.constants:
                node.input[place] = self.operand(name)
        if weighted:
            self.weight_and_bias(node, original)

    def operand(self, name: str) -> str:
        """A constant that is added, multiplied or joined: integers of the activations' type."""
        if name not in self.rounded:
            values = self.plan.wiring.value(name)
            scale = Scale.of((float(values.min(initial=0.0)), float(values.max(initial=0.0))), self.numeric.activation)
            least, most, dtype = _STEPS[self.numeric.activation]
            integers = np.clip(np.rint(values / scale.step) + scale.zero, least, most).astype(dtype)
            self.dequantized(name, integers, np.asarray(scale.step), np.asarray(scale.zero), None)
        return self.rounded[name]

    def integers(self, tensor: str) -> str:
        """The name of a rounded tensor's integers."""
        restored = self.rounded[tensor]
        return next(node.input[0] for node in reversed(self.nodes) if node.output[0] == restored)

    def weight_and_bias(self, node: onnx.NodeProto, original: onnx.NodeProto) -> None:
        wiring = self.plan.wiring
        weight, bias = original.input[1], original.input[2] if len(original.input) > 2 else ""
        source = original.input[0]
        step_in = float(self.scales[self.plan.shared.get(source, source)].step)
        offsets = wiring.value(bias).astype(np.float64) if bias else None
        if offsets is not None and original.op_type == "Gemm":
            offsets = offsets * attributes(original).get("beta", 1.0)
            replace(node.attribute, [one for one in node.attribute if one.name != "beta"])
        axis = out_axis(original) if self.channels[node.name] else None
        if missing := 0 if self.bare else unfilled(original, wiring):
            self.filled(node, source, missing)
        if weight not in self.weights:
            least = None if offsets is None else 1.0001 * np.abs(offsets) / (INT32 * step_in)
            values = wiring.value(weight)
            if least is not None and least.shape != (values.shape[out_axis(original)],):
                least = np.full(values.shape[out_axis(original)], least.max())
            narrow = node.name in self.four_bits
            integers, step, zero = quantized_weight(
                values, axis, self.numeric.weight, self.numeric.reduce_range, least, narrow
            )
            if missing:
                integers = np.pad(integers, ((0, 0), (0, missing), (0, 0), (0, 0)))
            self.dequantized(weight, integers, step, zero, axis)
            if narrow and not self.bare:
                self.pack(weight, integers)
            self.weights[weight] = (self.rounded[weight], step)
        node.input[1], step = self.weights[weight]
        if offsets is None:
            return
        step = np.broadcast_to(step * np.float32(step_in), offsets.shape if step.ndim else ())
        integers = np.clip(np.rint(offsets / step), -INT32, INT32).astype(np.int32)
        name = f"{node.name}.bias"
        names = [f"{name}_quantized", f"{name}_scale"]
        self.constants += [constant(names[0], integers), constant(names[1], step)]
        axes: dict[str, Any] = {"axis": 0} if step.ndim else {}
        restore = helper.make_node("DequantizeLinear", names, [f"{name}.rounded"], f"{name}/dequantize", **axes)
        self.nodes.append(restore)
        node.input[2] = restore.output[0]

    def dequantized(
        self,
        name: str,
        integers: NDArray[np.generic],
        step: NDArray[np.float32],
        zero: NDArray[np.generic],
        axis: int | None,
    ) -> None:
        """Write a constant as integers that are read as floats."""
        names = [f"{name}_quantized", f"{name}_scale", f"{name}_zero_point"]
        self.constants += [constant(one, two) for one, two in zip(names, (integers, step, zero), strict=True)]
        axes: dict[str, Any] = {} if axis is None else {"axis": axis}
        restored = f"{name}.rounded"
        self.nodes.append(helper.make_node("DequantizeLinear", names, [restored], f"{name}/dequantize", **axes))
        self.rounded[name] = restored

    def pack(self, weight: str, integers: NDArray[Any]) -> None:
        """Two integers to a byte in the place of those just written; the runtime unpacks them as it loads the file.

        In operations of any opset from 11 on, folded before integer kernels are looked for; a tensor of type int4 and
        a Cast are shorter, but need opset 21 and a runtime that casts them.
        """
        name, packed = f"{weight}_quantized", f"{weight}{fourbits.PACKED}"
        self.constants = [one for one in self.constants if one.name != name]
        self.constants.append(constant(packed, fourbits.packed(integers)))
        self.constants += [
            constant("fourbits.shift", np.uint8(4)),
            constant("fourbits.base", np.uint8(16)),
            constant("fourbits.zero", np.int32(8)),
        ]
        steps: tuple[tuple[str, list[str], dict[str, Any]], ...] = (
            ("BitShift", [packed, "fourbits.shift"], {"direction": "RIGHT"}),
            ("Mod", [packed, "fourbits.base"], {}),
            ("Concat", [f"{weight}/0", f"{weight}/1"], {"axis": 0}),
            ("Cast", [f"{weight}/2"], {"to": onnx.TensorProto.INT32}),
            ("Sub", [f"{weight}/3", "fourbits.zero"], {}),
            ("Cast", [f"{weight}/4"], {"to": onnx.TensorProto.INT8}),
        )
        restoring = self.nodes.pop()  # the one that reads them
        for n, (kind, inputs, settings) in enumerate(steps):
            answer = name if n == len(steps) - 1 else f"{weight}/{n}"
            self.nodes.append(helper.make_node(kind, inputs, [answer], f"{weight}/unpack{n}", **settings))
        self.nodes.append(restoring)

    def float_inputs(self, node: onnx.NodeProto, original: onnx.NodeProto) -> None:
        """Keep a float layer float that reads an integer one's answer.

        onnxruntime (from 1.20, WeightBiasQuantization) quantizes its weights by itself, one scale for all channels,
        where it stands between integer ones; it does not where the dequantized input has a scale per channel, so it
        gets equal ones.
        """
        source = original.input[0] if original.input else ""
        known = source in self.rounded and self.plan.made(source)
        if not known or original.op_type not in ("Conv", "ConvTranspose", "Gemm"):
            return
        dims = (
            self.plan.wiring.constants[original.input[1]].dims
            if original.input[1] in self.plan.wiring.constants
            else ()
        )
        if not dims:
            return
        found = attributes(original)
        if original.op_type == "Conv":
            channels = dims[1] * found.get("group", 1)
        else:
            channels = dims[1] if original.op_type == "Gemm" and found.get("transB", 0) else dims[0]
        scale = self.scales[self.plan.shared.get(source, source)]
        names = [f"{node.name}.input_scale", f"{node.name}.input_zero_point"]
        self.constants += [
            constant(name, np.full(channels, value))
            for name, value in zip(names, (scale.step, scale.zero), strict=True)
        ]
        own = f"{node.name}.input"
        self.nodes.append(
            helper.make_node("DequantizeLinear", [self.integers(source), *names], [own], f"{own}/dequantize", axis=1)
        )
        node.input[0] = own


def unfilled(node: onnx.NodeProto, wiring: Wiring) -> int:
    """Channels that an image's first convolution lacks to FILLED; none where it has as many, or is in groups."""
    dims = wiring.constants[node.input[1]].dims
    image = node.op_type == "Conv" and len(dims) == 4 and attributes(node).get("group", 1) == 1
    return FILLED - dims[1] if image and dims[1] < FILLED else 0


def raw(tensor: str) -> str:
    """What a layer gives before it is rounded, where `tensor` is the rounded form."""
    return f"{tensor}.raw"


def with_pairs(
    plan: Plan,
    ranges: Mapping[str, Range],
    numeric: Numeric,
    channels: Mapping[str, bool],
    four_bits: frozenset[str] = frozenset(),
    *,
    bare: bool = False,
) -> onnx.ModelProto:
    """The plan's graph with pairs. `ranges` by receipt key; `channels` says per weighted node how fine its scales are.

    `four_bits`: nodes whose weights lie in four bits. `bare`: it answers the same, each node with the shapes of floats.
    Raises UserError if a range is missing.
    """
    missing = sorted(set(plan.keys) - set(ranges))
    if missing:
        raise UserError(f"quantize: the receipt has no range for {missing[0]!r}, so it is of another network")
    scales: dict[str, Scale] = {}
    for key, tensor in plan.keys.items():
        low, high = plan.bounds(tensor)
        maker = plan.wiring.makers.get(tensor)
        if maker is not None and maker.op_type == "HardSigmoid" and maker.name in plan.members:
            scales[tensor] = Scale.of((0.0, 1.0), numeric.activation)
            continue
        scales[tensor] = Scale.of((max(ranges[key][0], low), min(ranges[key][1], high)), numeric.activation)
    writing = _Writing(plan, numeric, scales, channels, four_bits, bare)
    writing.walk()
    used = {name for node in writing.nodes for name in node.input} | plan.wiring.outputs
    nodes = [one for one in writing.nodes if one.op_type != "DequantizeLinear" or one.output[0] in used]
    return rebuilt(plan.wiring.model, nodes, writing.constants)


def rebuilt(
    model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto], added: Iterable[onnx.TensorProto]
) -> onnx.ModelProto:
    """A graph of the same inputs and outputs with other nodes; constants that nothing reads are left out."""
    fresh = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    fresh.producer_name, fresh.producer_version = model.producer_name, model.producer_version
    graph = fresh.graph
    graph.name = model.graph.name
    graph.node.extend(nodes)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    own = {tensor.name: tensor for tensor in added if tensor.name in used}
    graph.initializer.extend(one for one in model.graph.initializer if one.name in used and one.name not in own)
    graph.initializer.extend(own.values())
    return fresh
