"""Files that decide by their input: a `Where` of two answers becomes an `If` that computes one of them (floor F2).

In its plain form a network with routes computes every path and picks by row, for batches of any size: that is what is
exported, held against torch, calibrated and quantized. `branched` makes of it the file that ships: at batch 1 the nodes
that only one side of a decision needs move into that side's subgraph, so that the other side's cost falls away.
Decisions nest (an exit after another exit). Thresholds are constants of the outermost graph under names of their own:
whoever loads the file may give others (onnxruntime's `SessionOptions.add_initializer`, or `set_thresholds`) and trade
quality for time without a new search. They are no inputs: onnxruntime warns of inputs with a default.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from autocompress import onnxfile
from autocompress.devices.packed import packed
from autocompress.graph import replace, types_of
from autocompress.types import TrialFailure, UserError

COMPARED = ("GreaterOrEqual", "Greater", "Less", "LessOrEqual")
CARRIED = ("Unsqueeze", "Reshape", "Expand", "Cast", "Squeeze", "Not")
"""Between a comparison and its Where."""
SAMPLES = "autocompress.samples."
"""Before the number of an input, in the metadata of a file that is to be timed with real samples."""
SHARED = 4096
"""Bytes from which a constant that both sides or others need is not copied into a branch."""
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


def decisions(model: onnx.ModelProto, thresholds: Mapping[str, str]) -> dict[str, int]:
    """Place of the `Where` that decides, by route; `thresholds` says which constant each route is compared with.

    Raises TrialFailure where an exporter has left no such node.
    """
    nodes = list(model.graph.node)
    makers = {name: node for node in nodes for name in node.output}
    found: dict[str, int] = {}
    for place, node in enumerate(nodes):
        if node.op_type != "Where":
            continue
        condition = comparison(node, makers)
        if condition is None or condition.op_type not in COMPARED:
            continue
        for route, threshold in thresholds.items():
            if threshold in condition.input:
                found[route] = place
    if missing := [route for route in thresholds if route not in found]:
        raise TrialFailure(f"export: the decision of {missing[0]} is not in the file as a Where of a comparison")
    return {route: found[route] for route in thresholds}


def comparison(where: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """What a `Where` decides by, behind whatever only reshapes it; None where that is an input or a constant."""
    condition = makers.get(where.input[0])
    while condition is not None and condition.op_type in CARRIED:
        condition = makers.get(condition.input[0])
    return condition


def threshold_name(route: str) -> str:
    """What a route's threshold is called in the file."""
    return f"threshold:{route}"


def with_thresholds(model: onnx.ModelProto, routes: Mapping[str, str]) -> None:
    """Name the thresholds of a plain file in place; `routes` says which `Where` each route decides by."""
    nodes = {node.name: node for node in model.graph.node}
    makers = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for route, where in routes.items():
        condition = comparison(nodes[where], makers)
        assert condition is not None, "a route's Where has a comparison, or it is none"
        for place, name in enumerate(condition.input):
            if name in constants:
                constants[name].name = condition.input[place] = threshold_name(route)


def thresholds_of(model: bytes) -> dict[str, float]:
    """Default threshold by route; empty for a file that decides nothing."""
    prefix = threshold_name("")
    return {
        tensor.name.removeprefix(prefix): float(numpy_helper.to_array(tensor).reshape(-1)[0])
        for tensor in onnxfile.read(model, weights=False).graph.initializer
        if tensor.name.startswith(prefix)
    }


def set_thresholds(model: bytes, thresholds: Mapping[str, float]) -> bytes:
    """The file with other thresholds: 0 always takes a route, above 1 never.

    Raises UserError for a route that the file does not have, and for a threshold below 0 or that is no number.
    """
    proto = onnxfile.read(model)
    there = {tensor.name: tensor for tensor in proto.graph.initializer}
    for route, value in thresholds.items():
        if not value >= 0.0:
            raise UserError(f"threshold of {route}: {value:g} is below 0; 0 always takes it, above 1 never")
        if threshold_name(route) not in there:
            known = ", ".join(thresholds_of(model)) or "none"
            raise UserError(f"the file has no route {route!r}; there are {known}")
        tensor = there[threshold_name(route)]
        shape = tuple(tensor.dims)
        tensor.CopyFrom(numpy_helper.from_array(np.full(shape, value, dtype=np.float32), tensor.name))
    return onnxfile.write(proto)


# --- the samples that such a file is timed with -------------------------------------------------------------------


def with_samples(model: bytes, samples: Sequence[NDArray[Any]]) -> bytes:
    """The file with inputs (n, ...) in its metadata, one array each: `devices/bench.py` times it with these in turn."""
    proto = onnxfile.read(model)
    for place, one in enumerate(samples):
        proto.metadata_props.add(key=f"{SAMPLES}{place}", value=packed(one))
    return onnxfile.write(proto)


# --- from Where to If ---------------------------------------------------------------------------------------------


def branched(model: bytes, routes: Mapping[str, str]) -> bytes:
    """The file for one sample at a time in which each route's `Where` is an `If`.

    `routes` are names of the plain file's nodes. Raises TrialFailure where a decision saves nothing.
    """
    proto = onnxfile.read(model)
    with_thresholds(proto, routes)
    graph = proto.graph
    one_at_a_time(proto)
    types = types_of(proto)
    body = _Body(
        list(graph.node),
        {tensor.name: tensor for tensor in graph.initializer},
        {value.name for value in graph.output},
        types,
    )
    body.split(frozenset(routes.values()))
    saved = {node.name for node in body.nodes if node.op_type == "If"} | body.inner
    if idle := [route for route, where in routes.items() if where not in saved]:
        raise TrialFailure(f"route {idle[0]} saves nothing: what it could leave out is needed in any case")
    replace(graph.node, body.nodes)
    replace(graph.initializer, body.constants.values())
    return onnxfile.write(proto)


def one_at_a_time(model: onnx.ModelProto) -> None:
    """Fix the first axis of inputs and outputs to 1: a decision is made for one sample."""
    for value in (*model.graph.input, *model.graph.output):
        shape = value.type.tensor_type.shape
        if shape.dim:
            shape.dim[0].Clear()
            shape.dim[0].dim_value = 1


class _Body:
    """Nodes of a graph or subgraph in order, its constants, and the names that it answers with."""

    def __init__(
        self,
        nodes: list[onnx.NodeProto],
        constants: dict[str, onnx.TensorProto],
        answers: set[str],
        types: Mapping[str, onnx.TypeProto.Tensor],
    ) -> None:
        self.nodes, self.constants, self.answers, self.types = nodes, constants, answers, types
        self.inner: set[str] = set()  # names of decisions inside of others

    def split(self, wheres: frozenset[str]) -> None:
        """Make every decision here an `If`, the outermost (last) first, and those inside within it."""
        for where in [node for node in reversed(self.nodes) if node.name in wheres]:
            if any(node is where for node in self.nodes):  # else it has moved into another's branch
                self.decide(where, wheres)

    def decide(self, where: onnx.NodeProto, wheres: frozenset[str]) -> None:
        """Move what one side alone needs into that side's graph."""
        sides = [self.exclusive(where, place) for place in (1, 2)]
        if not any(sides):
            return
        moved = {id(node) for side in sides for node in side}
        following = self.rounding(where)
        result = where.output[0] if following is None else following.output[0]
        staying = [node for node in self.nodes if id(node) not in moved and node is not where and node is not following]
        kept = {name for node in staying for name in node.input} | self.answers
        read = [{name for node in side for name in read_by(node)} for side in sides]
        rounded = set() if following is None else set(following.input[1:])
        branches = [
            self.branch(side, where, place, following, kept | other | rounded, wheres)
            for side, place, other in zip(sides, (1, 2), read[::-1], strict=True)
        ]
        made = helper.make_node(
            "If", [where.input[0]], [result], where.name, then_branch=branches[0], else_branch=branches[1]
        )
        at = next(place for place, node in enumerate(self.nodes) if node is where)
        before = [node for node in self.nodes[:at] if id(node) not in moved]
        after = [node for node in self.nodes[at + 1 :] if node is not following]
        self.nodes = [*before, made, *after]
        needed = {name for node in self.nodes for name in read_by(node)} | self.answers
        self.constants = {name: tensor for name, tensor in self.constants.items() if name in needed}

    def exclusive(self, where: onnx.NodeProto, place: int) -> list[onnx.NodeProto]:
        """Nodes that nobody needs but this side of the decision, in order."""
        readers: defaultdict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in read_by(node):
                readers[name].append(node)
        found: list[onnx.NodeProto] = []
        inside: set[int] = set()
        at = next(index for index, node in enumerate(self.nodes) if node is where)
        for node in reversed(self.nodes[:at]):
            names = [name for name in node.output if name]
            if any(name in self.answers for name in names):
                continue
            users = [(name, user) for name in names for user in readers[name]]
            alone = bool(users) and all(
                id(user) in inside
                or (user is where and name == where.input[place] and list(where.input).count(name) == 1)
                for name, user in users
            )
            if alone:
                found.append(node)
                inside.add(id(node))
        return found[::-1]

    def rounding(self, where: onnx.NodeProto) -> onnx.NodeProto | None:
        """The one node that rounds the decision's answer: either side can do it, so integers leave the `If`."""
        users = [node for node in self.nodes if where.output[0] in read_by(node)]
        sole = len(users) == 1 and where.output[0] not in self.answers and users[0].op_type == QUANTIZE
        return users[0] if sole else None

    def branch(
        self,
        side: Sequence[onnx.NodeProto],
        where: onnx.NodeProto,
        place: int,
        following: onnx.NodeProto | None,
        kept: set[str],
        wheres: frozenset[str],
    ) -> onnx.GraphProto:
        """One side's graph; what it alone reads of the constants moves with it."""
        label = f"{where.name}/{'then' if place == 1 else 'else'}"
        answer = where.input[place]
        nodes = [_copy(node) for node in side]
        made = {name for node in nodes for name in node.output}
        if following is not None:
            last = _copy(following)
            last.name, last.input[0] = f"{label}/{following.name}", answer
            last.output[0] = f"{label}/{following.output[0]}"
            nodes.append(last)
            output, like = last.output[0], following.output[0]
        elif answer in made:
            output = like = answer
        else:
            output, like = f"{label}/answer", answer
            nodes.append(helper.make_node("Identity", [answer], [output], f"{label}/Identity"))
        nodes = self.floated(nodes, label)
        own: dict[str, onnx.TensorProto] = {}
        renamed: dict[str, str] = {}
        for name in sorted({name for node in nodes for name in read_by(node)} & self.constants.keys()):
            large = self.constants[name].ByteSize() > SHARED and name in kept
            if not large and not name.startswith(threshold_name("")):
                fresh = onnx.TensorProto()
                fresh.CopyFrom(self.constants[name])
                renamed[name] = fresh.name = f"{label}/{name}" if name in kept else name
                own[fresh.name] = fresh
        for node in nodes:
            replace(node.input, [renamed.get(name, name) for name in node.input])
        inside = _Body(nodes, own, {output}, self.types)
        inside.split(wheres)
        self.inner |= inside.inner | {node.name for node in inside.nodes if node.op_type == "If"}
        kind = self.types.get(like)
        shape = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim] if kind else None
        element = kind.elem_type if kind else onnx.TensorProto.FLOAT
        return helper.make_graph(
            inside.nodes,
            label,
            [],
            [helper.make_tensor_value_info(output, element, shape)],
            list(inside.constants.values()),
        )

    def floated(self, nodes: list[onnx.NodeProto], label: str) -> list[onnx.NodeProto]:
        """Integers that come from outside are turned to floats inside, where the runtime can fuse that."""
        makers = {name: node for node in self.nodes for name in node.output}
        made = {name for node in nodes for name in node.output}
        fresh: dict[str, str] = {}
        added: list[onnx.NodeProto] = []
        for name in dict.fromkeys(name for node in nodes for name in node.input):
            maker = makers.get(name)
            if name in made or maker is None or maker.op_type != DEQUANTIZE or maker.input[0] in self.constants:
                continue
            twin = _copy(maker)
            twin.name, fresh[name] = f"{label}/{maker.name}", f"{label}/{name}"
            twin.output[0] = fresh[name]
            added.append(twin)
        for node in nodes:
            replace(node.input, [fresh.get(name, name) for name in node.input])
        return [*added, *nodes]


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    fresh = onnx.NodeProto()
    fresh.CopyFrom(node)
    return fresh


def read_by(node: onnx.NodeProto) -> set[str]:
    """Every name that a node reads, in its subgraphs too."""
    found = {name for name in node.input if name}
    for attribute in node.attribute:
        if attribute.HasField("g"):
            inside = {name for one in attribute.g.node for name in read_by(one)}
            found |= inside - {name for one in attribute.g.node for name in one.output}
            found -= {tensor.name for tensor in attribute.g.initializer}
    return found
