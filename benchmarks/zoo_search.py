"""The same search on networks that are no ResNets: nothing is tuned to one kind.

    AUTOCOMPRESS_DATA=FOLDER python benchmarks/zoo_search.py [--only fashion,text] [--minutes 20] [--json FILE]

`fashion`: a small MobileNet (depthwise layers) on Fashion-MNIST (idx files in `fashion-mnist/`); `text`: a BERT of four
layers on SST-2 (`sst2/`). Both are trained here once from nothing, for a few epochs, and kept in the cache folder. Then
`autocompress.search` with `space="auto"` has the minutes, its final training included; the probe comes before them.
Quality is read once on the test split, drops are to fp32 with 95 % intervals; latency at batch 1, one thread, in turn
with fp32. Beside it the control that every search runs: int8 everywhere and nothing else.

A run that was killed goes on with the same command. `--json`: a list of rows with network, fp32, quality, drop,
drop_low, drop_high, speedup, speedup_low, speedup_high, smaller, certified, policy, trials, minutes, int8 (the same
figures of the control).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from encoder import Sentences, encoder
from mobile import MobileNet
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import nn

import autocompress
from autocompress import journal
from autocompress.store import cache_dir
from autocompress.summary import Figures, Summary
from autocompress.tasks import Task
from autocompress.tasks.images import Images
from autocompress.train import Training
from autocompress.types import UserError

EPOCHS, RATE, SEED = 4, 0.08, 0  # of the MobileNet's own training
FULL = {"fashion": 20.0, "text": 6.0}  # epochs of a candidate's full training
ASKED: Mapping[str, Mapping[str, Any]] = {
    "fashion": {"profile": "local-1t", "speedup": 4.0},
    "text": {"profile": "local-1t", "speedup": 4.0},
}
DROP = 0.01
FINAL = 0.5


def folder() -> Path:
    """Where the data lie. Raises UserError if that is not said."""
    named = Path(os.environ.get("AUTOCOMPRESS_DATA", ""))
    if not (named / "fashion-mnist").is_dir():
        raise UserError("set AUTOCOMPRESS_DATA to the folder that holds fashion-mnist/ and sst2/")
    return named


def fashion() -> tuple[nn.Module, Task]:
    """The MobileNet and its data; selection is cut from the train files."""
    task = Images(
        folder() / "fashion-mnist", mean=0.286, std=0.353, augment="flip", selection=4000, training={"lr": 0.03}
    )
    told = hashlib.sha256(repr((EPOCHS, RATE, SEED)).encode()).hexdigest()[:12]
    kept = cache_dir() / "benchmarks" / f"fashion-{told}.safetensors"
    torch.manual_seed(SEED)
    module = MobileNet(1)
    if not kept.is_file():
        training = Training(module, task, EPOCHS, SEED, lr=RATE)
        for epoch in range(1, EPOCHS + 1):
            done = training.run_to(epoch / EPOCHS)
            sys.stderr.write(f"MobileNet: epoch {epoch} of {EPOCHS}, loss {done['loss']:.3f}\n")
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: one.detach().contiguous() for name, one in module.state_dict().items()}, kept)
    module.load_state_dict(load_file(kept))
    return module.eval(), task


def text() -> tuple[nn.Module, Task]:
    """The encoder and its data."""
    task = Sentences.sst2()
    return encoder(task), task


NETWORKS: Mapping[str, Callable[[], tuple[nn.Module, Task]]] = {"fashion": fashion, "text": text}


def searched(name: str, asked: argparse.Namespace, console: Console) -> Summary:
    """The search of one network, from where it was."""
    out = asked.out / name
    summary = out / "summary.json"
    if summary.is_file() and (found := Summary.model_validate_json(summary.read_bytes())).state == "finished":
        return found
    module, task = NETWORKS[name]()
    if journal.began(out / "journal.jsonl"):
        return autocompress.resume(out, task=task, builder=module, console=console)
    return autocompress.search(
        module,
        task,
        devices=[ASKED[name]],
        quality={"max_drop": DROP},
        searcher=asked.searcher,
        seed=asked.seed,
        trials=10_000,
        minutes=asked.minutes,
        final=FINAL,
        fidelity={"full_epochs": FULL[name], "rungs": (0.03, 0.15, 1.0), "keep": 0.3},
        workers=asked.workers,
        out=out,
        console=console,
    )


def figures(found: Figures) -> dict[str, Any]:
    """What a row says of a file."""
    drop = found.drop_test
    return {
        "quality": None if found.test is None else found.test.value.value,
        "drop": None if drop is None else 100 * drop.value,
        "drop_low": None if drop is None else 100 * drop.low,
        "drop_high": None if drop is None else 100 * drop.high,
        "speedup": found.speedup.value,
        "speedup_low": found.speedup.low,
        "speedup_high": found.speedup.high,
        "smaller": found.size_ratio,
    }


def row(name: str, found: Summary) -> dict[str, Any]:
    """A network's row."""
    winner = next(iter((found.winners or found.closest).values()))
    control = found.controls.get("int8")
    assert found.baseline.test is not None
    return {
        "network": name,
        "fp32": found.baseline.test.value.value,
        **figures(next(iter(winner.devices.values()))),
        "certified": winner.certified,
        "policy": winner.policy,
        "trials": found.trials,
        "minutes": round(found.minutes, 1),
        "int8": figures(next(iter(control.devices.values()))) if control and control.devices else None,
    }


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(NETWORKS))
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--searcher", default="evolution")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="trials at once; default: all cores that are not the station's")
    parser.add_argument("--out", type=Path, default=Path("runs/zoo-search"))
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    console = Console(emoji=False)
    names = asked.only.split(",")
    for name in names:
        if name not in NETWORKS:
            parser.error(f"--only {name}: there are {', '.join(NETWORKS)}")
    rows = [row(name, searched(name, asked, console)) for name in names]
    view = Table("network", "fp32", "found", "points lost", "times smaller", "times faster", "int8 alone")
    for one in rows:
        lost = "-" if one["drop"] is None else f"{one['drop']:+.2f} [{one['drop_low']:+.2f}, {one['drop_high']:+.2f}]"
        int8 = one["int8"]
        view.add_row(
            one["network"],
            f"{one['fp32']:.4f}",
            "-" if one["quality"] is None else f"{one['quality']:.4f}",
            lost,
            f"{one['smaller']:.1f}",
            f"{one['speedup']:.2f} [{one['speedup_low']:.2f}, {one['speedup_high']:.2f}]",
            f"{int8['speedup']:.2f}x, {int8['drop']:+.2f}" if int8 and int8["drop"] is not None else "-",
        )
    console.print(view)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
