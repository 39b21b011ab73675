"""Distillation: how much the teacher says, and what the student takes from it. The teacher is the parent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from pydantic import Field, ValidationError
from torch import Tensor
from torch.nn import functional

from autocompress.ops import Phase
from autocompress.tasks import Task
from autocompress.types import Entry, Profile, Receipt, Record, Rule, TrialFailure, UserError

Kind = Literal["response", "relation", "attention", "features", "both"]
RELATED = 64
"""Samples of a batch whose angles are compared: every pair seen from every third is n^2 d numbers."""


class Distillation(Record):
    """How a candidate is taught: `temperature` softens responses.

    `weight` is the share of the loss that responses take; hints of the other kinds are added to the task's whole loss.
    `both` is responses and features together.
    """

    weight: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False)
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    kind: Kind = "response"

    @classmethod
    def of(cls, asked: Mapping[str, Any]) -> Distillation:
        """The settings of a rule, defaults filled in. Raises UserError for one that is unknown or out of range."""
        try:
            return cls.model_validate(asked)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            known = ", ".join(cls.model_fields)
            what = f"no such setting, there are {known}" if first["type"] == "extra_forbidden" else first["msg"]
            raise UserError(f"distill: {key} {first['input']!r}: {what}") from error


class Distill:
    """Op `distill`: the training loop reads its rules (`pipeline.distillation`), nothing is installed."""

    name = "distill"
    phase: Phase = "train"
    params: dict[str, Any] = {name: field.default for name, field in Distillation.model_fields.items()}

    def check(self, rule: Rule) -> None:
        """Raise UserError for settings that are unknown or out of range; reads nothing but the rule."""
        Distillation.of(rule.settings)

    def decide(
        self,
        subject: Any,  # noqa: ARG002  (the protocol's arguments; settings alone decide here)
        rules: Sequence[Rule],
        task: Task,  # noqa: ARG002
        profile: Profile,  # noqa: ARG002
        tensors: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> Receipt:
        """One entry per rule with its settings. Raises UserError for a setting that makes no sense."""
        entries: list[Entry] = []
        for rule in rules:
            asked = Distillation.of(rule.settings).model_dump()
            numbers = {name: value for name, value in asked.items() if not isinstance(value, str)}
            entries.append(Entry(site=rule.site, asked=asked, achieved=numbers, facts=asked))
        return Receipt(op=self.name, entries=tuple(entries))

    def enact(self, subject: Any, receipt: Receipt, tensors: dict[str, Any] | None = None) -> Any:  # noqa: ARG002
        """Change nothing: distillation is a matter of training."""
        return subject


KINDS: tuple[Kind, ...] = get_args(Kind)


def response_loss(outputs: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """Scalar T^2 * KL(teacher || student) of logits, both softened by T (Hinton et al. 2015, section 2).

    Classes lie along the last axis, of maps (n, classes, h, w) along the second. Numbers rather than logits, (n,) or
    (n, ..., 1), are compared by their mean square difference. The factor T^2 keeps the gradient's size independent of
    T. Raises TrialFailure if the shapes differ.
    """
    if outputs.shape != taught.shape:
        raise TrialFailure(f"distillation: outputs {tuple(outputs.shape)} but the teacher's are {tuple(taught.shape)}")
    axis = 1 if outputs.ndim == 4 else -1
    if outputs.ndim < 2 or outputs.shape[axis] == 1:
        return functional.mse_loss(outputs.float(), taught.float())
    student = functional.log_softmax(outputs.float() / temperature, dim=axis)
    teacher = functional.log_softmax(taught.float() / temperature, dim=axis)
    loss = functional.kl_div(student, teacher, reduction="sum", log_target=True)
    return loss * (temperature * temperature * outputs.shape[axis] / outputs.numel())


def responses_loss(outputs: Sequence[Tensor], taught: Sequence[Tensor], temperature: float) -> Tensor:
    """Sum of `response_loss` over the outputs of equal shape. Raises TrialFailure where there is none."""
    pairs = [(mine, theirs) for mine, theirs in zip(outputs, taught, strict=False) if mine.shape == theirs.shape]
    if not pairs:
        mine, theirs = (", ".join(str(tuple(one.shape)) for one in many) for many in (outputs, taught))
        raise TrialFailure(f"distillation: outputs {mine} but the teacher's are {theirs}")
    return torch.stack([response_loss(mine, theirs, temperature) for mine, theirs in pairs]).sum()


def relation_loss(mine: Tensor, theirs: Tensor) -> Tensor:
    """Distances and angles among the samples of a batch, (n, d) and (n, e) (RKD, Park et al. 2019, section 3.2).

    Widths may differ. Distances count 1, angles 2, as in the paper's experiments; the whole is scaled by 25, as there.
    """
    mine, theirs = mine.flatten(1).float(), theirs.flatten(1).float()
    distances = functional.smooth_l1_loss(_distances(mine), _distances(theirs))
    angles = functional.smooth_l1_loss(_angles(mine[:RELATED]), _angles(theirs[:RELATED]))
    return 25 * (distances + 2 * angles)


def _distances(rows: Tensor) -> Tensor:
    """Distances (n, n) in units of their mean; the zero of a row to itself has no gradient."""
    squares = rows.square().sum(1)
    found = (squares[:, None] + squares - 2 * rows @ rows.T).clamp_min(1e-12).sqrt()
    found = found * (1 - torch.eye(len(rows), dtype=found.dtype, device=found.device))
    pairs = max(len(rows) * (len(rows) - 1), 1)
    return found / (found.sum() / pairs).clamp_min(1e-12)


def _angles(rows: Tensor) -> Tensor:
    """Cosines (n, n, n) of the angles that pairs of rows make as seen from each row."""
    seen = functional.normalize(rows[None] - rows[:, None], dim=2)
    return seen @ seen.transpose(1, 2)


def attention_loss(mine: Tensor, theirs: Tensor, axis: int) -> Tensor:
    """Where two layers look: maps of squared activations (n, ...), summed over channels (`axis`), of unit length.

    Activation-based attention transfer (Zagoruyko and Komodakis 2017, section 3.1), the squared length of the
    difference, halved. The teacher's map is pooled to the student's size where they differ.
    """
    looks = mine.float().square().mean(axis)
    aims = theirs.float().square().mean(axis)
    aims = pooled(aims[:, None], looks.shape[1:])[:, 0]
    difference = functional.normalize(looks.flatten(1)) - functional.normalize(aims.flatten(1))
    return difference.square().sum(1).mean() / 2


def feature_loss(mine: Tensor, theirs: Tensor) -> Tensor:
    """Mean square difference of equally shaped features in units of the teacher's (FitNets, Romero et al. 2015)."""
    theirs = theirs.float()
    return functional.mse_loss(mine.float(), theirs) / theirs.square().mean().clamp_min(1e-12)


def pooled(features: Tensor, size: Sequence[int]) -> Tensor:
    """Features (n, c, ...) averaged to another spatial size; as they are where it is theirs."""
    if tuple(features.shape[2:]) == tuple(size):
        return features
    pool = functional.adaptive_avg_pool2d if features.ndim == 4 else functional.adaptive_avg_pool1d
    return pool(features, list(size))  # type: ignore[arg-type]
