"""What a short training says of a long one."""

import numpy as np
import pytest

from autocompress import ranks
from tests.test_controller import closed_outcome


def made(count: int, slope: float, seed: int = 0) -> list[tuple[float, float, float]]:
    """Pairs whose gain depends on the latency: slow networks gain more."""
    rng = np.random.default_rng(seed)
    latency = np.exp(rng.uniform(-2.5, -0.5, count))
    low = rng.uniform(0.6, 0.7, count)
    high = low + 0.2 + slope * np.log(latency) + rng.normal(0, 0.003, count)
    return list(zip(low.tolist(), high.tolist(), latency.tolist(), strict=True))


def test_what_larger_networks_gain_is_learned():
    found = ranks.correction(made(30, 0.05))
    assert found is not None
    assert found.agreement.rank < 0.8
    assert found.agreement.corrected > 0.97
    for low, high, latency in made(20, 0.05, seed=1):
        assert found(low, latency) == pytest.approx(high, abs=0.02)


def test_where_the_order_is_right_already_all_gain_the_same():
    pairs = [(0.5 + 0.01 * i, 0.7 + 0.01 * i, 0.2) for i in range(12)]
    found = ranks.correction(pairs)
    assert found is not None
    assert found.agreement.rank == found.agreement.corrected == 1.0
    assert found.slopes == (0.0, 0.0)
    assert found(0.55, 0.9) == pytest.approx(0.75)
    few = ranks.correction(made(4, 0.05))
    assert few is not None
    assert few.slopes == (0.0, 0.0)
    assert ranks.correction([]) is None


def test_corrections_lead_from_rung_to_rung():
    low, middle, high = (
        {n: closed_outcome(0.2, 0.5 + 0.01 * n + gain, fidelity) for n in numbers}
        for gain, fidelity, numbers in ((0.0, 0.1, range(1, 9)), (0.2, 0.5, range(3, 9)), (0.3, 1.0, range(6, 9)))
    )
    steps = ranks.corrections((low, middle, high))
    told = [step.agreement for step in steps]
    assert [(one.low, one.high, one.trials) for one in told] == [(0, 1, 6), (1, 2, 3)]
    assert ranks.expected(low[1], 0, steps) == pytest.approx(0.51 + 0.3)
    assert ranks.expected(middle[3], 1, steps) == pytest.approx(0.53 + 0.3)
    assert ranks.expected(high[6], 2, steps) == pytest.approx(0.56 + 0.3)
    assert ranks.corrections((low, {}, high)) == ()
