"""Op `route`: where a file's exits are taken.

Thresholds are chosen on the exported file itself, in its plain form that computes every path, on data that neither
trained nor reports. Each exit has its own: how often an exit contradicts the network falls with its confidence
(isotonic regression, Zadrozny and Elkan 2002), and for one price of a contradiction an exit is taken where the work
that it saves is worth the risk. Prices from nothing to everything give the curve that a file trades along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression

from autocompress import branches, onnxfile
from autocompress.graph import open_session, types_of
from autocompress.models import routing
from autocompress.ops import Phase
from autocompress.tasks import Task, several
from autocompress.types import Choice, Entry, Profile, Receipt, Rule, UserError

if TYPE_CHECKING:
    from autocompress.export import Exported

LOSES, TUNED = 0.005, "tuned"
STEPS = 24
"""Prices that are tried at equal shares of what the samples ask; half as many more where few leave."""
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
THROUGH = ("DequantizeLinear", "Transpose", "Cast", "Reshape")
"""Between a weight and the node that multiplies by it."""


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

        A last entry, of site ".", has the curve: for settings from always to never the thresholds, the quality, the
        exits' shares and the share of the work that is saved.
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
            chosen = dict.fromkeys(found.exits, fixed)
        else:
            able = [one for one in curve if one["quality"] >= curve[-1]["quality"] - loses]
            chosen = max(able, key=lambda one: one["saved"])["thresholds"]
        shares = found.shares(chosen)
        entries = [
            _entry(route, chosen.get(route, found.defaults[route]), share=shares[route]) for route in part.routes
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
        sure = [self.compared[route] for route in self.exits]
        self.saved = saved(proto, list(zip(sure, self.answers, strict=True)))

    def _record(self, inputs: Any) -> Any:
        feed = {
            one.name: np.ascontiguousarray(x) for one, x in zip(self.session.get_inputs(), several(inputs), strict=True)
        }
        found = dict(zip(self.names, map(np.asarray, self.session.run(self.names, feed)), strict=True))
        self.calls.append(found)
        return found[self.final]

    def decided(self, call: Mapping[str, NDArray[Any]], thresholds: Mapping[str, float]) -> NDArray[np.int64]:
        """(n,) which exit each sample leaves by, as a place in `exits`; their number for none."""
        sure = [call[self.compared[route]].reshape(-1) >= thresholds[route] for route in self.exits]
        taken = np.stack([*sure, np.ones(len(call[self.final]), dtype=bool)])
        return taken.argmax(axis=0)

    def shares(self, thresholds: Mapping[str, float]) -> dict[str, float]:
        """Share of the samples that leave by each exit, or run each gated block."""
        found = dict.fromkeys(self.routes, 0.0)
        for call in self.calls:
            decided = self.decided(call, thresholds)
            for place, route in enumerate(self.exits):
                found[route] += float((decided == place).sum()) / self.count
            for route in self.routes:
                if not is_exit(route):
                    run = call[self.compared[route]].reshape(-1) >= self.defaults[route]
                    found[route] += float(run.sum()) / self.count
        return {route: round(share, 4) for route, share in found.items()}

    def quality(self, thresholds: Mapping[str, float]) -> float:
        """Of the answers with these thresholds."""
        return self.task.quality(_Replay(self, thresholds), self.split).value.value

    def curve(self) -> list[dict[str, Any]]:
        """From always to never: thresholds, quality, shares, and the share of the work that is saved."""
        found = [self.point(thresholds) for thresholds in self.settings()] if self.exits else []
        return [*found, self.point(dict.fromkeys(self.exits, routing.NEVER))]

    def point(self, thresholds: dict[str, float]) -> dict[str, Any]:
        """One setting of the exits and what comes of it."""
        shares = self.shares(thresholds)
        work = sum(shares[route] * share for route, share in zip(self.exits, self.saved, strict=True))
        return {
            "thresholds": thresholds,
            "quality": round(self.quality(thresholds), 6),
            "shares": shares,
            "saved": round(work, 4),
        }

    def settings(self) -> Iterator[dict[str, float]]:
        """Thresholds by falling price of a contradiction, as often as they differ; first all that leave at once."""
        yield dict.fromkeys(self.exits, 0.0)
        sure = [np.concatenate([call[self.compared[route]].reshape(-1) for call in self.calls]) for route in self.exits]
        said = [np.concatenate([call[name].argmax(-1).reshape(-1) for call in self.calls]) for name in self.answers]
        last = np.concatenate([call[self.final].argmax(-1).reshape(-1) for call in self.calls])
        asked: list[NDArray[np.float64]] = []  # per exit and sample the risk for each unit of work that is saved
        for level, answer, share in zip(sure, said, self.saved, strict=True):
            # clipped: between float32 and float64 the largest confidence may lie outside of what was fitted
            fitted = IsotonicRegression(increasing=False, out_of_bounds="clip")
            risk = fitted.fit_transform(level.astype(float), (answer != last).astype(float))
            asked.append(risk / max(share, 1e-6))
        # most of what is traded lies where few samples leave: there the steps are finer
        shares = np.concatenate([[1.0], np.linspace(0.98, 0.1, STEPS), np.geomspace(0.09, 0.001, STEPS // 2)])
        before: dict[str, float] = {}
        for price in np.quantile(np.concatenate(asked), shares):
            found = {
                route: float(np.float32(min(level[risk <= price], default=routing.NEVER)))
                for route, level, risk in zip(self.exits, sure, asked, strict=True)
            }
            if found != before:
                yield found
            before = found


class _Replay:
    """A predictor that gives, call by call, what was recorded, decided with some thresholds."""

    def __init__(self, plain: Plain, thresholds: Mapping[str, float]) -> None:
        self.plain, self.thresholds, self.calls = plain, thresholds, iter(plain.calls)

    def __call__(self, inputs: Any) -> NDArray[Any]:  # noqa: ARG002
        call = next(self.calls)
        decided = self.plain.decided(call, self.thresholds)
        answers = np.stack([*(call[name] for name in self.plain.answers), call[self.plain.final]])
        return answers[decided, np.arange(len(decided))]


def saved(model: onnx.ModelProto, exits: Sequence[tuple[str, str]]) -> list[float]:
    """Share of the file's multiply-adds that leaving by each exit saves, given what it and those before it compute.

    `exits` are names of what each decides by and answers. All alike where the file multiplies by no weights.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    types = types_of(model)
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in model.graph.initializer}
    macs = {node.name: _macs(node, makers, types, sizes) for node in model.graph.node}
    whole = sum(macs.values())
    if not whole:
        return [1.0] * len(exits)
    done: set[str] = set()
    found: list[float] = []
    for names in exits:
        waiting = list(names)
        while waiting:
            node = makers.get(waiting.pop())
            if node is not None and node.name not in done:
                done.add(node.name)
                waiting.extend(node.input)
        found.append(1.0 - sum(macs[name] for name in done) / whole)
    return found


def _macs(
    node: onnx.NodeProto,
    makers: Mapping[str, onnx.NodeProto],
    types: Mapping[str, onnx.TypeProto.Tensor],
    sizes: Mapping[str, int],
) -> int:
    """Multiply-adds for one sample, by the weight's size and the positions that it is used at."""
    if node.op_type not in WEIGHTED or len(node.input) < 2 or node.output[0] not in types:
        return 0
    weight = node.input[1]
    while weight not in sizes:
        maker = makers.get(weight)
        if maker is None or maker.op_type not in THROUGH:
            return 0
        weight = maker.input[0]
    shape = [max(one.dim_value, 1) for one in types[node.output[0]].shape.dim]
    positions = shape[2:] if node.op_type in ("Conv", "ConvTranspose") else shape[1:-1]
    return sizes[weight] * int(np.prod(positions, dtype=np.int64))


def routes_of(receipts: Sequence[Receipt]) -> Iterator[Entry]:
    """What `route` decided, of all receipts."""
    for receipt in receipts:
        if receipt.op == Route.name:
            yield from receipt.entries
