"""Which of the parent's weights a candidate is made of, where it only takes some away (floor F5).

A candidate is built and its structure receipts are enacted a second time, on a parent whose every weight is its own
place among all of them. What comes out says where each weight came from: for any builder and any op that selects, a
plug-in's too. An op that computes weights anew is told from that.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autocompress import space as sp
from autocompress.pipeline import FirstLook, Work, narrowed, ordered
from autocompress.types import Genotype, Space, TrialFailure


@dataclass(frozen=True)
class Slice:
    """A structure whose weights are some of the parent's."""

    genotype: Genotype
    module: nn.Module  # its layers and buffers; the weights in it are not used
    whole: Mapping[str, str]  # parameter -> the parent's parameter that it is
    places: Mapping[str, Tensor]  # other parameters -> places, in their own shape, int64

    def weights(self, parent: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters by name, made of the parent's by name and in its order: gradients reach those."""
        found = {name: parent[of] for name, of in self.whole.items()}
        if self.places:
            flat = torch.cat([tensor.flatten() for tensor in parent.values()])
            found |= {name: flat[places.flatten()].view(places.shape) for name, places in self.places.items()}
        return found

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        kept = sum(places.numel() * places.element_size() for places in self.places.values())
        return kept + sum(tensor.numel() * tensor.element_size() for tensor in self.module.state_dict().values())


def slice_of(work: Work, space: Space, genotype: Genotype) -> Slice:
    """The structure of a genotype, of which quantization and training are no part.

    Raises TrialFailure where it is no selection of the parent's weights, or cannot be made.
    """
    candidate = sp.decode(space, genotype)
    module, ids = work.builder.build(candidate.arch), work.builder.build(candidate.arch).double()
    work.builder.inherit(module, work.parent, candidate.arch)
    total = sum(parameter.numel() for parameter in work.parent.parameters())
    with torch.no_grad():
        for parameter in ids.parameters():
            parameter.fill_(-1)  # what is not inherited has no place
    work.builder.inherit(ids, numbered(work.parent), candidate.arch)
    brief = FirstLook(work.task)
    for name, op, rules in ordered(candidate.policy, work.ops, "structure"):
        asked, _ = narrowed(op, module, rules, candidate.policy)
        tensors: dict[str, Any] = {}
        receipt = op.decide(module, asked, brief, work.shape_profile, tensors)
        if any(entry.status == "open" for entry in receipt.entries):
            raise TrialFailure(f"{name}: what it takes away is settled by training")
        if tensors:
            raise TrialFailure(f"{name}: computes weights that are not the parent's")
        module, ids = op.enact(module, receipt), op.enact(ids, receipt)
    owners = starts(work.parent)
    whole: dict[str, str] = {}
    places: dict[str, Tensor] = {}
    found = dict(ids.named_parameters())
    for name, parameter in module.named_parameters():
        at = found[name].detach()
        if at.shape != parameter.shape or not selects(at, total):
            raise TrialFailure(f"{name} is no selection of the parent's weights")
        at = at.to(torch.int64)
        first = int(at.flatten()[0])
        owner, shape = owners.get(first, ("", None))
        if shape == at.shape and torch.equal(at.flatten(), torch.arange(first, first + at.numel())):
            whole[name] = owner
        else:
            places[name] = at
    return Slice(genotype, module, whole, places)


def numbered(parent: nn.Module) -> nn.Module:
    """A copy in double precision, which counts to 2**53, whose weights are their places laid end to end."""
    module = copy.deepcopy(parent).double()
    begin = 0
    with torch.no_grad():
        for parameter in module.parameters():
            count = parameter.numel()
            parameter.copy_(torch.arange(begin, begin + count, dtype=torch.float64).view(parameter.shape))
            begin += count
    return module


def starts(parent: nn.Module) -> dict[int, tuple[str, torch.Size]]:
    """Place of a parameter's first element -> its name and shape."""
    found: dict[int, tuple[str, torch.Size]] = {}
    begin = 0
    for name, parameter in parent.named_parameters():
        found[begin] = (name, parameter.shape)
        begin += parameter.numel()
    return found


def selects(at: Tensor, total: int) -> bool:
    """Whether these numbers are places, each once."""
    flat = at.flatten()
    inside = len(flat) > 0 and bool(((flat >= 0) & (flat < total) & (flat == flat.round())).all())
    return inside and len(torch.unique(flat)) == len(flat)
