"""A finished search on one more device: its front measured there, ranked by that device's budget, no new search.

`autocompress measure OUT --profile NEW --speedup 3`. Quality is evaluated once per variant; a variant that the search
did not make comes from the trial's receipts and weights. The journal is read and never written (floor F5).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors.torch import load as load_tensors
from torch import nn

from autocompress import artifact, evidence, journal, load, onnxfile, pareto, report, summary
from autocompress.certify import Checked
from autocompress.controller import Header
from autocompress.devices import Unreachable
from autocompress.devices.cores import plan_cores
from autocompress.devices.fingerprint import check_expects, host, resolve_local, short
from autocompress.devices.station import Station
from autocompress.export import EXPORTERS, Exporter, graph_hash
from autocompress.finals import Finals, Kept, finalists, kept
from autocompress.graph import opset_of
from autocompress.models import Builder
from autocompress.models.weights import fill
from autocompress.parent import BASELINE_S, WEIGHTS, Baseline, load_parent
from autocompress.parts import Parts, make_builder, make_ops, make_task
from autocompress.pipeline import Settled, Work, release, reshape
from autocompress.reader import fill as fill_record
from autocompress.report import Run
from autocompress.space import decode
from autocompress.store import Store, make_folder
from autocompress.summary import Arm, Finding, Summary
from autocompress.tasks import Task
from autocompress.types import (
    Budget,
    Goal,
    Job,
    Outcome,
    Profile,
    Quality,
    Record,
    State,
    Trial,
    TrialFailure,
    UserError,
)
from autocompress.wording import describe, lost, times, wish

NARROW = ("float16", "bfloat16")  # bits that only some devices compute with
RELATIVE = ("speedup", "size_mb")  # bounds that mean something on another device


class Row(Record):
    """One trial of the front on the new device."""

    number: int
    policy: str
    made: bool = False  # its file for this device was made anew
    why: str = ""  # it could not be made or measured, one line
    ms: float | None = None
    speedup: float | None = None
    quality: float | None = None
    front: bool = False
    met: bool = False  # budget and quality floor, by the readings of one session


class Remeasured(Record):
    """What `measure OUT --profile NEW` found."""

    profile: str
    budget: Budget
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    summary: Summary
    folder: str  # of front.csv and summary.json
    artifact: str = ""  # of the best, or of the closest

    def __str__(self) -> str:
        """For the terminal: a table, what could not be measured, the verdict."""
        head = f"{'trial':>6}  {'ms':>9}  {'speedup':>8}  {'quality':>8}  {'':<11} policy"
        lines = [f"{self.profile}: asked {wish(self.budget)}", head]
        measured = [row for row in self.rows if row.ms is not None]
        for row in sorted(measured, key=lambda row: row.ms or 0.0):
            marks = " ".join(word for word, true in (("front", row.front), ("meets", row.met)) if true)
            quality = "" if row.quality is None else f"{row.quality:.4f}"
            about = f"{row.policy}{' (file made anew)' if row.made else ''}"
            lines.append(
                f"{f'#{row.number}':>6}  {row.ms:>9.3f}  {times(row.speedup or 0.0):>8}  {quality:>8}  "
                f"{marks:<11} {about}"
            )
        lines += [f"#{row.number}: {row.why}" for row in self.rows if row.why]
        lines += list(self.notes)
        for winner in (*self.summary.winners.values(), *self.summary.closest.values()):
            verdict = "certified" if winner.certified else f"not certified: {winner.reason}"
            dropped = f", lost {lost(winner.drop, 0.0)}" if winner.drop is not None else ""
            found = winner.devices[self.profile]
            lines.append(
                f"best: #{winner.number}, {times(found.speedup.value)} ({found.speedup.low:.2f} to "
                f"{found.speedup.high:.2f}), {found.ms.value:.3f} ms{dropped}, {verdict}"
            )
        lines.append(f"written: {self.folder}{f', {self.artifact}' if self.artifact else ''}")
        return "\n".join(lines)


def remeasure(
    out: Path | str,
    profile: str | Profile,
    *,
    budget: dict[str, float] | None = None,
    builder: Builder | nn.Module | None = None,
    task: Task | None = None,
    sessions: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Remeasured:
    """Measure a search's front on another device and certify the best there.

    `budget` maps bounds to values; without one the bounds that the search stated for that profile hold, or the
    relative ones that all its devices share; `sessions` are the search's where nothing is said. `builder` and `task`
    are given where the search was given objects. Writes OUT/devices/NEW/{front.csv, summary.json} and the artifact
    OUT/best/NEW (OUT/closest/NEW where nothing holds; under OUT/devices/NEW where NEW was a device of the search).
    Raises UserError for what the user can mend, Unreachable for a device that does not answer.
    """
    out = Path(out)
    run = report.load(out)
    target = resolve_local(profile if isinstance(profile, Profile) else load.profile(profile))
    asked = load.within(_budget(run, target.name, budget or {}), target)
    given = fill_record(run.job, Job, f"{out / 'journal.jsonl'}, line 1: job") if run.job else None
    if given is None:
        raise UserError(
            f"{out}: its journal holds no job; only searches of `autocompress search` can be measured again"
        )
    if target.device == "local":
        check_expects(target, host())
    baseline = out / "baseline" / "model.onnx"
    if not baseline.is_file():
        raise UserError(f"{baseline}: missing; the search's uncompressed file is what others are compared with")
    data = make_task(given.task, given.data) if task is None else task
    network = make_builder(given.model.builder, data.input, given.model.options, given=builder)
    goal = Goal(name=target.name, budgets=(asked,))
    job = given.model_copy(update={"devices": (asked,), "out": str(out)})
    parts = Parts(job, data, network, run.space, (target,), (asked,), (goal,))
    work = Work(
        builder=network,
        task=data,
        ops=make_ops(parts.op_names),
        parent=load_parent(network.build({}), out / "baseline" / WEIGHTS),
        profiles=(target,),
        epochs=job.search.fidelity.full_epochs,
        exporter=_exporter(out),
        bf16=run.facts.bf16,
    )
    weighed = (target.name,) if asked.memory_mb is not None else ()
    station = Station([target], plan_cores([target]), baseline, weighed=weighed)
    try:
        return _Again(out, run, parts, work, station, sessions or job.search.sessions, say).go()
    finally:
        station.close()


def _budget(run: Run, name: str, asked: dict[str, float]) -> Budget:
    """What is asked of the new device."""
    if asked:
        return fill_record({"profile": name, **asked}, Budget, "measure")
    stated = {budget.profile: budget for goal in run.goals for budget in goal.budgets}
    if name in stated:
        return stated[name]
    bounds = [budget.model_dump(include=set(RELATIVE), exclude_none=True) for budget in stated.values()]
    if bounds and bounds[0] and all(one == bounds[0] for one in bounds):
        return Budget(profile=name, **bounds[0])
    asked_there = "; ".join(f"{other}: {wish(budget)}" for other, budget in stated.items())
    raise UserError(
        f"what shall hold on {name}? give one of --speedup, --latency-ms, --p95-ms, --throughput, --size-mb, "
        f"--memory-mb (the search asked {asked_there})"
    )


def _exporter(out: Path) -> Exporter:
    """The one that the search wrote its files with."""
    first = journal.read(out / "journal.jsonl").events[0]
    named = Header.model_validate(first).more.get("exporter")
    return named if named in EXPORTERS else EXPORTERS[0]


@dataclass
class _Again:
    """A search's front on its way through another device."""

    out: Path
    run: Run
    parts: Parts
    work: Work
    station: Station
    sessions: int
    say: Callable[[str], None]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """What is used everywhere."""
        self.target = self.parts.profiles[0]
        self.goal = self.parts.goals[0]
        self.store = Store(self.out / "work")

    def go(self) -> Remeasured:
        target, name = self.target, self.target.name
        facts = self.baseline()
        multiple = target.channel_multiple
        if multiple > 1:
            self.notes.append(f"channels are as the search left them: {name} would like multiples of {multiple}")
        rows: list[Row] = []
        trials: list[Trial] = []
        chosen = self.front()
        for index, trial in enumerate(chosen, start=1):
            self.say(f"#{trial.number} on {name}, {index} of {len(chosen)}")
            words = describe(decode(self.run.space, trial.genotype), summary.parent_arch(self.run.space))
            try:
                measured, made = self.trial(trial)
            except Unreachable:
                raise
            except (TrialFailure, UserError) as failure:
                rows.append(Row(number=trial.number, policy=words, why=str(failure)))
                continue
            trials.append(measured)
            rows.append(self.row(measured, words, made))
        if not trials:
            why = rows[0].why if rows else "it has no fully trained trial"
            raise UserError(f"{self.out}: nothing of this search could be measured on {name}: {why}")
        front = {trial.number for trial in pareto.front(trials, self.goal, self.run.limit)}
        rows = [row.model_copy(update={"front": row.number in front}) for row in rows]
        return self.finish(facts, tuple(trials), tuple(rows))

    def front(self) -> tuple[Trial, ...]:
        """The trials whose files are kept: those on a front of the search, and the best few of each goal."""
        every, limit = self.run.trials, self.run.limit
        chosen: dict[int, Trial] = {}
        for goal in self.run.goals:  # as `run.sweep` chooses what it keeps
            those = (*pareto.front(every, goal, limit), *finalists(every, goal, limit))
            chosen |= {trial.number: trial for trial in those if trial.number > 0 and trial.state is State.DONE}
        return tuple(chosen[number] for number in sorted(chosen))

    def baseline(self) -> Baseline:
        """The uncompressed file on the new device."""
        name, known = self.target.name, self.run.facts
        self.say(f"the baseline on {name}")
        path = self.out / "baseline" / "model.onnx"
        model = onnxfile.load(path)
        reading = self.station.measure(name, path, None, BASELINE_S, again=False)
        there = self.station.fingerprint(name)
        facts = known.model_copy(
            update={"baseline": {name: reading}, "fingerprints": {short(there): there}, "versions": artifact.versions()}
        )
        control = next((trial.outcome for trial in self.run.trials if trial.number == 0), Outcome())
        return Baseline(facts, self.run.limit, control, graph_hash(model, weights=False))

    def trial(self, trial: Trial) -> tuple[Trial, bool]:
        """A trial with what this device says of it, and whether its file was made anew."""
        name, variant = self.target.name, self.target.numeric.variant
        files = kept(self.store, trial)
        made = not self.serves(trial, files)
        if made:
            files = self.make(trial, files)
        model = files.models[variant]
        reading = self.station.measure(name, model, graph_hash(model, weights=False))
        quality, _ = self.quality(trial, model, made)
        receipts = {
            "structure": [receipt.model_dump(mode="json") for receipt in files.structure],
            "numeric": {variant: [receipt.model_dump(mode="json") for receipt in files.numeric[variant]]},
        }
        roles = {
            "weights": trial.outcome.files["weights"],
            f"model:{variant}": self.store.put(model),
            "receipts": self.store.put(json.dumps(receipts, sort_keys=True).encode()),
        }
        outcome = trial.outcome.model_copy(
            update={
                "readings": {name: reading},
                "quality": {name: quality},
                "size_mb": {name: len(model) / 1e6},
                "files": roles,
                "seconds": {"measure": reading.seconds},
            }
        )
        return trial.model_copy(update={"outcome": outcome}), made

    def serves(self, trial: Trial, files: Kept) -> bool:
        """Whether a file of the search is what this device would be given."""
        variant = self.target.numeric.variant
        if variant not in files.models:
            return False
        rules = decode(self.run.space, trial.genotype).policy.of("quantize")
        narrow = {str(rule.settings.get("bits")) for rule in rules} & set(NARROW)
        if not narrow <= set(self.target.types):
            return False
        return opset_of(onnxfile.read(files.models[variant], weights=False)) <= self.target.opset

    def make(self, trial: Trial, files: Kept) -> Kept:
        """The file of this device's variant: shapes from receipts, trained weights, numeric ops decided for it.

        Ranges that training has learned are in the receipts. Raises TrialFailure with the reason where it cannot be.
        """
        work, variant = self.work, self.target.numeric.variant
        candidate = decode(self.run.space, trial.genotype)
        module = reshape(work.builder, work.ops, candidate.arch, files.structure).eval()
        try:
            fill(module, load_tensors(files.weights))
        except RuntimeError as error:
            raise TrialFailure(f"its weights do not fit its receipts: {' '.join(str(error).split())[:200]}") from error
        learned = Settled(module, files.structure).ranges()
        found = release(work, module, candidate.policy, learned=learned)[variant]
        return replace(files, models={variant: found.model}, numeric={variant: found.receipts})

    def quality(self, trial: Trial, model: bytes, made: bool) -> tuple[Quality, Checked]:
        """Quality of a file: the search's own where it is the same file and the device could not tell another."""
        there = self.station.fingerprint(self.target.name)
        known = None if made else self.known(trial)
        with self.station.predictor(self.target.name, model) as predict:
            return evidence.quality(self.work.task, model, self.target, known, there, predict)

    def known(self, trial: Trial) -> Quality | None:
        """What the search found for a file of this variant."""
        for profile in self.run_profiles():
            if profile.numeric.variant == self.target.numeric.variant and profile.name in trial.outcome.quality:
                return trial.outcome.quality[profile.name]
        return None

    def run_profiles(self) -> Sequence[Profile]:
        """Those of the search, as far as its artifacts tell them."""
        found: dict[str, Profile] = {}
        for path in sorted(self.out.glob("*/*/manifest.json")):
            try:
                manifest = artifact.read_manifest(path.parent)
            except UserError:
                continue  # another's folder, or one that was damaged: quality is evaluated again
            found |= {profile.name: profile for profile in manifest.profiles}
        return tuple(found.values())

    def row(self, trial: Trial, words: str, made: bool) -> Row:
        name = self.target.name
        reading, found = trial.outcome.readings[name], trial.outcome.quality[name]
        score = pareto.score(trial.outcome, self.goal, self.run.limit)
        return Row(
            number=trial.number,
            policy=words,
            made=made,
            ms=reading.ms.value,
            speedup=reading.speedup,
            quality=found.value.value,
            met=score is not None and score.violation <= 0,
        )

    def finish(self, baseline: Baseline, trials: tuple[Trial, ...], rows: tuple[Row, ...]) -> Remeasured:
        """Certify, write the artifact, the table and the summary."""
        name = self.target.name
        folder = make_folder(self.out / "devices" / name, "choose another folder by --out")
        own = name in {budget.profile for goal in self.run.goals for budget in goal.budgets}
        finals = Finals(
            self.parts, self.work, baseline, self.station, self.store, self.out, self.work.exporter,
            place=folder if own else self.out, sessions_each=self.sessions, say=self.say,
        )  # fmt: skip
        self.say(f"certifying finalists for {name}")
        test = finals.baseline_test()
        finding = finals.decide(trials, self.goal, name)
        arms: list[Arm] = []
        self.say("the control arm")
        with finals.saying("the control arm"):
            arms.append(finals.int8_arm())
        findings: list[Finding] = [] if finding is None else [finding]
        found = summary.build(
            state="finished",
            space_=self.run.space,
            goals=(self.goal,),
            limit=self.run.limit,
            facts=baseline.facts,
            trials=trials,
            findings=findings,
            arms=arms,
            problems=finals.problems,
            baseline_test=test,
            searcher=self.run.plan.searcher,
            seed=self.run.plan.seed,
            minutes=self.run.minutes,
            job=self.parts.job.model_dump(mode="json"),
        )
        table = summary.front_csv(self.run.space, (self.goal,), self.run.limit, baseline.facts, trials)
        summary.write(folder, found, table)
        return Remeasured(
            profile=name,
            budget=self.goal.budgets[0],
            rows=rows,
            notes=tuple(self.notes),
            summary=found,
            folder=str(folder),
            artifact=str((folder if own else self.out) / finding.path) if finding is not None else "",
        )
