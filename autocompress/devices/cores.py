"""Which cores measure and which train; whether trainers must pause instead."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from autocompress.devices import host_of
from autocompress.types import Profile, UserError


@dataclass(frozen=True)
class CorePlan:
    """Who runs where. Empty tuples mean that the system does not let us choose."""

    station: tuple[int, ...]  # cores of the measurements
    trainers: tuple[int, ...]  # cores of trainers, the driver and everything else
    quiet: bool  # trainers pause at a step boundary while a measurement runs
    why: str  # one line for the user


@dataclass(frozen=True)
class Cores:
    """What the host offers this process."""

    visible: tuple[int, ...]  # logical cores this process may use
    siblings: Mapping[int, frozenset[int]]  # logical cores that share a physical one, the core itself included
    capacity: Mapping[int, int]  # relative speed where cores differ (big and little), else 0
    quota: float | None  # cores' worth of time a control group allows, None for no limit
    affinity: bool  # whether processes can be kept on cores


def plan_cores(profiles: Sequence[Profile], cores: Cores | None = None) -> CorePlan:
    """Give the station as many cores as the most threads of `profiles`, and the rest to the trainers.

    Profiles of other hosts need none here. A physical core is never shared between the two: its other hyper-thread
    stays idle. Raises UserError when a profile has more threads than there are cores.
    """
    found = read_cores() if cores is None else cores
    own = [profile for profile in profiles if not host_of(profile)]
    if not own:
        return CorePlan((), found.visible if found.affinity else (), False, "nothing is measured on this machine")
    count = len(found.visible)
    every = all_threads(found)
    most = max(own, key=lambda profile: profile.threads or every)
    threads = most.threads or every
    offered = count if found.quota is None else min(count, found.quota)
    if threads > offered:
        raise UserError(
            f"profile {most.name!r} measures with {threads} threads, but {offered:g} of this machine's cores may be "
            f"used; drop the profile or allow more cores"
        )
    if not found.affinity:
        return CorePlan((), (), True, "this system cannot keep processes on cores: trainers pause while measuring")
    station = _choose(found, threads)
    shared = set[int]().union(*(found.siblings.get(core, frozenset({core})) for core in station))
    rest = tuple(core for core in found.visible if core not in shared)
    if found.quota is not None and found.quota < count:
        why = f"a control group allows {found.quota:g} of {count} cores: trainers pause while measuring"
    elif not rest:
        why = f"measuring takes {threads} of {count} cores and leaves none: trainers pause while measuring"
    else:
        idle = count - len(station) - len(rest)
        spare = f", {idle} idle beside them (hyper-threads)" if idle else ""
        return CorePlan(station, rest, False, f"measuring on {_names(station)}, training on {_names(rest)}{spare}")
    return CorePlan(station, found.visible, True, why)


def all_threads(cores: Cores | None = None) -> int:
    """What `threads: 0` means here: one per physical core that this process may use, within its quota of time."""
    found = read_cores() if cores is None else cores
    physical = len({min(found.siblings.get(core, frozenset({core}))) for core in found.visible})
    return max(1, min(physical, int(found.quota) if found.quota is not None else physical))


def keep_to(cores: Sequence[int]) -> None:
    """Keep this process on these cores: all its threads, and what it starts later.

    Nothing happens for none, or where the system cannot do it.

    Trainers, Ray's processes and the driver call it with `plan.trainers`, after `plan_cores`, which must see all.
    """
    if not cores or not hasattr(os, "sched_setaffinity"):
        return
    for thread in psutil.Process().threads():
        with suppress(ProcessLookupError):  # a thread that has just ended
            os.sched_setaffinity(thread.id, cores)


@contextmanager
def given_back() -> Iterator[None]:
    """After it this process has the cores again that it had before: a search is called from notebooks and scripts."""
    before = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    try:
        yield
    finally:
        if before and sorted(os.sched_getaffinity(0)) != before:
            keep_to(before)


@contextmanager
def at_large(plan: CorePlan, threads: int) -> Iterator[None]:
    """This process on the station's cores too, for more threads than trainers have cores: nobody measures meanwhile."""
    wide = bool(plan.trainers) and threads > len(plan.trainers)
    if wide:
        keep_to((*plan.trainers, *plan.station))
    try:
        yield
    finally:
        if wide:
            keep_to(plan.trainers)


def _choose(cores: Cores, threads: int) -> tuple[int, ...]:
    """The fastest cores, the last first (the first serve interrupts); hyper-threads only when nothing else is left."""
    ranked = sorted(cores.visible, key=lambda core: (cores.capacity.get(core, 0), core), reverse=True)
    taken: list[int] = []
    busy: set[int] = set()
    for core in ranked:
        if core not in busy:
            taken.append(core)
            busy |= cores.siblings.get(core, frozenset({core}))
    taken += [core for core in ranked if core not in taken]
    return tuple(sorted(taken[:threads]))


def _names(cores: Sequence[int]) -> str:
    return f"core{'s' if len(cores) > 1 else ''} {', '.join(map(str, cores))}"


def read_cores(root: Path = Path("/")) -> Cores:
    """What this host offers this process; `root` is for tests (affinity is always this process's own)."""
    affinity = hasattr(os, "sched_getaffinity") and hasattr(os, "sched_setaffinity")
    visible = tuple(sorted(os.sched_getaffinity(0))) if affinity else tuple(range(os.cpu_count() or 1))
    siblings: dict[int, frozenset[int]] = {}
    capacity: dict[int, int] = {}
    for core in visible:
        folder = root / f"sys/devices/system/cpu/cpu{core}"
        for name in ("topology/core_cpus_list", "topology/thread_siblings_list"):
            if (folder / name).is_file():
                siblings[core] = parse_list((folder / name).read_text())
                break
        for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
            if (folder / name).is_file():
                capacity[core] = int((folder / name).read_text())
                break
    return Cores(visible, siblings, capacity, read_quota(root), affinity)


def parse_list(text: str) -> frozenset[int]:
    """The kernel's list of cores, e.g. `0-2,8`."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return frozenset(found)


def read_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that control groups allow this process; None for no limit."""
    limits = [limit for group in control_groups("cpu", root) for limit in _group_limit(group)]
    return min(limits, default=None)


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """Folders of the control groups (version 1 or 2) that limit this process, in which the tightest holds.

    Every group from this process's own up to the mount counts. In a container the path of /proc/self/cgroup may lie
    outside of what is mounted; the mount itself is then the process's group.
    """
    groups, mounts = root / "proc/self/cgroup", root / "proc/self/mountinfo"
    if not (groups.is_file() and mounts.is_file()):
        return
    paths: dict[str, str] = {}
    for line in groups.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    for line in mounts.read_text().splitlines():
        head, _, tail = line.partition(" - ")
        kind, _, options = tail.split(" ", 2)
        if kind not in ("cgroup", "cgroup2") or (kind == "cgroup" and controller not in options.split(",")):
            continue
        mount = root / head.split(" ")[4].lstrip("/")
        group = mount / paths.get(controller if kind == "cgroup" else "", "").lstrip("/")
        while group.is_relative_to(mount):
            yield group
            group = group.parent


def _group_limit(group: Path) -> list[float]:
    """The limit of one group, if it has one."""
    new, old, period = group / "cpu.max", group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us"
    if new.is_file():
        quota, length = new.read_text().split()
        return [] if quota == "max" else [int(quota) / int(length)]
    if old.is_file() and period.is_file() and int(old.read_text()) > 0:
        return [int(old.read_text()) / int(period.read_text())]
    return []
