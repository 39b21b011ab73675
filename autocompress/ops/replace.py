"""Op `replace`: a dense k x k convolution becomes a cheaper form of itself, fitted to its own outputs.

The forms are those of `models.compact`. Each starts from the weights alone (best rank-1 filter per input channel,
HOSVD, the middle of the kernel: Jaderberg et al. 2014; Kim et al. 2016, "Compression of Deep CNNs") and is then solved
by (alternating) least squares for the layer's outputs on calibration data (Zhang et al. 2016, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.models.compact import KINDS, Form, Kind, form, make, spread
from autocompress.models.trace import leaves
from autocompress.ops import Phase
from autocompress.ops.fit import each
from autocompress.ops.forms import refine, start
from autocompress.tasks import Task
from autocompress.types import Entry, Profile, Receipt, Rule, TrialFailure, UserError

ROWS = 2048
"""Sampled rows per layer: on CIFAR's ResNet-20 more gain nothing, a form has few weights."""


class Replace:
    """Compact forms in the place of convolutions. `kind` is keep, separable, shuffle, bottleneck or smaller."""

    name = "replace"
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
        profile: Profile,
        tensors: dict[str, Tensor] | None = None,
    ) -> Receipt:
        """Choose shapes and fit; weights go into `tensors` as `<layer>/<name in the form>`, e.g. `conv1/0.weight`.

        Without `tensors` nothing is fitted, and a layer that answers with a constant is not noticed.


        Raises UserError for an unknown kind, TrialFailure where the network does not run on the calibration data.
        """
        taken: dict[str, Form] = {}
        plans: list[tuple[Rule, list[Form] | str]] = []
        for rule in rules:
            kind = kind_of(rule)
            if kind is None:
                continue
            found = plan(subject, rule.site, kind, profile.channel_multiple, taken)
            plans.append((rule, found))
            if not isinstance(found, str):
                taken |= {one.layer: one for one in found}
        errors: dict[str, tuple[float, float] | str] = {}
        try:
            for name, error, parts in fit(subject, taken, task) if tensors is not None else ():
                errors[name] = error
                if tensors is not None:
                    tensors |= {f"{name}/{key}": tensor for key, tensor in parts.items()}
        except Exception as error:  # a stranger's forward may raise anything
            line = " ".join(str(error).split())[:160]
            raise TrialFailure(f"replace: cannot be fitted: {type(error).__name__}: {line}") from error
        return Receipt(op=self.name, entries=tuple(_entry(rule, found, errors) for rule, found in plans))

    def enact(self, subject: nn.Module, receipt: Receipt, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Put the forms in place, filled from `tensors` or left zero (trained weights follow).

        Raises UserError where the receipt was written for another network or a tensor of it is missing.
        """
        for entry in receipt.entries:
            for raw in entry.facts.get("forms", ()):
                found = Form.model_validate(raw)
                why = difference(subject, found)
                if why:
                    raise UserError(f"replace at site {entry.site}: the receipt is of another network: {why}")
                layer = subject.get_submodule(found.layer)
                assert isinstance(layer, nn.Conv2d)
                made = make(found, layer)
                if tensors is not None:
                    _load(made, found.layer, tensors, entry.site)
                holder, _, child = found.layer.rpartition(".")
                setattr(subject.get_submodule(holder), child, made)
        return subject


def kind_of(rule: Rule) -> Kind | None:
    """The kind that a rule asks for, checked; None to keep the layer."""
    unknown = set(rule.settings) - {"kind"}
    if unknown:
        raise UserError(f"replace at site {rule.site}: unknown setting {min(unknown)!r}; known is kind")
    kind = rule.settings.get("kind", "keep")
    for known in KINDS:
        if kind == known:
            return known
    if kind != "keep":
        raise UserError(f"replace at site {rule.site}: kind {kind!r}; choose one of keep, {', '.join(KINDS)}")
    return None


def plan(module: nn.Module, site: str, kind: Kind, multiple: int, taken: Mapping[str, Form]) -> list[Form] | str:
    """The forms of all convolutions at `site` or under it, or why there is none."""
    names = [name for name in leaves(module, site) if isinstance(module.get_submodule(name), nn.Conv2d)]
    if not names:
        return "no convolution is there"
    if "" in names:
        return "that is the whole network"
    free = [name for name in names if name not in taken]
    if not free:
        return "an earlier rule has replaced it"
    verdicts = [form(module.get_submodule(name), name, kind, multiple) for name in free]
    found = [verdict for verdict in verdicts if isinstance(verdict, Form)]
    return found or next(verdict for verdict in verdicts if isinstance(verdict, str))


def fit(
    module: nn.Module, taken: Mapping[str, Form], task: Task
) -> Iterator[tuple[str, tuple[float, float] | str, dict[str, Tensor]]]:
    """Yield (layer, (error at the start, error after the fit) or why there is no fit, weights) for every form.

    Errors are shares of the variance of the layer's outputs on calibration data.
    """
    for name, reading in each(module, list(taken), task, rows=ROWS):
        layer, found = module.get_submodule(name), taken[name]
        assert isinstance(layer, nn.Conv2d)
        held = reading.centred()
        if held is None or not held.speaks:
            yield name, f"{name} answers with nothing but a constant on the calibration data", {}
            continue
        first = start(found, layer.weight.detach().double())
        parts = refine(found, first, held)
        dense = spread(found, parts)
        errors = held.error(spread(found, first)), held.error(dense)
        parts[list(parts)[-1].removesuffix("weight") + "bias"] = held.bias(dense)
        yield name, errors, {key: part.to(layer.weight.dtype).contiguous() for key, part in parts.items()}


def _entry(rule: Rule, found: list[Form] | str, errors: Mapping[str, tuple[float, float] | str]) -> Entry:
    if not isinstance(found, str):
        done = [one for one in found if not isinstance(errors.get(one.layer), str)]
        if done:
            spent = [math.prod(one.shape) for one in done]
            achieved = {"macs": sum(one.cost * dense for one, dense in zip(done, spent, strict=True)) / sum(spent)}
            if fitted := [error for one in done if isinstance(error := errors.get(one.layer), tuple)]:
                achieved |= {
                    "error_start": max(before for before, _ in fitted),
                    "error": max(after for _, after in fitted),
                }
            facts = {"forms": [one.model_dump(mode="json") for one in done]}
            return Entry(site=rule.site, asked=rule.settings, achieved=achieved, facts=facts)
        found = str(errors[found[0].layer])
    return Entry(site=rule.site, status="skipped", why=found, asked=rule.settings)


def difference(module: nn.Module, found: Form) -> str:
    """Why `found` does not fit `module`, empty where it does."""
    try:
        layer = module.get_submodule(found.layer)
    except AttributeError:
        return f"it replaces {found.layer}, which is not there"
    if not isinstance(layer, nn.Conv2d):
        return f"it replaces {found.layer}, which is a {type(layer).__name__} here"
    if tuple(layer.weight.shape) != found.shape:
        return f"the weight of {found.layer} is {tuple(layer.weight.shape)} here and was {found.shape} there"
    if layer.stride != found.stride:
        return f"the stride of {found.layer} is {layer.stride} here and was {found.stride} there"
    return ""


def _load(made: nn.Module, layer: str, tensors: Mapping[str, Tensor], site: str) -> None:
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            key = f"{layer}/{name}"
            if key not in tensors:
                raise UserError(f"replace at site {site}: tensor {key!r} is missing; give the receipt's own")
            if tensors[key].shape != parameter.shape:
                raise UserError(
                    f"replace at site {site}: tensor {key!r} is {tuple(tensors[key].shape)}, "
                    f"not {tuple(parameter.shape)}; give the receipt's own tensors"
                )
            parameter.copy_(tensors[key])
