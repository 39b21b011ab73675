"""Networks that are named: torchvision's, timm's, Hugging Face's encoders. Nothing is downloaded unless asked for."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import nn

from autocompress.shelves import suggest
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


def torchvision(name: str, **options: Any) -> nn.Module:
    """A network that `torchvision.models.list_models()` lists, untrained unless `weights` asks for a download.

    Raises UserError for other names, with near ones.
    """
    models = import_torchvision().models
    if name not in (known := models.list_models()):
        raise UserError(f"torchvision has no network {name!r}; {suggest(name, known)}")
    return models.get_model(name, **{"weights": None, **options})
