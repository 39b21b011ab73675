"""The headline: a trained CIFAR ResNet made several times faster at half a point lost, beside what others would do.

    AUTOCOMPRESS_DATA=FOLDER python benchmarks/cifar.py [--network resnet56] [--minutes 90] [--arms all] [--json FILE]

One joint search through the public `autocompress.search`, its final training included in the minutes; then the arms at
the same minutes on the same cores: `int8` (one-shot, nothing trained), `blocks` (kept evenly by hand, distilled, int8
with weights of the last stage in four bits), `torch-pruning` (half of the inner channels by hand, distillation, int8),
`random` (the same search by random proposals), `resnet20` (the smaller published network in int8, as it is),
`resnet20-distilled` (taught by the ResNet-56 for as long) and `finetuned` (the unmodified network, taught by itself for
as long, int8).

Data and protocol are those of `cifar10.py`: quality of the ONNX file on test images 5000-9999, read once, drops as
paired differences to fp32 with 95 % intervals; selection on 1000-4999. Latency: batch 1, one thread, a core of its own,
in turn with the fp32 file. A run that was killed goes on where it was with the same command; what is done is not done
again. `--also PROFILE=SPEEDUP` asks for another device in the same search; the arms are timed on the first alone.

`--json` keys: network, speedup, speedup_ci, drop, drop_ci, size_ratio (times smaller), minutes, certified, front
(qualities on the selection part), goals (what was found for each device and for all at once), arms.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cifar10 import Cifar, resnet
from oneshot import Bench, everywhere, pruned_by_hand
from rich.console import Console
from rich.table import Table
from torch import nn

import autocompress
from autocompress import journal
from autocompress.auto import TAUGHT
from autocompress.devices.cores import at_large, keep_to, plan_cores
from autocompress.models.foreign import Foreign
from autocompress.pipeline import Shaped, release, shape, training, weights_of
from autocompress.store import write_atomic
from autocompress.summary import Summary, Winner
from autocompress.train import Training, reestimate_batchnorm
from autocompress.types import Candidate, Policy, Rule

PROFILE = "local-1t"
DEPTHS = {"resnet56": 56, "resnet20": 20}
ARMS = {
    "resnet56": ("int8", "blocks", "torch-pruning", "random", "resnet20", "resnet20-distilled", "finetuned"),
    "resnet20": ("int8", "blocks", "torch-pruning", "random", "finetuned"),
}
KEPT = {"resnet56": (3, 5, 6), "resnet20": (2, 3, 3)}  # blocks of each stage by hand
RESERVE = 5.0  # of the minutes: start, probe, certificates
EPOCHS = 200.0  # more than any time here allows: a training goes as far along as its minutes reach
RUNGS = (0.001, 1.0)  # a fifth of an epoch; the rest is for the best few
FINAL = 0.8  # of the search's minutes
OPS = ("block", "quantize")  # of 16 to 64 channels few can go: earlier searches won nothing by width, form or rank
MARK_S = 120.0  # a training arm is saved at least so often
SLACK = 0.97
FINE = 1 / 8  # of the rate, where the network is the trained one itself


class Headline(Bench):
    """The bench of one network, and what its arms share."""

    def __init__(self, asked: argparse.Namespace, console: Console) -> None:
        super().__init__(asked.network, resnet(DEPTHS[asked.network]), EPOCHS, Cifar(), console, seed=asked.seed)
        self.asked = asked
        self.threads = asked.threads or os.cpu_count() or 1  # nothing is measured while an arm trains
        self.out: Path = asked.out / asked.network

    def search(self, searcher: str) -> tuple[bytes | None, dict[str, Any]]:
        """The joint search, or what was left of it; its winner's file, else the closest one's, if one was trained."""
        out = self.out / f"search-{searcher}"
        summary = out / "summary.json"
        told = out / "minutes.json"
        if not (summary.is_file() and json.loads(summary.read_bytes())["state"] == "finished" and told.is_file()):
            before = _elapsed(out / "journal.jsonl")
            started = time.monotonic()
            self.go(searcher, out, begun=before is not None)
            minutes = (time.monotonic() - started) / 60 + (before or 0.0)
            write_atomic(told, json.dumps(minutes).encode())
        found = Summary.model_validate_json(summary.read_bytes())
        if found.state != "finished":
            raise SystemExit(f"{out}: the search was interrupted; the same command goes on")
        every = found.closest | found.winners
        winner = every.get(PROFILE) or next(iter(every.values()))
        model = (out / winner.path / "model.onnx").read_bytes() if winner.path else None
        facts = {
            "minutes": round(json.loads(told.read_bytes()), 1),
            "certified": winner.certified,
            "trials": found.trials,
            "counts": found.counts,
            "policy": winner.policy,
            "reason": winner.reason,
            "front": front(out / "front.csv"),
            "goals": {name: goal(one) for name, one in every.items()},
            "stages": found.seconds,
        }
        return model, facts

    def go(self, searcher: str, out: Path, *, begun: bool) -> None:
        """Start a search, or go on with it."""
        keep_to(range(os.cpu_count() or 1))  # the bench's own station rests meanwhile: all cores are the search's
        module = resnet(DEPTHS[self.asked.network])
        if begun:
            autocompress.resume(out, task=self.task, builder=module, console=self.console)
            return
        size = self.baseline.stat().st_size / 1e6 / self.asked.smaller
        autocompress.search(
            module,
            self.task,
            devices=[
                {"profile": name, "speedup": speedup, "size_mb": round(size, 4)}
                for name, speedup in ((PROFILE, self.asked.speedup), *self.asked.also)
            ],
            # a standard error of the paired difference on 4,000 images is kept in hand
            quality={"max_drop": round(max(0.0005, (self.asked.drop - 0.3) / 100), 5)},
            searcher=searcher,
            seed=self.asked.seed,
            trials=10_000,
            minutes=max(1.0, self.asked.minutes * (1 - self.asked.elastic) - RESERVE),
            final=FINAL,
            fidelity={"full_epochs": EPOCHS, "rungs": RUNGS, "keep": 0.25},
            probe=120.0,
            elastic=self.asked.elastic * self.asked.minutes,
            ops=self.asked.ops,
            workers=self.asked.workers,
            out=out,
            console=self.console,
        )

    def trained(self, name: str, make: Callable[[float], Training]) -> Training:
        """Trained for as many minutes as a search has, saved on the way; `make` begins a training of so many epochs."""
        kept, plan = self.out / f"{name}.state", self.out / f"{name}.plan"
        torch.set_num_threads(self.threads)
        with at_large(plan_cores((self.profile,)), self.threads):
            if not plan.is_file():
                trial = make(1.0)
                trial.run_to(12 / trial.total)
                seconds = trial.run_to(36 / trial.total)["seconds"] / 24 * trial.steps_per_epoch
                write_atomic(plan, json.dumps(SLACK * self.asked.minutes * 60 / seconds).encode())
            epochs = float(json.loads(plan.read_bytes()))
            self.console.print(f"{name}: {epochs:.1f} epochs", highlight=False)
            made = make(epochs)
            if kept.is_file():
                made.load(kept.read_bytes())
            pieces = max(1, round(self.asked.minutes * 60 / MARK_S))
            for piece in range(1, pieces + 1):
                made.run_to(piece / pieces)
                write_atomic(kept, made.state())
        torch.set_num_threads(1)
        return made

    def taught(self, name: str, module: nn.Module, *, lr: float | None = None) -> bytes:
        """A network trained by the recipe, then int8."""

        def make(epochs: float) -> Training:
            return Training(
                copy.deepcopy(module),
                self.task,
                epochs=epochs,
                seed=self.seed,
                teacher=self.work.parent,
                lr=lr,
                **TAUGHT,  # pyright: ignore[reportArgumentType]
            )

        made = self.trained(name, make).module.eval()
        write_atomic(self.out / f"{name}.safetensors", weights_of(made))
        return self.integers(made)

    def blocks(self) -> bytes:
        """Blocks kept evenly by hand, most where they are fastest in int8; the last stage's weights in four bits."""
        sites = self.builder.sites()
        stages: dict[str, list[str]] = {}
        for site in sites:
            if site.kind == "block":
                stages.setdefault(site.name.partition(".")[0], []).append(site.name)
        rules = [*everywhere("quantize", sites, bits="int8"), Rule(site=".", op="distill", settings=dict(TAUGHT))]
        for names, count in zip(stages.values(), KEPT[self.asked.network], strict=True):
            kept = {names[round(n * len(names) / count)] for n in range(count)}
            rules += [Rule(site=name, op="block", settings={"kind": "drop"}) for name in names if name not in kept]
        rules.append(Rule(site=list(stages)[-1], op="quantize", settings={"weights": "int4"}))
        policy = Policy(rules=tuple(rules))
        shaped: list[Shaped] = []

        def make(epochs: float) -> Training:
            shaped.append(shape(self.work, Candidate(arch={}, policy=policy)))
            return training(replace(self.work, epochs=epochs), shaped[-1], policy, self.seed)

        self.trained("blocks", make)
        settled = shaped[-1].settle(self.work)
        (done,) = release(self.work, settled.module, policy, learned=settled.ranges()).values()
        return done.model

    def integers(self, module: nn.Module) -> bytes:
        """Our int8 at every site, whatever network it is."""
        sites = Foreign.of(module, self.task.input).sites()
        policy = Policy(rules=tuple(everywhere("quantize", sites, bits="int8")))
        (done,) = release(self.work, module, policy).values()
        return done.model

    def arm(self, name: str) -> tuple[bytes | None, dict[str, Any]]:
        """The file of an arm, and what else there is to say of it."""
        if name == "random":
            return self.search("random")
        if name == "int8":
            return self.integers(self.work.parent), {}
        if name == "blocks":
            return self.blocks(), {}
        if name == "resnet20":
            return self.integers(resnet(20).eval()), {}
        if name == "resnet20-distilled":
            return self.taught(name, resnet(20)), {}
        if name == "finetuned":
            return self.taught(name, resnet(DEPTHS[self.asked.network]), lr=FINE * Cifar.training["lr"]), {}
        module = pruned_by_hand(resnet(DEPTHS[self.asked.network]).eval())
        reestimate_batchnorm(module, self.task, 8)
        return self.taught(name, module), {}

    def done(self, name: str, make: Callable[[], tuple[bytes | None, dict[str, Any]]]) -> dict[str, Any]:
        """A row of the table: read where it was made before. Without quality where a search has trained nothing."""
        path = self.out / f"{name}.json"
        if path.is_file():
            return json.loads(path.read_bytes())
        started = time.monotonic()
        model, facts = make()
        if model is None:
            row = {"network": self.name, "arm": name, "seconds": round(time.monotonic() - started, 1), **facts}
        else:
            write_atomic(self.out / f"{name}.onnx", model)
            row = {**self.row(name, model, time.monotonic() - started), **facts}
        write_atomic(path, json.dumps(row, indent=1).encode())
        return row


def goal(winner: Winner) -> dict[str, Any]:
    """What was found for one goal, on each of its devices."""
    return {
        "certified": winner.certified,
        "reason": winner.reason,
        "policy": winner.policy,
        "drop": None if winner.drop is None else 100 * winner.drop,
        "size_ratio": winner.size_ratio,
        "devices": {
            name: {
                "ms": one.ms.value,
                "speedup": one.speedup.value,
                "speedup_ci": [one.speedup.low, one.speedup.high],
                "batch": one.batch,
                "drop_ci": None if one.drop_test is None else [100 * one.drop_test.low, 100 * one.drop_test.high],
            }
            for name, one in winner.devices.items()
        },
    }


def front(path: Path) -> list[dict[str, Any]]:
    """The trade-off of the fully trained trials as the search saw it: selection part, one reading each."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["front"]]
    keys = ("quality", "drop", "speedup", "size_mb")
    return [
        {"number": int(row["number"]), **{key: float(row[key]) for key in keys if row.get(key)}, "split": "selection"}
        for row in rows
    ]


def device(text: str) -> tuple[str, float]:
    """A profile and the speedup that is asked there."""
    name, _, speedup = text.partition("=")
    return name, float(speedup)


def _elapsed(path: Path) -> float | None:
    """Minutes that an earlier start of this search took; None where there was none."""
    if not journal.began(path):
        return None
    return max((float(event.get("at", 0.0)) for event in journal.read(path).events), default=0.0) / 60


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=tuple(DEPTHS), default="resnet56")
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--arms", default="all", help="names by commas, `all` or `none`")
    parser.add_argument("--searcher", default="evolution", help="`none` for the arms alone")
    parser.add_argument("--speedup", type=float, default=5.0, help="the budget: times faster than fp32")
    parser.add_argument("--smaller", type=float, default=10.0, help="the budget: times smaller than the fp32 file")
    parser.add_argument("--also", type=device, action="append", default=[], metavar="PROFILE=SPEEDUP")
    parser.add_argument("--drop", type=float, default=0.5, help="points that may be lost")
    parser.add_argument("--elastic", type=float, default=0.0, help="share of the minutes for an elastic parent")
    parser.add_argument("--workers", type=int, help="trials at once; default: all cores that are not the station's")
    parser.add_argument("--threads", type=int, help="of trained arms; 1 on a machine that others use")
    parser.add_argument("--ops", type=lambda text: tuple(filter(None, text.split(","))), default=OPS, help="'' for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar"))
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    known = {"all": ARMS[asked.network], "none": ()}
    names = known[asked.arms] if asked.arms in known else tuple(filter(None, asked.arms.split(",")))
    for name in names:
        if name not in ARMS[asked.network]:
            parser.error(f"--arms {name}: there are {', '.join(ARMS[asked.network])}")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    console = Console(emoji=False)
    bench = Headline(asked, console)
    bench.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    ours: dict[str, Any] | None = None
    try:
        if asked.searcher != "none":
            ours = bench.done(f"ours-{asked.searcher}", lambda: bench.search(asked.searcher))
            write(asked, ours, rows)
        for name in names:
            rows.append(bench.done(name, lambda name=name: bench.arm(name)))
            write(asked, ours, rows)
    finally:
        bench.close()
    view = Table("arm", "quality", "points lost", "times smaller", "times faster", "minutes")
    for row in ([ours] if ours else []) + rows:
        minutes = f"{row.get('minutes', row['seconds'] / 60):.1f}"
        if "quality" not in row:
            view.add_row(row["arm"], f"none of {row['trials']} candidates came to training", "", "", "", minutes)
            continue
        view.add_row(
            row["arm"],
            f"{row['quality']:.4f}",
            f"{row['drop']:+.2f} [{row['drop_low']:+.2f}, {row['drop_high']:+.2f}]",
            f"{1 / row['size_ratio']:.1f}",
            f"{row['speedup']:.2f} [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]",
            minutes,
        )
    console.print(view)
    several = ours["goals"] if ours and len(ours["goals"]) > 1 else {}
    for name, one in several.items():
        told = ", ".join(f"{key} {found['speedup']:.2f}x" for key, found in one["devices"].items())
        lost = "-" if one["drop"] is None else f"{one['drop']:+.2f}"
        console.print(f"{name}: {told}, {lost} points lost, {one['size_ratio']:.1f} times smaller", highlight=False)


def write(asked: argparse.Namespace, ours: dict[str, Any] | None, rows: list[dict[str, Any]]) -> None:
    """What is known so far, for `--json`."""
    if asked.json is None:
        return
    found: dict[str, Any] = {}
    if ours is not None:
        found = {key: ours[key] for key in ("minutes", "certified", "front", "goals")} | {"ours": ours}
    if ours is not None and "quality" in ours:
        found |= {
            "speedup": ours["speedup"],
            "speedup_ci": [ours["speedup_low"], ours["speedup_high"]],
            "drop": ours["drop"],
            "drop_ci": [ours["drop_low"], ours["drop_high"]],
            "size_ratio": 1 / ours["size_ratio"],
        }
    told = {
        "network": asked.network,
        **found,
        "arms": rows,
        "seed": asked.seed,
        "asked": {"minutes": asked.minutes, "speedup": asked.speedup, "smaller": asked.smaller, "drop": asked.drop},
    }
    asked.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
