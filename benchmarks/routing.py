"""Early exits on a trained CIFAR ResNet-56, as one file for plain onnxruntime, beside the same network in plain int8.

    AUTOCOMPRESS_DATA=FOLDER python benchmarks/routing.py [--epochs 4] [--exits layer2.2,layer2.5,...] [--json FILE]

The network gets an exit behind each of these blocks and is trained for `--epochs` with its uncompressed self as
teacher; its own weights move at an eighth of the rate. Thresholds are tuned on test images 0-999 so that `--loses` of
quality goes; quality is read once on 5000-9999, drops are paired differences with 95 % intervals. Latency is the mean
over 64 real images of the selection part, each timed in every block, batch 1, one thread, a core of its own, in turn
with fp32.

`--json` keys: static_int8_ms, dynamic_mean_ms, dynamic_p99_ms, drop (points, against plain int8), drop_ci,
never_exit_overhead (share, of the file with its exits switched off over plain int8), exit_rates, curve.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar10 import Cifar, resnet
from oneshot import Bench, everywhere
from rich.console import Console
from rich.table import Table

from autocompress import export
from autocompress.auto import TAUGHT
from autocompress.branches import set_thresholds, thresholds_of
from autocompress.models.routing import NEVER
from autocompress.ops.thresholds import routes_of
from autocompress.parts import make_ops
from autocompress.pipeline import Release, release, shape, timed, training
from autocompress.types import Candidate, Policy, Reading, Rule

EXITS = "layer2.2,layer2.5,layer2.8,layer3.3"


class Routing(Bench):
    """The bench of one network with exits."""

    def made(self, asked: argparse.Namespace) -> Release:
        """The trained network with exits, its file in int8."""
        exits = [
            Rule(site=site, op="exit", settings={"head": asked.head, "confidence": asked.confidence})
            for site in asked.exits.split(",")
        ]
        integers = everywhere("quantize", self.builder.sites(), bits="int8")
        route = Rule(site=".", op="route", settings={"loses": asked.loses})
        policy = Policy(rules=(*exits, *integers, route, Rule(site=".", op="distill", settings=dict(TAUGHT))))
        torch.manual_seed(self.seed)
        shaped = shape(self.work, Candidate(arch={}, policy=policy))
        trainer = training(self.work, shaped, policy, self.seed)
        for piece in range(1, 11):
            told = trainer.run_to(piece / 10)
            self.console.print(f"training: {piece}0 %, loss {told['loss']:.3f}", highlight=False)
        (done,) = release(self.work, shaped.settle(self.work).module, policy).values()
        return done

    def read(self, model: bytes) -> Reading:
        """A reading by a fresh process, over real images where the file decides."""
        return self.station.session(self.profile.name, timed(self.task, model), 4.0)

    def overhead(self, model: bytes, other: bytes) -> float:
        """How much longer one file takes than another: the median of readings in turn."""
        ratios = [self.read(model).ratio.value / self.read(other).ratio.value for _ in range(3)]
        return float(np.median(ratios)) - 1.0


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--exits", default=EXITS)
    parser.add_argument("--head", default="conv", choices=("linear", "hidden", "conv"))
    parser.add_argument("--confidence", default="softmax", choices=("softmax", "entropy", "learned"))
    parser.add_argument(
        "--loses", type=float, default=0.003, help="of quality, that exits may cost where they are tuned"
    )
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or max(1, (os.cpu_count() or 2) - 1))
    console = Console()
    bench = Routing("ResNet-56", resnet(56), asked.epochs, Cifar(), console)
    bench.work = replace(bench.work, ops=make_ops((*bench.work.ops, "exit", "route")))
    try:
        plain = bench.apply(Policy(rules=tuple(everywhere("quantize", bench.builder.sites(), bits="int8")))).model
        right = bench.task.right(export.predictor(plain), "test").astype(float)
        began = time.perf_counter()
        made = bench.made(asked)
        minutes = (time.perf_counter() - began) / 60
        never = set_thresholds(made.model, dict.fromkeys(thresholds_of(made.model), NEVER))
        lost = 100 * (right - bench.task.right(export.predictor(made.model), "test"))
        drop, error = float(lost.mean()), 1.96 * float(lost.std(ddof=1) / np.sqrt(len(lost)))
        static, dynamic = bench.read(plain), bench.read(made.model)
        entries = list(routes_of(made.receipts))
        assert dynamic.p99_ms is not None
        told: dict[str, Any] = {
            "static_int8_ms": static.ms.value,
            "dynamic_mean_ms": dynamic.ms.value,
            "dynamic_p99_ms": dynamic.p99_ms.value,
            "saved": 1.0 - dynamic.ratio.value / static.ratio.value,
            "drop": drop,
            "drop_ci": [drop - error, drop + error],
            "quality": float(right.mean() - drop / 100),
            "static_quality": float(right.mean()),
            "never_exit_overhead": bench.overhead(never, plain),
            "exit_rates": {entry.site: entry.achieved["share"] for entry in entries if "share" in entry.achieved},
            "curve": next((entry.facts["curve"] for entry in entries if "curve" in entry.facts), []),
            "minutes": round(minutes, 1),
            "asked": {key: str(value) for key, value in vars(asked).items()},
        }
    finally:
        bench.close()
    view = Table("", "plain int8", "with exits")
    view.add_row("quality on 5000-9999", f"{told['static_quality']:.4f}", f"{told['quality']:.4f}")
    view.add_row("points lost", "", f"{drop:+.2f} [{drop - error:+.2f}, {drop + error:+.2f}]")
    view.add_row("mean ms", f"{static.ms.value:.3f}", f"{dynamic.ms.value:.3f} ({100 * told['saved']:.0f} % less)")
    view.add_row("p99 ms", f"{static.p99_ms.value:.3f}" if static.p99_ms else "", f"{dynamic.p99_ms.value:.3f}")
    view.add_row("exits switched off", "", f"{100 * told['never_exit_overhead']:+.1f} %")
    for route, share in told["exit_rates"].items():
        view.add_row(f"leave by {route}", "", f"{100 * share:.0f} %")
    console.print(view)
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
