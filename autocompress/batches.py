"""Batches through a file that decides by its input: split at every decision, its rows going each its own way.

onnxruntime's `If` takes one decision for all that it is given, so the file serves one sample at a time. Here the graph
is cut at its `If`s: what comes before runs on the whole batch, each branch on the rows that take it, and the answers
are put back in order. Results are those of one sample after another, to rounding.

    from autocompress.batches import Batched
    answers = Batched("best/local-1t/model.onnx")(images)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

from autocompress import onnxfile
from autocompress.branches import read_by, threshold_name
from autocompress.graph import open_session, replace, types_of
from autocompress.types import UserError

Array = NDArray[Any]


@dataclass
class _Segment:
    """Nodes without a decision, as a session of their own."""

    session: onnxruntime.InferenceSession
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass
class _Fork:
    """A decision: the bodies of its two sides."""

    condition: str
    output: str
    sides: tuple[_Body, _Body]


@dataclass
class _Body:
    """What is done one after another, and the tensor that it ends with."""

    steps: list[_Segment | _Fork] = field(default_factory=list)
    answers: tuple[str, ...] = ()


class Batched:
    """A file with branches, for batches. `threads` as in onnxruntime; other files are run as they are.

    Raises UserError for a file that cannot be read.
    """

    def __init__(self, model: bytes | str | Path, threads: int = 1) -> None:
        data = model if isinstance(model, bytes) else onnxfile.load(Path(model))
        proto = onnxfile.read(data)
        graph = proto.graph
        self.types = _types(proto)
        self.opsets, self.version, self.threads = list(proto.opset_import), proto.ir_version, threads
        thresholds = {tensor.name: tensor for tensor in graph.initializer if tensor.name.startswith(threshold_name(""))}
        self.thresholds = {name: onnx.numpy_helper.to_array(tensor) for name, tensor in thresholds.items()}
        self.inputs = tuple(value.name for value in graph.input if value.name not in thresholds)
        self.outputs = tuple(value.name for value in graph.output)
        constants = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in thresholds}
        self.body = self._body(list(graph.node), constants, self.outputs)

    def __call__(self, *inputs: Array, thresholds: Mapping[str, float] | None = None) -> Any:
        """Outputs (n, ...) for inputs (n, ...), one array or a tuple; `thresholds` by route in place of the file's own.

        Raises UserError for a route that the file does not have.
        """
        given = {threshold_name(route): value for route, value in (thresholds or {}).items()}
        if unknown := given.keys() - self.thresholds.keys():
            known = ", ".join(name.removeprefix(threshold_name("")) for name in self.thresholds) or "none"
            raise UserError(
                f"no route {min(unknown).removeprefix(threshold_name(''))!r} in the file; there are {known}"
            )
        fixed = {
            name: np.full_like(value, given[name]) if name in given else value
            for name, value in self.thresholds.items()
        }
        found = self._run(self.body, dict(zip(self.inputs, inputs, strict=True)), fixed)
        return found[0] if len(found) == 1 else tuple(found)

    def _run(self, body: _Body, known: dict[str, Array], fixed: Mapping[str, Array]) -> list[Array]:
        values = dict(known)
        for step in body.steps:
            if isinstance(step, _Segment):
                feed = {name: fixed[name] if name in fixed else values[name] for name in step.inputs}
                values |= dict(
                    zip(step.outputs, map(np.asarray, step.session.run(list(step.outputs), feed)), strict=True)
                )
                continue
            taken = values[step.condition].reshape(len(values[step.condition]), -1)[:, 0]
            answer: Array | None = None
            for side, rows in zip(step.sides, (np.flatnonzero(taken), np.flatnonzero(~taken)), strict=True):
                if not len(rows):
                    continue
                (part,) = self._run(side, {name: one[rows] for name, one in values.items()}, fixed)
                answer = np.empty((len(taken), *part.shape[1:]), part.dtype) if answer is None else answer
                answer[rows] = part
            assert answer is not None, "a batch has a row"
            values[step.output] = answer
        return [values[name] for name in body.answers]

    def _body(
        self, nodes: Sequence[onnx.NodeProto], constants: Mapping[str, onnx.TensorProto], answers: Sequence[str]
    ) -> _Body:
        body, waiting = _Body(answers=tuple(answers)), list[onnx.NodeProto]()
        for place, node in enumerate(nodes):
            if node.op_type != "If":
                waiting.append(node)
                continue
            later = {name for other in nodes[place:] for name in read_by(other)} | set(answers)
            self._segment(body, waiting, constants, later)
            waiting = []
            sides: list[_Body] = []
            for name in ("then_branch", "else_branch"):
                graph = next(one.g for one in node.attribute if one.name == name)
                inner = {**constants, **{tensor.name: tensor for tensor in graph.initializer}}
                sides.append(self._body(list(graph.node), inner, [value.name for value in graph.output]))
            body.steps.append(_Fork(node.input[0], node.output[0], (sides[0], sides[1])))
        self._segment(body, waiting, constants, set(answers))
        return body

    def _segment(
        self, body: _Body, nodes: Sequence[onnx.NodeProto], constants: Mapping[str, onnx.TensorProto], later: set[str]
    ) -> None:
        if not nodes:
            return
        made = [name for node in nodes for name in node.output if name]
        read = dict.fromkeys(name for node in nodes for name in node.input if name)
        outputs = tuple(name for name in made if name in later)
        inputs = tuple(name for name in read if name not in made and name not in constants)
        graph = helper.make_graph(
            list(nodes),
            "segment",
            [self._value(name) for name in inputs],
            [onnx.ValueInfoProto(name=name) for name in outputs],
            [constants[name] for name in read if name in constants],
        )
        proto = helper.make_model(graph, opset_imports=self.opsets)
        proto.ir_version = self.version
        body.steps.append(_Segment(open_session(proto, self.threads), inputs, outputs))

    def _value(self, name: str) -> onnx.ValueInfoProto:
        """A tensor with its type, the first axis open."""
        kind = self.types[name]
        shape: list[int | str | None] = [dim.dim_value or None for dim in kind.shape.dim]
        if shape and name not in self.thresholds:
            shape[0] = "batch"
        return helper.make_tensor_value_info(name, kind.elem_type, shape)


def _types(proto: onnx.ModelProto) -> dict[str, onnx.TypeProto.Tensor]:
    """Types of all tensors, those inside branches too: of the graph laid out flat."""
    flat = onnx.ModelProto()
    flat.CopyFrom(proto)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    _lay_out(proto.graph, nodes, constants)
    replace(flat.graph.node, nodes)
    replace(flat.graph.initializer, constants)
    return types_of(flat)


def _lay_out(graph: onnx.GraphProto, nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto]) -> None:
    constants.extend(graph.initializer)
    for node in graph.node:
        if node.op_type != "If":
            nodes.append(node)
            continue
        last: list[str] = []
        for attribute in node.attribute:
            _lay_out(attribute.g, nodes, constants)
            last.append(attribute.g.output[0].name)
        nodes.append(helper.make_node("Identity", [last[0]], [node.output[0]]))
