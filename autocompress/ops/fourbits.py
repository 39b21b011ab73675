"""Weights of integer layers that are kept in four bits: which ones, how they are rounded, and training with that.

The layer computes in int8 as before: its weight takes at most 15 of the 255 steps, lies in the file two to a byte, and
is unpacked once, when the runtime loads the file. So a file gets smaller, not faster (weights of 4, activations of 8
bits; Nagel et al. 2021, "A White Paper on Neural Network Quantization").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.models.trace import leaves
from autocompress.ops import Phase
from autocompress.tasks import Task
from autocompress.types import Entry, Policy, Profile, Receipt, Rule, UserError

MOST = 7
"""Largest integer: symmetric, as weights of int8 are."""
CLIP = 2.7
"""Root mean squares at which a channel's weights are cut off: of a normal distribution 15 steps miss least with these
(Max 1960, "Quantizing for minimum distortion", for 16 steps)."""
PACKED = "_packed"
"""At the end of the names of constants that hold two integers a byte."""
HANDLE = "fourbits_handles"


def packable(shape: Sequence[int]) -> bool:
    """Whether a weight divides into two halves along its first axis."""
    return len(shape) > 1 and shape[0] % 2 == 0


def largest(values: NDArray[np.float32], others: tuple[int, ...] | None) -> NDArray[np.float64]:
    """The magnitude that becomes MOST, per slice that `others` are summed over."""
    wide = values.astype(np.float64)
    return np.minimum(np.abs(wide).max(axis=others), CLIP * np.sqrt(np.square(wide).mean(axis=others)))


def packed(integers: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Integers from -8 to 7, (n, ...) with n even, as bytes (n / 2, ...): the first half in the upper four bits."""
    raised = (integers.astype(np.int16) + 8).astype(np.uint8)
    upper, lower = np.split(raised, 2)
    return ((upper << 4) | lower).astype(np.uint8)


@torch.no_grad()
def rounded(weight: Tensor, *, per_channel: bool) -> Tensor:
    """A weight (out, ...) as the file has it; a batch norm that scales channels scales their steps with them."""
    axes = tuple(range(1 if per_channel else 0, weight.ndim))
    wide = weight.float()
    step = (
        torch.minimum(wide.abs().amax(axes, keepdim=True), CLIP * wide.square().mean(axes, keepdim=True).sqrt()) / MOST
    )
    step = torch.where(step > 0, step, 1.0)
    return ((wide / step).round_().clamp_(-MOST, MOST) * step).to(weight.dtype)


def wanted(policy: Policy, layers: Iterable[str]) -> tuple[str, ...]:
    """Of these layers those of which the policy's `quantize` rules ask for integers with weights of four bits."""
    rules = policy.of("quantize")
    bits, weights = (
        {rule.site: rule.settings[key] for rule in rules if key in rule.settings} for key in ("bits", "weights")
    )
    return tuple(name for name in layers if innermost(bits, name) == "int8" and innermost(weights, name) == "int4")


def innermost(asked: Mapping[str, Any], layer: str) -> Any:
    """What is asked at the innermost site that contains a layer, "float" if nothing is."""
    holding = [site for site in asked if site in (".", layer) or layer.startswith(f"{site}.")]
    return asked[max(holding, key=lambda site: len(site) if site != "." else 0)] if holding else "float"


class FourBits:
    """Op `fourbits`, phase train: weights are rounded in training where the file will round them to four bits.

    Nobody asks for it: `quantize` with `weights: int4` implies it. The gradient goes straight through.
    """

    name = "fourbits"
    phase: Phase = "train"
    params: dict[str, Any] = {}

    def narrow(self, subject: nn.Module, rules: Sequence[Rule], policy: Policy) -> tuple[list[Rule], list[Entry]]:  # noqa: ARG002
        """One rule for each layer that the policy's `quantize` rules keep in four bits."""
        layers = [name for name in leaves(subject, ".") if packable(_weight(subject, name or ".").shape)]
        return [Rule(site=name or ".", op=self.name, settings={}) for name in wanted(policy, layers)], []

    def decide(
        self,
        subject: nn.Module,
        rules: Sequence[Rule],
        task: Task,  # noqa: ARG002  weights alone are rounded
        profile: Profile,
        tensors: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> Receipt:
        """One entry per layer, with the shape of its weight; none where the profile's weights are no int8."""
        if profile.numeric.weight != "int8":
            return Receipt(op=self.name)
        entries = [
            Entry(
                site=rule.site,
                achieved={"bits": 4.0},
                facts={
                    "shape": list(_weight(subject, rule.site).shape),
                    "per_channel": profile.numeric.per_channel,
                },
            )
            for rule in rules
        ]
        return Receipt(op=self.name, entries=tuple(entries))

    def enact(
        self,
        subject: nn.Module,
        receipt: Receipt,
        tensors: Mapping[str, Any] | None = None,  # noqa: ARG002
    ) -> nn.Module:
        """Install hooks in place. Raises UserError where the receipt speaks of another network."""
        for entry in receipt.entries:
            layer = _layer(subject, entry.site)
            shape = list(_weight(subject, entry.site).shape)
            if shape != entry.facts["shape"]:
                raise UserError(
                    f"fourbits at site {entry.site}: the receipt is of another network: the weight is {shape} here and "
                    f"{entry.facts['shape']} there"
                )
            hook = _Rounding(entry.facts["per_channel"])
            # the last hook in is the last to put a weight: what int8 simulates is overruled
            handles = (
                layer.register_forward_pre_hook(hook.put),
                layer.register_forward_hook(hook.take, always_call=True),
            )
            layer.__dict__[HANDLE] = handles
        return subject

    def advance(self, module: nn.Module, receipt: Receipt, share: float) -> None:
        """Nothing changes on the way."""

    def penalty(self, module: nn.Module, receipt: Receipt) -> Tensor | None:  # noqa: ARG002
        """None."""
        return None

    def settle(self, module: nn.Module, receipt: Receipt) -> Receipt:
        """Remove the hooks in place: the file's quantization rounds what was trained to be rounded."""
        for entry in receipt.entries:
            layer: Any = _layer(module, entry.site)
            for handle in layer.__dict__.pop(HANDLE):
                handle.remove()
        return receipt


class _Rounding:
    """Puts the rounded weight in the place of a layer's weight while the layer runs.

    An attribute of the instance hides the parameter, which keeps its name, its gradient and its optimizer.
    """

    def __init__(self, per_channel: bool) -> None:
        self.per_channel = per_channel

    def put(self, layer: nn.Module, inputs: Any) -> None:  # noqa: ARG002
        weight: Any = layer._parameters["weight"]
        layer.__dict__["weight"] = weight + (rounded(weight, per_channel=self.per_channel) - weight).detach()

    def take(self, layer: nn.Module, inputs: Any, outputs: Any) -> None:  # noqa: ARG002
        layer.__dict__.pop("weight", None)


def _layer(module: nn.Module, site: str) -> nn.Module:
    try:
        return module.get_submodule("" if site == "." else site)
    except AttributeError:
        raise UserError(f"fourbits at site {site}: the receipt is of another network: nothing is there") from None


def _weight(module: nn.Module, site: str) -> Tensor:
    weight: Any = _layer(module, site).weight
    return weight
