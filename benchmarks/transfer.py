"""An agent that learned on one network, on the next real ones: ResNet-20, then ResNet-56, then a MobileNet.

    AUTOCOMPRESS_DATA=FOLDER python benchmarks/transfer.py [--trials 24] [--seeds 5] [--state FOLDER] [--json FILE]

`policy_gradient` searches the ResNet-20 once, without a probe; its agent goes on to the ResNet-56, and the one that
comes out of that to a MobileNet on Fashion-MNIST. On both, so many seeds begin with the agent that came along and as
many with a fresh one. A candidate is what a search's first rung makes of it: structure, batch-norm statistics, int8,
its file judged on 2,000 selection images and timed by a station (batch 1, one thread); nothing is trained, so that
hundreds can be evaluated in minutes. Space: blocks, pruning, int8 of `space: auto`. Each candidate is evaluated once
and kept in the state folder; a run that was killed goes on with the same command.

Share of the hypervolume of everything that was evaluated on the network (at least 1.25x faster, at most 30 points
lost): median with its 95 % bootstrap interval. `--json`: per network and arm, trials -> hv_median, hv_ci, hv.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from cifar10 import resnet
from rich.console import Console
from searchers import interval, searched
from table import asked, front, reference, trial
from table_make import PROFILE, Selection, read
from torch import nn
from zoo_search import fashion

from autocompress import auto, export, load, pareto
from autocompress import space as sp
from autocompress.devices.cores import keep_to, plan_cores
from autocompress.devices.fingerprint import resolve_local
from autocompress.devices.station import Station
from autocompress.models.foreign import Foreign
from autocompress.parts import make_ops
from autocompress.pipeline import Work, export_float, release, shape
from autocompress.searchers.policy_gradient import PolicyGradient
from autocompress.store import write_atomic
from autocompress.tasks import Task
from autocompress.types import Facts, Genotype, Space, Trial, TrialFailure

IMAGES = 2000
OPS = ("block", "prune", "quantize")  # what can be judged untrained
NETWORKS = ("resnet20", "resnet56", "mobilenet")
TAUGHT = 120  # trials of the first network's search
DROP = 0.3  # untrained networks lose much
SHOWN = (6, 9, 12, 18, 24)


def network(name: str) -> tuple[nn.Module, Task]:
    """A trained network and its task."""
    if name == "mobilenet":
        told = fashion(selection=IMAGES)
        return told["model"], told["task"]
    return resnet(int(name.removeprefix("resnet"))), Selection()


def prepared(name: str) -> tuple[Work, Space]:
    """What evaluating needs, and the space."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    module, task = network(name)
    builder = Foreign.of(module, task.input)
    profile = resolve_local(load.profile(PROFILE))
    whole = auto.targeted(builder, (profile,))
    gone = {(gene.name, choice) for gene in whole.genes if gene.op not in OPS for choice in gene.choices[1:]}
    work = Work(
        builder=builder,
        task=task,
        ops=make_ops((*OPS, "distill")),
        parent=builder.build({}).eval(),
        profiles=(profile,),
    )
    return work, auto.reduce(whole, gone)


class Maker:
    """One worker's network."""

    own: Maker | None = None

    def __init__(self, name: str) -> None:
        torch.set_num_threads(1)
        self.work, self.space = prepared(name)

    def file(self, genotype: Genotype) -> dict[str, Any]:
        """A genotype's file and its quality, or why there is none."""
        try:
            candidate = sp.decode(self.space, genotype)
            shaped = shape(self.work, candidate)
            (made,) = release(self.work, shaped.plain(self.work), candidate.policy).values()
            quality = self.work.task.quality(export.predictor(made.model), "selection").value.value
        except TrialFailure as failure:
            return {"failed": str(failure)}
        return {"quality": quality, "file": made.model, "key": made.key}


def begin(name: str) -> None:
    """In a worker process, once."""
    Maker.own = Maker(name)


def made(genotype: Genotype) -> dict[str, Any]:
    """In a worker process."""
    assert Maker.own is not None
    return Maker.own.file(genotype)


class Untrained:
    """A real network as a problem (`table.Looked`), evaluated as it is asked; threads may share it."""

    def __init__(self, name: str, folder: Path, workers: int | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.jsonl"
        self.work, self.space = prepared(name)
        (profile,) = self.work.profiles
        baseline = folder / f"{name}.onnx"
        if not baseline.is_file():
            write_atomic(baseline, export.compose(export_float(self.work, self.work.parent)))
        plan = plan_cores(self.work.profiles)
        keep_to(plan.trainers)
        self.station = Station(self.work.profiles, plan, baseline)
        self.device = profile.name
        self.facts = self.known(folder / f"{name}.json", baseline)
        self.goals, self.limit = asked(self.facts, DROP)
        self.rows = {tuple(row["g"]): row for row in read(self.path)}
        self.lock, self.waiting = threading.Lock(), dict[Genotype, threading.Lock]()
        self.workers = workers or max(1, len(plan.trainers))
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(self.workers, mp_context=spawn, initializer=begin, initargs=(name,))

    def known(self, path: Path, baseline: Path) -> Facts:
        """What a search would know beforehand without a probe."""
        if not path.is_file():
            model = baseline.read_bytes()
            facts = Facts(
                sites=self.work.builder.sites(),
                baseline={self.device: self.station.measure(self.device, baseline, seconds=5.0)},
                baseline_quality=self.work.task.quality(export.predictor(model), "selection"),
                baseline_size_mb=len(model) / 1e6,
            )
            write_atomic(path, facts.model_dump_json().encode())
        return Facts.model_validate_json(path.read_bytes())

    def of(self, g: Genotype) -> tuple[float, float] | None:
        """(quality, latency over the network's own) of a genotype, evaluated once; None of one that failed."""
        with self.lock:
            waiting = self.waiting.setdefault(g, threading.Lock())
        with waiting:
            if g not in self.rows:
                row = self.evaluated(g)
                with self.lock, self.path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                    self.rows[g] = row
        row = self.rows[g]
        return None if "failed" in row else (row["quality"], row["ratio"])

    def evaluated(self, g: Genotype) -> dict[str, Any]:
        """One row."""
        found = self.pool.submit(made, g).result()
        if "failed" in found:
            return {"g": g, **found}
        try:
            reading = self.station.measure(self.device, found["file"], found["key"])
        except TrialFailure as failure:
            return {"g": g, "failed": str(failure)}
        return {"g": g, "quality": found["quality"], "ratio": reading.ratio.value, "noisy": reading.noisy}

    def trial(self, number: int, g: Genotype, note: dict[str, object] | None = None) -> Trial:
        """See `table.trial`."""
        return trial(self, number, g, note)

    def shares(self, told: list[Trial]) -> list[float]:
        """Share of the hypervolume of everything that was evaluated, after each trial."""
        every = [None if "failed" in row else (row["quality"], row["ratio"]) for row in self.rows.values()]
        total = pareto.hypervolume(front(self, every), reference(self))
        points = [self.of(one.genotype) for one in told]
        return [
            pareto.hypervolume(front(self, points[:count]), reference(self)) / total
            for count in range(1, len(points) + 1)
        ]

    def close(self) -> None:
        """End the worker processes and the station."""
        self.pool.shutdown(cancel_futures=True)
        self.station.close()


def run(problem: Untrained, agent: str, seed: int, trials: int, keep: Path) -> list[Trial]:
    """One search, its agent left in a folder."""
    makers: list[PolicyGradient] = []

    def make(*given: Any) -> PolicyGradient:
        makers.append(PolicyGradient(*given, agent=agent))
        return makers[-1]

    told, _ = searched(make, problem, seed, trials)
    keep.mkdir(parents=True, exist_ok=True)
    makers[0].save(keep)
    return told


def compared(problem: Untrained, agent: str, options: argparse.Namespace, keep: Path) -> dict[str, list[list[float]]]:
    """Curves of all seeds by arm."""
    arms = {"moved": agent, "fresh": ""}
    with ThreadPoolExecutor(problem.workers) as threads:
        waits = {
            (arm, seed): threads.submit(run, problem, given, seed, options.trials, keep / f"{arm}-{seed}")
            for seed in range(options.seeds)
            for arm, given in arms.items()
        }
        told = {key: wait.result() for key, wait in waits.items()}
    return {arm: [problem.shares(told[arm, seed]) for seed in range(options.seeds)] for arm in arms}


def main() -> None:
    """One network after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, help="processes; default: all cores that are not the station's")
    parser.add_argument("--state", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(emoji=False)
    told: dict[str, Any] = {}
    agent = ""
    for name in NETWORKS:
        keep_to(range(os.cpu_count() or 1))
        problem = Untrained(name, options.state, options.workers)
        try:
            if not agent:
                agent = str(options.state / name)
                run(problem, "", 0, TAUGHT, Path(agent))
                console.print(f"{name}: {TAUGHT} trials, {len(problem.space.genes)} genes", highlight=False)
                continue
            curves = compared(problem, agent, options, options.state / name)
        finally:
            problem.close()
        agent = str(options.state / name / "moved-0")
        console.print(f"{name}: {options.seeds} seeds, {len(problem.space.genes)} genes", highlight=False)
        told[name] = {}
        for arm, every in curves.items():
            told[name][arm] = {}
            for count in sorted({*(n for n in SHOWN if n <= options.trials), options.trials}):
                values = [one[count - 1] for one in every]
                low, high = interval(values)
                middle = statistics.median(values)
                told[name][arm][count] = {"hv_median": middle, "hv_ci": [low, high], "hv": values}
                console.print(f"  {arm} {count:>3} trials {middle:.3f} ({low:.3f} to {high:.3f})", highlight=False)
    if options.json:
        options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
