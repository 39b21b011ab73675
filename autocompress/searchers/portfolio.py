"""Portfolio: several searchers share the trials, by what each of them lately added to the hypervolume per trial.

Which searcher is asked is a bandit's choice: the credit of a member is the area under the curve of its last gains, the
later the heavier, plus a bonus for those seldom asked (AUCBanditMetaTechnique of OpenTuner, Ansel et al. 2014, section
3.3). Gains fall by orders of magnitude during a search, so they are compared with the largest of the window, by their
square roots. Nobody starves: each is asked at least every so often. Every trial is told to all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autocompress import pareto
from autocompress.pareto import Score
from autocompress.registry import resolve
from autocompress.searchers import Searcher
from autocompress.searchers.outlook import WIDEST
from autocompress.surrogate import ceiling
from autocompress.types import Facts, Goal, Limit, Proposal, Space, State, Trial, UserError

MEMBERS = ("evolution", "policy_gradient", "gradient", "random")
DESIGNED = ("evolution", "policy_gradient", "gradient")  # take an option `design`


class Portfolio:
    """ask/tell. Options: `members`, the first of which also makes the `design` first asks;
    `options` of members by name; `floor`, the least share of the asks of each; `window` asks that credit looks back;
    `explore`, the bonus's weight; `agent`, an option of policy_gradient."""

    def __init__(
        self,
        space: Space,
        goals: Sequence[Goal],
        limit: Limit,
        facts: Facts,
        seed: int,
        *,
        members: Sequence[str] = MEMBERS,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        design: int = 10,
        floor: float = 0.02,
        window: int = 60,
        explore: float = 0.03,
        agent: str = "",
    ) -> None:
        names = tuple(members)
        if not names or len(set(names)) < len(names) or "portfolio" in names:
            raise UserError("portfolio: option members: names of different searchers, portfolio not among them")
        if design < 1 or window < 1 or explore < 0 or not 0 <= floor * len(names) < 1:
            raise UserError("portfolio: needs design and window >= 1, explore >= 0, and floor * members below 1")
        if strange := [name for name in options or {} if name not in names]:
            raise UserError(f"portfolio: option options: {strange[0]!r} is none of the members {', '.join(names)}")
        self.names, self.design, self.floor, self.window, self.explore = names, design, floor, window, explore
        self.members: dict[str, Searcher] = {}
        for name in names:
            own: dict[str, Any] = {"design": design if name == names[0] else 1} if name in DESIGNED else {}
            own |= {"agent": agent} if name == "policy_gradient" and agent else {}
            own |= (options or {}).get(name, {})
            try:
                self.members[name] = resolve("searcher", name)(space, goals, limit, facts, seed, **own)
            except TypeError as error:
                raise UserError(f"portfolio: option options: {name}: {error}") from error
        self.standings = [Standing(goal, limit, facts) for goal in goals]
        self.asked: list[tuple[int, str]] = []  # (number, member), in order
        self.numbers: set[int] = set()
        self.gains: dict[int, float] = {}
        self.running: dict[int, Trial] = {}  # asked for and not yet told: no member shall ask for these again
        for i, trial in enumerate(facts.warm):
            for standing in self.standings:
                standing.enter(-1 - i, trial)

    def ask(self, number: int, pending: Sequence[Trial]) -> Proposal | None:
        """What the member whose turn it is proposes; of the others if it has nothing left."""
        self.numbers.update(trial.number for trial in pending)
        self.running |= {trial.number: trial for trial in pending}
        running = tuple(self.running.values())
        designing = len(self.numbers - {0, number}) < self.design
        first = self.names[0] if designing else self._turn()
        for name in (first, *(other for other in self.names if other != first)):
            proposal = self.members[name].ask(number, running)
            if proposal is not None:
                self.numbers.add(number)
                if not designing:
                    self.asked.append((number, name))
                note = {"member": name, **proposal.note}
                self.running[number] = Trial(number=number, genotype=proposal.genotype, state=State.RUNNING, note=note)
                return proposal.model_copy(update={"note": note})
        return None

    def tell(self, trial: Trial) -> None:
        """Tell every member; a note only to whose it is."""
        self.numbers.add(trial.number)
        self.running.pop(trial.number, None)
        self.gains[trial.number] = sum(standing.enter(trial.number, trial) for standing in self.standings)
        own = {key: value for key, value in trial.note.items() if key != "member"}
        for name, member in self.members.items():
            mine = trial.note.get("member") == name
            member.tell(trial.model_copy(update={"note": own if mine else {}}))

    def save(self, folder: Path) -> None:
        """Write the agent of policy_gradient, if it is a member."""
        for member in self.members.values():
            if (save := getattr(member, "save", None)) is not None:
                save(folder)

    def _turn(self) -> str:
        """Whoever was not asked for too long, else the highest credit and bonus."""
        names = [name for _, name in self.asked]
        every = math.ceil(1.0 / self.floor) if self.floor else len(names) + 1
        last = {name: max((i for i, n in enumerate(names) if n == name), default=-1) for name in self.names}
        waiting = min(self.names, key=lambda name: last[name])
        if last[waiting] < 0 or len(names) - last[waiting] >= every:
            return waiting
        recent = self.asked[-self.window :]
        most = max((self.gains.get(number, 0.0) for number, _ in recent), default=0.0)
        credit: dict[str, float] = {}
        for name in self.names:
            uses = [self.gains.get(number, 0.0) for number, n in recent if n == name]
            weights = range(1, len(uses) + 1)
            earned = sum(w * math.sqrt(gain / most) for w, gain in zip(weights, uses, strict=True)) if most > 0 else 0.0
            bonus = math.sqrt(2.0 * math.log(max(2, len(recent))) / max(1, len(uses)))
            credit[name] = earned / max(1, sum(weights)) + self.explore * bonus
        return max(self.names, key=lambda name: credit[name])


class Standing:
    """The best told so far for one goal, and by how much each trial bettered it."""

    def __init__(self, goal: Goal, limit: Limit, facts: Facts) -> None:
        bounds = [ceiling(budget, facts.baseline.get(budget.profile)) or WIDEST for budget in goal.budgets]
        self.goal, self.limit = goal, limit
        # The budgets' geometric mean: where latency, a mean over devices too, cannot be better without one being worse.
        self.reference = (limit.floor, math.exp(sum(map(math.log, bounds)) / max(1, len(bounds))))
        self.scores: dict[int, Score] = {}

    def enter(self, number: int, trial: Trial) -> float:
        """Share by which the hypervolume grows; before anything is feasible, that by which the violation falls."""
        self.scores.pop(number, None)
        score = pareto.of(trial, self.goal, self.limit)
        if score is None:
            return 0.0
        before, least = self._volume(), min((s.violation for s in self.scores.values()), default=math.inf)
        self.scores[number] = score
        if least > 0 and score.violation > 0:
            return 0.0 if score.violation >= least or not math.isfinite(least) else 1.0 - score.violation / least
        after = self._volume()
        return (after - before) / after if after > 0 else 0.0

    def _volume(self) -> float:
        points = [(s.quality, s.latency) for s in self.scores.values() if s.violation <= 0]
        return pareto.hypervolume(points, self.reference)
