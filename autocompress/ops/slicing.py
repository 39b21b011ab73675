"""Cut channels out of layers by plain indexing: what a prune receipt says, obeyed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from autocompress.types import Record


class Cut(Record):
    """Keep the channels `kept` (in this order) of one side of a layer that has `was` of them.

    `side` is `both` for layers whose inputs and outputs are the same channels (batch norm, depthwise convolution).
    `groups` and `interleaved` describe a grouped convolution; interleaved: a shuffle makes group q mod groups read
    channel q.
    """

    layer: str
    side: Literal["out", "in", "both"]
    was: int
    kept: tuple[int, ...]
    groups: int = 1
    interleaved: bool = False


def difference(module: nn.Module, cut: Cut) -> str:
    """Why `cut` does not fit `module`, empty where it does."""
    try:
        layer = module.get_submodule(cut.layer)
    except AttributeError:
        return f"it cuts layer {cut.layer}, which is not there"
    if not isinstance(layer, nn.Conv2d | nn.Linear | nn.modules.batchnorm._BatchNorm):
        return f"it cuts layer {cut.layer}, which is a {type(layer).__name__} here"
    found = channels(layer, cut.side)
    if found != cut.was:
        names = {"out": "output channels", "in": "input channels", "both": "channels"}
        return f"{cut.layer} has {found} {names[cut.side]} here and had {cut.was} there"
    groups = layer.groups if isinstance(layer, nn.Conv2d) and cut.side != "both" else 1
    if groups != cut.groups:
        return f"{cut.layer} has {groups} groups here and had {cut.groups} there"
    if not cut.kept or len(set(cut.kept)) != len(cut.kept) or not set(cut.kept) <= set(range(cut.was)):
        return f"it keeps channels of {cut.layer} that are not there, or none, or one twice"
    if len(cut.kept) % groups:
        return f"it keeps {len(cut.kept)} channels of {cut.layer}, which has {groups} groups"
    return ""


def channels(layer: nn.Module, side: str) -> int:
    """Channels on one side of a layer, 0 for a layer that has no such side."""
    if isinstance(layer, nn.Conv2d):
        depthwise = layer.groups == layer.in_channels == layer.out_channels
        return 0 if side == "both" and not depthwise else layer.in_channels if side == "in" else layer.out_channels
    if isinstance(layer, nn.Linear):
        return 0 if side == "both" else layer.in_features if side == "in" else layer.out_features
    return layer.num_features if side == "both" and isinstance(layer, nn.modules.batchnorm._BatchNorm) else 0


def apply(module: nn.Module, cut: Cut) -> None:
    """Cut in place; `difference` must be empty."""
    layer = module.get_submodule(cut.layer)
    kept = torch.tensor(cut.kept, dtype=torch.long)
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        for name in ("weight", "bias"):
            _slice(layer, name, 0, kept)
        for name in ("running_mean", "running_var"):
            held = getattr(layer, name)
            setattr(layer, name, held if held is None else held[kept].clone())
        layer.num_features = len(kept)
        return
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    if cut.side == "in":
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            _slice_inputs_of_groups(layer, cut)
        else:
            _slice(layer, "weight", 1, kept)
    else:
        _slice(layer, "weight", 0, kept)
        _slice(layer, "bias", 0, kept)
    if isinstance(layer, nn.Linear):
        setattr(layer, "in_features" if cut.side == "in" else "out_features", len(kept))
        return
    if cut.side in ("in", "both"):
        layer.in_channels = len(kept)
    if cut.side in ("out", "both"):
        layer.out_channels = len(kept)
    if cut.side == "both":
        layer.groups = len(kept)


def _slice(layer: nn.Module, name: str, axis: int, kept: Tensor) -> None:
    held = getattr(layer, name)
    if held is not None:
        setattr(layer, name, nn.Parameter(held.detach().index_select(axis, kept), held.requires_grad))


def _slice_inputs_of_groups(layer: nn.Conv2d, cut: Cut) -> None:
    """Each group keeps its own positions, equally many per group."""
    groups, width, rows = cut.groups, cut.was // cut.groups, layer.out_channels // cut.groups
    kept: list[Sequence[int]] = []
    for group in range(groups):
        if cut.interleaved:
            kept.append([channel // groups for channel in cut.kept[group::groups]])
        else:
            share = len(cut.kept) // groups
            kept.append([channel - group * width for channel in cut.kept[group * share : (group + 1) * share]])
    blocks = [
        layer.weight.detach()[group * rows : (group + 1) * rows].index_select(1, torch.tensor(positions))
        for group, positions in enumerate(kept)
    ]
    layer.weight = nn.Parameter(torch.cat(blocks), layer.weight.requires_grad)
