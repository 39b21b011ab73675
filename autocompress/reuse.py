"""Re-apply a found policy: to reproduce its artifact, or to next week's checkpoint of the same network (floor F5)."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autocompress import artifact, certify, evidence, export, load, memory, onnxfile, reader, registry, tradeoff
from autocompress.artifact import Artifact
from autocompress.controller import trial_seed
from autocompress.devices.cores import plan_cores
from autocompress.devices.fingerprint import resolve_local, short
from autocompress.devices.station import Station
from autocompress.models import Builder
from autocompress.models.trace import examples, thop_count
from autocompress.models.weights import fill
from autocompress.parent import export_baseline, floor, load_parent, run_through
from autocompress.parts import make_builder, make_ops, make_task
from autocompress.pipeline import (
    Release,
    Settled,
    Work,
    qualities,
    release,
    rerelease,
    reshape,
    shape,
    training,
    weights_of,
)
from autocompress.tasks import Task, several
from autocompress.train import bf16_faster
from autocompress.types import (
    Candidate,
    Job,
    LimitError,
    Point,
    Profile,
    Quality,
    QualityLimit,
    Receipt,
    Record,
    TrialFailure,
    UserError,
)

TOLERANCE = 1e-2  # relative error of outputs that a file made by other library versions may have


class Applied(Record):
    """What `apply` did."""

    folder: str  # of the new artifact; empty where none was asked for
    reproduced: bool  # False: decided again on new weights
    byte_equal: bool = False
    error: float = 0.0  # largest relative difference of outputs to the artifact's file, where not byte-equal
    quality: dict[str, Quality] = {}
    drop: float | None = None
    certificate: certify.Certificate | None = None

    def __str__(self) -> str:
        """For the terminal."""
        where = f", written to {self.folder}" if self.folder else ""
        if self.reproduced:
            same = "byte for byte" if self.byte_equal else f"within a relative error of {self.error:.1e}"
            return f"reproduced {same}{where}"
        lines = [f"applied to the new weights{where}"]
        if self.drop is not None:
            lines.append(f"quality lost: {self.drop:+.4f} ({', '.join(_says(q) for q in _distinct(self.quality))})")
        if self.certificate is not None:
            for name, reading in self.certificate.readings.items():
                lines.append(
                    f"{name}: {reading.ms.value:.3f} ms, {reading.speedup:.2f}x the new baseline "
                    f"({1 / reading.ratio.high:.2f} to {1 / reading.ratio.low:.2f})"
                )
        return "\n".join(lines)


def _says(quality: Quality) -> str:
    return f"{quality.metric} {quality.value.value:.4f} on {quality.split}"


def _distinct(found: Mapping[str, Quality]) -> list[Quality]:
    return list({q.value.value: q for q in found.values()}.values())


def apply(
    source: Path | str,
    *,
    weights: Path | str | None = None,
    out: Path | str | None = None,
    max_drop: float | None = None,
    model: Builder | nn.Module | None = None,
    task: Task | None = None,
    devices: Sequence[str | Profile] = (),
    trust: Sequence[str] = (),
    as_is: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Applied:
    """Without `weights`, make the artifact's files again from its receipts and check that they are the same.

    With `weights` (of the same unmodified network, retrained): decide again by the same ratios, bits and ranks,
    fine-tune, export, measure, certify, and write the new artifact to `out`. The limits are the artifact's budgets and
    its job's quality limit, or `max_drop` below the new weights' own quality on the selection split.

    The artifact names its builder and task; they are taken from what is installed with autocompress or given as
    `model` and `task`. Names of the form `module:attr` are imported only if their package is in `trust`. Nor does it
    decide what is reached: where a device of it is not plainly this host, `devices` names your own profile of it.
    `as_is` measures on devices that are not those that the profiles were made for.

    Raises UserError for an artifact that is damaged, of another network or names unknown code; LimitError where a limit
    does not hold, after everything was written.
    """
    trust = (trust,) if isinstance(trust, str) else trust
    if out is not None:
        artifact.check_place(Path(out).absolute())  # said before anything is computed, not after
    read = artifact.read(Path(source), trust=trust)
    if weights is not None:
        profiles = measured_on(read, devices, trust)
        read = replace(read, manifest=read.manifest.model_copy(update={"profiles": profiles}))
    if as_is:
        profiles = tuple(one.model_copy(update={"as_is": True}) for one in read.manifest.profiles)
        read = replace(read, manifest=read.manifest.model_copy(update={"profiles": profiles}))
    made = subject(read, model, task, trust)
    if weights is None:
        return _reproduce(read, made, None if out is None else Path(out))
    if out is None:
        raise UserError("--out is needed with --weights: where shall the new artifact go?")
    return _renew(read, made, Path(weights), Path(out), max_drop, say)


def harmless(profile: Profile) -> bool:
    """Whether a profile that came with an artifact may be used: no plug-in, no host, no library that options name."""
    return profile.device == "local" and not profile.provider_options


def refusal(profile: Profile) -> str:
    """What is said of a profile that came with an artifact and is not `harmless`."""
    how = f"is reached by {profile.device}" if profile.device != "local" else f"runs on {profile.provider}"
    return f"{how}, which an artifact may not decide: give --device PROFILE"


def measured_on(read: Artifact, devices: Sequence[str | Profile], trust: Sequence[str] = ()) -> tuple[Profile, ...]:
    """The artifact's devices, by the user's own profiles where these are given; what its files compute stays its own.

    Raises UserError for a device that an artifact may not decide, and for one that it is not for.
    """
    given = {one.name: one for one in (load.profile(one) if isinstance(one, str) else one for one in devices)}
    known = {profile.name: profile for profile in read.manifest.profiles}
    if strange := sorted(given.keys() - known.keys()):
        raise UserError(f"{read.folder} is for {', '.join(known)}, not for {strange[0]}: `verify` tries another device")
    found: list[Profile] = []
    for name, profile in known.items():
        if name in given:
            found.append(resolve_local(given[name]).model_copy(update={"numeric": profile.numeric}))
        elif harmless(profile) or _trusted(profile.device, trust):
            found.append(profile)
        else:
            raise UserError(f"{name} {refusal(profile)}")
    return tuple(found)


@dataclass(frozen=True)
class Subject:
    """What an artifact names and never imports."""

    builder: Builder
    task: Task


def subject(read: Artifact, model: Builder | nn.Module | None, task: Task | None, trust: Sequence[str]) -> Subject:
    """Builder and task of an artifact: given, installed, or of a trusted package. Raises UserError otherwise."""
    data = task_of(read, task, trust)
    manifest = read.manifest
    job = _job(read)
    network = make_builder(
        manifest.builder,
        manifest.input,
        job.model.options if job else {},
        given=model,
        trusted=_trusted(manifest.builder, trust),
    )
    artifact.check_policy(read.policy, network.sites())
    return Subject(network, data)


def task_of(read: Artifact, given: Task | None, trust: Sequence[str]) -> Task:
    """The task of an artifact: given, installed, or of a trusted package. Raises UserError otherwise."""
    name, job = read.manifest.task, _job(read)
    if given is not None:
        return registry.genuine("task", name, given)
    return make_task(name, job.data if job else {}, trusted=_trusted(name, trust))


def _job(read: Artifact) -> Job | None:
    manifest = read.manifest
    return reader.fill(manifest.job, Job, f"{read.folder}: manifest.json, job") if manifest.job else None


def _trusted(name: str, trust: Sequence[str]) -> bool:
    return ":" in name and name.partition(":")[0].partition(".")[0] in trust


def _work(read: Artifact, made: Subject, parent: nn.Module) -> Work:
    policy = read.policy
    names = [rule.op for rule in policy.policy.rules]
    names += [receipt.op for receipts in (policy.receipts, *policy.numeric.values()) for receipt in receipts]
    manifest = read.manifest
    if manifest.exporter not in ("torchscript", "dynamo"):
        raise UserError(f"{read.folder}: unknown exporter {manifest.exporter!r}")
    return Work(
        builder=made.builder,
        task=made.task,
        ops=make_ops(tuple(dict.fromkeys(names))),
        parent=parent,
        profiles=manifest.profiles,
        epochs=manifest.epochs or 1.0,
        exporter=manifest.exporter,
    )


@dataclass(frozen=True)
class Rebuilt:
    """An artifact's files made again from its receipts and weights."""

    files: dict[str, bytes]
    equal: bool  # byte for byte
    error: float  # largest relative difference of outputs where not


def _reproduce(read: Artifact, made: Subject, out: Path | None) -> Applied:
    found = rebuild(read, made)
    if found.error > TOLERANCE:
        raise LimitError(
            f"{read.folder}: the file made again differs by a relative error of {found.error:.2g} (at most {TOLERANCE})"
        )
    if out is not None:
        artifact.write(
            out,
            model=found.files[artifact.MODEL],
            variants={name: data for name, data in found.files.items() if name != artifact.MODEL},
            beside={artifact.CHECK: evidence.pair(read.manifest.input, found.files), **_samples(read)},
            weights=(read.folder / artifact.WEIGHTS).read_bytes(),
            policy=read.policy,
            manifest=read.manifest.model_copy(update={"versions": artifact.versions()}),
        )
    return Applied(folder=str(out or ""), reproduced=True, byte_equal=found.equal, error=found.error)


def _samples(read: Artifact) -> dict[str, bytes]:
    """The runs of the certificate that goes along."""
    kept = artifact.SAMPLES in read.manifest.files
    return {artifact.SAMPLES: (read.folder / artifact.SAMPLES).read_bytes()} if kept else {}


def rebuild(read: Artifact, made: Subject) -> Rebuilt:
    """The files again, and how they differ from those that shipped. Raises UserError where they cannot be made."""
    work = _work(read, made, nn.Identity())
    policy, manifest = read.policy, read.manifest
    try:
        module = reshape(work.builder, work.ops, policy.arch, policy.receipts)
    except TrialFailure as failure:
        raise UserError(f"{read.folder}: {failure}") from failure
    memory.check(memory.FILE * (size := memory.module_bytes(module)), f"a network of {size / 1e9:.1f} GB", UserError)
    try:
        fill(module.eval(), read.weights())
    except RuntimeError as error:
        raise UserError(
            f"{read.folder}: weights do not fit the policy: {' '.join(str(error).split())[:200]}"
        ) from error
    files: dict[str, bytes] = {}
    equal, error = True, 0.0
    for variant, receipts in policy.numeric.items():
        profile = next((p for p in work.profiles if p.numeric.variant == variant), None)
        if profile is None:
            raise UserError(f"{read.folder}: no profile of the manifest uses variant {variant!r}")
        name = manifest.models[profile.name]
        files[name] = rerelease(work, module, receipts).model
        shipped = onnxfile.load(read.folder / name)
        if files[name] != shipped:
            equal = False
            error = max(error, _difference(made.task, shipped, files[name]))
    return Rebuilt(files, equal, error)


def _difference(task: Task, shipped: bytes, made: bytes) -> float:
    """Largest relative difference of two files' outputs on calibration data."""
    batch, _ = next(iter(task.batches("calibration", 64, limit=64)))
    inputs = tuple(one.numpy() for one in several(batch))
    answers = [several(export.predictor(model)(inputs)) for model in (shipped, made)]
    return max(evidence.differ(one, two) for one, two in zip(*answers, strict=True))


def _renew(
    read: Artifact, made: Subject, weights: Path, out: Path, max_drop: float | None, say: Callable[[str], None]
) -> Applied:
    policy, manifest = read.policy, read.manifest
    asked = _asked(read, max_drop)
    parent = load_parent(made.builder.build({}), weights)
    work = replace(_work(read, made, parent), bf16=bf16_faster(parent, made.task))
    candidate = Candidate(arch=policy.arch, policy=policy.policy)
    seed = trial_seed(manifest.seed, manifest.number)
    torch.manual_seed(seed)
    try:
        say("deciding again on the new weights")
        shaped = shape(work, candidate)
        say(f"fine-tuning for {work.epochs:g} epochs")
        run_through(training(work, shaped, candidate.policy, seed), torch.get_num_threads())
        settled = shaped.settle(work)
        releases = release(work, settled.module, candidate.policy, learned=settled.ranges())
        say("measuring")
        with tempfile.TemporaryDirectory() as folder:
            before, proof, hosts, points = _judge(work, read, releases, Path(folder), asked)
    except TrialFailure as failure:
        raise LimitError(f"{read.folder}: {failure}") from failure
    _write(out, work, read, shaped.receipts, settled, releases, before, proof, hosts, points)
    lost = [before.selection.value.value - q.value.value for q in proof.quality.values()] if before.selection else []
    applied = Applied(
        folder=str(out), reproduced=False, quality=proof.quality, drop=max(lost, default=None), certificate=proof
    )
    if not proof.certified:
        raise LimitError(f"{applied}\na limit does not hold: {proof.reason}")
    return applied


def _judge(
    work: Work, read: Artifact, releases: Mapping[str, Release], folder: Path, asked: QualityLimit
) -> tuple[artifact.BaselineFigures, certify.Certificate, dict[str, Any], tuple[Point, ...]]:
    """Measure the new files alone, beside the new weights' own baseline, and hold them against the limits.

    Returns the devices' fingerprints too, and what moved thresholds trade.
    """
    key, _ = export_baseline(work, folder, (work.exporter,))
    path = folder / "model.onnx"
    baseline = onnxfile.load(path)
    predict = export.predictor(baseline)
    selection = work.task.quality(predict, "selection")
    goal = read.manifest.goal
    variant = {profile.name: profile.numeric.variant for profile in work.profiles}
    station = Station(work.profiles, plan_cores(work.profiles), path, baseline_key=key)
    try:
        hosts = {profile.name: station.fingerprint(profile.name) for profile in work.profiles}
        answered: dict[str, tuple[Quality, certify.Checked]] = {}
        for profile in work.profiles:
            name, model = profile.name, releases[variant[profile.name]].model
            with station.predictor(name, model) as answers:
                answered[name] = evidence.quality(work.task, model, profile, there=hosts[name], predict=answers)
        proof = certify.certify(
            lambda profile: station.session(profile, releases[variant[profile]].timed),
            goal,
            quality={name: quality for name, (quality, _) in answered.items()},
            size_mb={name: releases[one].size_mb for name, one in variant.items()},
            limit=floor(asked, selection.value.value),
            sessions=_sessions(read),
            checked={name: checked for name, (_, checked) in answered.items()},
        )
        readings = {profile.name: station.measure(profile.name, path, key) for profile in work.profiles}
        own = [name for name in variant if read.manifest.models.get(name) == artifact.MODEL]
        shipped = releases[variant[own[0]]]
        points = tradeoff.measured(shipped.model, shipped.receipts, work.task, own, station.measure)
    finally:
        station.close()
    macs, parameters = thop_count(work.parent, examples(work.task.input))
    before = artifact.BaselineFigures(
        sha256=hashlib.sha256(baseline).hexdigest(),
        selection=selection,
        test=work.task.quality(predict, "test"),
        readings=readings,
        size_mb=len(baseline) / 1e6,
        macs=macs,
        parameters=parameters,
    )
    return before, proof, {short(host): host for host in hosts.values()}, points


def _sessions(read: Artifact) -> int:
    """As many as the artifact's own certificate took."""
    return min(max(read.manifest.certificate.sessions.values(), default=certify.SESSIONS), 100)


def _asked(read: Artifact, max_drop: float | None) -> QualityLimit:
    if max_drop is not None:
        return reader.fill({"max_drop": max_drop}, QualityLimit, "apply")
    try:
        return Job.model_validate(read.manifest.job).quality
    except ValueError as error:
        raise UserError(
            f"{read.folder}: the manifest holds no job to take the quality limit from; give --max-drop"
        ) from error


def _write(
    out: Path,
    work: Work,
    read: Artifact,
    structure: Sequence[Receipt],
    settled: Settled,
    releases: Mapping[str, Release],
    before: artifact.BaselineFigures,
    proof: certify.Certificate,
    hosts: Mapping[str, Any],
    points: tuple[Point, ...],
) -> None:
    old = read.manifest
    macs, parameters = thop_count(settled.module, examples(work.task.input))
    variant = {profile.name: profile.numeric.variant for profile in work.profiles}
    names = {variant[profile]: name for profile, name in old.models.items()}
    artifact.write(
        out,
        model=releases[next(v for v, name in names.items() if name == artifact.MODEL)].model,
        variants={name: releases[v].model for v, name in names.items() if name != artifact.MODEL},
        beside={
            artifact.CHECK: evidence.pair(
                old.input, {names[v]: one.model for v, one in releases.items() if v in names}
            ),
            **({artifact.SAMPLES: runs} if (runs := evidence.samples(proof)) else {}),
        },
        weights=weights_of(settled.module),
        policy=read.policy.model_copy(
            update={"receipts": (*structure, *settled.learned), "numeric": {v: releases[v].receipts for v in names}}
        ),
        manifest=old.model_copy(
            update={
                "certificate": proof,
                "selection": proof.quality,
                "test": qualities(work, releases, "test"),
                "size_mb": proof.size_mb,
                "macs": macs,
                "parameters": parameters,
                "baseline": before,
                "versions": artifact.versions(),
                "fingerprints": dict(hosts),
                "thresholds": points,
            }
        ),
    )
