"""Tasks own data and quality (protocol). Splits: train, calibration (part of train), selection, test.

The selection split steers the search; the test split is read once, for the final models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from autocompress.types import Quality, Record

Predict = Callable[[np.ndarray], np.ndarray]
"""A batch of inputs (float32, N first) to outputs (N first), as the ONNX file does it."""


class InputSpec(Record):
    """What goes into the file, for the manifest: a consumer needs nothing else to feed it."""

    name: str = "input"
    shape: tuple[int, ...]  # without the batch axis, e.g. (1, 8, 8)
    dtype: str = "float32"
    layout: str = "NCHW"
    normalisation: str = ""  # e.g. "pixel / 16"
    labels: tuple[str, ...] = ()


@runtime_checkable
class Task(Protocol):
    """Data, loss and quality."""

    name: str
    metric: str
    input: InputSpec

    def batches(
        self, split: str, size: int, *, limit: int | None = None, seed: int | None = None
    ) -> Iterator[tuple[Any, Any]]:
        """Torch batches (inputs, targets) of one pass. With a seed: shuffled, augmented (training); without: in order.

        Raises UserError for an unknown split.
        """
        ...

    def loss(self, outputs: Any, targets: Any) -> Any:
        """Scalar torch loss of one batch."""
        ...

    def quality(self, predict: Predict, split: str) -> Quality:
        """Quality with its 95 % interval on a split."""
        ...
