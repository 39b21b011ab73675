"""Looking at activations on calibration data: ranges (smallest and largest value, or without outliers) and means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from autocompress.graph import open_session
from autocompress.ops.pairs import Range
from autocompress.tasks import Task, batch_size, several
from autocompress.types import TrialFailure, UserError

if TYPE_CHECKING:
    import onnxruntime

BATCH = 32
MEMORY = 96 * 2**20
"""Bytes of activations that are looked at together."""
BINS, INTEGERS, PERCENTILE = 4096, 256, 99.99
SAMPLE = 1 << 14
"""Values of a tensor and sample that are counted in a histogram, evenly taken; its ends are those of all values."""

Seen = Mapping[str, NDArray[Any]]
"""Tensor -> its values on some samples."""


@dataclass(frozen=True)
class Look:
    """What to look at in one part: `tensors` of its graph."""

    model: onnx.ModelProto
    tensors: tuple[str, ...]

    def session(self) -> onnxruntime.InferenceSession:
        """One that also gives the tensors; one thread sums in one order, so that ranges are equal everywhere."""
        graph = self.model.graph
        outer = {value.name for value in (*graph.input, *graph.output)}
        own = len(graph.output)
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.tensors if name not in outer)
        try:  # for as long as it loads: a graph beside it would have all weights once more
            return open_session(self.model)
        finally:
            del graph.output[own:]


def stream(looks: Sequence[Look], task: Task, limit: int) -> Iterator[tuple[Seen, ...]]:
    """What the looks see, part after part, on the first `limit` samples of the calibration split.

    A part's inputs are the answers of the part before. Few samples at a time, so that no more than `MEMORY` bytes of
    activations are held. Raises UserError if there is no sample.
    """
    sessions = [look.session() for look in looks]
    chunk = 1
    found_any = False
    for inputs, _ in task.batches("calibration", BATCH, limit=limit):
        every = tuple(one.numpy() for one in several(inputs))
        start, count = 0, batch_size(inputs)
        while start < count:
            values = tuple(one[start : start + chunk] for one in every)
            start += chunk
            seen, held = _step(looks, sessions, values, task)
            found_any = True
            yield seen
            if held:
                chunk = max(1, min(BATCH, MEMORY * len(values[0]) // held))
    if not found_any:
        raise UserError(f"task {task.name}: the calibration split is empty")


def _step(
    looks: Sequence[Look],
    sessions: Sequence[onnxruntime.InferenceSession],
    values: tuple[NDArray[Any], ...],
    task: Task,
) -> tuple[tuple[Seen, ...], int]:
    """What is seen on some samples, and its bytes."""
    names = [one.name for one in task.input.every]
    seen: list[Seen] = []
    held = 0
    for look, session in zip(looks, sessions, strict=True):
        asked = [one.name for one in session.get_inputs()]
        given = dict(zip(names if set(asked) <= set(names) else asked, values, strict=False))
        feed = {name: np.ascontiguousarray(given[name]) for name in asked}
        answers = [one.name for one in session.get_outputs()]
        found = {**feed, **dict(zip(answers, session.run(answers, feed), strict=True))}
        held += sum(one.nbytes for one in found.values())
        seen.append({name: found[name] for name in look.tensors})
        values = tuple(found[one.name] for one in look.model.graph.output)
        names = asked
    return tuple(seen), held


def ranges_of(
    looks: Mapping[str, Look], keys: Mapping[str, Mapping[str, tuple[str, str]]], task: Task, limit: int
) -> dict[str, dict[str, Range]]:
    """Ranges by part and receipt key. `keys` has part -> key -> (tensor, "minmax", "entropy" or "percentile").

    Raises TrialFailure if an activation is not finite, UserError if there is no sample.
    """
    spans = {part: {key: span(method) for key, (_, method) in wanted.items()} for part, wanted in keys.items()}
    for seen in stream(tuple(looks.values()), task, limit):
        for part, tensors in zip(looks, seen, strict=True):
            for key, (tensor, _) in keys[part].items():
                if not spans[part][key].add(tensors[tensor]):
                    raise TrialFailure(f"quantize: {key} is not finite on calibration data")
    return {part: {key: one.range() for key, one in found.items()} for part, found in spans.items()}


def means_of(
    looks: Mapping[str, Look], axes: Mapping[str, Mapping[str, int]], task: Task, limit: int
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Mean of each channel of tensors, by part and tensor; `axes` has the axis of the channels."""
    sums: dict[tuple[str, str], NDArray[np.float64]] = {}
    counts: dict[tuple[str, str], int] = {}
    for seen in stream(tuple(looks.values()), task, limit):
        for part, tensors in zip(looks, seen, strict=True):
            for name, axis in axes[part].items():
                values = np.moveaxis(tensors[name], axis, -1).reshape(-1, tensors[name].shape[axis])
                place = (part, name)
                sums[place] = sums.get(place, 0.0) + values.sum(axis=0, dtype=np.float64)
                counts[place] = counts.get(place, 0) + len(values)
    return {part: {name: sums[part, name] / counts[part, name] for name in names} for part, names in axes.items()}


class _Span:
    """Smallest and largest value seen."""

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf

    def add(self, values: NDArray[Any]) -> bool:
        """Take values in; False if they are not finite."""
        low, high = float(values.min()), float(values.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        return bool(np.isfinite(low) and np.isfinite(high))

    def range(self) -> Range:
        return self.low, self.high


class _Histogram(_Span):
    """A range that leaves outliers out: by percentile, or by entropy (Migacz 2017, "8-bit inference with TensorRT").

    Counts in bins over [-reach, reach]; where a value lies outside, reach doubles and bins are joined two by two.
    """

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method, self.reach = method, 0.0
        self.counts = np.zeros(BINS, np.int64)

    def add(self, values: NDArray[Any]) -> bool:
        if not super().add(values):
            return False
        most = max(-self.low, self.high)
        if self.reach == 0.0 < most:
            self.reach = most  # what was counted so far are zeros, which lie in the middle of any reach
        while self.reach < most:
            joined = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts[:] = 0
            self.counts[BINS // 4 : BINS // 4 + BINS // 2] = joined
            self.reach *= 2.0
        flat = values.ravel()
        every = -(-flat.size // (SAMPLE * len(values))) | 1  # odd: no row or channel is left out each time
        taken = flat[::every]
        if self.method == "entropy":
            taken = taken[taken != 0]  # exact in any integer: the peak that a ReLU leaves says nothing of a range
        places = (taken / (self.reach or 1.0) + 1.0) * (BINS / 2)
        self.counts += np.bincount(np.minimum(places.astype(np.int64), BINS - 1), minlength=BINS)
        return True

    def range(self) -> Range:
        if not self.low < self.high:  # one value only: there is nothing to leave out
            return self.low, self.high
        counts = self.counts
        edges = np.linspace(-self.reach, self.reach, BINS + 1)
        if self.method == "entropy":
            reach = _least_divergence(counts, edges)
            low, high = -reach, reach
        else:
            passed, cut = np.cumsum(counts) / counts.sum(), (1 - PERCENTILE / 100) / 2
            low = float(edges[np.searchsorted(passed, cut, side="right")])
            high = float(edges[min(np.searchsorted(passed, 1 - cut) + 1, BINS)])
        return max(low, self.low), min(high, self.high)


def _least_divergence(counts: NDArray[np.int64], edges: NDArray[np.float64]) -> float:
    """The reach whose 256 integers differ least (Kullback-Leibler) from what was counted (Migacz 2017, slide 31)."""
    half = len(counts) // 2
    best, reach = np.inf, float(edges[-1])
    for width in range(INTEGERS // 2, half + 1, INTEGERS // 2):  # bins on either side of zero
        inside = counts[half - width : half + width].astype(np.float64)
        clipped = inside.copy()
        clipped[0] += counts[: half - width].sum()
        clipped[-1] += counts[half + width :].sum()
        grouped = inside.reshape(INTEGERS, -1)
        filled = grouped > 0
        level = grouped.sum(axis=1, keepdims=True) / np.maximum(filled.sum(axis=1, keepdims=True), 1)
        told = np.where(filled, level, 0.0).ravel()
        some = clipped > 0
        p, q = clipped[some] / clipped.sum(), np.maximum(told[some], 1e-3) / max(told.sum(), 1.0)
        divergence = float((p * np.log(p / q)).sum())
        if divergence < best:
            best, reach = divergence, float(edges[half + width])
    return reach


def span(method: str) -> _Span:
    """What collects a range by one of the methods of `Numeric.calibration`."""
    return _Span() if method == "minmax" else _Histogram(method)
