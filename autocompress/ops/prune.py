"""Op `prune`: cut the least important channels of a coupled group (structured pruning).

Groups and scores come from torch-pruning (DepGraph, Fang et al. 2023); what is kept stands in the receipt as plain
indices of every layer concerned, so enacting needs neither torch-pruning nor data.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.models.groups import Coupling, Group, Unprunable, choose, is_depthwise
from autocompress.models.trace import leaves
from autocompress.ops import Phase
from autocompress.ops.slicing import Cut, apply, channels, difference
from autocompress.tasks import Task, several
from autocompress.types import Choice, Entry, Profile, Receipt, Rule, TrialFailure, UserError

IMPORTANCES = ("l1", "l2", "taylor")
SCORED = 256
"""Calibration examples that Taylor importance reads."""


def keep_count(channels: int, ratio: float, unit: int, multiple: int) -> int:
    """How many of `channels` stay when `ratio` of them should go: a multiple of `unit`, never 0.

    The nearest multiple of `multiple` too, where that leaves any; all of them where that would be more than all.
    """
    target = channels * (1 - ratio)
    for step in (math.lcm(unit, multiple), unit):
        keep = math.floor(target / step + 0.5) * step
        if keep > 0:
            return min(keep, channels)
    return unit


class Prune:
    """Coupled structured pruning. `ratio` is the share of channels to cut, `importance` l1, l2 or taylor."""

    name = "prune"
    phase: Phase = "structure"

    def __init__(self) -> None:
        self.params: dict[str, Any] = {"ratio": 0.0, "importance": "l1"}

    def decide(
        self,
        subject: nn.Module,
        rules: Sequence[Rule],
        task: Task,
        profile: Profile,
        tensors: dict[str, Tensor] | None = None,  # noqa: ARG002  nothing is fitted
    ) -> Receipt:
        """Choose the channels that stay, rule by rule on the network that the rules before have left.

        Raises UserError for a setting that makes no sense and TrialFailure where torch-pruning cannot read the network.
        """
        asked = [(rule, *_settings(rule)) for rule in rules]
        asked = [item for item in asked if item[1] > 0]
        if not asked:
            return Receipt(op=self.name)
        shape = tuple(task.input.shape)
        try:
            coupling = Coupling(subject, torch.zeros(1, *shape))
        except Exception as error:  # a stranger's network may break torch-pruning in any way
            raise TrialFailure(
                f"prune: torch-pruning cannot read the network: {type(error).__name__}: {error}"
            ) from error
        if any(importance == "taylor" for _, _, importance in asked):
            learn_gradients(coupling.model, task)
        surgery = _Surgery(coupling, shape, profile.channel_multiple)
        return Receipt(op=self.name, entries=tuple(surgery.follow(*item) for item in asked))

    def enact(self, subject: nn.Module, receipt: Receipt, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:  # noqa: ARG002
        """Keep what the receipt keeps, in place. Raises UserError where it was written for another network."""
        for entry in receipt.entries:
            for raw in entry.facts.get("cuts", ()):
                cut = Cut.model_validate(raw)
                why = difference(subject, cut)
                if why:
                    raise UserError(f"prune at site {entry.site}: the receipt is of another network: {why}")
                apply(subject, cut)
        return subject


def learn_gradients(model: nn.Module, task: Task) -> None:
    """Sum gradients of the task's loss over calibration batches into the parameters' `.grad`, batch norm by batch."""
    model.zero_grad()
    model.eval()
    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.train()  # inherited statistics may not fit yet
    with torch.enable_grad():
        for inputs, targets in task.batches("calibration", 64, limit=SCORED):
            task.loss(model(*several(inputs)), targets).backward()
    model.eval()
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)  # not used by the loss


def _settings(rule: Rule) -> tuple[float, str]:
    """Ratio and importance of a rule, checked."""
    known: dict[str, Choice] = {"ratio": 0.0, "importance": "l1", **rule.settings}
    unknown = set(rule.settings) - {"ratio", "importance"}
    if unknown:
        raise UserError(f"prune at site {rule.site}: unknown setting {min(unknown)!r}; known are ratio, importance")
    ratio, importance = known["ratio"], known["importance"]
    if isinstance(ratio, bool | str) or not 0 <= ratio < 1:
        raise UserError(f"prune at site {rule.site}: ratio {ratio!r} is no share in [0, 1)")
    if importance not in IMPORTANCES:
        raise UserError(f"prune at site {rule.site}: importance {importance!r}; choose one of {', '.join(IMPORTANCES)}")
    return float(ratio), str(importance)


class _Surgery:
    """One decision under way: the stand-in shrinks rule by rule."""

    def __init__(self, coupling: Coupling, shape: tuple[int, ...], multiple: int) -> None:
        self.coupling, self.shape, self.multiple = coupling, shape, multiple
        self.cut_by: dict[str, str] = {}  # producer -> site whose rule has cut its outputs

    def follow(self, rule: Rule, ratio: float, importance: str) -> Entry:
        cuts: list[Cut] = []
        reasons: list[str] = []
        before = after = 0
        model = self.coupling.model
        producers = [name for name in leaves(model, rule.site) if not is_depthwise(model.get_submodule(name))]
        if not producers:
            reasons.append("no convolution or linear layer is there")
        for layer in producers:
            if self.cut_by.get(layer) == rule.site:
                continue  # coupled with a layer this rule has already reached
            try:
                group, found = self._cut(layer, ratio, importance)
            except Unprunable as refusal:
                reasons.append(str(refusal))
                continue
            cuts += found
            before += group.channels
            after += len(found[0].kept)
            self.cut_by |= dict.fromkeys(group.producers, rule.site)
        if not cuts:
            return Entry(site=rule.site, status="skipped", why=reasons[0], asked=rule.settings)
        return Entry(
            site=rule.site,
            asked=rule.settings,
            achieved={"ratio": 1 - after / before, "kept": after, "of": before},
            facts={"cuts": [cut.model_dump(mode="json", exclude_defaults=True) for cut in cuts]},
        )

    def _cut(self, layer: str, ratio: float, importance: str) -> tuple[Group, list[Cut]]:
        group = self.coupling.group(layer)
        taken = [producer for producer in group.producers if producer in self.cut_by]
        if taken:
            raise Unprunable(f"the rule for {self.cut_by[taken[0]]} has cut these channels, which are coupled")
        cells, turns = self.coupling.cells(group)
        keep = keep_count(group.channels, ratio, len(cells), self.multiple)
        if keep == group.channels:
            raise Unprunable(f"{ratio:g} of {group.channels} channels is less than what can be cut at a time")
        kept = choose(self.coupling.scores(layer, importance), cells, keep, turns)
        cuts = self._cuts(group, kept)
        self._check(cuts)
        self.coupling.drop(layer, sorted(set(range(group.channels)) - set(kept)))
        return group, cuts

    def _cuts(self, group: Group, kept: Sequence[int]) -> list[Cut]:
        """What keeping channels `kept` of the root means for every member; a member may see a channel many times."""
        rank = {root: position for position, root in enumerate(kept)}
        cuts: list[Cut] = []
        for member in group.members:
            was = channels(self.coupling.model.get_submodule(member.layer), member.side)
            mine = dict(zip(member.indices, member.roots, strict=True))
            stay = [index for index in range(was) if mine.get(index, kept[0]) in rank]
            if len(member.indices) == was and member.roots == member.indices:
                stay = list(kept)  # one to one: the new order of a shuffled group
            grouped = self.coupling.grouped.get(member.layer)
            cuts.append(
                Cut(
                    layer=member.layer,
                    side=member.side,
                    was=was,
                    kept=tuple(stay),
                    groups=grouped.groups if grouped else 1,
                    interleaved=grouped.interleaved if grouped else False,
                )
            )
        return cuts

    def _check(self, cuts: Sequence[Cut]) -> None:
        """Cutting must equal ignoring: consumers that are blind to the channels give what the smaller network gives.

        It fails where channels go another way than torch-pruning believes (zero-padded shortcuts, free-hand shuffles).
        """
        blind = _normalising(copy.deepcopy(self.coupling.model))
        small = _normalising(copy.deepcopy(self.coupling.model))
        for cut in cuts:
            dense = cut.model_copy(update={"groups": 1, "interleaved": False})
            if cut.side == "in":
                gone = sorted(set(range(cut.was)) - set(cut.kept))
                blind.get_submodule(cut.layer).weight.data[:, gone] = 0  # type: ignore[operator]
            apply(small, dense)
        noise = torch.randn(4, *self.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        with torch.no_grad():
            try:
                expected, found = blind(noise), small(noise)
            except RuntimeError as error:
                raise Unprunable(f"torch-pruning's group does not fit together: {error}") from error
        scale = float(expected.abs().max())
        if not torch.allclose(expected, found, rtol=0, atol=1e-6 * scale):
            raise Unprunable("torch-pruning pairs the wrong channels here: cutting them changes what the rest computes")


def _normalising(model: nn.Module) -> nn.Module:
    """Double precision, batch norm by batch: signals stay of order one in an untrained network too."""
    model.double().eval()
    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.train()
    return model
