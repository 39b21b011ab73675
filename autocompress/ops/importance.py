"""How much a network would miss a channel, a head, a hidden unit: one score per unit of a group.

Each member of a group (a layer's rows or columns) is scored by torch-pruning, and the scores of a unit's places are
averaged over the members (Fang et al. 2023, section 3.3).
"""

from __future__ import annotations

import zlib
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.pruner import function

from autocompress.models.groups import Group, Member
from autocompress.tasks import Task, batch_size, several

Importance = Literal["l1", "l2", "taylor", "first_order", "bn_scale", "fpgm", "random"]
"""l1: sums of absolute weights (Li et al. 2017, section 3.1). l2: of squares.

taylor: sums of |gradient * weight| (Molchanov et al. 2019, section 3.1). first_order: the loss change that a first
order expansion gives, |sum of gradient * weight| (Mozer and Smolensky 1989). bn_scale: batch norm's scales (network
slimming, Liu et al. 2017, section 3); l1 where a group has none. fpgm: distance from the other filters (geometric
median, He et al. 2019, section 3.3). random: by the site's name, a control.
"""
IMPORTANCES: tuple[Importance, ...] = get_args(Importance)
GRADIENTS = ("taylor", "first_order")
SCORED = 256
"""Calibration examples that gradients are summed over."""
WORK = 4e10
"""Multiply-adds of forward passes that gradients may cost: large networks see fewer examples, but `FEWEST` at least."""
FEWEST = 4
"""On CIFAR's ResNet-20 scores of 4, 8 and 16 examples are equally near those of 256 (rank correlation 0.6)."""


class Scores(NamedTuple):
    """One score per unit, and what it was read from where that is not what was asked for."""

    values: Tensor
    instead: str = ""


def scores(module: nn.Module, group: Group, importance: Importance) -> Scores:
    """Scores of a group's units, shape (units,). `module` has gradients where `importance` reads them."""
    if importance == "random":
        seed = zlib.crc32(group.root.encode())
        return Scores(torch.rand(group.size, generator=torch.Generator().manual_seed(seed)))
    if importance == "fpgm":
        found = _gathered(group, [(one, _apart(module, one)) for one in group.members if one.made])
        return Scores(found) if found is not None else Scores(scores(module, group, "l1").values, "l1")
    raw: dict[str, Any] = {"normalizer": None}
    judge = {
        "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1, **raw),
        "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2, **raw),
        "taylor": lambda: tp.importance.GroupTaylorImportance(**raw),
        "first_order": lambda: tp.importance.GroupTaylorImportance(multivariable=True, **raw),
        "bn_scale": lambda: tp.importance.BNScaleImportance(**raw),
    }[importance]()
    found = _gathered(group, [(one, _judged(module, one, judge)) for one in group.members])
    if found is not None:
        return Scores(found)
    if importance == "bn_scale":
        return Scores(scores(module, group, "l1").values, "l1")
    return Scores(torch.ones(group.size), "order")  # nothing but bare parameters


def _gathered(group: Group, found: list[tuple[Member, Tensor | None]]) -> Tensor | None:
    """The mean over members of what each position of theirs scores, by unit."""
    values = [
        torch.zeros(group.size).index_add_(0, torch.from_numpy(member.units), score.float())
        for member, score in found
        if score is not None
    ]
    return torch.stack(values).mean(0) if values else None


class _Item(NamedTuple):
    """What torch-pruning's importances look at: a layer's side and the positions on it."""

    dep: Any
    idxs: list[int]
    root_idxs: list[int]

    def __iter__(self) -> Any:
        return iter((self.dep, self.idxs))


def _judged(module: nn.Module, member: Member, judge: Any) -> Tensor | None:
    """Scores of a member's positions, None where torch-pruning knows no such layer."""
    place = member.place
    if not place.tensor.endswith("weight"):
        return None
    layer = module.get_submodule(place.layer)
    handler = _handler(layer, place.axis)
    if handler is None or not hasattr(layer, "weight"):
        return None
    dependency = SimpleNamespace(layer=layer, target=SimpleNamespace(module=layer), handler=handler, pruning_fn=handler)
    return judge([_Item(dependency, member.positions.tolist(), list(range(len(member.positions))))])


def _handler(layer: nn.Module, axis: int) -> Any:
    if isinstance(layer, nn.modules.conv._ConvNd):
        if layer.groups > 1 and layer.groups == layer.in_channels:
            return None  # depthwise: one filter says little
        outputs = axis == (1 if layer.transposed else 0)
        return function.prune_conv_out_channels if outputs else function.prune_conv_in_channels
    if isinstance(layer, nn.Linear):
        return function.prune_linear_out_channels if axis == 0 else function.prune_linear_in_channels
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return function.prune_batchnorm_out_channels
    return function.prune_layernorm_out_channels if isinstance(layer, nn.LayerNorm) else None


def _apart(module: nn.Module, member: Member) -> Tensor | None:
    """Each filter's summed Euclidean distance from the others of its layer.

    Our own: torch-pruning takes distances between squared weights.
    """
    if not member.place.tensor.endswith("weight"):
        return None
    weight = module.get_parameter(member.place.tensor).detach()
    filters = weight.movedim(member.place.axis, 0).flatten(1)[torch.from_numpy(member.positions)]
    return torch.cdist(filters, filters).sum(1)


def learn_gradients(model: nn.Module, task: Task, macs: int) -> None:
    """Sum gradients of the task's loss over calibration batches into the parameters' `.grad`.

    Batch norms get these examples' statistics first. `macs`: multiply-adds of one example, by which the number of
    examples is limited.
    """
    limit = int(min(SCORED, max(FEWEST, WORK / max(macs, 1))))
    model.zero_grad()
    model.requires_grad_(True).eval()
    _fit_norms(model, task, limit)
    with torch.enable_grad():
        for inputs, targets in task.batches("calibration", min(64, limit), limit=limit):
            task.loss(model(*several(inputs)), targets).backward()
    model.eval()
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)  # not used by the loss


@torch.no_grad()
def _fit_norms(model: nn.Module, task: Task, limit: int) -> None:
    """Give batch norms the statistics of the first `limit` calibration examples: inherited ones may not fit yet.

    Gradients through a batch's own statistics would not do: a filter's scale changes nothing there, so that its sum of
    gradient * weight is zero whatever it is worth.
    """
    norms = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    fitting = False
    for inputs, _ in task.batches("calibration", min(64, limit), limit=limit) if norms else ():
        if batch_size(inputs) == 1:  # which has no statistics
            continue
        for norm in norms if not fitting else ():
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches
            norm.train()
        fitting = True
        model(*several(inputs))
    model.eval()
