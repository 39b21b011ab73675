"""Op `prune`: cut the least important channels, attention heads and hidden units (structured pruning).

What belongs together is found by following channels through the network (`models.groups`, after DepGraph, Fang et al.
2023); what is kept stands in the receipt as plain indices, so enacting needs no library, no trace and no data.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from autocompress.models.coupling import Coupling, Plan
from autocompress.models.groups import Group, Unprunable, choose, is_depthwise, makes_channels
from autocompress.models.proof import couple, faults
from autocompress.models.slicing import Cut, Mismatch, apply
from autocompress.models.trace import count, examples
from autocompress.ops import Phase
from autocompress.ops.importance import GRADIENTS, IMPORTANCES, Importance, Scores, learn_gradients, scores
from autocompress.tasks import Task, several
from autocompress.types import Choice, Entry, Profile, Receipt, Record, Rule, TrialFailure, UserError

SCOPES = ("group", "global")
LEAST = 0.1
"""Share of a group that global ranking leaves at least."""


class Wish(Record):
    """What a rule asks for."""

    ratio: float
    importance: Importance
    scope: str


class Prune:
    """Coupled structured pruning. `ratio` is the share of channels to cut, `importance` what they are ranked by.

    `scope` group: the same ratio in every group of the rule's site; global: all of them are ranked together (scores
    over each group's mean), and each keeps a tenth and one channel multiple of the profile at least.
    """

    name = "prune"
    phase: Phase = "structure"

    def __init__(self) -> None:
        self.params: dict[str, Any] = {"ratio": 0.0, "importance": "l1", "scope": "group"}

    def decide(
        self,
        subject: nn.Module,
        rules: Sequence[Rule],
        task: Task,
        profile: Profile,
        tensors: dict[str, Tensor] | None = None,  # noqa: ARG002  nothing is fitted
    ) -> Receipt:
        """Choose the channels that stay. Of two rules for coupled layers the first counts.

        Raises UserError for a setting that makes no sense and TrialFailure where the network does not run.
        """
        wishes = [(rule, wish(rule)) for rule in rules]
        wishes = [(rule, wished) for rule, wished in wishes if wished.ratio > 0]
        if not wishes:
            return Receipt(op=self.name)
        try:
            coupling = couple(subject, examples(task.input))
        except Exception as error:  # a stranger's network may raise anything
            raise TrialFailure(f"prune: the network cannot be followed: {type(error).__name__}: {error}") from error
        verdicts = [_Verdict(subject, coupling, rule, wished) for rule, wished in wishes]
        _share_out(verdicts)
        judged = subject
        if any(verdict.wish.importance in GRADIENTS and verdict.groups for verdict in verdicts):
            judged = copy.deepcopy(subject)
            learn_gradients(judged, task, count(subject, examples(task.input))[0])
        for verdict in verdicts:
            verdict.choose(judged, profile.channel_multiple)
        kept = {group: chosen for verdict in verdicts for group, chosen in verdict.kept.items()}
        if kept:
            bad = faults(subject, coupling, kept, samples(task))
            for verdict in verdicts:
                verdict.give_up(bad)
        plan = coupling.plan()
        return Receipt(op=self.name, entries=tuple(verdict.entry(plan) for verdict in verdicts))

    def enact(self, subject: nn.Module, receipt: Receipt, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:  # noqa: ARG002
        """Keep what the receipt keeps, in place. Raises UserError where it was written for another network."""
        for entry in receipt.entries:
            try:
                cuts = [Cut.model_validate(raw) for raw in entry.facts.get("cuts", ())]
                apply(subject, cuts, entry.facts.get("attributes", {}))
            except ValidationError as wrong:
                what = "its cuts are not of this version; decide again from the same ratios"
                raise UserError(f"prune at site {entry.site}: {what}") from wrong
            except Mismatch as why:
                raise UserError(f"prune at site {entry.site}: the receipt is of another network: {why}") from why
        return subject


def wish(rule: Rule) -> Wish:
    """A rule's settings, checked. Raises UserError for one that is unknown or makes no sense."""
    known: dict[str, Choice] = {"ratio": 0.0, "importance": "l1", "scope": "group", **rule.settings}
    where = f"prune at site {rule.site}"
    if unknown := set(rule.settings) - {"ratio", "importance", "scope"}:
        raise UserError(f"{where}: unknown setting {min(unknown)!r}; known are ratio, importance, scope")
    ratio, importance, scope = known["ratio"], known["importance"], known["scope"]
    if isinstance(ratio, bool | str) or not 0 <= ratio < 1:
        raise UserError(f"{where}: ratio {ratio!r} is no share in [0, 1)")
    if importance not in IMPORTANCES:
        raise UserError(f"{where}: importance {importance!r}; choose one of {', '.join(IMPORTANCES)}")
    if scope not in SCOPES:
        raise UserError(f"{where}: scope {scope!r}; choose one of {', '.join(SCOPES)}")
    return Wish(ratio=float(ratio), importance=importance, scope=str(scope))


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


def samples(task: Task) -> tuple[Tensor, ...]:
    """Two inputs to try a network on: noise, or real ones where they are numbers of words."""
    zeros = examples(task.input, 2)
    if all(one.is_floating_point() for one in zeros):
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randn(one.shape, generator=generator).to(one.dtype) for one in zeros)
    inputs, _ = next(iter(task.batches("calibration", 2, limit=2)))
    return several(inputs)


class _Verdict:
    """One rule on its way to an entry."""

    def __init__(self, module: nn.Module, coupling: Coupling, rule: Rule, wish: Wish) -> None:
        self.rule, self.wish = rule, wish
        self.reasons: list[str] = []
        self.groups: list[Group] = []
        self.kept: dict[Group, list[int]] = {}
        self.instead: dict[str, str] = {}
        layers = list(_layers(module, rule.site))
        if not layers:
            self.reasons.append("no convolution or linear layer is there")
        for layer in layers:
            try:
                self.groups += [group for group in coupling.at(layer) if group not in self.groups]
            except Unprunable as refusal:
                self.reasons.append(str(refusal))

    def choose(self, module: nn.Module, multiple: int) -> None:
        """Rank units and keep the best."""
        found = {group: scores(module, group, self.wish.importance) for group in self.groups}
        self.instead = {group.root: score.instead for group, score in found.items() if score.instead}
        ratios = _global_ratios(found, self.wish.ratio) if self.wish.scope == "global" else {}
        for group, score in found.items():
            units = group.step * (multiple // math.gcd(multiple, group.width))  # a head may be several multiples wide
            keep = keep_count(group.size, ratios.get(group, self.wish.ratio), group.step, units)
            if self.wish.scope == "global":
                least = max(math.ceil(group.size * LEAST), min(units, group.size))
                keep = max(keep, min(group.size, math.ceil(least / group.step) * group.step))
            if keep == group.size:
                what = f"{self.wish.ratio:g} of {group.channels} channels"
                self.reasons.append(f"{what} is less than what can be cut at a time")
                continue
            self.kept[group] = choose(score.values, group.cells, keep)

    def give_up(self, bad: Mapping[Group, str]) -> None:
        """Leave alone what cannot be cut after all."""
        for group, why in bad.items():
            if self.kept.pop(group, None) is not None:
                self.reasons.append(why)

    def entry(self, plan: Plan) -> Entry:
        """The receipt's line; cuts follow those of the rules before."""
        if not self.kept:
            return Entry(site=self.rule.site, status="skipped", why=self.reasons[0], asked=self.rule.settings)
        cuts: list[Cut] = []
        attributes: dict[str, dict[str, int]] = {}
        for group, kept in self.kept.items():
            found, values = plan.cut(group, kept)
            cuts += found
            for name, mine in values.items():
                attributes.setdefault(name, {}).update(mine)
        before = sum(group.channels for group in self.groups)
        gone = sum(group.channels * (group.size - len(kept)) // group.size for group, kept in self.kept.items())
        facts: dict[str, Any] = {"cuts": [cut.model_dump(mode="json", exclude_defaults=True) for cut in cuts]}
        if attributes:
            facts["attributes"] = attributes
        if instead := {root: why for root, why in self.instead.items() if root in {group.root for group in self.kept}}:
            facts["importance"] = instead
        return Entry(
            site=self.rule.site,
            asked=self.rule.settings,
            achieved={"ratio": gone / before, "kept": before - gone, "of": before},
            facts=facts,
        )


def _share_out(verdicts: Sequence[_Verdict]) -> None:
    """Each group belongs to the first rule that reaches it."""
    taken: dict[Group, str] = {}
    for verdict in verdicts:
        for group in list(verdict.groups):
            site = taken.setdefault(group, verdict.rule.site)
            if site != verdict.rule.site:
                verdict.groups.remove(group)
                verdict.reasons.append(f"the rule for {site} has cut these channels, which are coupled")


def _layers(module: nn.Module, site: str) -> Iterator[str]:
    """Layers at a site or under it that make channels."""
    for name, part in module.named_modules():
        here = site in (".", name) or name.startswith(f"{site}.")
        if here and makes_channels(part) and not is_depthwise(part):
            yield name


def _global_ratios(found: Mapping[Group, Scores], ratio: float) -> dict[Group, float]:
    """The share of each group that goes when all units are ranked together, scores over their group's mean."""
    if not found:
        return {}
    groups = list(found)
    values = torch.cat([found[group].values / found[group].values.mean().clamp_min(1e-12) for group in groups])
    owner = torch.cat([torch.full((group.size,), at) for at, group in enumerate(groups)])
    width = torch.tensor([group.channels / group.size for group in groups])[owner]
    order = torch.argsort(values, stable=True)
    spent = width[order].cumsum(0)
    gone = owner[order[spent <= ratio * float(width.sum()) + 1e-6]]
    counts = torch.bincount(gone, minlength=len(groups))
    return {group: float(counts[at]) / group.size for at, group in enumerate(groups)}
