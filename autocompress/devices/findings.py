"""What a survey finds, as records, and the device on which it looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from autocompress.devices import Device, Unreachable
from autocompress.devices.statistics import parts
from autocompress.types import Interval, Profile, Record, TrialFailure

EVEN = 0.03  # a difference smaller than this is none

Middles = dict[str, NDArray[np.float64]]
"""File -> milliseconds of the middle run of each block."""
About = Literal["types", "ranks", "noise"]
Sign = Literal["pays", "costs", "setting"]


class Finding(Record):
    """One comparison: `what` took `ratio` of the time of `against`, or was refused, and `why`."""

    about: About
    what: str
    against: str
    ratio: Interval | None = None
    blocks: int = 0
    why: str = ""

    @property
    def verdict(self) -> Literal["pays", "costs", "even", "undecided", "refused"]:
        """What the interval says."""
        if self.ratio is None:
            return "refused"
        if self.ratio.high < 1 - EVEN:
            return "pays"
        if self.ratio.low > 1 + EVEN:
            return "costs"
        narrow = self.ratio.low > 1 - 2 * EVEN and self.ratio.high < 1 + 2 * EVEN
        return "even" if narrow else "undecided"

    @property
    def figure(self) -> str:
        """`0.41 [0.40, 0.42] of float32, 24 blocks`."""
        if self.ratio is None:
            return f"refused: {self.why}"
        one = self.ratio
        return f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}] of {self.against}, {self.blocks} blocks"


class Advice(Record):
    """One line of what to do about it."""

    sign: Sign
    text: str


class Survey(Record):
    """The profile with what was found in it, and what was found in words and figures."""

    profile: Profile
    facts: dict[str, Any]  # the device's fingerprint
    findings: tuple[Finding, ...]
    advice: tuple[Advice, ...]
    seconds: float


@dataclass
class Bench:
    """A device, and the folder in which its files lie."""

    device: Device
    folder: Path
    cores: Sequence[int]
    disturbed: float = 0.0  # largest share of disturbed runs in a window

    def middles(self, files: Mapping[str, bytes], seconds: float) -> tuple[Middles, dict[str, str]]:
        """Time files in one window; also why some were refused, which are then left out.

        Raises TrialFailure if none runs.
        """
        paths = {name: self._path(number) for number, name in enumerate(files)}
        for name, model in files.items():
            paths[name].write_bytes(model)
        refused: dict[str, str] = {}
        try:
            return self._timed(paths, seconds), refused
        except Unreachable:
            raise
        except TrialFailure:
            for name in files:
                if why := self.refusal(paths[name]):
                    refused[name] = why
            left = {name: path for name, path in paths.items() if name not in refused}
            if not left or not refused:
                raise
            return self._timed(left, seconds), refused

    def refusal(self, model: Path | bytes) -> str:
        """Why a file does not run there, "" if it does."""
        path = model if isinstance(model, Path) else self._path(0)
        if not isinstance(model, Path):
            path.write_bytes(model)
        try:
            self.device.time([path], rounds=1, seconds=0.0, cores=self.cores)
        except Unreachable:
            raise
        except TrialFailure as failure:
            return _reason(str(failure))
        return ""

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.onnx"

    def _timed(self, paths: Mapping[str, Path], seconds: float) -> Middles:
        samples = self.device.time(list(paths.values()), rounds=200, seconds=seconds, cores=self.cores)
        self.disturbed = max(self.disturbed, samples.disturbed)
        return {
            name: np.array([float(np.median(part)) for part in parts(samples, str(path)) if len(part)])
            for name, path in paths.items()
        }


def _reason(failure: str) -> str:
    """What onnxruntime said, without its codes and the names of our files."""
    text = failure.rpartition(" failed:")[2] or failure
    parted = text.split(" : ")
    return parted[-1].removeprefix("This is an invalid model. ").strip()[:160]
