"""Op `prune`: cut the least important channels, attention heads and hidden units (structured pruning).

What belongs together is found by following channels through the network (`models.groups`, after DepGraph, Fang et al.
2023); what is kept stands in the receipt as plain indices, so enacting needs no library, no trace and no data.

With `schedule` gradual the channels leave while the network trains (`ops.gradual`): the receipt's entries are open
until then, and settled they read like any other.
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
from autocompress.models.fading import heard, sketch
from autocompress.models.groups import Group, Unprunable, choose, is_depthwise, makes_channels
from autocompress.models.proof import couple, faults
from autocompress.models.slicing import Cut, Mismatch, apply
from autocompress.models.trace import count, examples
from autocompress.ops import Phase, gradual
from autocompress.ops.importance import GRADIENTS, IMPORTANCES, Importance, Scores, learn_gradients, scores
from autocompress.tasks import Task, several
from autocompress.types import Choice, Entry, Policy, Profile, Receipt, Record, Rule, TrialFailure, UserError

SCOPES = ("group", "global")
SCHEDULES = ("oneshot", "gradual")
LEAST = 0.1
"""Share of a group that global ranking leaves at least."""


class Wish(Record):
    """What a rule asks for."""

    ratio: float
    importance: Importance
    scope: str
    schedule: str = ""  # empty: as the rule for the whole network says


class Prune:
    """Coupled structured pruning. `ratio` is the share of channels to cut, `importance` what they are ranked by.

    `scope` group: the same ratio in every group of the rule's site; global: all of them are ranked together (scores
    over each group's mean), and each keeps a tenth and one channel multiple of the profile at least. A module's groups
    are those that begin in it.

    `schedule` oneshot cuts before training; gradual lets channels go over its first part, chosen anew by the weights so
    far, as many of each group as oneshot would cut (automated gradual pruning, Zhu and Gupta 2018). At site "." it
    holds for every rule that has none of its own; oneshot at a site holds for all that its layers make or read.
    """

    name = "prune"
    phase: Phase = "structure"
    network_params = ("schedule",)

    def __init__(self) -> None:
        self.params: dict[str, Any] = {"ratio": 0.0, "importance": "l1", "scope": "group", "schedule": "oneshot"}

    def narrow(self, subject: nn.Module, rules: Sequence[Rule], policy: Policy) -> tuple[list[Rule], list[Entry]]:  # noqa: ARG002
        """The rules, and oneshot at sites where another op counts on channels that do not change any more."""
        if not any(wish(rule).schedule == "gradual" for rule in rules):
            return list(rules), []
        fixed = {rule.site for rule in policy.rules if _counts_channels(rule)}
        held = [
            rule.model_copy(update={"settings": {**rule.settings, "schedule": "oneshot"}})
            if rule.site in fixed
            else rule
            for rule in rules
        ]
        own = {rule.site for rule in rules}
        held += [
            Rule(site=site, op=self.name, settings={"schedule": "oneshot"}) for site in sorted(fixed) if site not in own
        ]
        return held, []

    def check(self, rule: Rule) -> None:
        """Raise UserError for settings that are unknown or out of range; reads nothing but the rule."""
        wish(rule)

    def decide(
        self,
        subject: nn.Module,
        rules: Sequence[Rule],
        task: Task,
        profile: Profile,
        tensors: dict[str, Tensor] | None = None,  # noqa: ARG002  nothing is fitted
    ) -> Receipt:
        """Choose the channels that stay, or how many will. Of two rules for coupled layers the first counts.

        Raises UserError for a setting that makes no sense and TrialFailure where the network does not run.
        """
        every = [(rule, wish(rule)) for rule in rules]
        usual = next((wished.schedule for rule, wished in every if rule.site == "." and wished.schedule), SCHEDULES[0])
        at_once = [rule.site for rule, wished in every if rule.site != "." and wished.schedule == "oneshot"]
        wishes = [(rule, wished) for rule, wished in every if wished.ratio > 0]
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
        for verdict in verdicts:
            verdict.let_fade(usual, at_once)
        if fading := {group: verdict.kept[group] for verdict in verdicts for group in verdict.fading}:
            loud = heard(subject, coupling, fading, samples(task))
            for verdict in verdicts:
                verdict.cut_at_once(loud)
        plan = coupling.plan()
        entries = [entry for verdict in verdicts if (entry := verdict.entry(plan))]
        entries += [entry for verdict in verdicts if (entry := verdict.open_entry(plan))]
        return Receipt(op=self.name, entries=tuple(entries))

    def enact(self, subject: nn.Module, receipt: Receipt, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:  # noqa: ARG002
        """Keep what the receipt keeps, in place; what it leaves open gets its mask.

        Raises UserError where it was written for another network.
        """
        for entry in receipt.entries:
            try:
                cuts = [Cut.model_validate(raw) for raw in entry.facts.get("cuts", ())]
                apply(subject, cuts, entry.facts.get("attributes", {}))
            except ValidationError as wrong:
                what = "its cuts are not of this version; decide again from the same ratios"
                raise UserError(f"prune at site {entry.site}: {what}") from wrong
            except Mismatch as why:
                raise UserError(f"prune at site {entry.site}: the receipt is of another network: {why}") from why
        gradual.install(subject, receipt)
        return subject

    def advance(self, module: nn.Module, receipt: Receipt, share: float) -> None:  # noqa: ARG002  the masks know
        """Let go what the schedule asks for by now."""
        gradual.advance(module, share)

    def follow(self, module: nn.Module, receipt: Receipt) -> None:  # noqa: ARG002
        """Take in a step's gradients."""
        gradual.follow(module)

    def penalty(self, module: nn.Module, receipt: Receipt) -> Tensor | None:  # noqa: ARG002
        """None."""
        return None

    def settle(self, module: nn.Module, receipt: Receipt) -> Receipt:
        """Cut out what has gone, and what is still to go; open entries become plain ones."""
        settled = gradual.close(module, receipt)
        closed = [now for was, now in zip(receipt.entries, settled.entries, strict=True) if was.status == "open"]
        self.enact(module, settled.model_copy(update={"entries": tuple(closed)}))
        return settled


def wish(rule: Rule) -> Wish:
    """A rule's settings, checked. Raises UserError for one that is unknown or makes no sense."""
    usual: dict[str, Choice] = {"ratio": 0.0, "importance": "l1", "scope": "group", "schedule": ""}
    known = usual | rule.settings
    where = f"prune at site {rule.site}"
    if unknown := set(rule.settings) - set(usual):
        raise UserError(f"{where}: unknown setting {min(unknown)!r}; known are {', '.join(usual)}")
    ratio, importance, scope = known["ratio"], known["importance"], known["scope"]
    if isinstance(ratio, bool | str) or not 0 <= ratio < 1:
        raise UserError(f"{where}: ratio {ratio!r} is no share in [0, 1)")
    if importance not in IMPORTANCES:
        raise UserError(f"{where}: importance {importance!r}; choose one of {', '.join(IMPORTANCES)}")
    if scope not in SCOPES:
        raise UserError(f"{where}: scope {scope!r}; choose one of {', '.join(SCOPES)}")
    if known["schedule"] not in ("", *SCHEDULES):
        raise UserError(f"{where}: schedule {known['schedule']!r}; choose one of {', '.join(SCHEDULES)}")
    return Wish(ratio=float(ratio), importance=importance, scope=str(scope), schedule=str(known["schedule"]))


def _counts_channels(rule: Rule) -> bool:
    """Whether a rule of an op that acts after pruning is about the layer as pruning has left it."""
    if rule.op == "lowrank":
        return rule.settings.get("rank", 1.0) != 1.0
    if rule.op == "sparsify":
        return rule.settings.get("ratio", 0.0) != 0.0
    return rule.op not in ("prune", "block", "replace", "qat", "quantize", "store", "distill")


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
        self.fading: dict[Group, gradual.Part] = {}
        self.scores: dict[Group, Scores] = {}
        self.at_once: dict[str, str] = {}
        self.instead: dict[str, str] = {}
        layers = list(_layers(module, rule.site))
        if not layers:
            self.reasons.append("no convolution or linear layer is there")
        for layer in layers:
            try:
                found = coupling.at(layer)
            except Unprunable as refusal:
                self.reasons.append(str(refusal))
                continue
            for group in found:
                # a module's rule is about what begins in it: a residual stream that passes through has its own site
                if rule.site in (".", layer) or group.root.startswith(f"{rule.site}."):
                    self.groups += [group] if group not in self.groups else []
                else:
                    self.reasons.append(f"its channels begin at {group.root}, outside {rule.site}")

    def choose(self, module: nn.Module, multiple: int) -> None:
        """Rank units and keep the best."""
        found = {group: scores(module, group, self.wish.importance) for group in self.groups}
        self.scores = found
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

    def let_fade(self, usual: str, at_once: Sequence[str]) -> None:
        """Which groups go little by little: none that has a part at one of the sites where channels go at once."""
        if (self.wish.schedule or usual) != "gradual":
            return
        for group, kept in self.kept.items():
            layers = dict.fromkeys(member.place.layer for member in group.members)
            held = [site for site in at_once if any(f"{layer}.".startswith(f"{site}.") for layer in layers)]
            if held:
                self.at_once[group.root] = f"what is done to {held[0]} needs its channels settled"
                continue
            graded = self.wish.importance in GRADIENTS and not self.scores[group].instead
            values = tuple(self.scores[group].values.tolist()) if graded else ()
            self.fading[group] = gradual.Part(keep=len(kept), importance=self.wish.importance, scores=values)

    def cut_at_once(self, loud: Mapping[Group, str]) -> None:
        """What cannot be silent goes before training."""
        for group, why in loud.items():
            if self.fading.pop(group, None) is not None:
                self.at_once[group.root] = why

    def entry(self, plan: Plan) -> Entry | None:
        """The receipt's line for what is cut now; cuts follow those of the rules before. None if all is left open."""
        if not self.kept:
            return Entry(site=self.rule.site, status="skipped", why=self.reasons[0], asked=self.rule.settings)
        now = {group: kept for group, kept in self.kept.items() if group not in self.fading}
        if not now:
            return None
        facts = plan.facts(now)
        if instead := {root: why for root, why in self.instead.items() if root in {group.root for group in now}}:
            facts["importance"] = instead
        if self.at_once:
            facts["at_once"] = self.at_once
        return self._made(now, [group for group in self.groups if group not in self.fading], facts)

    def open_entry(self, plan: Plan) -> Entry | None:
        """The line for what goes in training, None if there is nothing; `plan` has cut all that goes before."""
        if not self.fading:
            return None
        facts = gradual.opened(sketch(plan, list(self.fading)), list(self.fading.values()))
        kept = {group: self.kept[group] for group in self.fading}
        return self._made(kept, list(self.fading), facts).model_copy(update={"status": "open"})

    def _made(self, kept: Mapping[Group, Sequence[int]], groups: Sequence[Group], facts: dict[str, Any]) -> Entry:
        before = sum(group.channels for group in groups)
        gone = sum(group.channels * (group.size - len(left)) // group.size for group, left in kept.items())
        achieved = {"ratio": gone / before, "kept": before - gone, "of": before}
        return Entry(site=self.rule.site, asked=self.rule.settings, achieved=achieved, facts=facts)


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
