"""How a candidate is made, step by step (floor F4).

Build, inherit, structure ops, batch-norm statistics; train; export, parity with torch, numeric ops, the ONNX file.
Searching (`evaluator`) and re-applying a policy both go through these functions, so they cannot drift apart.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from autocompress import export as exporting
from autocompress import memory
from autocompress.branches import set_thresholds, thresholds_of, with_samples
from autocompress.distill import Distillation
from autocompress.models import Builder
from autocompress.models.routing import NEVER, forced
from autocompress.models.weights import fill
from autocompress.ops import Op, Phase, TrainOp
from autocompress.ops.thresholds import is_exit
from autocompress.registry import make
from autocompress.tasks import Predict, Task, several
from autocompress.tasks.recipe import recipe
from autocompress.train import Training, reestimate_batchnorm
from autocompress.types import (
    Arch,
    Candidate,
    Entry,
    Policy,
    Profile,
    Quality,
    Receipt,
    Rule,
    TrialFailure,
)

# routes hang on blocks that stay; a rank is a fraction of the pruned shape; a cascade copies what is there at last
STRUCTURE_ORDER = ("block", "replace", "exit", "skip", "branch", "prune", "lowrank", "cascade")
TRAIN_ORDER = ("sparsify", "qat")  # what is rounded is what the masks have left
FOUR_BITS = "fourbits"
NUMERIC_ORDER = ("quantize", "store", "route")  # what is stored are the weights that compute
FINE_RATE, MASKED_RATE = 1 / 40, 1 / 8  # of the recipe's rate, for weights that are the parent's, and with some at zero
BATCHNORM_BATCHES = 8
FROZEN = 64  # calibration samples for which a file must be right that keeps one way of several
ROUTE, ROUTES, CASCADE = "route", {"exit", "skip", "branch", "cascade"}, "cascade"
COPY = "little.net."  # where a cascade's copy of a site lies
INPUTS, LEAST_INPUTS, DRAWN = 64, 8, 256  # real samples that a file is timed with which decides; of so many drawn
INPUT_BYTES = 8_000_000  # of them at most, if LEAST_INPUTS are fewer
FIRST_LOOK = 32  # calibration images for the latency-first file: ranges do not change its speed


class Gate(Protocol):
    """Trainers hold the gate while they compute, and let it go at step boundaries where measuring needs quiet."""

    def working(self) -> AbstractContextManager[None]:
        """Hold the gate while computing."""
        ...

    def step(self) -> None:
        """At a step boundary: let a waiting measurement in."""
        ...


class OpenGate:
    """No quiet phases: nobody measures meanwhile."""

    def working(self) -> AbstractContextManager[None]:
        """Nothing to hold."""
        return nullcontext()

    def step(self) -> None:
        """Nothing to wait for."""


@dataclass(frozen=True)
class Work:
    """What evaluating needs, the same for every candidate."""

    builder: Builder
    task: Task
    ops: Mapping[str, Op]
    parent: nn.Module  # trained, in eval mode: donor of weights and teacher
    profiles: tuple[Profile, ...]
    epochs: float = 10.0
    exporter: exporting.Exporter = "torchscript"
    gate: Gate = field(default_factory=OpenGate)
    bf16: bool | None = None  # how candidates train; None: by what the processor can do
    donor: nn.Module | None = None  # an elastic parent: whose weights other structures begin with instead

    def source(self, candidate: Candidate) -> nn.Module:
        """Whose weights a candidate begins with: what keeps the parent's structure keeps its weights."""
        other = any(self.builder.knobs.get(knob) != choice for knob, choice in candidate.arch.items())
        other = other or bool(ordered(candidate.policy, self.ops, "structure"))
        return self.donor if self.donor is not None and other else self.parent

    @property
    def opset(self) -> int:
        """One file serves all profiles of a variant: the oldest opset among them."""
        return min(profile.opset for profile in self.profiles)

    @property
    def shape_profile(self) -> Profile:
        """The profile structure ops round to: the largest channel multiple of all targets."""
        return max(self.profiles, key=lambda profile: profile.channel_multiple)

    @property
    def variants(self) -> dict[str, Profile]:
        """One profile for each distinct set of numeric settings."""
        return {profile.numeric.variant: profile for profile in reversed(self.profiles)}


class FirstLook:
    """A task with few calibration samples, for the file whose speed alone is asked."""

    first_look = True  # untrained exits are not judged yet: they are taken

    def __init__(self, task: Task, most: int = FIRST_LOOK) -> None:
        self._task, self.name, self.metric, self.input, self.most = task, task.name, task.metric, task.input, most

    def batches(
        self, split: str, size: int, *, limit: int | None = None, seed: int | None = None
    ) -> Iterator[tuple[Any, Any]]:
        """At most `most` samples of any split."""
        limit = self.most if limit is None else min(limit, self.most)
        return self._task.batches(split, min(size, limit), limit=limit, seed=seed)

    def loss(self, outputs: Any, targets: Any) -> Any:
        """The task's."""
        return self._task.loss(outputs, targets)

    def quality(self, predict: Predict, split: str) -> Quality:
        """The task's."""
        return self._task.quality(predict, split)


@dataclass(frozen=True)
class Shaped:
    """A candidate's torch module after structure ops, with the receipts that made it.

    `instruments` are the receipts of train ops whose instruments the module carries until it is settled. `intact`
    says that layers and weights are the parent's.
    """

    module: nn.Module
    receipts: tuple[Receipt, ...]
    instruments: tuple[Receipt, ...] = ()
    intact: bool = False

    def settle(self, work: Work) -> Settled:
        """The network as it ships, now: a copy without instruments, and what they have learned so far."""
        if not self.instruments:
            return Settled(self.module, ())
        module = copy.deepcopy(self.module)
        learned = tuple(
            train_op(work, receipt).settle(module, receipt).model_copy(update={"op": receipt.op})
            for receipt in reversed(self.instruments)  # the last one in is the first one out
        )
        return Settled(module, learned[::-1])

    def plain(self, work: Work) -> nn.Module:
        """The module without instruments."""
        return self.settle(work).module


@dataclass(frozen=True)
class Settled:
    """A module ready for export, with the settled receipts of train ops."""

    module: nn.Module
    learned: tuple[Receipt, ...]

    def ranges(self) -> dict[str, dict[str, tuple[float, float]]]:
        """Ranges of activations by site, where training has learned them."""
        return {
            entry.site: {side: (low, high) for side, (low, high) in entry.facts["ranges"].items()}
            for receipt in self.learned
            for entry in receipt.entries
            if "ranges" in entry.facts
        }


@dataclass(frozen=True)
class Release:
    """One variant's file."""

    model: bytes
    key: str  # weight-free graph hash: files with equal keys run equally fast
    receipts: tuple[Receipt, ...]
    timed: bytes = b""  # what a device times: the model, with real samples where it decides by its input

    @property
    def size_mb(self) -> float:
        """1 MB = 1e6 bytes."""
        return len(self.model) / 1e6


def ordered(policy: Policy, ops: Mapping[str, Op], phase: Phase) -> list[tuple[str, Op, tuple[Rule, ...]]]:
    """The ops of one phase by the policy's name for them, with their rules, in the order they act.

    Raises:
        TrialFailure: a rule names an op that is not there.
    """
    names = list(dict.fromkeys(rule.op for rule in policy.rules))
    for name in names:
        if name not in ops:
            raise TrialFailure(f"policy names op {name!r}, known are {', '.join(sorted(ops))}")
    fixed = (*STRUCTURE_ORDER, *TRAIN_ORDER, *NUMERIC_ORDER)
    known = [name for name in fixed if name in names] + [name for name in names if name not in fixed]
    return [(name, ops[name], policy.of(name)) for name in known if ops[name].phase == phase]


def shape(
    work: Work, candidate: Candidate, look: Callable[[str, nn.Module], None] = lambda _name, _module: None
) -> Shaped:
    """Build, inherit the parent's weights, decide and enact the structure ops, re-estimate batch norm.

    `look` is shown the module after each stage. Raises TrialFailure where memory is too short for it and its file.
    """
    memory.check(memory.TRIAL * (size := memory.module_bytes(work.parent)), f"a candidate of {size / 1e9:.1f} GB")
    module = work.builder.build(candidate.arch)
    work.builder.inherit(module, work.source(candidate), candidate.arch)
    look("inherited", module)
    receipts: list[Receipt] = []
    instruments: list[Receipt] = []
    for name, op, rules in ordered(candidate.policy, work.ops, "structure"):
        asked, skipped = narrowed(op, module, rules, candidate.policy)
        tensors: dict[str, Any] = {}
        receipt = op.decide(module, asked, work.task, work.shape_profile, tensors)
        module = op.enact(module, receipt, tensors)
        entries = (*receipt.entries, *skipped)
        receipt = receipt.model_copy(update={"op": name})  # a plug-in goes by its module:attr
        now = tuple(entry for entry in entries if entry.status != "open")
        later = tuple(entry for entry in entries if entry.status == "open")
        receipts.append(receipt.model_copy(update={"entries": now}))
        instruments += [receipt.model_copy(update={"entries": later})] if later else []
        if now or not later:
            look(name, module)
    # The parent's own statistics are of augmented images: estimated anew they cost an untouched ResNet-56 1.3 points.
    changed = changes_structure(work, candidate.arch, receipts)
    if changed:
        reestimate_batchnorm(module, work.task, BATCHNORM_BATCHES, pause=work.gate.step)
        look("batch norm", module)
    instruments += instrument(work, module, candidate.policy)
    return Shaped(module, tuple(receipts), tuple(instruments), intact=not changed)


def narrowed(
    op: Op, module: nn.Module, rules: Sequence[Rule], policy: Policy
) -> tuple[Sequence[Rule], Sequence[Entry]]:
    """The rules for an op to decide, and entries of those that it skips, as the policy's other rules have it."""
    narrow = getattr(op, "narrow", None)
    return narrow(module, rules, policy) if narrow else (rules, ())


def changes_structure(work: Work, arch: Arch, receipts: Sequence[Receipt]) -> bool:
    """Whether a candidate's layers are others than the parent's."""
    knobs = work.builder.knobs
    moved = any(knobs.get(knob) != choice for knob, choice in arch.items())
    return moved or any(entry.status == "done" for receipt in receipts for entry in receipt.entries)


def instrument(work: Work, module: nn.Module, policy: Policy) -> tuple[Receipt, ...]:
    """Decide and enact the train ops that install something; their receipts in order, reasons for skipping too."""
    receipts: list[Receipt] = []
    for name, op, rules in (*ordered(policy, work.ops, "train"), *implied(work, policy)):
        if isinstance(op, TrainOp):
            asked, skipped = narrowed(op, module, rules, policy)
            receipt = op.decide(module, asked, work.task, work.shape_profile)
            if entries := (*receipt.entries, *skipped):
                op.enact(module, receipt)
                receipts.append(receipt.model_copy(update={"op": name, "entries": entries}))
    return tuple(receipts)


def implied(work: Work, policy: Policy) -> list[tuple[str, Op, tuple[Rule, ...]]]:
    """Train ops that a policy's numeric rules ask for: weights that the file rounds to four bits learn with that."""
    if all(rule.settings.get("weights") != "int4" for rule in policy.of("quantize")):
        return []
    return [(FOUR_BITS, work.ops[FOUR_BITS], (Rule(site=".", op=FOUR_BITS, settings={}),))]


def train_op(work: Work, receipt: Receipt) -> TrainOp:
    """The op of an instrument's receipt."""
    op = work.ops.get(receipt.op)
    if not isinstance(op, TrainOp):
        raise TrialFailure(f"receipt names {receipt.op!r}, which is no op that training settles")
    return op


def reshape(builder: Builder, ops: Mapping[str, Op], arch: Arch, receipts: Sequence[Receipt]) -> nn.Module:
    """The module that the receipts describe, with untrained weights: no data, no decision."""
    module = builder.build(arch)
    for receipt in receipts:
        op = ops.get(receipt.op)
        if op is None:
            raise TrialFailure(f"receipt names op {receipt.op!r}, known are {', '.join(sorted(ops))}")
        if op.phase == "structure":
            module = op.enact(module, receipt)
    return module


def export_float(work: Work, module: nn.Module) -> exporting.Exported:
    """Export and check against torch.

    Raises:
        TrialFailure: the exporter fails, or the file disagrees with torch.
    """
    exported = exporting.export(module, work.task.input, opset=work.opset, exporter=work.exporter)
    inputs, _ = next(iter(work.task.batches("calibration", 16, limit=16)))
    arrays = [one.numpy() for one in several(inputs)]
    exporting.parity(module, exporting.compose(exported), *arrays)
    if any(part.routes for part in exported.parts):
        each_way(module, exported, arrays)
    return exported


def each_way(module: nn.Module, exported: exporting.Exported, inputs: Sequence[Any]) -> None:
    """Hold every branch of a file against torch: all decisions one way, then the other. Raises TrialFailure."""
    (part,) = exported.parts
    for value in (0.0, NEVER):
        model = set_thresholds(exporting.compose(exported), dict.fromkeys(part.routes, value))
        with forced(module, value):
            exporting.parity(module, model, *inputs)


def frozen(work: Work, model: bytes) -> str:
    """What to tell of a parent whose own code decides by its data, if it does: its file keeps one way.

    Raises TrialFailure, with file and line, where that is not the way of other samples: calibration's, and noise.
    """
    inputs, _ = next(iter(work.task.batches("calibration", 2, limit=2)))
    place = exporting.decided(work.parent, *several(inputs))
    if not place:
        return ""
    samples = [several(one) for one, _ in work.task.batches("calibration", 8, limit=FROZEN)]
    samples += [tuple(part[:1] for part in one) for one in samples]  # some decide by the whole batch
    if all(part.is_floating_point() for part in samples[0]):
        generator = torch.Generator().manual_seed(0)
        samples += [tuple(torch.randn(part.shape, generator=generator) for part in one) for one in samples[:2]]
    for one in samples:
        exporting.parity(work.parent, model, *(part.numpy() for part in one))
    tried = sum(len(one[0]) for one in samples)
    return f"the network decides by its data at {place}: its file keeps one way, which was right for {tried} samples"


def release(
    work: Work,
    module: nn.Module,
    policy: Policy,
    *,
    learned: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
    first_look: bool = False,
) -> dict[str, Release]:
    """One file per variant: float export, parity, numeric ops decided and enacted, parts composed.

    `learned` are the ranges that quantization-aware training has found, by site.
    """
    exported = replace(export_float(work, module), learned=learned or {})
    task: Task = FirstLook(work.task) if first_look else work.task
    return {variant: finish(work, exported, policy, profile, task) for variant, profile in work.variants.items()}


def finish(work: Work, exported: exporting.Exported, policy: Policy, profile: Profile, task: Task) -> Release:
    """One variant's file: numeric ops decided and enacted on the parts, these composed."""
    parts, receipts = exported, []
    numeric = ordered(policy, work.ops, "numeric")
    if any(part.routes for part in exported.parts) and not any(name == ROUTE for name, _, _ in numeric):
        numeric.append((ROUTE, work.ops.get(ROUTE) or make("op", ROUTE), ()))
    for name, op, rules in numeric:
        receipt = op.decide(parts, echoed(rules, parts), task, profile)
        parts = op.enact(parts, receipt)
        receipts.append(receipt.model_copy(update={"op": name}))
    return released(work, parts, receipts)


def echoed(rules: Sequence[Rule], exported: exporting.Exported) -> tuple[Rule, ...]:
    """The rules, and for each site of which a cascade has a copy the same for the copy."""
    nodes = [name for part in exported.parts for name in part.nodes if name.startswith(COPY)]
    copies = (
        rule.model_copy(update={"site": f"{COPY}{rule.site}"})
        for rule in rules
        if any(f"{name}.".startswith(f"{COPY}{rule.site}.") for name in nodes)
    )
    return (*rules, *copies)


def released(work: Work, parts: exporting.Exported, receipts: Sequence[Receipt]) -> Release:
    """The file of parts. Where it decides by its input its speed depends on its weights, so its key does, too."""
    decides = any(part.routes for part in parts.parts)
    if decides and (many := [profile for profile in work.profiles if profile.batch > 1]):
        raise TrialFailure(
            f"a file that decides by its input takes one sample at a time; profile {many[0].name} measures batches of "
            f"{many[0].batch} (`autocompress.batches` runs such a file on batches)"
        )
    model = exporting.compose(parts)
    key = exporting.graph_hash(model, weights=decides)
    return Release(model, key, tuple(receipts), timed(work.task, model) if decides else model)


def timed(task: Task, model: bytes) -> bytes:
    """A file as a device times it: one that decides by its input brings a fixed sample of the selection split."""
    if not thresholds_of(model):
        return model
    found = [several(inputs) for inputs, _ in task.batches("selection", DRAWN, limit=DRAWN)]
    arrays = [torch.cat(one).numpy() for one in zip(*found, strict=True)]
    bytes_each = sum(one[0].nbytes for one in arrays)
    count = max(LEAST_INPUTS, min(INPUTS, INPUT_BYTES // max(bytes_each, 1)))
    chosen = np.random.default_rng(0).permutation(len(arrays[0]))[:count]
    return with_samples(model, [one[chosen] for one in arrays])


def rerelease(work: Work, module: nn.Module, receipts: Sequence[Receipt]) -> Release:
    """The file that numeric receipts describe: nothing is decided."""
    parts = export_float(work, module)
    for receipt in receipts:
        parts = (work.ops.get(receipt.op) or make("op", receipt.op)).enact(parts, receipt)
    return released(work, parts, receipts)


def distillation(policy: Policy) -> Distillation:
    """How the policy wants the candidate taught; weight 0 where it says nothing."""
    for rule in policy.of("distill"):
        return Distillation.of(rule.settings)
    return Distillation()


def rate(work: Work, shaped: Shaped) -> float:
    """The highest learning rate of a candidate's training: the recipe's, less where the parent's weights are intact.

    Two epochs over 5,000 images cost a trained CIFAR ResNet-20 5.8 points at the recipe's 0.08, 0.6 at 0.01, none at
    0.002; with 70 % of its weights at zero 4.6 at 0.08, 2.7 at 0.02 and at 0.01, 3.0 at 0.003.
    Where channels go in training they are as many to make up for as if they had gone before: an eighth of the rate cost
    a convnet on digits 15 points at 70 %, the rate itself 4.
    """
    full = recipe(work.task).lr
    if not shaped.intact:
        return full
    entries = [(receipt.op, entry) for receipt in shaped.instruments for entry in receipt.entries]
    if any(entry.status == "open" for _, entry in entries):
        return full
    acting = {op for op, entry in entries if entry.status == "done"}
    return full * (FINE_RATE if acting <= {"qat", FOUR_BITS} else MASKED_RATE)


def training(
    work: Work, shaped: Shaped, policy: Policy, seed: int, cycles: Mapping[float, float] | None = None
) -> Training:
    """Fine-tuning of a candidate, with the parent as teacher where the policy asks for distillation."""
    taught = distillation(policy)
    share = gentle(shaped)
    if share == 0:  # the network itself is the teacher
        taught = Distillation()
    return Training(
        shaped.module,
        work.task,
        epochs=work.epochs,
        seed=seed,
        teacher=work.parent if taught.weight > 0 else None,
        weight=taught.weight,
        temperature=taught.temperature,
        kind=taught.kind,
        lr=rate(work, shaped),
        bf16=work.bf16,
        pause=work.gate.step,
        instruments=tuple((train_op(work, receipt), receipt) for receipt in shaped.instruments),
        cycles=cycles,
        gentle=share,
    )


def gentle(shaped: Shaped) -> float:
    """The share of the rate for the network's own weights where routes alone are new: these begin at random.

    None at all where a smaller copy is all that is to learn: the network answers as well as before.
    """
    opened = {r.op for r in shaped.instruments for entry in r.entries if entry.status == "open"}
    if shaped.intact and opened == {CASCADE}:
        return 0.0
    return MASKED_RATE if shaped.intact and opened and opened <= ROUTES else 1.0


def qualities(work: Work, releases: Mapping[str, Release], split: str) -> dict[str, Quality]:
    """Quality of the files on a split, by profile; each distinct file is run once."""
    per_variant = {
        variant: work.task.quality(exporting.predictor(release.model), split) for variant, release in releases.items()
    }
    return {profile.name: per_variant[profile.numeric.variant] for profile in work.profiles}


def weights_of(module: nn.Module) -> bytes:
    """The module's parameters and buffers as safetensors."""
    # safetensors refuses tensors that share memory, which tied weights do: each is written on its own
    tensors = {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        if place in seen:
            tensors[name] = tensor.clone()
        seen.add(place)
    return save_tensors(tensors)


def load_weights(module: nn.Module, data: bytes) -> nn.Module:
    """Fill a module from safetensors bytes; every name and shape must fit."""
    fill(module, load_tensors(data))
    return module.eval()


def notes_of(receipts: Sequence[Receipt]) -> tuple[str, ...]:
    """One line per rule that was not followed, or not as it was asked."""
    found: list[str] = []
    for receipt in receipts:
        for entry in receipt.entries:
            if entry.status == "skipped":
                found.append(f"{receipt.op} {entry.site}: skipped, {entry.why}")
            found += degenerate(receipt.op, entry)
            for why, count in Counter(entry.facts.get("at_once", {}).values()).items():
                found.append(f"{receipt.op} {entry.site}: {count} of its groups before training, {why}")
    return tuple(found)


def degenerate(op: str, entry: Entry) -> list[str]:
    """A route that always decides alike, in one line."""
    share = entry.achieved.get("share") if op == ROUTE else None
    if share not in (0.0, 1.0):
        return []
    if is_exit(entry.site):
        return [f"{entry.site}: {'every' if share else 'no'} sample leaves there"]
    return [f"{entry.site}: {'every' if share else 'no'} sample runs the block"]
