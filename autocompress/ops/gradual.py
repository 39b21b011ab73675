"""Channels that leave while the network trains, least important first (the part of op `prune` that training settles).

Zhu and Gupta 2018, "To prune, or not to prune", section 3: the share that is gone grows with the cube of what is left
of the ramp, and what goes is chosen anew at every step by the weights as they are by then. Here the steps are over
coupled groups: a unit that has gone is silent wherever it stands (`models.fading`), and is cut out at the end. How many
units of each group stay is known from the start, so that the latency of the result is, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.models.fading import Sketch, replan, silence
from autocompress.models.groups import Group, Ints, choose
from autocompress.ops.importance import Importance, scores
from autocompress.types import Entry, Receipt, Record, UserError

RAMP, UPDATES = 0.25, 20
"""All are gone at this share of training, after so many steps: before the first rung of a usual search, which so sees
the network that would ship. On digits at 70 % a ramp over 0.6 of three or ten epochs ended no better."""
MEMORY = 0.9
"""What gradient scores keep of earlier batches (as Molchanov et al. 2019 average theirs between two removals)."""
GONE, SCORES, OWN = "prune_gone", "prune_scores", "prune_fading"


class Part(Record):
    """What becomes of one group of a sketch."""

    keep: int
    importance: Importance
    scores: tuple[float, ...] = ()  # of gradients, which training goes on to average


@dataclass(frozen=True)
class Fading:
    """A group on its way out, held by its root layer."""

    group: Group
    part: Part


def opened(sketch: Sketch, parts: Sequence[Part]) -> dict[str, Any]:
    """Facts of an open entry."""
    kinds = [part.model_dump(mode="json", exclude_defaults=True) for part in parts]
    return {"sketch": sketch.model_dump(mode="json", exclude_defaults=True), "parts": kinds}


def read(entry: Entry) -> tuple[Sketch, tuple[Fading, ...]]:
    """An open entry's groups."""
    sketch = Sketch.model_validate(entry.facts["sketch"])
    parts = [Part.model_validate(part) for part in entry.facts["parts"]]
    return sketch, tuple(Fading(group, part) for group, part in zip(sketch.groups(), parts, strict=True))


def goal(share: float, going: int) -> int:
    """How many of the units that go are gone at a share of training."""
    passed = min(1.0, int(share / RAMP * UPDATES + 1e-9) / UPDATES)
    return int(going * (1 - (1 - passed) ** 3) + 1e-9)


def install(module: nn.Module, receipt: Receipt) -> None:
    """Give the root of every open group its mask. Raises UserError for a receipt of another network."""
    for entry in waiting(receipt):
        sketch, fadings = read(entry)
        _check(module, entry.site, sketch)
        for fading in fadings:
            root = module.get_submodule(fading.group.root)
            root.register_buffer(GONE, torch.zeros(fading.group.size, dtype=torch.bool))
            if fading.part.scores:
                root.register_buffer(SCORES, torch.tensor(fading.part.scores))
            setattr(root, OWN, fading)


def waiting(receipt: Receipt) -> list[Entry]:
    """Entries that training settles."""
    return [entry for entry in receipt.entries if entry.status == "open"]


@torch.no_grad()
def advance(module: nn.Module, share: float) -> None:
    """Choose anew where the schedule asks for more, and silence what has gone."""
    for root, fading in _fadings(module):
        gone = root.get_buffer(GONE)
        wanted = goal(share, fading.group.size - fading.part.keep)
        if wanted > int(gone.sum()):
            gone.copy_(_left_out(module, root, fading, fading.group.size - wanted))
        silence(module, [(fading.group, _numbers(gone))])


@torch.no_grad()
def follow(module: nn.Module) -> None:
    """Take in a step's gradients where they are what channels are ranked by."""
    for root, fading in _fadings(module):
        if fading.part.scores and all(_graded(module, member.place.tensor) for member in fading.group.members):
            found = scores(module, fading.group, fading.part.importance).values
            root.get_buffer(SCORES).mul_(MEMORY).add_(found, alpha=1 - MEMORY)


@torch.no_grad()
def close(module: nn.Module, receipt: Receipt) -> Receipt:
    """Remove the masks; entries then say what is cut, as in a receipt of the whole at once."""
    read_ = [(entry, *read(entry)) for entry in waiting(receipt)]
    plan = replan([sketch for _, sketch, _ in read_])
    closed: dict[int, Entry] = {}
    for entry, _, fadings in read_:
        kept: dict[Group, list[int]] = {}
        for fading in fadings:
            root = module.get_submodule(fading.group.root)
            left = ~_left_out(module, root, fading, fading.part.keep)
            kept[fading.group] = _numbers(left).tolist()
        closed[id(entry)] = entry.model_copy(update={"status": "done", "facts": plan.facts(kept)})
    for root, fading in list(_fadings(module)):
        delattr(root, GONE)
        if fading.part.scores:
            delattr(root, SCORES)
        delattr(root, OWN)
    return receipt.model_copy(update={"entries": tuple(closed.get(id(entry), entry) for entry in receipt.entries)})


def _left_out(module: nn.Module, root: nn.Module, fading: Fading, keep: int) -> Tensor:
    """Which units go (units,) when `keep` stay: those that have gone, then the least important ones."""
    gone, part = root.get_buffer(GONE), fading.part
    values = root.get_buffer(SCORES) if part.scores else scores(module, fading.group, part.importance).values
    values = torch.where(gone, -torch.inf, values.to(gone.device))
    found = torch.ones_like(gone)
    found[choose(values, fading.group.cells, keep)] = False
    return found


def _fadings(module: nn.Module) -> Iterator[tuple[nn.Module, Fading]]:
    for part in module.modules():
        if (fading := part.__dict__.get(OWN)) is not None:
            yield part, fading


def _numbers(chosen: Tensor) -> Ints:
    return np.flatnonzero(chosen.cpu().numpy())


def _graded(module: nn.Module, name: str) -> bool:
    parent, _, own = name.rpartition(".")
    parameter = module.get_submodule(parent)._parameters.get(own)
    return parameter is None or parameter.grad is not None


def _check(module: nn.Module, site: str, sketch: Sketch) -> None:
    from_another = f"prune at site {site}: the receipt is of another network"
    tensors: Mapping[str, Tensor] = dict(module.named_parameters(remove_duplicate=False)) | dict(
        module.named_buffers(remove_duplicate=False)
    )
    for axis in sketch.axes:
        tensor, size = tensors.get(axis.tensor), len(sketch.lists[axis.units])
        if tensor is None:
            raise UserError(f"{from_another}: {axis.tensor} is not there")
        found = tensor.shape[axis.axis] * axis.groups if axis.axis < tensor.dim() else 0
        if found != size:
            raise UserError(f"{from_another}: {axis.tensor} has {found} channels here and had {size} there")
