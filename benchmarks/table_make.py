"""Makes the frozen table that `searchers.py` looks real evaluations up in: all 2,916 candidates of `table.yaml`.

    AUTOCOMPRESS_DATA=FOLDER python benchmarks/table_make.py [--state FOLDER] [--out FILE] [--workers N] [--longer 100]

Every candidate of a small ResNet-20 space as a search would evaluate it: enacted, taught for 150 steps by the trained
network on CIFAR-10 (JPEG copy), exported, its file judged on 2,000 selection images and timed by a station at batch 1
and one thread. Numbers are formed after training, so the four files of one structure share theirs. What was noisy, or
read while the machine was slow, is timed again while nothing trains. Then the probe, and so many structures again at
ten times the steps. The order is drawn by a fixed seed: what there is of a table that was
cut short is a random sample. A run that was killed goes on with the same command.

The file (gzip, JSON): space, facts (with the probe), steps, images, seconds (of one evaluation, of the probe), rows of
[genotype as digits, quality, milliseconds, ratio, megabytes], failed genotypes, longer of [genotype, quality].
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import random
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cifar10 import Cifar, resnet
from numpy.typing import NDArray
from oneshot import OPS
from rich.console import Console
from scipy.stats import spearmanr
from torch import Tensor, nn

from autocompress import export, load
from autocompress import space as sp
from autocompress.devices.cores import keep_to, plan_cores
from autocompress.devices.fingerprint import resolve_local
from autocompress.devices.gate import Gate
from autocompress.devices.station import Station
from autocompress.devices.statistics import SLOW
from autocompress.models.foreign import Foreign
from autocompress.parts import make_ops
from autocompress.pipeline import Work, export_float, finish, shape, training
from autocompress.probe import probe
from autocompress.store import write_atomic
from autocompress.tasks.recipe import recipe, steps
from autocompress.types import Budget, Facts, Genotype, Space, TrialFailure

HERE = Path(__file__).parent
SEED, STEPS, IMAGES, LONGER = 0, 150, 2000, 10
PROFILE = "local-1t"
PROBE_S = 120.0
ROUNDS = 3  # of timing again
NUMBERS = 2  # genes of the space that say numbers, its last: files of one structure differ by them alone


class Selection(Cifar):
    """CIFAR-10 whose selection split is its first `IMAGES`; batches of 32, so that 3,000 candidates are hours."""

    training = {**Cifar.training, "batch": 32}

    def arrays(self, split: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Pixels and labels of a split."""
        images, labels = super().arrays(split)
        return (images[:IMAGES], labels[:IMAGES]) if split == "selection" else (images, labels)


class Heard(nn.Module):
    """A teacher that remembers: all candidates see the same batches, so it answers each of them once a process."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher
        self.answers: dict[int, Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, 10) of normalised images (n, 3, 32, 32)."""
        key = hash(images.numpy().tobytes())
        if key not in self.answers:
            self.answers[key] = self.teacher(images)
        return self.answers[key]


def prepared() -> tuple[Work, Space]:
    """What evaluating needs, and the space."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    task = Selection()
    builder = Foreign.of(resnet(20), task.input)
    work = Work(
        builder=builder,
        task=task,
        ops=make_ops(OPS),
        parent=builder.build({}).eval(),
        profiles=(resolve_local(load.profile(PROFILE)),),
        epochs=STEPS / steps(task, "train", recipe(task).batch),
        gate=Gate(),
    )
    return work, load.space(HERE / "table.yaml", builder)


class Maker:
    """One worker's network and teacher."""

    own: Maker | None = None

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.work, self.space = prepared()
        self.heard = replace(self.work, parent=Heard(self.work.parent).eval())

    def files(self, structure: Genotype, kinds: Sequence[Genotype], longer: int) -> list[dict[str, Any]]:
        """The rows of a structure's files of these kinds, and the files: taught for so many times the steps.

        Not at all for 0: then they can be timed, which does not depend on weights.
        """
        with self.work.gate.working():
            began = time.perf_counter()
            try:
                candidate = sp.decode(self.space, (*structure, *kinds[0]))
                torch.manual_seed(SEED)
                shaped = shape(self.work, candidate)
                if longer:
                    taught = replace(self.heard, epochs=self.work.epochs * longer)
                    training(taught, shaped, candidate.policy, SEED).run_to(1.0)
                exported = export_float(self.work, shaped.settle(self.work).module)
            except TrialFailure as failure:
                return [{"g": [*structure, *kind], "failed": str(failure)} for kind in kinds]
            trained = time.perf_counter() - began
            rows: list[dict[str, Any]] = []
            for kind in kinds:
                began = time.perf_counter()
                genotype = (*structure, *kind)
                policy = sp.decode(self.space, genotype).policy
                made = finish(self.work, exported, policy, self.work.profiles[0], self.work.task)
                row: dict[str, Any] = {"g": genotype, "mb": made.size_mb, "file": made.model, "key": made.key}
                if longer:
                    predict = export.predictor(made.model)
                    row["quality"] = self.work.task.quality(predict, "selection").value.value
                rows.append({**row, "s": trained + time.perf_counter() - began})
            return rows


def begin() -> None:
    """In a worker process, once."""
    Maker.own = Maker()


def made(structure: Genotype, kinds: Sequence[Genotype], longer: int) -> list[dict[str, Any]]:
    """In a worker process."""
    assert Maker.own is not None
    return Maker.own.files(structure, kinds, longer)


def _every(sizes: Sequence[int]) -> tuple[Genotype, ...]:
    """All tuples below some sizes."""
    found: tuple[Genotype, ...] = ((),)
    for size in sizes:
        found = tuple((*one, value) for one in found for value in range(size))
    return found


KINDS = _every((2,) * NUMBERS)
INTEGERS = (1,) * NUMBERS  # the kind that is taught for longer too


def structures(space: Space) -> list[Genotype]:
    """Every structure once, in the order in which they are made."""
    found = sorted({g[:-NUMBERS] for g in sp.every(space)})
    random.Random(SEED).shuffle(found)
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """The rows that are there; the last line may have been cut off."""
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class Table:
    """What is there of the table, in a folder."""

    def __init__(self, folder: Path, workers: int | None, console: Console) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.console = folder, console
        self.work, self.space = prepared()
        self.profile = self.work.profiles[0]
        self.baseline = folder / "baseline.onnx"
        if not self.baseline.is_file():
            write_atomic(self.baseline, export.compose(export_float(self.work, self.work.parent)))
        plan = plan_cores(self.work.profiles)
        keep_to(plan.trainers)
        self.workers = workers or max(1, len(plan.trainers))
        self.station = Station(self.work.profiles, plan, self.baseline)

    def known(self) -> dict[Genotype, dict[str, Any]]:
        """Rows by genotype; of several the last counts."""
        return {tuple(row["g"]): row for row in read(self.folder / "rows.jsonl")}

    def add(self, row: dict[str, Any]) -> None:
        """A row more."""
        with (self.folder / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Make what is missing, time again what was disturbed; all of it."""
        there = self.known()
        left = [one for one in structures(self.space) if (*one, *INTEGERS) not in there]
        self.console.print(f"{len(there)} of {sp.cardinality(self.space)} candidates are there", highlight=False)
        for count, rows in enumerate(self.evaluated(dict.fromkeys(left, KINDS), 1), start=1):
            for row in rows:
                self.add(self.timed(row))
            if count % 20 == 0:
                self.console.print(f"{count} of {len(left)} structures", highlight=False)
        for _ in range(ROUNDS):
            if not (again := self.disturbed()):
                break
            self.console.print(f"{sum(map(len, again.values()))} files are timed again", highlight=False)
            known = self.known()
            for rows in self.evaluated(again, 0):
                for row in map(self.timed, rows):
                    before = known[tuple(row["g"])]
                    self.add(before if "failed" in row else {**before, **row, "s": before["s"]})
        return list(self.known().values())

    def disturbed(self) -> dict[Genotype, list[Genotype]]:
        """Structure -> kinds of what was noisy, or read beside a baseline that was slower than at its fastest."""
        good = {g: row for g, row in self.known().items() if "failed" not in row}
        fastest = min(row["ms"] / row["ratio"] for row in good.values())
        found: dict[Genotype, list[Genotype]] = {}
        for g, row in good.items():
            if row["noisy"] or row["ms"] / row["ratio"] > (1 + SLOW) * fastest:
                found.setdefault(g[:-NUMBERS], []).append(g[-NUMBERS:])
        return found

    def longer(self, count: int) -> list[dict[str, Any]]:
        """So many structures in integers at ten times the steps."""
        path = self.folder / "longer.jsonl"
        there = {tuple(row["g"]) for row in read(path)}
        left = [one for one in structures(self.space)[:count] if (*one, *INTEGERS) not in there]
        for rows in self.evaluated(dict.fromkeys(left, (INTEGERS,)), LONGER):
            with path.open("a") as file:
                for row in rows:
                    file.write(json.dumps({key: row[key] for key in ("g", "quality", "s") if key in row}) + "\n")
        return [row for row in read(path) if "quality" in row]

    def evaluated(self, left: Mapping[Genotype, Sequence[Genotype]], longer: int) -> Iterator[list[dict[str, Any]]]:
        """Rows of each structure as they come."""
        if not left:
            return
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.workers, mp_context=spawn, initializer=begin) as pool:
            try:
                for done in as_completed([pool.submit(made, *one, longer) for one in left.items()]):
                    yield done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def timed(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row with its reading in place of its file."""
        if "failed" in row:
            return row
        try:
            reading = self.station.measure(self.profile.name, row["file"], row["key"])
        except TrialFailure as failure:
            return {"g": row["g"], "failed": str(failure)}
        kept = {key: row[key] for key in ("g", "quality", "mb") if key in row}
        return {
            **kept,
            "ms": reading.ms.value,
            "ratio": reading.ratio.value,
            "noisy": reading.noisy,
            "s": round(row["s"] + reading.seconds, 2),
        }

    def facts(self) -> tuple[Facts, float]:
        """What a search would know beforehand, and how long its probe took."""
        path = self.folder / "facts.json"
        if not path.is_file():
            model = self.baseline.read_bytes()
            facts = Facts(
                sites=self.work.builder.sites(),
                baseline={self.profile.name: self.station.measure(self.profile.name, self.baseline, seconds=5.0)},
                baseline_quality=self.work.task.quality(export.predictor(model), "selection"),
                baseline_size_mb=len(model) / 1e6,
            )
            budgets = (Budget(profile=self.profile.name, speedup=1.25),)
            found = probe(self.work, self.space, facts, budgets, seconds=PROBE_S)
            told = {"facts": facts.model_copy(update=found.facts).model_dump(mode="json"), "seconds": found.seconds}
            write_atomic(path, json.dumps(told).encode())
        told = json.loads(path.read_bytes())
        return Facts.model_validate(told["facts"]), float(told["seconds"])

    def write(self, out: Path, longer: int) -> None:
        """The table, from what there is."""
        facts, probed = self.facts()
        rows = self.rows()
        repeated = self.longer(longer)
        good = {tuple(row["g"]): row for row in rows if "failed" not in row}
        pairs = [(good[g]["quality"], row["quality"]) for row in repeated if (g := tuple(row["g"])) in good]
        agreement: Any = spearmanr([a for a, _ in pairs], [b for _, b in pairs]) if len(pairs) > 2 else (None,)
        told = {
            "space": self.space.model_dump(mode="json"),
            "facts": facts.model_dump(mode="json"),
            "steps": STEPS,
            "images": IMAGES,
            "seconds": {"evaluation": statistics.fmean(row["s"] for row in good.values()), "probe": probed},
            "rows": [
                ["".join(map(str, g)), row["quality"], round(row["ms"], 5), round(row["ratio"], 5), round(row["mb"], 5)]
                for g, row in sorted(good.items())
            ],
            "failed": sorted("".join(map(str, row["g"])) for row in rows if "failed" in row),
            "longer": [["".join(map(str, row["g"])), row["quality"]] for row in repeated],
            "rank_correlation": None if agreement[0] is None else float(agreement[0]),
        }
        out.write_bytes(gzip.compress(json.dumps(told).encode(), mtime=0))
        noisy = sum(bool(row["noisy"]) for row in good.values())
        self.console.print(
            f"{out}: {len(good)} candidates, {len(told['failed'])} failed, {noisy} readings noisy, "
            f"{told['seconds']['evaluation']:.1f} s each, {len(pairs)} at {LONGER} times the steps: rank correlation "
            f"{told['rank_correlation'] or float('nan'):.3f}, {out.stat().st_size / 1e6:.2f} MB",
            highlight=False,
        )


def main() -> None:
    """Go on, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=Path("runs/table"))
    parser.add_argument("--out", type=Path, default=HERE / "table.json.gz")
    parser.add_argument("--workers", type=int, help="processes; default: all cores that are not the station's")
    parser.add_argument("--longer", type=int, default=100, help="structures taught for ten times the steps")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    table = Table(asked.state, asked.workers, Console(emoji=False))
    try:
        table.write(asked.out, asked.longer)
    finally:
        table.station.close()


if __name__ == "__main__":
    main()
