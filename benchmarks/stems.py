"""What an image's first layer takes in integers, with its own channels and filled up to four.

    python benchmarks/stems.py [--rounds 15] [--json FILE]

Convolutions of 1 and 3 channels as they stand at the beginning of common networks, in int8 with what rounds their input
and answer, one thread. Both files are timed in turn; the answers are the same to the bit. `--json` rows: stem, ms,
filled_ms, ratio, low, high (quartiles of the ratios).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from autocompress.export import compose, export
from autocompress.ops import pairs
from autocompress.ops.quantize import Quantize
from autocompress.tasks import InputSpec
from autocompress.types import Profile, Rule

STEMS = {
    "CIFAR ResNet: 3x3, 3 to 16, 32 pixels": (3, 16, 3, 1, 32),
    "MNIST: 3x3, 1 to 16, 28 pixels": (1, 16, 3, 1, 28),
    "MobileNet: 3x3 by 2, 3 to 32, 224 pixels": (3, 32, 3, 2, 224),
    "VGG: 3x3, 3 to 64, 224 pixels": (3, 64, 3, 1, 224),
    "ResNet: 7x7 by 2, 3 to 64, 224 pixels": (3, 64, 7, 2, 224),
}


class Noise:
    """Calibration samples of one size."""

    name = metric = "noise"

    def __init__(self, channels: int, side: int) -> None:
        self.input = InputSpec(shape=(channels, side, side))

    def batches(self, _split: str, size: int, *, limit: int | None = None, **_more: Any) -> Any:
        """Batches of normal values."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(max(1, min(8, limit or 8) // min(size, 8))):
            yield torch.randn(min(size, 8), *self.input.shape, generator=generator), torch.zeros(min(size, 8))


def session(channels: int, outputs: int, kernel: int, stride: int, side: int, *, filled: bool) -> Any:
    """The stem's int8 file, loaded."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(channels, outputs, kernel, stride, kernel // 2), nn.ReLU()).eval()
    task: Any = Noise(channels, side)
    exported = export(layer, task.input, opset=17)
    op = Quantize()
    with patch.object(pairs, "FILLED", pairs.FILLED if filled else 0):
        receipt = op.decide(
            exported, [Rule(site="0", op="quantize", settings={"bits": "int8"})], task, Profile(name="x")
        )
        model = compose(op.enact(exported, receipt))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def timed(run: Any, feed: dict[str, Any], seconds: float = 0.02) -> float:
    """Milliseconds a run, over as many as take some time."""
    count, began = 0, time.perf_counter()
    while (took := time.perf_counter() - began) < seconds or count < 2:
        run.run(None, feed)
        count += 1
    return 1e3 * took / count


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    view = Table("stem", "ms", "filled up, ms", "ratio (quartiles)")
    for name, stem in STEMS.items():
        plain, filled = (session(*stem, filled=one) for one in (False, True))
        image = np.random.default_rng(0).standard_normal((1, stem[0], stem[4], stem[4])).astype(np.float32)
        feed = {plain.get_inputs()[0].name: image}
        assert np.array_equal(plain.run(None, feed)[0], filled.run(None, feed)[0])
        pairs_of = np.array([(timed(plain, feed), timed(filled, feed)) for _ in range(asked.rounds)])[1:]
        low, ratio, high = np.percentile(pairs_of[:, 1] / pairs_of[:, 0], (25, 50, 75))
        own, more = np.median(pairs_of, axis=0)
        rows.append({"stem": name, "ms": own, "filled_ms": more, "ratio": ratio, "low": low, "high": high})
        view.add_row(name, f"{own:.3f}", f"{more:.3f}", f"{ratio:.2f} ({low:.2f} to {high:.2f})")
    Console(emoji=False).print(view)
    if asked.json is not None:
        asked.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
