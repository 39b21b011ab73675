"""Arrays as text, for the line-JSON of a timing process; `bench.py`, which stands alone, has the same two functions."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST = 4_000_000  # bytes of inputs in one request: a small target holds it several times over


def packed(array: NDArray[Any]) -> str:
    """An array with its type and shape."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return base64.b64encode(zlib.compress(buffer.getvalue(), 1)).decode("ascii")


def unpacked(text: str) -> NDArray[Any]:
    """What `packed` made text of."""
    return np.load(io.BytesIO(zlib.decompress(base64.b64decode(text))), allow_pickle=False)


def portions(inputs: Sequence[NDArray[Any]]) -> Iterator[list[NDArray[Any]]]:
    """The same samples, at most MOST bytes of them at a time, one at least."""
    count = len(inputs[0])
    each = max(1, sum(one.nbytes for one in inputs) // max(count, 1))
    size = max(1, MOST // each)
    for begin in range(0, max(count, 1), size):
        yield [np.ascontiguousarray(one[begin : begin + size]) for one in inputs]
