"""Ranges of activations on calibration data: smallest and largest value, or without outliers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.quantization.calibrate import HistogramCollector

from autocompress.graph import open_session
from autocompress.ops.integers import Plan, Range
from autocompress.tasks import Task
from autocompress.types import Numeric, TrialFailure, UserError

if TYPE_CHECKING:
    from autocompress.export import Part

BATCH = 32
BINS, QUANTIZED_BINS, PERCENTILE = 512, 128, 99.99


def ranges_of(
    parts: Sequence[Part], plans: Mapping[str, Plan], task: Task, numeric: Numeric, limit: int
) -> dict[str, dict[str, Range]]:
    """Ranges by part and receipt key; samples are streamed, no activation outlives its batch.

    Raises TrialFailure if an activation is not finite, UserError if there is no sample.
    """
    sessions = {part.name: _watching(plans[part.name]) for part in parts}
    spans = {part.name: {key: _span(numeric) for key in plans[part.name].wanted()} for part in parts}
    samples = 0
    for inputs, _ in task.batches("calibration", BATCH, limit=limit):
        samples += len(inputs)
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
    if not samples:
        raise UserError(f"task {task.name}: the calibration split is empty")
    return {part: {key: span.range() for key, span in found.items()} for part, found in spans.items()}


def _watching(plan: Plan) -> onnxruntime.InferenceSession:
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
