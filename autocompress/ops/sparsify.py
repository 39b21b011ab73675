"""Op `sparsify`: training with single weights at zero, chosen by magnitude (Han et al. 2015, "Learning both Weights and
Connections for Efficient Neural Networks", section 3).

The weights themselves are set to zero before every step, so whatever reads them sees zeros. The file stays dense: it
becomes smaller where zeros are stored compressed (op `store`), faster only on hardware that the profile describes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.models.trace import leaves
from autocompress.ops import Phase
from autocompress.ops.masks import PATTERNS, decide, misfit
from autocompress.tasks import Task
from autocompress.types import Entry, Profile, Receipt, Record, Rule, UserError

STRENGTH = 0.1
"""What the penalty adds to the loss at the start, whatever the network's size: the loss of a trained classifier is of
this order, and L1 of 1e-5 on the weights of a CIFAR ResNet-20 amounts to as much."""
CHOICES: dict[str, tuple[str, ...]] = {
    "pattern": tuple(PATTERNS),
    "scope": ("layer", "global"),
    "schedule": ("oneshot", "gradual"),
    "penalty": ("none", "l1", "group"),
}
RAMP, UPDATES = 0.6, 24
"""Gradual: the ratio is reached at this share of training, in so many steps."""
SORTED_OUT = 0.3
"""One shot with a penalty: the share of training that the penalty has for sorting the weights out."""
MASK, REACHED = "sparsify_kept", "sparsify_reached"


class Plan(Record):
    """What one rule asks of which layers (name -> shape of the weight)."""

    ratio: float
    pattern: str = "unstructured"
    scope: str = "layer"
    schedule: str = "oneshot"
    penalty: str = "none"
    layers: dict[str, tuple[int, ...]] = {}
    start: float = 0.0  # the penalty's norm of the weights at the start

    def target(self, share: float) -> float:
        """Sparsity at a share of training: all at once, or cubic (Zhu and Gupta 2018, "To prune, or not to prune")."""
        if self.schedule == "gradual":
            passed = min(1.0, int(share / RAMP * UPDATES + 1e-9) / UPDATES)
            return self.ratio * (1 - (1 - passed) ** 3)
        return self.ratio if self.penalty == "none" or share >= SORTED_OUT else 0.0

    def groups(self) -> list[list[str]]:
        """Layers whose weights compete."""
        return [list(self.layers)] if self.scope == "global" else [[name] for name in self.layers]


class Sparsify:
    """Op `sparsify`, phase train. `ratio` is the share of a site's weights that go (0: leave alone).

    `pattern` 2:4 and 4:8 leave two of four and four of eight along the input channels; the ratio then is 0.5 whatever
    `ratio` says. `scope` global ranks the weights of all layers of the site together. `schedule` oneshot decides
    before training (with a penalty, after 30 % of it), gradual on a cubic ramp over the first 60 %. `penalty`
    drives weights to zero until they are decided: l1, or group lasso over filters and over input channels (Wen et al.
    2016, "Learning Structured Sparsity in Deep Neural Networks", section 3.1); it adds 0.1 to the loss at the start.
    Biases and norms are not touched.
    """

    name = "sparsify"
    phase: Phase = "train"

    def __init__(self) -> None:
        self.params: dict[str, Any] = {"ratio": 0.0, **{name: choices[0] for name, choices in CHOICES.items()}}

    def check(self, rule: Rule) -> None:
        """Raise UserError for settings that are unknown or out of range; reads nothing but the rule."""
        _plan(rule)

    def decide(
        self,
        subject: nn.Module,
        rules: Sequence[Rule],
        task: Task,  # noqa: ARG002  magnitudes need no data
        profile: Profile,  # noqa: ARG002
        tensors: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> Receipt:
        """Which layers each rule speaks of; the weights themselves are chosen from their values while training.

        Raises UserError for an unknown setting or a ratio outside [0, 1).
        """
        taken: set[str] = set()
        entries: list[Entry] = []
        for rule in rules:
            plan = _plan(rule)
            if plan.ratio == 0:
                continue
            names = leaves(subject, rule.site)
            shapes = {name: _shape(subject.get_submodule(name)) for name in names if name not in taken}
            fits = {name: shape for name, shape in shapes.items() if not misfit(shape, plan.pattern)}
            if not fits:
                why = next((f"{name}: {misfit(shape, plan.pattern)}" for name, shape in shapes.items()), "")
                why = why or ("an earlier rule has it" if names else "no layer is there")
                entries.append(Entry(site=rule.site, status="skipped", why=why, asked=rule.settings))
                continue
            taken.update(fits)
            plan = plan.model_copy(update={"layers": fits})
            weights = [_weight(subject, name).detach() for name in fits]
            plan = plan.model_copy(update={"start": float(_norm(plan.penalty, weights))})
            facts = plan.model_dump(mode="json")
            if left := sorted(set(shapes) - set(fits)):
                facts["left"] = {name: misfit(shapes[name], plan.pattern) for name in left}
            entries.append(Entry(site=rule.site, asked=rule.settings, achieved={"ratio": plan.ratio}, facts=facts))
        return Receipt(op=self.name, entries=tuple(entries))

    def enact(
        self,
        subject: nn.Module,
        receipt: Receipt,
        tensors: Mapping[str, Any] | None = None,  # noqa: ARG002
    ) -> nn.Module:
        """Give every layer its mask, decided from its weights. Raises UserError for the receipt of another network."""
        for entry, plan in _plans(receipt):
            for name, shape in plan.layers.items():
                found = _found(subject, entry.site, name)
                if _shape(found) != shape:
                    raise UserError(
                        f"sparsify at site {entry.site}: the receipt is of another network: the weight of {name} is "
                        f"{_shape(found)} here and {shape} there"
                    )
                found.register_buffer(MASK, torch.ones(shape, dtype=torch.bool))
                found.register_buffer(REACHED, torch.zeros((), dtype=torch.float64))
        self.advance(subject, receipt, 0.0)
        return subject

    @torch.no_grad()
    def advance(self, module: nn.Module, receipt: Receipt, share: float) -> None:
        """Decide anew where the schedule asks for more, and set to zero what has gone."""
        for _, plan in _plans(receipt):
            target = plan.target(share)
            for group in plan.groups():
                layers = {name: module.get_submodule(name) for name in group}
                if target > float(layers[group[0]].get_buffer(REACHED)):
                    kept = decide({name: _weight(module, name) for name in group}, plan.pattern, target)
                    for name, layer in layers.items():
                        layer.get_buffer(MASK).copy_(kept[name])
                        layer.get_buffer(REACHED).fill_(target)
                for name, layer in layers.items():
                    if target > 0:
                        _weight(module, name).mul_(layer.get_buffer(MASK))

    def penalty(self, module: nn.Module, receipt: Receipt) -> Tensor | None:
        """`STRENGTH` times the norm of the weights over what it was at the start, while it has something to decide."""
        found: Tensor | None = None
        every = [plan for _, plan in _plans(receipt) if plan.penalty != "none" and plan.start > 0]
        for kind in dict.fromkeys(plan.penalty for plan in every):
            plans = [plan for plan in every if plan.penalty == kind]
            names = [name for plan in plans if not _done(module, plan) for name in plan.layers]
            if names:
                norm = _norm(kind, [_weight(module, name) for name in names])
                term = norm * (STRENGTH / sum(plan.start for plan in plans))
                found = term if found is None else found + term
        return found

    @torch.no_grad()
    def settle(self, module: nn.Module, receipt: Receipt) -> Receipt:
        """Set to zero for good and remove the masks; entries say which share of each layer's weights is zero."""
        entries: list[Entry] = []
        for entry in receipt.entries:
            if entry.status == "skipped":
                entries.append(entry)
                continue
            plan = Plan.model_validate({name: entry.facts[name] for name in Plan.model_fields})
            zeros = weights = 0
            sparsity: dict[str, float] = {}
            for name in plan.layers:
                layer, weight = module.get_submodule(name), _weight(module, name)
                weight.mul_(layer.get_buffer(MASK))
                delattr(layer, MASK)
                delattr(layer, REACHED)
                gone = int((weight == 0).sum())
                sparsity[name] = gone / weight.numel()
                zeros, weights = zeros + gone, weights + weight.numel()
            facts = {**entry.facts, "sparsity": sparsity}
            entries.append(entry.model_copy(update={"achieved": {"ratio": zeros / weights}, "facts": facts}))
        return receipt.model_copy(update={"entries": tuple(entries)})


def _plan(rule: Rule) -> Plan:
    """A rule's settings, defaults filled in."""
    if unknown := set(rule.settings) - {"ratio", *CHOICES}:
        known = ", ".join(("ratio", *CHOICES))
        raise UserError(f"sparsify at site {rule.site}: unknown setting {min(unknown)!r}; known are {known}")
    ratio = rule.settings.get("ratio", 0.0)
    if isinstance(ratio, bool | str) or not 0 <= ratio < 1:
        raise UserError(f"sparsify at site {rule.site}: ratio {ratio!r} is no share in [0, 1)")
    for name, choices in CHOICES.items():
        if (value := rule.settings.get(name, choices[0])) not in choices:
            raise UserError(f"sparsify at site {rule.site}: {name} = {value!r}; choose one of {', '.join(choices)}")
    plan = Plan.model_validate({"ratio": ratio, **rule.settings})
    cell = PATTERNS[plan.pattern]
    return plan.model_copy(update={"ratio": 1 - cell[0] / cell[1]}) if cell and plan.ratio > 0 else plan


def _plans(receipt: Receipt) -> list[tuple[Entry, Plan]]:
    return [
        (entry, Plan.model_validate({name: entry.facts[name] for name in Plan.model_fields}))
        for entry in receipt.entries
        if entry.status == "done"
    ]


def _found(module: nn.Module, site: str, name: str) -> nn.Module:
    try:
        found = module.get_submodule(name)
    except AttributeError:
        raise UserError(f"sparsify at site {site}: the receipt is of another network: there is no {name!r}") from None
    if not isinstance(found, nn.Conv2d | nn.Linear):
        what = type(found).__name__
        raise UserError(f"sparsify at site {site}: the receipt is of another network: {name} is a {what} here")
    return found


def _shape(layer: nn.Module) -> tuple[int, ...]:
    return tuple(_own(layer).shape)


def _weight(module: nn.Module, name: str) -> Tensor:
    return _own(module.get_submodule(name))


def _own(layer: nn.Module) -> Tensor:
    weight: Any = layer.weight
    return weight


def _done(module: nn.Module, plan: Plan) -> bool:
    first = module.get_submodule(next(iter(plan.layers)))
    return float(first.get_buffer(REACHED)) >= plan.ratio


def _norm(kind: str, weights: Sequence[Tensor]) -> Tensor:
    """L1, or the sum of the norms of all filters and of all input channels, each times the root of its size."""
    found = torch.zeros(())
    for weight in weights:
        if kind == "l1":
            found = found + weight.abs().sum()
        elif kind == "group":
            for axis in (0, 1):
                slices = weight.movedim(axis, 0).flatten(1)
                found = found + torch.linalg.vector_norm(slices, dim=1).sum() * slices.shape[1] ** 0.5
    return found
