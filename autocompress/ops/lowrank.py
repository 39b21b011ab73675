"""Op `lowrank`: replace a layer by two thinner ones (truncated SVD).

A k x k convolution becomes a k x k convolution to `rank` channels and a 1x1 convolution from them (Zhang et al. 2016,
"Accelerating Very Deep Convolutional Networks", without their data term; Denton et al. 2014); a Linear becomes two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.models.trace import leaves
from autocompress.ops import Phase
from autocompress.tasks import Task
from autocompress.types import Entry, Profile, Receipt, Record, Rule, UserError


class Split(Record):
    """A layer (`shape` of its weight) becomes two with `rank` channels between them."""

    layer: str
    shape: tuple[int, ...]
    rank: int


class LowRank:
    """Truncated SVD. `rank` is the share of the full rank to keep (1: leave alone)."""

    name = "lowrank"
    phase: Phase = "structure"

    def __init__(self) -> None:
        self.params: dict[str, Any] = {"rank": 1.0}

    def decide(
        self,
        subject: nn.Module,
        rules: Sequence[Rule],
        task: Task,  # noqa: ARG002  the plain SVD reads weights only
        profile: Profile,
        tensors: dict[str, Tensor] | None = None,
    ) -> Receipt:
        """Choose ranks; the factors go into `tensors` as `<layer>/first.weight`, `<layer>/second.weight` (and `.bias`).

        Raises UserError for a rank outside (0, 1].
        """
        taken: set[str] = set()
        entries: list[Entry] = []
        for rule in rules:
            share = _share(rule)
            if share == 1:
                continue
            names = [name for name in leaves(subject, rule.site) if name not in taken]
            verdicts = [plan(subject, name, share, profile.channel_multiple) for name in names]
            splits = [verdict for verdict in verdicts if isinstance(verdict, Split)]
            if not splits:
                why = next((verdict for verdict in verdicts if isinstance(verdict, str)), "")
                why = why or ("an earlier rule has split it" if leaves(subject, rule.site) else "no layer is there")
                entries.append(Entry(site=rule.site, status="skipped", why=why, asked=rule.settings))
                continue
            taken.update(split.layer for split in splits)
            if tensors is not None:
                for split in splits:
                    tensors |= factors(subject.get_submodule(split.layer), split)
            entries.append(
                Entry(
                    site=rule.site,
                    asked=rule.settings,
                    achieved={
                        "rank": sum(split.rank for split in splits) / sum(full_rank(split.shape) for split in splits),
                        "macs": sum(cost(split) for split in splits) / sum(math.prod(split.shape) for split in splits),
                    },
                    facts={"splits": [split.model_dump(mode="json") for split in splits]},
                )
            )
        return Receipt(op=self.name, entries=tuple(entries))

    def enact(self, subject: nn.Module, receipt: Receipt, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Replace layers in place by Sequentials of two, filled from `tensors` or left zero (trained weights follow).

        Raises UserError where the receipt was written for another network or a tensor of it is missing.
        """
        for entry in receipt.entries:
            for raw in entry.facts.get("splits", ()):
                split = Split.model_validate(raw)
                why = difference(subject, split)
                if why:
                    raise UserError(f"lowrank at site {entry.site}: the receipt is of another network: {why}")
                holder, _, child = split.layer.rpartition(".")
                pair = thin(subject.get_submodule(split.layer), split)
                if tensors is not None:
                    _load(pair, split, tensors, entry.site)
                setattr(subject.get_submodule(holder), child, pair)
        return subject


def full_rank(shape: Sequence[int]) -> int:
    """Rank of a weight (out, in, ...) as a matrix of out rows."""
    return min(shape[0], math.prod(shape[1:]))


def cost(split: Split) -> int:
    """Multiply-adds of the two factors per output position."""
    return split.rank * (math.prod(split.shape[1:]) + split.shape[0])


def plan(module: nn.Module, name: str, share: float, multiple: int) -> Split | str:
    """The split of one layer, or why it is left alone. The rank is rounded to `multiple` where that leaves any."""
    layer = module.get_submodule(name)
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return f"{name} is a {'depthwise' if layer.groups == layer.in_channels else 'grouped'} convolution"
    shape = tuple(layer.weight.shape)
    target = share * full_rank(shape)
    rank = math.floor(target / multiple + 0.5) * multiple or max(1, math.floor(target + 0.5))
    split = Split(layer=name, shape=shape, rank=min(rank, full_rank(shape)))
    # A stride makes the first factor as cheap as the layer itself, so costs compare per output position.
    if cost(split) >= math.prod(shape):
        return f"rank {split.rank} of {name} costs {cost(split) / math.prod(shape):.2f} times the layer"
    return split


def factors(layer: nn.Module, split: Split) -> dict[str, Tensor]:
    """The best pair of rank `split.rank` in least squares (Eckart-Young), singular values shared out evenly."""
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    outputs, *rest = split.shape
    matrix = layer.weight.detach().reshape(outputs, -1).double()
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = s[: split.rank].sqrt()
    first = (root[:, None] * v[: split.rank]).reshape(split.rank, *rest)
    second = (u[:, : split.rank] * root).reshape(outputs, split.rank, *[1] * (len(rest) - 1))
    dtype = layer.weight.dtype
    found = {"first.weight": first.to(dtype).contiguous(), "second.weight": second.to(dtype).contiguous()}
    if layer.bias is not None:
        found["second.bias"] = layer.bias.detach().clone()
    return {f"{split.layer}/{name}": tensor for name, tensor in found.items()}


def difference(module: nn.Module, split: Split) -> str:
    """Why `split` does not fit `module`, empty where it does."""
    try:
        layer = module.get_submodule(split.layer)
    except AttributeError:
        return f"it splits layer {split.layer}, which is not there"
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        return f"it splits layer {split.layer}, which is a {type(layer).__name__} here"
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return f"it splits layer {split.layer}, which has {layer.groups} groups here"
    shape = tuple(layer.weight.shape)
    if shape != split.shape:
        return f"the weight of {split.layer} is {shape} here and was {split.shape} there"
    if not 1 <= split.rank <= full_rank(shape):
        return f"rank {split.rank} of {split.layer} is not between 1 and {full_rank(shape)}"
    return ""


def thin(layer: nn.Module, split: Split) -> nn.Sequential:
    """The two layers in place of one, zero-filled: stride, padding and dilation go to the first, bias to the second."""
    biased = getattr(layer, "bias", None) is not None
    if isinstance(layer, nn.Conv2d):
        first: nn.Module = nn.utils.skip_init(
            nn.Conv2d,
            layer.in_channels,
            split.rank,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            bias=False,
            padding_mode=layer.padding_mode,
        )
        second: nn.Module = nn.utils.skip_init(nn.Conv2d, split.rank, layer.out_channels, 1, bias=biased)
    else:
        assert isinstance(layer, nn.Linear)
        first = nn.utils.skip_init(nn.Linear, layer.in_features, split.rank, bias=False)
        second = nn.utils.skip_init(nn.Linear, split.rank, layer.out_features, bias=biased)
    pair = nn.Sequential(first, second).to(layer.weight).train(layer.training)
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.zero_()
    return pair


def _load(pair: nn.Sequential, split: Split, tensors: Mapping[str, Tensor], site: str) -> None:
    with torch.no_grad():
        for part, layer in zip(("first", "second"), pair, strict=True):
            for name, parameter in layer.named_parameters():
                key = f"{split.layer}/{part}.{name}"
                if key not in tensors:
                    raise UserError(f"lowrank at site {site}: tensor {key!r} is missing; give the receipt's own")
                if tensors[key].shape != parameter.shape:
                    raise UserError(
                        f"lowrank at site {site}: tensor {key!r} is {tuple(tensors[key].shape)}, "
                        f"not {tuple(parameter.shape)}; give the receipt's own tensors"
                    )
                parameter.copy_(tensors[key])


def _share(rule: Rule) -> float:
    unknown = set(rule.settings) - {"rank"}
    if unknown:
        raise UserError(f"lowrank at site {rule.site}: unknown setting {min(unknown)!r}; known is rank")
    share = rule.settings.get("rank", 1.0)
    if isinstance(share, bool | str) or not 0 < share <= 1:
        raise UserError(f"lowrank at site {rule.site}: rank {share!r} is no share in (0, 1]")
    return float(share)
