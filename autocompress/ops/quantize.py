"""Static int8 on the ONNX graph, site by site (onnxruntime.quantization, QDQ format).

decide looks at calibration data and keeps the range of every activation that will be an integer; enact places
quantize/dequantize pairs from those ranges and needs no data. Between two integer layers what can stays integer
(ReLU, additions, pooling, concatenation, reshaping), so that the network does not change its type back and forth:
such borders cost more than a narrow layer gains.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper, shape_inference
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import HistogramCollector, TensorData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import add_dequant_output_suffix, add_infer_metadata

from autocompress.graph import open_session
from autocompress.ops import Phase
from autocompress.tasks import Task
from autocompress.types import Entry, Numeric, Profile, Receipt, Rule, TrialFailure, UserError

if TYPE_CHECKING:
    from autocompress.export import Exported, Part

IMAGES = 128
"""Calibration samples unless the caller limits them."""
BATCH = 32
MOVERS = frozenset(("Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Pad", "Split"))
FOLLOWERS = MOVERS | frozenset(
    ("Relu", "Clip", "LeakyRelu", "Sigmoid", "MaxPool", "AveragePool", "GlobalAveragePool", "Resize")
)
"""One activation goes in: integer where that one is."""
JOINTS = frozenset(("Add", "Mul", "Concat"))
"""Several activations go in: integer where most of the activations around them are."""
VANISHING = frozenset(("Relu", "Clip"))
"""Become the saturation of the integer that the layer before them gives."""
BINS, QUANTIZED_BINS, PERCENTILE = 512, 128, 99.99

Range = tuple[float, float]


class Quantize:
    """Op `quantize`, phase numeric: `bits` is "float" or "int8" per site; all else is the profile's `numeric`."""

    name = "quantize"
    phase: Phase = "numeric"
    params: dict[str, Any] = {"bits": "float"}

    def decide(
        self,
        subject: Exported,
        rules: Sequence[Rule],
        task: Task,
        profile: Profile,
        tensors: dict[str, Any] | None = None,  # noqa: ARG002  (nothing is fitted here)
        *,
        limit: int | None = None,
    ) -> Receipt:
        """Ranges of every activation that becomes an integer, from the calibration split's first `limit` samples.

        One entry per int8 rule: `facts[part]` has its `nodes` and the `ranges` that these give (`<node>:output`). A
        last entry of site "." has the numeric settings, all integer nodes and the ranges of what lies between. Sites
        without weights in the file are skipped. Raises UserError for unknown bits, TrialFailure if an activation is
        not finite.
        """
        chosen: list[tuple[str, dict[str, tuple[str, ...]]]] = []
        for rule in rules:
            bits = rule.settings.get("bits", "float")
            if bits not in ("float", "int8"):
                raise UserError(f"quantize {rule.site}: bits = {bits!r}; choose float or int8")
            if bits == "int8":
                nodes = {part.name: part.nodes.get(rule.site, ()) for part in subject.parts}
                chosen.append((rule.site, {part: names for part, names in nodes.items() if names}))
        plans: dict[str, _Plan] = {}
        for part in subject.parts:
            seeds = {name for _, nodes in chosen for name in nodes.get(part.name, ())}
            plans[part.name] = _Plan.of(part, seeds)
        if not any(plan.nodes for plan in plans.values()):
            plans = {}
        ranges = _ranges(subject.parts, plans, task, profile.numeric, limit or IMAGES) if plans else {}
        entries: list[Entry] = []
        for site, nodes in chosen:
            asked: dict[str, Any] = {"bits": "int8"}
            if not nodes:
                entries.append(Entry(site=site, status="skipped", why="no weights in the file", asked=asked))
                continue
            facts: dict[str, Any] = {}
            for part, names in nodes.items():
                own = [key for key in ranges[part] if key.rpartition(":")[0] in names]
                facts[part] = {"nodes": list(names), "ranges": {key: ranges[part].pop(key) for key in own}}
            entries.append(Entry(site=site, asked=asked, achieved={"bits": 8.0}, facts=facts))
        if plans:
            facts = {part: {"nodes": list(plan.nodes), "ranges": ranges[part]} for part, plan in plans.items()}
            entries.append(Entry(site=".", facts={"numeric": profile.numeric.model_dump(), **facts}))
        return Receipt(op=self.name, entries=tuple(entries))

    def enact(
        self,
        subject: Exported,
        receipt: Receipt,
        tensors: Mapping[str, Any] | None = None,  # noqa: ARG002
    ) -> Exported:
        """New parts with Q/DQ pairs where the receipt says; equal receipts and parts give equal bytes.

        Raises UserError where the receipt names a part, node or tensor that is not there.
        """
        last = receipt.entries[-1] if receipt.entries else None
        if last is None or "numeric" not in last.facts:
            return subject
        numeric = Numeric.model_validate(last.facts["numeric"])
        planned = {part: facts for part, facts in last.facts.items() if part != "numeric"}
        unknown = sorted(set(planned) - {part.name for part in subject.parts})
        if unknown:
            raise UserError(f"quantize: the receipt speaks of part {unknown[0]!r}, which this network does not have")
        parts: list[Part] = []
        for part in subject.parts:
            nodes = tuple(planned.get(part.name, {}).get("nodes", ()))
            if not nodes:
                parts.append(part)
                continue
            plan = _Plan.read(part, nodes)
            ranges: dict[str, Range] = {}
            for entry in receipt.entries:
                facts = entry.facts.get(part.name, {})
                for name in (*facts.get("nodes", ()), *(key.rpartition(":")[0] for key in facts.get("ranges", ()))):
                    if name not in plan.by_name:
                        raise UserError(
                            f"quantize {entry.site}: the receipt speaks of node {name!r}, which part {part.name!r} "
                            "of this network does not have"
                        )
                ranges.update(facts.get("ranges", {}))
            parts.append(replace(part, model=_with_pairs(plan, ranges, numeric)))
        return replace(subject, parts=tuple(parts))


# --- which nodes, which tensors ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """The nodes of a part's graph that will compute with integers, in graph order."""

    model: onnx.ModelProto
    by_name: Mapping[str, onnx.NodeProto]
    constants: frozenset[str]
    nodes: tuple[str, ...]

    @classmethod
    def read(cls, part: Part, nodes: tuple[str, ...]) -> _Plan:
        model = onnx.load_model_from_string(part.model)
        constants = frozenset(tensor.name for tensor in model.graph.initializer)
        return cls(model, {node.name: node for node in model.graph.node}, constants, nodes)

    @classmethod
    def of(cls, part: Part, seeds: set[str]) -> _Plan:
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


# --- calibration ------------------------------------------------------------------------------------------------


def _ranges(
    parts: Sequence[Part], plans: Mapping[str, _Plan], task: Task, numeric: Numeric, limit: int
) -> dict[str, dict[str, Range]]:
    """Ranges by part and receipt key; samples are streamed, no activation outlives its batch."""
    sessions = {part.name: _watching(plans[part.name]) for part in parts}
    spans = {part.name: {key: _span(numeric) for key in plans[part.name].wanted()} for part in parts}
    for inputs, _ in task.batches("calibration", BATCH, limit=limit):
        values: NDArray[Any] = inputs.numpy()
        for part in parts:
            session, plan = sessions[part.name], plans[part.name]
            source = session.get_inputs()[0].name
            names = [output.name for output in session.get_outputs()]
            found = {**dict(zip(names, session.run(names, {source: values}), strict=True)), source: values}
            for key, name in plan.wanted().items():
                if not np.isfinite(found[name]).all():
                    raise TrialFailure(f"quantize: {key} is not finite on calibration data")
                spans[part.name][key].add(found[name])
            values = found[plan.model.graph.output[0].name]
    return {part: {key: span.range() for key, span in found.items()} for part, found in spans.items()}


def _watching(plan: _Plan) -> onnxruntime.InferenceSession:
    """A session of the float part that also gives every activation whose range is wanted."""
    model = onnx.ModelProto()
    model.CopyFrom(plan.model)
    outer = {value.name for value in (*model.graph.input, *model.graph.output)}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in plan.wanted().values() if name not in outer)
    return open_session(model.SerializeToString())  # one thread sums in one order: equal ranges everywhere


class _Span:
    """Smallest and largest value seen."""

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf

    def add(self, values: NDArray[Any]) -> None:
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))

    def range(self) -> Range:
        return self.low, self.high


class _Histogram(_Span):
    """A range that leaves outliers out: by percentile, or by entropy (Migacz 2017, "8-bit inference with TensorRT")."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method
        self.collector = HistogramCollector(method, False, BINS, QUANTIZED_BINS, PERCENTILE, "same")

    def add(self, values: NDArray[Any]) -> None:
        super().add(values)
        self.collector.collect_value({"x": values})

    def range(self) -> Range:
        histogram = self.collector.histogram_dict["x"]
        if self.method == "entropy":
            # the library's own defaults, 128 bins into 128, leave the search a single threshold to choose from
            low, high = (float(bound) for bound in self.collector.get_entropy_threshold(histogram, QUANTIZED_BINS)[:2])
        else:
            counts, edges = histogram[0], histogram[1]
            passed, cut = np.cumsum(counts) / counts.sum(), (1 - PERCENTILE / 100) / 2
            low = float(edges[np.searchsorted(passed, cut, side="right")])
            high = float(edges[min(np.searchsorted(passed, 1 - cut) + 1, len(edges) - 1)])
        return max(low, self.low), min(high, self.high)


def _span(numeric: Numeric) -> _Span:
    return _Span() if numeric.calibration == "minmax" else _Histogram(numeric.calibration)


# --- pairs ------------------------------------------------------------------------------------------------------

_TYPES = {"int8": QuantType.QInt8, "uint8": QuantType.QUInt8}


def _with_pairs(plan: _Plan, ranges: Mapping[str, Range], numeric: Numeric) -> bytes:
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
        quantizer.model.topological_sort()
    done = quantizer.model.model
    _leave_floats_alone(done, plan)
    _answer_in_floats(done, plan)
    done.graph.ClearField("value_info")
    done.ClearField("metadata_props")
    done.ir_version = version
    assert [(entry.domain, entry.version) for entry in done.opset_import] == opsets
    return done.SerializeToString(deterministic=True)


def _leave_floats_alone(model: onnx.ModelProto, plan: _Plan) -> None:
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


def _answer_in_floats(model: onnx.ModelProto, plan: _Plan) -> None:
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
