"""Whether a device is slower than at its fastest, as its baseline tells, and whether trainers may be to blame."""

from __future__ import annotations

import math
import time

from autocompress.devices.statistics import SLOW
from autocompress.types import Interval

VAIN = 3  # readings in a row for which trainers paused in vain, after which they are not asked for a while
BLAMELESS_S = 60.0


class Slowing:
    """What is known of one device in one process: `baseline_ms` of readings comes in, whether it is slow goes out."""

    def __init__(self) -> None:
        self.fastest = math.inf  # milliseconds
        self._vain = 0
        self._blameless_until = -math.inf  # by time.monotonic

    def seen(self, baseline_ms: Interval) -> None:
        """Remember how fast the baseline was."""
        self.fastest = min(self.fastest, baseline_ms.value)

    def by(self, baseline_ms: Interval) -> float:
        """How much slower it is than at its fastest, as a share, not below 0."""
        return round(max(baseline_ms.value / self.fastest - 1.0, 0.0), 4)

    def slow(self, baseline_ms: Interval) -> bool:
        """Whether that is more than chance."""
        return self.by(baseline_ms) > SLOW

    def blamed(self, baseline_ms: Interval) -> bool:
        """Whether it is slow and that may be the trainers' doing."""
        return self.slow(baseline_ms) and time.monotonic() > self._blameless_until

    def paused(self, baseline_ms: Interval) -> None:
        """What came of a pause."""
        self._vain = self._vain + 1 if self.slow(baseline_ms) else 0
        if self._vain >= VAIN:
            self._blameless_until = time.monotonic() + BLAMELESS_S
