"""Op `cascade`: a smaller copy of the network answers first; where it is not sure, the network itself does.

A cascade of two networks (big/little, Park et al. 2015; IDK cascades, Wang et al. 2017) in one file. The copy has the
same layers without some of its blocks, learns from the network's answers, and gives way below a confidence that op
`route` tunes. Where many blocks of a network do little, two networks cost less than one with exits: easy inputs never
meet the deep one, and what is hard loses nothing.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from autocompress.models import routing
from autocompress.ops.block import Block
from autocompress.ops.route import Routed, fixed, look, unfit, ungated
from autocompress.space import spaced
from autocompress.tasks import Task
from autocompress.types import Entry, Profile, Receipt, Record, Rule, UserError

WEIGHT = 2.0
"""Of what the copy learns, which is all that is learned where the network rests."""


class Smaller(Record):
    """A copy as it was decided."""

    type: str  # of the network, so that a receipt for another one is noticed
    outputs: int
    confidence: routing.Confidence
    dropped: tuple[dict[str, Any], ...]  # blocks, as op `block` notes them


class Cascade(Routed):
    """A smaller copy of the whole network before it: `keep` is the share of its blocks that it has, 1 for no copy.

    `confidence` is softmax, entropy or learned. The site is ".".
    """

    name = "cascade"
    fact = "little"

    def __init__(self) -> None:
        self.params = {"keep": 1.0, "confidence": "softmax"}

    def check(self, rule: Rule) -> None:
        """Raise UserError for settings that are unknown or out of range; reads nothing but the rule."""
        if rule.site != ".":
            raise UserError(f"cascade at site {rule.site}: the copy is of the whole network, give it site '.'")
        for key, value in rule.settings.items():
            if key not in self.params:
                raise UserError(f"cascade: unknown setting {key!r}; known are keep and confidence")
            if key == "confidence" and value not in routing.CONFIDENCES:
                raise UserError(f"cascade: confidence {value!r}; choose one of {', '.join(routing.CONFIDENCES)}")
            if key == "keep" and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1):
                raise UserError(f"cascade: keep {value!r} is not above 0 and at most 1")

    def decide(
        self,
        subject: nn.Module,
        rules: Sequence[Rule],
        task: Task,
        profile: Profile,
        tensors: dict[str, Tensor] | None = None,  # noqa: ARG002  its weights are the network's own
    ) -> Receipt:
        """Which blocks the copy does without, evenly over every stage.

        Raises UserError for settings that are unknown, TrialFailure where the network does not run.
        """
        for rule in rules:
            self.check(rule)
        asked = [rule for rule in rules if float(rule.settings.get("keep", 1.0)) < 1]
        if not asked:
            return Receipt(op=self.name)
        rule = asked[-1]
        if routing.exits(subject) or routing.gates(subject):
            why = "the network has exits or gates already"
            return Receipt(op=self.name, entries=(Entry(site=".", status="skipped", why=why, asked=rule.settings),))
        names = [name for name, part in subject.named_modules() if name and next(part.children(), None) is not None]
        calls, answer = look(subject, names, task, self.name)
        able = [name for name in names if not (unfit(subject, name, calls) or ungated(calls[name]))]
        able = outermost(subject, able)
        gone = thinned(able, [name for name in names if calls[name]], float(rule.settings["keep"]))
        why = ""
        if answer.dim() != 2 or answer.shape[1] < 2:
            why = f"the network answers with shape {tuple(answer.shape[1:])}: it needs one score for each class"
        elif not gone:
            why = "it has no repeated blocks that can be left out"
        if why:
            return Receipt(op=self.name, entries=(Entry(site=".", status="skipped", why=why, asked=rule.settings),))
        drops = [Rule(site=name, op="block", settings={"kind": "drop"}) for name in gone]
        dropped = Block().decide(subject, drops, task, profile, None)
        smaller = Smaller(
            type=type(subject).__name__,
            outputs=answer.shape[1],
            confidence=rule.settings.get("confidence", "softmax"),  # pyright: ignore[reportArgumentType]
            dropped=tuple(entry.facts["change"] for entry in dropped.entries if "change" in entry.facts),
        )
        facts = {self.fact: smaller.model_dump(mode="json")}
        achieved = {"dropped": float(len(smaller.dropped))}
        entry = Entry(site=".", status="open", asked=rule.settings, achieved=achieved, facts=facts)
        return Receipt(op=self.name, entries=(entry,))

    def hang(self, subject: nn.Module, site: str, decided: Any) -> None:  # noqa: ARG002  there is one site
        """A copy of the network as it is now, without some blocks."""
        smaller = Smaller.model_validate(decided)
        entries = tuple(Entry(site=str(one["block"]), facts={"change": one}) for one in smaller.dropped)
        net = Block().enact(copy.deepcopy(subject), Receipt(op="block", entries=entries))
        with fixed(0):
            part = routing.Exit(0, smaller.outputs, 0, smaller.confidence, 0)
        routing.hang_little(subject, net, part)

    def penalty(self, module: nn.Module, receipt: Receipt) -> Tensor | None:  # noqa: ARG002
        """The copy learns what the network says."""
        found = routing.lesson(module)
        return None if found is None else WEIGHT * found


def outermost(subject: nn.Module, able: Sequence[str]) -> list[str]:
    """Of these blocks the repeated ones: siblings of one class, not containers, and none that lie inside of others."""
    kinds = {name: (name.rpartition(".")[0], type(subject.get_submodule(name))) for name in able}
    often = Counter(kinds.values())
    found = [name for name in able if often[kinds[name]] > 1 and kinds[name][1] is not nn.Sequential]
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def thinned(able: Sequence[str], called: Sequence[str], keep: float) -> list[str]:
    """Blocks to leave out so that about the share `keep` of each stage stays, evenly spaced.

    A stage is what lies side by side in one container, of which only some, `able`, can go.
    """
    stages: dict[str, list[str]] = {}
    for name in able:
        stages.setdefault(name.rpartition(".")[0], []).append(name)
    found: list[str] = []
    for path, members in stages.items():
        every = [name for name in called if name.rpartition(".")[0] == path]
        many = min(len(members), round((1 - keep) * len(every)))
        found += [members[place] for place in spaced(len(members), many)]
    return found
