"""What a worker's process makes for itself: the parent, the work around it, and the evaluator of its trials."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from autocompress.devices.gate import Gate
from autocompress.evaluator import Evaluator, Files, Measure, Weigh
from autocompress.export import Exporter
from autocompress.parts import Parts, make_ops
from autocompress.pipeline import Gate as WorkGate
from autocompress.pipeline import OpenGate, Work, load_weights


@contextmanager
def threads_given_back() -> Iterator[None]:
    """After it torch has as many threads as before."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on a single thread."""
    with threads_given_back():
        torch.set_num_threads(1)
        yield


@dataclass(frozen=True)
class MakeEvaluator:
    """Builds a worker's evaluator in its process: everything here travels by pickle, the weights through the store."""

    parts: Parts
    parent: str  # sha256 of the parent's weights
    bf16: bool | None = None
    exporter: Exporter = "torchscript"  # one per run: the two give different graphs and names
    threads: int = 1
    donor: str = ""  # sha256 of an elastic parent's weights

    def __call__(self, files: Files, measure: Measure, weigh: Weigh) -> Evaluator:
        """Called once per worker process."""
        torch.set_num_threads(self.threads)
        parent = load_weights(self.parts.builder.build({}), files.get(self.parent))
        work = make_work(self.parts, parent, Gate(), bf16=self.bf16, exporter=self.exporter)
        work = with_donor(work, files.get(self.donor) if self.donor else None)
        search = self.parts.job.search
        weighs = weigh if search.screen else None  # it holds the station for some 10 ms per kernel that is new
        return Evaluator(work, self.parts.budgets, files, measure, weighs, patience=search.patience * 60)


def make_work(
    parts: Parts,
    parent: nn.Module,
    gate: WorkGate | None = None,
    *,
    bf16: bool | None = None,
    exporter: Exporter = "torchscript",
) -> Work:
    """What evaluating needs, from a job's parts and the trained parent."""
    return Work(
        builder=parts.builder,
        task=parts.task,
        ops=make_ops(parts.op_names),
        parent=parent,
        profiles=parts.profiles,
        epochs=parts.job.search.fidelity.full_epochs,
        exporter=exporter,
        gate=gate or OpenGate(),
        bf16=bf16,
    )


def with_donor(work: Work, weights: bytes | None) -> Work:
    """The same with an elastic parent of these weights (safetensors), if there is one."""
    return work if weights is None else replace(work, donor=load_weights(work.builder.build({}), weights).eval())
