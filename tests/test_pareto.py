"""Properties of scores, domination, fronts and hypervolume."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress import pareto
from autocompress.pareto import Score
from autocompress.types import Budget, Interval, Limit, Outcome, Quality, Reading, State, Trial

LIMIT = Limit(metric="accuracy", floor=0.9)
GRID = st.integers(0, 4).map(lambda i: i / 4)
SCORES = st.builds(Score, GRID, GRID, st.sampled_from([0.0, 0.0, 0.1, 0.5])) | st.builds(
    Score, st.just(-math.inf), GRID, st.sampled_from([0.1, 1.0])
)


def reading(profile: str, ratio: float, width: float = 0.0) -> Reading:
    def interval(value: float) -> Interval:
        return Interval(value=value, low=value * (1 - width), high=value * (1 + width))

    return Reading(
        profile=profile, ms=interval(10 * ratio), p95_ms=interval(11 * ratio), baseline_ms=interval(10.0),
        ratio=interval(ratio), samples=100, rounds=3,
    )  # fmt: skip


def quality(value: float) -> Quality:
    return Quality(
        metric="accuracy", split="selection", value=Interval(value=value, low=value, high=value), samples=100
    )


def outcome(ratios: dict[str, float], qualities: dict[str, float] | float | None = None, **more) -> Outcome:
    if isinstance(qualities, float):
        qualities = dict.fromkeys(ratios, qualities)
    return Outcome(
        readings={name: reading(name, ratio) for name, ratio in ratios.items()},
        quality={name: quality(value) for name, value in (qualities or {}).items()},
        **more,
    )


def trial(number: int, found: Outcome, state: State = State.DONE) -> Trial:
    return Trial(number=number, genotype=(number,), state=state, outcome=found)


@given(SCORES, SCORES, SCORES)
def test_domination_is_a_strict_partial_order(a, b, c):
    assert not pareto.dominates(a, a)
    assert not (pareto.dominates(a, b) and pareto.dominates(b, a))
    if pareto.dominates(a, b) and pareto.dominates(b, c):
        assert pareto.dominates(a, c)


@given(st.lists(SCORES, max_size=12))
def test_sort_peels_fronts_as_the_definition_says(scores):
    left = list(range(len(scores)))
    for front in pareto.sort(scores):
        expected = [i for i in left if not any(pareto.dominates(scores[j], scores[i]) for j in left)]
        assert sorted(front) == expected
        left = [i for i in left if i not in front]
    assert not left


@given(st.lists(SCORES, min_size=1, max_size=12))
def test_crowding_keeps_the_ends(scores):
    for front in pareto.sort(scores):
        distances = dict(zip(front, pareto.crowding(scores, front), strict=True))
        assert all(d >= 0 for d in distances.values())
        for key in ("quality", "latency"):
            values = [getattr(scores[i], key) for i in front]
            for extreme in (min(values), max(values)):
                assert any(distances[i] == math.inf for i in front if getattr(scores[i], key) == extreme)


POINTS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 2)), max_size=8)


@given(POINTS, st.tuples(st.floats(0, 1), st.floats(0, 2)))
def test_hypervolume_is_monotone_and_bounded(points, more):
    reference = (0.2, 1.5)
    before = pareto.hypervolume(points, reference)
    after = pareto.hypervolume([*points, more], reference)
    assert 0.0 <= before <= after + 1e-12
    assert after <= 0.8 * 1.5 + 1e-12


@given(POINTS, st.integers(0, 7), st.floats(0, 1), st.floats(0, 1))
def test_hypervolume_rises_when_a_point_gets_better(points, which, up, down):
    if points:
        at = which % len(points)
        better = list(points)
        better[at] = (min(1.0, points[at][0] + up), points[at][1] * down)
        assert pareto.hypervolume(better, (0.2, 1.5)) >= pareto.hypervolume(points, (0.2, 1.5)) - 1e-12


def test_hypervolume_of_two_points():
    assert pareto.hypervolume([(0.9, 0.5), (0.95, 0.7)], (0.8, 1.0)) == pytest.approx(0.05 + 0.05 * 0.3)
    assert pareto.hypervolume([], (0.8, 1.0)) == 0.0


def test_goals_are_the_devices_and_all_of_them():
    a, b = Budget(profile="a", speedup=2), Budget(profile="b", latency_ms=3)
    assert [goal.name for goal in pareto.goals([a])] == ["a"]
    assert [goal.name for goal in pareto.goals([a, b])] == ["a", "b", "all-devices"]
    assert pareto.goals([a, b])[2].budgets == (a, b)


def test_bounds_are_judged_by_the_upper_confidence_bound():
    budget = Budget(profile="a", latency_ms=5.0, speedup=2.0, size_mb=1.0)
    assert pareto.meets(reading("a", 0.5), budget, 1.0) == {"latency_ms": True, "speedup": True, "size_mb": True}
    assert pareto.meets(reading("a", 0.5, 0.01), budget, 1.1) == {
        "latency_ms": False, "speedup": False, "size_mb": False,
    }  # fmt: skip
    assert pareto.meets(reading("a", 0.4), budget, None)["size_mb"] is False


def test_violation_is_summed_over_devices_and_quality_is_the_lowest():
    a, b = Budget(profile="a", speedup=2), Budget(profile="b", speedup=4)
    goal_a, goal_b, both = pareto.goals([a, b])
    found = outcome({"a": 0.5, "b": 0.5}, {"a": 0.95, "b": 0.81})
    assert pareto.score(found, goal_a, LIMIT) == Score(0.95, pytest.approx(0.5), 0.0)
    at_b = pareto.score(found, goal_b, LIMIT)
    assert at_b
    assert at_b.violation == pytest.approx(1.0 + 0.1)
    together = pareto.score(outcome({"a": 0.8, "b": 0.2}, {"a": 0.95, "b": 0.81}), both, LIMIT)
    assert together == Score(0.81, pytest.approx(0.4), pytest.approx(0.6 + 0.1))


def test_what_was_not_measured_has_no_score_and_what_was_not_trained_ranks_by_violation():
    goal = pareto.goals([Budget(profile="a", speedup=2)])[0]
    assert pareto.score(Outcome(), goal, LIMIT) is None
    assert pareto.of(trial(1, outcome({"a": 0.4}, 0.95), State.FAILED), goal, LIMIT) is None
    near, far = (pareto.score(outcome({"a": ratio}), goal, LIMIT) for ratio in (0.6, 0.9))
    assert near
    assert far
    assert near.quality == -math.inf
    assert 0 < near.violation < far.violation
    assert pareto.dominates(near, far)
    untrained = pareto.score(outcome({"a": 0.4}), goal, LIMIT)
    assert untrained
    assert untrained.violation == 1.0
    nan = pareto.score(outcome({"a": 0.4}, math.nan), goal, LIMIT)
    assert nan
    assert nan.violation > 0
    assert nan.quality == -math.inf


def test_over_every_budget():
    budgets = [Budget(profile="a", speedup=2), Budget(profile="b", speedup=4)]
    over = {"a": reading("a", 0.6), "b": reading("b", 0.6)}
    assert pareto.over_every_budget(over, budgets)
    assert not pareto.over_every_budget({**over, "a": reading("a", 0.5)}, budgets)
    assert not pareto.over_every_budget({"a": over["a"]}, budgets)
    assert not pareto.over_every_budget(over, [])
    small = [Budget(profile="a", size_mb=1.0)]
    assert not pareto.over_every_budget(over, small)
    assert pareto.over_every_budget(over, small, {"a": 1.2})
    assert not pareto.over_every_budget(over, [Budget(profile="a", size_mb=1.0)], {"a": 0.8})


def test_front_is_the_trade_off_and_best_are_the_finalists():
    goal = pareto.goals([Budget(profile="a", speedup=2)])[0]
    trials = [
        trial(0, outcome({"a": 1.0}, 0.99)),
        trial(1, outcome({"a": 0.5}, 0.95)),
        trial(2, outcome({"a": 0.3}, 0.95)),
        trial(3, outcome({"a": 0.2}, 0.5)),
        trial(4, outcome({"a": 0.4}, 0.97)),
        trial(5, outcome({"a": 0.1}, 0.99), State.STOPPED),
        trial(6, outcome({"a": 0.1}, 0.99), State.FAILED),
        trial(7, outcome({"a": 0.8}), State.INFEASIBLE),
        Trial(number=8, genotype=(2,), state=State.DONE, outcome=outcome({"a": 0.31}, 0.95)),
    ]
    assert [t.number for t in pareto.front(trials, goal, LIMIT)] == [3, 2, 4, 0]
    assert [t.number for t in pareto.best(trials, goal, LIMIT, 3)] == [4, 2, 1]
    closest = pareto.best([trials[0], trials[7], trials[3]], goal, LIMIT, 2)
    assert [t.number for t in closest] == [3, 7]
    assert pareto.best([], goal, LIMIT, 3) == ()
    assert pareto.front([], goal, LIMIT) == ()
