"""Whether a device is slower than at its fastest, as its baseline tells, and whether trainers may be to blame."""

from __future__ import annotations

import math
import time

from autocompress.devices.statistics import SLOW, Window
from autocompress.types import Interval

VAIN = 9  # windows in a row for which trainers paused in vain, after which they are not asked for a while
BLAMELESS_S, LONGEST_BLAMELESS_S = 60.0, 3600.0  # each time twice as long
SAME = 0.025  # ratios that differ by less agree: a lower clock slows a file as it slows its baseline, and does no harm


class Slowing:
    """What is known of one device in one process: `baseline_ms` of readings comes in, whether it is slow goes out."""

    def __init__(self) -> None:
        self.fastest = math.inf  # milliseconds
        self._vain = 0
        self._blameless_s = BLAMELESS_S
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

    def paused(self, before: Window, after: Window, windows: int) -> None:
        """What came of a pause of so many windows: nothing if it is slow even so, or the file's ratio what it was."""
        agree = not before.noisy and abs(after.ratio.value / before.ratio.value - 1.0) < SAME
        if not (agree or self.slow(after.baseline_ms)):
            self._vain, self._blameless_s = 0, BLAMELESS_S
            return
        self._vain += windows
        if self._vain >= VAIN:
            self._blameless_until = time.monotonic() + self._blameless_s
            self._blameless_s = min(2 * self._blameless_s, LONGEST_BLAMELESS_S)
