"""Cross-layer equalization (Nagel et al. 2019, "Data-Free Quantization", section 4.1) on the float graph.

Where one layer's channels reach the next through nothing but what scales along (ReLU, pooling, reshaping nothing), a
channel may be made smaller in the first and its weights larger in the second. Channels of equal range share one scale
without loss. The factors are powers of two, so that the float network's answers stay the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from autocompress.ops.wiring import Wiring, attributes, constant, matrix, product_refusal
from autocompress.types import UserError

PASSES = 8
"""Rounds over all pairs; chains of depthwise layers settle in two or three."""
HOMOGENEOUS = frozenset(("Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool"))
LIMIT = 12
"""Largest exponent of two; channels that are nearly dead would ask for more."""


def pairs(wiring: Wiring) -> list[tuple[str, str]]:
    """Neighbours whose shared channels can be scaled, in graph order."""
    found: list[tuple[str, str]] = []
    for node in wiring.model.graph.node:
        if not _scalable(wiring, node):
            continue
        reader = wiring.sole_reader(node.output[0])
        while reader is not None and reader.op_type in HOMOGENEOUS and node.op_type == "Conv":
            reader = wiring.sole_reader(reader.output[0])
        if reader is not None and node.op_type != "Conv" and reader.op_type == "Relu":
            reader = wiring.sole_reader(reader.output[0])
        alike = reader is not None and (reader.op_type == "Conv") == (node.op_type == "Conv")
        if reader is not None and alike and _scalable(wiring, reader):
            found.append((node.name, reader.name))
    return found


def _scalable(wiring: Wiring, node: onnx.NodeProto) -> bool:
    """A convolution, dense or depthwise, or Gemm of constants whose weight nobody else reads."""
    if node.op_type == "Conv":
        weight = wiring.constants.get(node.input[1])
        group = attributes(node).get("group", 1)
        fits = weight is not None and (group == 1 or list(weight.dims[:2]) == [group, 1])
        fits = fits and (len(node.input) < 3 or not node.input[2] or node.input[2] in wiring.constants)
    else:
        fits = node.op_type == "Gemm" and not product_refusal(wiring, node)
    alone = fits and wiring.sole_reader(node.input[1]) is not None
    return alone and (len(node.input) < 3 or not node.input[2] or wiring.sole_reader(node.input[2]) is not None)


def decide(wiring: Wiring, chosen: frozenset[str]) -> list[dict[str, Any]]:
    """Exponents of two per channel for each pair that has a layer among `chosen`: {"first", "second", "exponents"}.

    The paper's equation 11 over and over, rounded at the end.
    """
    found = [pair for pair in pairs(wiring) if chosen.intersection(pair)]
    found = [(one, two) for one, two in found if _outputs(wiring, one) == _inputs(wiring, two)]
    logs: dict[tuple[str, str], NDArray[np.float64]] = {pair: np.zeros(_outputs(wiring, pair[0])) for pair in found}
    before, after = {pair[1]: pair for pair in found}, {pair[0]: pair for pair in found}
    ranges = {name: _magnitudes(wiring, name) for pair in found for name in pair}
    for _ in range(PASSES):
        for first, second in found:
            pair = (first, second)
            gain_in = logs[before[first]] if first in before else None
            gain_out = logs[after[second]] if second in after else None
            rows = _per_output(ranges[first], gain_in, _depthwise(wiring, first))
            columns = _per_input(ranges[second], gain_out, _depthwise(wiring, second))
            live = (rows > 0) & (columns > 0)
            ratio = np.where(live, rows, 1.0) / np.where(live, columns, 1.0)
            logs[pair] = np.where(live, 0.5 * np.log2(ratio), 0.0)
    decided = []
    for (first, second), scale in logs.items():
        exponents = np.clip(np.rint(scale), -LIMIT, LIMIT).astype(int)
        if exponents.any():
            decided.append({"first": first, "second": second, "exponents": exponents.tolist()})
    return decided


def enact(wiring: Wiring, decided: Sequence[dict[str, Any]]) -> None:
    """Scale weights of the wiring's own graph in place. Raises UserError where a layer is not there or not as wide."""
    for pair in decided:
        first, second, exponents = pair["first"], pair["second"], np.asarray(pair["exponents"], np.int32)
        for name in (first, second):
            if name not in wiring.nodes:
                raise UserError(f"quantize .: the receipt equalizes {name!r}, which this network does not have")
        if not len(exponents) == _outputs(wiring, first) == _inputs(wiring, second):
            raise UserError(
                f"quantize .: the receipt equalizes {len(exponents)} channels of {first!r}, which has others"
            )
        one, two = wiring.nodes[first], wiring.nodes[second]
        down, up = np.ldexp(np.float32(1), -exponents), np.ldexp(np.float32(1), exponents)
        _scale(wiring, one.input[1], down, 1 if one.op_type == "Gemm" and not _transposed(one) else 0)
        if len(one.input) > 2 and one.input[2]:
            _scale(wiring, one.input[2], down, 0)
        depthwise = _depthwise(wiring, second)
        _scale(wiring, two.input[1], up, 0 if depthwise or (two.op_type == "Gemm" and not _transposed(two)) else 1)


def _scale(wiring: Wiring, name: str, factors: NDArray[np.float32], axis: int) -> None:
    values = wiring.value(name)
    wide = [1] * values.ndim
    wide[axis] = -1
    wiring.constants[name].CopyFrom(constant(name, values * factors.reshape(wide)))


def _transposed(node: onnx.NodeProto) -> bool:
    return bool(attributes(node).get("transB", 0))


def _magnitudes(wiring: Wiring, name: str) -> NDArray[np.float64]:
    """Largest weight between each output and input channel; one column where a layer is depthwise."""
    node = wiring.nodes[name]
    if node.op_type == "Conv":
        values = np.abs(wiring.value(node.input[1]))
        return values.reshape(*values.shape[:2], -1).max(axis=2).astype(np.float64)
    return np.abs(matrix(wiring, node)).T.astype(np.float64)


def _outputs(wiring: Wiring, name: str) -> int:
    return _magnitudes(wiring, name).shape[0]


def _inputs(wiring: Wiring, name: str) -> int:
    return _magnitudes(wiring, name).shape[0 if _depthwise(wiring, name) else 1]


def _depthwise(wiring: Wiring, name: str) -> bool:
    return bool(attributes(wiring.nodes[name]).get("group", 1) > 1)


def _per_output(
    magnitudes: NDArray[np.float64], gain: NDArray[np.float64] | None, depthwise: bool
) -> NDArray[np.float64]:
    """Range of each output channel, its inputs having been scaled up by `gain` (log2) already."""
    if gain is None:
        return magnitudes.max(axis=1)
    return magnitudes[:, 0] * np.exp2(gain) if depthwise else (magnitudes * np.exp2(gain)).max(axis=1)


def _per_input(
    magnitudes: NDArray[np.float64], gain: NDArray[np.float64] | None, depthwise: bool
) -> NDArray[np.float64]:
    """Range of each input channel, the layer's outputs being scaled down by `gain` (log2) in turn."""
    scaled = magnitudes if gain is None else magnitudes / np.exp2(gain)[:, None]
    return scaled[:, 0] if depthwise else scaled.max(axis=0)
