"""Contract checks for plug-ins, one call each, and a search problem in closed form. Importing this loads nothing heavy.

`check_searcher(make)`, `check_op(op, subject, rules, task, profile)`, `check_device(device, model)` and
`check_task(task)` raise AssertionError that says what is wrong. `ClosedForm` is an evaluator with a known front.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from autocompress import space as sp
from autocompress.devices import Device
from autocompress.ops import Op, TrainOp
from autocompress.searchers import Searcher
from autocompress.tasks import Scored, Task, several
from autocompress.tasks.recipe import Recipe
from autocompress.testing.closed_form import ClosedForm as ClosedForm
from autocompress.types import Gene, Genotype, Profile, Proposal, Receipt, Rule, Space, State, Trial, UserError

__all__ = ["ClosedForm", "check_device", "check_op", "check_searcher", "check_task"]

MakeSearcher = Callable[..., Searcher]
"""`make(space, goals, limit, facts, seed)`: the searcher's class, or it with options bound by functools.partial."""


# --- searchers ------------------------------------------------------------------------------------------------------


def check_searcher(make: MakeSearcher, *, distinct: bool = True, trials: int = 48, seed: int = 0) -> None:
    """Hold a searcher to its protocol on closed-form problems of one and of two devices.

    Valid canonical genotypes, JSON notes, any order of tells, failed, infeasible and stopped trials, a trial told
    twice, tells of trials it never asked for, and the same proposals when the same asks and tells are replayed. With
    `distinct` also: no genotype twice, none that is pending, and None exactly when the space is exhausted.
    """
    for devices in (1, 2):
        problem = ClosedForm(20, devices=devices, seed=seed, speedup=2.0, fail_one_in=9)
        events = _converse(make, problem, trials, seed, distinct)
        replay = _made(make, problem, seed)
        for at, (event, argument, result) in enumerate(events):
            if event == "tell":
                replay.tell(argument)
            else:
                again = replay.ask(argument[0], argument[1])
                assert again == result, f"replay differs at event {at}, trial {argument[0]}: {again} is not {result}"
        told = [trial for event, trial, _ in events if event == "tell"]
        stranger = _made(make, problem, seed)
        for trial in reversed(told):
            stranger.tell(trial.model_copy(update={"note": {}}))
        proposal = stranger.ask(trials + 1, [])
        assert proposal is not None, "told trials that it never asked for, it asks for nothing more"
        _check_proposal(problem.space, proposal)
        if distinct:
            taken = {trial.genotype for trial in told}
            assert proposal.genotype not in taken, "it asks for a genotype that it was told already"
    if distinct:
        _check_exhaustion(make, seed)


def _made(make: MakeSearcher, problem: ClosedForm, seed: int) -> Searcher:
    searcher = make(problem.space, problem.goals, problem.limit, problem.facts, seed)
    assert isinstance(searcher, Searcher), "a searcher has ask(number, pending) and tell(trial)"
    return searcher


def _converse(
    make: MakeSearcher, problem: ClosedForm, trials: int, seed: int, distinct: bool
) -> list[tuple[str, Any, Any]]:
    """Four trials at a time, told out of order, some stopped first and told again when they are done."""
    searcher, rng = _made(make, problem, seed), Random(f"check:{seed}")
    events: list[tuple[str, Any, Any]] = []
    running: list[Trial] = []
    asked: set[Genotype] = set()
    stopped: list[Trial] = []

    def tell(trial: Trial) -> None:
        trial = Trial.model_validate_json(trial.model_dump_json())  # as it comes back from the journal
        searcher.tell(trial)
        events.append(("tell", trial, None))

    tell(problem.trial(0, sp.parent(problem.space)))
    for number in range(1, trials + 1):
        pending = tuple(running)
        proposal = searcher.ask(number, pending)
        assert proposal is not None, f"None at trial {number}, though the space is not exhausted"
        events.append(("ask", (number, pending), proposal))
        _check_proposal(problem.space, proposal)
        if distinct:
            assert proposal.genotype not in asked, f"trial {number} repeats a genotype"
        asked.add(proposal.genotype)
        running.append(Trial(number=number, genotype=proposal.genotype, state=State.RUNNING, note=dict(proposal.note)))
        while len(running) >= 4 or (number == trials and running):
            ended = running.pop(rng.randrange(len(running)))
            trial = problem.trial(ended.number, ended.genotype, ended.note)
            if trial.state is State.DONE and rng.random() < 0.2:
                stopped.append(trial)
                trial = trial.model_copy(update={"state": State.STOPPED, "rung": 0})
            tell(trial)
            if stopped and rng.random() < 0.3:
                tell(stopped.pop(0))
    return events


def _check_proposal(space: Space, proposal: Proposal) -> None:
    sp.check(space, proposal.genotype)
    canonical = sp.canonical(space, proposal.genotype)
    assert proposal.genotype == canonical, f"{proposal.genotype} is not canonical: {canonical}"
    assert json.loads(json.dumps(proposal.note)) == proposal.note, "a note must survive JSON unchanged"


def _check_exhaustion(make: MakeSearcher, seed: int) -> None:
    problem = ClosedForm(10, seed=seed)
    space = Space(
        name="exhausted",
        genes=(
            Gene(name="a", kind="arch", choices=(2, 1)),
            Gene(name="b", kind="arch", choices=("x", "y", "z"), when={"a": (2,)}),
            Gene(name="c", kind="policy", choices=(0.0, 0.5), site="s", op="prune", param="ratio"),
        ),
    )
    every = list(sp.every(space))
    model = problem.trial(1, sp.parent(problem.space)).outcome
    searcher = make(space, problem.goals, problem.limit, problem.facts, seed)
    # All but one are running: the one left must be found, then nothing.
    running = [Trial(number=i + 1, genotype=g, state=State.RUNNING) for i, g in enumerate(every[:-1])]
    proposal = searcher.ask(len(every), running)
    assert proposal is not None, "one genotype is left, but it asks for nothing"
    assert proposal.genotype == every[-1], "it asks for a genotype that is pending"
    searcher = make(space, problem.goals, problem.limit, problem.facts, seed)
    found: list[Genotype] = []
    for number in range(1, len(every) + 1):
        proposal = searcher.ask(number, [])
        assert proposal is not None, f"exhausted after {len(found)} of {len(every)} genotypes"
        found.append(proposal.genotype)
        searcher.tell(
            Trial(number=number, genotype=proposal.genotype, state=State.DONE, outcome=model, note=proposal.note)
        )
    repeated = [g for g, count in Counter(found).items() if count > 1]
    assert not repeated, f"repeats {repeated}"
    assert searcher.ask(len(every) + 1, []) is None, "the space is exhausted, but it asks on"


# --- ops ------------------------------------------------------------------------------------------------------------


def check_op(op: Op, subject: Any, rules: Sequence[Rule], task: Task, profile: Profile) -> Receipt:
    """Hold an op to its protocol on a subject (an nn.Module, or exported parts for a numeric op); returns the receipt.

    `decide` leaves the subject as it was and is repeatable, every rule is accounted for, the receipt survives JSON,
    and enacting it twice on copies gives equal shapes, tensors and bytes. A `TrainOp`'s instrument lives through
    copying, a few steps of training and its state being loaded elsewhere, and leaves the module as it found it, or a
    structure op's as its settled receipt makes it.
    """
    assert isinstance(op, Op), "an op has name, phase, params, decide and enact"
    assert op.phase in ("structure", "train", "numeric"), f"unknown phase {op.phase!r}"
    json.dumps(op.params)
    for rule in rules:
        assert rule.op == op.name, f"rule of {rule.op!r} given to {op.name!r}"
        unknown = set(rule.settings) - set(op.params)
        assert not unknown, f"{op.name}: settings {sorted(unknown)} are not among its params {sorted(op.params)}"
    before = _state(subject)
    receipt = op.decide(subject, rules, task, profile)
    assert _state(subject) == before, f"{op.name}: decide changed its subject"
    assert receipt.op == op.name, f"{op.name}: its receipt says {receipt.op!r}"
    assert op.decide(subject, rules, task, profile) == receipt, f"{op.name}: deciding twice gives two receipts"
    try:
        written = json.dumps(receipt.model_dump(), allow_nan=False)
    except (TypeError, ValueError) as wrong:
        raise AssertionError(f"{op.name}: its receipt is not JSON: {wrong}") from wrong
    read = Receipt.model_validate_json(written)
    assert json.loads(read.model_dump_json()) == json.loads(written), f"{op.name}: its receipt does not survive JSON"
    for entry in receipt.entries:
        assert entry.status != "skipped" or entry.why, f"{op.name}: skipped {entry.site!r} without saying why"
    first = _state(op.enact(copy.deepcopy(subject), read))
    second = _state(op.enact(copy.deepcopy(subject), read))
    assert first == second, f"{op.name}: enacting one receipt twice gives two results"
    open_ = any(entry.status == "open" for entry in receipt.entries)
    assert not open_ or isinstance(op, TrainOp), f"{op.name}: it leaves entries open, but has no settle"
    if isinstance(op, TrainOp) and (open_ or op.phase == "train"):
        _check_instrument(op, subject, read, task)
    return receipt


def _check_instrument(op: TrainOp, subject: Any, receipt: Receipt, task: Task) -> None:
    """Enact, train, load into another copy, settle both: equal networks of the subject's names and shapes."""
    torch = import_module("torch")
    module = copy.deepcopy(op.enact(copy.deepcopy(subject), receipt)).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    for step, (inputs, targets) in enumerate(task.batches("train", 16, limit=64)):
        op.advance(module, receipt, min(1.0, step / 4))
        arguments = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
        loss, penalty = task.loss(module(*arguments), targets), op.penalty(module, receipt)
        loss = loss if penalty is None else loss + penalty
        assert bool(torch.isfinite(loss)), f"{op.name}: the loss is not finite at step {step}"
        optimizer.zero_grad()
        loss.backward()
        if (follow := getattr(op, "follow", None)) is not None:
            follow(module, receipt)
        optimizer.step()
        if step == 3:
            break
    op.advance(module, receipt, 1.0)
    other = op.enact(copy.deepcopy(subject), receipt)
    other.load_state_dict(module.state_dict())
    kept = _state(module)
    settled = [op.settle(copied, receipt) for copied in (copy.deepcopy(module), other)]
    assert settled[0] == settled[1], f"{op.name}: settles otherwise after its state was loaded elsewhere"
    assert _state(module) == kept, f"{op.name}: settling a copy changed the module that trains on"
    json.dumps(settled[0].model_dump(), allow_nan=False)
    read = Receipt.model_validate_json(settled[0].model_dump_json())
    assert json.loads(read.model_dump_json()) == json.loads(settled[0].model_dump_json()), (
        f"{op.name}: its settled receipt does not survive JSON"
    )
    op.settle(module, receipt)
    assert _state(module) == _state(other), f"{op.name}: settling one state twice gives two networks"
    plain, whose = subject, "were there before enact"
    if op.phase == "structure":
        assert all(entry.status != "open" for entry in read.entries), f"{op.name}: settle leaves entries open"
        plain, whose = op.enact(copy.deepcopy(subject), read), "enacting its settled receipt gives"
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in module.state_dict().items()}
    before = {name: (tuple(t.shape), t.dtype) for name, t in plain.state_dict().items()}
    assert shapes == before, f"{op.name}: settle leaves other names or shapes than {whose}"
    assert [repr(part) for part in module.modules()] == [repr(part) for part in plain.modules()], (
        f"{op.name}: settle leaves other layers than {whose}"
    )
    hooks = [sum(map(len, _hooks(part))) for part in (module, plain)]
    assert hooks[0] == hooks[1], f"{op.name}: settle leaves hooks behind"


def _hooks(module: Any) -> list[Any]:
    """All dictionaries of hooks in a module."""
    return [
        hooks
        for part in module.modules()
        for name, hooks in vars(part).items()
        if name.endswith("_hooks") and isinstance(hooks, dict)
    ]


def _state(subject: Any) -> Any:
    """What two subjects are compared by: layers, shapes, types and bytes of a module's tensors, else all its fields."""
    if not hasattr(subject, "state_dict"):
        return repr(subject)
    layers = tuple((name, repr(layer)) for name, layer in subject.named_modules())
    tensors = tuple(
        (name, tuple(tensor.shape), str(tensor.dtype), tensor.detach().cpu().numpy().tobytes())
        for name, tensor in subject.state_dict().items()
    )
    return layers, tensors


# --- devices --------------------------------------------------------------------------------------------------------


def check_device(device: Device, model: Path, *, seconds: float = 1.0, factor: float = 3.0) -> None:
    """Hold a device to its protocol with one ONNX file: JSON fingerprint, stable; positive times; two readings whose
    medians agree within `factor`."""
    assert isinstance(device, Device), "a device has profile, fingerprint() and time()"
    assert isinstance(device.profile, Profile), "a device has a Profile"
    fingerprint = device.fingerprint()
    assert fingerprint, "an empty fingerprint tells no device from another"
    assert json.loads(json.dumps(fingerprint)) == fingerprint, "a fingerprint must survive JSON unchanged"
    assert device.fingerprint() == fingerprint, "a fingerprint must not change between two calls"
    medians: list[float] = []
    for _ in range(2):
        times = device.time([model], rounds=3, seconds=seconds).times_ms
        assert set(times) == {str(model)}, f"times are keyed by {sorted(times)}, not by the file as given"
        samples = times[str(model)]
        assert len(samples) >= 3, f"only {len(samples)} samples"
        assert all(np.isfinite(samples)), "a time is not finite"
        assert min(samples) > 0, "a time is not positive"
        medians.append(float(np.median(samples)))
    assert max(medians) <= factor * min(medians), f"two readings of one file differ: {medians} ms"


# --- tasks ----------------------------------------------------------------------------------------------------------


def check_task(task: Task, *, network: Any = None, size: int = 64, most: int = 4096) -> None:
    """Hold a task to its protocol: splits that do not overlap and come in the same order each time, shuffling by seed,
    inputs as its specification says, a loss that has a gradient, a quality interval that contains its value.

    `network` is an nn.Module that the task can train; without one a linear layer stands in, which a classification
    with one output will take. Looks at the first `most` samples of each split.
    """
    assert isinstance(task, Task), "a task has name, metric, input, batches, loss and quality"
    torch = import_module("torch")
    Recipe.of(getattr(task, "training", None), f"task {task.name}")
    names = [one.name for one in task.input.every]
    assert len(set(names)) == len(names), f"two inputs have one name: {names}"
    rows: dict[str, list[bytes]] = {}
    for split in ("train", "calibration", "selection", "test"):
        passes = [list(task.batches(split, size, limit=most)) for _ in range(2)]
        assert passes[0], f"split {split!r} is empty"
        assert len(passes[0]) == len(passes[1]), f"split {split!r} differs in length between two passes"
        rows[split] = []
        for (inputs, targets), (inputs_again, targets_again) in zip(*passes, strict=True):
            _check_batch(task, torch, inputs, targets, size)
            assert _equal(inputs, inputs_again), f"split {split!r} differs between two passes"
            assert _equal(targets, targets_again), f"targets of split {split!r} differ between two passes"
            rows[split] += [_bytes(*row) for row in zip(*several(inputs), strict=True)]
        assert len(rows[split]) <= most, f"split {split!r} gives {len(rows[split])} samples, {most} were asked for"
        counted: Any = getattr(task, "count", None)
        if counted is not None and len(rows[split]) < most:
            assert counted(split) == len(rows[split]), f"count({split!r}) is {counted(split)}, not {len(rows[split])}"
    examples = {split: set(found) for split, found in rows.items()}
    for one, other in (("train", "selection"), ("train", "test"), ("selection", "test"), ("calibration", "test")):
        # Real data holds a few equal examples; a split that leaks holds many.
        shared = len(examples[one] & examples[other])
        assert shared <= 0.01 * len(examples[other]), f"{one} and {other} share {shared} examples"
    if len(rows["train"]) < most:
        outside = len(examples["calibration"] - examples["train"])
        assert not outside, f"{outside} calibration examples are not part of train"
    first, again, other = ([x for x, _ in islice(task.batches("train", size, seed=seed), 2)] for seed in (1, 1, 2))
    assert all(map(_equal, first, again)), "one seed, two orders"
    assert not all(map(_equal, first, other)), "two seeds, one order"
    try:
        next(iter(task.batches("no-such-split", size)))
    except UserError:
        pass
    else:
        raise AssertionError("an unknown split must raise UserError")
    _check_quality(task, torch, size, network)


def _check_batch(task: Task, torch: Any, inputs: Any, targets: Any, size: int) -> None:
    wanted, given = task.input.every, several(inputs)
    assert len(given) == len(wanted), f"a batch has {len(given)} inputs, the task says {len(wanted)}"
    for spec, tensor in zip(wanted, given, strict=True):
        assert tuple(tensor.shape[1:]) == spec.shape, f"inputs are {tuple(tensor.shape)}, not {spec.shape}"
        assert tensor.dtype == getattr(torch, spec.dtype), f"input {spec.name!r} is {tensor.dtype}, not {spec.dtype}"
    lengths = {len(tensor) for tensor in (*given, *several(targets))}
    assert len(lengths) == 1, f"inputs and targets of a batch differ in length: {sorted(lengths)}"
    assert max(lengths) <= size, f"a batch of {max(lengths)} samples, {size} were asked for"


def _equal(one: Any, other: Any) -> bool:
    return all(a.shape == b.shape and bool((a == b).all()) for a, b in zip(several(one), several(other), strict=True))


def _bytes(*tensors: Any) -> bytes:
    return b"".join(np.ascontiguousarray(np.asarray(tensor)).tobytes() for tensor in tensors)


class _Linear:
    """Stands in for a network: one linear layer on all inputs side by side."""

    def __init__(self, task: Task, torch: Any, inputs: Any, targets: Any) -> None:
        assert len(several(targets)) == 1, "several targets: give check_task a `network` that the task can train"
        outputs = len(task.input.labels) or (
            int(targets.max()) + 1 if not targets.is_floating_point() else targets.shape[-1]
        )
        features = sum(one[0].numel() for one in several(inputs))
        self.weights = torch.randn(features, outputs, generator=torch.Generator().manual_seed(0)) * 0.01
        self.weights.requires_grad_(True)
        self.cat = torch.cat

    def parameters(self) -> list[Any]:
        return [self.weights]

    def __call__(self, *inputs: Any) -> Any:
        return self.cat([one.flatten(1).float() for one in inputs], 1) @ self.weights


def _check_quality(task: Task, torch: Any, size: int, network: Any) -> None:
    inputs, targets = next(iter(task.batches("selection", size)))
    network = copy.deepcopy(network).eval() if network is not None else _Linear(task, torch, inputs, targets)
    loss = task.loss(network(*several(inputs)), targets)
    assert loss.ndim == 0, "the loss of a batch is one number"
    loss.backward()
    gradients = [one.grad for one in network.parameters() if one.grad is not None]
    assert gradients, "the loss has no gradient"
    assert all(bool(torch.isfinite(one).all()) for one in gradients), "the loss has no finite gradient"

    def predict(batch: Any) -> Any:
        with torch.no_grad():
            outputs = network(*(torch.from_numpy(np.ascontiguousarray(one)) for one in several(batch)))
        found = tuple(one.numpy() for one in several(outputs))
        return found[0] if len(found) == 1 else found

    found = task.quality(predict, "selection")
    assert found.metric == task.metric, f"quality speaks of {found.metric!r}, the task of {task.metric!r}"
    assert found.split == "selection", f"quality speaks of split {found.split!r}"
    assert found.samples > 0, "quality of no samples"
    assert found.value.low <= found.value.value <= found.value.high, f"{found.value} does not contain its value"
    assert task.quality(predict, "selection") == found, "quality of one model differs between two calls"
    if isinstance(task, Scored):
        scores = task.scores(predict, "selection")
        assert scores.shape == (found.samples,), f"scores of shape {scores.shape}, quality of {found.samples} samples"
        mean, value = float(scores.mean(dtype=float)), found.value.value
        assert abs(mean - value) <= 1e-6, f"the mean of the scores is {mean:.6f}, quality is {value:.6f}"
