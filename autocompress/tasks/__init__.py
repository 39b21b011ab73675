"""Tasks own data and quality (protocol). Splits: train, calibration (part of train), selection, test.

The selection split steers the search; the test split is read once, for the final models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from autocompress.types import Quality, Record

Predict = Callable[[Any], Any]
"""A batch of inputs (N first) to outputs (N first), as the ONNX file does it: numpy arrays.

A tuple of arrays goes in where the network has several inputs, a tuple comes out where it has several outputs.
"""


class InputSpec(Record):
    """What goes into the file, for the manifest: a consumer needs nothing else to feed it.

    `others` are a network's second and further inputs, in the order of its arguments; `batches` then yields tuples.
    """

    name: str = "input"
    shape: tuple[int, ...]  # without the batch axis, e.g. (1, 8, 8)
    dtype: str = "float32"
    layout: str = "NCHW"
    normalisation: str = ""  # e.g. "pixel / 16"
    labels: tuple[str, ...] = ()
    others: tuple[InputSpec, ...] = ()

    @property
    def every(self) -> tuple[InputSpec, ...]:
        """This input and the others."""
        return (self, *self.others)


def several(values: Any) -> tuple[Any, ...]:
    """Inputs or outputs as a tuple, whether there is one or many."""
    return tuple(values) if isinstance(values, tuple | list) else (values,)


def batch_size(inputs: Any) -> int:
    """Samples in a batch of one or several inputs."""
    return len(several(inputs)[0])


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


@runtime_checkable
class Scored(Protocol):
    """What a task may offer beside: how each sample fares, so that what is lost is told as a paired difference."""

    def scores(self, predict: Predict, split: str) -> NDArray[Any]:
        """Shape (n,), in the order of `batches`; booleans where answers are right or wrong. `quality` is their mean."""
        ...
