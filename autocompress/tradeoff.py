"""What a file's exits trade: for thresholds from always to never, quality, latency and where samples leave (floor F5).

A deciding file's thresholds can be moved after a search (`branches.set_thresholds`, or onnxruntime's
`SessionOptions.add_initializer`); this is measured before, so that production knows what it would get.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from autocompress import export
from autocompress.branches import set_thresholds, thresholds_of
from autocompress.ops.thresholds import is_exit, routes_of
from autocompress.pipeline import timed
from autocompress.tasks import Task
from autocompress.types import Point, Reading, Receipt

SAME = 1e-6
WANTED = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the samples that leave early


def settings(receipts: Sequence[Receipt]) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Thresholds worth a look, and the shares that leave by each exit: WANTED in all, never, and the file's own."""
    entries = list(routes_of(receipts))
    curve = next((entry.facts["curve"] for entry in entries if "curve" in entry.facts), ())
    own = {entry.site: float(entry.facts["threshold"]) for entry in entries if is_exit(entry.site)}
    if not curve or not own:
        return []
    shipped = {entry.site: entry.achieved.get("share", 0.0) for entry in entries if is_exit(entry.site)}
    left = np.array([sum(one["shares"][route] for route in own) for one in curve])
    picked = sorted({len(curve) - 1, *(int(np.abs(left - share).argmin()) for share in WANTED)})
    found = [(curve[i]["thresholds"], {route: curve[i]["shares"][route] for route in own}) for i in picked]
    if all(_apart(thresholds, own) for thresholds, _ in found):
        found.append((own, shipped))
    return sorted(found, key=lambda one: -sum(one[1].values()))


def _apart(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return any(abs(one[route] - value) > SAME for route, value in other.items())


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
    for thresholds, shares in settings(receipts) if own else ():
        file = set_thresholds(model, thresholds)
        found.append(
            Point(
                thresholds=thresholds,
                shipped=not _apart(thresholds, own),
                quality=task.quality(export.predictor(file), "selection"),
                shares=shares,
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
