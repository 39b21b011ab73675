"""torchvision, for its networks and its data sets, also where it belongs to another build of torch."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch

from autocompress.types import UserError

MISSING = "operator torchvision::nms does not exist"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@cache
def import_torchvision() -> Any:
    """The package, also where its compiled operators belong to another build of torch than the one installed.

    Its import then fails on the first operator that it annotates, which no classification network uses: the operator's
    schema is declared and the import tried again. Raises UserError for any other reason.
    """
    try:
        return import_module("torchvision")
    except RuntimeError as error:
        if MISSING not in str(error):
            raise UserError(f"torchvision cannot be imported beside torch {torch.__version__}: {error}") from error
    except ImportError as error:
        raise UserError(f"torchvision cannot be imported: {error}") from error
    library = _library()
    for schema in _SCHEMAS:
        library.define(schema)
    return import_module("torchvision")


@cache  # what is declared lives as long as its library
def _library() -> torch.library.Library:
    return torch.library.Library("torchvision", "FRAGMENT")
