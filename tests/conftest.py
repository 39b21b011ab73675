"""Settings that hold for every test."""

import os

from hypothesis import HealthCheck, settings

# Before torch or numpy is imported anywhere: tests share the machine, and results must not depend on its cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Shared machines stall: a slow example is no failure.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")
