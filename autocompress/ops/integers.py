"""Which nodes of an ONNX graph compute with integers, and which tensors between them are integers.

The layers that a policy names, and what lies well between them: so that the network does not change its type back and
forth, for such borders cost more than a narrow layer gains. Convolutions always answer with integers (the runtime has
no other form); a matrix product answers with floats wherever what follows computes with floats, as in transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import onnx

from autocompress.ops.wiring import PRODUCTS, Wiring, attributes

MOVERS = frozenset(("Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Pad", "Split"))
SHARING = MOVERS | frozenset(("MaxPool", "AveragePool", "Resize"))
"""Their answer has the range of what goes in, and takes its scale."""
HARD = frozenset(("HardSigmoid", "HardSwish"))
"""The runtime has no integer form of them; an addition that saturates and a product are one."""
FOLLOWERS = SHARING | HARD | frozenset(("Relu", "Clip", "LeakyRelu", "Sigmoid", "GlobalAveragePool"))
"""One activation goes in: integer where that one is."""
JOINTS = frozenset(("Add", "Mul", "Concat"))
"""Several activations go in: integer where most of the activations around them are."""
VANISHING = frozenset(("Relu", "Clip"))
"""Become the saturation of the integer that the layer before them gives."""


def refusal(wiring: Wiring, node: onnx.NodeProto) -> str:
    """Why a weighted node has no static integer form, "" if it has one."""
    if node.op_type == "ConvTranspose":
        # rounded on both sides it is computed in floats all the same: 1.05 to 1.45 times the milliseconds alone, as
        # many between integer layers (five shapes on AVX-512 VNNI, onnxruntime 1.31)
        return "onnxruntime has no integer ConvTranspose, and a float one between roundings is slower"
    weight = wiring.constants.get(node.input[1])
    if weight is None or weight.data_type != onnx.TensorProto.FLOAT:
        return "its weight is no constant of floats"
    if node.op_type in PRODUCTS and len(weight.dims) != 2:
        return "its weight is no matrix"
    if len(node.input) > 2 and node.input[2]:
        bias = wiring.constants.get(node.input[2])
        if bias is None or len(bias.dims) != 1:
            return "its bias is no constant vector"
    return "its first operand is transposed" if attributes(node).get("transA", 0) else ""


@dataclass(frozen=True)
class Plan:
    """The nodes of a graph that compute with integers, in graph order."""

    wiring: Wiring
    nodes: tuple[str, ...]

    @classmethod
    def of(cls, wiring: Wiring, seeds: frozenset[str]) -> Plan:
        """The seeds and whatever lies well between them, to a fixed point."""
        integer = set(seeds)
        wanted = _wanted_by(wiring, seeds)
        tensors: set[str] = set()
        made: set[str] = set()  # by integer nodes, as integers
        for name in seeds:
            node = wiring.nodes[name]
            tensors.add(node.input[0])
            if node.op_type not in PRODUCTS or _passed_on(wiring, node, seeds, wanted):
                tensors.add(node.output[0])
                made.add(node.output[0])
        growing = bool(seeds)
        while growing:
            growing = False
            for node in wiring.model.graph.node:
                if node.name in integer or not _able(node, wiring):
                    continue
                inputs = [name for name in _data(node) if name not in wiring.constants]
                around = [*inputs, *node.output]
                if node.op_type in JOINTS:
                    joins = any(name in made for name in inputs)
                    fits = joins and 2 * sum(name in tensors for name in around) > len(around)
                else:
                    pays = node.input[0] in made or any(name in wanted for name in node.output)
                    fits = node.input[0] in tensors and pays
                if fits:
                    integer.add(node.name)
                    tensors.update(around)
                    made.update(node.output)
                    growing = True
        return cls(wiring, tuple(node.name for node in wiring.model.graph.node if node.name in integer))

    @cached_property
    def members(self) -> frozenset[str]:
        """The nodes as a set."""
        return frozenset(self.nodes)

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """Activations that are integers, in the order they are made.

        Left out are what only feeds a node that vanishes, and answers of matrix products that stay float.
        """
        found: set[str] = set()
        for name in self.nodes:
            node = self.wiring.nodes[name]
            found.update(one for one in _data(node) if one not in self.wiring.constants)
            if not self.answers_in_floats(node):
                found.update(filter(None, node.output))
        found -= self.vanishing.keys()
        order = [*self.wiring.inputs, *(name for node in self.wiring.model.graph.node for name in node.output)]
        return tuple(name for name in order if name in found)

    @cached_property
    def vanishing(self) -> dict[str, str]:
        """Tensor before a ReLU or Clip that nothing else reads -> the tensor after it."""
        before: dict[str, str] = {}
        for name in self.nodes:
            node = self.wiring.nodes[name]
            source = node.input[0]
            maker = self.wiring.makers.get(source)
            if node.op_type not in VANISHING or self.wiring.sole_reader(source) is not node:
                continue
            if maker is not None and maker.name in self.members and maker.op_type not in SHARING:
                before[source] = node.output[0]
        return before

    @cached_property
    def shared(self) -> dict[str, str]:
        """Tensor that takes another one's scale -> that one."""
        links: dict[str, str] = {}
        for name in self.nodes:
            node = self.wiring.nodes[name]
            if node.op_type in SHARING:
                source = self.vanishing.get(node.input[0], node.input[0])
                for output in filter(None, node.output):
                    links[output] = links.get(source, source)
        return links

    def answers_in_floats(self, node: onnx.NodeProto) -> bool:
        """Whether an integer node's answer is no integer: its last step is exact then, and no slower."""
        if node.op_type not in PRODUCTS:
            return False
        readers = self.wiring.readers.get(node.output[0], ())
        inside = [reader for reader in readers if reader.name in self.members]
        return node.output[0] in self.wiring.outputs or not readers or len(inside) < len(readers)

    def made(self, tensor: str) -> bool:
        """Whether an integer node gives this tensor, as integers: then everyone reads the integers."""
        maker = self.wiring.makers.get(tensor)
        return maker is not None and maker.name in self.members and not self.answers_in_floats(maker)

    @cached_property
    def keys(self) -> dict[str, str]:
        """Receipt key -> tensor that needs a range: `<node>:output` of its producer, else `<first user>:input`."""
        wanted = [name for name in self.tensors if name not in self.shared]
        named: dict[str, str] = {}
        for name in wanted:
            maker = self.wiring.makers.get(name)
            if maker is None:
                user = next(node for node in self.wiring.readers[name] if node.name in self.members)
                named[f"{user.name}:input"] = name
            else:
                place = list(maker.output).index(name)
                named[f"{maker.name}:output{place or ''}"] = name
        return named

    def bounds(self, tensor: str) -> tuple[float, float]:
        """What the ReLU or Clip that vanishes before a tensor lets through."""
        maker = self.wiring.makers.get(tensor)
        if maker is None or tensor not in self.vanishing.values():
            return -float("inf"), float("inf")
        return 0.0 if maker.op_type == "Relu" else _clip(self.wiring, maker)[0], _upper(self.wiring, maker)


def _data(node: onnx.NodeProto) -> list[str]:
    """The activations among a node's inputs, constants still among those of joints."""
    return list(node.input) if node.op_type in JOINTS else list(node.input[:1])


def _able(node: onnx.NodeProto, wiring: Wiring) -> bool:
    """Whether an unweighted node has an integer form that means the same."""
    if node.op_type == "Pad":  # integers pad with their zero
        value = node.input[2] if len(node.input) > 2 else ""
        zero = not value or (value in wiring.constants and not wiring.value(value).any())
        return zero and attributes(node).get("mode", b"constant") in (b"constant", b"reflect", b"edge")
    if node.op_type == "Clip":
        low, high = _clip(wiring, node)
        return low <= 0.0 <= high
    if node.op_type == "HardSigmoid":
        return attributes(node).get("alpha", 0.2) > 0
    if node.op_type == "Resize":
        return attributes(node).get("mode", b"nearest") != b"cubic"
    if node.op_type == "Slice":
        return all(name in wiring.constants for name in node.input[1:] if name)
    return node.op_type in FOLLOWERS or node.op_type in JOINTS


def _clip(wiring: Wiring, node: onnx.NodeProto) -> tuple[float, float]:
    """A Clip's bounds; what is no constant bounds nothing, so that it does not vanish."""
    bounds: list[float] = []
    for place, (name, open_end) in enumerate((("min", -float("inf")), ("max", float("inf"))), start=1):
        given = node.input[place] if len(node.input) > place else ""
        if given and given not in wiring.constants:
            return 1.0, -1.0
        bounds.append(float(wiring.value(given)) if given else float(attributes(node).get(name, open_end)))
    return bounds[0], bounds[1]


def _upper(wiring: Wiring, node: onnx.NodeProto) -> float:
    return float("inf") if node.op_type == "Relu" else _clip(wiring, node)[1]


def _wanted_by(wiring: Wiring, seeds: frozenset[str]) -> frozenset[str]:
    """Tensors that reach an integer layer through nothing but followers."""
    wanted: set[str] = set()
    for node in reversed(wiring.model.graph.node):
        if node.name in seeds or (node.op_type in FOLLOWERS and any(name in wanted for name in node.output)):
            wanted.add(node.input[0])
    return frozenset(wanted)


def _passed_on(wiring: Wiring, product: onnx.NodeProto, seeds: frozenset[str], wanted: frozenset[str]) -> bool:
    """Whether all that reads a product's answer leads it, as it is, into integer layers."""
    answer = product.output[0]
    readers = wiring.readers.get(answer, ())
    if answer in wiring.outputs or answer not in wanted or not readers:
        return False
    return all(
        reader.input[0] == answer
        and (reader.name in seeds or (reader.op_type in FOLLOWERS and any(name in wanted for name in reader.output)))
        for reader in readers
    )
