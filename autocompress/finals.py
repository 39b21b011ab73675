"""After the search: finalists are certified, winners meet the test split once, artifacts are written (floor F5)."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from autocompress import artifact, certify, evidence, export, onnxfile, pareto, tradeoff
from autocompress.controller import trial_seed
from autocompress.devices import Unreachable
from autocompress.devices.fingerprint import short
from autocompress.devices.station import Station
from autocompress.models.trace import examples, thop_count
from autocompress.ops.optimize import fused, optimized
from autocompress.ops.storage import storage
from autocompress.ops.store import codecs_of
from autocompress.parent import Baseline
from autocompress.parts import Parts
from autocompress.pipeline import Work, qualities, release, timed
from autocompress.space import decode
from autocompress.stages import stages
from autocompress.store import Store
from autocompress.summary import Arm, Finding
from autocompress.tasks.intervals import paired
from autocompress.tasks.judge import judged
from autocompress.types import (
    Goal,
    Interval,
    Limit,
    Point,
    Policy,
    Quality,
    Reading,
    Receipt,
    Rule,
    Stage,
    State,
    Trial,
    TrialFailure,
    UserError,
)

FINALISTS = 3
ROOM = 0.1


def finalists(trials: Sequence[Trial], goal: Goal, limit: Limit) -> tuple[Trial, ...]:
    """The best few fully trained trials for a goal, the closest where none is feasible.

    The best by quality often stand at the edge of a budget, where a second measurement may put them outside: the
    last place goes to the best that has some room.
    """
    full = [t for t in trials if t.number > 0 and t.state is State.DONE and "receipts" in t.outcome.files]
    ranked = pareto.best(full, goal, limit, len(full))
    first, rest = ranked[: FINALISTS - 1], ranked[FINALISTS - 1 :]
    return (*first, *([t for t in rest if certify.spare(t.outcome, goal) >= ROOM] or rest)[:1])


@dataclass
class Kept:
    """What the store holds of a fully evaluated trial."""

    weights: bytes
    models: dict[str, bytes]  # by variant
    shas: dict[str, str]
    structure: tuple[Receipt, ...]
    numeric: dict[str, tuple[Receipt, ...]]


def kept(store: Store, trial: Trial) -> Kept:
    """Read a finalist's files. Raises UserError where the run's `work` folder was changed."""
    files = trial.outcome.files
    receipts: dict[str, Any] = json.loads(store.get(files["receipts"]))
    shas = {role.removeprefix("model:"): sha for role, sha in files.items() if role.startswith("model:")}
    return Kept(
        weights=store.get(files["weights"]),
        models={variant: store.get(sha) for variant, sha in shas.items()},
        shas=shas,
        structure=tuple(Receipt.model_validate(one) for one in receipts["structure"]),
        numeric={v: tuple(Receipt.model_validate(one) for one in those) for v, those in receipts["numeric"].items()},
    )


@dataclass
class Sessions:
    """Readings taken alone, in fresh processes; goals that share a finalist share its sessions."""

    station: Station
    patience: float = 0.0  # seconds to wait, in all, for devices that are away
    say: Callable[[str], None] = lambda _: None
    taken: dict[tuple[str, str], list[Reading]] = field(default_factory=dict)

    def of(self, sha: str, model: bytes) -> Callable[[str], Reading]:
        """A `measure(profile)` for one goal: what is known first, then new sessions."""
        used: dict[str, int] = {}

        def measure(profile: str) -> Reading:
            readings = self.taken.setdefault((sha, profile), [])
            index = used.get(profile, 0)
            used[profile] = index + 1
            if index == len(readings):
                readings.append(self.alone(profile, model))
            return readings[index]

        return measure

    def alone(self, profile: str, model: bytes) -> Reading:
        """One session. Raises Unreachable where the device is away for longer than there is patience."""
        pause = 0.5
        while True:
            try:
                return self.station.session(profile, model)
            except Unreachable as gone:
                if self.patience <= 0:
                    raise
                self.say(f"waiting for {profile}, at most {self.patience / 60:.3g} minutes: {gone}")
                began = time.monotonic()
                time.sleep(min(pause, self.patience))
                self.patience -= time.monotonic() - began
                pause = min(2 * pause, 5.0)


@dataclass
class Finals:
    """Certification and artifacts of one finished (or interrupted) search."""

    parts: Parts
    work: Work
    baseline: Baseline
    station: Station
    store: Store
    out: Path
    exporter: str
    patience: float = 0.0  # seconds to wait, in all, for devices that are away
    say: Callable[[str], None] = lambda _: None
    place: Path | None = None  # of the artifacts, if it is not `out`
    sessions_each: int = certify.SESSIONS
    test: dict[str, Quality] = field(default_factory=dict)  # by sha256 of the file: each meets the test split once
    scores: dict[str, NDArray[Any] | None] = field(default_factory=dict)  # of its samples, where the task tells them
    made: dict[int, tuple[Stage, ...]] = field(default_factory=dict)  # by trial number
    optimized: dict[tuple[str, str], tuple[bytes, dict[str, int]]] = field(default_factory=dict)
    traded: dict[tuple[str, tuple[str, ...]], tuple[Point, ...]] = field(default_factory=dict)
    answered: dict[tuple[str, str], tuple[Quality, certify.Checked]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)  # what could not be made, and why: the report says it
    sessions: Sessions = field(init=False)

    def __post_init__(self) -> None:
        """Sessions belong to the station."""
        self.sessions = Sessions(self.station, self.patience, self.say)

    @contextmanager
    def saying(self, what: str, broken: list[Exception] | None = None) -> Iterator[None]:
        """An end of a search loses no summary: what fails here becomes a reason in it, and goes into `broken`."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  a stranger's op, task or network may raise anything
            why = "" if isinstance(error, TrialFailure | UserError) else f"{type(error).__name__}: "
            self.problems.append(f"{what}: {why}{' '.join(str(error).split())[:300]}")
            if broken is not None:
                broken.append(error)

    def variant(self, profile_name: str) -> str:
        """The variant that serves a profile."""
        return next(p.numeric.variant for p in self.parts.profiles if p.name == profile_name)

    def certify(self, goal: Goal, trial: Trial) -> certify.Certificate:
        """Measure one finalist again, alone."""
        files = kept(self.store, trial)

        def measure(profile: str) -> Reading:
            variant = self.variant(profile)
            return measures[variant](profile)

        measures = {v: self.sessions.of(files.shas[v], timed(self.work.task, files.models[v])) for v in files.models}
        quality, checked = dict(trial.outcome.quality), dict[str, certify.Checked]()
        for budget in goal.budgets:
            name = budget.profile
            variant = self.variant(name)
            key = (files.shas[variant], name)
            if key not in self.answered:
                self.answered[key] = self.answers(name, files.models[variant], trial.outcome.quality.get(name))
            quality[name], checked[name] = self.answered[key]
        return certify.certify(
            measure,
            goal,
            quality=quality,
            size_mb=trial.outcome.size_mb,
            limit=self.baseline.limit,
            sessions=self.sessions_each,
            checked=checked,
        )

    def answers(self, name: str, model: bytes, known: Quality | None) -> tuple[Quality, certify.Checked]:
        """Quality of a file by what a device answers; while that is away what is known stands, and says so."""
        profile = next(profile for profile in self.parts.profiles if profile.name == name)
        quality = functools.partial(evidence.quality, self.work.task, model, profile, known, self.host(name))
        try:
            with self.station.predictor(name, model) as predict:
                return quality(predict)
        except Unreachable:
            return quality()

    def test_quality(self, sha: str, model: bytes) -> Quality:
        """The test split, read once per file."""
        if sha not in self.test:
            self.test[sha], self.scores[sha] = judged(self.work.task, export.predictor(model), "test")
        return self.test[sha]

    def lost(self, shas: Mapping[str, str]) -> dict[str, Interval]:
        """By profile what its file loses of the baseline's quality on the test split, where samples can be compared."""
        before = self.scores.get("baseline")
        after = {name: self.scores.get(sha) for name, sha in shas.items()}
        return {name: paired(before, one) for name, one in after.items() if before is not None and one is not None}

    def decide(
        self, trials: tuple[Trial, ...], goal: Goal, folder: str, also: tuple[Trial, ...] = ()
    ) -> Finding | None:
        """Certify in order until one passes, and write the winner (or the closest) as an artifact.

        `also`: winners of other goals, tried last.
        """
        few = finalists(trials, goal, self.baseline.limit)
        few += tuple(trial for trial in also if trial not in few)
        chosen = certify.choose(few, lambda trial: self.certify(goal, trial))
        if chosen is None:
            return None
        trial, proof = chosen.winner, chosen.certificate
        files = kept(self.store, trial)
        names = [budget.profile for budget in goal.budgets]
        shas = {name: files.shas[self.variant(name)] for name in names}
        test = {name: self.test_quality(sha, files.models[self.variant(name)]) for name, sha in shas.items()}
        lost = self.lost(shas)
        path = Path("best" if proof.certified else "closest") / folder
        self.write((self.place or self.out) / path, goal, trial, proof, files, test, lost)
        if proof.certified:  # the closest of an earlier end of this run is answered
            shutil.rmtree((self.place or self.out) / "closest" / folder, ignore_errors=True)
        return Finding(
            goal=goal.name,
            number=trial.number,
            candidate=decode(self.parts.space, trial.genotype),
            certificate=proof,
            test=test,
            lost=lost,
            macs=trial.outcome.macs,
            parameters=trial.outcome.parameters,
            path=str(path),
            stages=self.stages(trial, files),
            fused=self.optimizer(goal, files)[1],
            thresholds=self.tradeoff(files, self.variant(names[0]), tuple(names)),
            spread={name: spread for name in names if (spread := tradeoff.spread(proof.each.get(name, ())))},
            tried=tuple(tried.number for tried, _ in chosen.tried),
        )

    def optimizer(self, goal: Goal, files: Kept) -> tuple[bytes, dict[str, int]]:
        """The file of a goal's first device as onnxruntime runs it here, and what was fused; none for remote devices.

        Such a file is for this version, provider and processor only.
        """
        profile = next(p for p in self.parts.profiles if p.name == goal.budgets[0].profile)
        if profile.device != "local":
            return b"", {}
        variant = profile.numeric.variant
        key = (files.shas[variant], profile.name)
        if key not in self.optimized:
            self.optimized[key] = b"", {}
            with self.saying(f"onnxruntime's optimized file for {profile.name}"):
                made = optimized(files.models[variant], profile)
                self.optimized[key] = made, fused(files.models[variant], made)
        return self.optimized[key]

    def stages(self, trial: Trial, files: Kept) -> tuple[Stage, ...]:
        """Where quality was lost and regained on the way to a winner; made once for all goals that it wins."""
        if trial.number not in self.made:
            candidate = decode(self.parts.space, trial.genotype)
            torch.manual_seed(trial_seed(self.parts.job.search.seed, trial.number))
            model = next(iter(files.models.values()))
            self.made[trial.number] = ()
            with self.saying(f"quality by stages of #{trial.number}"):
                self.made[trial.number] = stages(
                    self.work, candidate, files.structure, files.weights, model, "selection"
                )
        return self.made[trial.number]

    def write(
        self,
        folder: Path,
        goal: Goal,
        trial: Trial,
        proof: certify.Certificate,
        files: Kept,
        test: Mapping[str, Quality],
        lost: Mapping[str, Interval],
    ) -> None:
        """One artifact; several variants where the goal's devices compute integers differently."""
        parts, facts = self.parts, self.baseline.facts
        candidate = decode(parts.space, trial.genotype)
        serves = {budget.profile: self.variant(budget.profile) for budget in goal.budgets}
        first, *others = dict.fromkeys(serves.values())
        names = {first: artifact.MODEL, **{variant: f"model-{variant}.onnx" for variant in others}}
        made, changes = self.optimizer(goal, files)
        beside = {artifact.OPTIMIZED: made} if made else {}
        with self.saying("inputs and answers to check the file by"):
            beside[artifact.CHECK] = evidence.pair(
                parts.task.input, {names[variant]: files.models[variant] for variant in names}
            )
        if runs := evidence.samples(proof):
            beside[artifact.SAMPLES] = runs
        if codecs := codecs_of(files.numeric[first]):
            beside[artifact.STORED] = storage(files.models[first], codecs)
        artifact.write(
            folder,
            model=files.models[first],
            weights=files.weights,
            beside=beside,
            variants={names[variant]: files.models[variant] for variant in others},
            policy=artifact.PolicyFile(
                builder=parts.job.model.builder,
                arch=candidate.arch,
                parent_arch={gene.name: gene.choices[0] for gene in parts.space.genes if gene.kind == "arch"},
                policy=candidate.policy,
                receipts=files.structure,
                numeric={variant: files.numeric[variant] for variant in names},
                sites=facts.sites,
            ),
            manifest=artifact.Manifest(
                goal=goal,
                certificate=proof,
                input=parts.task.input,
                task=parts.job.task,
                builder=parts.job.model.builder,
                models={profile: names[variant] for profile, variant in serves.items()},
                profiles=tuple(p for p in parts.profiles if p.name in serves),
                epochs=parts.job.search.fidelity.full_epochs * trial.outcome.fidelity,
                number=trial.number,
                genotype=trial.genotype,
                seed=parts.job.search.seed,
                selection=dict(proof.quality),
                test=dict(test),
                lost=dict(lost),
                size_mb={name: trial.outcome.size_mb[name] for name in serves},
                macs=trial.outcome.macs,
                parameters=trial.outcome.parameters,
                baseline=artifact.BaselineFigures(
                    sha256=self.baseline_sha,
                    selection=facts.baseline_quality,
                    test=self.test.get("baseline"),
                    readings={name: facts.baseline[name] for name in serves},
                    size_mb=facts.baseline_size_mb,
                    macs=self.baseline.outcome.macs,
                    parameters=self.baseline.outcome.parameters,
                ),
                fingerprints={**facts.fingerprints, **self.hosts(serves)},
                versions=artifact.versions(),
                exporter=self.exporter,
                opset=self.work.opset,
                thresholds=self.tradeoff(files, first, tuple(serves)),
                fused=changes,
                job=parts.job.model_dump(mode="json"),
            ),
        )

    def tradeoff(self, files: Kept, variant: str, profiles: tuple[str, ...]) -> tuple[Point, ...]:
        """Quality and latency for other thresholds; measured once for all goals that a file serves."""
        own = tuple(name for name in profiles if self.variant(name) == variant)
        key = (files.shas[variant], own)
        if key not in self.traded:
            self.traded[key] = ()
            with self.saying("what moving the thresholds trades"):
                self.traded[key] = tradeoff.measured(
                    files.models[variant],
                    files.numeric[variant],
                    self.work.task,
                    own,
                    self.station.measure,
                )
        return self.traded[key]

    @functools.cached_property
    def baseline_sha(self) -> str:
        """By which `verify` knows the uncompressed file again."""
        return hashlib.sha256(onnxfile.load(self.out / "baseline" / "model.onnx")).hexdigest()

    def host(self, profile: str) -> dict[str, Any]:
        """A device's fingerprint; that of the search's beginning where it has been away since a resume."""
        try:
            return self.station.fingerprint(profile)
        except Unreachable:
            facts = self.baseline.facts
            return facts.fingerprints.get(facts.baseline[profile].fingerprint, {})

    def hosts(self, profiles: Iterable[str]) -> dict[str, Any]:
        """Fingerprints of the devices as they are now: a resumed search may have ended elsewhere."""
        found = [self.host(name) for name in profiles]
        return {short(host): host for host in found}

    def baseline_test(self) -> Quality:
        """The uncompressed file on the test split."""
        return self.test_quality("baseline", onnxfile.load(self.out / "baseline" / "model.onnx"))

    def int8_arm(self) -> Arm:
        """The control that every reader asks for: the parent in int8, nothing else done to it."""
        sites = [site.name for site in self.parts.builder.sites() if "quantize" in site.ops]
        policy = Policy(rules=tuple(Rule(site=name, op="quantize", settings={"bits": "int8"}) for name in sites))
        try:
            files = release(self.work, self.work.parent, policy)
            readings = {
                profile.name: self.station.measure(
                    profile.name, files[profile.numeric.variant].model, files[profile.numeric.variant].key
                )
                for profile in self.parts.profiles
            }
        except TrialFailure as failure:
            return Arm(name="int8", why=str(failure))
        macs, parameters = thop_count(self.work.parent, examples(self.work.task.input))
        names = {profile.name: f"int8:{profile.numeric.variant}" for profile in self.parts.profiles}
        test = {name: self.test_quality(kept, files[self.variant(name)].model) for name, kept in names.items()}
        return Arm(
            name="int8",
            ran=True,
            selection=qualities(self.work, files, "selection"),
            test=test,
            lost=self.lost(names),
            readings=readings,
            size_mb={p.name: files[p.numeric.variant].size_mb for p in self.parts.profiles},
            macs=macs,
            parameters=parameters,
        )
