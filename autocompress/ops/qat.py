"""Op `qat`: training with int8 simulated where the file will have it, on ranges that are learned.

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
section 3, with the learned ranges of Esser et al. 2020 (`rounding.Range`). What is rounded is what the int8 file
rounds: the input of each layer, its weight with the batch norm folded in, and what it gives after batch norm and ReLU.
The layers stay as they are: hooks round, a layer's child `qat` holds its ranges until `settle` takes both away.

In a policy the op acts only on layers that op `quantize` makes int8 (`narrow`): what stays float is trained as float.
The ranges reach `quantize` by site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from autocompress.models.trace import examples, leaves, still
from autocompress.ops import Phase
from autocompress.ops.flow import Flow
from autocompress.ops.fourbits import innermost
from autocompress.ops.places import Place, Spot, spots
from autocompress.ops.rounding import Range, gain_of, rounded_weight
from autocompress.tasks import Task, several
from autocompress.types import Entry, Numeric, Policy, Profile, Receipt, Rule, TrialFailure, UserError

IMAGES, BATCH = 32, 8
"""Calibration samples that the ranges start from; training finds the rest."""
FREEZE = 0.5
"""Share of training after which batch norms keep their statistics (Krishnamoorthi 2018, section 3.2.2)."""
CHILD = "qat"


class Qat:
    """Op `qat`, phase train: `bits` is "float" or "int8" at a site, for every convolution and linear layer there."""

    name = "qat"
    phase: Phase = "train"

    def __init__(self) -> None:
        self.params: dict[str, Any] = {"bits": "float"}

    def narrow(self, subject: nn.Module, rules: Sequence[Rule], policy: Policy) -> tuple[list[Rule], list[Entry]]:
        """The rules for the layers that the policy's `quantize` rules make int8, and an entry where there are none.

        Of `quantize` rules that overlap, the one of the innermost site holds, as that op has it.
        """
        bits = {rule.site: rule.settings["bits"] for rule in policy.of("quantize") if "bits" in rule.settings}
        narrowed: list[Rule] = []
        skipped: list[Entry] = []
        for rule in rules:
            if _bits(rule) == "float":
                continue
            found = leaves(subject, rule.site)
            integer = [name for name in found if innermost(bits, name) == "int8"]
            narrowed += [rule.model_copy(update={"site": name or "."}) for name in integer]
            if not integer:
                why = "quantize makes nothing int8 there" if found else "no layer is there"
                skipped.append(Entry(site=rule.site, status="skipped", why=why, asked=rule.settings))
        return narrowed, skipped

    def check(self, rule: Rule) -> None:
        """Raise UserError for settings that are unknown or out of range; reads nothing but the rule."""
        _bits(rule)

    def decide(
        self,
        subject: nn.Module,
        rules: Sequence[Rule],
        task: Task,
        profile: Profile,
        tensors: dict[str, Any] | None = None,  # noqa: ARG002  what is fitted is two numbers per range
    ) -> Receipt:
        """One entry per layer (its own name is the entry's site), with where its ranges act and where they start.

        A range starts at the mean over calibration batches of the smallest and largest value, which leaves single
        outliers out. Layers that do not run exactly once are skipped. Raises UserError for unknown bits,
        TrialFailure for values that are not finite.
        """
        chosen: dict[str, dict[str, Any]] = {}
        entries: list[Entry] = []
        for rule in rules:
            if _bits(rule) == "float":
                continue
            found = leaves(subject, rule.site)
            chosen |= {name: dict(rule.settings) for name in found if name not in chosen}
            if not found:
                entries.append(Entry(site=rule.site, status="skipped", why="no layer is there", asked=rule.settings))
        if not chosen:
            return Receipt(op=self.name, entries=tuple(entries))
        planned = spots(subject, Flow.of(subject, examples(task.input, 2)), tuple(chosen))
        starts = _observe(subject, [place for spot in planned if isinstance(spot, Spot) for place in spot.own], task)
        for name, spot in zip(chosen, planned, strict=True):
            asked = chosen[name]
            if isinstance(spot, str):
                entries.append(Entry(site=name or ".", status="skipped", why=spot, asked=asked))
                continue
            ranges = {side: list(starts[place.owner]) for side, place in spot.places.items()}
            facts = {
                **spot.model_dump(mode="json", exclude_none=True),
                "numeric": profile.numeric.model_dump(mode="json", include={"weight", "per_channel", "reduce_range"}),
                "ranges": ranges,
            }
            entries.append(Entry(site=name or ".", asked=asked, achieved={"bits": 8.0}, facts=facts))
        return Receipt(op=self.name, entries=tuple(entries))

    def enact(
        self,
        subject: nn.Module,
        receipt: Receipt,
        tensors: Mapping[str, Any] | None = None,  # noqa: ARG002
    ) -> nn.Module:
        """Install ranges and hooks in place. Raises UserError where the receipt speaks of another network."""
        for entry, spot in _spots(receipt):
            layer = _layer(subject, entry.site, spot)
            numeric = Numeric.model_validate(entry.facts["numeric"])
            # one step per channel is the same step before and after a batch norm that scales the channel
            folded = spot.norm is not None and not (numeric.per_channel and numeric.weight == "int8")
            norm = _part(subject, entry.site, spot.norm or "") if folded else None
            instrument = Instrument({place.side: Range(*entry.facts["ranges"][place.side]) for place in spot.own})
            layer.add_module(CHILD, instrument)
            rounding = _Weight(numeric, norm)
            instrument.handles.append(layer.register_forward_pre_hook(rounding.put))
            instrument.handles.append(layer.register_forward_hook(rounding.take, always_call=True))
            for place in spot.own:
                hook = _Activation(instrument.ranges[place.side])
                for module in place.modules:
                    instrument.handles.append(hook.on(_part(subject, entry.site, module), place.after))
        return subject

    def advance(self, module: nn.Module, receipt: Receipt, share: float) -> None:
        """Keep learned ranges within reason; from `FREEZE` on batch norms of these layers keep their statistics."""
        for entry, spot in _spots(receipt):
            for place in spot.own:
                _range(module, place).hold(*entry.facts["ranges"][place.side])
            if spot.norm is not None and share >= FREEZE:
                module.get_submodule(spot.norm).eval()

    def penalty(self, module: nn.Module, receipt: Receipt) -> Tensor | None:  # noqa: ARG002
        """None."""
        return None

    def settle(self, module: nn.Module, receipt: Receipt) -> Receipt:
        """Remove ranges and hooks in place; the entries' `facts["ranges"]` are the learned ones."""
        learned: dict[str, list[float]] = {}
        for _, spot in _spots(receipt):
            learned |= {place.owner: list(_range(module, place).ends()) for place in spot.own}
        entries = [
            entry
            if entry.status == "skipped"
            else entry.model_copy(update={"facts": {**entry.facts, "ranges": _learned(Spot.read(entry), learned)}})
            for entry in receipt.entries
        ]
        for entry, spot in _spots(receipt):
            layer = _layer(module, entry.site, spot)
            instrument: Any = layer.get_submodule(CHILD)
            for handle in instrument.handles:
                handle.remove()
            delattr(layer, CHILD)
        return receipt.model_copy(update={"entries": tuple(entries)})


class Instrument(nn.Module):
    """The ranges that a layer owns, by side, and the hooks to remove."""

    def __init__(self, ranges: Mapping[str, Range]) -> None:
        super().__init__()
        self.ranges = nn.ModuleDict(dict(ranges))
        self.handles: list[RemovableHandle] = []


class _Weight:
    """Puts the rounded weight in the place of a layer's weight while the layer runs.

    An attribute of the instance hides the parameter, which keeps its name, its gradient and its optimizer.
    """

    def __init__(self, numeric: Numeric, norm: nn.Module | None) -> None:
        self.numeric, self.norm = numeric, norm

    def put(self, layer: nn.Module, inputs: Any) -> None:  # noqa: ARG002
        weight: Any = layer._parameters["weight"]
        gain = None if self.norm is None else gain_of(self.norm)
        # the gradient goes straight through: the largest weight defines the step, so none is cut off
        layer.__dict__["weight"] = weight + (rounded_weight(weight, self.numeric, gain) - weight).detach()

    def take(self, layer: nn.Module, inputs: Any, outputs: Any) -> None:  # noqa: ARG002
        layer.__dict__.pop("weight", None)


class _Activation:
    """Rounds what goes into a module, or what comes out."""

    def __init__(self, span: Callable[[Tensor], Tensor]) -> None:
        self.span = span

    def on(self, part: nn.Module, after: bool) -> RemovableHandle:
        return part.register_forward_hook(self.after) if after else part.register_forward_pre_hook(self.before)

    def before(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ARG002
        return (self.span(inputs[0]), *inputs[1:])

    def after(self, module: nn.Module, inputs: Any, outputs: Tensor) -> Tensor:  # noqa: ARG002
        return self.span(outputs)


class _Observer:
    """Stands where a range will stand and remembers the ends of every batch."""

    def __init__(self) -> None:
        self.lows: list[float] = []
        self.highs: list[float] = []

    def __call__(self, x: Tensor) -> Tensor:
        low, high = torch.aminmax(x.detach().float())
        self.lows.append(float(low))
        self.highs.append(float(high))
        return x


def _observe(subject: nn.Module, places: Sequence[Place], task: Task) -> dict[str, tuple[float, float]]:
    """Where the ranges start, by owner."""
    watching: dict[str, Any] = {place.owner: _Observer() for place in places}
    handles: list[RemovableHandle] = []
    for place in places:
        hook = _Activation(watching[place.owner])
        first = subject.get_submodule(place.modules[0])  # all of them see the same values
        handles.append(hook.on(first, place.after))
    try:
        with still(subject):
            for inputs, _ in task.batches("calibration", BATCH, limit=IMAGES):
                subject(*several(inputs))
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, tuple[float, float]] = {}
    for place in places:
        seen = watching[place.owner]
        if not seen.lows:
            raise UserError(f"task {task.name}: the calibration split is empty")
        low, high = sum(seen.lows) / len(seen.lows), sum(seen.highs) / len(seen.highs)
        if not low <= high < float("inf") or low == -float("inf"):
            raise TrialFailure(f"qat: {place.owner} is not finite on calibration data")
        found[place.owner] = place.within(low, high)
    return found


def _bits(rule: Rule) -> str:
    unknown = set(rule.settings) - {"bits"}
    if unknown:
        raise UserError(f"qat at site {rule.site}: unknown setting {min(unknown)!r}; known is bits")
    bits = rule.settings.get("bits", "float")
    if bits not in ("float", "int8"):
        raise UserError(f"qat at site {rule.site}: bits = {bits!r}; choose float or int8")
    return str(bits)


def _spots(receipt: Receipt) -> list[tuple[Entry, Spot]]:
    return [(entry, Spot.read(entry)) for entry in receipt.entries if entry.status == "done"]


def _learned(spot: Spot, learned: Mapping[str, list[float]]) -> dict[str, list[float]]:
    return {side: learned[place.owner] for side, place in spot.places.items()}


def _range(module: nn.Module, place: Place) -> Range:
    site, _, side = place.owner.rpartition(":")
    found: Any = module.get_submodule(site if site != "." else "").get_submodule(CHILD)
    return found.ranges[side]


def _part(module: nn.Module, site: str, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise UserError(f"qat at site {site}: the receipt is of another network: there is no {name!r}") from None


def _layer(module: nn.Module, site: str, spot: Spot) -> nn.Module:
    layer = _part(module, site, "" if site == "." else site)
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        raise UserError(f"qat at site {site}: the receipt is of another network: a {type(layer).__name__} is there")
    shape = tuple(layer.weight.shape)
    if shape != spot.shape:
        raise UserError(
            f"qat at site {site}: the receipt is of another network: the weight is {shape} here and {spot.shape} there"
        )
    if spot.norm is not None and not isinstance(_part(module, site, spot.norm), _BatchNorm):
        raise UserError(f"qat at site {site}: the receipt is of another network: {spot.norm} is no batch norm here")
    return layer
