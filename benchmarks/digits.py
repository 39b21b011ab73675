"""The demo over seeds: parent, both budgets of 3x met, quality lost on the test images, beside two control arms.

    python benchmarks/digits.py [--seeds 10] [--quick] [--json FILE]

Arms at the same trial settings: `search` (the job of examples/digits.yaml), `int8 alone` (the parent in int8, nothing
else done), `uniform prune + int8` (the same ratio at every prunable site, int8 everywhere, the same fine-tuning; of the
ratios tried the gentlest that meets both budgets, else the fastest). Latency: this host, interleaved with the baseline.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from autocompress import load
from autocompress.devices.cores import plan_cores
from autocompress.devices.station import Station
from autocompress.parent import load_parent
from autocompress.parts import Parts, parts
from autocompress.pipeline import qualities, release, shape, training
from autocompress.run import run
from autocompress.summary import Summary
from autocompress.types import Candidate, Policy, Rule
from autocompress.worker import make_work

JOB = Path(__file__).resolve().parent.parent / "examples" / "digits.yaml"
RATIOS = (0.25, 0.5, 0.625, 0.75)


def uniform(made: Parts, out: Path) -> dict[str, Any]:
    """Uniform pruning and int8, fine-tuned with distillation like a candidate of the search."""
    parent = load_parent(made.builder.build({}), out / "baseline" / "weights.safetensors")
    work = make_work(made, parent)
    sites = made.builder.sites()
    station = Station(made.profiles, plan_cores(made.profiles), out / "baseline" / "model.onnx")
    best: dict[str, Any] = {}
    try:
        for ratio in RATIOS:
            rules = [Rule(site=s.name, op="prune", settings={"ratio": ratio}) for s in sites if "prune" in s.ops]
            rules += [Rule(site=s.name, op="quantize", settings={"bits": "int8"}) for s in sites if "quantize" in s.ops]
            rules.append(Rule(site=".", op="distill", settings={"weight": 0.5, "temperature": 2.0}))
            candidate = Candidate(arch={}, policy=Policy(rules=tuple(rules)))
            torch.manual_seed(made.job.search.seed)
            shaped = shape(work, candidate)
            training(work, shaped, candidate.policy, made.job.search.seed).run_to(1.0)
            files = release(work, shaped.module, candidate.policy)
            readings = {
                p.name: station.measure(p.name, files[p.numeric.variant].model, files[p.numeric.variant].key)
                for p in made.profiles
            }
            test = qualities(work, files, "test")
            best = {
                "ratio": ratio,
                "quality": min(q.value.value for q in test.values()),
                "speedup": {name: reading.speedup for name, reading in readings.items()},
            }
            if all(1 / r.ratio.high >= (b.speedup or 0) for b in made.budgets for r in [readings[b.profile]]):
                break
    finally:
        station.close()
    return best


def row(seed: int, found: Summary, minutes: float, plain: dict[str, Any]) -> dict[str, Any]:
    """One seed's figures; drops are fractions of the 360 test images against the parent's ONNX file."""
    base = found.baseline
    winners = {**found.closest, **found.winners}
    test = base.test.value.value if base.test else 0.0
    int8 = found.controls["int8"]
    return {
        "seed": seed,
        "minutes": round(minutes, 2),
        "trials": found.trials,
        "parent_quality": test,
        "parent_ms": {name: figures.ms.value for name, figures in base.devices.items()},
        "goals": {
            name: {
                "certified": winner.certified,
                "speedup": {device: figures.speedup.value for device, figures in winner.devices.items()},
                "drop": winner.drop,
                "size_ratio": winner.size_ratio,
            }
            for name, winner in winners.items()
        },
        "met": all(name in winners and winners[name].certified for name in (g.name for g in found.goals))
        and all((winner.drop or 0.0) <= 0.015 for winner in winners.values()),
        "int8_alone": {
            "speedup": {name: figures.speedup.value for name, figures in int8.devices.items()},
            "drop": max((f.drop_test.value for f in int8.devices.values() if f.drop_test), default=None),
        },
        "uniform": {**plain, "drop": test - plain["quality"]} if plain else {},
    }


def main() -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="one seed, a third of a minute of search")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    console, rows = Console(), []
    for seed in range(1 if asked.quick else asked.seeds):
        out = Path(tempfile.mkdtemp(prefix="digits-"))
        changes: dict[str, Any] = {"out": str(out), "search.seed": seed}
        if asked.quick:
            changes |= {"search.cost.minutes": 0.3, "model.epochs": 5}
        job = load.job(JOB, changes)
        began = time.perf_counter()
        found = run(job, console=Console(quiet=True))
        minutes = (time.perf_counter() - began) / 60
        rows.append(row(seed, found, minutes, uniform(parts(job), out)))
        console.print(rows[-1], soft_wrap=True)
        shutil.rmtree(out)
    table = Table(title=f"digits, {len(rows)} seeds, 360 test images, both devices 3x and at most 1.5 points")
    for name in ("arm", "speedup (median over seeds)", "points lost (median, worst)"):
        table.add_column(name)
    goals = rows[0]["goals"]
    for goal in goals:
        those = [r["goals"][goal] for r in rows if goal in r["goals"]]
        table.add_row(f"search, {goal}", _speeds([g["speedup"] for g in those]), _drops([g["drop"] for g in those]))
    for arm in ("int8_alone", "uniform"):
        those = [r[arm] for r in rows if r[arm]]
        table.add_row(arm, _speeds([g["speedup"] for g in those]), _drops([g["drop"] for g in those]))
    console.print(table)
    met = sum(r["met"] for r in rows)
    console.print(
        f"met in {met} of {len(rows)} seeds; parent {statistics.median(r['parent_quality'] for r in rows):.4f}"
    )
    if asked.json:
        asked.json.write_text(json.dumps({"met": met, "seeds": len(rows), "rows": rows}, indent=1))


def _speeds(found: list[dict[str, float]]) -> str:
    return ", ".join(f"{name} {statistics.median(f[name] for f in found):.2f}x" for name in found[0])


def _drops(found: list[float]) -> str:
    return f"{100 * statistics.median(found):.2f}, {100 * max(found):.2f}"


if __name__ == "__main__":
    main()
