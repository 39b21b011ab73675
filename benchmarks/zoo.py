"""Conformance: strangers' networks through the whole path, with a random policy each.

    python benchmarks/zoo.py [--quick] [--only PATTERN] [--jobs N] [--seeds N] [--json FILE] [--table FILE.md]

Every classification builder of torchvision, 40 networks of timm, encoders of Hugging Face from small configurations:
random initialisation with batch-norm statistics estimated, then a random legal policy of dropped blocks, pruning, low
rank and int8 that changes at least 30 % of the eligible sites and removes at least 20 % of the multiply-adds. A pair
(network, seed) passes if the compressed network runs, exports, agrees with torch (float file, largest difference 1e-3
of the largest output), runs with its integers, is written as an artifact, and that artifact, read again and rebuilt
from its receipts, answers as the file did. What does not pass must end in one line that says why (explained); anything
else, a crash or a time-out among them, is unexplained. Five seeds up to 30 million parameters, one above.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from autocompress import artifact, export, memory, onnxfile, parts, reuse
from autocompress.certify import Certificate
from autocompress.models.sources import import_torchvision
from autocompress.models.trace import examples, thop_count
from autocompress.pipeline import Work, release, shape, weights_of
from autocompress.tasks import InputSpec, Predict, several
from autocompress.tasks.intervals import wilson
from autocompress.train import reestimate_batchnorm
from autocompress.types import (
    Budget,
    Candidate,
    Goal,
    Job,
    ModelSource,
    Policy,
    Profile,
    Quality,
    Rule,
    Site,
    TrialFailure,
    UserError,
)

CLASSES = 10
SITES, MACS = 0.3, 0.2
"""Shares that a policy must change at least: of the eligible sites, of the multiply-adds."""
SMALL = 30_000_000
TIMEOUT_S = 1500.0
TIMM = [
    "resnet18d",
    "resnet26t",
    "resnetv2_50",
    "seresnet50",
    "ecaresnet26t",
    "skresnet18",
    "resnext26ts",
    "resnest14d",
    "res2net50_26w_4s",
    "wide_resnet50_2",
    "regnetx_004",
    "regnety_004",
    "densenet121",
    "dpn68",
    "vgg11_bn",
    "inception_v4",
    "xception41",
    "hrnet_w18_small",
    "mobilenetv1_100",
    "mobilenetv2_100",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "efficientnet_b0",
    "tinynet_c",
    "ghostnet_100",
    "mnasnet_100",
    "lcnet_100",
    "fbnetc_100",
    "repvgg_a0",
    "mobileone_s0",
    "convnext_atto",
    "convmixer_768_32",
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "cait_xxs24_224",
    "mixer_s32_224",
    "gmlp_ti16_224",
    "poolformer_s12",
    "edgenext_xx_small",
    "levit_128s",
]
ENCODERS: dict[str, dict[str, Any]] = {
    **{
        name: {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
        for name in ("bert", "roberta", "vit", "deit")
    },
    "distilbert": {"dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 128},
    "swin": {"embed_dim": 32, "depths": [2, 2, 2, 2], "num_heads": [2, 4, 8, 16]},
}
VOCABULARY, LENGTH = 100, 16
LARGER = {"swin": 224, "maxvit_t": 224, "alexnet": 224, "inception_v3": 96, "inception_v4": 96, "vit_h_14": 56}
QUICK = (
    "torchvision:resnet18",
    "torchvision:mobilenet_v2",
    "torchvision:efficientnet_b0",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:densenet121",
    "torchvision:vit_b_16",
    "timm:convnext_atto",
    "hf:bert",
)
PROFILE = Profile(name="zoo", channel_multiple=4)


class Noise:
    """A task of random inputs and labels: what conformance needs of data."""

    name, metric = "noise", "accuracy"

    def __init__(self, spec: InputSpec) -> None:
        self.input = spec

    def batches(
        self, split: str, size: int, *, limit: int | None = None, seed: int | None = None
    ) -> Iterator[tuple[Any, Any]]:
        """64 samples of every split, always the same ones."""
        generator = torch.Generator().manual_seed(sum(map(ord, split)) + (seed or 0))
        left = min(limit or 64, 64)
        while left > 0:
            count = min(size, left)
            left -= count
            inputs = tuple(self._draw(one, count, generator) for one in self.input.every)
            yield inputs[0] if len(inputs) == 1 else inputs, torch.randint(0, CLASSES, (count,), generator=generator)

    def _draw(self, one: InputSpec, count: int, generator: torch.Generator) -> torch.Tensor:
        if one.dtype == "float32":
            return torch.randn(count, *one.shape, generator=generator)
        if one.name == "attention_mask":
            return torch.ones(count, *one.shape, dtype=torch.int64)
        return torch.randint(0, VOCABULARY, (count, *one.shape), generator=generator)

    def loss(self, outputs: Any, targets: Any) -> Any:
        """Cross entropy."""
        return nn.functional.cross_entropy(several(outputs)[0], targets)

    def quality(self, predict: Predict, split: str) -> Quality:
        """Share of labels hit, which is chance."""
        right, samples = 0, 0
        for inputs, targets in self.batches(split, 32):
            answers, *_ = several(predict(tuple(one.numpy() for one in several(inputs))))
            right += int((answers.argmax(-1) == targets.numpy()).sum())
            samples += len(targets)
        return Quality(metric=self.metric, split=split, value=wilson(right, samples), samples=samples)


def networks() -> list[str]:
    """All of them, by source and name."""
    models = import_torchvision().models
    return [
        *(f"torchvision:{name}" for name in models.list_models(module=models)),
        *(f"timm:{name}" for name in TIMM),
        *(f"hf:{name}" for name in ENCODERS),
    ]


def describe(network: str) -> tuple[dict[str, Any], InputSpec]:
    """Options and input of a network: images as small as it takes, or tokens."""
    source, _, name = network.partition(":")
    size = LARGER.get(name, 224 if name.startswith("vgg") else 64)
    image = InputSpec(shape=(3, size, size))
    if source == "hf":
        options: dict[str, Any] = {**ENCODERS[name], "num_labels": CLASSES}
        if name in ("vit", "deit", "swin"):
            return options | {"image_size": size, "patch_size": 4 if name == "swin" else 8}, image
        mask = InputSpec(name="attention_mask", shape=(LENGTH,), dtype="int64", layout="")
        tokens = InputSpec(name="input_ids", shape=(LENGTH,), dtype="int64", layout="", others=(mask,))
        return options | {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH + 4}, tokens
    options = {"num_classes": CLASSES}
    if source == "torchvision":
        if name.startswith("vit_"):
            options["image_size"] = size
        if name in ("googlenet", "inception_v3"):
            options |= {"init_weights": True}
    elif name.startswith(("vit_", "deit_", "cait_", "mixer_", "gmlp_", "levit_")):
        options["img_size"] = size
    return options, image


def policy(sites: tuple[Site, ...], rng: random.Random, strength: float) -> Policy:
    """A random legal policy: more of everything with more strength, in [0, 1]."""
    rules: list[Rule] = []
    dropped: list[str] = []
    for site in sites:
        inside = any(site.name.startswith(f"{name}.") for name in dropped)
        if "block" in site.ops and not inside and rng.random() < 0.1 + 0.3 * strength:
            rules.append(Rule(site=site.name, op="block", settings={"kind": "drop"}))
            dropped.append(site.name)
            continue
        if inside:
            continue
        if "prune" in site.ops and rng.random() < 0.5 + 0.5 * strength:
            ratio = rng.choice((0.25, 0.5)) if strength < 0.5 else rng.choice((0.5, 0.75))
            rules.append(Rule(site=site.name, op="prune", settings={"ratio": ratio}))
        if "lowrank" in site.ops and rng.random() < 0.15 + 0.3 * strength:
            rules.append(Rule(site=site.name, op="lowrank", settings={"rank": rng.choice((0.25, 0.5))}))
        if "quantize" in site.ops and rng.random() < 0.6:
            rules.append(Rule(site=site.name, op="quantize", settings={"bits": "int8"}))
    return Policy(rules=tuple(rules))


@torch.no_grad()
def animate(module: nn.Module) -> None:
    """Draw what a random initialisation leaves at zero or nearly so: such heads and branches would hide any mistake."""
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            continue
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.05)
        elif parameter.numel() > 1 and float(parameter.abs().max()) < 1e-3:  # scales of branches
            parameter.fill_(0.2)


def conform(network: str, seed: int, folder: Path) -> dict[str, Any]:
    """One pair. Raises TrialFailure or UserError where it ends in a reason."""
    torch.manual_seed(seed)
    rng = random.Random(f"{network}/{seed}")
    options, spec = describe(network)
    task = Noise(spec)
    builder = parts.make_builder(network, spec, options)
    parent = builder.build({})
    size = memory.module_bytes(parent)  # once more where its sites are found, then a candidate with its file
    memory.check((1 + memory.TRIAL) * size, f"{network}, {size / 1e9:.1f} GB, with a candidate", UserError)
    animate(parent)
    reestimate_batchnorm(parent, task, 2, size=32)
    parent.eval()
    macs, parameters = thop_count(parent, examples(spec))
    sites = builder.sites()
    eligible = {site.name for site in sites if {"prune", "lowrank", "quantize", "block"} & set(site.ops)}
    ops = parts.make_ops(("block", "prune", "lowrank", "quantize"))
    work = Work(builder=builder, task=task, ops=ops, parent=parent, profiles=(PROFILE,))
    row: dict[str, Any] = {"network": network, "seed": seed, "parameters": parameters, "macs": macs}
    shaped = None
    for strength in (0.0, 0.3, 0.6, 1.0):
        del shaped  # two candidates of a large network do not fit
        candidate = Candidate(arch={}, policy=policy(sites, rng, strength))
        shaped = shape(work, candidate)
        entries = [entry for receipt in shaped.receipts for entry in receipt.entries]
        done = {entry.site for entry in entries if entry.status == "done"}
        done |= {rule.site for rule in candidate.policy.of("quantize")}
        gone = {e.site for e in entries if e.status == "done" and e.facts and e.asked.get("kind") == "drop"}
        done |= {name for name in eligible if any(name.startswith(f"{block}.") for block in gone)}
        left, _ = thop_count(shaped.module, examples(spec))
        row |= {"changed": len(done & eligible) / max(len(eligible), 1), "removed": 1 - left / macs}
        row["ops"] = {
            op: sum(e.status == "done" for r in shaped.receipts if r.op == op for e in r.entries) for op in ops
        }
        if row["changed"] >= SITES and row["removed"] >= MACS:
            break
    else:
        why = "; ".join(sorted({entry.why for entry in entries if entry.why})[:2])
        raise TrialFailure(f"only {row['changed']:.0%} of sites changed, {row['removed']:.0%} of MACs removed: {why}")
    inputs = tuple(one.numpy() for one in several(next(iter(task.batches("selection", 8)))[0]))
    floats = export.export(shaped.module, spec, opset=PROFILE.opset)
    row["parity"] = export.parity(shaped.module, export.compose(floats), *inputs)
    exporter, opset = floats.exporter, floats.opset
    del floats
    (done_release,) = release(work, shaped.module, candidate.policy).values()
    row["ops"]["quantize"] = sum(e.status == "done" and e.site != "." for r in done_release.receipts for e in r.entries)
    answers = several(export.predictor(done_release.model)(inputs))
    if not all(np.isfinite(one).all() for one in answers):
        raise TrialFailure("the integer file answers with numbers that are not finite")
    job = Job(
        task="digits",
        model=ModelSource(builder=network, options=options),
        space="auto",
        devices=(Budget(profile="zoo"),),
        out=str(folder),
    )
    goal = Goal(name="zoo", budgets=job.devices)
    artifact.write(
        folder / "best",
        model=done_release.model,
        weights=weights_of(shaped.module),
        policy=artifact.PolicyFile(
            builder=network,
            policy=candidate.policy,
            receipts=shaped.receipts,
            numeric={PROFILE.numeric.variant: done_release.receipts},
            sites=sites,
        ),
        manifest=artifact.Manifest(
            goal=goal,
            certificate=Certificate(
                goal="zoo", certified=False, reason="not measured", budget_met=False, quality_held=False, floor=0.0
            ),
            input=spec,
            task="noise",
            builder=network,
            profiles=(PROFILE,),
            exporter=exporter,
            opset=opset,
            job=job.model_dump(mode="json"),
        ),
    )
    del builder, parent, work, shaped, done_release
    again = reuse.apply(folder / "best", task=task, out=folder / "again")
    row["byte_equal"] = again.byte_equal
    reloaded = several(export.predictor(onnxfile.load(folder / "again" / artifact.MODEL))(inputs))
    scale = max(float(np.abs(one).max()) for one in answers)
    row["reload_error"] = max(float(np.abs(one - two).max()) for one, two in zip(answers, reloaded, strict=True)) / max(
        scale, 1e-12
    )
    if row["reload_error"] > export.TOLERANCE:
        raise TrialFailure(f"the artifact answers differently once it is rebuilt: {row['reload_error']:.2g}")
    return row


def child(network: str, seed: int) -> None:
    """One pair in this process; its row goes to stdout, all else to stderr."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    row: dict[str, Any] = {"network": network, "seed": seed, "passed": False, "reason": ""}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        try:
            row |= conform(network, seed, Path(folder))
            row["passed"] = True
        except (TrialFailure, UserError) as reason:
            row["reason"] = " ".join(str(reason).split())
    row["seconds"] = round(time.perf_counter() - started, 1)
    row["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps(row))


def pair(network: str, seed: int) -> dict[str, Any]:
    """One pair in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", network, str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    failed: dict[str, Any] = {"network": network, "seed": seed, "passed": False, "reason": ""}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment)
    except subprocess.TimeoutExpired:
        return failed | {"crash": f"not done after {TIMEOUT_S:g} s"}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        lines = done.stderr.strip().splitlines()
        return failed | {"crash": lines[-1][:300] if lines else f"exit code {done.returncode}"}


def run(names: list[str], seeds: int, jobs: int, console: Console, kept: Path | None) -> list[dict[str, Any]]:
    """All pairs, seed by seed; the first says how large a network is. What is done is written to `kept` at once."""
    rows: list[dict[str, Any]] = []
    order = {name: place for place, name in enumerate(names)}

    def told(row: dict[str, Any]) -> None:
        rows.append(row)
        rows.sort(key=lambda row: (order[row["network"]], row["seed"]))
        verdict = "passed" if row["passed"] else row["reason"] or f"CRASH {row.get('crash', '')}"
        console.print(f"{row['network']:<40} {row['seed']} {row.get('seconds', 0):6.1f} s  {verdict}", highlight=False)
        if kept:
            kept.write_text(json.dumps(summary(rows), indent=1))

    with ThreadPoolExecutor(jobs) as pool:
        for seed in range(seeds):
            large = {row["network"] for row in rows if row.get("parameters", SMALL) > SMALL}
            for done in as_completed([pool.submit(pair, name, seed) for name in names if name not in large]):
                told(done.result())
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the docs."""
    passed = sum(row["passed"] for row in rows)
    explained = sum(not row["passed"] and bool(row["reason"]) for row in rows)
    return {
        "pairs": len(rows),
        "passed": passed,
        "explained": explained,
        "unexplained": len(rows) - passed - explained,
        "rows": rows,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, one line per network."""
    lines = [
        "| network | parameters | passed | sites changed | MACs removed | worst parity | why not |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == name]
        good = [row for row in mine if row["passed"]]
        why = next((row["reason"] or row.get("crash", "") for row in mine if not row["passed"]), "")
        size = next((f"{row['parameters'] / 1e6:.1f} M" for row in mine if "parameters" in row), "")
        shares = [f"{min(row[key] for row in good):.0%}" if good else "" for key in ("changed", "removed")]
        worst = f"{max(row['parity'] for row in good):.0e}" if good else ""
        lines.append(f"| {name} | {size} | {len(good)} of {len(mine)} | {shares[0]} | {shares[1]} | {worst} | {why} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="eight networks, one seed")
    parser.add_argument("--only", help="networks that match, e.g. 'timm:*'")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 1))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("NETWORK", "SEED"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(asked.child[0], int(asked.child[1]))
        return
    console = Console()
    names = list(QUICK) if asked.quick else networks()
    names = [name for name in names if asked.only is None or fnmatch.fnmatchcase(name, asked.only)]
    found = summary(run(names, 1 if asked.quick else asked.seeds, asked.jobs, console, asked.json))
    if asked.table:
        asked.table.write_text(table(found["rows"]))
    view = Table("pairs", "passed", "explained", "unexplained")
    view.add_row(*(str(found[key]) for key in ("pairs", "passed", "explained", "unexplained")))
    console.print(view)


if __name__ == "__main__":
    main()
