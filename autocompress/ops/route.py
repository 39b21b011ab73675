"""Ops `exit`, `skip`, `branch` and `route`: networks that compute less for easy inputs.

`exit` puts a head behind a block that answers early where it is sure; `skip` gives a residual block a gate that runs it
or passes its input on; `branch` lets the gate choose between the block and a thin branch. All three learn while the
network trains (`models.routing`). `route` acts on the exported file: it sets the thresholds of the exits on data that
neither trained nor reports, so that no more than `loses` of quality goes, and the file that ships computes one side of
every decision (`branches`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress import branches, onnxfile
from autocompress.graph import open_session
from autocompress.models import routing
from autocompress.models.calls import Call, watch
from autocompress.models.trace import still
from autocompress.ops import Phase
from autocompress.tasks import Task, several
from autocompress.types import Choice, Entry, Profile, Receipt, Record, Rule, TrialFailure, UserError

if TYPE_CHECKING:
    from autocompress.export import Exported

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
LOSES, TUNED = 0.005, "tuned"
STEPS = 24
"""Thresholds that are tried at equal shares of the samples; half as many more where few leave."""


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


class _Routed:
    """What the three have in common: hung on the network before training, which settles them."""

    name = ""
    phase: Phase = "structure"
    on_modules = True
    """They act on any module that one tensor goes into and comes out of."""
    learns = True
    """Untrained they say nothing of what they are worth."""
    params: dict[str, Any]

    def advance(self, module: nn.Module, receipt: Receipt, share: float) -> None:
        """Nothing follows a schedule."""

    def settle(self, module: nn.Module, receipt: Receipt) -> Receipt:  # noqa: ARG002  it stays as it is
        """What was hung on the network stays there."""
        entries = (entry.model_copy(update={"status": "done"}) for entry in receipt.entries if entry.status == "open")
        return Receipt(op=self.name, entries=tuple(entries))


class Exit(_Routed):
    """An early exit behind a block.

    `head` is none, linear, hidden (two layers) or conv (two convolutions before the pooling, where there are
    positions), `confidence` softmax, entropy or learned.
    """

    name = "exit"

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
        calls, answer = _look(subject, [rule.site for rule in asked], task, self.name)
        entries: list[Entry] = []
        found: list[tuple[int, Rule, Head]] = []
        for rule in asked:
            why = _unfit(subject, rule.site, calls) or _headless(calls[rule.site][0], answer)
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
            facts = {"head": head.model_copy(update={"order": order}).model_dump(mode="json")}
            entries.append(Entry(site=rule.site, status="open", asked=rule.settings, facts=facts))
        return Receipt(op=self.name, entries=tuple(entries))

    def enact(self, subject: nn.Module, receipt: Receipt, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:  # noqa: ARG002
        """Hang the heads on their blocks. Raises UserError where the receipt is of another network."""
        for entry in receipt.entries:
            if "head" in entry.facts:
                head = Head.model_validate(entry.facts["head"])
                _check(subject, entry.site, head.type, self.name)
                if not hasattr(subject.get_submodule(entry.site), "exit"):
                    with _fixed(head.order):
                        part = routing.Exit(
                            head.features,
                            head.outputs,
                            head.hidden,
                            head.confidence,
                            head.order,
                            convolved=head.convolved,
                        )
                    routing.hang_exit(subject, entry.site, part)
        return subject

    def penalty(self, module: nn.Module, receipt: Receipt) -> Tensor | None:  # noqa: ARG002
        """The exits learn what the network says."""
        found = routing.lesson(module)
        return None if found is None else JOINT * found


class Skip(_Routed):
    """A gate that runs a residual block or skips it; it runs for the share `rate` of the inputs, 1 for no gate."""

    name = "skip"
    widths: tuple[float, ...] = ()

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
        calls, _ = _look(subject, [rule.site for rule in asked], task, self.name)
        verdicts = {rule.site: _unfit(subject, rule.site, calls) or _ungated(calls[rule.site]) for rule in asked}
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
            facts = {"gate": gate.model_dump(mode="json")}
            entries.append(Entry(site=rule.site, status="open", asked=rule.settings, facts=facts))
        return Receipt(op=self.name, entries=tuple(entries))

    def enact(self, subject: nn.Module, receipt: Receipt, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:  # noqa: ARG002
        """Hang the gates on their blocks. Raises UserError where the receipt is of another network."""
        for entry in receipt.entries:
            if "gate" in entry.facts:
                gate = Gated.model_validate(entry.facts["gate"])
                _check(subject, entry.site, gate.type, self.name)
                if not hasattr(subject.get_submodule(entry.site), "gate"):
                    with _fixed(1000 + gate.order):
                        part = routing.Gate(
                            gate.features, gate.bottleneck, tokens=gate.tokens, order=gate.order, key=gate.key
                        )
                        _begin(part)
                    routing.hang_gate(subject, entry.site, part)
        return subject

    def penalty(self, module: nn.Module, receipt: Receipt) -> Tensor | None:
        """Drawn to the asked share of the time that the gated blocks take, by what they were measured to take."""
        found = [
            (gate, module.get_submodule(entry.site).gate.take())  # pyright: ignore[reportCallIssue]
            for entry in receipt.entries
            if "gate" in entry.facts
            for gate in [Gated.model_validate(entry.facts["gate"])]
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


def _look(subject: nn.Module, sites: Sequence[str], task: Task, name: str) -> tuple[dict[str, list[Call]], Tensor]:
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


def _unfit(module: nn.Module, site: str, calls: Mapping[str, list[Call]]) -> str:
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


def _ungated(calls: Sequence[Call]) -> str:
    """Why a block cannot be passed by, empty where it can."""
    call = calls[0]
    if call.shape != tuple(call.x.shape):
        return f"its input is {tuple(call.x.shape[1:])} and its output {call.shape[1:]}"
    if call.form != 0:
        return "it answers with more than a tensor"
    return ""


def _check(module: nn.Module, site: str, kind: str, name: str) -> None:
    try:
        block = module.get_submodule(site)
    except AttributeError:
        raise UserError(f"{name} at site {site}: the receipt is of another network: no block is there") from None
    if type(block).__name__ != kind:
        raise UserError(
            f"{name} at site {site}: the receipt is of another network: a {type(block).__name__} is here, "
            f"a {kind} was there"
        )


class _fixed:  # noqa: N801  used as a function
    """Within, torch draws the same numbers whoever else drew before."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.fork = torch.random.fork_rng(devices=[])
        self.fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *error: object) -> None:
        self.fork.__exit__(None, None, None)


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


# --- the file: thresholds --------------------------------------------------------------------------------------------


class Route:
    """Op `route`, phase numeric: the thresholds of a file's exits.

    `loses` is the quality that exits may cost, as a share of 1, on the split `tune` (or `selection` where a task has
    none); `threshold` sets all of them by hand instead. Gates keep the threshold at which they were trained.
    """

    name = "route"
    phase: Phase = "numeric"
    params: dict[str, Any] = {"loses": 0.005, "threshold": "tuned"}

    def check(self, rule: Rule) -> None:
        """Raise UserError for settings that are unknown or out of range; reads nothing but the rule."""
        settings_of([rule])

    def decide(
        self,
        subject: Exported,
        rules: Sequence[Rule],
        task: Task,
        profile: Profile,  # noqa: ARG002
        tensors: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> Receipt:
        """One entry per exit with its threshold and the share of samples that leave there, and one per gate.

        A last entry, of site ".", has the curve: for thresholds from never to always the quality and the exits' shares.
        """
        loses, fixed = settings_of(rules)
        part = next((part for part in subject.parts if part.routes), None)
        if part is None:
            return Receipt(op=self.name)
        found = Plain(part.model, part.routes, task)
        if fixed is None and getattr(task, "first_look", False):
            chosen = {route: 0.0 if is_exit(route) else routing.NEVER for route in part.routes}
            return Receipt(op=self.name, entries=tuple(_entry(route, value) for route, value in chosen.items()))
        curve = found.curve()
        if fixed is not None:
            chosen = fixed
        else:
            whole = curve[-1]["quality"]
            chosen = min((one["threshold"] for one in curve if one["quality"] >= whole - loses), default=routing.NEVER)
        shares = found.shares(chosen)
        entries = [
            _entry(route, chosen if is_exit(route) else found.defaults[route], share=shares[route])
            for route in part.routes
        ]
        told = {"curve": curve, "split": found.split, "samples": found.count, "loses": loses}
        return Receipt(op=self.name, entries=(*entries, Entry(site=".", facts=told)))

    def enact(self, subject: Exported, receipt: Receipt, tensors: Mapping[str, Any] | None = None) -> Exported:  # noqa: ARG002
        """Write the thresholds into the file. Raises UserError for a route that it does not have."""
        wanted = {entry.site: entry.facts["threshold"] for entry in receipt.entries if "threshold" in entry.facts}
        parts = []
        for part in subject.parts:
            if not part.routes:
                parts.append(part)
                continue
            if unknown := wanted.keys() - part.routes.keys():
                raise UserError(f"route: the receipt speaks of {min(unknown)}, the file has {', '.join(part.routes)}")
            proto = onnxfile.read(part.model)
            branches.with_thresholds(proto, part.routes)
            parts.append(replace(part, model=branches.set_thresholds(onnxfile.write(proto), wanted)))
        return replace(subject, parts=tuple(parts))


def is_exit(route: str) -> bool:
    """Whether a route is an exit; else it is a gate."""
    return route.endswith(".exit")


def settings_of(rules: Sequence[Rule]) -> tuple[float, float | None]:
    """What may be lost, and the threshold that was set by hand."""
    asked: dict[str, Choice] = {}
    for rule in rules:
        asked |= rule.settings
    if unknown := set(asked) - set(Route.params):
        raise UserError(f"route: unknown setting {min(unknown)!r}; known are {', '.join(Route.params)}")
    loses, threshold = asked.get("loses", LOSES), asked.get("threshold", TUNED)
    if loses is None or isinstance(loses, str | bool) or not 0 <= loses < 1:
        raise UserError(f"route: loses {loses!r} is not a share from 0 to 1")
    if threshold == TUNED:
        return float(loses), None
    if threshold is None or isinstance(threshold, str | bool) or not 0 <= threshold <= 1:
        raise UserError(f"route: threshold {threshold!r}; give a number from 0 to 1, or {TUNED}")
    return float(loses), float(threshold)


def _entry(route: str, threshold: float, **achieved: float) -> Entry:
    return Entry(site=route, achieved=achieved, facts={"threshold": float(np.float32(threshold))})


class Plain:
    """A plain file with what it decides by laid open: every path computed once for the samples of a split."""

    def __init__(self, model: bytes, routes: Mapping[str, str], task: Task) -> None:
        proto = onnxfile.read(model)
        branches.with_thresholds(proto, routes)
        nodes = {node.name: node for node in proto.graph.node}
        makers = {name: node for node in proto.graph.node for name in node.output}
        self.task, self.routes = task, tuple(routes)
        self.defaults = branches.thresholds_of(onnxfile.write(proto))
        self.exits = [route for route in routes if is_exit(route)]
        self.compared: dict[str, str] = {}
        wanted: list[str] = []
        for route, where in routes.items():
            condition = makers[nodes[where].input[0]]
            while condition.op_type in branches.CARRIED:
                condition = makers[condition.input[0]]
            self.compared[route] = next(name for name in condition.input if name != branches.threshold_name(route))
            wanted.append(self.compared[route])
        # answers of the exits, and what comes when none is taken: the innermost decision's other side
        self.answers = [nodes[routes[route]].input[1] for route in self.exits]
        self.final = nodes[routes[self.exits[-1]]].input[2] if self.exits else proto.graph.output[0].name
        outputs = {value.name for value in proto.graph.output}
        for name in dict.fromkeys([*wanted, *self.answers, self.final]):
            if name not in outputs:
                proto.graph.output.append(onnx.ValueInfoProto(name=name))
        self.session = open_session(proto)
        self.names = [value.name for value in proto.graph.output]
        self.calls: list[dict[str, NDArray[Any]]] = []
        self.split = "tune"
        try:
            self.first = task.quality(self._record, "tune")
        except (UserError, KeyError, ValueError, LookupError):
            self.split, self.calls = "selection", []
            self.first = task.quality(self._record, "selection")
        self.count = sum(len(call[self.final]) for call in self.calls)

    def _record(self, inputs: Any) -> Any:
        feed = {
            one.name: np.ascontiguousarray(x) for one, x in zip(self.session.get_inputs(), several(inputs), strict=True)
        }
        found = dict(zip(self.names, map(np.asarray, self.session.run(self.names, feed)), strict=True))
        self.calls.append(found)
        return found[self.final]

    def decided(self, call: Mapping[str, NDArray[Any]], threshold: float) -> NDArray[np.int64]:
        """(n,) which exit each sample leaves by, as a place in `exits`; their number for none."""
        sure = [call[self.compared[route]].reshape(-1) >= threshold for route in self.exits]
        taken = np.stack([*sure, np.ones(len(call[self.final]), dtype=bool)])
        return taken.argmax(axis=0)

    def shares(self, threshold: float) -> dict[str, float]:
        """Share of the samples that leave by each exit, or run each gated block."""
        found = dict.fromkeys(self.routes, 0.0)
        for call in self.calls:
            decided = self.decided(call, threshold)
            for place, route in enumerate(self.exits):
                found[route] += float((decided == place).sum()) / self.count
            for route in self.routes:
                if not is_exit(route):
                    run = call[self.compared[route]].reshape(-1) >= self.defaults[route]
                    found[route] += float(run.sum()) / self.count
        return {route: round(share, 4) for route, share in found.items()}

    def quality(self, threshold: float) -> float:
        """Of the answers at one threshold for all exits."""
        return self.task.quality(_Replay(self, threshold), self.split).value.value

    def curve(self) -> list[dict[str, Any]]:
        """By rising threshold, from always to never: quality and shares."""
        if not self.exits:
            return [
                {"threshold": routing.NEVER, "quality": self.first.value.value, "shares": self.shares(routing.NEVER)}
            ]
        sure = np.concatenate([call[self.compared[route]].reshape(-1) for call in self.calls for route in self.exits])
        # most of what is traded lies where few samples leave: there the steps are finer
        shares = np.concatenate([np.linspace(0, 0.9, STEPS), 1 - np.geomspace(0.09, 0.001, STEPS // 2), [1.0]])
        levels = np.unique(np.quantile(sure, shares).astype(np.float32))
        return [
            {"threshold": float(level), "quality": round(self.quality(level), 6), "shares": self.shares(level)}
            for level in (0.0, *map(float, levels), routing.NEVER)
        ]


class _Replay:
    """A predictor that gives, call by call, what was recorded, decided at a threshold."""

    def __init__(self, plain: Plain, threshold: float) -> None:
        self.plain, self.threshold, self.calls = plain, threshold, iter(plain.calls)

    def __call__(self, inputs: Any) -> NDArray[Any]:  # noqa: ARG002
        call = next(self.calls)
        decided = self.plain.decided(call, self.threshold)
        answers = np.stack([*(call[name] for name in self.plain.answers), call[self.plain.final]])
        return answers[decided, np.arange(len(decided))]


def routes_of(receipts: Sequence[Receipt]) -> Iterator[Entry]:
    """What `route` decided, of all receipts."""
    for receipt in receipts:
        if receipt.op == Route.name:
            yield from receipt.entries
