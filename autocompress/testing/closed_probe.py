"""What a probe would find of a closed-form problem: each choice alone, in two backgrounds, with errors of measurement.

Honest in what a real probe does not know: no interactions (neighbours cut together, an op beside another), nothing of
the training's recipe, and a divergence without training, which tells sensitive sites from others but not what training
wins back: it errs per choice, and per op by a factor that nobody is told.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from random import Random
from typing import TYPE_CHECKING

from autocompress.types import Genotype, Probed

if TYPE_CHECKING:
    from autocompress.testing.closed_form import ClosedForm

UNTRAINED = {"prune": 2.5, "lowrank": 1.5, "quantize": 1.0, "": 4.0}  # divergence by op, of what is lost when trained
KL_ERROR = 0.4  # spread of its logarithm
MS_ERROR, CLOCK_US = 0.05, 2.0  # spread of a gain as a share, and of any reading
PAYS = 0.002  # share of the latency from which a choice alone counts as a gain


def probed(problem: ClosedForm) -> Iterator[Probed]:
    """One record per choice of every gene but the recipe's, which changes nothing before training."""
    genes = problem.space.genes
    parent: Genotype = (0,) * len(genes)
    integers = tuple(int(gene.op == "quantize") for gene in genes)
    nothing_lost = problem.cost(parent)[1]
    for i, gene in enumerate(genes):
        for choice in range(1, len(gene.choices)) if gene.op != "distill" else ():
            luck = Random(f"probe:{problem.seed}:{gene.name}:{choice}")
            alone = _with(parent, i, choice)
            lost = (problem.cost(alone)[1] - nothing_lost) * 1e-5
            kl = lost * UNTRAINED[gene.op] * math.exp(luck.gauss(0, KL_ERROR))
            ms: dict[str, float] = {}
            best: dict[str, float] = {}
            for device, profile in enumerate(problem.profiles):
                whole = problem.cost(parent, device)[0]
                ms[profile] = _read(whole - problem.cost(alone, device)[0], luck)
                if gene.op == "quantize" and ms[profile] * 1000 > PAYS * whole:
                    continue
                undone = _with(integers, i, 0 if gene.op == "quantize" else choice)
                gained = problem.cost(integers, device)[0] - problem.cost(undone, device)[0]
                best[profile] = _read(-gained if gene.op == "quantize" else gained, luck)
            yield Probed(gene=gene.name, choice=gene.choices[choice], kl=round(kl, 8), ms=ms, best_ms=best)


def _with(g: Genotype, place: int, choice: int) -> Genotype:
    return (*g[:place], choice, *g[place + 1 :])


def _read(micros: int, luck: Random) -> float:
    """Milliseconds as a clock tells them."""
    return round((micros * (1 + luck.gauss(0, MS_ERROR)) + luck.gauss(0, CLOCK_US)) / 1000, 6)
