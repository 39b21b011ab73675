"""Op `route`: where a file's exits are taken.

Thresholds are chosen on the exported file itself, in its plain form that computes every path, on data that neither
trained nor reports.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from autocompress import branches, onnxfile
from autocompress.graph import open_session
from autocompress.models import routing
from autocompress.ops import Phase
from autocompress.tasks import Task, several
from autocompress.types import Choice, Entry, Profile, Receipt, Rule, UserError

if TYPE_CHECKING:
    from autocompress.export import Exported

LOSES, TUNED = 0.005, "tuned"
STEPS = 24
"""Thresholds that are tried at equal shares of the samples; half as many more where few leave."""


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
            condition = branches.comparison(nodes[where], makers)
            assert condition is not None, "a route's Where has a comparison, or it is none"
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
        except UserError:  # the task has no such split
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
