"""A trained CIFAR ResNet-56 that decides by its input, as one file for plain onnxruntime, beside itself in plain int8.

    AUTOCOMPRESS_DATA=FOLDER python benchmarks/routing.py [--epochs 14] [--keep 0.34] [--json FILE]
    AUTOCOMPRESS_DATA=FOLDER python benchmarks/routing.py --exits layer2.2,layer2.5 [--head conv]

By default a cascade: a copy of the network with the share `--keep` of its blocks answers first and is trained for
`--epochs` on the network's answers, which itself stays as it is. With `--exits` the network gets an exit behind each of
these blocks instead and is trained with its uncompressed self as teacher, its own weights at an eighth of the rate.
Thresholds are tuned on test images 0-999 so that `--loses` of quality goes; quality is read once on 5000-9999, drops
are paired differences with 95 % intervals. Latency is the mean over 64 real images of the selection part, each timed in
every block, batch 1, one thread, a core of its own, in turn with fp32.

`--json` keys: static_int8_ms, dynamic_mean_ms, dynamic_p99_ms, drop (points, against plain int8), drop_ci,
never_exit_overhead (share, of the file with its exits switched off over plain int8), exit_rates, curve (as tuned),
dynamic and static (speedup over fp32 and quality on the selection part). `--svg` draws the last two into one picture;
`--static` names a `--json` of `cifar.py`, whose front joins the static points.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Mapping, Sequence
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
from autocompress.charts import Scale, log_ticks, ticks
from autocompress.models.routing import NEVER
from autocompress.ops.thresholds import routes_of
from autocompress.parts import make_ops
from autocompress.pipeline import Release, release, shape, timed, training
from autocompress.store import write_atomic
from autocompress.tasks.intervals import paired
from autocompress.tradeoff import measured
from autocompress.types import Candidate, Policy, Reading, Rule

PIECES = 20


class Routing(Bench):
    """The bench of one network with exits."""

    def made(self, asked: argparse.Namespace) -> Release:
        """The trained network with exits, its file in int8."""
        exits = [
            Rule(site=site, op="exit", settings={"head": asked.head, "confidence": asked.confidence})
            for site in filter(None, asked.exits.split(","))
        ]
        if not exits:
            settings = {"keep": asked.keep, "confidence": asked.confidence}
            exits = [Rule(site=".", op="cascade", settings=settings)]
        integers = everywhere("quantize", self.builder.sites(), bits="int8")
        route = Rule(site=".", op="route", settings={"loses": asked.loses})
        policy = Policy(rules=(*exits, *integers, route, Rule(site=".", op="distill", settings=dict(TAUGHT))))
        torch.manual_seed(self.seed)
        shaped = shape(self.work, Candidate(arch={}, policy=policy))
        trainer = training(self.work, shaped, policy, self.seed)
        if asked.state and asked.state.is_file():
            trainer.load(asked.state.read_bytes())
        for piece in range(1, PIECES + 1):
            told = trainer.run_to(piece / PIECES)
            if told["steps"]:
                self.console.print(f"training: {piece / PIECES:.0%}, loss {told['loss']:.3f}", highlight=False)
                if asked.state:
                    write_atomic(asked.state, trainer.state())
        (done,) = release(self.work, shaped.settle(self.work).module, policy).values()
        return done

    def read(self, model: bytes) -> Reading:
        """A reading by a fresh process, over real images where the file decides."""
        return self.station.session(self.profile.name, timed(self.task, model), 4.0)

    def overhead(self, model: bytes, other: bytes) -> float:
        """How much longer one file takes than another: the median of readings in turn."""
        ratios = [self.read(model).ratio.value / self.read(other).ratio.value for _ in range(3)]
        return float(np.median(ratios)) - 1.0


def drawn(dynamic: Sequence[Mapping[str, float]], static: Sequence[Mapping[str, float]]) -> str:
    """Quality over latency of files that decide and of others, as SVG."""
    every = [*dynamic, *static]
    wide, high = 620, 360
    low = max(min(one["quality"] for one in every), max(one["quality"] for one in every) - 0.06)
    x = Scale(0.9 / max(one["speedup"] for one in every), 1.0, 60, wide - 20, log=True)
    y = Scale(low - 0.003, max(one["quality"] for one in every) + 0.004, high - 50, 20)
    parts: list[str] = []
    for value in ticks(y.low, y.high):
        parts.append(f'<path d="M{x.start} {y(value)}H{x.end}" stroke="#ddd"/>')
        parts.append(f'<text x="54" y="{y(value) + 4}" text-anchor="end">{value:.3g}</text>')
    parts += [
        f'<text x="{x(value)}" y="{high - 32}" text-anchor="middle">{value:g}</text>'
        for value in log_ticks(x.low, x.high)
    ]
    for points, colour, words, place in ((static, "#06c", "static", 0), (dynamic, "#c40", "decides by its input", 1)):
        shown = sorted((one for one in points if one["quality"] >= low), key=lambda one: -one["speedup"])
        at = [(x(1 / one["speedup"]), y(one["quality"])) for one in shown]
        path = "L".join(f"{across} {up}" for across, up in at)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{across}" cy="{up}" r="4" fill="{colour}"/>' for across, up in at]
        parts.append(f'<circle cx="{70 + 110 * place}" cy="{high - 10}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{80 + 110 * place}" y="{high - 6}">{words}</text>')
    parts.append(f'<text x="{wide - 20}" y="{high - 6}" text-anchor="end">mean latency, share of fp32</text>')
    parts.append('<text x="20" y="14">quality, selection part</text>')
    style = 'font-family="sans-serif" font-size="11" style="background:#fff"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" {style}>'
    return head + "\n".join(parts) + "</svg>\n"


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=14.0)
    parser.add_argument("--keep", type=float, default=0.34)
    parser.add_argument("--exits", default="", help="blocks by commas, in place of a cascade")
    parser.add_argument("--head", default="conv", choices=("linear", "hidden", "conv"))
    parser.add_argument("--confidence", default="softmax", choices=("softmax", "entropy", "learned"))
    parser.add_argument(
        "--loses", type=float, default=0.003, help="of quality, that exits may cost where they are tuned"
    )
    parser.add_argument("--state", type=Path, help="kept here; a run that was killed goes on from it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--static", type=Path, help="a --json of cifar.py")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or max(1, (os.cpu_count() or 2) - 1))
    console = Console()
    bench = Routing("ResNet-56", resnet(56), asked.epochs, Cifar(), console)
    bench.work = replace(bench.work, ops=make_ops((*bench.work.ops, "exit", "cascade", "route")))
    try:
        plain = bench.apply(Policy(rules=tuple(everywhere("quantize", bench.builder.sites(), bits="int8")))).model
        right = bench.task.scores(export.predictor(plain), "test")
        began = time.perf_counter()
        made = bench.made(asked)
        minutes = (time.perf_counter() - began) / 60
        never = set_thresholds(made.model, dict.fromkeys(thresholds_of(made.model), NEVER))
        lost = paired(right, bench.task.scores(export.predictor(made.model), "test"))
        drop = 100 * lost.value
        static, dynamic = bench.read(plain), bench.read(made.model)
        entries = list(routes_of(made.receipts))
        assert dynamic.p99_ms is not None
        points = measured(
            made.model, made.receipts, bench.task, [bench.profile.name], lambda _, model: bench.read(model)
        )
        name = bench.profile.name
        chosen = bench.task.quality(export.predictor(plain), "selection").value.value
        front = json.loads(asked.static.read_text())["front"] if asked.static else []
        told: dict[str, Any] = {
            "static_int8_ms": static.ms.value,
            "dynamic_mean_ms": dynamic.ms.value,
            "dynamic_p99_ms": dynamic.p99_ms.value,
            "saved": 1.0 - dynamic.ratio.value / static.ratio.value,
            "drop": drop,
            "drop_ci": [100 * lost.low, 100 * lost.high],
            "quality": float(right.mean() - drop / 100),
            "static_quality": float(right.mean()),
            "never_exit_overhead": bench.overhead(never, plain),
            "exit_rates": {entry.site: entry.achieved["share"] for entry in entries if "share" in entry.achieved},
            "curve": next((entry.facts["curve"] for entry in entries if "curve" in entry.facts), []),
            "dynamic": [
                {"speedup": one.readings[name].speedup, "quality": one.quality.value.value, "shares": one.shares}
                for one in points
            ],
            "static": [{"speedup": static.speedup, "quality": chosen}, *front],
            "minutes": round(minutes, 1),
            "asked": {key: str(value) for key, value in vars(asked).items()},
        }
    finally:
        bench.close()
    view = Table("", "plain int8", "with exits")
    view.add_row("quality on 5000-9999", f"{told['static_quality']:.4f}", f"{told['quality']:.4f}")
    view.add_row("points lost", "", f"{drop:+.2f} [{100 * lost.low:+.2f}, {100 * lost.high:+.2f}]")
    view.add_row("mean ms", f"{static.ms.value:.3f}", f"{dynamic.ms.value:.3f} ({100 * told['saved']:.0f} % less)")
    view.add_row("p99 ms", f"{static.p99_ms.value:.3f}" if static.p99_ms else "", f"{dynamic.p99_ms.value:.3f}")
    view.add_row("exits switched off", "", f"{100 * told['never_exit_overhead']:+.1f} %")
    for route, share in told["exit_rates"].items():
        view.add_row(f"leave by {route}", "", f"{100 * share:.0f} %")
    console.print(view)
    if asked.svg:
        asked.svg.write_text(drawn(told["dynamic"], told["static"]))
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
