from autocompress import finals, pareto
from autocompress.certify import spare
from autocompress.finals import FINALISTS
from autocompress.types import Budget, Goal, Interval, Limit, Outcome, Quality, Reading, State, Trial

GOAL = Goal(name="a", budgets=(Budget(profile="a", speedup=3),))
LIMIT = Limit(metric="accuracy", floor=0.9)


def trial(number: int, quality: float, speedup: float, state: State = State.DONE) -> Trial:
    ratio = 1 / speedup
    spread = Interval(value=ratio, low=ratio, high=ratio)
    reading = Reading(profile="a", ms=spread, p95_ms=spread, baseline_ms=spread, ratio=spread, samples=9, rounds=3)
    value = Interval(value=quality, low=quality, high=quality)
    found = Quality(metric="accuracy", split="selection", value=value, samples=9)
    outcome = Outcome(readings={"a": reading}, quality={"a": found}, files={"receipts": "x"}, size_mb={"a": 1.0})
    return Trial(number=number, genotype=(number,), state=state, outcome=outcome)


def finalists(*trials: Trial) -> list[int]:
    return [one.number for one in finals.finalists(trials, GOAL, LIMIT)]


def test_room_is_the_share_of_the_budget_that_is_left() -> None:
    assert abs(spare(trial(1, 0.99, 3.3).outcome, GOAL) - 0.1) < 1e-9
    assert spare(trial(1, 0.99, 2.7).outcome, GOAL) < 0
    sized = Goal(name="a", budgets=(Budget(profile="a", speedup=3, size_mb=1.25),))
    assert abs(spare(trial(1, 0.99, 6).outcome, sized) - 0.2) < 1e-9


def test_the_last_finalist_has_room_where_the_best_stand_at_the_edge() -> None:
    edge = [trial(n, 0.99 - n / 1000, 3.01) for n in range(1, 5)]
    assert finalists(*edge, trial(9, 0.95, 4)) == [1, 2, 9]
    assert finalists(*edge) == [1, 2, 3]
    assert finalists(trial(1, 0.95, 4)) == [1]
    assert len(finalists(*edge, *[trial(n, 0.96, 4) for n in range(10, 20)])) == FINALISTS


def test_stopped_trials_are_no_finalists_and_the_closest_are_where_none_is_feasible() -> None:
    assert finalists(trial(1, 0.99, 4, State.STOPPED), trial(2, 0.95, 4)) == [2]
    slow = [trial(n, 0.99, 2 + n / 10) for n in range(5)]
    assert finalists(*slow)[0] == 4
    assert pareto.best(slow, GOAL, LIMIT, 1)[0].number == 4
