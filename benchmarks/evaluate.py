"""Where the seconds of a trial go, and what tracing and deciding cost on large networks.

    python benchmarks/evaluate.py [--model torchvision:resnet50] [--size 224] [--epochs 2] [--json FILE]

One process, one thread, random images. `trace_space_s`: finding sites and blocks and deriving `space: auto`, for
ResNet-50 and ViT-B. `decide_s`: deciding and enacting a whole policy (pruning 30 %, low rank 50 %) on `--model`, first
and with what is cached from the first. Then one trial of `--model` (the same policy and int8, a short training) by
stages, and the peak of its memory beside weights, gradients, momenta, teacher and one batch's activations.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
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

GOALS = {"trace_space_s resnet50": 2.0, "trace_space_s vit_b_16": 4.0, "decide_s first": 8.0, "decide_s again": 1.0}


class Clock:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds what passes inside."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def derive(name: str, size: int, clock: Clock) -> int:
    """Sites and the derived space of a torchvision network; returns the number of genes."""
    spec = InputSpec(shape=(3, size, size))
    builder = parts.make_builder(f"torchvision:{name}", spec, {})
    with clock(f"trace_space_s {name}"):
        builder.sites()
        return len(auto.space(builder).genes)


def policy(builder: Any) -> Policy:
    """Prune, factorise and quantize every site that can be."""
    rules: list[Rule] = []
    for site in builder.sites():
        if "prune" in site.ops:
            rules.append(Rule(site=site.name, op="prune", settings={"ratio": 0.3}))
        if "lowrank" in site.ops:
            rules.append(Rule(site=site.name, op="lowrank", settings={"rank": 0.5}))
        if "quantize" in site.ops:
            rules.append(Rule(site=site.name, op="quantize", settings={"bits": "int8"}))
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


def trial(name: str, size: int, epochs: float, clock: Clock) -> dict[str, Any]:
    """One candidate by stages."""
    task = Noise(InputSpec(shape=(3, size, size)))
    builder = parts.make_builder(name, task.input, {"num_classes": 10})
    parent = builder.build({}).eval()
    ops = parts.make_ops(("prune", "lowrank", "quantize", "distill"))
    work = Work(builder=builder, task=task, ops=ops, parent=parent, profiles=(PROFILE,), epochs=epochs)
    chosen = policy(builder)
    for stage in ("decide_s first", "decide_s again"):
        module = builder.build({})
        builder.inherit(module, parent, {})
        with clock(stage):
            for op in ("prune", "lowrank"):
                tensors: dict[str, Any] = {}
                receipt = ops[op].decide(module, chosen.of(op), task, PROFILE, tensors)
                ops[op].enact(module, receipt, tensors)
    candidate = Candidate(arch={}, policy=chosen)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    with clock("trial structure"):
        shaped = shape(work, candidate)
    with clock("trial first look (export, one batch's ranges)"):
        release(work, shaped.module, chosen, first_look=True)
    with clock("trial train"):
        trained = training(work, shaped, chosen, 0)
        trained.run_to(1.0)
    with clock("trial export and int8"):
        (done,) = release(work, shaped.module, chosen).values()
    with clock("trial quality"):
        task.quality(export.predictor(done.model), "selection")
    batch = torch.zeros(trained.batch, *task.input.shape)
    weights = sum(p.nbytes for p in shaped.module.parameters()) / 1e6
    return {
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "before_mb": before,
        "weights_mb": weights,
        "teacher_mb": sum(p.nbytes for p in parent.parameters()) / 1e6,
        "activations_mb": activations(shaped.module, batch) / 1e6,
    }


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="torchvision:resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    clock, console = Clock(), Console()
    genes = {name: derive(name, 224, clock) for name in ("resnet50", "vit_b_16")}
    memory = trial(asked.model, asked.size, asked.epochs, clock)
    view = Table("what", "seconds", "goal")
    for name, seconds in clock.seconds.items():
        view.add_row(name, f"{seconds:.2f}", f"{GOALS[name]:g}" if name in GOALS else "")
    console.print(view)
    console.print(f"genes of the derived space: {genes}", highlight=False)
    console.print(", ".join(f"{name} {value:.0f}" for name, value in memory.items()), highlight=False)
    if asked.json:
        asked.json.write_text(json.dumps({"seconds": clock.seconds, "memory": memory, "genes": genes}, indent=1))


if __name__ == "__main__":
    main()
