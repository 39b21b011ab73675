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
from mobilenet import MobileNet
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import nn

import autocompress
from autocompress import journal
from autocompress.models.sources import hugging_face
from autocompress.pipeline import weights_of
from autocompress.store import cache_dir, write_atomic
from autocompress.summary import Figures, Summary
from autocompress.tasks.images import Images
from autocompress.tasks.text import Text
from autocompress.tasks.tokens import open_tokenizer, train_tokenizer
from autocompress.train import Training
from autocompress.types import UserError

SEED = 0
MOBILE = {"epochs": 4, "rate": 0.08}  # of each network's own training
BERT = {"epochs": 4, "rate": 1e-3}
LENGTH, WORDS = 48, 8000
SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 64,
    "num_labels": 2,
}
FULL = {"fashion": 20.0, "text": 6.0}  # epochs of a candidate's full training
SPEEDUP, DROP, FINAL = 4.0, 0.01, 0.5


def folder(name: str) -> Path:
    """Where the data lie. Raises UserError if that is not said."""
    found = Path(os.environ.get("AUTOCOMPRESS_DATA", "")) / name
    if not found.is_dir():
        raise UserError(f"set AUTOCOMPRESS_DATA to the folder that holds {name}/")
    return found


def kept(name: str, *told: object) -> Path:
    """A file of the cache folder that stands for how it was made."""
    short = hashlib.sha256(repr(told).encode()).hexdigest()[:12]
    path = cache_dir() / "benchmarks" / f"zoo-{name}-{short}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


class Logits(nn.Module):
    """A network of transformers that gives its logits alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(n, length) twice to (n, classes)."""
        return self.network(ids, mask).logits


def trained(name: str, training: Training, epochs: int) -> None:
    """Train, and say how it goes."""
    for epoch in range(1, epochs + 1):
        done = training.run_to(epoch / epochs)
        sys.stderr.write(f"{name}: epoch {epoch} of {epochs}, loss {done['loss']:.3f}\n")


def fashion(selection: int = 4000) -> dict[str, Any]:
    """What a search of the MobileNet is told."""
    task = Images(
        folder("fashion-mnist"), mean=0.286, std=0.353, augment="flip", selection=selection, training={"lr": 0.03}
    )
    path = kept("fashion", MOBILE, SEED)
    torch.manual_seed(SEED)
    module = MobileNet(1)
    if not path.is_file():
        trained("MobileNet", Training(module, task, MOBILE["epochs"], SEED, lr=MOBILE["rate"]), int(MOBILE["epochs"]))
        save_file({name: one.detach().contiguous() for name, one in module.state_dict().items()}, path)
    module.load_state_dict(load_file(path))
    return {"model": module.eval(), "task": task}


def text() -> dict[str, Any]:
    """What a search of the encoder is told: names and files alone."""
    data = folder("sst2")
    tokenizer = cache_dir() / "benchmarks" / f"sst2-{WORDS}.json"
    if not tokenizer.is_file():
        tokenizer.parent.mkdir(parents=True, exist_ok=True)
        train_tokenizer([data / "train.tsv"], tokenizer, vocabulary=WORDS)
    options = {"vocab_size": open_tokenizer(tokenizer).get_vocab_size(), **SHAPE}
    path = kept("text", BERT, SHAPE, WORDS, LENGTH, SEED)
    if not path.is_file():
        torch.manual_seed(SEED)
        network = hugging_face("bert", **options)
        task = Text(data, tokenizer, length=LENGTH)
        training = Training(Logits(network), task, BERT["epochs"], SEED, lr=BERT["rate"])
        trained("BERT", training, int(BERT["epochs"]))
        write_atomic(path, weights_of(network))
    told = {"path": str(data), "tokenizer": str(tokenizer), "length": LENGTH}
    return {"model": "hf:bert", "options": options, "weights": path, "task": "text", "data": told}


NETWORKS: Mapping[str, Callable[[], dict[str, Any]]] = {"fashion": fashion, "text": text}


def searched(name: str, asked: argparse.Namespace, console: Console) -> Summary:
    """The search of one network, from where it was."""
    out = asked.out / name
    summary = out / "summary.json"
    if summary.is_file() and (found := Summary.model_validate_json(summary.read_bytes())).state == "finished":
        return found
    told = NETWORKS[name]()
    if journal.began(out / "journal.jsonl"):
        module, task = told["model"], told["task"]
        own = {} if isinstance(module, str) else {"builder": module, "task": task}
        return autocompress.resume(out, console=console, **own)
    return autocompress.search(
        **told,
        space="auto",
        devices=[{"profile": "local-1t", "speedup": asked.speedup}],
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
    winner = next(iter((found.winners or found.closest).values()), None)
    if winner is None:
        raise SystemExit(f"{name}: no trial was measured, see the report")
    control = found.controls.get("int8")
    return {
        "network": name,
        "fp32": None if found.baseline.test is None else found.baseline.test.value.value,
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
    parser.add_argument("--speedup", type=float, default=SPEEDUP, help="the budget: times faster than fp32")
    parser.add_argument("--searcher", default="evolution")
    parser.add_argument("--seed", type=int, default=SEED)
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
    rows: list[dict[str, Any]] = []
    for name in names:
        rows.append(row(name, searched(name, asked, console)))
        if asked.json:
            asked.json.write_text(json.dumps(rows, indent=1))
    view = Table("network", "fp32", "found", "points lost", "times smaller", "times faster", "int8 alone")
    for one in rows:
        lost = "-" if one["drop"] is None else f"{one['drop']:+.2f} [{one['drop_low']:+.2f}, {one['drop_high']:+.2f}]"
        int8 = one["int8"]
        view.add_row(
            one["network"],
            "-" if one["fp32"] is None else f"{one['fp32']:.4f}",
            "-" if one["quality"] is None else f"{one['quality']:.4f}",
            lost,
            "-" if one["smaller"] is None else f"{one['smaller']:.1f}",
            f"{one['speedup']:.2f} [{one['speedup_low']:.2f}, {one['speedup_high']:.2f}]",
            f"{int8['speedup']:.2f}x, {int8['drop']:+.2f}" if int8 and int8["drop"] is not None else "-",
        )
    console.print(view)


if __name__ == "__main__":
    main()
