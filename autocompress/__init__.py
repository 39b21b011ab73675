"""Joint search over architecture and per-layer compression policy, scored on the ONNX file that ships.

Names are loaded when they are first used (PEP 562): `import autocompress` loads no torch, ray or onnxruntime.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autocompress.apply import apply as apply
    from autocompress.devices.station import measure_file as measure
    from autocompress.load import job as load_job
    from autocompress.search import search as search
    from autocompress.types import Budget as Budget
    from autocompress.types import Job as Job
    from autocompress.types import LimitError as LimitError
    from autocompress.types import Profile as Profile
    from autocompress.types import Space as Space
    from autocompress.types import TrialFailure as TrialFailure
    from autocompress.types import UserError as UserError

__version__ = "0.1.0"

_PUBLIC = {
    "apply": "autocompress.apply:apply",
    "load_job": "autocompress.load:job",
    "measure": "autocompress.devices.station:measure_file",
    "search": "autocompress.search:search",
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
    "search",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'autocompress' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


class _Package(ModuleType):
    """Keeps `autocompress.search` the function: importing the submodule of that name would replace it."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
