"""Check an artifact again: hashes, answers, latency on the device, quality, budgets (floor F5). For pipelines.

What is measured now is judged, by the rules of the certificate; what the certificate says is shown beside it. Nothing
that the artifact names is imported or reached unless the user says so.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import computed_field
from torch import nn

from autocompress import artifact, certify, evidence, load, onnxfile, reuse
from autocompress.artifact import Artifact
from autocompress.certify import SESSIONS, Certificate, Checked
from autocompress.devices import host_of
from autocompress.devices.cores import plan_cores
from autocompress.devices.fingerprint import check_expects, host, resolve_local, short
from autocompress.devices.station import Station
from autocompress.devices.statistics import SLOW
from autocompress.models import Builder
from autocompress.pipeline import timed
from autocompress.summary import DRIFT
from autocompress.tasks import Task
from autocompress.types import Budget, Goal, Limit, Profile, Quality, Reading, Record, TrialFailure, UserError

TOLERANCE = reuse.TOLERANCE
ELSEWHERE = 0.1
"""Relative difference of answers that another processor or runtime may give: 8-bit products saturate on some, and what
rounds the other way once is carried on. Whether that matters is for the quality to say."""
HARDWARE = ("processor", "machine", "flags")
UP = 5  # folders above an artifact in which OUT/baseline is looked for

Status = Literal["ok", "failed", "skipped"]


class Check(Record):
    """One thing that was looked at; `says` is one line."""

    name: str  # files, samples, parity, rebuilt, device, baseline, latency, quality, or a budget's name
    status: Status
    says: str
    device: str = ""

    @property
    def about(self) -> str:
        """`local-1t: 0.043 ms ...`."""
        return f"{self.device}: {self.says}" if self.device else self.says

    def __str__(self) -> str:
        """`ok      latency    local-1t: 0.043 ms ...`."""
        return f"{self.status:<8}{self.name:<11}{self.about}"


class Verified(Record):
    """What `verify` found; `certificate` by device holds the new readings."""

    folder: str
    checks: tuple[Check, ...]
    certificates: dict[str, Certificate] = {}
    fingerprints: dict[str, dict[str, Any]] = {}

    @computed_field
    @property
    def passed(self) -> bool:
        """Whether nothing failed. What was skipped is no failure."""
        return all(check.status != "failed" for check in self.checks)

    @property
    def verdict(self) -> str:
        """One line."""
        failed = sum(check.status == "failed" for check in self.checks)
        skipped = sum(check.status == "skipped" for check in self.checks)
        left = f", {skipped} skipped" if skipped else ""
        if failed:
            return f"{self.folder}: {failed} of {len(self.checks)} checks failed{left}"
        return f"{self.folder}: verified, {len(self.checks) - skipped} checks{left}"


def verify(
    source: Path | str,
    *,
    devices: Sequence[str | Profile] = (),
    baseline: Path | str | None = None,
    quality: bool = True,
    model: Builder | nn.Module | None = None,
    task: Task | None = None,
    trust: Sequence[str] = (),
    sessions: int = SESSIONS,
    as_is: bool = False,
    say: Callable[[Check], None] = lambda _: None,
) -> Verified:
    """Check an artifact; every check is said as it ends.

    `devices` are profiles (by name or file) to measure on, all of the artifact's if empty; `baseline` the uncompressed
    file, which is found by itself in the folder of a search. Builder and task as in `reuse.apply`: without them the
    file's answers are compared with those stored beside it alone. `as_is` measures on a device that is not the one its
    profile was made for, too. Raises UserError where there is no artifact, or for a
    device that it says nothing of.
    """
    folder = Path(source)
    trust = (trust,) if isinstance(trust, str) else tuple(trust)
    if not (folder / artifact.MANIFEST).exists():
        raise UserError(f"{folder}: holds no {artifact.MANIFEST}; an artifact is a folder such as OUT/best/DEVICE")
    found: list[Check] = []

    def tell(check: Check) -> None:
        found.append(check)
        say(check)

    read = _files(folder, trust, tell)
    if read is None:
        return Verified(folder=str(folder), checks=tuple(found))
    run = _Run(read, trust, model, task, sessions, tell)
    targets = run.targets(devices)
    run.samples()
    run.answers()
    run.rebuilt()
    run.find_baseline(None if baseline is None else Path(baseline))
    for target in targets:
        profile = target.profile.model_copy(update={"as_is": True}) if as_is else target.profile
        run.device(replace(target, profile=profile), quality)
    return Verified(
        folder=str(folder), checks=tuple(found), certificates=run.certificates, fingerprints=run.fingerprints
    )


def _files(folder: Path, trust: Sequence[str], tell: Callable[[Check], None]) -> Artifact | None:
    """The artifact, if it is whole: a changed file is never run."""
    try:
        manifest = artifact.read_manifest(folder)
        bad = list(artifact.problems(folder, manifest))
        for problem in bad:
            tell(Check(name="files", status="failed", says=problem))
        if bad:
            return None
        read = artifact.read(folder, trust=trust)
    except UserError as error:
        tell(Check(name="files", status="failed", says=str(error)))
        return None
    tell(Check(name="files", status="ok", says=f"{len(manifest.files)} files are what the manifest says"))
    return read


@dataclass(frozen=True)
class _Target:
    """A device to measure on."""

    profile: Profile
    file: str
    budget: Budget


@dataclass
class _Run:
    """An artifact that is whole, being checked."""

    read: Artifact
    trust: tuple[str, ...]
    model: Builder | nn.Module | None
    task: Task | None
    sessions: int
    tell: Callable[[Check], None]
    baseline: Path | None = None
    certificates: dict[str, Certificate] = field(default_factory=dict)
    fingerprints: dict[str, dict[str, Any]] = field(default_factory=dict)
    known: dict[tuple[str, ...], tuple[Quality, Checked]] = field(default_factory=dict)

    def targets(self, devices: Sequence[str | Profile]) -> list[_Target]:
        """Devices to measure on: those asked for, else the artifact's own as far as they are this host."""
        manifest = self.read.manifest
        own = {profile.name: profile for profile in manifest.profiles}
        found: list[_Target] = []
        for asked in devices:
            profile = asked if isinstance(asked, Profile) else self.profile(asked, own)
            budget = load.within(self.budget(profile.name), profile)
            found.append(_Target(resolve_local(profile), self.file(profile), budget))
        if devices:
            return found
        for budget in manifest.goal.budgets:
            profile = own.get(budget.profile)
            if profile is None:
                self.fail("device", budget.profile, "the manifest says nothing of it; name a profile by --device")
            elif not reuse.harmless(profile):
                self.fail("device", profile.name, reuse.refusal(profile))
            else:
                found.append(_Target(profile, manifest.models[profile.name], budget))
        return found

    def profile(self, name: str, own: dict[str, Profile]) -> Profile:
        """The user's own profile of that name or file; else the artifact's, where that is harmless."""
        try:
            return load.profile(name)
        except UserError:
            if name in own and reuse.harmless(own[name]):
                return own[name]
            raise

    def file(self, profile: Profile) -> str:
        """The model that serves a profile: its own, or one of the same numeric settings."""
        manifest = self.read.manifest
        if profile.name in manifest.models:
            return manifest.models[profile.name]
        variant = resolve_local(profile).numeric.variant
        for one in manifest.profiles:
            if one.numeric.variant == variant:
                return manifest.models[one.name]
        have = ", ".join(dict.fromkeys(one.numeric.variant for one in manifest.profiles)) or "none"
        raise UserError(
            f"{self.read.folder}: no file for {profile.name}, which computes as {variant} (here: {have}); "
            f"`autocompress measure OUT --profile {profile.name}` makes one"
        )

    def budget(self, name: str) -> Budget:
        budgets = self.read.manifest.goal.budgets
        for budget in budgets:
            if budget.profile == name:
                return budget
        if len(budgets) == 1:  # another device under the same bounds
            return budgets[0].model_copy(update={"profile": name})
        raise UserError(
            f"{self.read.folder}: states no budget for {name!r}, only for {', '.join(b.profile for b in budgets)}"
        )

    def fail(self, name: str, device: str, says: str) -> None:
        self.tell(Check(name=name, status="failed", says=says, device=device))

    def same_runtime(self) -> str:
        """Empty where answers should be the very ones that were stored; else what is another, in a few words."""
        manifest, here = self.read.manifest, host()
        then, now = (versions.get("onnxruntime", "") for versions in (manifest.versions, artifact.versions()))
        if then != now:
            return f"onnxruntime {then or 'unknown'} then, {now} now"
        prints = manifest.fingerprints.values()
        if not any(all(facts.get(key) == here[key] for key in HARDWARE) for facts in prints):
            return "another processor than any that it was certified on"
        return ""

    def samples(self) -> None:
        """Whether the certificate's figures are those of the single runs that lie beside the models."""
        manifest = self.read.manifest
        if artifact.SAMPLES not in manifest.files:
            says = f"no {artifact.SAMPLES} with the certificate's single runs"
            self.tell(Check(name="samples", status="skipped", says=says))
            return
        try:
            total, wrong = evidence.follows((self.read.folder / artifact.SAMPLES).read_bytes(), manifest.certificate)
        except UserError as error:
            self.tell(Check(name="samples", status="failed", says=str(error)))
            return
        says = wrong or f"the certificate's figures follow from its {total} runs"
        self.tell(Check(name="samples", status="failed" if wrong else "ok", says=says))

    def answers(self) -> None:
        """Parity with the answers that lie beside the models."""
        manifest, path = self.read.manifest, self.read.folder / artifact.CHECK
        if artifact.CHECK not in manifest.files:
            says = f"no {artifact.CHECK} with stored answers: written by an earlier version"
            self.tell(Check(name="parity", status="skipped", says=says))
            return
        other = self.same_runtime()
        limit = ELSEWHERE if other else TOLERANCE
        for name in dict.fromkeys([artifact.MODEL, *manifest.models.values()]):
            try:
                model = onnxfile.load(self.read.folder / name)
                error = evidence.disagreement(path.read_bytes(), manifest.input, name, model)
            except (UserError, TrialFailure) as failure:
                self.tell(Check(name="parity", status="failed", says=f"{name}: {failure}"))
                continue
            how = "the stored answers exactly" if error == 0 else f"the stored answers within {error:.1e} (relative)"
            status: Status = "ok" if error <= limit else "failed"
            says = f"{name} gives {how}{f'; {other}' if other else ''}"
            says += f"; at most {limit:g} is allowed" if error > limit else ""
            self.tell(Check(name="parity", status=status, says=says))

    def rebuilt(self) -> None:
        """Parity with the file that receipts and weights make again; skipped where builder or data are not here."""
        try:
            made = reuse.subject(self.read, self.model, self.task, self.trust)
        except UserError as error:
            self.tell(Check(name="rebuilt", status="skipped", says=f"not made again from its receipts: {error}"))
            return
        self.task = made.task
        try:
            again = reuse.rebuild(self.read, made)
        except (UserError, TrialFailure) as error:
            self.tell(Check(name="rebuilt", status="failed", says=str(error)))
            return
        how = "byte for byte" if again.equal else f"within {again.error:.1e} (relative)"
        if again.error > TOLERANCE:
            says = f"the file made again from its receipts differs: {how}, at most {TOLERANCE:g} is allowed"
            self.tell(Check(name="rebuilt", status="failed", says=says))
            return
        self.tell(Check(name="rebuilt", status="ok", says=f"receipts and weights make the same file, {how}"))

    def find_baseline(self, given: Path | None) -> None:
        """The uncompressed file: given, or OUT/baseline above the artifact; known by its hash."""
        above = list(self.read.folder.absolute().parents)[:UP]
        places = [given] if given else [place / "baseline" / "model.onnx" for place in above]
        path = next((place for place in places if place.is_file()), None)
        sha = self.read.manifest.baseline.sha256
        if path is None:
            says = f"{given}: not there" if given else "not beside the artifact (OUT/baseline): give --baseline FILE"
            says += "; milliseconds alone are measured, no speedup"
            self.tell(Check(name="baseline", status="failed" if given else "skipped", says=says))
            return
        try:
            found = hashlib.sha256(onnxfile.load(path)).hexdigest()
        except UserError as error:
            self.tell(Check(name="baseline", status="failed", says=str(error)))
            return
        if sha and found != sha:
            says = f"{path}: is not the file that the certificate was measured against; no speedup is measured"
            self.tell(Check(name="baseline", status="failed", says=says))
            return
        self.baseline = path
        how = "the certificate's, by its hash" if sha else "taken as it is: the manifest holds no hash of it"
        self.tell(Check(name="baseline", status="ok" if sha else "skipped", says=f"{path}: {how}"))

    def device(self, target: _Target, with_quality: bool) -> None:
        """Measure on one device, and judge."""
        name, manifest = target.profile.name, self.read.manifest
        path = self.read.folder / target.file
        try:
            if target.profile.device == "local":
                check_expects(target.profile, host())
            station = Station([target.profile], plan_cores([target.profile]), self.baseline or path)
        except (UserError, TrialFailure) as error:
            self.fail("device", name, str(error))
            return
        try:
            try:
                there = station.fingerprint(name)
            except (UserError, TrialFailure) as error:  # another device than the profile's, or it does not answer
                self.fail("device", name, str(error))
                return
            self.fingerprints[short(there)] = there
            self.tell(Check(name="device", status="ok", says=self.compared(name, there), device=name))
            quality, checked = dict[str, Quality](), dict[str, Checked]()
            if with_quality and (found := self.quality(target, station, there)):
                quality[name], checked[name] = found
            budget = target.budget if self.baseline else target.budget.model_copy(update={"speedup": None})
            size = sum(map(len, onnxfile.files(target.file, onnxfile.load(path)).values())) / 1e6
            data = onnxfile.load(path)
            fed = data if self.task is None else timed(self.task, data)
            model = path if fed is data else fed
            proof = certify.certify(
                lambda profile: station.session(profile, model),
                Goal(name=name, budgets=(budget,)),
                quality=quality,
                size_mb={name: size},
                limit=Limit(metric=quality[name].metric if quality else "quality", floor=manifest.certificate.floor),
                sessions=self.sessions,
                checked=checked,
            )
        except (UserError, TrialFailure) as error:
            self.fail("latency", name, str(error))
            return
        finally:
            station.close()
        self.certificates[name] = proof
        reading = proof.readings[name]
        self.tell(
            Check(name="latency", status="failed" if reading.noisy else "ok", says=self.timed(name, proof), device=name)
        )
        for bound in proof.bounds:
            status: Status = "ok" if bound.met else "failed"
            self.tell(Check(name=bound.name, status=status, says=said(bound), device=name))
        if target.budget.speedup is not None and not self.baseline:
            self.fail("speedup", name, f"the {target.budget.speedup:g}x asked cannot be judged without the baseline")

    def compared(self, name: str, there: dict[str, Any]) -> str:
        """This device and the one of the certificate."""
        certified = self.read.manifest.certificate.readings.get(name)
        then = self.read.manifest.fingerprints.get(certified.fingerprint) if certified else None
        here = str(there.get("processor", "unknown processor"))
        if then is None:
            return f"{here}; the certificate holds no facts of its device" if certified else f"{here}, not certified on"
        changed = [key for key in sorted({*then, *there}) if then.get(key) != there.get(key)]
        if not changed:
            return f"{here}, the certificate's own"
        if any(key in HARDWARE for key in changed):
            was = str(then.get("processor", "unknown processor"))
            more = "" if was != here else f" with other {', '.join(key for key in changed if key in HARDWARE)}"
            return f"{here}{more}, another processor than the certificate's {was}: judged by what is measured here"
        told = ", ".join(f"{key} {then.get(key)} -> {there.get(key)}" for key in changed)
        return f"{here}, the certificate's own but for {told}"

    def timed(self, name: str, proof: Certificate) -> str:
        """What was measured, beside what the certificate says."""
        reading = proof.readings[name]
        parts = [times(reading, self.baseline is not None), f"{proof.sessions[name]} sessions, {reading.samples} runs"]
        if (old := self.read.manifest.certificate.readings.get(name)) is not None:
            was = f"certified {old.ms.value:.3f} ms"
            parts.append(f"{was}, {old.speedup:.2f}x" if self.baseline else was)
        if abs(reading.drift) > DRIFT:
            parts.append(f"times drifted by {reading.drift:+.1%} in a session")
        if reading.slowed > SLOW:
            parts.append(f"the device was {reading.slowed:.0%} slower than at its fastest in a session")
        if reading.as_is:
            parts.append("on another device than the profile was made for")
        if reading.noisy:
            parts.append("all sessions noisy: not to be relied on")
        return "; ".join(parts)

    def quality(self, target: _Target, station: Station, there: dict[str, Any]) -> tuple[Quality, Checked] | None:
        """Quality of a device's file, and whether it holds the certificate's floor."""
        name, floor = target.profile.name, self.read.manifest.certificate.floor
        provider = (target.profile.provider, str(target.profile.provider_options))
        key = (target.file, host_of(target.profile), target.profile.device, *provider)
        try:
            task = self.task = self.task or reuse.task_of(self.read, None, self.trust)
            if key not in self.known:
                model = onnxfile.load(self.read.folder / target.file)
                with station.predictor(name, model) as predict:
                    self.known[key] = evidence.quality(task, model, target.profile, there=there, predict=predict)
        except (UserError, TrialFailure) as error:
            self.fail("quality", name, f"cannot be measured: {error} (--no-quality leaves it out)")
            return None
        found, checked = self.known[key]
        value = found.value
        held = value.value >= floor and not math.isnan(value.value)
        where = f"on {checked.processor}" + ("" if checked.on_device else ", since the device itself only times files")
        old = self.read.manifest.certificate.quality.get(name)
        was = f"; certified {old.value.value:.4f}" if old else ""
        count = f"{found.samples} samples{'' if found.samples >= certify.SAMPLES else ' (all of the split)'}"
        says = (
            f"{found.metric} {value.value:.4f} [{value.low:.4f}, {value.high:.4f}], {count} {where}; "
            f"{'holds' if held else 'is below'} the floor {floor:.4f}{was}"
        )
        self.tell(Check(name="quality", status="ok" if held else "failed", says=says, device=name))
        return found, checked


def times(reading: Reading, compared: bool = True) -> str:
    """`0.043 ms [0.042, 0.044], p95 0.057 ms [0.051, 0.060], 3.10x the baseline (3.01 to 3.19)`."""
    parts = list(_times(reading, compared))
    return ", ".join(parts)


def _times(reading: Reading, compared: bool) -> Iterator[str]:
    ms, p95, ratio = reading.ms, reading.p95_ms, reading.ratio
    of = f" (mean of {reading.inputs} inputs)" if reading.inputs else ""
    yield f"{ms.value:.3f} ms [{ms.low:.3f}, {ms.high:.3f}]{of}"
    yield f"p95 {p95.value:.3f} ms [{p95.low:.3f}, {p95.high:.3f}]"
    if compared:
        yield f"{reading.speedup:.2f}x the baseline ({1 / ratio.high:.2f} to {1 / ratio.low:.2f})"
    if reading.batch > 1:
        yield f"{reading.throughput.value:.4g} samples/s"
    if reading.memory_mb is not None:
        yield f"memory {reading.memory_mb:.3g} MB"


def said(bound: certify.Bound) -> str:
    """`3.01x (lower bound), 3x asked: holds`."""
    end = "lower" if bound.name in certify.MORE else "upper"
    unit = {"speedup": "x", "throughput": " samples/s"}.get(bound.name, f" {bound.name.rpartition('_')[2]}")
    unit = unit.replace(" mb", " MB")
    verdict = "holds" if bound.met else "does not hold"
    if bound.bound is None:
        return f"not known, {bound.budget:g}{unit} asked: {verdict}"
    return f"{bound.bound:.4g}{unit} ({end} bound), {bound.budget:g}{unit} asked: {verdict}"
