"""summary.json and front.csv: what a search found, machine-readable.

Conventions: drops and shares are fractions (0.005 is half a point), `speedup` and `size_ratio` are baseline over model,
times stand in the unit that the key ends with. Built from records alone; nothing is computed that was not measured.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from autocompress import pareto, ranks, space, surrogate
from autocompress.certify import Certificate
from autocompress.devices.statistics import SLOW
from autocompress.types import (
    Budget,
    Candidate,
    Facts,
    Genotype,
    Goal,
    Interval,
    Limit,
    Point,
    Quality,
    Reading,
    Record,
    Space,
    Stage,
    State,
    Trial,
    UserError,
)
from autocompress.wording import describe, times

RunState = Literal["finished", "interrupted", "running"]
DRIFT = 0.02  # of the baseline during a measurement: above it the reader is told
CSV_COLUMNS = (
    "number", "state", "attempt", "device", "front", "fidelity", "quality", "quality_low", "quality_high", "drop",
    "ms", "ms_low", "ms_high", "p95_ms", "p95_low", "p95_high", "ratio", "ratio_low", "ratio_high", "speedup",
    "throughput", "memory_mb", "load_ms", "energy_mj", "drift", "slowed", "size_mb", "macs", "parameters",
    "budget_met", "genotype", "policy",
)  # fmt: skip


class Finding(Record):
    """What the search hands in per goal: the finalist that was certified, or the closest one."""

    goal: str
    number: int
    candidate: Candidate
    certificate: Certificate
    test: dict[str, Quality] = {}  # per profile, read once
    lost: dict[str, Interval] = {}  # of that, sample by sample, where the task tells how each fares
    macs: int = 0
    parameters: int = 0
    path: str = ""  # of the artifact, relative to OUT
    stages: tuple[Stage, ...] = ()
    fused: dict[str, int] = {}  # nodes that onnxruntime's optimizer makes (positive) of those that go (negative)
    thresholds: tuple[Point, ...] = ()  # of a file that decides by its input
    spread: dict[str, tuple[float, ...]] = {}  # per profile the median milliseconds of each of its inputs
    tried: tuple[int, ...] = ()  # numbers of the finalists measured again, in order


class Arm(Record):
    """A control arm: the same evaluation without a search. `ran` False is shown as missing, never left out."""

    name: str
    ran: bool = False
    why: str = ""  # why it was not run, or what went wrong
    selection: dict[str, Quality] = {}
    test: dict[str, Quality] = {}
    lost: dict[str, Interval] = {}  # on the test split, sample by sample
    readings: dict[str, Reading] = {}
    size_mb: dict[str, float] = {}
    macs: int = 0
    parameters: int = 0


class Figures(Record):
    """One file on one device, against the baseline on the same device."""

    ms: Interval
    p95_ms: Interval
    p99_ms: Interval | None = None
    p50_ms: Interval | None = None
    worst_ms: float | None = None
    inputs: int = 0  # real samples that it was timed with; then `ms` is their mean
    baseline_ms: Interval
    speedup: Interval
    samples: int
    size_mb: float | None = None
    size_ratio: float | None = None
    selection: Quality | None = None
    test: Quality | None = None
    drop_selection: Interval | None = None
    drop_test: Interval | None = None
    budget_met: bool | None = None  # by the upper bound; None where no budget is stated
    fingerprint: str = ""
    batch: int = 1
    throughput: Interval | None = None  # samples per second at that batch
    memory_mb: float | None = None  # peak of a process that runs the file; None where the device does not tell
    load_ms: float = 0.0
    energy_mj: float | None = None
    drift: float = 0.0  # of the baseline while it was measured, as a share
    slowed: float = 0.0  # the baseline's, against its fastest there, as a share


class Winner(Record):
    """The best found for one goal. `speedup`, `drop` and `size_ratio` are the worst over its devices."""

    goal: str
    number: int
    candidate: Candidate
    policy: str  # in a few words
    certified: bool
    reason: str = ""
    budget_met: bool
    quality_held: bool
    speedup: float
    drop: float | None = None  # on the test split where it was read, else on the selection split
    size_ratio: float | None = None
    macs: int = 0
    parameters: int = 0
    devices: dict[str, Figures] = {}
    tried: tuple[int, ...] = ()
    fused: dict[str, int] = {}
    stages: tuple[Stage, ...] = ()  # quality on the selection split on the way from the parent to the file
    thresholds: tuple[Point, ...] = ()  # of a file that decides by its input: what moving them trades
    spread: dict[str, tuple[float, ...]] = {}  # per profile the median milliseconds of each input it was timed with
    path: str = ""


class Control(Record):
    """A control arm with its figures."""

    name: str
    ran: bool
    why: str = ""
    devices: dict[str, Figures] = {}
    macs: int = 0
    parameters: int = 0


class Baseline(Record):
    """The uncompressed file."""

    selection: Quality | None = None
    test: Quality | None = None
    devices: dict[str, Figures] = {}
    size_mb: float = 0.0
    macs: int = 0
    parameters: int = 0


class Failure(Record):
    """Trials that ended for the same reason."""

    state: str
    reason: str
    count: int
    trials: tuple[int, ...]  # the first few


class Summary(Record):
    """summary.json."""

    format: Literal[1] = 1
    state: RunState
    task: str = ""
    builder: str = ""
    space: str = ""
    searcher: str = ""
    seed: int = 0
    goals: tuple[Goal, ...] = ()
    limit: Limit
    minutes: float = 0.0
    trials: int = 0
    counts: dict[str, int] = {}
    baseline: Baseline
    winners: dict[str, Winner] = {}
    closest: dict[str, Winner] = {}  # goals that no candidate met: what came nearest, uncertified
    controls: dict[str, Control] = {}
    failures: tuple[Failure, ...] = ()
    problems: tuple[str, ...] = ()  # what could not be made at the end, and why
    seconds: dict[str, float] = {}  # work time by stage, summed over workers
    latency_model: dict[str, surrogate.Error] = {}  # by device: predictions held against readings not fitted to
    rungs: tuple[ranks.Agreement, ...] = ()  # how well each rung of training orders the next
    fingerprints: dict[str, dict[str, Any]] = {}
    versions: dict[str, str] = {}
    job: dict[str, Any] = {}


def drop(baseline: Quality | None, found: Quality | None) -> Interval | None:
    """Quality lost, in the metric's unit, with a 95 % interval; None where either is unknown.

    The square-and-add interval of a difference (Newcombe 1998, Statistics in Medicine 17:873, method 10). It takes the
    two qualities as independent, which on the same samples errs to the wide side.
    """
    if baseline is None or found is None:
        return None
    b, c = baseline.value, found.value
    value = b.value - c.value
    low = value - math.hypot(b.value - b.low, c.high - c.value)
    high = value + math.hypot(b.high - b.value, c.value - c.low)
    return Interval(value=value, low=low, high=high)


def figures(
    reading: Reading,
    *,
    budget: Budget | None = None,
    size_mb: float | None = None,
    baseline_size_mb: float | None = None,
    selection: Quality | None = None,
    test: Quality | None = None,
    baseline_selection: Quality | None = None,
    baseline_test: Quality | None = None,
    lost: Interval | None = None,
) -> Figures:
    """A reading and what is known beside it. `lost`: on the test split, where samples could be compared one by one."""
    ratio = reading.ratio
    met = pareto.meets(reading, budget, size_mb) if budget is not None else None
    return Figures(
        ms=reading.ms,
        p95_ms=reading.p95_ms,
        p99_ms=reading.p99_ms,
        p50_ms=reading.p50_ms,
        worst_ms=reading.worst_ms,
        inputs=reading.inputs,
        baseline_ms=reading.baseline_ms,
        speedup=Interval(value=1 / ratio.value, low=1 / ratio.high, high=1 / ratio.low),
        samples=reading.samples,
        size_mb=size_mb,
        size_ratio=baseline_size_mb / size_mb if baseline_size_mb and size_mb else None,
        selection=selection,
        test=test,
        drop_selection=drop(baseline_selection, selection),
        drop_test=lost or drop(baseline_test, test),
        budget_met=all(met.values()) if met else None,
        fingerprint=reading.fingerprint,
        batch=reading.batch,
        throughput=reading.throughput,
        memory_mb=reading.memory_mb,
        load_ms=reading.load_ms,
        energy_mj=reading.energy_mj,
        drift=reading.drift,
        slowed=reading.slowed,
    )


def beside(found: Figures, budget: Budget | None) -> tuple[str, ...]:
    """What a budget asks beside speed and size, and a batch's throughput, in words; what disturbed it, last.

    `p95 0.057 ms (0.051 to 0.060)`, `2310 samples/s (2290 to 2330)`, `12.1 MB of memory`. Of a file that decides by
    its input first what its time depends on: `mean of 64 inputs, p50 0.31, p95 0.57, p99 0.61, worst 0.60 ms`.
    """
    asked = budget or Budget(profile="")
    words: list[str] = []
    if found.inputs and found.p50_ms is not None and found.p99_ms is not None and found.worst_ms is not None:
        tails = f"p50 {found.p50_ms.value:.3f}, p95 {found.p95_ms.value:.3f}, p99 {found.p99_ms.value:.3f}"
        words.append(f"mean of {found.inputs} inputs, {tails}, worst {found.worst_ms:.3f} ms")
    elif asked.p95_ms is not None:
        p95 = found.p95_ms
        words.append(f"p95 {p95.value:.3f} ms ({p95.low:.3f} to {p95.high:.3f})")
    if found.throughput is not None and (asked.throughput is not None or found.batch > 1):
        rate = found.throughput
        words.append(f"{rate.value:.4g} samples/s ({rate.low:.4g} to {rate.high:.4g})")
    if found.memory_mb is not None:
        words.append(f"{found.memory_mb:.3g} MB of memory")
    elif asked.memory_mb is not None:
        words.append("memory unknown")
    if abs(found.drift) > DRIFT:
        words.append(f"the baseline drifted by {found.drift:+.1%}")
    if found.slowed > SLOW:
        words.append(f"the device was {found.slowed:.0%} slower than at its fastest")
    return tuple(words)


def _known(value: float | None) -> float | str:
    return "" if value is None else value


def build(
    *,
    state: RunState,
    space_: Space,
    goals: Sequence[Goal],
    limit: Limit,
    facts: Facts,
    trials: Sequence[Trial],
    findings: Sequence[Finding] = (),
    arms: Sequence[Arm] = (),
    problems: Sequence[str] = (),
    baseline_test: Quality | None = None,
    searcher: str = "",
    seed: int = 0,
    minutes: float = 0.0,
    seconds: Mapping[str, float] | None = None,
    job: Mapping[str, Any] | None = None,
    rungs: Sequence[ranks.Agreement] = (),
) -> Summary:
    """The summary of a run; `seconds` are stages outside the trials (parent, station start, certification).

    Goals without a finding get the closest trial by its search readings. Trial 0 is the control and not counted.
    """
    control = next((trial for trial in trials if trial.number == 0), None)
    searched = [trial for trial in trials if trial.number > 0]
    spent = Counter[str](dict(seconds or {}))
    for trial in searched:
        spent.update(trial.outcome.seconds)
    budgets = {budget.profile: budget for goal in goals for budget in goal.budgets}
    base = _baseline(facts, control, baseline_test)
    knobs = parent_arch(space_)
    reached = {finding.goal: _winner(finding, budgets, facts, baseline_test, knobs) for finding in findings}
    for goal in goals:
        if goal.name not in reached:
            near = pareto.best(searched, goal, limit, 1)
            if near:
                reached[goal.name] = _winner(
                    _uncertified(near[0], goal, limit, space_), budgets, facts, baseline_test, knobs
                )
    good = {name: one for name, one in reached.items() if one.certified or (one.budget_met and one.quality_held)}
    job = dict(job or {})
    model = job.get("model")
    return Summary(
        state=state,
        task=str(job.get("task", "")),
        builder=str(model.get("builder", "")) if isinstance(model, dict) else str(model or ""),
        space=space_.name,
        searcher=searcher,
        seed=seed,
        goals=tuple(goals),
        limit=limit,
        minutes=minutes,
        trials=len(searched),
        counts=counts(searched),
        baseline=base,
        winners=good,
        closest={name: one for name, one in reached.items() if name not in good},
        controls={arm.name: _control(arm, budgets, facts, baseline_test) for arm in _all_arms(arms, searcher)},
        failures=failures(searched),
        problems=tuple(problems),
        seconds={name: round(value, 3) for name, value in sorted(spent.items())},
        latency_model={
            name: error for name in budgets if (error := surrogate.error(surrogate.known(searched, name))) is not None
        },
        rungs=tuple(rungs),
        fingerprints=facts.fingerprints,
        versions=facts.versions,
        job=job,
    )


def counts(trials: Sequence[Trial]) -> dict[str, int]:
    """How many trials stand in each state; every state is named."""
    found = Counter(trial.state.value for trial in trials)
    return {state.value: found.get(state.value, 0) for state in State}


def failures(trials: Sequence[Trial]) -> tuple[Failure, ...]:
    """Failed and infeasible trials grouped by reason, figures in the reason aside; most frequent first."""
    groups: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        if trial.state in (State.FAILED, State.INFEASIBLE):
            pattern = re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "#", trial.outcome.reason)
            groups.setdefault((trial.state.value, pattern), []).append(trial)
    ranked = sorted(groups.items(), key=lambda item: (item[0][0] != "failed", -len(item[1]), item[0]))
    return tuple(
        Failure(
            state=state,
            reason=(those[0].outcome.reason if len(those) == 1 else pattern.replace("#", "…")) or "no reason given",
            count=len(those),
            trials=tuple(trial.number for trial in those[:8]),
        )
        for (state, pattern), those in ranked
    )


def simpler(summary: Summary, goal: str) -> str:
    """The control arm that holds a goal's limits although no candidate does: `int8 alone: 2.06x ...`; else empty.

    By its readings of the search and the selection split: it is not certified.
    """
    budgets = {budget.profile for one in summary.goals if one.name == goal for budget in one.budgets}
    for name, arm in summary.controls.items() if goal in summary.closest else ():
        found = [figures for profile, figures in arm.devices.items() if profile in budgets]
        if len(found) == len(budgets) > 0 and all(
            one.budget_met and one.selection is not None and one.selection.value.value >= summary.limit.floor
            for one in found
        ):
            speeds = min(one.speedup.value for one in found)
            return f"{name} alone, without a search, holds these limits ({times(speeds)}); a longer search may find it"
    return ""


def genotype_hash(genotype: Genotype) -> str:
    """Eight hex digits that name a genotype in a table."""
    return hashlib.sha256(json.dumps(list(genotype)).encode()).hexdigest()[:8]


def parent_arch(space_: Space) -> dict[str, Any]:
    """The parent's own choices of the space's architecture knobs."""
    return {gene.name: gene.choices[0] for gene in space_.genes if gene.kind == "arch"}


def front_csv(space_: Space, goals: Sequence[Goal], limit: Limit, facts: Facts, trials: Sequence[Trial]) -> str:
    """One row per measured trial and device. `front` names the goals on whose front the trial lies."""
    on_front: dict[int, list[str]] = {}
    for goal in goals:
        for trial in pareto.front(trials, goal, limit):
            on_front.setdefault(trial.number, []).append(goal.name)
    budgets = {budget.profile: budget for goal in goals for budget in goal.budgets}
    base = parent_arch(space_)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(CSV_COLUMNS)
    for trial in trials:
        words = describe(space.decode(space_, trial.genotype), base) if trial.outcome.readings else ""
        for profile, reading in trial.outcome.readings.items():
            found = trial.outcome.quality.get(profile)
            lost = drop(facts.baseline_quality, found)
            budget = budgets.get(profile)
            size = trial.outcome.size_mb.get(profile)
            met = all(pareto.meets(reading, budget, size).values()) if budget is not None else ""
            values = (found.value.value, found.value.low, found.value.high) if found is not None else ("", "", "")
            table.writerow([
                trial.number, trial.state.value, trial.attempt, profile, "+".join(on_front.get(trial.number, ())),
                trial.outcome.fidelity, *values, lost.value if lost is not None else "",
                reading.ms.value, reading.ms.low, reading.ms.high,
                reading.p95_ms.value, reading.p95_ms.low, reading.p95_ms.high,
                reading.ratio.value, reading.ratio.low, reading.ratio.high, reading.speedup, reading.throughput.value,
                _known(reading.memory_mb), reading.load_ms, _known(reading.energy_mj), reading.drift, reading.slowed,
                _known(size), trial.outcome.macs, trial.outcome.parameters, met,
                genotype_hash(trial.genotype), words,
            ])  # fmt: skip
    return text.getvalue()


def write(out: Path, summary: Summary, table: str) -> Path:
    """Write OUT/summary.json and OUT/front.csv, each whole or not at all; returns the former's path."""
    _replace(out / "front.csv", table)
    return _replace(out / "summary.json", summary.model_dump_json(indent=1) + "\n")


def read(out: Path) -> Summary | None:
    """OUT/summary.json, or None where the run has not written one. Raises UserError if it is not readable."""
    path = out / "summary.json"
    try:
        return Summary.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{path}: not a summary of this version ({first})") from error


def _replace(path: Path, text: str) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=".", delete=False) as file:
            file.write(text)
        Path(file.name).chmod(0o644)
        Path(file.name).replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    return path


# --- parts of the summary -------------------------------------------------------------------------------------------


def _baseline(facts: Facts, control: Trial | None, test: Quality | None) -> Baseline:
    return Baseline(
        selection=facts.baseline_quality,
        test=test,
        devices={
            profile: figures(
                reading,
                size_mb=facts.baseline_size_mb or None,
                baseline_size_mb=facts.baseline_size_mb or None,
                selection=facts.baseline_quality,
                test=test,
            )
            for profile, reading in facts.baseline.items()
        },
        size_mb=facts.baseline_size_mb,
        macs=control.outcome.macs if control else 0,
        parameters=control.outcome.parameters if control else 0,
    )


def _winner(
    finding: Finding,
    budgets: Mapping[str, Budget],
    facts: Facts,
    baseline_test: Quality | None,
    knobs: Mapping[str, Any],
) -> Winner:
    proof = finding.certificate
    devices = {
        profile: figures(
            reading,
            budget=budgets.get(profile),
            size_mb=proof.size_mb.get(profile),
            baseline_size_mb=facts.baseline_size_mb,
            selection=proof.quality.get(profile),
            test=finding.test.get(profile),
            lost=finding.lost.get(profile),
            baseline_selection=facts.baseline_quality,
            baseline_test=baseline_test,
        )
        for profile, reading in proof.readings.items()
    }
    lost = [found.drop_test or found.drop_selection for found in devices.values()]
    sizes = [found.size_ratio for found in devices.values() if found.size_ratio is not None]
    known = [interval.value for interval in lost if interval is not None]
    return Winner(
        goal=finding.goal,
        number=finding.number,
        candidate=finding.candidate,
        policy=describe(finding.candidate, knobs),
        certified=proof.certified,
        reason=proof.reason,
        budget_met=proof.budget_met,
        quality_held=proof.quality_held,
        speedup=min((found.speedup.value for found in devices.values()), default=0.0),
        drop=max(known, default=None),
        size_ratio=min(sizes, default=None),
        macs=finding.macs,
        parameters=finding.parameters,
        devices=devices,
        tried=finding.tried,
        stages=finding.stages,
        fused=finding.fused,
        thresholds=finding.thresholds,
        spread=finding.spread,
        path=finding.path,
    )


def _uncertified(trial: Trial, goal: Goal, limit: Limit, space_: Space) -> Finding:
    scored = pareto.score(trial.outcome, goal, limit)
    profiles = [budget.profile for budget in goal.budgets]
    found = trial.outcome
    proof = Certificate(
        goal=goal.name,
        certified=False,
        reason=found.reason
        if trial.state is State.INFEASIBLE
        else "not measured again: the search did not come to certification",
        budget_met=all(
            all(pareto.meets(found.readings[b.profile], b, found.size_mb.get(b.profile)).values()) for b in goal.budgets
        ),
        quality_held=scored is not None and scored.quality >= limit.floor,
        floor=limit.floor,
        quality={name: found.quality[name] for name in profiles if name in found.quality},
        readings={name: found.readings[name] for name in profiles},
        size_mb={name: found.size_mb[name] for name in profiles if name in found.size_mb},
    )
    return Finding(
        goal=goal.name,
        number=trial.number,
        candidate=space.decode(space_, trial.genotype),
        certificate=proof,
        macs=found.macs,
        parameters=found.parameters,
    )


def _all_arms(arms: Sequence[Arm], searcher: str) -> list[Arm]:
    """Those that ran, and those that the reader should know to be missing. A random search is its own control."""
    named = {arm.name: arm for arm in arms}
    usual = ("int8", "uniform", "random")
    missing = [Arm(name=name, why="not run in this search") for name in usual if name not in (*named, searcher)]
    return [*arms, *missing]


def _control(arm: Arm, budgets: Mapping[str, Budget], facts: Facts, baseline_test: Quality | None) -> Control:
    devices = {
        profile: figures(
            reading,
            budget=budgets.get(profile),
            size_mb=arm.size_mb.get(profile),
            baseline_size_mb=facts.baseline_size_mb,
            selection=arm.selection.get(profile),
            test=arm.test.get(profile),
            lost=arm.lost.get(profile),
            baseline_selection=facts.baseline_quality,
            baseline_test=baseline_test,
        )
        for profile, reading in arm.readings.items()
    }
    return Control(name=arm.name, ran=arm.ran, why=arm.why, devices=devices, macs=arm.macs, parameters=arm.parameters)
