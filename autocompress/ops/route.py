"""Ops `exit`, `skip` and `branch`: networks that compute less for easy inputs.

`exit` puts a head behind a block that answers early where it is sure; `skip` gives a residual block a gate that runs it
or passes its input on; `branch` lets the gate choose between the block and a thin branch. All three learn while the
network trains (`models.routing`); `thresholds` sets where exits are taken, and the file that ships computes one side of
every decision (`branches`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.models import routing
from autocompress.models.calls import Call, watch
from autocompress.models.trace import still
from autocompress.ops import Phase
from autocompress.tasks import Task, several
from autocompress.types import Entry, Profile, Receipt, Record, Rule, TrialFailure, UserError

LOOKED = 4
"""Calibration examples that show what arrives at a block."""
HEADS = ("none", "linear", "hidden", "conv")
WIDE = 2
"""A hidden head has so many times as many channels as outputs, at least LEAST of them."""
LEAST = 16
JOINT = 0.5
"""Weight of each exit's loss beside the network's own."""
RATE = 4.0
"""Weight of the squared difference between the share of the time spent in gated blocks and what was asked."""
TIMED = 8
"""Runs that say what the blocks take."""


class Head(Record):
    """An exit as it was decided."""

    type: str  # of the block, so that a receipt for another network is noticed
    features: int
    outputs: int
    hidden: int
    convolved: bool = False
    confidence: routing.Confidence
    order: int


class Gated(Record):
    """A gate as it was decided."""

    type: str
    features: int
    tokens: bool
    bottleneck: int
    order: int
    key: int | str = 0
    rate: float  # share of the inputs for which the block is to run
    ms: float  # what the block takes here, in torch


class Routed:
    """What all routes have in common: hung on the network before training, which settles them."""

    name = ""
    phase: Phase = "structure"
    on_modules = True
    """They act on any module that one tensor goes into and comes out of."""
    learns = True
    """Untrained they say nothing of what they are worth."""
    params: dict[str, Any]

    fact = ""
    """Under which an entry keeps what was decided, and the block's child."""

    def hang(self, subject: nn.Module, site: str, decided: Any) -> None:
        """Hang a part on the block at `site`, as it was decided."""
        raise NotImplementedError

    def enact(self, subject: nn.Module, receipt: Receipt, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:  # noqa: ARG002
        """Hang the parts on their blocks. Raises UserError where the receipt is of another network."""
        for entry in receipt.entries:
            if (decided := entry.facts.get(self.fact)) is not None:
                _check(subject, entry.site, decided["type"], self.name)
                self.hang(subject, entry.site, decided)
        return subject

    def advance(self, module: nn.Module, receipt: Receipt, share: float) -> None:
        """Nothing follows a schedule."""

    def settle(self, module: nn.Module, receipt: Receipt) -> Receipt:  # noqa: ARG002  it stays as it is
        """What was hung on the network stays there."""
        entries = (entry.model_copy(update={"status": "done"}) for entry in receipt.entries if entry.status == "open")
        return Receipt(op=self.name, entries=tuple(entries))


class Exit(Routed):
    """An early exit behind a block.

    `head` is none, linear, hidden (two layers) or conv (two convolutions before the pooling, where there are
    positions), `confidence` softmax, entropy or learned.
    """

    name = fact = "exit"

    def __init__(self) -> None:
        self.params = {"head": "none", "confidence": "softmax"}

    def check(self, rule: Rule) -> None:
        """Raise UserError for settings that are unknown or out of range; reads nothing but the rule."""
        known = {"head": HEADS, "confidence": routing.CONFIDENCES}
        for key, value in rule.settings.items():
            if key not in known:
                raise UserError(f"exit at site {rule.site}: unknown setting {key!r}; known are head and confidence")
            if value not in known[key]:
                raise UserError(f"exit at site {rule.site}: {key} {value!r}; choose one of {', '.join(known[key])}")

    def decide(
        self,
        subject: nn.Module,
        rules: Sequence[Rule],
        task: Task,
        profile: Profile,  # noqa: ARG002
        tensors: dict[str, Tensor] | None = None,  # noqa: ARG002  heads begin at random and are trained
    ) -> Receipt:
        """Which blocks can have an exit, in the order in which the network reaches them.

        Raises UserError for settings that are unknown, TrialFailure where the network does not run.
        """
        for rule in rules:
            self.check(rule)
        asked = [rule for rule in rules if rule.settings.get("head", "none") != "none"]
        if not asked:
            return Receipt(op=self.name)
        calls, answer = look(subject, [rule.site for rule in asked], task, self.name)
        entries: list[Entry] = []
        found: list[tuple[int, Rule, Head]] = []
        for rule in asked:
            why = unfit(subject, rule.site, calls) or _headless(calls[rule.site][0], answer)
            if why:
                entries.append(Entry(site=rule.site, status="skipped", why=why, asked=rule.settings))
                continue
            call = calls[rule.site][0]
            outputs = answer.shape[1]
            features = _features(call.shape)
            convolved = rule.settings["head"] == "conv" and len(call.shape) == 4
            hidden = max(LEAST, WIDE * outputs) if rule.settings["head"] != "linear" else 0
            hidden = max(hidden, WIDE * features) if convolved else hidden
            head = Head(
                type=type(subject.get_submodule(rule.site)).__name__,
                features=features,
                outputs=outputs,
                hidden=hidden,
                convolved=convolved,
                confidence=rule.settings.get("confidence", "softmax"),  # pyright: ignore[reportArgumentType]
                order=0,
            )
            found.append((call.before, rule, head))
        found.sort(key=lambda one: one[0])
        for order, (_, rule, head) in enumerate(found, len(routing.exits(subject))):
            facts = {self.fact: head.model_copy(update={"order": order}).model_dump(mode="json")}
            entries.append(Entry(site=rule.site, status="open", asked=rule.settings, facts=facts))
        return Receipt(op=self.name, entries=tuple(entries))

    def hang(self, subject: nn.Module, site: str, decided: Any) -> None:
        """A head whose weights begin at random, the same ones always."""
        head = Head.model_validate(decided)
        with fixed(head.order):
            part = routing.Exit(
                head.features, head.outputs, head.hidden, head.confidence, head.order, convolved=head.convolved
            )
        routing.hang_exit(subject, site, part)

    def penalty(self, module: nn.Module, receipt: Receipt) -> Tensor | None:  # noqa: ARG002
        """The exits learn what the network says."""
        found = routing.lesson(module)
        return None if found is None else JOINT * found


class Skip(Routed):
    """A gate that runs a residual block or skips it; it runs for the share `rate` of the inputs, 1 for no gate."""

    name = "skip"
    fact = "gate"

    def __init__(self) -> None:
        self.params = {"rate": 1.0}

    def check(self, rule: Rule) -> None:
        """Raise UserError for settings that are unknown or out of range; reads nothing but the rule."""
        for key, value in rule.settings.items():
            if key not in self.params:
                raise UserError(
                    f"{self.name} at site {rule.site}: unknown setting {key!r}; known: {', '.join(self.params)}"
                )
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                raise UserError(f"{self.name} at site {rule.site}: {key} {value!r} is not above 0 and at most 1")

    def bottleneck(self, rule: Rule, features: int) -> int:  # noqa: ARG002
        """Channels of the thin branch; 0 for none."""
        return 0

    def decide(
        self,
        subject: nn.Module,
        rules: Sequence[Rule],
        task: Task,
        profile: Profile,  # noqa: ARG002
        tensors: dict[str, Tensor] | None = None,  # noqa: ARG002
    ) -> Receipt:
        """Which blocks can have a gate, and what each takes.

        Raises UserError for settings that are unknown, TrialFailure where the network does not run.
        """
        for rule in rules:
            self.check(rule)
        asked = [rule for rule in rules if float(rule.settings.get("rate", 1.0)) < 1]
        if not asked:
            return Receipt(op=self.name)
        calls, _ = look(subject, [rule.site for rule in asked], task, self.name)
        verdicts = {rule.site: unfit(subject, rule.site, calls) or ungated(calls[rule.site]) for rule in asked}
        times = _times(subject, [site for site, why in verdicts.items() if not why], task)
        entries: list[Entry] = []
        order = len(routing.gates(subject))
        for rule in asked:
            if why := verdicts[rule.site]:
                entries.append(Entry(site=rule.site, status="skipped", why=why, asked=rule.settings))
                continue
            call = calls[rule.site][0]
            features = _features(call.shape)
            gate = Gated(
                type=type(subject.get_submodule(rule.site)).__name__,
                features=features,
                tokens=len(call.shape) < 4,
                bottleneck=self.bottleneck(rule, features),
                order=order,
                key=call.key,
                rate=float(rule.settings["rate"]),
                ms=times[rule.site],
            )
            order += 1
            facts = {self.fact: gate.model_dump(mode="json")}
            entries.append(Entry(site=rule.site, status="open", asked=rule.settings, facts=facts))
        return Receipt(op=self.name, entries=tuple(entries))

    def hang(self, subject: nn.Module, site: str, decided: Any) -> None:
        """A gate that begins by running the block."""
        gate = Gated.model_validate(decided)
        with fixed(1000 + gate.order):
            part = routing.Gate(gate.features, gate.bottleneck, tokens=gate.tokens, order=gate.order, key=gate.key)
            _begin(part)
        routing.hang_gate(subject, site, part)

    def penalty(self, module: nn.Module, receipt: Receipt) -> Tensor | None:
        """Drawn to the asked share of the time that the gated blocks take, by what they were measured to take."""
        found = [
            (gate, module.get_submodule(entry.site).gate.take())  # pyright: ignore[reportCallIssue]
            for entry in receipt.entries
            if self.fact in entry.facts
            for gate in [Gated.model_validate(entry.facts[self.fact])]
        ]
        if not found:
            return None
        whole = sum(gate.ms for gate, _ in found)
        spent = sum(gate.ms * chance.float().mean() for gate, chance in found) / whole
        asked = sum(gate.ms * gate.rate for gate, _ in found) / whole
        each = torch.stack([(chance.float().mean() - gate.rate).square() for gate, chance in found]).mean()
        return RATE * ((spent - asked) ** 2 + 0.25 * each)


class Branch(Skip):
    """A gate that chooses between a block and a thin branch: `rate` of the inputs take the block.

    The thin branch is a residual bottleneck with the share `width` of the channels.
    """

    name = "branch"

    def __init__(self) -> None:
        self.params = {"rate": 1.0, "width": 0.25}

    def bottleneck(self, rule: Rule, features: int) -> int:
        """Channels of the thin branch."""
        return max(1, round(float(rule.settings.get("width", 0.25)) * features))


# --- looking at blocks ----------------------------------------------------------------------------------------------


def look(subject: nn.Module, sites: Sequence[str], task: Task, name: str) -> tuple[dict[str, list[Call]], Tensor]:
    """Calls of the blocks, and the network's answer."""
    inputs = several(next(iter(task.batches("calibration", LOOKED, limit=LOOKED)))[0])
    try:
        with still(subject):
            seen = watch(subject, inputs, set(sites))
            answers = several(subject(*inputs))
    except Exception as error:  # a stranger's forward may raise anything
        line = " ".join(str(error).split())[:160]
        raise TrialFailure(f"{name}: the network does not run: {type(error).__name__}: {line}") from error
    if len(answers) > 1:
        raise TrialFailure(f"{name}: the network has {len(answers)} outputs; an input can only be routed to one answer")
    return {site: [] if site in seen.odd else seen.calls.get(site, []) for site in sites}, next(iter(answers))


def unfit(module: nn.Module, site: str, calls: Mapping[str, list[Call]]) -> str:
    """Why nothing can be hung on a block, empty where it can."""
    if site in (".", ""):
        return "that is the whole network"
    try:
        module.get_submodule(site)
    except AttributeError:
        return "no block is there"
    if not calls[site]:
        return "the forward pass does not use it with one tensor"
    if len(calls[site]) > 1:
        return f"it is called {len(calls[site])} times"
    return ""


def _features(shape: Sequence[int]) -> int:
    return shape[1] if len(shape) == 4 else shape[-1]


def _headless(call: Call, answer: Tensor) -> str:
    """Why no head can be behind a block, empty where one can."""
    if answer.dim() != 2 or answer.shape[1] < 2:
        return f"the network answers with shape {tuple(answer.shape[1:])}: an exit needs one score for each class"
    if len(call.shape) not in (2, 3, 4):
        return f"its output of shape {call.shape[1:]} cannot feed a head"
    return ""


def ungated(calls: Sequence[Call]) -> str:
    """Why a block cannot be passed by, empty where it can."""
    call = calls[0]
    if call.shape != tuple(call.x.shape):
        return f"its input is {tuple(call.x.shape[1:])} and its output {call.shape[1:]}"
    if call.form != 0:
        return "it answers with more than a tensor"
    return ""


def _check(module: nn.Module, site: str, kind: str, name: str) -> None:
    try:
        block = module.get_submodule("" if site == "." else site)
    except AttributeError:
        raise UserError(f"{name} at site {site}: the receipt is of another network: no block is there") from None
    if type(block).__name__ != kind:
        raise UserError(
            f"{name} at site {site}: the receipt is of another network: a {type(block).__name__} is here, "
            f"a {kind} was there"
        )


@contextmanager
def fixed(seed: int) -> Iterator[None]:
    """Within, torch draws the same numbers whoever else drew before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def _begin(gate: routing.Gate) -> None:
    """Run the block, and a thin branch that adds nothing."""
    gate.decide.weight.mul_(0.1)
    gate.decide.bias.fill_(routing.LEAN)
    if gate.thin is not None:
        last: Any = list(gate.thin.children())[-1]
        last.weight.zero_()
        last.bias.zero_()


def _times(module: nn.Module, sites: Sequence[str], task: Task) -> dict[str, float]:
    """Milliseconds that each block takes in torch here, for one sample: how much of a rate each is worth."""
    inputs = several(next(iter(task.batches("calibration", 1, limit=1)))[0])
    spent: dict[str, list[float]] = {site: [] for site in sites}
    began: dict[str, float] = {}
    hooks: list[Any] = []
    for site in sites:
        block = module.get_submodule(site)
        hooks.append(block.register_forward_pre_hook(lambda *_, site=site: began.update({site: time.perf_counter()})))
        hooks.append(
            block.register_forward_hook(lambda *_, site=site: spent[site].append(time.perf_counter() - began[site]))
        )
    try:
        with still(module):
            for _ in range(TIMED):
                module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {site: float(f"{1e3 * float(np.median(taken)):.4g}") for site, taken in spent.items()}
