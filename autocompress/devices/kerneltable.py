"""What kernels take on a device, each timed once: what a file is weighed by without being measured.

A table per device and runtime, in the cache; a line per kernel, written at once, so that several searches may share it.
After J. Zhang et al., nn-Meter: towards accurate latency prediction of deep-learning model inference on diverse edge
devices, MobiSys 2021, sections 3 and 4: a model's latency is a sum over the kernels that the runtime fuses it into. But
no kernel's time is predicted here, since timing the few that a further file brings takes some 10 ms each.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from autocompress.surrogate import KERNELS


class KernelTable:
    """What kernels take, of what a small convolution takes there (`kernels.Gauge`), kept in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ratios: dict[str, float] = {}
        self._read()

    def _read(self) -> None:
        for line in self.path.read_text(errors="replace").splitlines() if self.path.is_file() else ():
            try:
                key, ratio = json.loads(line)
                self.ratios.setdefault(key, float(ratio))
            except (ValueError, TypeError):  # a line that a crash cut off: timed again
                continue

    def missing(self, counts: Mapping[str, int]) -> list[str]:
        """Kernels that neither this object nor another search has timed."""
        if any(key not in self.ratios for key in counts):
            self._read()
        return [key for key in counts if key not in self.ratios]

    def add(self, took: Mapping[str, float]) -> None:
        """Keep them; the first reading of a kernel stays."""
        new = {key: ratio for key, ratio in took.items() if key not in self.ratios}
        self.ratios |= new
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(f"\n{json.dumps([key, ratio])}" for key, ratio in new.items())
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, lines.encode())
        finally:
            os.close(descriptor)

    def amounts(self, counts: Mapping[str, int]) -> dict[str, float]:
        """What those of one run take, by operation, and how many they are. Raises KeyError for one that is unknown."""
        found: defaultdict[str, float] = defaultdict(float)
        for key, count in counts.items():
            found[key.partition(":")[0]] += count * self.ratios[key]
        named = {name: round(ratio, 4) for name, ratio in sorted(found.items())}
        return {**named, KERNELS: float(Counter(counts).total())}
