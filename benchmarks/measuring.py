"""Whether two readings of one file agree, whether files are ranked rightly under load, and what that costs.

    python benchmarks/measuring.py --state FOLDER [--apart SECONDS] [--quiet-seconds SECONDS] [--models 30]
                                   [--fit 200] [--json FILE]

Files are those of random policies on CIFAR's ResNet-20 and ResNet-56 (`subjects.py`). Readings under load are a
search's own (`Station.measure`: one second, again if noisy, three times at most; what is noisy still is refused, and
counted in `noisy_pct`), beside torch training loops on every core that the station does not own. The second pass begins
`--apart` seconds after the first, and trainers run all that time. What is true of a file is the mean of two quiet
readings of `--quiet-seconds`, without trainers, each the median of fresh processes.

`repeat_median_pct`, `repeat_p95_pct`: disagreement of the two readings' ratios. `order_pct`: of all pairs of files
whose true ratios differ by 5 % or more, those that a reading under load ranks rightly. `station_s_per_candidate`: mean
seconds that a candidate of 0.7 to 1.4 ms holds the station. `exposed_ms`, `alone_ms`: a file read beside trainers on
all cores without a core of its own, and the same file by the station. `within10_pct`, `rank_corr`: the latency model
on held-out files after 150 readings, the worse of two networks, for which `--fit` files of each are measured;
`kernels_s`: mean seconds of the station for the kernels of a file, of which most are known from others.

Stop it at any time: the same command goes on from the readings in `--state`, and figures are written as they come.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from subjects import ResNet, Subject, file, genotypes, subject

from autocompress import load, surrogate
from autocompress.devices.cores import CorePlan, keep_to, plan_cores
from autocompress.devices.fingerprint import resolve_local
from autocompress.devices.gate import Gate
from autocompress.devices.local import LocalDevice
from autocompress.devices.station import Station
from autocompress.devices.statistics import Window
from autocompress.store import write_atomic
from autocompress.types import Genotype, Profile, Reading, TrialFailure

GOALS = {
    "repeat_median_pct": (2.0, "<"),
    "repeat_p95_pct": (5.0, "<"),
    "order_pct": (99.0, ">"),
    "station_s_per_candidate": (1.5, "<"),
    "within10_pct": (99.0, ">"),
    "rank_corr": (0.98, ">"),
}
PROFILE = "local-1t"
REPEATED = ("resnet20", "resnet56")
MODELLED = ("resnet56", "mobilenetv3s")
APART = 0.05  # true ratios that differ by less are no order to get wrong
SESSION_S = 1.5
ONE_MS = (0.7, 1.4)
EXPOSED_S = 3.0
POOL = 320  # random policies of a network to take files from
FITTED = 167  # readings of which nine tenths are 150
TRIES = 3  # readings of a file before it stays noisy
BATCH = 32


class Log:
    """What was measured, one line each: (phase, network, place) -> record."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "readings.jsonl"
        self.known: dict[tuple[str, str, int], dict[str, Any]] = {}
        if self.path.is_file():
            for line in self.path.read_text().splitlines():
                one = json.loads(line)
                self.known[one["phase"], one["network"], one["place"]] = one

    def add(self, phase: str, network: str, place: int, **said: Any) -> None:
        """Write it at once."""
        one = {"phase": phase, "network": network, "place": place, "at": round(time.time(), 1), **said}
        self.known[phase, network, place] = one
        with self.path.open("a") as lines:
            lines.write(json.dumps(one) + "\n")

    def of(self, phase: str) -> dict[tuple[str, int], dict[str, Any]]:
        """The records of a phase that are no failures."""
        found = {key[1:]: one for key, one in self.known.items() if key[0] == phase}
        return {key: one for key, one in found.items() if "failure" not in one}


class Lab:
    """The networks, their files and the station."""

    def __init__(self, folder: Path) -> None:
        self.profile: Profile = resolve_local(load.profile(PROFILE))
        self.plan: CorePlan = plan_cores([self.profile])
        keep_to(self.plan.trainers)
        self.folder, self.log = folder, Log(folder)
        (folder / "files").mkdir(parents=True, exist_ok=True)
        self.made: dict[str, Subject] = {}
        self.asked: dict[str, tuple[Genotype, ...]] = {}

    def take(self, name: str, count: int, known: Collection[int] | None = None) -> Iterator[tuple[int, bytes, str]]:
        """At most `count` files of a network (place, file, weight-free hash), each graph once; of `known` places."""
        if name not in self.made:
            self.made[name] = subject(name, self.profile)
            write_atomic(self.baseline(name), self.made[name].baseline)
            self.asked[name] = genotypes(self.made[name].space, POOL, seed=1)
        seen: set[str] = set()
        for place, genotype in enumerate(self.asked[name]):
            if len(seen) == count:
                return
            if known is not None and place not in known:
                continue
            try:
                model, key = file(self.made[name], genotype, self.folder / "files")
            except TrialFailure:
                continue
            if key not in seen:
                seen.add(key)
                yield place, model, key

    def baseline(self, name: str) -> Path:
        """Its uncompressed file."""
        return self.folder / f"{name}.onnx"

    @contextmanager
    def station(self, name: str, phase: str) -> Iterator[Station]:
        """With a cache for this phase alone: nothing is recalled from another."""
        made = Station([self.profile], self.plan, self.baseline(name), self.folder / "cache" / phase)
        try:
            yield made
        finally:
            made.close()

    def readings(self, phase: str, name: str, count: int) -> None:
        """Measure the files of a network that have no reading of this phase."""
        list(self.take(name, 1))  # its baseline
        with self.station(name, phase) as station:
            for place, model, key in self.take(name, count):
                if (phase, name, place) not in self.log.known:
                    self._one(station, phase, name, place, model, key)

    def kernels(self, name: str) -> None:
        """Time the kernels of the files of a network that the latency model is held against."""
        list(self.take(name, 1))
        read = [place for (of, place), one in readings(self.log, "fit").items() if of == name and not one.noisy]
        with self.station(name, "kernels") as station:
            for place, model, key in self.take(name, POOL, known=read):
                if ("kernels", name, place) not in self.log.known:
                    began = time.perf_counter()
                    amounts = station.kernels(PROFILE, model, key)
                    self.log.add("kernels", name, place, amounts=amounts, seconds=time.perf_counter() - began)

    def _one(self, station: Station, phase: str, name: str, place: int, model: bytes, key: str) -> None:
        try:
            reading, tries = station.measure(PROFILE, model, key), 1
            while reading.noisy and tries < TRIES:
                reading, tries = station.measure(PROFILE, model, key), tries + 1
        except TrialFailure as failure:
            self.log.add(phase, name, place, failure=str(failure))
            return
        self.log.add(phase, name, place, key=key, tries=tries, reading=reading.model_dump(mode="json"))

    def quiet(self, phase: str, name: str, count: int, seconds: float) -> None:
        """The median ratio of fresh processes for so many seconds."""
        with self.station(name, phase) as station:
            for place, model, _ in self.take(name, count):
                if (phase, name, place) in self.log.known:
                    continue
                began, ratios, ms = time.perf_counter(), [], []
                while time.perf_counter() - began < seconds:
                    reading = station.session(PROFILE, model, SESSION_S)
                    ratios.append(reading.ratio.value)
                    ms.append(reading.ms.value)
                said = {"ratio": statistics.median(ratios), "ms": statistics.median(ms), "sessions": len(ratios)}
                self.log.add(phase, name, place, **said)

    def exposed(self, name: str) -> None:
        """One file, timed beside trainers on all cores and on no core in particular; then by the station."""
        if ("exposed", name, 0) in self.log.known:
            return
        place, model, _ = next(self.take(name, 1))
        path = self.folder / "exposed.onnx"
        write_atomic(path, model)
        every = sorted({*self.plan.station, *self.plan.trainers})
        device = LocalDevice(self.profile)
        try:
            with trainers(every):
                window = Window(path, self.baseline(name))
                files = [self.baseline(name), path]
                window.add(device.time(files, rounds=10**6, seconds=EXPOSED_S, cores=every))
        finally:
            device.close()
        with trainers(self.plan.trainers), self.station(name, "exposed") as station:
            reading = station.session(PROFILE, model, EXPOSED_S)
        times = sorted(window.times_ms[0])
        self.log.add(
            "exposed",
            name,
            place,
            exposed_ms=statistics.median(times),
            mean_ms=statistics.fmean(times),
            alone_ms=reading.ms.value,
        )


@contextmanager
def trainers(cores: Sequence[int]) -> Iterator[None]:
    """One training loop per core, kept to these cores; they end with the block."""
    context = multiprocessing.get_context("spawn")
    begun = [context.Event() for _ in cores]
    running = [context.Process(target=train, args=(tuple(cores), event), daemon=True) for event in begun]
    for one in running:
        one.start()
    try:
        for event in begun:
            if not event.wait(120):
                raise RuntimeError("a trainer did not begin within two minutes")
        yield
    finally:
        for one in running:
            one.kill()
            one.join()


def train(cores: Sequence[int], begun: Any) -> None:
    """Train a ResNet-20 on noise until killed; where a measurement asks for it, pause as a search's trainers do."""
    keep_to(cores)
    torch.set_num_threads(1)
    gate = Gate()
    module = ResNet(20)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    inputs, targets = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
    with gate.working():
        while os.getppid() != 1:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(inputs), targets).backward()
            optimizer.step()
            begun.set()
            gate.step()


# --- figures ------------------------------------------------------------------------------------------------------


def repeatability(log: Log) -> dict[str, float]:
    """Of files that both passes under load read."""
    first, second = (readings(log, phase) for phase in ("load1", "load2"))
    taken = [*first.values(), *second.values()]
    firm = [(one, second[key]) for key, one in first.items() if key in second and not (one.noisy or second[key].noisy)]
    apart = [100 * abs(one.ratio.value / other.ratio.value - 1) for one, other in firm]
    if len(apart) < 2:
        return {}
    found = {
        "repeat_median_pct": statistics.median(apart),
        "repeat_p95_pct": statistics.quantiles(apart, n=20, method="inclusive")[-1],
        "repeat_models": float(len(apart)),
    }
    found["noisy_pct"] = 100 * statistics.fmean(reading.noisy for reading in taken)
    spent = [reading.seconds for reading in taken]
    of_one = [reading.seconds for reading in taken if ONE_MS[0] <= reading.ms.value <= ONE_MS[1]]
    found["station_s_any"] = statistics.fmean(spent)
    return found | ({"station_s_per_candidate": statistics.fmean(of_one)} if of_one else {})


def order(log: Log) -> dict[str, float]:
    """Pairs of files of one network, by each pass under load."""
    quiet = [log.of(phase) for phase in ("quiet1", "quiet2")]
    truth = {key: (quiet[0][key]["ratio"] + quiet[1][key]["ratio"]) / 2 for key in quiet[0] if key in quiet[1]}
    right = pairs = 0
    for phase in ("load1", "load2"):
        read = {key: reading for key, reading in readings(log, phase).items() if not reading.noisy}
        for one, other in combinations(sorted(truth.keys() & read.keys()), 2):
            low, high = sorted((truth[one], truth[other]))
            if one[0] == other[0] and high >= low * (1 + APART):
                pairs += 1
                right += (truth[one] < truth[other]) == (read[one].ratio.value < read[other].ratio.value)
    return {"order_pct": 100 * right / pairs, "order_pairs": float(pairs)} if pairs else {}


def modelled(log: Log) -> dict[str, float]:
    """The latency model by ten-fold cross-validation on firm readings, each network with a model of its own."""
    errors: dict[str, surrogate.Error] = {}
    read, weighed = readings(log, "fit"), log.of("kernels")
    for name in MODELLED:
        both = [key for key, one in read.items() if key[0] == name and key in weighed and not one.noisy]
        known = [surrogate.Known(weighed[key]["amounts"], read[key].ratio.value) for key in both]
        if (error := surrogate.error(known[:FITTED])) is not None:
            errors[name] = error
    if not errors:
        return {}
    found = {"kernels_s": statistics.fmean(one["seconds"] for one in weighed.values())}
    found |= {f"{name}_{key}": value for name, error in errors.items() for key, value in error.model_dump().items()}
    return found | {
        "within10_pct": 100 * min(error.within_tenth for error in errors.values()),
        "rank_corr": min(error.rank for error in errors.values()),
    }


def readings(log: Log, phase: str) -> dict[tuple[str, int], Reading]:
    """Of a phase."""
    return {key: Reading.model_validate(one["reading"]) for key, one in log.of(phase).items()}


def figures(lab: Lab) -> dict[str, float]:
    """All that the readings so far tell."""
    found = repeatability(lab.log) | order(lab.log)
    found |= modelled(lab.log)
    for one in lab.log.of("exposed").values():
        found |= {name: one[name] for name in ("exposed_ms", "alone_ms")}
    return found


def main() -> None:
    """Measure what is missing, write figures as they come."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--state", type=Path, required=True, help="folder of files and readings, to go on from")
    parser.add_argument("--apart", type=float, default=3600.0, help="seconds between the beginnings of two passes")
    parser.add_argument("--quiet-seconds", type=float, default=60.0, help="of one quiet reading")
    parser.add_argument("--models", type=int, default=30, help="files measured twice; 0: the latency model alone")
    parser.add_argument(
        "--fit", type=int, default=200, help="files of each network for the latency model; 0: leave out"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(stderr=True)
    arguments.state.mkdir(parents=True, exist_ok=True)
    lab = Lab(arguments.state)
    said: dict[str, float] = {}

    def tell(stage: str) -> None:
        said.update(figures(lab))
        if arguments.json:
            conditions = {"load": os.getloadavg()[0], "cores": os.cpu_count(), "state": stage}
            options = {"apart_s": arguments.apart, "quiet_seconds": arguments.quiet_seconds, "models": arguments.models}
            write_atomic(arguments.json, (json.dumps({**said, **options, **conditions}, indent=1) + "\n").encode())
        console.print(
            f"{stage}: {json.dumps({name: round(value, 3) for name, value in said.items()})}", highlight=False
        )

    share = {name: arguments.models // len(REPEATED) for name in REPEATED}
    share[REPEATED[-1]] += arguments.models - sum(share.values())
    for name, count in share.items():  # files first: making them is no part of any figure
        list(lab.take(name, count))
    if any(len([key for key in lab.log.of("load2") if key[0] == name]) < count for name, count in share.items()):
        with trainers(lab.plan.trainers):
            for phase in ("load1", "load2"):
                if phase == "load2":
                    begun = min(one["at"] for one in lab.log.of("load1").values())
                    time.sleep(max(0.0, begun + arguments.apart - time.time()))
                for name, count in share.items():
                    lab.readings(phase, name, count)
                tell(f"{phase} is over")
    if arguments.models:
        lab.exposed("resnet56")
    for phase in ("quiet1", "quiet2"):
        for name, count in share.items():
            lab.quiet(phase, name, count, arguments.quiet_seconds)
            tell(f"{phase} of {name}")
    for name in MODELLED if arguments.fit else ():
        lab.readings("fit", name, arguments.fit)
        lab.kernels(name)
        tell(f"files of {name}")
    table = Table("figure", "value", "goal", "", title="Measuring")
    for name, value in said.items():
        goal, sign = GOALS.get(name, (0.0, ""))
        met = "" if not sign else "[green]met[/]" if (value < goal) == (sign == "<") else "[red]missed[/]"
        table.add_row(name, f"{value:.3g}", f"{sign} {goal:g}" if sign else "", met)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
