"""One search from job to report: parent, baseline, trials, finals (floor F5)."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from threadpoolctl import threadpool_limits
from torch import nn

from autocompress import (
    auto,
    earlier,
    early,
    live,
    onnxfile,
    ranks,
    ray_tune,
    reader,
    report,
    residents,
    spacefile,
    summary,
)
from autocompress.artifact import versions
from autocompress.certify import SESSIONS
from autocompress.closing import Closing
from autocompress.controller import Controller, Header, header, renewed, run_serial
from autocompress.devices import AllAway, Unreachable, host_of
from autocompress.devices.cores import CorePlan, at_large, given_back, keep_to, plan_cores
from autocompress.devices.station import Station
from autocompress.elastic import train as train_shared
from autocompress.evaluator import Evaluator
from autocompress.export import EXPORTERS, Exporter
from autocompress.finals import Finals
from autocompress.journal import Event, Journal, began
from autocompress.journal import read as read_journal
from autocompress.later import Later
from autocompress.models import Builder
from autocompress.parent import (
    ELASTIC,
    WEIGHTS,
    Baseline,
    export_baseline,
    make_parent,
    measure_baseline,
    strangers,
)
from autocompress.parts import Parts, make_searcher, parts
from autocompress.pipeline import Work, frozen, weights_of
from autocompress.probe import probe as try_choices
from autocompress.searchers import Keeper
from autocompress.store import Store, make_folder, write_atomic
from autocompress.summary import Arm, Finding, Summary
from autocompress.sweep import sweep
from autocompress.tasks import Task
from autocompress.train import bf16_faster
from autocompress.types import (
    Assignment,
    Budget,
    Fidelity,
    Job,
    Limit,
    Outcome,
    Profile,
    QualityLimit,
    SearchPlan,
    Shared,
    Space,
    UserError,
)
from autocompress.worker import MakeEvaluator, make_work, one_thread, threads_given_back, with_donor


def run(
    job: Job,
    *,
    task: Task | None = None,
    builder: Builder | nn.Module | None = None,
    space: Space | None = None,
    address: str | None = None,
    serial: bool = False,
    console: Console | None = None,
) -> Summary:
    """Run a job that has not begun; objects given take the place of its names.

    Writes the journal, baseline, best models, summary and report into the job's `out`. Raises UserError for what the
    user can mend, among it an `out` that holds a run.
    """
    out = Path(job.out)
    made = parts(job, task=task, builder=builder, space=space)
    plan_cores(made.profiles)  # a host that is too small is said before anything is written
    if began(out / "journal.jsonl"):
        raise UserError(f"{out} holds another run: `autocompress resume {out}`, or choose another folder by --out")
    for path in job.search.warm:
        earlier.events(path)
    make_folder(out, "choose another folder by --out")
    if task is not None or builder is not None or not _same_parent(out / "job.json", job):
        (out / "baseline" / WEIGHTS).unlink(missing_ok=True)  # of a start that another job made and gave up
    write_atomic(out / "job.json", job.model_dump_json(indent=1).encode())
    return _Run(made, out, address, serial, console or Console(emoji=False), derived=_is_derived(job, space)).go()


def _is_derived(job: Job, given: Space | None) -> bool:
    """Whether the space is made from the network, so that it is probed, and written for the user to edit."""
    return given is None and job.space == auto.NAME


def _same_parent(path: Path, job: Job) -> bool:
    """Whether an earlier start of this very training, by the same names, left its job there."""
    try:
        old = Job.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return False
    same = (old.task, old.data, old.model, old.search.seed) == (job.task, job.data, job.model, job.search.seed)
    return same and job.model.weights is None


def resume(
    out: Path | str,
    *,
    task: Task | None = None,
    builder: Builder | nn.Module | None = None,
    space: Space | None = None,
    trials: int | None = None,
    minutes: float | None = None,
    address: str | None = None,
    serial: bool = False,
    console: Console | None = None,
) -> Summary:
    """Go on with an interrupted search; `trials` and `minutes` replace what it may cost.

    Nothing the journal holds is lost or done twice. Raises UserError where there is no run, or another process has it.
    """
    out = Path(out)
    path = out / "job.json"
    if not path.is_file():
        raise UserError(f"{out} holds no run: start one with `autocompress search JOB --out {out}`")
    try:
        written = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error}); start a new run") from error
    job = reader.fill(written, Job, str(path))
    job = job.model_copy(update={"out": str(out)})
    derived = _is_derived(job, space)
    if derived and began(out / "journal.jsonl"):  # what the probe left is in the journal, not derived again
        event = read_journal(out / "journal.jsonl").events[0]
        space = reader.fill(event.get("space"), Space, f"{out / 'journal.jsonl'}, line 1: space")
    made = parts(job, task=task, builder=builder, space=space)
    spent = {name: value for name, value in (("trials", trials), ("minutes", minutes)) if value is not None}
    if not began(out / "journal.jsonl"):  # it was killed before the first trial
        plan = job.search.model_copy(update={"cost": renewed(job.search.cost, spent)})
        made = parts(job.model_copy(update={"search": plan}), task=made.task, builder=made.builder, space=made.space)
    return _Run(made, out, address, serial, console or Console(emoji=False), spent, derived=derived).go()


def search(
    model: Builder | nn.Module | str,
    task: Task | str,
    *,
    devices: Sequence[Budget | Mapping[str, Any]],
    space: Space | str | None = None,
    weights: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    epochs: float | None = None,
    quality: QualityLimit | Mapping[str, Any] | None = None,
    searcher: str = "evolution",
    seed: int = 0,
    trials: int = 100,
    minutes: float = 60.0,
    final: float = 0.0,
    fidelity: Fidelity | Mapping[str, Any] | None = None,
    probe: float = 60.0,
    elastic: float = 0.0,
    routes: bool = False,
    ops: Sequence[str] = (),
    warm: Sequence[str | Path] = (),
    out: str | Path = "runs/search",
    address: str | None = None,
    serial: bool = False,
    workers: int | None = None,
    screen: bool = False,
    patience: float = 30.0,
    sessions: int = SESSIONS,
    console: Console | None = None,
) -> Summary:
    """The whole search in Python, with objects or names for model (a builder), task and space.

        autocompress.search("convnet", "digits", devices=[{"profile": "local-1t", "speedup": 3}], out="runs/mine")

    `model` may be a network of your own with its trained weights (an nn.Module); `options` and `data` are what a named
    model and task take, `epochs` how long a model without weights is trained first. The space is derived from the
    network (`auto`) and probed for at most `probe` seconds, unless it is the built-in one; for `elastic` minutes
    structures of it learn to share the parent's weights before the search. With `routes` it offers exits and gates too,
    whose files decide by their input and take one sample at a time; with `ops` it asks of these ops alone. `warm` names
    folders of earlier runs, of this or another network or device, whose trials the searcher begins with. Of the
    `minutes` the share `final` is kept for the last rung, to which the best few alone are trained, one after another on
    all cores. `screen` leaves unmeasured what is predicted to be far over every budget, `patience` is how many minutes
    to wait for devices that are away, `sessions` how often each finalist is timed anew for its certificate. Budgets,
    quality and fidelity are the records of a job file or mappings of their fields.
    """
    if space is None:
        space = "convnet" if model == "convnet" else auto.NAME
    if not isinstance(space, str | Space):
        raise UserError(f"search: space: must be a name, a path or a Space, not {space!r}")
    asked: dict[str, Any] = {
        "task": task if isinstance(task, str) else _named(task),
        "model": {
            "builder": model if isinstance(model, str) else _named(model),
            "options": dict(options or {}),
            "weights": str(Path(weights).resolve()) if isinstance(weights, str | Path) else weights,
            "epochs": (0.0 if isinstance(model, nn.Module) else 8.0) if epochs is None else epochs,
        },
        "data": dict(data or {}),
        "space": space if isinstance(space, str) else space.name,
        "devices": [_plain(one) for one in devices] if isinstance(devices, list | tuple) else devices,
        "quality": {"max_drop": 0.01} if quality is None else _plain(quality),
        "search": {
            "searcher": searcher,
            "seed": seed,
            "fidelity": {} if fidelity is None else _plain(fidelity),
            "cost": {"trials": trials, "minutes": minutes, "final": final},
            "probe": probe,
            "elastic": elastic,
            "routes": routes,
            "ops": list(ops),
            "warm": [str(path) for path in warm],
            "workers": workers,
            "screen": screen,
            "patience": patience,
            "sessions": sessions,
        },
        "out": str(out),
    }
    job = reader.fill(asked, Job, "search")
    return run(
        job,
        task=None if isinstance(task, str) else task,
        builder=None if isinstance(model, str) else model,
        space=None if isinstance(space, str) else space,
        address=address,
        serial=serial,
        console=console,
    )


def _plain(given: object) -> object:
    return dict(given) if isinstance(given, Mapping) else given


def _named(thing: object) -> str:
    """How the journal names an object that was passed in."""
    kind = type(thing)
    return f"{kind.__module__}:{kind.__qualname__}"


@dataclass
class _Run:
    """A run on its way; `go` is the order of things."""

    parts: Parts
    out: Path
    address: str | None
    serial: bool
    console: Console
    spent: Mapping[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    derived: bool = False  # the space is made from the network
    parent: str = field(default="", init=False)  # sha256 of the weights

    def go(self) -> Summary:
        progress = live.Progress(
            goals=self.parts.goals,
            limit=Limit(metric=self.parts.job.quality.metric, floor=0.0),
            plan=self.parts.job.search,
            space=self.parts.space,
            title=f"{self.parts.job.task} · {self.parts.job.model.builder} · {self.parts.job.search.searcher}",
        )
        self.live = live.Live(progress, self.console, quiet=self.console.quiet)
        try:
            with given_back(), threads_given_back(), self.live, live.telling(self.live):
                found, report_path = self.inside()
        except KeyboardInterrupt:
            if not self.console.quiet:
                self.console.print(f"stopped; `autocompress resume {self.out}` goes on from here", highlight=False)
            raise
        if not self.console.quiet:
            live.show_result(self.console, found, self.out, report_path)
        return found

    def inside(self) -> tuple[Summary, Path]:
        plan = plan_cores(self.parts.profiles)
        if self.address is not None:
            ray_tune.reach(self.address)  # now, not after the parent's training
        begun = began(self.out / "journal.jsonl")
        journal = Journal.open(self.out / "journal.jsonl") if begun else None
        try:
            with self.stage("parent"):
                parent = make_parent(self.parts, self.out / "baseline", self.live.stage)
            store = Store(self.out / "work")
            self.parent = sha = store.put((self.out / "baseline" / WEIGHTS).read_bytes())
            if journal is not None:
                self.check_parent(header(journal))
            # From here on driver, trainers and everything they start leave the station's cores alone.
            keep_to(plan.trainers)
            torch.set_num_threads(max(1, len(plan.trainers) or (os.cpu_count() or 1)))
            work = make_work(self.parts, parent)
            self.live.stage("exporting the baseline")
            key, exporter = export_baseline(work, self.out / "baseline", self.exporters(journal))
            work = replace(work, exporter=exporter)
            if exporter != EXPORTERS[0]:
                self.live.note(f"{EXPORTERS[0]} cannot export this network: {exporter} does, in seconds per candidate")
            path = self.out / "baseline" / "model.onnx"
            if told := frozen(work, onnxfile.load(path)):
                self.live.note(told)
            weighed = tuple(one.profile for one in self.parts.budgets if one.memory_mb is not None)
            station = functools.partial(
                Station, plan=plan, baseline=path, baseline_key=key, weighed=weighed, budgets=self.parts.budgets
            )
            with ExitStack() as held:
                # matrices of a few hundred trials: threads only wait for each other, and take the trainers' cores
                held.enter_context(threadpool_limits(1, user_api="blas"))
                session = self.session(store, plan)
                if any(profile.device == "ray" for profile in self.parts.profiles):
                    self.live.stage("starting Ray")
                    held.enter_context(session)  # the baseline and the finalists are measured through it too
                mine = station(self.parts.profiles)
                held.callback(mine.close)
                with self.stage("baseline"):
                    try:
                        baseline, journal = self.begin(journal, work, mine, key)
                    except Unreachable as gone:
                        raise UserError(f"{gone}; a search begins with a reading on every device") from gone
                controller = self.controller(journal, baseline, begun)
                shared = baseline.facts.shared
                donor = store.put((self.out / "baseline" / ELASTIC).read_bytes()) if shared else ""
                work = with_donor(work, store.get(donor) if donor else None)
                with self.stage("search"):
                    make = MakeEvaluator(self.parts, sha, baseline.facts.bf16, exporter, donor=donor)
                    self.execute(controller, store, make, mine, station, session)
                if isinstance(controller.searcher, Keeper):
                    controller.searcher.save(self.out)
                return self.finish(controller, baseline, work, mine, store)
        finally:
            if journal is not None:
                journal.close()

    def exporters(self, journal: Journal | None) -> tuple[Exporter, ...]:
        """Those to try in turn: the one that the run began with, if it has."""
        begun = None if journal is None else header(journal).more.get("exporter")
        return tuple(one for one in EXPORTERS if begun in (None, one))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started, before = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:  # without the stages within
            within = sum(self.seconds.values()) - before
            self.seconds[name] = time.perf_counter() - started - within

    def begin(self, journal: Journal | None, work: Work, station: Station, key: str) -> tuple[Baseline, Journal]:
        """The baseline and the journal: measured and created, or as the journal has them."""
        if journal is None:
            plan = self.parts.job.search
            self.live.stage("measuring the baseline")
            baseline = measure_baseline(self.parts, work, station, self.out / "baseline", key)
            with strangers(self.parts.builder.name), one_thread():  # as the workers train
                faster = bf16_faster(work.parent, work.task)
            baseline = replace(baseline, facts=baseline.facts.model_copy(update={"bf16": faster}))
            for line in early.at_the_start(baseline.facts, baseline.limit):
                self.live.note(line)
            if self.derived:
                baseline = self.derive(baseline, work)
            if plan.warm:
                known = earlier.trials(plan.warm, self.parts.space, baseline.facts)
                for note in known.notes:
                    self.live.note(note)
                baseline = replace(baseline, facts=baseline.facts.model_copy(update={"warm": known.trials}))
            if plan.elastic > 0:
                baseline, plan = self.share(baseline, replace(work, bf16=faster), plan)
            first = Header(
                space=self.parts.space,
                goals=self.parts.goals,
                limit=baseline.limit,
                plan=plan,
                facts=baseline.facts,
                more={
                    "job": self.parts.job.model_dump(mode="json"),
                    "exporter": work.exporter,
                    "parent": self.parent,
                    "control": baseline.outcome.model_dump(mode="json", exclude_defaults=True),
                },
            )
            make_searcher(first)  # options it refuses must not stand in a journal that no resume can mend
            return baseline, Journal.create(self.out / "journal.jsonl", first.event())
        known = header(journal)
        self.check_same(known)
        told = next((e["outcome"] for e in journal.events() if (e["number"], e["state"]) == (0, "done")), None)
        control = known.more.get("control", told)  # its own line may be missing; the header of an older run lacks it
        outcome = Outcome.model_validate(control) if control else Outcome(readings=known.facts.baseline)
        return Baseline(known.facts, known.limit, outcome, key), journal

    def derive(self, baseline: Baseline, work: Work) -> Baseline:
        """Probe the derived space, go on with what is left of it, and write that for the user to edit."""
        seconds = self.parts.job.search.probe
        if seconds > 0:
            with self.stage("probe"):
                found = try_choices(
                    work,
                    self.parts.space,
                    baseline.facts,
                    self.parts.budgets,
                    seconds=seconds,
                    folder=self.out,
                    say=self.live.stage,
                    step=self.live.step,
                )
            self.live.note(str(found))
            self.parts = replace(self.parts, space=found.space)
            self.live.progress.space = found.space
            baseline = replace(baseline, facts=baseline.facts.model_copy(update=found.facts))
        file = auto.written(self.parts.space, self.parts.builder)
        write_atomic(self.out / "space.yaml", spacefile.text(file).encode())
        return baseline

    def share(self, baseline: Baseline, work: Work, plan: SearchPlan) -> tuple[Baseline, SearchPlan]:
        """Train an elastic parent, and let slices of it be a rung of their own where they rank as training does."""
        with self.stage("elastic parent"):
            self.live.stage("sharing the parent's weights")
            threads = torch.get_num_threads()
            found = train_shared(
                work,
                self.parts.space,
                baseline.facts,
                self.parts.goals,
                seconds=60 * plan.elastic,
                seed=plan.seed,
                step=self.live.step,
            )
            torch.set_num_threads(threads)
        if found is None:
            self.live.note("no elastic parent: too few choices of this space only take away from the network")
            return baseline, plan
        self.live.note(str(found))
        weights = weights_of(found.module)
        write_atomic(self.out / "baseline" / ELASTIC, weights)
        shared = Shared(
            weights=hashlib.sha256(weights).hexdigest(),
            structures=found.structures,
            steps=found.steps,
            agreement=found.agreement,
            decides=found.decides,
        )
        if found.decides and plan.fidelity.rungs[0] > 0:
            rungs = plan.fidelity.model_copy(update={"rungs": (0.0, *plan.fidelity.rungs)})
            plan = plan.model_copy(update={"fidelity": rungs})
            self.live.progress.plan = plan
        return replace(baseline, facts=baseline.facts.model_copy(update={"shared": shared})), plan

    def check_parent(self, known: Header) -> None:
        """A resumed run must be of the same weights."""
        if known.more.get("parent", self.parent) != self.parent:
            raise UserError(
                f"{self.out / 'baseline' / WEIGHTS}: not the weights that this run began with, whose sha256 is in its "
                "journal's first line; put them back, or start a new run"
            )

    def check_same(self, known: Header) -> None:
        """A resumed run must be of the same network; another host is said, since its readings do not compare."""
        if known.space != self.parts.space:
            raise UserError(f"{self.out}: the space is no longer the one this run began with; start a new run")
        here, now = known.facts.versions, versions()
        changed = [f"{name} {here[name]} -> {now[name]}" for name in here if name in now and here[name] != now[name]]
        if changed:
            self.live.note(f"since this run began versions have changed: {', '.join(changed)}")

    def controller(self, journal: Journal, baseline: Baseline, begun: bool) -> Controller:
        if begun:
            controller = Controller.resume(journal, make_searcher, spent=self.spent)
        else:
            controller = Controller.begin(journal, make_searcher)
        controller.control(baseline.outcome)
        progress = self.live.progress
        progress.plan = controller.plan.model_copy(update={"cost": controller.cost})
        progress.limit, progress.already = baseline.limit, controller.elapsed
        self.live.facts(baseline.facts)
        for trial in controller.trials:
            progress.see(trial, self.live.now())
        progress.began = None
        for note in controller.notes:
            self.live.note(note)
        return controller

    def session(self, store: Store, plan: CorePlan) -> ray_tune.Session:
        """Ray for this run, not up yet. Raises UserError where a device is a node of a cluster and none is named."""
        through = [profile.name for profile in self.parts.profiles if profile.device == "ray"]
        if through and self.address is None:
            raise UserError(f"{', '.join(through)}: reached through Ray; name the cluster by --address HOST:PORT")
        return ray_tune.Session(
            workers=self.parts.job.search.workers,
            address=self.address,
            env={"OMP_NUM_THREADS": "1"},
            store_root=store.root,
            trainer_cores=plan.trainers,
        )

    def execute(
        self,
        controller: Controller,
        store: Store,
        make: MakeEvaluator,
        mine: Station,
        station: Callable[[Sequence[Profile]], Station],
        session: ray_tune.Session,
    ) -> None:
        """Run the trials, on Ray or one after another in this process."""
        self.live.note(mine.plan.why) if mine.plan.quiet else None
        self.live.stage("")
        if self.serial or (controller.finished and controller.cost.final <= 0):
            self.walk(controller, make, store, mine, None, mine.plan)
            return
        mine.close()  # its timing processes are started again when finalists are measured
        with ExitStack() as held:
            if not session.up:
                self.live.stage("starting Ray")
                held.enter_context(session)
            far = self.far(session, station)
            self.live.stage("")
            self.walk(controller, make, store, far, session, mine.plan)
            if controller.stopped:
                self.live.stage("stopping: what is in flight runs again on resume; writing what was found")

    def walk(
        self,
        controller: Controller,
        make: MakeEvaluator,
        store: Store,
        stations: Station | residents.RemoteStations,
        session: ray_tune.Session | None,
        plan: CorePlan,
    ) -> None:
        """The search, then the further training of the best few where time was kept for it.

        The last network trains alone, and nothing is measured while it does: it has the station's cores too.
        """
        threads = torch.get_num_threads()
        every = threads if plan.quiet or not plan.trainers else len(plan.trainers) + len(plan.station)

        def here(count: int) -> Evaluator:
            return replace(make, threads=count)(store, stations.measure, stations.kernels)

        def alone(hear: Callable[[Event], None], count: int = threads) -> None:
            with at_large(plan, count):
                run_serial(controller, here(count), hear, keep=store.put)

        def pace(assignment: Assignment, threads: int) -> float:
            with at_large(plan, threads):
                return here(threads).pace(assignment)

        def together(hear: Callable[[Event], None]) -> None:
            if session is None:
                alone(hear, 1)
            else:
                far = functools.partial(make, session.files, stations.measure, stations.kernels)
                session.run(controller, far, hear)

        def go(run: Callable[[Callable[[Event], None]], None]) -> None:
            later = Later(controller, stations, store, self.parts.budgets, self.live.note)
            hear = self.hear(controller, later)
            self.rounds(controller, later, hear, lambda: run(hear))

        if not controller.rounds:
            go(together)
        if controller.cost.final > 0 and not controller.stopped:
            Closing(
                controller,
                self.parts.goals,
                self.live.progress.limit,
                pace,
                lambda: go(together),
                lambda count: go(functools.partial(alone, count=count)),
                workers=1 if session is None else session.workers,
                threads=every,
                say=self.live.note,
            ).go()
        torch.set_num_threads(threads)

    def far(
        self, session: ray_tune.Session, station: Callable[[Sequence[Profile]], Station]
    ) -> residents.RemoteStations:
        """A station of its own for each host."""
        found: dict[str, residents.RemoteStation] = {}
        for index, host in enumerate(dict.fromkeys(host_of(profile) for profile in self.parts.profiles)):
            those = tuple(profile for profile in self.parts.profiles if host_of(profile) == host)
            made = session.station(functools.partial(station, those), f"station-{index}")
            found |= dict.fromkeys((profile.name for profile in those), made)
        return residents.RemoteStations(found)

    def rounds(
        self, controller: Controller, later: Later, hear: Callable[[Event], None], run: Callable[[], None]
    ) -> None:
        """Trials, then what devices missed meanwhile, which may promote a trial that was stopped."""
        try:
            with later:
                while True:
                    if not controller.finished:
                        run()
                    if controller.stopped:
                        return
                    controller.on_event = hear
                    later.finish(self.parts.job.search.patience * 60, self.live.stage)
                    self.live.stage("")
                    if controller.finished:
                        return
        except AllAway as gone:
            controller.stop()
            self.live.note(str(gone))
        except KeyboardInterrupt:
            controller.stop()
        finally:
            controller.on_event = None

    def hear(self, controller: Controller, later: Later) -> Callable[[Event], None]:
        """Journal events, folded into trials for the live view."""
        known = {trial.number: trial for trial in controller.trials}
        said = set(early.lines(controller.trials, controller.goals, controller.limit))  # before a resume

        def on_event(event: Event) -> None:
            trial = live.fold(known, event)
            if trial is not None:
                later.hear(trial)
                self.live.event(trial)
                if trial.state.ended:
                    for subject, line in early.lines([*known.values()], controller.goals, controller.limit).items():
                        if subject not in said:
                            said.add(subject)
                            self.live.note(line)

        return on_event

    def finish(
        self, controller: Controller, baseline: Baseline, work: Work, station: Station, store: Store
    ) -> tuple[Summary, Path]:
        """Certify, test, write. A second Ctrl-C leaves out what is not certified yet."""
        trials = controller.standing
        patience = 0.0 if controller.stopped else self.parts.job.search.patience * 60
        finals = Finals(
            self.parts, work, baseline, station, store, self.out, work.exporter, patience, self.live.stage,
            sessions_each=self.parts.job.search.sessions,
        )  # fmt: skip
        findings: list[Finding] = []
        arms: list[Arm] = []
        broken: list[Exception] = []  # raised again when all that was found is written
        state: summary.RunState = "interrupted" if controller.stopped else "finished"
        test = None
        try:
            with self.stage("certify"):
                with finals.saying("the baseline on the test split", broken):
                    test = finals.baseline_test()  # before the artifacts, whose manifests hold it
                # The goal of all devices first: what holds on all of them holds on each.
                for goal in sorted(self.parts.goals, key=lambda goal: -len(goal.budgets)):
                    self.live.stage(f"certifying finalists for {goal.name}")
                    proven = {finding.number for finding in findings if finding.certificate.certified}
                    with finals.saying(f"certifying for {goal.name}", broken):
                        found = finals.decide(trials, goal, goal.name, tuple(t for t in trials if t.number in proven))
                        findings += [found] if found is not None else []
                findings.sort(key=lambda finding: [goal.name for goal in self.parts.goals].index(finding.goal))
            with self.stage("arms"):
                self.live.stage("the control arm")
                with finals.saying("the control arm", broken):
                    arms.append(finals.int8_arm())
        except KeyboardInterrupt:
            state = "interrupted"
        state = "interrupted" if broken else state
        found_ = summary.build(
            state=state,
            space_=self.parts.space,
            goals=self.parts.goals,
            limit=baseline.limit,
            facts=baseline.facts,
            trials=trials,
            findings=findings,
            arms=arms,
            problems=finals.problems,
            baseline_test=test,
            searcher=self.parts.job.search.searcher,
            seed=self.parts.job.search.seed,
            minutes=controller.elapsed / 60,
            seconds={name: round(value, 3) for name, value in self.seconds.items() if name != "search"}
            | {"engine": controller.engine},
            job=self.parts.job.model_dump(mode="json"),
            rungs=[step.agreement for step in ranks.corrections(controller.reached)],
        )
        table = summary.front_csv(self.parts.space, self.parts.goals, baseline.limit, baseline.facts, trials)
        summary.write(self.out, found_, table)
        self.live.stage("writing the report")
        where = report.write(self.out)
        if broken:
            raise broken[0]
        if state == "finished":
            sweep(store, trials, self.parts.goals, baseline.limit)
        return found_, where
