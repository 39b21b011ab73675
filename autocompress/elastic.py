"""An elastic parent: one set of weights from which many structures can be cut and used as they are (floor F5).

Every step a few structures of the space, cut out of the same weights, learn what the parent answers (the sandwich rule
and in-place distillation of Yu and Huang 2019, "Universally slimmable networks", sections 3.1 and 3.3, with the parent
in the place of the widest and structures of the search's first front in that of the narrowest). Their batch-norm
statistics are estimated anew when they are used (section 3.2 there); the rest of their training is what the search
need not wait for.

On CIFAR's ResNet-56 with 13 of 27 blocks dropped, untrained: 42 % right when cut out of the parent, 82 % when cut out
of an elastic one that was trained for 1,200 steps of 64 images (3 structures each, none of them seen in training).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from autocompress import space as sp
from autocompress.distill import responses_loss
from autocompress.pipeline import BATCHNORM_BATCHES, Shaped, Work, shape
from autocompress.ranks import spearman
from autocompress.searchers.design import first, spread
from autocompress.slices import Slice, slice_of
from autocompress.tasks import batch_size, several
from autocompress.tasks.recipe import recipe
from autocompress.train import Training, bf16_pays, channels_last, draw, one_cycle, reestimate_batchnorm
from autocompress.types import Choice, Facts, Genotype, Goal, Space, TrialFailure

STRUCTURES = 64  # that take turns
MEMORY = 2**30  # bytes that they may take
TOGETHER = 2  # of them in one step
FEWEST = 4  # below which there is nothing to share
RATE = 0.4  # of the recipe's: 0.03 on ResNet-56
TEMPERATURE = 4.0
LOOK_AGAIN = 50  # steps after which it is tried again how many threads pay
CHECKED = 8  # structures by which slices are compared with trained candidates
CHECK_STEPS = 60
CHECK_SAMPLES = 512  # of calibration, on which both are held against the parent's answers
SHARE = 0.75  # of the seconds for sharing; the rest is for the comparison
AGREE = 0.7  # rank correlation from which slices decide who is trained
Step = Callable[[str, int, int, float], None]
"""Told what is done, how many of how many are done, and how many seconds are left."""


@dataclass(frozen=True)
class Structures:
    """Genotypes whose structure is a selection of the parent's weights."""

    space: Space
    allowed: Mapping[int, tuple[int, ...]]  # gene -> choices of structure that select; other genes stand at their first

    def restrict(self, genotype: Genotype) -> Genotype:
        """Canonical, with everything else left alone."""
        values = [value if value in self.allowed.get(i, ()) else 0 for i, value in enumerate(genotype)]
        return sp.canonical(self.space, tuple(values))

    def some(self, facts: Facts, goals: Sequence[Goal], count: int, seed: int) -> tuple[Genotype, ...]:
        """At most `count` different ones: a search's first candidates, and others spread over the space."""
        rng, found = Random(f"{seed}:elastic"), dict[Genotype, None]()
        neutral = sp.parent(self.space)
        for turn in range(4):
            for many in (first(self.space, facts, goals, count // 2, rng), spread(self.space, count, rng)):
                found |= dict.fromkeys(g for g in map(self.restrict, many) if g != neutral)
            if turn and len(found) >= count:
                break
        every = list(found)
        rng.shuffle(every)
        return tuple(every[:count])


def structures(work: Work, space: Space) -> Structures:
    """Which choices select: one gene of each op and setting is tried for all of its kind."""
    verdicts: dict[tuple[str, str, Choice], bool] = {}
    allowed: dict[int, tuple[int, ...]] = {}
    for i, gene in enumerate(space.genes):
        op = work.ops.get(gene.op)
        if gene.kind == "policy" and (op is None or op.phase != "structure"):
            continue
        held: list[int] = []
        for place, choice in enumerate(gene.choices):
            key = (gene.op, gene.param or gene.name, choice)
            if place and key not in verdicts:
                values = list(sp.parent(space))
                values[i] = place
                genotype = sp.canonical(space, tuple(values))
                if genotype == sp.parent(space):  # it means nothing by itself: another gene of its kind may
                    continue
                verdicts[key] = _selects(work, space, genotype)
            if place and verdicts.get(key, False):
                held.append(place)
        allowed[i] = tuple(held)
    return Structures(space, allowed)


def _selects(work: Work, space: Space, genotype: Genotype) -> bool:
    try:
        slice_of(work, space, genotype)
    except TrialFailure:
        return False
    return True


@dataclass(frozen=True)
class Found:
    """What came of it. `module` is the donor of candidates' weights, in eval mode."""

    module: nn.Module
    structures: int
    steps: int
    agreement: float | None = None  # rank correlation of slices with trained candidates
    seconds: float = 0.0

    @property
    def decides(self) -> bool:
        """Whether slices may decide who is trained."""
        return self.agreement is not None and self.agreement >= AGREE

    def __str__(self) -> str:
        """One line for the terminal."""
        said = f"elastic parent: {self.structures} structures shared its weights for {self.steps} steps"
        if self.agreement is None:
            return f"{said}; candidates start from it"
        ranks = f"untrained slices rank as trained candidates do by {self.agreement:.2f} (of {CHECKED})"
        return f"{said}; {ranks}: " + ("slices decide who is trained" if self.decides else "candidates are trained")


def train(
    work: Work,
    space: Space,
    facts: Facts,
    goals: Sequence[Goal],
    *,
    seconds: float,
    seed: int,
    step: Step = lambda _words, _done, _total, _left: None,
) -> Found | None:
    """Share the parent's weights among structures of the space for so many seconds.

    A quarter of them is for the comparison with trained candidates. None where the space has fewer than FEWEST
    structures that only take away.
    """
    began, most = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)  # single samples: more would wait for one another
    kinds = structures(work, space)
    slices = cut(work, kinds, kinds.some(facts, goals, STRUCTURES + CHECKED, seed))
    if len(slices) < FEWEST:
        return None
    checked, used = slices[:CHECKED], slices[CHECKED:] if len(slices) >= FEWEST + CHECKED else slices
    sharing = Sharing(work, used, seed)
    torch.set_num_threads(most)
    steps = sharing.run(began + SHARE * seconds, step)
    donor = sharing.module.eval()
    found = Found(donor, len(used), steps)
    with_donor = replace(work, donor=donor)
    torch.set_num_threads(1)  # as candidates are trained
    if len(checked) >= FEWEST:
        found = replace(found, agreement=agreement(with_donor, space, checked, began + seconds, seed, step))
    return replace(found, seconds=time.perf_counter() - began)


def cut(work: Work, kinds: Structures, genotypes: Sequence[Genotype]) -> list[Slice]:
    """Those that are selections, as many as MEMORY holds."""
    found: list[Slice] = []
    spent = 0
    for genotype in genotypes:
        try:
            one = slice_of(work, kinds.space, genotype)
        except TrialFailure:  # choices that select one by one need not do so together
            continue
        spent += one.bytes
        if spent > MEMORY and len(found) >= FEWEST:
            break
        found.append(one)
    return found


class Sharing:
    """The training of weights that `slices`, one at least, share; `module` begins as the parent's copy."""

    def __init__(self, work: Work, slices: Sequence[Slice], seed: int) -> None:
        self.work, self.slices, self.seed = work, tuple(slices), seed
        self.module = channels_last(copy.deepcopy(work.parent))
        for one in self.slices:
            channels_last(one.module).train()
        self.weights = dict(self.module.named_parameters())
        self.recipe = recipe(work.task)
        self.rate = RATE * self.recipe.lr
        wide = [p for p in self.weights.values() if p.ndim > 1]
        others = [p for p in self.weights.values() if p.ndim <= 1]
        groups = [{"params": wide, "weight_decay": self.recipe.decay}, {"params": others, "weight_decay": 0.0}]
        if self.recipe.optimizer == "adamw":
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=self.rate)
        else:
            self.optimizer = torch.optim.SGD(groups, lr=self.rate, momentum=self.recipe.momentum, nesterov=True)
        self.bf16 = bool(work.bf16 if work.bf16 is not None else bf16_pays())

    def run(self, until: float, step: Step) -> int:
        """Train until that time of `time.perf_counter`, at least one step; the rate's schedule spans it.

        With one thread or all, whatever is faster at the moment: on cores that others want, threads that wait for one
        another take many times as long as one alone. The faster number stays set.
        """
        began, done, epoch = time.perf_counter(), 0, 0
        most, took = torch.get_num_threads(), dict[int, float]()
        while True:
            for inputs, _ in self.work.task.batches("train", self.recipe.batch, seed=draw(self.seed, 3, epoch)):
                now = time.perf_counter()
                if done and now >= until:
                    reestimate_batchnorm(self.module, self.work.task, BATCHNORM_BATCHES)
                    return done
                if done % LOOK_AGAIN == 0:
                    took.clear()
                untried = [count for count in dict.fromkeys((1, most)) if count not in took]
                threads = untried[0] if untried else min(took, key=lambda count: took[count])
                torch.set_num_threads(threads)
                share = min((now - began) / max(until - began, 1e-9), 1.0)
                self.update(several(inputs), share, done)
                took[threads] = time.perf_counter() - now
                done += 1
                if done % 10 == 0:
                    step("sharing the parent's weights", done, round(done / max(share, 1e-3)), until - now)
            epoch += 1

    def update(self, inputs: tuple[Tensor, ...], share: float, number: int) -> float:
        """One step at that share of the training; the mean loss of its structures."""
        if batch_size(inputs) == 1:  # batch normalisation has no statistics of one sample
            return 0.0
        rng = Random(f"{self.seed}:{number}")
        arguments = tuple(one.contiguous(memory_format=torch.channels_last) if one.ndim == 4 else one for one in inputs)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * one_cycle(round(1000 * share), 1000)
        with torch.no_grad(), self.precision():
            taught = [one.float() for one in several(self.work.parent(*arguments))]
        self.optimizer.zero_grad(set_to_none=True)
        chosen, total = rng.sample(self.slices, min(TOGETHER, len(self.slices))), 0.0
        for one in chosen:
            buffers = {name: tensor.clone() for name, tensor in one.module.named_buffers()}  # nobody's
            with self.precision():
                outputs = several(functional_call(one.module, {**one.weights(self.weights), **buffers}, arguments))
            loss = responses_loss([each.float() for each in outputs], taught, TEMPERATURE) / len(chosen)
            loss.backward()
            total += float(loss.detach())
        norm = nn.utils.clip_grad_norm_(self.weights.values(), self.recipe.clip)
        if torch.isfinite(norm):  # a batch that overflowed teaches nothing
            self.optimizer.step()
        self.work.gate.step()
        return total

    def precision(self) -> torch.autocast:
        """bfloat16 where it pays."""
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16)


def agreement(work: Work, space: Space, slices: Sequence[Slice], until: float, seed: int, step: Step) -> float | None:
    """Spearman's correlation of how far slices are from the parent with how far a little training leaves them.

    As many as there is time for, at least FEWEST; those that fail say nothing. None where all are equal.
    """
    before, after = list[float](), list[float]()
    for done, one in enumerate(slices):
        left = until - time.perf_counter()
        if left <= 0 and done >= FEWEST:
            break
        step("comparing slices with trained candidates", done, len(slices), max(left, 0.0))
        try:
            shaped = shape(work, sp.decode(space, one.genotype))
            sliced = distance(work, shaped)
            trainer = Training(
                shaped.module, work.task, epochs=1.0, seed=seed, teacher=work.parent, weight=1.0,
                temperature=TEMPERATURE, lr=RATE * recipe(work.task).lr, bf16=work.bf16, pause=work.gate.step,
            )  # fmt: skip
            trainer.run_to(min(1.0, CHECK_STEPS / trainer.total))
            reestimate_batchnorm(shaped.module, work.task, BATCHNORM_BATCHES)
            trained = distance(work, shaped)
        except TrialFailure as failure:
            step(f"a structure cannot be compared: {failure}", done, len(slices), max(left, 0.0))
            continue
        if math.isfinite(sliced) and math.isfinite(trained):
            before.append(sliced)
            after.append(trained)
    if len(set(before)) < 2 or len(set(after)) < 2:
        return None
    return spearman(np.array(before), np.array(after))


def distance(work: Work, shaped: Shaped) -> float:
    """Mean loss of responses against the parent's: smoother in few samples than quality is."""
    losses, module = list[float](), shaped.module.eval()
    with torch.no_grad():
        for inputs, _ in work.task.batches("calibration", 64, limit=CHECK_SAMPLES):
            arguments = several(inputs)
            mine, theirs = several(module(*arguments)), several(work.parent(*arguments))
            losses.append(float(responses_loss(mine, theirs, 1.0)))
    return sum(losses) / len(losses)
