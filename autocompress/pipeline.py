"""The single path from a candidate to its outcome (floor F4).

Order: build, inherit, structure ops, batch-norm statistics; then *latency first* (a candidate over every budget ends
here, untrained); then training rung by rung, and at each rung export, parity with torch, numeric ops and the quality
of the ONNX file. Searching and re-applying a policy both go through these functions, so they cannot drift apart.
"""

from __future__ import annotations

import copy
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from autocompress.devices import AllAway, Unreachable, host_of
from autocompress.distill import Distillation
from autocompress.models import Builder
from autocompress.models.routing import NEVER, forced
from autocompress.models.trace import examples, thop_count
from autocompress.models.weights import fill
from autocompress.ops import Op, Phase, TrainOp
from autocompress.ops.thresholds import is_exit
from autocompress.pareto import meets, over_every_budget
from autocompress.registry import make
from autocompress.surrogate import hopeless
from autocompress.tasks import Predict, Task, several
from autocompress.tasks.recipe import recipe
from autocompress.train import Training, reestimate_batchnorm
from autocompress.types import (
    Arch,
    Assignment,
    Budget,
    Candidate,
    Entry,
    Interval,
    Outcome,
    Policy,
    Profile,
    Quality,
    Reading,
    Receipt,
    Record,
    Rule,
    State,
    TrialFailure,
)
from autocompress.wording import beyond

# routes hang on blocks that stay; low rank last: a rank is a fraction of the pruned shape
STRUCTURE_ORDER = ("block", "replace", "exit", "skip", "branch", "prune", "lowrank")
TRAIN_ORDER = ("sparsify", "qat")  # what is rounded is what the masks have left
NUMERIC_ORDER = ("quantize", "store", "route")  # what is stored are the weights that compute
FINE_RATE, MASKED_RATE = 1 / 40, 1 / 8  # of the recipe's rate, for weights that are the parent's, and with some at zero
PERSISTENCE = 1  # further tries at a noisy reading of a candidate that is fully trained
BATCHNORM_BATCHES = 8
FROZEN = 64  # calibration samples for which a file must be right that keeps one way of several
LATER = "later:"  # role of a file that a device was away for: it is measured when the device is back
ASK_AGAIN_S = 5.0  # at most, between tries at devices that are all away
ROUTE, ROUTES = "route", {"exit", "skip", "branch"}
INPUTS, LEAST_INPUTS, DRAWN = 64, 8, 256  # real samples that a file is timed with which decides; of so many drawn
INPUT_BYTES = 8_000_000  # of them at most, if LEAST_INPUTS are fewer
FIRST_LOOK = 32  # calibration images for the latency-first file: ranges do not change its speed


class Files(Protocol):
    """Content-addressed bytes, wherever the worker runs."""

    def put(self, data: bytes) -> str:
        """Keep `data`, return its sha256."""
        ...

    def get(self, sha: str) -> bytes:
        """The bytes of a sha256."""
        ...

    def has(self, sha: str) -> bool:
        """Whether these bytes are kept."""
        ...


class Gate(Protocol):
    """Where measuring needs quiet, trainers hold the gate while they compute and let it go at step boundaries."""

    def working(self) -> AbstractContextManager[None]:
        """Hold the gate while computing."""
        ...

    def step(self) -> None:
        """At a step boundary: let a waiting measurement in."""
        ...


class OpenGate:
    """No quiet phases: the station has cores of its own."""

    def working(self) -> AbstractContextManager[None]:
        """Nothing to hold."""
        return nullcontext()

    def step(self) -> None:
        """Nothing to wait for."""


class Measure(Protocol):
    """A station, near or far."""

    def __call__(self, profile_name: str, model: bytes, key: str, *, again: bool = True) -> Reading:
        """Latency of an ONNX file; `key` is its weight-free graph hash, `again` whether a noisy reading is repeated."""
        ...


class Weigh(Protocol):
    """A station, near or far."""

    def __call__(self, profile_name: str, model: bytes, key: str) -> dict[str, float]:
        """What a latency model is told of an ONNX file: see `station.Station.kernels`."""
        ...


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


class Checkpoint(Record):
    """Where a trial can go on: receipts rebuild the shapes, `training` (safetensors, by sha256) the rest."""

    receipts: tuple[Receipt, ...]
    instruments: tuple[Receipt, ...] = ()
    readings: dict[str, Reading]
    keys: dict[str, str]
    later: dict[str, str] = {}
    training: str


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
    for name, op, rules in ordered(policy, work.ops, "train"):
        if isinstance(op, TrainOp):
            asked, skipped = narrowed(op, module, rules, policy)
            receipt = op.decide(module, asked, work.task, work.shape_profile)
            if entries := (*receipt.entries, *skipped):
                op.enact(module, receipt)
                receipts.append(receipt.model_copy(update={"op": name, "entries": entries}))
    return tuple(receipts)


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
        receipt = op.decide(parts, rules, task, profile)
        parts = op.enact(parts, receipt)
        receipts.append(receipt.model_copy(update={"op": name}))
    return released(work, parts, receipts)


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
    return full * (FINE_RATE if acting <= {"qat"} else MASKED_RATE)


def training(work: Work, shaped: Shaped, policy: Policy, seed: int, cycles: Sequence[float] = (1.0,)) -> Training:
    """Fine-tuning of a candidate, with the parent as teacher where the policy asks for distillation."""
    taught = distillation(policy)
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
        gentle=gentle(shaped),
    )


def gentle(shaped: Shaped) -> float:
    """The share of the rate for the network's own weights where routes alone are new: these begin at random."""
    opened = {r.op for r in shaped.instruments for entry in r.entries if entry.status == "open"}
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


def at_best(reading: Reading) -> Reading:
    """A noisy reading as the favourable end of its interval: only what is over a budget even so is infeasible."""
    figures = {name: getattr(reading, name) for name in ("ms", "p50_ms", "p95_ms", "p99_ms", "ratio")}
    best = {name: one.low for name, one in figures.items() if one is not None}
    return reading.model_copy(update={name: Interval(value=at, low=at, high=at) for name, at in best.items()})


def settled(reading: Reading, budgets: Sequence[Budget]) -> bool:
    """Whether both ends of a noisy reading's interval say the same of its budget: then noise changes nothing."""
    own = [budget for budget in budgets if budget.profile == reading.profile]
    return bool(own) and all(meets(reading, budget, None) == meets(at_best(reading), budget, None) for budget in own)


def firm(measure: Measure, profile: str, model: bytes, key: str, budgets: Sequence[Budget]) -> Reading:
    """A reading of a fully trained file: a noisy one is taken again, then refused unless it leaves no doubt.

    Raises TrialFailure where noise stays, or the file does not run there.
    """
    reading = measure(profile, model, key, again=True)
    for _ in range(PERSISTENCE):
        if reading.noisy:
            reading = measure(profile, model, key, again=True)
    if reading.noisy and not settled(reading, budgets):
        low, high = reading.ratio.low, reading.ratio.high
        raise TrialFailure(f"{profile}: reading too noisy, ratio between {low:.3f} and {high:.3f}")
    return reading


def missed(outcome: Outcome) -> dict[str, str]:
    """Files that devices were away for, by profile: a trial whose outcome is not complete yet."""
    return {role.removeprefix(LATER): sha for role, sha in outcome.files.items() if role.startswith(LATER)}


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


class Evaluator:
    """Evaluates assignments one after another; lives in a worker process."""

    def __init__(
        self,
        work: Work,
        budgets: Sequence[Budget],
        files: Files,
        measure: Measure,
        weigh: Weigh | None = None,
        *,
        patience: float = 900.0,
    ) -> None:
        """`patience`: seconds to wait while no device at all can be reached. `measure` may be called by threads.

        With `weigh` outcomes hold what latency can be predicted from.
        """
        self.work, self.budgets, self.files, self.measure = work, tuple(budgets), files, measure
        self.weigh, self.patience = weigh, patience

    def evaluate(self, assignment: Assignment) -> Iterator[tuple[State, Outcome]]:
        """Yield (RUNG, outcome) after each rung but the last, then the end; closing the generator stops the trial.

        Where some devices are away the outcome lacks their readings and `missed` names the files for them. Raises
        AllAway when none could be reached for `patience` seconds.
        """
        path = _Path(self, assignment)
        torch.manual_seed(assignment.seed)
        try:
            yield from path.walk()
        except TrialFailure as failure:
            yield State.FAILED, path.outcome(reason=str(failure))

    def pace(self, assignment: Assignment, steps: int = 6) -> float:
        """Seconds that the full training of an assignment with a checkpoint would take as this process is now.

        Raises TrialFailure.
        """
        return _Path(self, assignment).pace(steps)


class _Path:
    """One assignment on its way."""

    def __init__(self, evaluator: Evaluator, assignment: Assignment) -> None:
        self.work, self.files = evaluator.work, evaluator.files
        self.evaluator, self.assignment = evaluator, assignment
        self.readings: dict[str, Reading] = {}
        self.keys: dict[str, str] = {}
        self.later: dict[str, str] = {}  # profile -> sha256 of the file that it was away for
        self.seconds: dict[str, float] = {}
        self.facts: dict[str, Any] = {}
        self.notes: tuple[str, ...] = ()
        self.weighed: dict[str, str] = {}  # profile -> key of the file that its amounts are of

    @contextmanager
    def stage(self, name: str, *, working: bool = True) -> Iterator[None]:
        started = time.perf_counter()
        try:
            with self.work.gate.working() if working else nullcontext():
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def outcome(self, *, reason: str = "", files: dict[str, str] | None = None) -> Outcome:
        seconds = {name: round(value, 4) for name, value in self.seconds.items()}
        kept = (files or {}) | {f"{LATER}{name}": sha for name, sha in self.later.items()}
        return Outcome(readings=self.readings, seconds=seconds, reason=reason, files=kept, **self.facts)

    @property
    def cycles(self) -> tuple[float, ...]:
        """Where the learning rate has come down: at every rung, if nothing else is said."""
        return tuple(share for share in self.assignment.cycles or self.assignment.rungs if share > 0)

    def walk(self) -> Iterator[tuple[State, Outcome]]:
        assignment, policy = self.assignment, self.assignment.candidate.policy
        # A checkpoint may have been swept away; training is deterministic, so it is only time that is lost.
        if assignment.checkpoint is None or not self.files.has(assignment.checkpoint):
            with self.stage("structure"):
                shaped = shape(self.work, assignment.candidate)
            self.describe(shaped)
            with self.stage("export"):
                plain = shaped.settle(self.work)
                releases = release(self.work, plain.module, policy, first_look=True)
            self.sizes(releases)
            if hopeless(assignment.screen, self.facts.get("amounts", {})):
                yield State.INFEASIBLE, self.outcome(reason=self.predicted_slow())
                return
            self.time(releases)
            likely = {name: at_best(reading) if reading.noisy else reading for name, reading in self.readings.items()}
            # integers weigh what they weigh: training does not make a file smaller
            if over_every_budget(likely, self.evaluator.budgets, self.facts["size_mb"]):
                yield State.INFEASIBLE, self.outcome(reason=self.too_slow(likely))
                return
            trainer = training(self.work, shaped, policy, assignment.seed, self.cycles)
        else:
            with self.stage("structure"):
                shaped, trainer = self.restore(assignment.checkpoint)
            self.describe(shaped)
        for index in range(assignment.start, len(assignment.rungs)):
            fidelity = assignment.rungs[index]
            with self.stage("train"):
                trainer.run_to(fidelity)
            with self.stage("export"):
                settled = shaped.settle(self.work)
                if fidelity < 1:
                    settled = self.halfway(shaped, settled)
                releases = release(self.work, settled.module, policy, learned=settled.ranges())
            with self.stage("quality"):
                self.facts["quality"] = qualities(self.work, releases, "selection")
            self.facts["fidelity"] = fidelity
            self.sizes(releases)
            if index + 1 < len(assignment.rungs):
                yield State.RUNG, self.outcome(files=self.checkpoint(shaped, trainer))
            else:
                self.time(releases, final=True)
                more = self.checkpoint(shaped, trainer) if assignment.final else {}
                yield State.DONE, self.outcome(files=self.keep(shaped.receipts, settled, releases) | more)

    def checkpoint(self, shaped: Shaped, trainer: Training) -> dict[str, str]:
        """Where the trial can go on."""
        found = Checkpoint(
            receipts=shaped.receipts,
            instruments=shaped.instruments,
            readings=self.readings,
            keys=self.keys,
            later=self.later,
            training=self.files.put(trainer.state()),
        )
        return {"checkpoint": self.files.put(found.model_dump_json().encode())}

    def pace(self, steps: int) -> float:
        """Seconds of a whole training, by so many steps of what is left of it; they are not kept."""
        assert self.assignment.checkpoint is not None
        _, trainer = self.restore(self.assignment.checkpoint)
        steps = min(steps, (trainer.total - trainer.step) // 2)
        trainer.run_to((trainer.step + steps) / trainer.total)  # warms up
        found = trainer.run_to((trainer.step + steps) / trainer.total)
        return found["seconds"] / max(found["steps"], 1.0) * trainer.total

    def halfway(self, shaped: Shaped, settled: Settled) -> Settled:
        """A changed network in mid-training, its running statistics brought up to its weights, which run ahead of them.

        On digits at 30 % of ten epochs, 70 % of the channels gone: 3 points lost where it had been 21, at the end 0.5.
        """
        if shaped.intact and not any(self.work.ops[receipt.op].phase == "structure" for receipt in settled.learned):
            return settled
        module = copy.deepcopy(settled.module)
        reestimate_batchnorm(module, self.work.task, BATCHNORM_BATCHES, pause=self.work.gate.step)
        return replace(settled, module=module)

    def describe(self, shaped: Shaped) -> None:
        macs, parameters = thop_count(shaped.plain(self.work), examples(self.work.task.input))
        self.notes = notes_of((*shaped.receipts, *shaped.instruments))
        self.facts |= {"macs": macs, "parameters": parameters, "notes": self.notes}

    def predicted_slow(self) -> str:
        """For the reason alone: a prediction is no reading."""
        screen, found = self.assignment.screen, self.facts["amounts"]
        said = ", ".join(
            f"{name} {one.model.ratio(found[name]):.2f} times the baseline (the budget: {one.most:.2f})"
            for name, one in screen.items()
        )
        return f"predicted to be far over every budget, so not measured: {said}"

    def sizes(self, releases: Mapping[str, Release]) -> None:
        """What the files weigh, how they decide, and what latency is predicted from where that is wanted."""
        self.facts["size_mb"] = {p.name: releases[p.numeric.variant].size_mb for p in self.work.profiles}
        if self.evaluator.weigh is not None:
            with self.stage("kernels", working=False):
                for profile in self.work.profiles:
                    self.weigh(self.evaluator.weigh, profile.name, releases[profile.numeric.variant])
        routes = [receipt for item in releases.values() for receipt in item.receipts if receipt.op == ROUTE]
        self.facts["notes"] = (*self.notes, *dict.fromkeys(notes_of(routes)))

    def weigh(self, weigh: Weigh, profile: str, item: Release) -> None:
        """What latency is predicted from, unless that is known of the same graph."""
        if self.weighed.get(profile) == item.key:
            return
        amounts = {name: one for name, one in self.facts.get("amounts", {}).items() if name != profile}
        try:
            amounts[profile] = weigh(profile, item.model, item.key)
            self.weighed[profile] = item.key
        except Unreachable:
            pass  # measuring says so, and asks again
        except TrialFailure as failure:
            self.weighed[profile] = item.key
            self.notes = (*self.notes, f"{profile}: no latency is predicted: {failure}")
        self.facts["amounts"] = amounts

    def time(self, releases: Mapping[str, Release], *, final: bool = False) -> None:
        """Measure what has no firm reading for its graph yet, on different hosts at the same time.

        A noisy one is taken again at the end, and then refused unless the noise leaves no doubt about the budget. A
        device that is away is passed over as long as another has answered.
        """
        wanted = {
            profile.name: (host_of(profile), releases[profile.numeric.variant])
            for profile in self.work.profiles
            if not self.holds(profile.name, releases[profile.numeric.variant].key)
        }
        pause, until = 0.5, time.monotonic() + self.evaluator.patience
        while True:
            with self.stage("measure", working=False):
                found = self.look(wanted, final=final)
            absent = {name: gone for name, gone in found.items() if isinstance(gone, Unreachable)}
            if len(absent) < len(self.work.profiles):
                break
            if time.monotonic() >= until:
                why = "; ".join(f"{name}: {gone}" for name, gone in absent.items())
                minutes = self.evaluator.patience / 60
                raise AllAway(
                    f"no device has answered for {minutes:.3g} minutes ({why}); make one reachable and resume"
                )
            with self.stage("waiting for devices", working=False):
                time.sleep(pause)
            pause = min(2 * pause, ASK_AGAIN_S)
        for name, reading in found.items():
            key = wanted[name][1].key
            if not isinstance(reading, Unreachable):
                self.readings, self.keys[name] = {**self.readings, name: reading}, key
                self.later.pop(name, None)
            elif self.keys.get(name) != key or not (final and settled(self.readings[name], self.evaluator.budgets)):
                self.readings = {other: held for other, held in self.readings.items() if other != name}
                self.keys.pop(name, None)
                self.later[name] = self.files.put(wanted[name][1].timed)

    def holds(self, profile: str, key: str) -> bool:
        """Whether there is a firm reading of a file with this graph."""
        held = self.readings.get(profile)
        return held is not None and not held.noisy and self.keys.get(profile) == key

    def look(self, wanted: Mapping[str, tuple[str, Release]], *, final: bool) -> dict[str, Reading | Unreachable]:
        """Readings by profile; hosts are asked side by side, profiles of one host in turn."""

        def ask(host: str) -> dict[str, Reading | Unreachable]:
            return {name: self.reading(name, one, final=final) for name, (at, one) in wanted.items() if at == host}

        hosts = list(dict.fromkeys(at for at, _ in wanted.values()))
        if len(hosts) < 2:
            return ask(hosts[0]) if hosts else {}
        with ThreadPoolExecutor(len(hosts)) as threads:
            return {name: one for answer in list(threads.map(ask, hosts)) for name, one in answer.items()}

    def reading(self, profile: str, item: Release, *, final: bool) -> Reading | Unreachable:
        measure = self.evaluator.measure
        try:
            if final:
                return firm(measure, profile, item.timed, item.key, self.evaluator.budgets)
            return measure(profile, item.timed, item.key, again=False)
        except Unreachable as gone:
            return gone

    def too_slow(self, likely: Mapping[str, Reading]) -> str:
        said: list[str] = []
        for budget in self.evaluator.budgets:
            name = budget.profile
            size = self.facts["size_mb"].get(name)
            broken = [bound for bound, held in meets(likely[name], budget, size).items() if not held]
            said.append(f"{name} {beyond(likely[name], budget, size, broken)}")
        return f"over every budget before training: {'; '.join(said)}"

    def restore(self, sha: str) -> tuple[Shaped, Training]:
        checkpoint = Checkpoint.model_validate_json(self.files.get(sha))
        candidate = self.assignment.candidate
        module = reshape(self.work.builder, self.work.ops, candidate.arch, checkpoint.receipts)
        for receipt in checkpoint.instruments:
            train_op(self.work, receipt).enact(module, receipt)
        intact = not changes_structure(self.work, candidate.arch, checkpoint.receipts)
        shaped = Shaped(module, checkpoint.receipts, checkpoint.instruments, intact)
        trainer = training(self.work, shaped, candidate.policy, self.assignment.seed, self.cycles)
        trainer.load(self.files.get(checkpoint.training))
        self.readings, self.keys = dict(checkpoint.readings), dict(checkpoint.keys)
        self.later = dict(checkpoint.later)
        return shaped, trainer

    def keep(self, structure: Sequence[Receipt], settled: Settled, releases: Mapping[str, Release]) -> dict[str, str]:
        """What a finalist needs: its weights, its files, and the receipts that made them."""
        files = {"weights": self.files.put(weights_of(settled.module))}
        for variant, item in releases.items():
            files[f"model:{variant}"] = self.files.put(item.model)
        receipts = {
            "structure": [receipt.model_dump(mode="json") for receipt in (*structure, *settled.learned)],
            "numeric": {v: [r.model_dump(mode="json") for r in item.receipts] for v, item in releases.items()},
        }
        files["receipts"] = self.files.put(json.dumps(receipts, sort_keys=True).encode())
        return files
