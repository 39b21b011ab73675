"""What single choices make of the trained network without training it: outputs, files, layers (floor F5)."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autocompress import export, latency
from autocompress import space as sp
from autocompress.answers import Answers, is_labels
from autocompress.ops import TrainOp
from autocompress.pipeline import FirstLook, Work, export_float, finish, narrowed, notes_of, ordered
from autocompress.tasks import Task, several
from autocompress.train import reestimate_batchnorm
from autocompress.types import Candidate, Choice, Gene, Genotype, Profile, Reading, Receipt, Space

SAMPLES, FEWEST = 64, 8  # calibration samples that outputs are compared on
PASS_S = 0.3  # how long one pass over them may take
GLANCE = 4  # samples for fits of which only the shapes are used
BATCHNORM_BATCHES = 1

Chosen = Mapping[int, Choice]
"""Choices by the index of their gene; all other genes stand at their first."""


class Untrained:
    """The unmodified network, and what choices of a space make of it."""

    def __init__(self, work: Work, space: Space, readings: Mapping[str, Reading]) -> None:
        """Runs, exports and times the network. Sets torch's threads to what is fastest now."""
        self.work, self.space = work, space
        inputs, targets = next(iter(work.task.batches("calibration", FEWEST, limit=FEWEST)))
        each = quickest(lambda: latency.run(work.parent, several(inputs))) / len(several(inputs)[0])
        self.samples = max(FEWEST, min(SAMPLES, int(PASS_S / max(each, 1e-9))))
        inputs, _ = next(iter(work.task.batches("calibration", self.samples, limit=self.samples)))
        self.inputs: tuple[Tensor, ...] = several(inputs)
        outputs, self.used = latency.run(work.parent, self.inputs)
        self.answers = Answers(several(outputs), classes=is_labels(targets))
        self.exported = export_float(work, work.parent)
        self.task = FirstLook(work.task)
        self._integers: dict[str, bytes] = {}  # variant -> file with every site in integers
        numeric = (one for one in enumerate(space.genes) if is_numeric(one[1], work) and not is_packing(one[1]))
        self.numbers: Chosen = {place: gene.choices[1] for place, gene in numeric}
        integers = (lambda profile: self.file(self.numbers, profile)) if self.numbers else None
        self.targets = latency.targets(work.profiles, self.exported, self.used, integers, readings)

    def candidate(self, chosen: Chosen) -> Candidate:
        """With these choices and the first ones of all other genes."""
        return sp.decode(self.space, genotype(self.space, chosen))

    def file(self, chosen: Chosen, profile: Profile) -> bytes:
        """The network with some sites in integers."""
        if chosen != self.numbers:
            return finish(self.work, self.exported, self.candidate(chosen).policy, profile, self.task).model
        variant = profile.numeric.variant
        if variant not in self._integers:
            policy = self.candidate(chosen).policy
            self._integers[variant] = finish(self.work, self.exported, policy, profile, self.task).model
        return self._integers[variant]

    def divergence_of(self, model: bytes) -> float:
        """How far a file's answers are from the network's."""
        found = several(export.predictor(model)(tuple(one.numpy() for one in self.inputs)))
        return self.answers.divergence([torch.from_numpy(one) for one in found])

    def shaped(self, chosen: Chosen) -> tuple[tuple[latency.Used, ...], str]:
        """The layers of the network with another structure, and the first rule that could not be followed."""
        module, receipts = self._module(chosen, FirstLook(self.work.task, GLANCE), fitted=False)
        _, used = latency.run(module, tuple(one[:1] for one in self.inputs))
        return used, next(iter(notes_of(receipts)), "")

    def changed(self, chosen: Chosen) -> float:
        """How far the answers of the network with another structure are from its own."""
        module, _ = self._module(chosen, self.work.task, fitted=True)
        reestimate_batchnorm(module, self.work.task, BATCHNORM_BATCHES, size=self.samples)
        found, _ = latency.run(module, self.inputs)
        return self.answers.divergence(several(found))

    def _module(self, chosen: Chosen, task: Task, *, fitted: bool) -> tuple[nn.Module, list[Receipt]]:
        """The candidate's architecture with its structure ops enacted; right in shapes only unless `fitted`."""
        work, candidate = self.work, self.candidate(chosen)
        own = {gene.name: gene.choices[0] for gene in self.space.genes if gene.kind == "arch"}
        if all(candidate.arch.get(knob) == choice for knob, choice in own.items()):
            module = copy.deepcopy(work.parent)
        else:
            module = work.builder.build(candidate.arch)
            if fitted:
                work.builder.inherit(module, work.parent, candidate.arch)
        receipts: list[Receipt] = []
        for _, op, rules in ordered(candidate.policy, work.ops, "structure"):
            tensors: dict[str, Any] | None = {} if fitted else None
            asked, _ = narrowed(op, module, rules, candidate.policy)
            receipt = op.decide(module, asked, task, work.shape_profile, tensors)
            module = op.enact(module, receipt, tensors)
            if isinstance(op, TrainOp):  # what training would settle, at once
                receipt = op.settle(module, receipt)
            receipts.append(receipt)
        return module, receipts


def genotype(space: Space, chosen: Chosen) -> Genotype:
    """Canonical."""
    values = list(sp.parent(space))
    for place, choice in chosen.items():
        values[place] = space.genes[place].choices.index(choice)
    return sp.canonical(space, tuple(values))


def is_numeric(gene: Gene, work: Work) -> bool:
    """Whether a gene is decided on the exported file."""
    return gene.kind == "policy" and gene.op in work.ops and work.ops[gene.op].phase == "numeric"


def is_packing(gene: Gene) -> bool:
    """Whether a gene says how weights of integers are kept: alone, among floats, it changes nothing."""
    return (gene.op, gene.param) == ("quantize", "weights")


def quickest(work: Callable[[], object]) -> float:
    """Seconds of `work` with one thread or with as many as torch has, whichever is faster now; that stays set.

    On cores that others want too, threads that wait for one another take many times as long as one alone.
    """
    took: dict[int, float] = {}
    for threads in dict.fromkeys((torch.get_num_threads(), 1)):
        torch.set_num_threads(threads)
        work()
        began = time.perf_counter()
        work()
        took[threads] = time.perf_counter() - began
    best = min(took, key=lambda threads: took[threads])
    torch.set_num_threads(best)
    return took[best]
