"""Fewer bits on the ONNX graph, site by site: static and dynamic int8, 4-bit weights, narrow floats.

decide looks at calibration data and keeps the range of every activation that will be an integer; enact writes the
graph from those ranges and needs no data. Which nodes become integers is `integers.Plan`, how they are written is
`pairs` (static int8) and `products` (the other forms).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import onnx
from onnx import helper

from autocompress.onnxfile import write
from autocompress.ops import Phase, equalize, fourbits, shifts
from autocompress.ops.integers import Plan, refusal
from autocompress.ops.pairs import Range, rebuilt, with_pairs
from autocompress.ops.products import MICROSOFT, Form, dynamic, four_bits, narrow_floats
from autocompress.ops.ranges import Look, ranges_of
from autocompress.ops.wiring import WEIGHTED, Wiring, product_refusal
from autocompress.tasks import Task
from autocompress.types import Choice, Entry, Numeric, Profile, Receipt, Rule, UserError

if TYPE_CHECKING:
    from autocompress.export import Exported, Part

IMAGES = 64
"""Calibration samples unless the caller limits them; on CIFAR, 128 or 512 give the same quality."""
CHOICES: dict[str, tuple[Choice, ...]] = {
    "bits": ("float", "int8", "int8-dynamic", "int4", "float16", "bfloat16"),
    "calibration": ("profile", "minmax", "entropy", "percentile"),
    "granularity": ("profile", "channel", "tensor"),
    "weights": ("profile", "int4"),
    "equalize": (False, True),
    "correct_bias": (False, True),
}
WIDTH = {"int8": 8.0, "int8-dynamic": 8.0, "int4": 4.0, "float16": 16.0, "bfloat16": 16.0}


@dataclass
class _Claim:
    """One rule's layers: what it asks of them and which of them it gets, by part."""

    site: str
    asked: dict[str, Choice]
    nodes: dict[str, list[str]] = field(default_factory=dict)
    why: str = ""

    @property
    def bits(self) -> str:
        return str(self.asked["bits"])


class Quantize:
    """Op `quantize`, phase numeric: how each site computes; what is not asked for is the profile's `numeric`.

    `bits`: "int8" is static (Jacob et al. 2018, "Quantization and Training of Neural Networks", section 2),
    "int8-dynamic" finds the range of activations while running, "int4" keeps weights of matrix products in 4 bits by
    blocks of 32 and computes in floats, "float16" and "bfloat16" are for profiles whose `types` have them.
    `calibration` and `granularity` of int8 take the place of the profile's at a site; `weights` "int4" keeps weights of
    what is int8 there in four bits (`fourbits`), with `bits` or without. At site ".": `equalize` (Nagel et al. 2019,
    section 4.1) and `correct_bias` (section 4.2).
    """

    name = "quantize"
    phase: Phase = "numeric"
    params: dict[str, Any] = {name: choices[0] for name, choices in CHOICES.items()}
    network_params = ("equalize", "correct_bias")
    """Settings of the whole network, at site "."."""

    def check(self, rule: Rule) -> None:
        """Raise UserError for settings that are unknown or out of range; reads nothing but the rule."""
        _checked([rule])

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

        Where rules overlap, the one whose site has fewer layers holds. One entry per rule that asks for other bits:
        `facts[part]` has its `nodes` and, for int8, the `ranges` that these give (`<node>:output`); a range that
        training has learned (`Exported.learned`) takes the place of the calibrated one. A last entry of site "." has
        the numeric settings, all integer nodes, the ranges of what lies between, equalization and bias shifts. Sites
        that cannot do what is asked are skipped. Raises UserError for unknown settings, TrialFailure if an activation
        is not finite.
        """
        settings = _checked(rules)
        whole = {name: any(rule.settings.get(name) is True for rule in settings) for name in self.network_params}
        wirings = {part.name: Wiring.of(part.model) for part in subject.parts}
        claims = _claimed(subject.parts, wirings, settings, profile)
        kinds = {part: {n: c for c in claims for n in c.nodes.get(part, ())} for part in wirings}
        seeds = {
            part: frozenset(name for name, claim in found.items() if claim.bits == "int8")
            for part, found in kinds.items()
        }
        equalized: dict[str, list[dict[str, Any]]] = {}
        if whole["equalize"]:
            equalized = {part: equalize.decide(wiring, seeds[part]) for part, wiring in wirings.items()}
            for part, wiring in wirings.items():
                equalize.enact(wiring, equalized[part])
        plans = {part: Plan.of(wiring, seeds[part]) for part, wiring in wirings.items()}
        narrow = _in_four_bits(subject.parts, wirings, kinds, settings, profile.numeric)
        count = limit or IMAGES
        numeric = profile.numeric
        ranges = _ranges(subject, plans, kinds, task, numeric, count)
        moved: dict[str, dict[str, list[float]]] = {}
        if whole["correct_bias"] and any(seeds.values()):
            written: dict[str, onnx.ModelProto] = {}
            for part, plan in plans.items():
                channels = {name: _per_channel(claim.asked, numeric) for name, claim in kinds[part].items()}
                written[part] = with_pairs(plan, ranges[part], numeric, channels, narrow[part], bare=True)
            moved = shifts.decide(plans, written, task, count)
        entries: list[Entry] = []
        for claim in claims:
            if claim.bits == "float":
                continue
            if not claim.nodes:
                entries.append(Entry(site=claim.site, status="skipped", why=claim.why, asked=claim.asked))
                continue
            facts: dict[str, Any] = {}
            for part, names in claim.nodes.items():
                facts[part] = {"nodes": names}
                if claim.bits == "int8":
                    own = [key for key in ranges[part] if key.rpartition(":")[0] in names]
                    facts[part]["ranges"] = {key: ranges[part].pop(key) for key in own}
            every = [(part, name) for part, names in claim.nodes.items() for name in names]
            four = sum(name in narrow[part] for part, name in every)
            done = {"bits": WIDTH[claim.bits]} | ({"weights": 4.0} if 2 * four > len(every) else {})
            entries.append(Entry(site=claim.site, asked=claim.asked, achieved=done, facts=facts))
        if any(kinds.values()) or any(equalized.values()):
            parts: dict[str, dict[str, Any]] = {}
            for part, plan in plans.items():
                found: dict[str, Any] = {"nodes": list(plan.nodes), "ranges": ranges[part]}
                extra = {
                    "equalized": equalized.get(part),
                    "shifts": moved.get(part),
                    "four_bits": sorted(narrow[part]),
                }
                parts[part] = found | {key: value for key, value in extra.items() if value}
            network: dict[str, Choice] = {name: True for name, wanted in whole.items() if wanted}
            entries.append(Entry(site=".", asked=network, facts={"numeric": numeric.model_dump(), **parts}))
        return Receipt(op=self.name, entries=tuple(entries))

    def enact(
        self,
        subject: Exported,
        receipt: Receipt,
        tensors: Mapping[str, Any] | None = None,  # noqa: ARG002
    ) -> Exported:
        """New parts that compute as the receipt says; equal receipts and parts give equal bytes.

        Raises UserError where the receipt names a part, node or tensor that is not there.
        """
        last = receipt.entries[-1] if receipt.entries else None
        if last is None or "numeric" not in last.facts:
            return subject
        numeric = Numeric.model_validate(last.facts["numeric"])
        planned = {part: facts for part, facts in last.facts.items() if part != "numeric"}
        known = {part.name for part in subject.parts}
        for entry in receipt.entries:
            unknown = sorted(set(entry.facts) - known - {"numeric"})
            if unknown:
                raise UserError(
                    f"quantize: the receipt speaks of part {unknown[0]!r}, which this network does not have"
                )
        parts: list[Part] = []
        for part in subject.parts:
            if part.name not in planned:
                parts.append(part)
                continue
            wiring = Wiring.of(part.model)
            ranges: dict[str, Range] = {}
            asked: dict[str, Mapping[str, Choice]] = {}
            for entry in receipt.entries:
                facts = entry.facts.get(part.name, {})
                for name in (*facts.get("nodes", ()), *(key.rpartition(":")[0] for key in facts.get("ranges", ()))):
                    if name not in wiring.nodes:
                        raise UserError(
                            f"quantize {entry.site}: the receipt speaks of node {name!r}, which part {part.name!r} "
                            "of this network does not have"
                        )
                ranges.update(facts.get("ranges", {}))
                if entry is not last:
                    asked.update(dict.fromkeys(facts.get("nodes", ()), entry.asked))
            equalize.enact(wiring, planned[part.name].get("equalized", ()))
            shifts.enact(wiring, planned[part.name].get("shifts", {}))
            wiring = Wiring(wiring.model)
            plan = Plan(wiring, tuple(planned[part.name].get("nodes", ())))
            narrow = frozenset(planned[part.name].get("four_bits", ()))
            parts.append(replace(part, model=_written(plan, ranges, numeric, asked, narrow)))
        return replace(subject, parts=tuple(parts))


# --- what is asked of which layer -----------------------------------------------------------------------------------


def _checked(rules: Sequence[Rule]) -> list[Rule]:
    """The rules, their settings being choices of this op. Raises UserError."""
    for rule in rules:
        for name, value in rule.settings.items():
            choices = CHOICES.get(name, ())
            if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in choices):
                known = ", ".join(str(one).lower() for one in choices) or "no such setting"
                raise UserError(f"quantize {rule.site}: {name} = {value!r}; choose {known}")
            if name in Quantize.network_params and rule.site != "." and value is True:
                raise UserError(f"quantize {rule.site}: {name} is for the whole network, write `sites: .`")
    return list(rules)


def _claimed(
    parts: Sequence[Part], wirings: Mapping[str, Wiring], rules: Sequence[Rule], profile: Profile
) -> list[_Claim]:
    """One claim per rule that has bits, in the rules' order."""
    claims: list[_Claim] = []
    held: dict[tuple[str, str], _Claim] = {}
    sized: list[tuple[int, _Claim]] = []
    for rule in rules:
        if "bits" not in rule.settings:
            continue
        asked = {name: value for name, value in rule.settings.items() if name not in Quantize.network_params}
        asked = {name: value for name, value in asked.items() if name == "bits" or value != "profile"}
        claim = _Claim(rule.site, asked)
        claims.append(claim)
        sized.append((sum(len(part.nodes.get(rule.site, ())) for part in parts), claim))
    for size, claim in sorted(sized, key=lambda one: -one[0]):
        if not size:
            claim.why = "no weights in the file"
        for part in parts:
            held.update(dict.fromkeys(((part.name, name) for name in part.nodes.get(claim.site, ())), claim))
    for (part, name), claim in held.items():
        if claim.bits == "float":
            continue
        wiring = wirings[part]
        node = wiring.nodes.get(name)
        why = _refusal(wiring, node, claim.bits, profile) if node is not None else "its node is not in the file"
        if why:
            claim.why = claim.why or why
        else:
            claim.nodes.setdefault(part, []).append(name)
    for claim in claims:
        if not claim.nodes:
            claim.why = claim.why or "every layer of it has a rule of its own"
    return claims


def _refusal(wiring: Wiring, node: onnx.NodeProto, bits: str, profile: Profile) -> str:
    """Why a layer cannot compute as asked, "" if it can."""
    if bits in ("int8", "int8-dynamic") and "int8" not in profile.types:
        return f"profile {profile.name} does not run int8 (its `types` are {', '.join(profile.types)})"
    if bits == "int8":
        return refusal(wiring, node)
    if bits in ("int8-dynamic", "int4"):
        return product_refusal(wiring, node)
    if bits not in profile.types:
        return f"profile {profile.name} does not run {bits} (its `types` are {', '.join(profile.types)})"
    weight = wiring.constants.get(node.input[1])
    constant = weight is not None and weight.data_type == onnx.TensorProto.FLOAT
    return "" if constant else "its weight is no constant of floats"


def _ranges(
    subject: Exported,
    plans: Mapping[str, Plan],
    kinds: Mapping[str, Mapping[str, _Claim]],
    task: Task,
    numeric: Numeric,
    limit: int,
) -> dict[str, dict[str, Range]]:
    """A range for every key of the plans: learned where training has learned it, else from calibration data.

    A tensor's method is that of the layer that gives it, else of the first layer that reads it, else the profile's.
    """
    learned = {part.name: _learned(subject, part, plans[part.name]) for part in subject.parts}
    wanted: dict[str, dict[str, tuple[str, str]]] = {}
    for part, plan in plans.items():
        methods = _methods(plan, kinds[part], numeric)
        rest = {key: tensor for key, tensor in plan.keys.items() if key not in learned[part]}
        wanted[part] = {key: (tensor, methods.get(tensor, numeric.calibration)) for key, tensor in rest.items()}
    found: dict[str, dict[str, Range]] = {part: {} for part in plans}
    if any(wanted.values()):
        looks = {
            part: Look(plan.wiring.model, tuple(dict.fromkeys(tensor for tensor, _ in wanted[part].values())))
            for part, plan in plans.items()
        }
        found = ranges_of(looks, wanted, task, limit)
    return {part: {key: (found[part] | learned[part])[key] for key in plan.keys} for part, plan in plans.items()}


def _methods(plan: Plan, kinds: Mapping[str, _Claim], numeric: Numeric) -> dict[str, str]:
    """Tensor -> calibration that a layer beside it asks for."""
    methods: dict[str, str] = {}
    for name in (name for name in plan.nodes if name in kinds):
        method = str(kinds[name].asked.get("calibration", numeric.calibration))
        given, taken = plan.wiring.nodes[name].output[0], plan.wiring.nodes[name].input[0]
        methods[plan.vanishing.get(given, given)] = method
        methods.setdefault(plan.shared.get(taken, taken), method)
    return methods


def _learned(subject: Exported, part: Part, plan: Plan) -> dict[str, Range]:
    """Ranges that training has found, by key: what a layer was trained to take in, else what the one before gives."""
    by_tensor = {tensor: key for key, tensor in plan.keys.items()}
    found: dict[str, Range] = {}
    for side in ("output", "input"):  # what layers were trained to read outranks what others were trained to give
        for site, ranges in subject.learned.items():
            for name in part.nodes.get(site, ()) if side in ranges else ():
                node = plan.wiring.nodes.get(name)
                if node is None or name not in plan.members or node.op_type not in WEIGHTED:
                    continue
                tensor = node.input[0] if side == "input" else node.output[0]
                tensor = plan.vanishing.get(tensor, tensor)
                tensor = plan.shared.get(tensor, tensor)
                if tensor in by_tensor:
                    low, high = ranges[side]
                    found[by_tensor[tensor]] = (float(low), float(high))
    return found


def _in_four_bits(
    parts: Sequence[Part],
    wirings: Mapping[str, Wiring],
    kinds: Mapping[str, Mapping[str, _Claim]],
    rules: Sequence[Rule],
    numeric: Numeric,
) -> dict[str, frozenset[str]]:
    """The int8 nodes of each part whose weights are kept in four bits; none where the profile's weights are no int8."""
    asked = {rule.site: rule.settings["weights"] for rule in rules if "weights" in rule.settings}
    found: dict[str, set[str]] = {part.name: set() for part in parts}
    # of sites that overlap the one with fewer layers holds, as for bits
    for site in sorted(asked, key=lambda one: -sum(len(part.nodes.get(one, ())) for part in parts)):
        for part in parts:
            named = set(part.nodes.get(site, ())) & kinds[part.name].keys()
            found[part.name] -= named
            if asked[site] == "int4" and numeric.weight == "int8":
                wiring = wirings[part.name]
                found[part.name] |= {
                    name
                    for name in named
                    if kinds[part.name][name].bits == "int8"
                    and fourbits.packable(wiring.constants[wiring.nodes[name].input[1]].dims)
                }
    return {part: frozenset(names) for part, names in found.items()}


def _per_channel(asked: Mapping[str, Choice], numeric: Numeric) -> bool:
    """Whether a layer's weight has a scale for each output channel."""
    fine = asked.get("granularity", "profile")
    return numeric.per_channel if fine == "profile" else fine == "channel"


# --- what is written ------------------------------------------------------------------------------------------------


def _written(
    plan: Plan,
    ranges: Mapping[str, Range],
    numeric: Numeric,
    asked: Mapping[str, Mapping[str, Choice]],
    narrow: frozenset[str],
) -> bytes:
    """The part's file, each node as it is asked to compute."""
    static = {name: _per_channel(how, numeric) for name, how in asked.items() if how["bits"] == "int8"}
    model = with_pairs(plan, ranges, numeric, static, narrow) if static else plan.wiring.model
    forms: dict[str, Form] = {}
    wiring = Wiring(model)
    for name, how in asked.items():
        node, bits = wiring.nodes[name], str(how["bits"])
        if bits == "int8-dynamic":
            forms[name] = dynamic(wiring, node, numeric, _per_channel(how, numeric))
        elif bits == "int4":
            forms[name] = four_bits(wiring, node)
        elif bits in ("float16", "bfloat16"):
            forms[name] = narrow_floats(wiring, node, bits)
    if forms:
        nodes: list[onnx.NodeProto] = []
        seen: set[str] = set()  # several products may read one activation that is rounded once
        for node in model.graph.node:
            for one in forms[node.name].nodes if node.name in forms else (node,):
                if one.name not in seen:
                    nodes.append(one)
                    seen.add(one.name)
        model = rebuilt(model, nodes, [tensor for form in forms.values() for tensor in form.constants])
        domains = {entry.domain for entry in model.opset_import}
        if MICROSOFT not in domains and any(node.domain == MICROSOFT for node in nodes):
            model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return write(model)
