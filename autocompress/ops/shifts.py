"""Empirical bias correction (Nagel et al. 2019, "Data-Free Quantization", section 4.2 and appendix D).

Rounded weights and activations move the mean of a layer's answers; what they moved by, per channel and before the
activation, is taken off the layer's bias. The paper goes from layer to layer; here all layers are looked at in one
pass over the calibration data and the pass is repeated, since a layer's error changes when those before it are mended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from autocompress.ops.integers import Plan
from autocompress.ops.pairs import raw
from autocompress.ops.ranges import Look, means_of
from autocompress.ops.wiring import WEIGHTED, Wiring, channel_axis, constant
from autocompress.tasks import Task
from autocompress.types import UserError

SWEEPS = 2

Shifts = Mapping[str, Sequence[float]]
"""Node -> what is added to its bias."""
Simulate = Callable[[Plan], onnx.ModelProto]
"""The plan's graph with pairs, every ReLU in its place."""


def decide(
    plans: Mapping[str, Plan], simulate: Mapping[str, Simulate], task: Task, limit: int
) -> dict[str, dict[str, list[float]]]:
    """Shifts by part and node, for every integer layer that has a bias or can have one."""
    nodes = {
        part: [n for n in map(plan.wiring.nodes.__getitem__, plan.nodes) if able(plan.wiring, n)]
        for part, plan in plans.items()
    }
    answers = {part: {node.output[0]: channel_axis(node) for node in those} for part, those in nodes.items()}
    looks = {part: Look(plan.wiring.model, tuple(answers[part])) for part, plan in plans.items()}
    expected = means_of(looks, answers, task, limit)
    shifts: dict[str, dict[str, Any]] = {part: {node.name: 0.0 for node in those} for part, those in nodes.items()}
    for _ in range(SWEEPS):
        looks, axes = {}, {}
        for part, plan in plans.items():
            moved = shifted(plan, {node: value for node, value in shifts[part].items() if np.ndim(value)})
            given = {n.output[0]: raw(n.output[0]) if plan.made(n.output[0]) else n.output[0] for n in nodes[part]}
            given = {one: one if one in plan.vanishing else other for one, other in given.items()}
            looks[part] = Look(simulate[part](moved), tuple(given.values()))
            axes[part] = {given[name]: axis for name, axis in answers[part].items()}
        found = means_of(looks, axes, task, limit)
        for part, those in nodes.items():
            for node, name in zip(those, axes[part], strict=True):
                shifts[part][node.name] += expected[part][node.output[0]] - found[part][name]
    return {
        part: {name: [float(np.float32(one)) for one in value] for name, value in those.items()}
        for part, those in shifts.items()
    }


def able(wiring: Wiring, node: onnx.NodeProto) -> bool:
    """Whether a weighted node has a bias of its own, or can be given one."""
    if node.op_type not in WEIGHTED:
        return False
    name = wiring.bias(node)
    if name:
        return len(wiring.readers[name]) == 1
    return node.op_type != "MatMul" and (len(node.input) < 3 or not node.input[2])


def shifted(plan: Plan, shifts: Shifts) -> Plan:
    """The plan on a graph whose biases are shifted."""
    model = onnx.ModelProto()
    model.CopyFrom(plan.wiring.model)
    wiring = Wiring(model)
    enact(wiring, shifts)
    return Plan(Wiring(model), plan.nodes)


def enact(wiring: Wiring, shifts: Shifts) -> None:
    """Shift biases of the wiring's own graph in place. Raises UserError where a node is not there or not as wide."""
    for name, values in shifts.items():
        node = wiring.nodes.get(name)
        if node is None or not able(wiring, node):
            raise UserError(f"quantize .: the receipt shifts the bias of {name!r}, which this network does not have")
        added = np.asarray(values, np.float32)
        bias = wiring.bias(node)
        if bias:
            before = wiring.value(bias)
            if before.shape != added.shape:
                raise UserError(
                    f"quantize .: the receipt shifts {len(added)} channels of {name!r}, it has {before.size}"
                )
            wiring.constants[bias].CopyFrom(constant(bias, (before + added).astype(np.float32)))
        else:
            own = f"{name}.shift"
            wiring.model.graph.initializer.append(constant(own, added))
            del node.input[2:]
            node.input.append(own)
