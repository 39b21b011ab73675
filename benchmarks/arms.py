"""What a row of the technique table is: one technique alone, beside a reference on the same network.

Figures as in `oneshot.py`: the ONNX file on the test split, drops as paired differences to fp32 with 95 % intervals,
latency in turn with fp32. `within` says whether our quality is at most one standard error of the paired difference
worse than the reference's.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from oneshot import Bench, everywhere
from torch import Tensor, nn
from torch.nn import functional

from autocompress import export
from autocompress.ops.storage import storage
from autocompress.ops.store import codecs_of
from autocompress.pipeline import Release, Shaped, rate, release, shape
from autocompress.tasks import several
from autocompress.tasks.recipe import recipe
from autocompress.train import Training, bf16_pays, bf16_runs, channels_last, draw, one_cycle
from autocompress.types import Candidate, Policy, Rule, Site

Rules = Callable[[Sequence[Site]], list[Rule]]
Loss = Callable[[Any, Any, tuple[Tensor, ...]], Tensor]
"""(what the network answers, targets, inputs) to the loss of a batch."""
DISTILL = {"weight": 0.7, "temperature": 3.0}


@dataclass(frozen=True)
class Found:
    """What a reference came to: which test samples it gets right, and where it says so the bytes it is stored in."""

    right: NDArray[np.bool_]
    stored: int | None = None


Reference = Callable[["Lab", Policy], "bytes | Found"]
"""Another library's way to the same thing: an ONNX file, or what its own model gets right."""


@dataclass(frozen=True)
class Arm:
    """One row: `trained` rows are followed by distillation. `beside` names the reference, or says why there is none."""

    name: str
    rules: Rules
    trained: bool = True
    reference: Reference | None = None
    beside: str = ""


def rows_of(op: str, **settings: Any) -> Rules:
    """The technique at every site that lists it."""
    return lambda sites: everywhere(op, sites, **settings)


def all_of(op: str, **settings: Any) -> Rules:
    """The technique over the whole network at once."""
    return lambda _sites: [Rule(site=".", op=op, settings=settings)]


def both(*many: Rules) -> Rules:
    """Several rules together."""
    return lambda sites: [rule for rules in many for rule in rules(sites)]


def every_second(kind: str) -> Rules:
    """A block op at every second block that offers it."""

    def rules(sites: Sequence[Site]) -> list[Rule]:
        able = [site.name for site in sites if kind in site.choices.get("block", ())]
        return [Rule(site=name, op="block", settings={"kind": kind}) for name in able[1::2]]

    return rules


def beginning(module: nn.Module) -> str:
    """What a training begins with: parameters in order. Statistics of batch norms are forgotten while it runs."""
    told = hashlib.sha256()
    for parameter in module.parameters():
        told.update(repr(tuple(parameter.shape)).encode())
        told.update(parameter.detach().contiguous().numpy().tobytes())
    return told.hexdigest()


class Lab(Bench):
    """The bench, with what references need."""

    @cached_property
    def bf16(self) -> bool:
        """Whether ours trains in bfloat16 here."""
        return bf16_pays() and bf16_runs(self.work.parent, self.task)

    def copy(self) -> nn.Module:
        """The parent's copy, weights in rows again: training lays a teacher's out otherwise."""
        move: Any = copy.deepcopy(self.work.parent).to  # torch's annotation lacks this form
        return move(memory_format=torch.contiguous_format).eval()

    def shaped(self, policy: Policy) -> Shaped:
        """Our structure before training, for references that differ in how it is filled or trained."""
        torch.manual_seed(self.seed)
        return shape(self.work, Candidate(arch={}, policy=policy))

    @cached_property
    def files(self) -> dict[str, bytes]:
        """Trained files by the parameters that their training began with: what starts alike ends alike."""
        return {}

    def apply(self, policy: Policy) -> Release:
        """As the bench; the file of a plain training is kept for references that begin with the same parameters."""
        done = super().apply(policy)
        (taught,) = policy.of("distill") or (None,)
        if taught is not None and "kind" not in taught.settings and not policy.of("sparsify") and not policy.of("qat"):
            self.files[beginning(self.shaped(policy).module)] = done.model
        return done

    def finish(self, module: nn.Module) -> bytes:
        """The recipe of trained arms and the float file; not trained where ours began with the same parameters."""
        known = beginning(module)
        if known not in self.files:
            self.files[known] = self.float_file(self.train(module))
        return self.files[known]

    def train(self, module: nn.Module, lr: float | None = None) -> nn.Module:
        """The recipe of every trained arm: distillation by responses; `lr` where ours is not the full rate."""
        torch.manual_seed(self.seed)
        kept = Training(
            module,
            self.task,
            epochs=self.work.epochs,
            seed=self.seed,
            teacher=self.work.parent,
            lr=lr,
            bf16=self.bf16,
            weight=DISTILL["weight"],
            temperature=DISTILL["temperature"],
        )
        kept.run_to(1.0)
        return module.eval()

    def loop(
        self,
        module: nn.Module,
        loss: Loss,
        *,
        lr: float | None = None,
        before: Callable[[float], None] = lambda _share: None,
        more: Sequence[nn.Parameter] = (),
        bf16: bool | None = None,
    ) -> nn.Module:
        """The same recipe in plain torch: samples, schedule, optimizer and clipping of ours, another loss.

        `before` is called before each step with the share of the training that is done; `more` are parameters that
        learn beside the network.
        """
        asked = recipe(self.task)
        torch.manual_seed(self.seed)
        module = channels_last(module).train()
        parameters = [*module.parameters(), *more]
        groups: list[dict[str, Any]] = [
            {"params": [one for one in parameters if one.ndim > 1], "weight_decay": asked.decay},
            {"params": [one for one in parameters if one.ndim <= 1], "weight_decay": 0.0},
        ]
        if asked.optimizer == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=asked.lr, betas=(asked.momentum, 0.999))
        else:
            optimizer = torch.optim.SGD(groups, lr=asked.lr, momentum=asked.momentum, nesterov=True)
        # as many steps as ours, in the precision that it would choose
        narrow = self.bf16 if bf16 is None else bf16
        ours = Training(module, self.task, epochs=self.work.epochs, seed=self.seed, bf16=narrow)
        step = 0
        while step < ours.total:
            passes = self.task.batches("train", asked.batch, seed=draw(self.seed, 0, step // ours.steps_per_epoch))
            for batch, targets in passes:
                inputs = tuple(
                    one.contiguous(memory_format=torch.channels_last) if one.ndim == 4 else one
                    for one in several(batch)
                )
                before(step / ours.total)
                torch.manual_seed(draw(self.seed, 1, step))
                for group in optimizer.param_groups:
                    group["lr"] = (lr or asked.lr) * one_cycle(step, ours.total)
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
                    outputs = module(*inputs)
                value = loss(several(outputs)[0].float(), targets, inputs)
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                nn.utils.clip_grad_norm_(parameters, asked.clip)
                optimizer.step()
                step += 1
                if step >= ours.total:
                    break
        before(1.0)
        return module.eval()

    def response(self, outputs: Tensor, targets: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """Cross entropy and T^2 KL of softened logits (Hinton et al. 2015, section 2)."""
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            taught = several(self.work.parent(*inputs))[0].float()
        weight, hot = DISTILL["weight"], DISTILL["temperature"]
        soft = functional.kl_div(
            functional.log_softmax(outputs / hot, 1), functional.softmax(taught / hot, 1), reduction="batchmean"
        )
        return (1 - weight) * functional.cross_entropy(outputs, targets) + weight * hot * hot * soft

    def rate(self, policy: Policy) -> float:
        """The rate at which ours trains."""
        return rate(self.work, self.shaped(policy))

    def float_file(self, module: nn.Module) -> bytes:
        """The module as a float file."""
        (done,) = release(self.work, module, Policy()).values()
        return done.model

    def seen(self, module: nn.Module) -> Found:
        """What a torch module gets right as it is, for references whose own simulation is what they promise."""

        def predict(inputs: Any) -> Any:
            with torch.no_grad():
                return several(module(*(torch.from_numpy(one) for one in several(inputs))))[0].numpy()

        return Found(self.task.scores(predict, "test"))

    def policy(self, arm: Arm) -> Policy:
        """The arm's rules, with distillation by responses where it trains and says nothing else."""
        rules = arm.rules(self.builder.sites())
        if arm.trained and not any(rule.op == "distill" for rule in rules):
            rules = [*rules, Rule(site=".", op="distill", settings=dict(DISTILL))]
        return Policy(rules=tuple(rules))

    def ours(self, arm: Arm) -> tuple[dict[str, Any], Policy, bytes]:
        """The row of an arm as far as it is ours, its policy and its file."""
        started = time.perf_counter()
        policy = self.policy(arm)
        done = self.apply(policy)
        row = self.row(arm.name, done.model, time.perf_counter() - started)
        stored = len(storage(done.model, codecs_of(done.receipts))) / self.baseline.stat().st_size
        skipped = [f"{r.op} {e.site}: {e.why}" for r in done.receipts for e in r.entries if e.status == "skipped"]
        return (
            row | {"trained": arm.trained, "beside": arm.beside, "stored": stored, "skipped": skipped},
            policy,
            done.model,
        )

    def beside(self, make: Reference, policy: Policy, model: bytes) -> dict[str, Any]:
        """What a row says about its reference."""
        started = time.perf_counter()
        other = make(self, policy)
        row: dict[str, Any] = {}
        found = other if isinstance(other, Found) else Found(self.task.scores(export.predictor(other), "test"))
        if isinstance(other, bytes) and not policy.of("distill"):  # trained references have our structure
            row["reference_size_ratio"] = len(other) / self.baseline.stat().st_size
            row["reference_speedup"] = self.station.session(self.profile.name, other).speedup
        gap = (self.task.scores(export.predictor(model), "test").astype(float) - found.right.astype(float)) * 100
        error = float(gap.std(ddof=1) / np.sqrt(len(gap)))
        row |= {
            "reference_quality": float(found.right.mean()),
            "gap": float(gap.mean()),
            "gap_error": error,
            "within": bool(gap.mean() >= -error),
        }
        if found.stored is not None:
            row["reference_stored"] = found.stored / self.baseline.stat().st_size
        self.console.print(
            f"    reference {row['reference_quality']:.4f}, ours {row['gap']:+.2f} +- {error:.2f} against it, "
            f"{row.get('reference_speedup', 0):.2f}x, {time.perf_counter() - started:.0f} s",
            highlight=False,
        )
        return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| technique | points lost [95 %] | file | stored | speed [95 %] | reference | its speed | ours against it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gap = f"{row['gap']:+.2f} ± {row['gap_error']:.2f}" if "gap" in row else ""
        if "reference_stored" in row:
            gap += f" (stored {row['reference_stored']:.2f})"
        theirs = f"{row['reference_speedup']:.2f}x" if "reference_speedup" in row else ""
        lines.append(
            f"| {row['arm']}{' *' if row['trained'] else ''} "
            f"| {row['drop']:+.2f} [{row['drop_low']:+.2f}, {row['drop_high']:+.2f}] | {row['size_ratio']:.2f} "
            f"| {row['stored']:.2f} | {row['speedup']:.2f}x [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]"
            f"{' noisy' if row['noisy'] else ''} | {row['beside']} | {theirs} | {gap} |"
        )
    return "\n".join(lines) + "\n"
