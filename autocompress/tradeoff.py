"""What a file's exits trade: for thresholds from always to never, quality, latency and where samples leave (floor F5).

A deciding file's thresholds can be moved after a search (`branches.set_thresholds`, or onnxruntime's
`SessionOptions.add_initializer`); this is measured before, so that production knows what it would get.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from autocompress import export
from autocompress.branches import set_thresholds, thresholds_of
from autocompress.models.routing import NEVER
from autocompress.ops.thresholds import is_exit, routes_of
from autocompress.pipeline import timed
from autocompress.tasks import Task
from autocompress.types import Point, Reading, Receipt

WANTED = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the samples that leave early


def levels(receipts: Sequence[Receipt]) -> dict[float, Mapping[str, float]]:
    """Thresholds worth a look, and the shares that leave by each exit: WANTED in all, never, and the file's own."""
    entries = list(routes_of(receipts))
    curve = next((entry.facts["curve"] for entry in entries if "curve" in entry.facts), ())
    if not curve:
        return {}
    left = np.array([sum(share for route, share in one["shares"].items() if is_exit(route)) for one in curve])
    picked = {int(np.abs(left - share).argmin()) for share in WANTED}
    found = {float(curve[i]["threshold"]): curve[i]["shares"] for i in sorted(picked)}
    for entry in entries:
        if is_exit(entry.site):
            near = min(curve, key=lambda one: abs(one["threshold"] - entry.facts["threshold"]))
            found[float(entry.facts["threshold"])] = near["shares"]
            break
    found[NEVER] = curve[-1]["shares"]
    return {level: {r: s for r, s in shares.items() if is_exit(r)} for level, shares in sorted(found.items())}


def measured(
    model: bytes,
    receipts: Sequence[Receipt],
    task: Task,
    profiles: Sequence[str],
    measure: Callable[[str, bytes], Reading],
) -> tuple[Point, ...]:
    """The curve of a file that decides; empty for any other. `measure` times a file on a profile."""
    own = {route: value for route, value in thresholds_of(model).items() if is_exit(route)}
    found: list[Point] = []
    for level, shares in levels(receipts).items() if own else ():
        file = set_thresholds(model, dict.fromkeys(own, level))
        found.append(
            Point(
                threshold=level,
                shipped=all(abs(value - level) < 1e-6 for value in own.values()),
                quality=task.quality(export.predictor(file), "selection"),
                shares=dict(shares),
                readings={name: measure(name, timed(task, file)) for name in profiles},
            )
        )
    return tuple(found)


def spread(readings: Sequence[Reading]) -> tuple[float, ...]:
    """(inputs,) median milliseconds of each input that a deciding file was timed with, over all sessions' blocks."""
    blocks = [
        block for reading in readings if reading.runs is not None and reading.inputs for block in reading.runs.model
    ]
    if not blocks:
        return ()
    return tuple(float(f"{ms:.5g}") for ms in np.median(np.asarray(blocks), axis=0))
