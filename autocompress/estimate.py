"""What a job will take, said before it starts: a few training steps are timed, nothing is written (floor F5)."""

from __future__ import annotations

import os
import time
from itertools import islice
from pathlib import Path

import torch

from autocompress import auto
from autocompress.certify import SESSION_S, SESSIONS
from autocompress.devices.cores import plan_cores
from autocompress.finals import FINALISTS
from autocompress.journal import began
from autocompress.models.trace import examples, thop_count
from autocompress.parent import load_parent, strangers
from autocompress.parts import Parts, parts
from autocompress.space import cardinality
from autocompress.train import Training
from autocompress.types import Job, Record
from autocompress.wording import wish

STEPS = 3
START_S = 12.0  # imports, Ray, worker processes
FINALS_S = 15.0  # control arm, stages, report; certification comes on top
STATION_S = 1.6  # one reading with its start
CHILD = 0.4  # a typical candidate trains this much faster than the parent: half the width or depth
EXPORT_S = 1.0  # export, int8 and quality, twice per trial


class Estimate(Record):
    """Minutes, megabytes and trials; figures of a machine as busy as it is now."""

    job: str
    candidates: int  # distinct ones in the space
    genes: int
    parameters: int
    macs: int
    parent_s: float  # 0 where weights are given
    trial_s: float
    workers: int
    trials: int  # that will fit into the cost
    minutes: float
    disk_mb: float
    stations: str
    devices: dict[str, str] = {}  # what each is asked, in words
    sessions: int = SESSIONS  # per finalist and device
    certify_s: float = 0.0  # if every finalist has to be measured again
    held: bool = False  # `out` has a run already

    def __str__(self) -> str:
        """For the terminal."""
        train = f"train it {self.parent_s:.0f} s, " if self.parent_s else ""
        return "\n".join(
            [
                f"{self.job}: the job is sound",
                f"  model     {self.parameters / 1e6:.2f} M parameters, {self.macs / 1e6:.1f} M MACs",
                f"  space     {self.genes} genes, {_power(self.candidates)} candidates",
                f"  machine   {self.workers} at a time; {self.stations}",
                *(f"  device    {name}: {asked}" for name, asked in self.devices.items()),
                f"  time      about {self.minutes:.1f} min: {train}about {self.trials} trials of {self.trial_s:.0f} s",
                f"  certify   {self.sessions} sessions per finalist and device, at most {self.certify_s:.0f} s of it",
                f"  disk      up to {self.disk_mb:.0f} MB while it runs",
                *(
                    ["  out       holds a run already: resume it, or choose another folder by --out"]
                    if self.held
                    else []
                ),
            ]
        )


def _power(number: int) -> str:
    return str(number) if number < 10**6 else f"about 10^{len(str(number)) - 1}"


def estimate(job: Job, made: Parts | None = None) -> Estimate:
    """Resolve every name, build the parent, load its weights if the job gives some, time a few training steps.

    Raises UserError for what is wrong.
    """
    made = parts(job) if made is None else made
    plan = plan_cores(made.profiles)
    workers = job.search.workers or len(plan.trainers) or os.cpu_count() or 1
    module = made.builder.build({})
    if job.model.weights is not None:
        load_parent(module, Path(job.model.weights))
    macs, parameters = thop_count(module, examples(made.task.input))
    training = Training(module, made.task, epochs=1.0, seed=0)
    with strangers(made.builder.name):
        seconds = step_seconds(training)
    epochs = job.model.epochs if job.model.weights is None else 0.0
    parent_s = seconds * training.steps_per_epoch * epochs
    fidelity = job.search.fidelity
    first = fidelity.rungs[0]
    stopped = 1 - fidelity.keep if first < 1 else 0.0
    share = first * stopped + 1 - stopped
    threads = torch.get_num_threads()
    train_s = seconds * threads * training.steps_per_epoch * fidelity.full_epochs * share * CHILD
    trial_s = train_s + EXPORT_S + STATION_S * len(made.profiles)
    cost = job.search.cost
    # Readings are taken one at a time, and in a quiet phase nobody trains meanwhile.
    one = STATION_S * len(made.profiles)
    pace = max((trial_s - one) / workers + (one if plan.quiet else 0.0), trial_s / workers, one)
    trials = max(1, min(cost.trials, int(cost.minutes * 60 / pace)))
    probe_s = job.search.probe if job.space == auto.NAME else 0.0
    # Goals share the sessions of a finalist that they share, and the first that passes ends it: a half is usual.
    certify_s = SESSION_S * job.search.sessions * FINALISTS * len(made.profiles)
    minutes = (START_S + parent_s + probe_s + trials * pace + FINALS_S + certify_s / 2) / 60
    disk = 1.0 + parameters * 4 / 1e6 * (2 + trials * 2 * CHILD)
    return Estimate(
        job=f"{job.task} · {job.model.builder} · {job.search.searcher}",
        held=began(Path(job.out) / "journal.jsonl"),
        candidates=cardinality(made.space),
        genes=len(made.space.genes),
        parameters=parameters,
        macs=macs,
        parent_s=parent_s,
        trial_s=trial_s,
        workers=workers,
        trials=trials,
        minutes=minutes,
        disk_mb=disk,
        stations=plan.why,
        devices={budget.profile: wish(budget) for budget in made.budgets},
        sessions=job.search.sessions,
        certify_s=certify_s,
    )


def step_seconds(training: Training) -> float:
    """Seconds of one training step, the median of a few after one to warm up."""
    took: list[float] = []
    for target in range(1, STEPS + 2):
        started = time.perf_counter()
        training.run_to(target / training.total)
        took.append(time.perf_counter() - started)
    return sorted(islice(took, 1, None))[STEPS // 2]
