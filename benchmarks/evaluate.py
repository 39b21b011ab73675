"""Where the seconds of a trial go, what it holds in memory, and what tracing and deciding cost on large networks.

    python benchmarks/evaluate.py [--model torchvision:resnet50] [--size 224] [--epochs 2] [--only PART] [--json FILE]

One thread, random images. Parts: `trace`: finding sites and blocks and deriving `space: auto`, for ResNet-50 and ViT-B,
what torchvision's import takes apart. `decide`: deciding and enacting a whole policy (pruning 30 %, low rank 50 %) on
`--model`, first and with what is cached from the first; then single ops that read calibration data, deciding alone.
`trial`: one candidate of `--model` (pruning, low rank by data, int8, distillation, a short training) by stages, in a
process of its own: `trial_mb`, its peak above what Python and the libraries take before, beside `bound_mb`, which is
weights, gradients, momenta, teacher, one batch's activations and 500 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from zoo import PROFILE, Noise

from autocompress import auto, export, parts
from autocompress.pipeline import Work, release, shape, training
from autocompress.tasks import InputSpec
from autocompress.types import Candidate, Policy, Rule
from autocompress.vision import import_torchvision

GOALS = {
    "trace_space_s resnet50": 2.0,
    "trace_space_s vit_b_16": 4.0,
    "decide_s first": 8.0,
    "decide_s again": 1.0,
    "decide_s low rank by data": 8.0,
}
PARTS = ("trace", "decide", "trial")
ALLOWED_MB = 500.0
OPS: dict[str, tuple[str, dict[str, Any], str]] = {
    "low rank by data": ("lowrank", {"rank": 0.5, "data": True}, ""),
    "replace all by separable": ("replace", {"kind": "separable"}, ""),
    "prune by taylor": ("prune", {"ratio": 0.3, "importance": "taylor"}, ""),
    "prune by taylor, vit_b_16": ("prune", {"ratio": 0.3, "importance": "taylor"}, "torchvision:vit_b_16"),
}


class Clock:
    """Seconds by name, and those of the processor: equal on a quiet core."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.processor: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds what passes inside."""
        started = time.perf_counter(), time.process_time()
        yield
        for told, now, before in zip(
            (self.seconds, self.processor), (time.perf_counter(), time.process_time()), started, strict=True
        ):
            told[name] = told.get(name, 0.0) + now - before


def derive(name: str, size: int, clock: Clock) -> int:
    """Sites and the derived space of a torchvision network; returns the number of genes."""
    spec = InputSpec(shape=(3, size, size))
    builder = parts.make_builder(f"torchvision:{name}", spec, {})
    with clock(f"trace_space_s {name}"):
        builder.sites()
        return len(auto.space(builder).genes)


def policy(builder: Any, *, data: bool = False) -> Policy:
    """Prune, factorise and quantize every site that can be; with `data` factorise by it, and distill."""
    rules: list[Rule] = []
    for site in builder.sites():
        if "prune" in site.ops:
            rules.append(Rule(site=site.name, op="prune", settings={"ratio": 0.3}))
        if "lowrank" in site.ops:
            rules.append(Rule(site=site.name, op="lowrank", settings={"rank": 0.5, "data": data}))
        if "quantize" in site.ops:
            rules.append(Rule(site=site.name, op="quantize", settings={"bits": "int8"}))
    rules += [Rule(site=".", op="distill", settings={"weight": 0.5})] if data else []
    return Policy(rules=tuple(rules))


def activations(module: nn.Module, inputs: torch.Tensor) -> int:
    """Bytes of all outputs of layers in one forward pass."""
    total = 0

    def add(_module: nn.Module, _inputs: Any, outputs: Any) -> None:
        nonlocal total
        if isinstance(outputs, torch.Tensor):
            total += outputs.nbytes

    handles = [part.register_forward_hook(add) for part in module.modules() if not list(part.children())]
    with torch.no_grad():
        module(inputs)
    for handle in handles:
        handle.remove()
    return total


def decisions(name: str, size: int, clock: Clock) -> None:
    """A whole policy, twice, and single ops."""
    task = Noise(InputSpec(shape=(3, size, size)))
    builder = parts.make_builder(name, task.input, {"num_classes": 10})
    parent = builder.build({}).eval()
    ops, chosen = parts.make_ops(("prune", "lowrank", "replace")), policy(builder)
    for again in ("first", "again"):
        module = builder.build({})
        builder.inherit(module, parent, {})
        with clock(f"decide_s {again}"):
            for op in ("prune", "lowrank"):
                tensors: dict[str, Any] = {}
                receipt = ops[op].decide(module, chosen.of(op), task, PROFILE, tensors)
                ops[op].enact(module, receipt, tensors)
    for what, (op, settings, other) in OPS.items():
        if other:
            task = Noise(InputSpec(shape=(3, 224, 224)))
            parent = parts.make_builder(other, task.input, {"num_classes": 10}).build({}).eval()
        with clock(f"decide_s {what}"):
            ops[op].decide(parent, (Rule(site=".", op=op, settings=settings),), task, PROFILE, {})


def trial(name: str, size: int, epochs: float, clock: Clock) -> dict[str, Any]:
    """One candidate by stages."""
    import_torchvision()
    libraries = resident()
    task = Noise(InputSpec(shape=(3, size, size)))
    builder = parts.make_builder(name, task.input, {"num_classes": 10})
    parent = builder.build({}).eval()
    ops = parts.make_ops(("prune", "lowrank", "quantize", "distill"))
    work = Work(builder=builder, task=task, ops=ops, parent=parent, profiles=(PROFILE,), epochs=epochs)
    chosen = policy(builder, data=True)
    candidate = Candidate(arch={}, policy=chosen)
    with clock("trial structure"):
        shaped = shape(work, candidate)
    peaks = {"structure_mb": resident()}
    with clock("trial first look (export, one batch's ranges)"):
        release(work, shaped.module, chosen, first_look=True)
    peaks["first_look_mb"] = resident()
    with clock("trial train"):
        trained = training(work, shaped, chosen, 0)
        trained.run_to(1.0)
    peaks["train_mb"] = resident()
    with clock("trial export and int8"):
        (done,) = release(work, shaped.module, chosen).values()
    with clock("trial quality"):
        task.quality(export.predictor(done.model), "selection")
    peak = resident()
    weights = sum(p.nbytes for p in shaped.module.parameters()) / 1e6
    teacher = sum(p.nbytes for p in parent.parameters()) / 1e6
    held = activations(shaped.module, torch.zeros(trained.batch, *task.input.shape)) / 1e6
    return {
        "peak_mb": peak,
        "libraries_mb": libraries,
        "trial_mb": peak - libraries,
        "bound_mb": 3 * weights + teacher + held + ALLOWED_MB,  # weights, gradients, momenta
        **peaks,
        "weights_mb": weights,
        "teacher_mb": teacher,
        "batch": trained.batch,
        "activations_mb": held,
    }


def resident() -> float:
    """The most that this process has held so far, MB."""
    status = Path("/proc/self/status")  # unlike ru_maxrss without what the process held that started this one
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def alone(asked: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """The trial in a process of its own, whose peak is not another part's."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trial.json"
        told = ["--model", asked.model, "--size", asked.size, "--epochs", asked.epochs, "--json", file]
        subprocess.run([sys.executable, __file__, "--only", "trial", *map(str, told)], check=True, capture_output=True)
        found = json.loads(file.read_text())
    clock.seconds |= found["seconds"]
    clock.processor |= found["processor"]
    return found["memory"]


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="torchvision:resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    clock, console = Clock(), Console()
    genes: dict[str, int] = {}
    memory: dict[str, Any] = {}
    if asked.only in (None, "trace"):
        with clock("import_s torchvision, torch's compiler with it"):
            import_torchvision()
        genes = {name: derive(name, 224, clock) for name in ("resnet50", "vit_b_16")}
    if asked.only in (None, "decide"):
        decisions(asked.model, asked.size, clock)
    if asked.only == "trial":
        memory = trial(asked.model, asked.size, asked.epochs, clock)
    elif asked.only is None:
        memory = alone(asked, clock)
    view = Table("what", "seconds", "processor's", "goal")
    for name, seconds in clock.seconds.items():
        view.add_row(
            name, f"{seconds:.2f}", f"{clock.processor[name]:.2f}", f"{GOALS[name]:g}" if name in GOALS else ""
        )
    console.print(view)
    console.print(f"genes of the derived space: {genes}", highlight=False)
    console.print(", ".join(f"{name} {value:.0f}" for name, value in memory.items()), highlight=False)
    if asked.json:
        asked.json.write_text(
            json.dumps(
                {"seconds": clock.seconds, "processor": clock.processor, "memory": memory, "genes": genes}, indent=1
            )
        )


if __name__ == "__main__":
    main()
