"""Op `block`: cut depth. A residual block is dropped, or its convolutions are merged into one.

Merging linearises the activations between the convolutions of a branch and puts one convolution in their place: Fu et
al. 2022 ("DepthShrinker"), Kim et al. 2024 ("LayerMerge"). Where those train first and multiply kernels then, the one
convolution here is fitted to the branch's own outputs on calibration data. A dropped block passes its input on
(stochastic depth's residual view, Huang et al. 2016; Veit et al. 2016).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autocompress.models.calls import Call, Seen, watch
from autocompress.models.merging import Chain, chain
from autocompress.models.trace import still
from autocompress.ops import Phase
from autocompress.ops.merge import Merged, fit, load, planned, skeleton
from autocompress.tasks import Task, several
from autocompress.types import Choice, Entry, Profile, Receipt, Record, Rule, TrialFailure, UserError

KINDS = ("keep", "drop", "merge")
LOOKED = 4
"""Calibration examples that show what arrives at a block."""


class Dropped(Record):
    """A block falls away; its main input is argument `key`, and a tuple of `form` came out (0: a tensor)."""

    kind: Literal["drop"] = "drop"
    block: str
    type: str  # of the block, so that a receipt for another network is noticed
    parameters: int
    key: int | str = 0
    form: int = 0


class Pass(nn.Module):
    """What is left of a dropped block: it hands its main input on, in a tuple of `form` where `form` > 0."""

    def __init__(self, key: int | str = 0, form: int = 0) -> None:
        super().__init__()
        self.key, self.form = key, form

    def forward(self, *args: Any, **named: Any) -> Any:
        """The main input, whatever else is given; a copy, since what follows a block may write into its answer."""
        x = (args[self.key] if isinstance(self.key, int) else named[self.key]).clone()
        return (x, *[None] * (self.form - 1)) if self.form else x


class Same(nn.Module):
    """What is left of a silenced layer: a copy, since a ReLU that stays behind it may write into what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        """The input."""
        return x.clone()


class Block:
    """Drop or merge residual blocks. `kind` is keep, drop or merge."""

    name = "block"
    phase: Phase = "structure"

    def __init__(self) -> None:
        self.params: dict[str, Any] = {"kind": "keep"}

    def check(self, rule: Rule) -> None:
        """Raise UserError for settings that are unknown or out of range; reads nothing but the rule."""
        kind_of(rule)

    def decide(
        self,
        subject: nn.Module,
        rules: Sequence[Rule],
        task: Task,
        profile: Profile,  # noqa: ARG002  depth is not rounded
        tensors: dict[str, Tensor] | None = None,
    ) -> Receipt:
        """See which blocks can go; merged weights go into `tensors` as `<block>/merged.weight` and `.bias`.

        Without `tensors` nothing is fitted: of several kernels that a merged convolution may have, it has the first.


        Raises UserError for an unknown kind, TrialFailure where the network does not run on the calibration data.
        """
        asked = [(rule, kind_of(rule)) for rule in rules]
        asked = [(rule, kind) for rule, kind in asked if kind != "keep"]
        if not asked:
            return Receipt(op=self.name)
        inputs = several(next(iter(task.batches("calibration", LOOKED, limit=LOOKED)))[0])
        try:
            with still(subject):
                seen = watch(subject, inputs, {rule.site for rule, _ in asked})
        except Exception as error:  # a stranger's forward may raise anything
            raise TrialFailure(f"block: the network does not run: {type(error).__name__}: {_line(error)}") from error
        plans = _plan(subject, asked, seen)
        chains = {rule.site: plan for (rule, _), plan in zip(asked, plans, strict=True) if isinstance(plan, Chain)}
        fitted: dict[str, tuple[Merged | str, dict[str, float], dict[str, Tensor]]] = {}
        if tensors is not None:
            fitted = {site: (plan, achieved, weights) for site, plan, achieved, weights in fit(subject, chains, task)}
        else:
            for site, found in chains.items():
                plan = planned(site, subject.get_submodule(site), found, found.kernels[0])
                fitted[site] = plan, {"macs": found.cost(plan.kernel) / found.macs}, {}
        verdicts = [
            fitted[rule.site][0] if isinstance(plan, Chain) else plan
            for (rule, _), plan in zip(asked, plans, strict=True)
        ]
        verdicts = rehearsed(subject, verdicts, inputs)
        entries: list[Entry] = []
        for (rule, _), plan in zip(asked, verdicts, strict=True):
            if isinstance(plan, str):
                entries.append(Entry(site=rule.site, status="skipped", why=plan, asked=rule.settings))
                continue
            if isinstance(plan, Dropped):
                achieved = {"parameters": float(plan.parameters)}
            else:
                _, achieved, weights = fitted[rule.site]
                if tensors is not None:
                    tensors |= weights
            facts = {"change": plan.model_dump(mode="json")}
            entries.append(Entry(site=rule.site, asked=rule.settings, achieved=achieved, facts=facts))
        return Receipt(op=self.name, entries=tuple(entries))

    def enact(self, subject: nn.Module, receipt: Receipt, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Put pass-throughs, identities and merged convolutions in place; convolutions from `tensors` or zero.

        Raises UserError where the receipt was written for another network or a tensor of it is missing.
        """
        for entry in receipt.entries:
            if "change" not in entry.facts:
                continue
            raw = entry.facts["change"]
            plan = (Dropped if raw.get("kind") == "drop" else Merged).model_validate(raw)
            why = difference(subject, plan)
            if why:
                raise UserError(f"block at site {entry.site}: the receipt is of another network: {why}")
            for name, part in changes(subject, plan).items():
                if tensors is not None and isinstance(part, nn.Conv2d):
                    load(part, plan.block, tensors)
                put(subject, name, part)
        return subject


def kind_of(rule: Rule) -> str:
    """The kind that a rule asks for, checked."""
    unknown = set(rule.settings) - {"kind"}
    if unknown:
        raise UserError(f"block at site {rule.site}: unknown setting {min(unknown)!r}; known is kind")
    kind: Choice = rule.settings.get("kind", "keep")
    if kind not in KINDS:
        raise UserError(f"block at site {rule.site}: kind {kind!r}; choose one of {', '.join(KINDS)}")
    return str(kind)


def drop(block: nn.Module, site: str, calls: Sequence[Call]) -> Dropped | str:
    """A block's pass-through, or why it must stay."""
    for call in calls:
        if call.shape != tuple(call.x.shape):
            return f"its input is {tuple(call.x.shape[1:])} and its output {call.shape[1:]}"
        if call.form < 0:
            return "it answers with more than one tensor"
        if (call.key, call.form) != (calls[0].key, calls[0].form):
            return "it is called in different ways"
    parameters = sum(parameter.numel() for parameter in block.parameters())
    return Dropped(block=site, type=type(block).__name__, parameters=parameters, key=calls[0].key, form=calls[0].form)


def changes(module: nn.Module, plan: Dropped | Merged) -> dict[str, nn.Module]:
    """The parts that come in the places of others, by full name; a merged convolution is zero."""
    block = module.get_submodule(plan.block)
    if isinstance(plan, Dropped):
        return {plan.block: Pass(plan.key, plan.form).train(block.training)}
    layer = block.get_submodule(plan.layer)
    assert isinstance(layer, nn.Conv2d)
    conv = skeleton(plan.inputs, plan.outputs, plan.kernel, plan.stride).to(layer.weight).train(layer.training)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.zero_()
    quiet: dict[str, nn.Module] = {f"{plan.block}.{name}": Same().train(block.training) for name in plan.silenced}
    return {**quiet, f"{plan.block}.{plan.layer}": conv}


def put(module: nn.Module, name: str, part: nn.Module) -> nn.Module:
    """Set the part `name` of a module; what was there."""
    holder, _, child = name.rpartition(".")
    was = module.get_submodule(name)
    setattr(module.get_submodule(holder), child, part)
    return was


def difference(module: nn.Module, plan: Dropped | Merged) -> str:
    """Why `plan` does not fit `module`, empty where it does."""
    try:
        block = module.get_submodule(plan.block)
    except AttributeError:
        return f"it changes block {plan.block}, which is not there"
    if isinstance(plan, Dropped):
        if type(block).__name__ != plan.type:
            return f"{plan.block} is a {type(block).__name__} here and was a {plan.type} there"
        return ""
    for name, shape in plan.was.items():
        try:
            layer = block.get_submodule(name)
        except AttributeError:
            return f"it merges {plan.block}.{name}, which is not there"
        if not isinstance(layer, nn.Conv2d):
            return f"it merges {plan.block}.{name}, which is a {type(layer).__name__} here"
        if tuple(layer.weight.shape) != shape:
            return f"the weight of {plan.block}.{name} is {tuple(layer.weight.shape)} here and was {shape} there"
    for name in plan.silenced:
        try:
            block.get_submodule(name)
        except AttributeError:
            return f"it silences {plan.block}.{name}, which is not there"
    return ""


def _unfit(module: nn.Module, site: str, gone: Mapping[str, str], calls: Sequence[Call], odd: bool) -> str:
    """Why a block cannot be changed at all, empty where it can."""
    for other, what in gone.items():
        if f"{site}.".startswith(f"{other}.") or f"{other}.".startswith(f"{site}."):
            return f"an earlier rule {what} {other}"
    if site in (".", ""):
        return "that is the whole network"
    try:
        part = module.get_submodule(site)
    except AttributeError:
        return "no block is there"
    if isinstance(part, Pass):
        return "an earlier change has dropped it"
    if odd:
        return "it does not take and give a tensor first"
    return "" if calls else "the forward pass does not use it"


def rehearsed(
    module: nn.Module, plans: Sequence[Dropped | Merged | str], inputs: tuple[Any, ...]
) -> list[Dropped | Merged | str]:
    """The plans under which the network runs; a reason in the place of those it cannot bear. It is left unchanged."""
    every = [plan for plan in plans if not isinstance(plan, str)]
    if not every or not _trial(module, every, inputs):
        return list(plans)
    verdicts: list[Dropped | Merged | str] = [
        plan if isinstance(plan, str) else _trial(module, [plan], inputs) or plan for plan in plans
    ]
    left = [plan for plan in verdicts if not isinstance(plan, str)]
    if left and (why := _trial(module, left, inputs)):
        verdicts = [plan if isinstance(plan, str) else f"together with the others, {why}" for plan in verdicts]
    return verdicts


def _plan(module: nn.Module, asked: Sequence[tuple[Rule, str]], seen: Seen) -> list[Dropped | Chain | str]:
    """What each rule comes to, before anything is fitted."""
    plans: list[Dropped | Chain | str] = []
    gone: dict[str, str] = {}  # site -> what an earlier rule made of it
    with still(module):
        for rule, kind in asked:
            calls = seen.calls.get(rule.site, [])
            plan: Dropped | Chain | str = _unfit(module, rule.site, gone, calls, rule.site in seen.odd)
            if not plan:
                block = module.get_submodule(rule.site)
                plan = drop(block, rule.site, calls) if kind == "drop" else merge(block, calls)
            if not isinstance(plan, str):
                gone[rule.site] = f"{kind}s"
            plans.append(plan)
    return plans


def merge(block: nn.Module, calls: Sequence[Call]) -> Chain | str:
    """How a block's convolutions become one, or why they cannot."""
    return chain(block, calls[0].again, calls[0].x) if len(calls) == 1 else "it is called more than once"


def _trial(module: nn.Module, plans: Sequence[Dropped | Merged], inputs: tuple[Any, ...]) -> str:
    undo: list[tuple[str, nn.Module]] = []
    try:
        for plan in plans:
            undo += [(name, put(module, name, part)) for name, part in changes(module, plan).items()]
        with still(module):
            module(*(one[:2] for one in inputs))
    except Exception as error:  # noqa: BLE001  a stranger's forward may raise anything
        return f"the network does not run any more: {type(error).__name__}: {_line(error)}"
    finally:
        for name, part in reversed(undo):
            put(module, name, part)
    return ""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
