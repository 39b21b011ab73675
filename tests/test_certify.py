"""Certificates: what the intervals allow to be said, and in which order finalists are tried."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.certify import Certificate, bounds, certify, choose, judge, miss, pool
from autocompress.types import Budget, Goal, Interval, Limit, Quality, Reading

LIMIT = Limit(metric="accuracy", floor=0.97)


def interval(value: float, share: float = 0.01) -> Interval:
    return Interval(value=value, low=value * (1 - share), high=value * (1 + share))


def reading(ratio: float = 0.25, *, profile: str = "a", share: float = 0.01, noisy: bool = False, host: str = "h1"):
    return Reading(
        profile=profile,
        ms=interval(ratio, share),
        p95_ms=interval(ratio * 1.2),
        baseline_ms=interval(1.0, share),
        ratio=interval(ratio, share),
        samples=100,
        rounds=5,
        noisy=noisy,
        fingerprint=host,
    )


def quality(value: float = 0.98) -> Quality:
    return Quality(metric="accuracy", split="selection", value=interval(value), samples=360)


def goal(*budgets: Budget) -> Goal:
    return Goal(name="a", budgets=budgets or (Budget(profile="a", speedup=3),))


def test_a_speedup_is_met_by_its_lower_bound_only():
    assert reading(0.332).speedup > 3  # by its point estimate, which is not what is promised
    assert bounds(Budget(profile="a", speedup=3), reading(0.332), 1.0)[0].met is False
    assert bounds(Budget(profile="a", speedup=3), reading(0.32), 1.0)[0].met is True
    (bound,) = bounds(Budget(profile="a", latency_ms=0.25), reading(0.25), 1.0)
    assert not bound.met
    assert bound.measured == 0.25
    assert bound.bound == pytest.approx(0.2525)


def test_an_unknown_size_does_not_meet_a_size_budget():
    (bound,) = bounds(Budget(profile="a", size_mb=1), reading(), None)
    assert not bound.met
    assert bound.bound is None
    unknown = judge(goal(Budget(profile="a", size_mb=1)), {"a": reading()}, quality={}, size_mb={}, limit=LIMIT)
    assert "size unknown, budget 1 MB" in unknown.reason
    assert Certificate.model_validate_json(unknown.model_dump_json()) == unknown


def test_certified_without_a_reason_and_refused_with_every_reason():
    good = judge(goal(), {"a": reading()}, quality={"a": quality()}, size_mb={"a": 0.1}, limit=LIMIT)
    assert good.certified
    assert good.reason == ""
    assert good.budget_met
    assert good.quality_held
    assert miss(good) == 0
    bad = judge(
        goal(Budget(profile="a", speedup=5, size_mb=0.05)),
        {"a": reading(noisy=True)},
        quality={"a": quality(0.9)},
        size_mb={"a": 0.1},
        limit=LIMIT,
    )
    assert not bad.certified
    assert not bad.budget_met
    assert not bad.quality_held
    assert "\n" not in bad.reason
    for words in ("3.96x (lower bound) of the 5x asked", "0.100 MB", "below the floor 0.9700", "stayed noisy"):
        assert words in bad.reason


def test_a_missing_device_or_quality_certifies_nothing():
    found = judge(goal(), {}, quality={}, size_mb={}, limit=LIMIT)
    assert not found.certified
    assert not found.budget_met
    assert not found.quality_held
    assert "a was not measured" in found.reason
    assert "accuracy on a is unknown" in found.reason
    assert math.isinf(miss(found)) or miss(found) > 0


def test_sessions_that_agree_pool_to_a_narrower_interval_and_quarrelling_ones_to_a_wider():
    agreeing = pool([reading(0.25), reading(0.25), reading(0.25)])
    assert agreeing.ratio.value == pytest.approx(0.25)
    assert agreeing.ratio.high - agreeing.ratio.low < reading(0.25).ratio.high - reading(0.25).ratio.low
    assert agreeing.samples == 300
    assert agreeing.rounds == 15
    quarrel = pool([reading(0.20), reading(0.25), reading(0.30)])
    assert quarrel.ratio.low < 0.20
    assert quarrel.ratio.high > 0.30


def test_pooled_intervals_cover_the_truth():
    rng = random.Random(7)
    covered = 0
    for _ in range(400):
        shown = [reading(0.25 * math.exp(rng.gauss(0, 0.03)), share=0.01) for _ in range(3)]
        found = pool(shown).ratio
        covered += found.low <= 0.25 <= found.high
    assert covered / 400 > 0.92


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.floats(0, 0.5))
def test_pooling_keeps_the_value_inside_its_interval(ratios: list[float], share: float):
    found = pool([reading(ratio, share=share) for ratio in ratios])
    assert found.ratio.low <= found.ratio.value * (1 + 1e-9)
    assert found.ratio.value <= found.ratio.high * (1 + 1e-9)
    assert min(ratios) * (1 - 1e-9) <= found.ratio.value <= max(ratios) * (1 + 1e-9)
    assert found.p95_ms == interval(max(ratios) * 1.2)


def test_a_device_taken_as_it_is_stands_in_the_pooled_reading():
    assert not pool([reading(), reading()]).as_is
    assert pool([reading(), reading().model_copy(update={"as_is": True})]).as_is


def test_pool_refuses_nothing_and_other_devices():
    with pytest.raises(ValueError, match="no readings"):
        pool([])
    with pytest.raises(ValueError, match="different profiles"):
        pool([reading(), reading(profile="b")])


def test_two_hosts_are_never_one_certificate():
    mixed = pool([reading(host="h1"), reading(host="h2")])
    found = judge(goal(), {"a": mixed}, quality={"a": quality()}, size_mb={}, limit=LIMIT)
    assert not found.certified
    assert "different hosts" in found.reason


def test_certify_takes_turns_and_repeats_a_noisy_session_once():
    asked: list[str] = []
    noisy_left = {"b": 1}

    def measure(profile: str) -> Reading:
        asked.append(profile)
        noisy = noisy_left.get(profile, 0) > 0
        noisy_left[profile] = noisy_left.get(profile, 0) - 1
        return reading(profile=profile, noisy=noisy)

    both = Goal(name="all-devices", budgets=(Budget(profile="a", speedup=3), Budget(profile="b", speedup=3)))
    found = certify(measure, both, quality={"a": quality(), "b": quality()}, size_mb={}, limit=LIMIT, sessions=2)
    assert asked == ["a", "b", "b", "a", "b"]
    assert found.certified
    assert found.sessions == {"a": 2, "b": 2}
    assert found.readings["a"].samples == 200
    with pytest.raises(ValueError, match="at least one"):
        certify(measure, both, quality={}, size_mb={}, limit=LIMIT, sessions=0)


def test_the_first_that_passes_wins_and_later_ones_are_not_measured():
    ratios = {"x": 0.5, "y": 0.25, "z": 0.2}
    tried: list[str] = []

    def one(name: str) -> Certificate:
        tried.append(name)
        return judge(goal(), {"a": reading(ratios[name])}, quality={"a": quality()}, size_mb={}, limit=LIMIT)

    found = choose(["x", "y", "z"], one)
    assert found is not None
    assert found.winner == "y"
    assert tried == ["x", "y"]
    assert found.certificate.certified
    assert [name for name, _ in found.tried] == ["x", "y"]


def test_without_a_certified_finalist_the_closest_is_named():
    ratios = {"x": 0.5, "y": 0.34, "z": 0.4}
    found = choose(
        list(ratios),
        lambda name: judge(goal(), {"a": reading(ratios[name])}, quality={"a": quality()}, size_mb={}, limit=LIMIT),
    )
    assert found is not None
    assert found.winner == "y"
    assert not found.certificate.certified
    assert len(found.tried) == 3
    assert choose([], lambda name: pytest.fail("nothing to certify")) is None


def test_a_certificate_survives_json():
    found = judge(goal(), {"a": reading()}, quality={"a": quality()}, size_mb={"a": 0.1}, limit=LIMIT)
    assert Certificate.model_validate_json(found.model_dump_json()) == found
    assert statistics.fmean([found.readings["a"].ratio.value]) == 0.25


def test_every_kind_of_budget_is_judged_by_its_worse_end() -> None:
    found = reading(0.5, share=0.1).model_copy(
        update={"ms": interval(2.0, 0.1), "p95_ms": interval(3.0, 0.1), "batch": 4, "memory_mb": 40.0}
    )
    asked = Budget(profile="a", latency_ms=2.1, p95_ms=3.4, speedup=1.7, throughput=1900, size_mb=1, memory_mb=64)
    by_name = {bound.name: bound for bound in bounds(asked, found, 1.5)}
    assert set(by_name) == {"latency_ms", "p95_ms", "speedup", "throughput", "size_mb", "memory_mb"}
    assert [name for name, bound in by_name.items() if not bound.met] == ["latency_ms", "throughput", "size_mb"]
    assert by_name["throughput"].bound == pytest.approx(4 / 2.2e-3)
    assert by_name["latency_ms"].bound == pytest.approx(2.2)
    assert not bounds(Budget(profile="a", memory_mb=64), reading(), None)[0].met  # not known is not held
    said = judge(Goal(name="a", budgets=(asked,)), {"a": found}, quality={}, size_mb={"a": 1.5}, limit=LIMIT).reason
    assert "samples/s (lower bound) of the 1900 asked" in said
