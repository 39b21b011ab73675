"""The path of a trial from its assignment to its outcome (floor F4).

Order: the candidate as `pipeline` makes it; then *latency first* (one over every budget ends here, untrained); then
training rung by rung, and at each rung the file and its quality.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from statistics import median
from typing import Any, Protocol

import torch

from autocompress.devices import AllAway, Unreachable, host_of
from autocompress.models.trace import examples, thop_count
from autocompress.pareto import at_best, meets, over_every_budget, settled
from autocompress.pipeline import (
    BATCHNORM_BATCHES,
    ROUTE,
    ROUTES,
    Release,
    Settled,
    Shaped,
    Work,
    changes_structure,
    notes_of,
    qualities,
    release,
    reshape,
    shape,
    train_op,
    training,
    weights_of,
)
from autocompress.surrogate import hopeless
from autocompress.train import Training, reestimate_batchnorm
from autocompress.types import (
    Assignment,
    Budget,
    Outcome,
    Reading,
    Receipt,
    Record,
    State,
    TrialFailure,
    UserError,
)
from autocompress.wording import beyond

PACED_S = 2.0  # so long it is looked at how fast training is
PERSISTENCE = 1  # further tries at a noisy reading of a candidate that is fully trained
LATER = "later:"  # role of a file that a device was away for: it is measured when the device is back
ASK_AGAIN_S = 5.0  # at most, between tries at devices that are all away


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


class Checkpoint(Record):
    """Where a trial can go on: receipts rebuild the shapes, `training` (safetensors, by sha256) the rest."""

    receipts: tuple[Receipt, ...]
    instruments: tuple[Receipt, ...] = ()
    readings: dict[str, Reading]
    keys: dict[str, str]
    later: dict[str, str] = {}
    training: str


def firm(
    measure: Measure, profile: str, model: bytes, key: str, budgets: Sequence[Budget], held: Reading | None = None
) -> Reading:
    """A reading of a fully trained file: a noisy one is taken again, then refused unless it leaves no doubt.

    Of noisy ones the surest counts, `held` of the same graph among them. Raises TrialFailure where noise stays, or the
    file does not run there.
    """
    reading = measure(profile, model, key, again=True)
    tried = [reading] if held is None else [held, reading]
    for _ in range(PERSISTENCE):
        if reading.noisy:
            reading = measure(profile, model, key, again=True)
            tried.append(reading)
    if reading.noisy:
        reading = min(tried, key=lambda one: one.ratio.high / max(one.ratio.low, 1e-9))
    if reading.noisy and not settled(reading, budgets):
        low, high = reading.ratio.low, reading.ratio.high
        raise TrialFailure(f"{profile}: reading too noisy, ratio between {low:.3f} and {high:.3f}")
    return reading


def missed(outcome: Outcome) -> dict[str, str]:
    """Files that devices were away for, by profile: a trial whose outcome is not complete yet."""
    return {role.removeprefix(LATER): sha for role, sha in outcome.files.items() if role.startswith(LATER)}


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
    def cycles(self) -> dict[float, float]:
        """Where the learning rate has come down, at every rung if nothing else is said; its highest share before."""
        ends = self.assignment.cycles or self.assignment.rungs
        peaks = self.assignment.peaks or (1.0,) * len(ends)
        return {end: peak for end, peak in zip(ends, peaks, strict=True) if end > 0}

    def walk(self) -> Iterator[tuple[State, Outcome]]:
        assignment, policy = self.assignment, self.assignment.candidate.policy
        # A checkpoint may have been swept away; training is deterministic, so it is only time that is lost.
        saved = self.saved()
        if saved is None:
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
                shaped, trainer = self.restore(*saved)
            self.describe(shaped)
        for index in range(assignment.start, len(assignment.rungs)):
            fidelity = assignment.rungs[index]
            with self.stage("train"):
                trainer.run_to(fidelity)
            with self.stage("export"):
                settled = shaped.settle(self.work) if trainer.rested else self.halfway(shaped, fidelity)
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
        saved = self.saved()
        if saved is None:
            raise TrialFailure("its checkpoint is gone")
        _, trainer = self.restore(*saved)
        steps = min(steps, (trainer.total - trainer.step) // 2)
        trainer.run_to((trainer.step + steps) / trainer.total)  # warms up
        took: list[float] = []
        until = time.perf_counter() + PACED_S
        while not took or time.perf_counter() < until:
            found = trainer.run_to(min(1.0, (trainer.step + steps) / trainer.total))
            took.append(found["seconds"] / max(found["steps"], 1.0))
            if not steps or trainer.step >= trainer.total:
                break
        return median(took) * trainer.total

    def halfway(self, shaped: Shaped, fidelity: float) -> Settled:
        """A changed network in mid-training, its running statistics brought up to its weights, which run ahead of them.

        With what is rounded in training rounded: the file's weights are. On digits at 30 % of ten epochs, 70 % of the
        channels gone: 3 points lost where it had been 21. Where a cycle of the rate has ended, and at the end of the
        training, running statistics are the weights' own and better than any few batches'.
        """
        settled = shaped.settle(self.work)
        moved = {receipt.op for receipt in settled.learned if self.work.ops[receipt.op].phase == "structure"}
        if fidelity == 1 or (shaped.intact and moved <= ROUTES):
            return settled
        module = copy.deepcopy(shaped.module)
        reestimate_batchnorm(module, self.work.task, BATCHNORM_BATCHES, pause=self.work.gate.step)
        return replace(shaped, module=module).settle(self.work)

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
                held = self.readings.get(profile) if self.keys.get(profile) == item.key else None
                return firm(measure, profile, item.timed, item.key, self.evaluator.budgets, held)
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

    def saved(self) -> tuple[Checkpoint, bytes] | None:
        """The assignment's checkpoint and the training's state; None where one of them is missing or damaged."""
        sha = self.assignment.checkpoint
        if sha is None or not self.files.has(sha):
            return None
        try:
            found = Checkpoint.model_validate_json(self.files.get(sha))
            return found, self.files.get(found.training)
        except (UserError, ValueError):
            return None

    def restore(self, checkpoint: Checkpoint, state: bytes) -> tuple[Shaped, Training]:
        candidate = self.assignment.candidate
        module = reshape(self.work.builder, self.work.ops, candidate.arch, checkpoint.receipts)
        for receipt in checkpoint.instruments:
            train_op(self.work, receipt).enact(module, receipt)
        intact = not changes_structure(self.work, candidate.arch, checkpoint.receipts)
        shaped = Shaped(module, checkpoint.receipts, checkpoint.instruments, intact)
        trainer = training(self.work, shaped, candidate.policy, self.assignment.seed, self.cycles)
        trainer.load(state)
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
