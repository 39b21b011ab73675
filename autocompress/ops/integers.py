"""Which nodes of an ONNX graph compute with integers, and the quantize/dequantize pairs that make them.

The pairs are onnxruntime.quantization's, from ranges that are given. Two things of it are put right here: float nodes
stay exact, and the last matrix product answers in floats.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import numpy_helper, shape_inference
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import TensorData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import add_dequant_output_suffix, add_infer_metadata

from autocompress.types import Numeric, UserError

if TYPE_CHECKING:
    from autocompress.export import Part

MOVERS = frozenset(("Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Pad", "Split"))
FOLLOWERS = MOVERS | frozenset(
    ("Relu", "Clip", "LeakyRelu", "Sigmoid", "MaxPool", "AveragePool", "GlobalAveragePool", "Resize")
)
"""One activation goes in: integer where that one is."""
JOINTS = frozenset(("Add", "Mul", "Concat"))
"""Several activations go in: integer where most of the activations around them are."""
VANISHING = frozenset(("Relu", "Clip"))
"""Become the saturation of the integer that the layer before them gives."""

_TYPES = {"int8": QuantType.QInt8, "uint8": QuantType.QUInt8}

Range = tuple[float, float]
"""Smallest and largest value of an activation."""


@dataclass(frozen=True)
class Plan:
    """The nodes of a part's graph that will compute with integers, in graph order."""

    model: onnx.ModelProto
    by_name: Mapping[str, onnx.NodeProto]
    constants: frozenset[str]
    nodes: tuple[str, ...]

    @classmethod
    def read(cls, part: Part, nodes: tuple[str, ...]) -> Plan:
        """A plan that is known already."""
        model = onnx.load_model_from_string(part.model)
        constants = frozenset(tensor.name for tensor in model.graph.initializer)
        return cls(model, {node.name: node for node in model.graph.node}, constants, nodes)

    @classmethod
    def of(cls, part: Part, seeds: set[str]) -> Plan:
        """The seeds and whatever lies well between them, to a fixed point."""
        plan = cls.read(part, ())
        integer = set(seeds)
        tensors = {name for seed in seeds for name in plan.around(plan.by_name[seed])}
        growing = bool(seeds)
        while growing:
            growing = False
            for node in plan.model.graph.node:
                if node.name in integer:
                    continue
                around = plan.around(node)
                follows = node.op_type in FOLLOWERS and node.input[0] in tensors
                joins = node.op_type in JOINTS and 2 * sum(name in tensors for name in around) > len(around)
                if follows or joins:
                    integer.add(node.name)
                    tensors.update(around)
                    growing = True
        return replace(plan, nodes=tuple(node.name for node in plan.model.graph.node if node.name in integer))

    def around(self, node: onnx.NodeProto) -> list[str]:
        """Activations in and out of a node, the constants and shapes among its inputs left out."""
        inputs = node.input if node.op_type in JOINTS else node.input[:1]
        return [name for name in (*inputs, *node.output) if name and name not in self.constants]

    def wanted(self) -> dict[str, str]:
        """Receipt key -> tensor, for every integer activation: `<node>:output` of its producer, else `<user>:input`.

        Left out are what only feeds a node that vanishes (it takes that node's range) and answers, which stay float.
        """
        tensors = {name for node in self.nodes for name in self.around(self.by_name[node])}
        tensors -= {*self.vanishing(), *self.answers()}
        keys: dict[str, str] = {}
        for node in self.model.graph.node:
            for place, name in enumerate(node.output):
                if name in tensors:
                    keys[f"{node.name}:output" if place == 0 else f"{node.name}:output{place}"] = name
        made = set(keys.values())
        for node in self.model.graph.node:
            for name in node.input:
                if name in tensors and name not in made:
                    made.add(name)
                    keys[f"{node.name}:input"] = name
        return keys

    def answers(self) -> list[str]:
        """Outputs of the part that a matrix product gives as floats: its last step is exact and no slower."""
        outputs = {output.name for output in self.model.graph.output}
        products = [self.by_name[name] for name in self.nodes if self.by_name[name].op_type in ("Gemm", "MatMul")]
        return [node.output[0] for node in products if node.output[0] in outputs]

    def vanishing(self) -> dict[str, str]:
        """Tensor before a ReLU or Clip that nothing else reads -> the tensor after it."""
        users: dict[str, int] = {}
        for node in self.model.graph.node:
            for name in node.input:
                users[name] = users.get(name, 0) + 1
        outputs = {output.name for output in self.model.graph.output}
        before: dict[str, str] = {}
        made = {name for node in self.model.graph.node for name in node.output}
        for name in self.nodes:
            node = self.by_name[name]
            source = node.input[0]
            if node.op_type in VANISHING and users[source] == 1 and source in made - outputs:
                before[source] = node.output[0]
        return before


def with_pairs(plan: Plan, ranges: Mapping[str, Range], numeric: Numeric) -> bytes:
    """The part's file with pairs around the plan's nodes. Raises UserError if a range is missing."""
    keys = plan.wanted()
    missing = sorted(set(keys) - set(ranges))
    if missing:
        raise UserError(f"quantize: the receipt has no range for {missing[0]!r}, so it is of another network")
    spans = {name: _tensor_data(ranges[key]) for key, name in keys.items()}
    for before, after in plan.vanishing().items():
        spans[before] = spans[after]
    spans.update((name, _tensor_data((0.0, 1.0))) for name in plan.answers())  # asked for, and taken away below
    version, opsets = plan.model.ir_version, [(entry.domain, entry.version) for entry in plan.model.opset_import]
    model = shape_inference.infer_shapes(plan.model)
    add_infer_metadata(model)  # says that types are known; without it the library goes through files
    with _hushed():
        quantizer = QDQQuantizer(
            model,
            per_channel=numeric.per_channel,
            reduce_range=numeric.reduce_range,
            weight_qType=_TYPES[numeric.weight],
            activation_qType=_TYPES[numeric.activation],
            tensors_range=spans,
            nodes_to_quantize=list(plan.nodes),
            nodes_to_exclude=[],
            op_types_to_quantize=sorted({plan.by_name[name].op_type for name in plan.nodes}),
            extra_options={"ForceQuantizeNoInputCheck": False},
        )
        quantizer.quantize_model()
    done = quantizer.model.model
    _leave_floats_alone(done, plan)
    _answer_in_floats(done, plan)
    quantizer.model.topological_sort()
    done.graph.ClearField("value_info")
    done.ClearField("metadata_props")
    done.ir_version = version
    assert [(entry.domain, entry.version) for entry in done.opset_import] == opsets
    return done.SerializeToString(deterministic=True)


def _leave_floats_alone(model: onnx.ModelProto, plan: Plan) -> None:
    """Float nodes compute as floats, on exact inputs where those are float.

    The library would have a float node read the rounded form of a float node's result. And onnxruntime (from 1.20,
    WeightBiasQuantization) quantizes a float layer's weights by itself, one scale for all channels, where it stands
    between integer ones; it does not where the dequantized input has a scale per channel, so it gets equal ones.
    """
    integer = set(plan.nodes)
    floats = {name: node for name, node in plan.by_name.items() if name not in integer}
    exact = {name for node in floats.values() for name in node.output}
    exact.update(value.name for value in plan.model.graph.input)
    rounded = {add_dequant_output_suffix(name): name for name in exact}
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    restoring = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for node in [node for node in model.graph.node if node.name in floats]:
        for place, name in enumerate(node.input):
            node.input[place] = rounded.get(name, name)
        shared = restoring.get(node.input[0])
        if shared is None or node.op_type not in ("Conv", "ConvTranspose", "Gemm"):
            continue
        own = onnx.helper.make_node(
            "DequantizeLinear",
            [shared.input[0], f"{node.name}.input_scale", f"{node.name}.input_zero_point"],
            [f"{node.name}.input"],
            f"{node.name}.input",
            axis=1,
        )
        for name, source in zip(own.input[1:], shared.input[1:], strict=True):
            repeated = np.full(_channels(node, values), numpy_helper.to_array(values[source]))
            model.graph.initializer.append(numpy_helper.from_array(repeated, name))
        node.input[0] = own.output[0]
        model.graph.node.append(own)
    used = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    idle = [node for node in restoring.values() if node.output[0] not in used]
    for node in idle:
        model.graph.node.remove(node)


def _answer_in_floats(model: onnx.ModelProto, plan: Plan) -> None:
    """Take the last pair away behind matrix products that give the answer."""
    makers = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for answer in plan.answers():
        restore = makers[answer]
        rounding = makers[restore.input[0]]
        makers[rounding.input[0]].output[0] = answer
        for name in restore.input[1:]:
            model.graph.initializer.remove(constants[name])
        model.graph.node.remove(restore)
        model.graph.node.remove(rounding)


def _channels(node: onnx.NodeProto, values: Mapping[str, onnx.TensorProto]) -> int:
    """Channels that a weighted node reads."""
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    dims = values[node.input[1]].dims
    if node.op_type == "Conv":
        return dims[1] * attributes.get("group", 1)
    return dims[1] if node.op_type == "Gemm" and attributes.get("transB", 0) else dims[0]


def _tensor_data(span: Range) -> TensorData:
    return TensorData(lowest=np.array(span[0], np.float32), highest=np.array(span[1], np.float32))


@contextmanager
def _hushed() -> Iterator[None]:
    """The library logs through the root logger, which configures itself to print unless it has a handler."""
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
