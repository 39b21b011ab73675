"""Real accuracy: fixed policies on trained CIFAR ResNets, beside what other tools do with the same network.

    AUTOCOMPRESS_DATA=FOLDER python benchmarks/oneshot.py [--networks 20,56] [--epochs 1] [--train 50000] [--json FILE]

Every trained arm gets the same short distillation (`--epochs` over the first `--train` images). Quality is that of the
ONNX file on test images 5000-9999, read once; `drop` is the paired difference to the fp32 file on the same images with
its 95 % interval, in points. Latency: batch 1, one thread, a core of its own, in turn with the fp32 file.

Arms of other tools: `onnxruntime` (its quantize_static as shipped: QDQ, per-channel, minmax), `torch-pruning` (its
MagnitudePruner by hand, half of the channels of what it can prune without touching the shortcuts, then the same
distillation and the same int8).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch_pruning
from cifar10 import Cifar, resnet
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from rich.console import Console
from rich.table import Table
from torch import nn

from autocompress import export, load
from autocompress.devices.cores import keep_to, plan_cores
from autocompress.devices.fingerprint import resolve_local
from autocompress.devices.station import Station
from autocompress.models.foreign import Foreign
from autocompress.parts import make_ops
from autocompress.pipeline import Release, Shaped, Work, export_float, release, shape, training
from autocompress.tasks import Predict, Task, several
from autocompress.tasks.intervals import paired
from autocompress.types import Candidate, Policy, Rule, Site

SEED = 0
DISTILL = Rule(site=".", op="distill", settings={"weight": 0.7, "temperature": 3.0})
OPS = ("block", "replace", "prune", "lowrank", "distill", "qat", "sparsify", "quantize", "store")


def everywhere(op: str, sites: Sequence[Site], **settings: Any) -> list[Rule]:
    """The same rule at every site that the op can act on."""
    return [Rule(site=site.name, op=op, settings=settings) for site in sites if op in site.ops]


def every_other_block(sites: Sequence[Site]) -> list[Rule]:
    """Drop every second block that can be dropped."""
    blocks = [site.name for site in sites if "block" in site.ops]
    return [Rule(site=name, op="block", settings={"kind": "drop"}) for name in blocks[1::2]]


ARMS: dict[str, Callable[[Sequence[Site]], list[Rule]]] = {
    "int8": lambda sites: everywhere("quantize", sites, bits="int8"),
    "qat int8": lambda sites: [
        *everywhere("qat", sites, bits="int8"),
        *everywhere("quantize", sites, bits="int8"),
        DISTILL,
    ],
    "prune 50 % + int8": lambda sites: [
        *everywhere("prune", sites, ratio=0.5),
        *everywhere("quantize", sites, bits="int8"),
        DISTILL,
    ],
    "low rank 50 % + int8": lambda sites: [
        *everywhere("lowrank", sites, rank=0.5),
        *everywhere("quantize", sites, bits="int8"),
        DISTILL,
    ],
    "drop blocks + int8": lambda sites: [
        *every_other_block(sites),
        *everywhere("quantize", sites, bits="int8"),
        DISTILL,
    ],
}


class Reader(CalibrationDataReader):
    """Calibration samples for onnxruntime's own quantizer."""

    def __init__(self, task: Task, count: int = 128) -> None:
        names = [one.name for one in task.input.every]
        self.left = iter(
            [
                dict(zip(names, (one.numpy() for one in several(inputs)), strict=True))
                for inputs, _ in task.batches("calibration", 32, limit=count)
            ]
        )

    def get_next(self) -> Any:
        """The next feed, None at the end."""
        return next(self.left, None)


def as_shipped(model: bytes, task: Task) -> bytes:
    """onnxruntime's static quantization with its default types."""
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name) / "float.onnx", Path(name) / "int8.onnx"
        source.write_bytes(model)
        quantize_static(source, target, Reader(task), quant_format=QuantFormat.QDQ, per_channel=True)
        return target.read_bytes()


def pruned_by_hand(parent: nn.Module) -> nn.Module:
    """torch-pruning alone: half of the inner channels of every block (the padded shortcuts couple everything else)."""
    module = copy.deepcopy(parent)
    inner = {part for name, part in module.named_modules() if name.endswith("conv1") and "layer" in name}
    outer: list[nn.Module] = [p for p in module.modules() if isinstance(p, nn.Conv2d | nn.Linear) and p not in inner]
    example = torch.zeros(1, 3, 32, 32)
    pruner = torch_pruning.pruner.MagnitudePruner(
        module,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=outer,
    )
    pruner.step()
    return module


class Measured(Task, Protocol):
    """A task that can say sample by sample what is right."""

    def scores(self, predict: Predict, split: str) -> NDArray[np.bool_]:
        """Whether each sample of a split is classified rightly, shape (n,): what paired differences are made of."""
        ...


class Bench:
    """One network: its fp32 file is what everything is held against."""

    def __init__(
        self,
        name: str,
        parent: nn.Module,
        epochs: float,
        task: Measured,
        console: Console,
        types: tuple[str, ...] = (),
        seed: int = SEED,
    ) -> None:
        """`types`: number formats that the profile is asked to allow beside those it says it is good at."""
        self.name, self.task, self.console, self.seed = name, task, console, seed
        self.profile = resolve_local(load.profile("local-1t"))
        self.profile = self.profile.model_copy(update={"types": (*self.profile.types, *types)})
        self.builder = Foreign.of(parent, task.input)
        self.work = Work(
            builder=self.builder,
            task=task,
            ops=make_ops(OPS),
            parent=self.builder.build({}).eval(),
            profiles=(self.profile,),
            epochs=epochs,
        )
        self.folder = tempfile.TemporaryDirectory()
        self.baseline = Path(self.folder.name) / "baseline.onnx"
        self.baseline.write_bytes(export.compose(export_float(self.work, self.work.parent)))
        self.right = task.scores(export.predictor(self.baseline.read_bytes()), "test")
        console.print(f"{name} fp32: {self.right.mean():.4f} on {len(self.right)} samples", highlight=False)
        plan = plan_cores((self.profile,))
        keep_to(plan.trainers)
        self.station = Station((self.profile,), plan, self.baseline)

    def row(self, arm: str, model: bytes, seconds: float) -> dict[str, Any]:
        """Quality, size and speed of a file."""
        right = self.task.scores(export.predictor(model), "test")
        lost = paired(self.right, right)
        drop = 100 * lost.value
        row = {
            "network": self.name,
            "arm": arm,
            "quality": float(right.mean()),
            "drop": drop,
            "drop_low": 100 * lost.low,
            "drop_high": 100 * lost.high,
            "size_mb": len(model) / 1e6,
            "size_ratio": len(model) / self.baseline.stat().st_size,
            "samples": len(right),
            "seconds": round(seconds, 1),
            **self.speed(model),
        }
        self.console.print(
            f"{self.name} {arm}: {row['quality']:.4f}, {drop:+.2f} points lost "
            f"[{row['drop_low']:+.2f}, {row['drop_high']:+.2f}], {row['speedup']:.2f}x, {seconds:.0f} s",
            highlight=False,
        )
        return row

    def speed(self, model: bytes) -> dict[str, Any]:
        """Latency of a file in turn with fp32, by a fresh process."""
        reading = self.station.session(self.profile.name, model)
        return {
            "ms": reading.ms.value,
            "speedup": reading.speedup,
            "speedup_low": 1 / reading.ratio.high,
            "speedup_high": 1 / reading.ratio.low,
            "timed": reading.samples,
            "noisy": reading.noisy,
        }

    def rows(self, only: str | None) -> Iterator[dict[str, Any]]:
        """All arms, or those whose name contains `only`."""
        arms: dict[str, Callable[[], bytes]] = {"fp32": self.baseline.read_bytes}
        for arm, rules in ARMS.items():
            arms[arm] = lambda rules=rules: self.apply(Policy(rules=tuple(rules(self.builder.sites())))).model
        arms["onnxruntime as shipped"] = lambda: as_shipped(self.baseline.read_bytes(), self.task)
        arms["torch-pruning by hand + int8"] = self.by_hand
        for arm, make in arms.items():
            if only is None or only in arm:
                started = time.perf_counter()
                model = make()
                yield self.row(arm, model, time.perf_counter() - started)

    def apply(self, policy: Policy) -> Release:
        """The whole path of a candidate: decide, enact, train where the arm trains, settle, export, quantize."""
        torch.manual_seed(self.seed)
        shaped = shape(self.work, Candidate(arch={}, policy=policy))
        if policy.of("distill"):
            training(self.work, shaped, policy, self.seed).run_to(1.0)
        settled = shaped.settle(self.work)
        (done,) = release(self.work, settled.module, policy, learned=settled.ranges()).values()
        return done

    def by_hand(self) -> bytes:
        """torch-pruning, the same distillation, our int8."""
        rules = (*everywhere("quantize", self.builder.sites(), bits="int8"), DISTILL)
        policy = Policy(rules=rules)
        shaped = Shaped(pruned_by_hand(self.work.parent), ())
        torch.manual_seed(self.seed)
        training(self.work, shaped, policy, self.seed).run_to(1.0)
        (done,) = release(self.work, shaped.module, policy).values()
        return done.model

    def close(self) -> None:
        """Stop the timing process."""
        self.station.close()
        self.folder.cleanup()


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="20,56")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--train", type=int, default=50_000)
    parser.add_argument("--arm", help="only arms whose name contains this")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
    console = Console()
    rows: list[dict[str, Any]] = []
    for depth in map(int, asked.networks.split(",")):
        bench = Bench(f"ResNet-{depth}", resnet(depth), asked.epochs, Cifar(asked.train), console)
        try:
            for row in bench.rows(asked.arm):
                rows.append(row)
                if asked.json:  # row by row: a long run that is cut off has said what it found
                    told = {"rows": rows, "epochs": asked.epochs, "train": asked.train}
                    asked.json.write_text(json.dumps(told, indent=1))
        finally:
            bench.close()
    view = Table("network", "arm", "quality", "points lost", "size", "speed")
    for row in rows:
        view.add_row(
            row["network"],
            row["arm"],
            f"{row['quality']:.4f}",
            f"{row['drop']:+.2f} [{row['drop_low']:+.2f}, {row['drop_high']:+.2f}]",
            f"{row['size_ratio']:.2f}",
            f"{row['speedup']:.2f}x [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]",
        )
    console.print(view)


if __name__ == "__main__":
    main()
