"""Static int8 on the ONNX graph, site by site (onnxruntime.quantization, QDQ format).

decide looks at calibration data and keeps the range of every activation that will be an integer; enact places
quantize/dequantize pairs from those ranges and needs no data. Between two integer layers what can stays integer
(ReLU, additions, pooling, concatenation, reshaping), so that the network does not change its type back and forth:
such borders cost more than a narrow layer gains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autocompress.ops import Phase
from autocompress.ops.integers import Plan, Range, with_pairs
from autocompress.ops.ranges import ranges_of
from autocompress.tasks import Task
from autocompress.types import Entry, Numeric, Profile, Receipt, Rule, UserError

if TYPE_CHECKING:
    from autocompress.export import Exported, Part

IMAGES = 128
"""Calibration samples unless the caller limits them."""


class Quantize:
    """Op `quantize`, phase numeric: `bits` is "float" or "int8" per site; all else is the profile's `numeric`."""

    name = "quantize"
    phase: Phase = "numeric"
    params: dict[str, Any] = {"bits": "float"}

    def decide(
        self,
        subject: Exported,
        rules: Sequence[Rule],
        task: Task,
        profile: Profile,
        tensors: dict[str, Any] | None = None,  # noqa: ARG002  (nothing is fitted here)
        *,
        limit: int | None = None,
    ) -> Receipt:
        """Ranges of every activation that becomes an integer, from the calibration split's first `limit` samples.

        One entry per int8 rule: `facts[part]` has its `nodes` and the `ranges` that these give (`<node>:output`). A
        last entry of site "." has the numeric settings, all integer nodes and the ranges of what lies between. Sites
        without weights in the file are skipped. Raises UserError for unknown bits, TrialFailure if an activation is
        not finite.
        """
        chosen: list[tuple[str, dict[str, tuple[str, ...]]]] = []
        for rule in rules:
            bits = rule.settings.get("bits", "float")
            if bits not in ("float", "int8"):
                raise UserError(f"quantize {rule.site}: bits = {bits!r}; choose float or int8")
            if bits == "int8":
                nodes = {part.name: part.nodes.get(rule.site, ()) for part in subject.parts}
                chosen.append((rule.site, {part: names for part, names in nodes.items() if names}))
        plans: dict[str, Plan] = {}
        for part in subject.parts:
            seeds = {name for _, nodes in chosen for name in nodes.get(part.name, ())}
            plans[part.name] = Plan.of(part, seeds)
        if not any(plan.nodes for plan in plans.values()):
            plans = {}
        ranges = ranges_of(subject.parts, plans, task, profile.numeric, limit or IMAGES) if plans else {}
        entries: list[Entry] = []
        for site, nodes in chosen:
            asked: dict[str, Any] = {"bits": "int8"}
            if not nodes:
                entries.append(Entry(site=site, status="skipped", why="no weights in the file", asked=asked))
                continue
            facts: dict[str, Any] = {}
            for part, names in nodes.items():
                own = [key for key in ranges[part] if key.rpartition(":")[0] in names]
                facts[part] = {"nodes": list(names), "ranges": {key: ranges[part].pop(key) for key in own}}
            entries.append(Entry(site=site, asked=asked, achieved={"bits": 8.0}, facts=facts))
        if plans:
            facts = {part: {"nodes": list(plan.nodes), "ranges": ranges[part]} for part, plan in plans.items()}
            entries.append(Entry(site=".", facts={"numeric": profile.numeric.model_dump(), **facts}))
        return Receipt(op=self.name, entries=tuple(entries))

    def enact(
        self,
        subject: Exported,
        receipt: Receipt,
        tensors: Mapping[str, Any] | None = None,  # noqa: ARG002
    ) -> Exported:
        """New parts with Q/DQ pairs where the receipt says; equal receipts and parts give equal bytes.

        Raises UserError where the receipt names a part, node or tensor that is not there.
        """
        last = receipt.entries[-1] if receipt.entries else None
        if last is None or "numeric" not in last.facts:
            return subject
        numeric = Numeric.model_validate(last.facts["numeric"])
        planned = {part: facts for part, facts in last.facts.items() if part != "numeric"}
        unknown = sorted(set(planned) - {part.name for part in subject.parts})
        if unknown:
            raise UserError(f"quantize: the receipt speaks of part {unknown[0]!r}, which this network does not have")
        parts: list[Part] = []
        for part in subject.parts:
            nodes = tuple(planned.get(part.name, {}).get("nodes", ()))
            if not nodes:
                parts.append(part)
                continue
            plan = Plan.read(part, nodes)
            ranges: dict[str, Range] = {}
            for entry in receipt.entries:
                facts = entry.facts.get(part.name, {})
                for name in (*facts.get("nodes", ()), *(key.rpartition(":")[0] for key in facts.get("ranges", ()))):
                    if name not in plan.by_name:
                        raise UserError(
                            f"quantize {entry.site}: the receipt speaks of node {name!r}, which part {part.name!r} "
                            "of this network does not have"
                        )
                ranges.update(facts.get("ranges", {}))
            parts.append(replace(part, model=with_pairs(plan, ranges, numeric)))
        return replace(subject, parts=tuple(parts))
