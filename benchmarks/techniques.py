"""What each technique does on its own to quality, size and measured latency, beside a reference where there is one.

    AUTOCOMPRESS_DATA=FOLDER python benchmarks/techniques.py [--network 20] [--epochs 0.5] [--arm TEXT] [--json FILE]

Networks: `20` and `56`, trained CIFAR ResNets; `text`, a small BERT that is trained on SST-2 first; `mobile`, a small
MobileNet that is trained on CIFAR-10 first; `unequal`, the same function from channels of unequal size. Every row
applies one technique; those marked * are followed by the same short distillation (`--epochs`). Figures as in
`benchmarks/oneshot.py`: the ONNX file on the test split (CIFAR: images 5000-9999), drops as paired differences to fp32
with 95 % intervals, latency in turn with fp32. A reference is another
library's way to the same thing, or a paper's formula by hand, on the same network with the same recipe
(`references.py`, which says what to install for them); `within` says whether ours is at most one standard error of the
paired difference worse. Where there is no reference the row says why.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import references as by
import torch
import torch_pruning as tp
from arms import DISTILL, Arm, Lab, Rules, all_of, both, every_second, rows_of, table
from cifar10 import Cifar, resnet
from encoder import ENCODER_ARMS, Sentences, encoder
from mobile import MOBILE_ARMS, mobilenet, unequal
from rich.console import Console

from autocompress.types import Rule, Site

NO_LIBRARY = "none: no library replaces convolutions of a trained network"


def inner_prune(**settings: Any) -> Rules:
    """Half of the inner channels of every block."""

    def rules(sites: Sequence[Site]) -> list[Rule]:
        inner = [site.name for site in sites if "prune" in site.ops and site.name.endswith("conv1")]
        return [Rule(site=n, op="prune", settings={"ratio": 0.5, **settings}) for n in inner if "layer" in n]

    return rules


def taught(kind: str) -> Rules:
    """Every second block dropped, taught by a kind of distillation."""
    return both(every_second("drop"), all_of("distill", **DISTILL, kind=kind))


STAGES = ("layer1", "layer2", "layer3")
ARMS = (
    Arm(
        "prune 50 %, L1",
        inner_prune(importance="l1"),
        reference=by.pruned(lambda: tp.importance.GroupMagnitudeImportance(p=1)),
        beside="torch-pruning, L1",
    ),
    Arm(
        "prune 50 %, L2",
        inner_prune(importance="l2"),
        reference=by.pruned(lambda: tp.importance.GroupMagnitudeImportance(p=2)),
        beside="torch-pruning, L2",
    ),
    Arm(
        "prune 50 %, Taylor",
        inner_prune(importance="taylor"),
        reference=by.pruned(tp.importance.GroupTaylorImportance),
        beside="torch-pruning, Taylor",
    ),
    Arm(
        "prune 50 %, first-order",
        inner_prune(importance="first_order"),
        reference=by.pruned(lambda: tp.importance.GroupTaylorImportance(multivariable=True)),
        beside="torch-pruning, Taylor, multivariable",
    ),
    Arm(
        "prune 50 %, BN scale",
        inner_prune(importance="bn_scale"),
        reference=by.pruned(tp.importance.BNScaleImportance),
        beside="torch-pruning, BN scale",
    ),
    Arm(
        "prune 50 %, FPGM",
        inner_prune(importance="fpgm"),
        reference=by.pruned(tp.importance.FPGMImportance),
        beside="torch-pruning, FPGM",
    ),
    Arm(
        "prune 50 %, random",
        inner_prune(importance="random"),
        reference=by.pruned(tp.importance.RandomImportance),
        beside="torch-pruning, random",
    ),
    Arm(
        "prune 50 %, global L2",
        all_of("prune", ratio=0.5, importance="l2", scope="global"),
        beside="none: torch-pruning couples the padded shortcuts",
    ),
    Arm(
        "prune 50 %, gradual",
        lambda sites: [*inner_prune(importance="l1")(sites), *all_of("prune", schedule="gradual")(sites)],
        beside="none: torch-pruning leaves training between its steps to the caller",
    ),
    Arm("drop every second block", every_second("drop"), reference=by.without, beside="the blocks taken out by hand"),
    Arm("merge every second block", every_second("merge"), beside="none: no library merges blocks"),
    Arm("replace: separable", rows_of("replace", kind="separable"), beside=NO_LIBRARY),
    Arm("replace: shuffle", rows_of("replace", kind="shuffle"), beside=NO_LIBRARY),
    Arm("replace: bottleneck", rows_of("replace", kind="bottleneck"), beside=NO_LIBRARY),
    Arm("replace: smaller kernel", rows_of("replace", kind="smaller"), beside=NO_LIBRARY),
    Arm(
        "low rank 50 %, SVD",
        rows_of("lowrank", rank=0.5, method="svd"),
        reference=by.thinned("svd"),
        beside="numpy's SVD by hand",
    ),
    Arm(
        "low rank 50 %, SVD by outputs",
        rows_of("lowrank", rank=0.5, method="svd", data=True),
        reference=by.thinned("svd", data=True),
        beside="whitened SVD by hand (SVD-LLM)",
    ),
    Arm(
        "low rank 50 %, spatial",
        rows_of("lowrank", rank=0.5, method="spatial"),
        reference=by.thinned("spatial"),
        beside="numpy's SVD by hand",
    ),
    Arm(
        "low rank 50 %, Tucker-2",
        rows_of("lowrank", rank=0.5, method="tucker"),
        reference=by.thinned("tucker"),
        beside="tensorly, partial_tucker",
    ),
    Arm(
        "int8, min-max, per channel",
        rows_of("quantize", bits="int8", calibration="minmax"),
        trained=False,
        reference=by.integers(),
        beside="onnxruntime, min-max",
    ),
    Arm(
        "int8, min-max, per tensor",
        rows_of("quantize", bits="int8", granularity="tensor"),
        trained=False,
        reference=by.integers(channel=False),
        beside="onnxruntime, per tensor",
    ),
    Arm(
        "int8, entropy",
        rows_of("quantize", bits="int8", calibration="entropy"),
        trained=False,
        reference=by.integers("Entropy"),
        beside="onnxruntime, entropy",
    ),
    Arm(
        "int8, percentile",
        rows_of("quantize", bits="int8", calibration="percentile"),
        trained=False,
        reference=by.integers("Percentile"),
        beside="onnxruntime, percentile",
    ),
    Arm(
        "int8, equalized",
        both(rows_of("quantize", bits="int8"), all_of("quantize", equalize=True)),
        trained=False,
        beside="none here: see the MobileNet",
    ),
    Arm(
        "int8, biases corrected",
        both(rows_of("quantize", bits="int8"), all_of("quantize", correct_bias=True)),
        trained=False,
        reference=by.integers(model=by.corrected(channel=True)),
        beside="by hand, then onnxruntime",
    ),
    Arm(
        "int8, dynamic (the linear layer)",
        rows_of("quantize", bits="int8-dynamic"),
        trained=False,
        reference=by.dynamic,
        beside="onnxruntime, quantize_dynamic",
    ),
    Arm(
        "int4 weights (the linear layer)",
        rows_of("quantize", bits="int4"),
        trained=False,
        reference=by.four_bits,
        beside="onnxruntime, MatMulNBitsQuantizer",
    ),
    Arm(
        "int8, its weights in four bits, not trained",
        rows_of("quantize", bits="int8", weights="int4"),
        trained=False,
        beside="none: no library packs the weights of integer convolutions",
    ),
    Arm(
        "int8, its weights in four bits",
        rows_of("quantize", bits="int8", weights="int4"),
        beside="none: no library packs the weights of integer convolutions",
    ),
    Arm(
        "float16",
        rows_of("quantize", bits="float16"),
        trained=False,
        reference=by.half,
        beside="onnxconverter-common",
    ),
    Arm(
        "int8, quantization-aware training",
        both(rows_of("qat", bits="int8"), rows_of("quantize", bits="int8")),
        reference=by.simulated,
        beside="torch.ao, eager, its own simulation",
    ),
    Arm(
        "sparsify 70 %, one shot",
        rows_of("sparsify", ratio=0.7),
        reference=by.masked(0.7),
        beside="torch.nn.utils.prune, layer by layer",
    ),
    Arm(
        "sparsify 70 %, global",
        all_of("sparsify", ratio=0.7, scope="global"),
        reference=by.masked(0.7, together=True),
        beside="torch.nn.utils.prune, global",
    ),
    Arm(
        "sparsify 70 %, gradual",
        rows_of("sparsify", ratio=0.7, schedule="gradual"),
        reference=by.ramped(0.7),
        beside="cubic schedule by hand",
    ),
    Arm(
        "sparsify 2:4",
        rows_of("sparsify", ratio=0.5, pattern="2:4"),
        reference=by.two_of_four,
        beside="torch.ao.pruning, WeightNormSparsifier",
    ),
    Arm(
        "sparsify 70 %, L1 penalty",
        rows_of("sparsify", ratio=0.7, penalty="l1"),
        reference=by.ramped(0.7, "l1"),
        beside="L1 by hand",
    ),
    Arm(
        "sparsify 70 %, group lasso",
        rows_of("sparsify", ratio=0.7, penalty="group"),
        reference=by.ramped(0.7, "group"),
        beside="group lasso by hand",
    ),
    Arm(
        "drop every second block, distilled by relation",
        taught("relation"),
        reference=by.hinted("relation", ()),
        beside="RKD's formula by hand",
    ),
    Arm(
        "drop every second block, distilled by attention",
        taught("attention"),
        reference=by.hinted("attention", STAGES),
        beside="attention transfer's formula by hand",
    ),
    Arm(
        "drop every second block, distilled by features",
        taught("features"),
        reference=by.hinted("features", STAGES),
        beside="FitNets' hint by hand",
    ),
    Arm(
        "store: k-means codebook",
        all_of("store", codec="codebook"),
        trained=False,
        reference=by.clustered,
        beside="scikit-learn, KMeans",
    ),
    Arm(
        "store: powers of two",
        all_of("store", codec="pow2"),
        trained=False,
        reference=by.powers,
        beside="INQ's rounding by hand",
    ),
    Arm(
        "store: zstd",
        all_of("store", codec="zstd"),
        trained=False,
        reference=by.squeezed,
        beside="zstandard on the whole file",
    ),
)


def lab(network: str, epochs: float, train: int, seed: int, console: Console) -> tuple[Lab, tuple[Arm, ...]]:
    """A network and what is done to it."""
    if network == "text":
        task = Sentences.sst2()
        return Lab("BERT", encoder(task), epochs, task, console, ("float16",), seed), ENCODER_ARMS
    pictures = Cifar(train)
    if network == "mobile":
        return Lab("MobileNet", mobilenet(), epochs, pictures, console, (), seed), MOBILE_ARMS
    if network == "unequal":
        return Lab("unequal MobileNet", unequal(), epochs, pictures, console, (), seed), MOBILE_ARMS
    return Lab(f"ResNet-{network}", resnet(int(network)), epochs, pictures, console, ("float16",), seed), ARMS


def file_of(arm: str) -> str:
    """The name of an arm's model."""
    return re.sub(r"[^a-z0-9]+", "-", arm.lower()) + ".onnx"


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="20", choices=("20", "56", "text", "mobile", "unequal"))
    parser.add_argument("--epochs", type=float, default=0.5)
    parser.add_argument("--train", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arm", help="only arms in whose name this regular expression is found")
    parser.add_argument("--part", help="I/N: the I-th of N parts, to run in several processes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--files", type=Path, help="folder that the models are kept in")
    parser.add_argument("--resume", action="store_true", help="rows of --json whose model is in --files are kept")
    parser.add_argument("--join", type=Path, nargs="+", help="train nothing: the table of these JSON files")
    parser.add_argument("--retime", action="store_true", help="with --join and --files: measure the kept models again")
    parser.add_argument("--skip", help="no arms in whose name this regular expression is found")
    parser.add_argument("--go-on", action="store_true", help="a reference that fails is told, the next arm runs")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
    rows: list[dict[str, Any]] = []
    if asked.join:
        found = {row["arm"]: row for file in asked.join for row in json.loads(file.read_text())["rows"]}
        every = {"text": ENCODER_ARMS, "mobile": MOBILE_ARMS, "unequal": MOBILE_ARMS}.get(asked.network, ARMS)
        rows = [found[arm.name] for arm in every if arm.name in found]
        if asked.retime and asked.files:
            bench, _ = lab(asked.network, asked.epochs, asked.train, asked.seed, Console())
            for row in rows:
                if (kept := asked.files / file_of(row["arm"])).is_file():
                    row.update(bench.speed(kept.read_bytes()))
                    print(row["arm"], f"{row['speedup']:.2f}x", "noisy" if row["noisy"] else "")
            bench.close()
        if asked.json:
            asked.json.write_text(json.dumps({"rows": rows}, indent=1))
    else:
        bench, arms = lab(asked.network, asked.epochs, asked.train, asked.seed, Console())
        arms = tuple(arm for arm in arms if asked.arm is None or re.search(asked.arm, arm.name))
        arms = tuple(arm for arm in arms if asked.skip is None or not re.search(asked.skip, arm.name))
        known: dict[str, dict[str, Any]] = {}
        if asked.resume and asked.json and asked.json.is_file():
            known = {row["arm"]: row for row in json.loads(asked.json.read_text())["rows"]}
        index, parts = map(int, asked.part.split("/")) if asked.part else (0, 1)

        def keep(rows: list[dict[str, Any]]) -> None:  # row by row: a long run that is cut off has said what it found
            if asked.json:
                told = {"rows": rows, "epochs": asked.epochs, "train": asked.train}
                asked.json.write_text(json.dumps(told, indent=1))

        try:
            for arm in arms[index::parts]:
                path = (asked.files or Path()) / file_of(arm.name)
                if asked.resume and arm.name in known and path.is_file():
                    row, policy, model = known[arm.name], bench.policy(arm), path.read_bytes()
                else:
                    row, policy, model = bench.ours(arm)
                    if asked.files:
                        asked.files.mkdir(parents=True, exist_ok=True)
                        path.write_bytes(model)
                rows.append(row)
                keep(rows)
                if arm.reference is not None and "gap" not in row:
                    try:
                        row |= bench.beside(arm.reference, policy, model)
                        row.pop("failed", None)
                    except Exception:
                        if not asked.go_on:
                            raise
                        row["failed"] = traceback.format_exc()
                        print(row["failed"])
                keep(rows)
        finally:
            bench.close()
    print(table(rows))
    if asked.table:
        asked.table.write_text(table(rows))


if __name__ == "__main__":
    main()
