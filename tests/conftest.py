"""Settings that hold for every test."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Before torch or numpy is imported anywhere: tests share the machine, and results must not depend on its cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Shared machines stall: a slow example is no failure.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")

CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set[int]()


@pytest.fixture(autouse=True)
def _cores_are_given_back() -> Iterator[None]:
    """What binds this process to some of its cores gives the others back."""
    yield
    if CORES and (left := os.sched_getaffinity(0)) != CORES:
        os.sched_setaffinity(0, CORES)
        pytest.fail(f"the process was left on cores {sorted(left)} of {sorted(CORES)}")
