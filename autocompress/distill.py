"""Distillation of responses: the parent teaches the candidate on the batches it trains on (Hinton et al. 2015)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from autocompress.ops import Phase
from autocompress.tasks import Task
from autocompress.types import Entry, Profile, Receipt, Rule, TrialFailure, UserError


def response_loss(outputs: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """Scalar T^2 * KL(teacher || student) of logits (n, classes), both softened by T (Hinton et al. 2015, section 2).

    The factor T^2 keeps the gradient's size independent of T. Raises TrialFailure if the shapes differ.
    """
    if outputs.shape != taught.shape:
        raise TrialFailure(f"distillation: outputs {tuple(outputs.shape)} but the teacher's are {tuple(taught.shape)}")
    student = functional.log_softmax(outputs.float() / temperature, dim=-1)
    teacher = functional.log_softmax(taught.float() / temperature, dim=-1)
    loss = functional.kl_div(student, teacher, reduction="sum", log_target=True)
    return loss * (temperature * temperature * outputs.shape[-1] / outputs.numel())


class Distill:
    """Op `distill`: how much of the loss is the teacher's, and how soft. The training loop reads the receipt."""

    name = "distill"
    phase: Phase = "train"
    params: dict[str, Any] = {"weight": 0.0, "temperature": 1.0}

    def decide(
        self,
        subject: Any,  # noqa: ARG002  (the protocol's arguments; settings alone decide here)
        rules: Sequence[Rule],
        task: Task,  # noqa: ARG002
        profile: Profile,  # noqa: ARG002
        tensors: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> Receipt:
        """One entry per rule with its settings. Raises UserError for a weight outside [0, 1] or a temperature <= 0."""
        entries: list[Entry] = []
        for rule in rules:
            weight, temperature = settings(rule.settings)
            asked: dict[str, Any] = {"weight": weight, "temperature": temperature}
            entries.append(Entry(site=rule.site, asked=asked, achieved={**asked}, facts=asked))
        return Receipt(op=self.name, entries=tuple(entries))

    def enact(self, subject: Any, receipt: Receipt, tensors: dict[str, Any] | None = None) -> Any:  # noqa: ARG002
        """Change nothing: distillation is a matter of training."""
        return subject


def settings(asked: Mapping[str, Any]) -> tuple[float, float]:
    """(weight, temperature) of a rule or of an entry's facts, defaults filled in. Raises UserError if out of range."""
    weight = float(asked.get("weight", Distill.params["weight"]))
    temperature = float(asked.get("temperature", Distill.params["temperature"]))
    if not 0 <= weight <= 1 or not temperature > 0:
        raise UserError(f"distill: weight {weight} must lie in [0, 1] and temperature {temperature} above 0")
    return weight, temperature
