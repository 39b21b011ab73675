"""Successive halving: compared with a slow and plain reading of the rule."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress import pareto, rungs
from autocompress.types import Budget, Fidelity, Goal, Interval, Limit, Outcome, Quality, Reading, State, Trial

LIMIT = Limit(metric="accuracy", floor=0.5)
BUDGETS = (Budget(profile="a", speedup=2.0), Budget(profile="b", speedup=2.0))


def outcome(a: float, b: float, quality: float | None) -> Outcome:
    def reading(profile: str, ratio: float) -> Reading:
        one = Interval(value=ratio, low=ratio, high=ratio)
        base = Interval(value=1.0, low=1.0, high=1.0)
        return Reading(profile=profile, ms=one, p95_ms=one, baseline_ms=base, ratio=one, samples=9, rounds=3)

    found = {}
    if quality is not None:
        value = Interval(value=quality, low=quality, high=quality)
        found = {name: Quality(metric="accuracy", split="selection", value=value, samples=9) for name in ("a", "b")}
    return Outcome(fidelity=0.3, readings={"a": reading("a", a), "b": reading("b", b)}, quality=found)


grid = st.sampled_from([0.2, 0.3, 0.45, 0.6, 0.9])
outcomes = st.one_of(st.builds(outcome, grid, grid, st.one_of(st.none(), grid)), st.just(Outcome()))


def plain_order(records: list[Trial], goals: tuple[Goal, ...]) -> list[int]:
    """Numbers from best to worst, by the words of the module's docstring."""
    per_goal = []
    for goal in goals:
        scores = {
            t.number: pareto.score(t.outcome, goal, LIMIT) or pareto.Score(-math.inf, math.inf, math.inf)
            for t in records
        }
        above = {n: sum(pareto.dominates(other, s) for other in scores.values()) for n, s in scores.items()}
        per_goal.append(sorted(scores, key=lambda n: (above[n], -scores[n].quality, scores[n].latency, n)))
    merged = [number for turn in zip(*per_goal, strict=True) for number in turn]
    return list(dict.fromkeys(merged))


@settings(max_examples=120, deadline=None)
@given(st.lists(outcomes, min_size=1, max_size=90), st.sampled_from([0.25, 0.34, 0.5, 1.0]), st.booleans())
def test_the_ladder_follows_the_plain_rule(found: list[Outcome], keep: float, both: bool) -> None:
    goals = pareto.goals(BUDGETS if both else BUDGETS[:1])
    fidelity = Fidelity(rungs=(0.3, 1.0), keep=keep)
    ladder = rungs.Ladder(fidelity, goals, LIMIT)
    records: list[Trial] = []
    waiting: set[int] = set()
    for number, one in enumerate(found, start=1):
        records.append(Trial(number=number, genotype=(0,), state=State.RUNG, rung=0, outcome=one))
        ladder.reach(number, 0, one)
        top = plain_order(records, goals)[: max(1, int(len(records) * keep + 1e-9))]
        assert ladder.goes_on(number, 0) == (number in top)
        assert rungs.goes_on(records, records[-1], 0, fidelity, goals, LIMIT) == (number in top)
        if number not in top:
            waiting.add(number)
            ladder.wait(number, 0)
            records[-1] = records[-1].model_copy(update={"state": State.STOPPED})
        expected = next((n for n in top if n in waiting), None)
        assert ladder.promotable() == expected
        assert ladder.promotable() == expected
        pure = rungs.promotable(records, fidelity, goals, LIMIT)
        assert (pure.number if pure else None) == expected
        if expected is not None:
            waiting.discard(expected)
            ladder.leave(expected, 0)
            records[expected - 1] = records[expected - 1].model_copy(update={"state": State.RUNNING})


@settings(max_examples=60, deadline=None)
@given(st.lists(outcomes, min_size=1, max_size=40), st.sampled_from([0.25, 0.5]))
def test_when_all_is_promoted_the_best_share_has_gone_on(found: list[Outcome], keep: float) -> None:
    goals = pareto.goals(BUDGETS)
    ladder = rungs.Ladder(Fidelity(rungs=(0.3, 1.0), keep=keep), goals, LIMIT)
    gone: set[int] = set()
    for number, one in enumerate(found):
        ladder.reach(number, 0, one)
        if ladder.goes_on(number, 0):
            gone.add(number)
        else:
            ladder.wait(number, 0)
    while (number := ladder.promotable()) is not None:
        ladder.leave(number, 0)
        gone.add(number)
    records = [Trial(number=n, genotype=(0,), state=State.RUNG, rung=0, outcome=o) for n, o in enumerate(found)]
    assert set(plain_order(records, goals)[: max(1, int(len(found) * keep + 1e-9))]) <= gone


def test_three_rungs_promote_the_highest_first() -> None:
    ladder = rungs.Ladder(Fidelity(rungs=(0.1, 0.3, 1.0), keep=0.5), pareto.goals(BUDGETS), LIMIT)
    for rung in (0, 1):
        for number, quality in ((1, 0.9), (2, 0.6)):
            ladder.reach(number + 10 * rung, rung, outcome(0.3, 0.3, quality))
            ladder.wait(number + 10 * rung, rung)
    assert ladder.promotable() == 11
    ladder.leave(11, 1)
    assert ladder.promotable() == 1
    ladder.leave(1, 0)
    assert ladder.promotable() is None
    assert not ladder.goes_on(11, 2)  # nothing comes after the last rung


def test_the_best_on_each_device_goes_on() -> None:
    """Good on a and hopeless on b, and the other way round: both keep their place."""
    goals = pareto.goals(BUDGETS)
    ladder = rungs.Ladder(Fidelity(rungs=(0.3, 1.0), keep=0.5), goals, LIMIT)
    for number, (a, b) in enumerate([(0.2, 0.9), (0.9, 0.2), (0.6, 0.6), (0.9, 0.9), (0.9, 0.6), (0.6, 0.9)]):
        ladder.reach(number, 0, outcome(a, b, 0.9))
    assert [ladder.goes_on(number, 0) for number in range(6)] == [True, True, True, False, False, False]


def test_one_rung_leaves_nothing_to_decide() -> None:
    ladder = rungs.Ladder(Fidelity(rungs=(1.0,), keep=0.5), pareto.goals(BUDGETS), LIMIT)
    ladder.reach(1, 0, outcome(0.3, 0.3, 0.9))
    assert ladder.promotable() is None
