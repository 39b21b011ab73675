"""What each technique does on its own to quality, size and measured latency, beside a reference where there is one.

    AUTOCOMPRESS_DATA=FOLDER python benchmarks/techniques.py [--network 20] [--epochs 0.5] [--arm TEXT] [--json FILE]

One trained CIFAR ResNet; every row applies one technique to it, the trained ones (marked) followed by the same short
distillation. Figures as in `benchmarks/oneshot.py`: the ONNX file on test images 5000-9999, drops as paired differences
to fp32 with 95 % intervals, latency in turn with fp32. A reference is another library's way to the same thing on the
same network with the same recipe; `within` says whether the two qualities differ by at most one standard error of their
paired difference (or ours is better). Where there is no reference the row says why.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from cifar import Cifar
from oneshot import SEED, Bench, as_shipped, every_other_block, everywhere
from rich.console import Console
from torch import nn
from torch.nn.utils import prune as torch_prune

from autocompress import export
from autocompress.ops.storage import storage
from autocompress.ops.store import codecs_of
from autocompress.pipeline import Shaped, release, training
from autocompress.types import Policy, Rule, Site

Rules = Callable[[Sequence[Site]], list[Rule]]
NO_LIBRARY = "not compared"


@dataclass(frozen=True)
class Arm:
    """One row: `trained` rows are followed by distillation; `reference` makes the other library's file."""

    name: str
    rules: Rules
    trained: bool = True
    reference: Callable[[Techniques], bytes] | None = None
    beside: str = NO_LIBRARY  # the reference's name, or why there is none


def rows_of(op: str, **settings: Any) -> Rules:
    """The technique at every site that lists it."""
    return lambda sites: everywhere(op, sites, **settings)


def all_of(op: str, **settings: Any) -> Rules:
    """The technique over the whole network at once."""
    return lambda _sites: [Rule(site=".", op=op, settings=settings)]


def first_block(kind: str) -> Rules:
    """A block op at every second block that offers it."""

    def rules(sites: Sequence[Site]) -> list[Rule]:
        able = [site.name for site in sites if kind in site.choices.get("block", ())]
        return [Rule(site=name, op="block", settings={"kind": kind}) for name in able[1::2]]

    return rules


def pruned(importance: Any) -> Callable[[Techniques], bytes]:
    """torch-pruning with its own importance, the same recipe after it."""

    def make(bench: Techniques) -> bytes:
        module = copy.deepcopy(bench.work.parent)
        inner = {part for name, part in module.named_modules() if name.endswith("conv1") and "layer" in name}
        outer: list[nn.Module] = [
            part for part in module.modules() if isinstance(part, nn.Conv2d | nn.Linear) and part not in inner
        ]
        example = torch.zeros(1, 3, 32, 32)
        pruner = tp.pruner.BasePruner(module, example, importance=importance(), pruning_ratio=0.5, ignored_layers=outer)
        module.eval()
        for inputs, targets in bench.task.batches("calibration", 64, limit=256):
            bench.task.loss(module(inputs), targets).backward()
        pruner.step()
        module.zero_grad()
        return bench.finish(module)

    return make


def masked(bench: Techniques) -> bytes:
    """torch.nn.utils.prune: the smallest 70 % of every layer, masks held while the same recipe trains."""
    module = copy.deepcopy(bench.work.parent)
    layers = [part for part in module.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    for layer in layers:
        torch_prune.l1_unstructured(layer, "weight", amount=0.7)
    bench.train(module)
    for layer in layers:
        torch_prune.remove(layer, "weight")
    return bench.float_file(module)


def inner_prune(**settings: Any) -> Rules:
    """Half of the inner channels of every block."""
    return lambda sites: [
        Rule(site=site.name, op="prune", settings={"ratio": 0.5, **settings})
        for site in sites
        if "prune" in site.ops and site.name.endswith("conv1") and "layer" in site.name
    ]


ARMS = (
    Arm(
        "prune 50 %, L1",
        inner_prune(importance="l1"),
        reference=pruned(lambda: tp.importance.GroupMagnitudeImportance(p=1)),
        beside="torch-pruning, L1",
    ),
    Arm(
        "prune 50 %, L2",
        inner_prune(importance="l2"),
        reference=pruned(lambda: tp.importance.GroupMagnitudeImportance(p=2)),
        beside="torch-pruning, L2",
    ),
    Arm(
        "prune 50 %, Taylor",
        inner_prune(importance="taylor"),
        reference=pruned(tp.importance.GroupTaylorImportance),
        beside="torch-pruning, Taylor",
    ),
    Arm(
        "prune 50 %, first-order", inner_prune(importance="first_order"), beside="torch-pruning has no such importance"
    ),
    Arm(
        "prune 50 %, BN scale",
        inner_prune(importance="bn_scale"),
        reference=pruned(tp.importance.BNScaleImportance),
        beside="torch-pruning, BN scale",
    ),
    Arm(
        "prune 50 %, FPGM",
        inner_prune(importance="fpgm"),
        reference=pruned(tp.importance.FPGMImportance),
        beside="torch-pruning, FPGM",
    ),
    Arm(
        "prune 50 %, random",
        inner_prune(importance="random"),
        reference=pruned(tp.importance.RandomImportance),
        beside="torch-pruning, random",
    ),
    Arm(
        "prune 50 %, global L2",
        all_of("prune", ratio=0.5, importance="l2", scope="global"),
        beside="torch-pruning couples the padded shortcuts",
    ),
    Arm("drop every second block", every_other_block),
    Arm("merge every second block", first_block("merge")),
    Arm("replace: separable", rows_of("replace", kind="separable")),
    Arm("replace: shuffle", rows_of("replace", kind="shuffle")),
    Arm("replace: bottleneck", rows_of("replace", kind="bottleneck")),
    Arm("replace: smaller kernel", rows_of("replace", kind="smaller")),
    Arm("low rank 50 %, SVD", rows_of("lowrank", rank=0.5, method="svd")),
    Arm("low rank 50 %, SVD by outputs", rows_of("lowrank", rank=0.5, method="svd", data=True)),
    Arm("low rank 50 %, spatial", rows_of("lowrank", rank=0.5, method="spatial")),
    Arm("low rank 50 %, Tucker-2", rows_of("lowrank", rank=0.5, method="tucker")),
    Arm(
        "int8, min-max, per channel",
        rows_of("quantize", bits="int8", calibration="minmax"),
        trained=False,
        reference=lambda b: as_shipped(b.baseline.read_bytes(), b.task),
        beside="onnxruntime as shipped",
    ),
    Arm("int8, min-max, per tensor", rows_of("quantize", bits="int8", granularity="tensor"), trained=False),
    Arm("int8, entropy", rows_of("quantize", bits="int8", calibration="entropy"), trained=False),
    Arm("int8, percentile", rows_of("quantize", bits="int8", calibration="percentile"), trained=False),
    Arm(
        "int8, equalized",
        lambda s: [*everywhere("quantize", s, bits="int8"), Rule(site=".", op="quantize", settings={"equalize": True})],
        trained=False,
    ),
    Arm(
        "int8, biases corrected",
        lambda s: [
            *everywhere("quantize", s, bits="int8"),
            Rule(site=".", op="quantize", settings={"correct_bias": True}),
        ],
        trained=False,
    ),
    Arm("int8, dynamic (the linear layer)", rows_of("quantize", bits="int8-dynamic"), trained=False),
    Arm("int4 weights (the linear layer)", rows_of("quantize", bits="int4"), trained=False),
    Arm(
        "int8, quantization-aware training",
        lambda s: [*everywhere("qat", s, bits="int8"), *everywhere("quantize", s, bits="int8")],
    ),
    Arm("sparsify 70 %, one shot", rows_of("sparsify", ratio=0.7), reference=masked, beside="torch.nn.utils.prune"),
    Arm("sparsify 70 %, global", all_of("sparsify", ratio=0.7, scope="global")),
    Arm("sparsify 70 %, gradual", rows_of("sparsify", ratio=0.7, schedule="gradual")),
    Arm("sparsify 2:4", rows_of("sparsify", ratio=0.5, pattern="2:4")),
    Arm("store: k-means codebook", all_of("store", codec="codebook"), trained=False),
    Arm("store: powers of two", all_of("store", codec="pow2"), trained=False),
    Arm("store: zstd", all_of("store", codec="zstd"), trained=False),
    *(
        Arm(
            f"drop every second block, distilled by {kind}",
            lambda s, kind=kind: [
                *every_other_block(s),
                Rule(site=".", op="distill", settings={"weight": 0.7, "temperature": 3.0, "kind": kind}),
            ],
        )
        for kind in ("relation", "attention", "features")
    ),
)


class Techniques(Bench):
    """The bench, with what references need."""

    def train(self, module: nn.Module) -> None:
        """The recipe of every trained arm."""
        policy = Policy(rules=(Rule(site=".", op="distill", settings={"weight": 0.7, "temperature": 3.0}),))
        torch.manual_seed(SEED)
        training(self.work, Shaped(module, ()), policy, SEED).run_to(1.0)

    def float_file(self, module: nn.Module) -> bytes:
        """The module as a float file."""
        (done,) = release(self.work, module, Policy()).values()
        return done.model

    def finish(self, module: nn.Module) -> bytes:
        """Train and export."""
        self.train(module)
        return self.float_file(module)

    def technique(self, arm: Arm) -> dict[str, Any]:
        """The row of an arm."""
        rules = arm.rules(self.builder.sites())
        if arm.trained and not any(rule.op == "distill" for rule in rules):
            rules = [*rules, Rule(site=".", op="distill", settings={"weight": 0.7, "temperature": 3.0})]
        policy = Policy(rules=tuple(rules))
        done = self.apply(policy)
        model = done.model
        row = self.row(arm.name, model, 0.0) | {"trained": arm.trained, "beside": arm.beside}
        row["stored_mb"] = len(storage(model, codecs_of(done.receipts))) / 1e6
        if arm.reference is not None:
            other = arm.reference(self)
            mine, theirs = (self.task.right(export.predictor(one), "test").astype(float) for one in (model, other))
            gap = (mine - theirs) * 100
            error = float(gap.std(ddof=1) / np.sqrt(len(gap)))
            row |= {
                "reference_quality": float(theirs.mean()),
                "gap": float(gap.mean()),
                "gap_error": error,
                "within": bool(gap.mean() >= -error),
            }
        return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| technique | points lost [95 %] | file | speed [95 %] | reference | ours against it, points |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        gap = f"{row['gap']:+.2f} ± {row['gap_error']:.2f}" if "gap" in row else ""
        lines.append(
            f"| {row['arm']}{', trained' if row['trained'] else ''} "
            f"| {row['drop']:+.2f} [{row['drop_low']:+.2f}, {row['drop_high']:+.2f}] | {row['size_ratio']:.2f} "
            f"| {row['speedup']:.2f}x [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}] | {row['beside']} | {gap} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", type=int, default=20)
    parser.add_argument("--epochs", type=float, default=0.5)
    parser.add_argument("--train", type=int, default=50_000)
    parser.add_argument("--arm", help="only arms whose name contains this")
    parser.add_argument("--part", help="I/N: the I-th of N parts, to run in several processes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
    arms = [arm for arm in ARMS if asked.arm is None or asked.arm in arm.name]
    if asked.part:
        index, parts = map(int, asked.part.split("/"))
        arms = arms[index::parts]
    bench = Techniques(asked.network, asked.epochs, Cifar(asked.train), Console())
    rows: list[dict[str, Any]] = []
    try:
        for arm in arms:
            rows.append(bench.technique(arm))
            if asked.json:
                asked.json.write_text(json.dumps({"rows": rows, "epochs": asked.epochs}, indent=1))
    finally:
        bench.close()
    print(table(rows))
    if asked.table:
        asked.table.write_text(table(rows))


if __name__ == "__main__":
    main()
