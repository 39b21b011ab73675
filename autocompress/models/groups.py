"""Which layers must lose a channel together: torch-pruning's dependency graph behind our own words.

After DepGraph (Fang et al. 2023). Grouped convolutions (and the channel shuffle before them) are traced as the dense
convolutions they stand for; what their groups demand of a choice of channels is said by `cells`.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.pruner import function

from autocompress.models.blocks import ShuffledConv
from autocompress.models.inheritance import spread

Side = Literal["out", "in", "both"]

SIDES: dict[Any, Side] = {
    function.prune_conv_out_channels: "out",
    function.prune_linear_out_channels: "out",
    function.prune_conv_in_channels: "in",
    function.prune_linear_in_channels: "in",
    function.prune_depthwise_conv_out_channels: "both",
    function.prune_depthwise_conv_in_channels: "both",
    function.prune_batchnorm_out_channels: "both",
    function.prune_batchnorm_in_channels: "both",
}


class Unprunable(Exception):  # noqa: N818  a refusal, not an error
    """A group of channels that cannot be cut; the message says why."""


@dataclass(frozen=True)
class Member:
    """One side of one layer: its channel `indices[i]` belongs to channel `roots[i]` of the group's root."""

    layer: str
    side: Side
    indices: tuple[int, ...]
    roots: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Channels of `root` (a layer's outputs) and everything that goes with them, in the order of the graph."""

    root: str
    channels: int
    members: tuple[Member, ...]

    @property
    def producers(self) -> tuple[str, ...]:
        """Layers whose output channels these are."""
        return tuple(member.layer for member in self.members if member.side == "out")


@dataclass(frozen=True)
class Grouped:
    """What the stand-in of a grouped convolution stands for."""

    groups: int
    interleaved: bool  # a Shuffle comes before it: channel q is read by group q mod groups


def is_depthwise(layer: nn.Module) -> bool:
    """One filter per input channel."""
    return isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels


def grouped_convs(module: nn.Module) -> dict[str, Grouped]:
    """Grouped convolutions that are not depthwise, by name."""
    shuffled = {f"{name}.1" for name, part in module.named_modules() if isinstance(part, ShuffledConv)}
    return {
        name: Grouped(part.groups, name in shuffled)
        for name, part in module.named_modules()
        if isinstance(part, nn.Conv2d) and part.groups > 1 and not is_depthwise(part)
    }


def stand_in(module: nn.Module) -> nn.Module:
    """A copy that computes the same with dense convolutions in place of grouped ones and no channel shuffle."""
    double = copy.deepcopy(module).requires_grad_(True)
    for name, grouped in grouped_convs(module).items():
        parent, _, child = name.rpartition(".")
        holder = double.get_submodule(parent)
        conv = double.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        dense = nn.utils.skip_init(
            nn.Conv2d,
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
        )
        dense.weight = nn.Parameter(spread(conv, grouped.interleaved).detach())
        dense.bias = conv.bias  # type: ignore[assignment]
        setattr(holder, child, dense.train(conv.training))
        if grouped.interleaved:
            holder[0] = nn.Identity()  # type: ignore[index]
    return double


class Coupling:
    """The coupled groups of a module, with scores for their channels. Works on a stand-in; `module` is only read.

    Errors of torch-pruning pass unchanged: the caller knows whose network it is.
    """

    def __init__(self, module: nn.Module, example: Tensor | tuple[Tensor, ...]) -> None:
        self.grouped = grouped_convs(module)
        self.model = stand_in(module).eval()
        self.names = {part: name for name, part in self.model.named_modules()}
        with torch.enable_grad():
            self.graph = tp.DependencyGraph().build_dependency(self.model, example, verbose=False)

    def group(self, layer: str) -> Group:
        """The group of a convolution's or linear layer's output channels.

        Raises:
            Unprunable: with the reason.
        """
        raw = self._raw(layer)
        members: list[Member] = []
        for item in raw.items:
            node, side = item.dep.target, SIDES.get(item.dep.handler)
            name = self.names.get(node.module)
            if side != "in" and not node.outputs:
                raise Unprunable(f"its channels are the network's output ({name or node.name})")
            if isinstance(node.module, nn.Parameter):
                raise Unprunable(f"coupled with the bare parameter {node.name}, which belongs to no layer we can cut")
            if name is None:
                continue  # an operation without channels of its own
            if side is None or getattr(node.module, "transposed", False):
                raise Unprunable(f"coupled with {name} ({type(node.module).__name__}), which we cannot cut")
            roots = item.root_idxs
            if any(root is None for root in roots):
                raise Unprunable(f"channels of {name} cannot be traced back to {layer}")
            members.append(Member(name, side, tuple(item.idxs), tuple(roots)))
        return Group(layer, len(raw[0].idxs), tuple(members))

    def scores(self, layer: str, importance: str) -> Tensor:
        """Importance of the group's channels, shape (channels,): torch-pruning's group L1, L2 or first-order Taylor.

        Taylor (Molchanov et al. 2019) reads the gradients left by `learn_gradients`.
        """
        raw = self._raw(layer)
        if importance == "taylor":
            found = tp.importance.GroupTaylorImportance()(raw)
        else:
            power = {"l1": 1, "l2": 2}[importance]
            found = tp.importance.GroupMagnitudeImportance(p=power)(raw)
        assert found is not None, "a group holds its root, which has weights"
        return found

    def drop(self, layer: str, channels: Sequence[int]) -> None:
        """Cut channels out of the stand-in, so that later groups and scores see the smaller network."""
        module = self.model.get_submodule(layer)
        pruner = self._pruner(module)
        self.graph.get_pruning_group(module, pruner.prune_out_channels, list(channels)).prune(record_history=False)

    def cells(self, group: Group) -> tuple[list[list[int]], int]:
        """Channels in cells that must each keep equally many, and how many cells in a row take turns (1: none).

        One cell holds all channels where no grouped convolution is near. Behind a shuffle, cells of different residue
        take turns, because the kept channel q must still be of residue q mod groups.

        Raises:
            Unprunable: grouped convolutions cut the channels in ways that do not go together.
        """
        blocks: list[list[int]] = []
        residues: list[list[int]] = []
        for member in group.members:
            grouped = self.grouped.get(member.layer)
            if grouped is None:
                continue
            if member.roots != member.indices or len(member.roots) != group.channels:
                raise Unprunable(f"channels reach the grouped convolution {member.layer} in another order")
            groups, size = grouped.groups, group.channels // grouped.groups
            if member.side == "in" and grouped.interleaved:
                residues.append([channel % groups for channel in range(group.channels)])
            else:
                blocks.append([channel // size for channel in range(group.channels)])
        if residues and len({max(labels) for labels in blocks + residues}) > 1:
            raise Unprunable("channel shuffles and grouped convolutions around it have different numbers of groups")
        found: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        for channel in range(group.channels):
            found[tuple(labels[channel] for labels in blocks + residues)].append(channel)
        cells = [found[key] for key in sorted(found)]
        if len({len(cell) for cell in cells}) > 1:
            raise Unprunable("grouped convolutions around it cut its channels unevenly")
        return cells, max(residues[0]) + 1 if residues else 1

    def groups_of(self, layers: Sequence[str]) -> dict[str, Group]:
        """The groups that can be cut, by their first producer, in the order of `layers`."""
        found: dict[str, Group] = {}
        seen: set[str] = set()
        for layer in layers:
            if layer in seen or is_depthwise(self.model.get_submodule(layer)):
                continue
            try:
                group = self.group(layer)
            except Unprunable:
                seen.add(layer)
                continue
            seen.update(group.producers)
            found[layer] = group
        return found

    def _pruner(self, module: nn.Module) -> Any:
        return self.graph.get_pruner_of_module(module)

    def _raw(self, layer: str) -> Any:
        module = self.model.get_submodule(layer)
        if module not in self.graph.module2node:
            raise Unprunable("the forward pass does not use it")
        pruner = self._pruner(module)
        count = pruner.get_out_channels(module)
        return self.graph.get_pruning_group(module, pruner.prune_out_channels, list(range(count)))


def choose(scores: Tensor, cells: Sequence[Sequence[int]], keep: int, turns: int) -> list[int]:
    """The channels to keep, in their new order: the best `keep` / len(cells) of every cell.

    Each run of `turns` cells (as `Coupling.cells` sorts them) takes turns, so channel q keeps its residue q mod turns.
    """
    share = keep // len(cells)
    best = [sorted(sorted(cell, key=lambda channel: (-float(scores[channel]), channel))[:share]) for cell in cells]
    runs = [best[start : start + turns] for start in range(0, len(best), turns)]
    return [cell[turn] for run in runs for turn in range(share) for cell in run]
