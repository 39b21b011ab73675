"""Devices reach a target and time files on it (protocol)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from autocompress.types import Profile, Record, TrialFailure, UserError


class Unreachable(TrialFailure):
    """The target does not answer: its queue pauses and is tried again. It says nothing of the file."""


class AllAway(UserError):
    """No device of the search has answered for as long as it waits: it stops, and a resume goes on from there."""


def host_of(profile: Profile) -> str:
    """The host that a profile measures on, empty for this one: one measurement at a time runs on each."""
    reach = profile.reach
    return reach.ssh or reach.adb or reach.resource


class Samples(Record):
    """Raw times of one window: file -> milliseconds of single runs, in the order taken, files interleaved."""

    times_ms: dict[str, tuple[float, ...]]  # keyed by the file's path as given
    load_ms: dict[str, float] = {}
    memory_mb: dict[str, float] = {}  # peak of a process that runs the file, beyond what it needs without
    energy_mj: dict[str, float] = {}  # of one run
    blocks: int = 0  # each file's times fall into this many equal consecutive blocks, one per round; 0: not known
    waited_s: float = 0.0  # before the timing began, for another measurement on that host
    fed: dict[str, int] = {}  # files that bring their own inputs -> how many; every block has one run of each
    disturbed: float = 0.0  # share of the runs in which another process had one of the cores, where that is known


class Kernels(Record):
    """What onnxruntime runs a file with."""

    counts: dict[str, int]  # kernel -> how often it runs; a name is its operation, a colon and a hash of the rest
    ratios: dict[str, float] = {}  # what one takes alone, of what a small convolution takes there


@runtime_checkable
class Device(Protocol):
    """Code that reaches a target. One object per profile."""

    profile: Profile

    def fingerprint(self) -> dict[str, Any]:
        """What identifies target and runtime: processor, flags, cores, kernel, onnxruntime version. JSON."""
        ...

    def time(self, models: Sequence[Path], *, rounds: int, seconds: float, cores: Sequence[int] = ()) -> Samples:
        """Time the files against one another, interleaved, for `rounds` blocks or until `seconds` are over.

        Raises TrialFailure if a file cannot be loaded or run there, Unreachable if the target does not answer.
        """
        ...


@runtime_checkable
class TellsMemory(Protocol):
    """A device that can also say what memory a file takes; it costs a process per file, so it is asked for apart."""

    def memory(self, models: Sequence[Path]) -> dict[str, float]:
        """Peak megabytes (1e6) of a fresh process that loads and runs a file, beyond one with the runtime alone.

        Keyed by the file's path as given; empty where the target does not tell. Raises as `Device.time`.
        """
        ...


@runtime_checkable
class TellsAnswers(Protocol):
    """A device that can also run a file on inputs of ours: its quality is that of its own answers."""

    def answers(self, model: Path, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Outputs (n, ...) for inputs (n, ...), in the file's order of both.

        Raises TrialFailure if the file cannot be loaded or run there, Unreachable if the target does not answer.
        """
        ...


@runtime_checkable
class TellsRoom(Protocol):
    """A device that can also say how much memory is left there."""

    def room(self) -> float | None:
        """Megabytes (1e6) that were free beside the timing process when it began; None where that is not told."""
        ...


@runtime_checkable
class TellsKernels(Protocol):
    """A device that can also time the kernels of a file, each alone."""

    def kernels(self, model: Path, wanted: Sequence[str], *, seconds: float, cores: Sequence[int] = ()) -> Kernels:
        """The kernels of a file, and what those that are wanted take: as many as the seconds suffice for, or one.

        Raises TrialFailure where the runtime does not tell, Unreachable if the target does not answer.
        """
        ...
