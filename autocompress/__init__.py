"""Joint search over architecture and per-layer compression policy, scored on the ONNX file that ships.

Names are loaded when they are first used (PEP 562): `import autocompress` loads no torch, ray or onnxruntime.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autocompress.devices.station import measure_file as measure
    from autocompress.load import job as load_job
    from autocompress.reuse import apply as apply
    from autocompress.run import resume as resume
    from autocompress.run import search as search
    from autocompress.types import Budget as Budget
    from autocompress.types import Job as Job
    from autocompress.types import LimitError as LimitError
    from autocompress.types import Profile as Profile
    from autocompress.types import Space as Space
    from autocompress.types import TrialFailure as TrialFailure
    from autocompress.types import UserError as UserError

__version__ = "0.1.0"

_PUBLIC = {
    "apply": "autocompress.reuse:apply",
    "load_job": "autocompress.load:job",
    "measure": "autocompress.devices.station:measure_file",
    "resume": "autocompress.run:resume",
    "search": "autocompress.run:search",
    "Budget": "autocompress.types:Budget",
    "Job": "autocompress.types:Job",
    "LimitError": "autocompress.types:LimitError",
    "Profile": "autocompress.types:Profile",
    "Space": "autocompress.types:Space",
    "TrialFailure": "autocompress.types:TrialFailure",
    "UserError": "autocompress.types:UserError",
}
__all__ = [
    "Budget",
    "Job",
    "LimitError",
    "Profile",
    "Space",
    "TrialFailure",
    "UserError",
    "apply",
    "load_job",
    "measure",
    "resume",
    "search",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'autocompress' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
