"""Whether what comes next fits into memory, said in one line before the system would end the process."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import psutil

from autocompress.devices.cores import control_groups
from autocompress.types import TrialFailure

SMALL = 100_000_000
"""Bytes that are taken without asking."""
FILE = 3
"""Times its weights that a network's file takes until it is measured: bytes, and an exporter's graph or a session."""
TRIAL = 1 + FILE
"""The candidate itself, too; its gradients and optimizer state come when no file is held."""


def available(root: Path = Path("/")) -> int:
    """Bytes that this process can still take: of the machine, and of its control groups; `root` is for tests."""
    left = [psutil.virtual_memory().available]
    for group in control_groups("memory", root):
        left += _group_room(group)
    return max(0, min(left))


def check(needed: float, what: str, kind: type[Exception] = TrialFailure) -> None:
    """Raise `kind` in one line if `what` takes more bytes than there are."""
    if needed <= SMALL or needed <= available():
        return
    gc.collect()  # a trial that has ended may still be held by its own cycles
    if needed > (free := available()):
        raise kind(
            f"{what} needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are available; "
            "end other programs, take fewer workers or a smaller network"
        )


def module_bytes(module: Any) -> int:
    """Bytes of a torch module's parameters and buffers, shared ones counted once."""
    return sum(one.numel() * one.element_size() for one in (*module.parameters(), *module.buffers()))


def _group_room(group: Path) -> list[int]:
    """What a group's limit leaves, if it has one; its file cache goes before it does."""
    for limit, usage, files in (
        ("memory.max", "memory.current", ("active_file", "inactive_file")),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
    ):
        if not (group / limit).is_file() or not (group / usage).is_file():
            continue
        most = (group / limit).read_text().strip()
        if most == "max":
            return []
        held = dict(line.split(" ", 1) for line in (group / "memory.stat").read_text().splitlines())
        return [int(most) - int((group / usage).read_text()) + sum(int(held.get(name, 0)) for name in files)]
    return []
