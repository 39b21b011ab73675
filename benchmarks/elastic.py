"""What an elastic parent is worth: untrained candidates cut out of it, beside those cut out of the parent.

    AUTOCOMPRESS_DATA=FOLDER python benchmarks/elastic.py [--minutes 10] [--structures 12] [--steps 200] [--json FILE]

A trained CIFAR ResNet (`cifar10.py`) shares its weights for so many minutes among structures of its derived space. Then
structures that took no part in it (a search's first designs with another seed, and blocks dropped at random) are judged
on the selection part: cut out of the parent, cut out of the elastic one, and after `--steps` steps of distillation
from either. `rank_*`: Spearman's correlation of untrained quality with that after training from the parent; 95 %
intervals by bootstrap over structures.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from cifar10 import Cifar, resnet
from rich.console import Console
from rich.table import Table

from autocompress import auto, elastic, load
from autocompress import space as sp
from autocompress.devices.fingerprint import resolve_local
from autocompress.models.foreign import Foreign
from autocompress.parts import make_ops
from autocompress.pipeline import BATCHNORM_BATCHES, Work, shape
from autocompress.ranks import spearman
from autocompress.stages import answers
from autocompress.train import Training, bf16_pays, reestimate_batchnorm
from autocompress.types import Budget, Facts, Genotype, Goal, Space, TrialFailure

GOALS = (Goal(name="device", budgets=(Budget(profile="local-1t", speedup=4.0),)),)


def unseen(kinds: elastic.Structures, space: Space, count: int, seed: int) -> list[Genotype]:
    """Half of them designs, half with so many of the blocks dropped at random, from a tenth to two thirds."""
    found = list(kinds.some(Facts(), GOALS, count // 2, seed))
    rng = Random(f"{seed}:unseen")
    blocks = [i for i, gene in enumerate(space.genes) if gene.op == "block" and "drop" in gene.choices]
    left = count - len(found)
    for turn in range(left):
        share = 0.1 + 0.55 * turn / max(1, left - 1)
        values = list(sp.parent(space))
        for i in rng.sample(blocks, round(share * len(blocks))):
            values[i] = space.genes[i].choices.index("drop")
        found.append(sp.canonical(space, tuple(values)))
    return found


def rank(one: list[float], other: list[float]) -> list[float]:
    """Spearman's correlation, and the ends of its interval."""

    rng = np.random.default_rng(0)
    both = np.array([one, other])
    drawn = [spearman(*both[:, rng.integers(0, len(one), len(one))]) for _ in range(2000)]
    return [spearman(*both), *map(float, np.nanquantile(drawn, (0.025, 0.975)))]


def main() -> None:
    """Share, judge, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depth", type=int, default=56, choices=(20, 56))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--structures", type=int, default=12, help="that took no part")
    parser.add_argument("--steps", type=int, default=200, help="of training, for comparison; 0: none")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    console = Console(emoji=False)
    task, network, profile = Cifar(), resnet(asked.depth).eval(), resolve_local(load.profile("local-1t"))
    builder = Foreign.of(network, task.input)
    space = auto.targeted(builder, (profile,))
    asking = [gene.op for gene in space.genes if gene.kind == "policy"] + [rule.op for rule in space.always]
    ops = make_ops(tuple(dict.fromkeys(asking)))
    work = Work(builder=builder, task=task, ops=ops, parent=network, profiles=(profile,), bf16=bf16_pays())

    kinds = elastic.structures(work, space)
    slices = elastic.cut(work, kinds, kinds.some(Facts(), GOALS, elastic.STRUCTURES, asked.seed))
    sharing = elastic.Sharing(work, slices, asked.seed)
    steps = sharing.run(time.perf_counter() + 60 * asked.minutes, lambda *_: None)
    console.print(f"{len(slices)} structures shared the weights for {steps} steps", highlight=False)
    donated = replace(work, donor=sharing.module.eval())

    def judged(source: Work, genotype: Genotype) -> tuple[float, float]:
        """Untrained, and after so many steps."""
        shaped = shape(source, sp.decode(space, genotype))
        before = task.quality(answers(shaped.module), "selection").value.value
        if not asked.steps:
            return before, before
        trainer = Training(
            shaped.module, task, 1.0, asked.seed, teacher=network, weight=1.0, temperature=elastic.TEMPERATURE,
            lr=elastic.RATE * Cifar.training["lr"], bf16=work.bf16,
        )  # fmt: skip
        trainer.run_to(min(1.0, asked.steps / trainer.total))
        reestimate_batchnorm(shaped.module, task, BATCHNORM_BATCHES)
        return before, task.quality(answers(shaped.module), "selection").value.value

    rows: list[dict[str, float]] = []
    for genotype in unseen(kinds, space, asked.structures, asked.seed + 1):
        try:
            found = {"parent": judged(work, genotype), "elastic": judged(donated, genotype)}
        except TrialFailure as failure:
            console.print(f"left out: {failure}", highlight=False)
            continue
        rows.append({f"{name}{end}": both[i] for name, both in found.items() for i, end in enumerate(("", "_trained"))})
        console.print(json.dumps({key: round(value, 4) for key, value in rows[-1].items()}), highlight=False)
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    figures = {f"median_{key}": float(np.median(values)) for key, values in columns.items()}
    ranks = {f"rank_{key}": rank(columns[key], columns["parent_trained"]) for key in ("parent", "elastic")}
    view = Table("candidates from", "median, untrained", f"after {asked.steps} steps", "rank correlation")
    for key in ("parent", "elastic"):
        ends = "{:.2f} [{:.2f}, {:.2f}]".format(*ranks[f"rank_{key}"])
        view.add_row(key, f"{figures[f'median_{key}']:.4f}", f"{figures[f'median_{key}_trained']:.4f}", ends)
    console.print(view)
    if asked.json:
        said = {"depth": asked.depth, "minutes": asked.minutes, "threads": asked.threads, "steps": steps, "rows": rows}
        asked.json.write_text(json.dumps({**figures, **ranks, **said}, indent=1) + "\n")


if __name__ == "__main__":
    main()
