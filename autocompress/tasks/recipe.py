"""How a task wants its networks trained: an optional attribute `training` of the task, a mapping or a `Recipe`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError

from autocompress.types import Positive, Record, UserError


class Recipe(Record):
    """What a training is made of besides data and loss.

    `sgd` is for convolutional networks, `adamw` for transformers, which plain gradient descent hardly trains.
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.08  # at the peak of the one-cycle schedule
    batch: int = Field(default=64, ge=2)
    momentum: float = Field(default=0.9, ge=0, lt=1)  # of sgd, with Nesterov's step; of adamw the first moment
    decay: float = Field(default=5e-4, ge=0)  # of weights with two or more axes
    clip: Positive = 5.0  # largest norm of the gradient

    @classmethod
    def of(cls, asked: Mapping[str, Any] | Recipe | None, where: str, *, optimizer: str = "sgd") -> Recipe:
        """The recipe of a mapping that may name another `optimizer`; `adamw` has a rate and a decay of its own.

        Raises UserError naming `where` and the key for unknown keys and bad values.
        """
        if isinstance(asked, Recipe):
            return asked
        if asked is not None and not isinstance(asked, Mapping):
            raise UserError(f"{where}: training: write a mapping such as {{optimizer: adamw, lr: 0.0005}}")
        values: dict[str, Any] = {"optimizer": optimizer, **(asked or {})}
        if values["optimizer"] == "adamw":  # Devlin et al. 2019, section A.3, and Loshchilov and Hutter 2019
            values = {"lr": 5e-4, "decay": 0.01, "clip": 1.0, **values}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            known = ", ".join(cls.model_fields)
            what = f"no such setting, there are {known}" if first["type"] == "extra_forbidden" else first["msg"]
            raise UserError(f"{where}: training.{key}: {what}") from error


def recipe(task: Any) -> Recipe:
    """The recipe of a task, defaults where it has none."""
    return Recipe.of(getattr(task, "training", None), f"task {task.name}")


def steps(task: Any, split: str, size: int) -> int:
    """Batches of one pass: by the task's own `count(split)` of samples if it has one, else by running through them."""
    count: Any = getattr(task, "count", None)
    if count is not None:
        return -(-int(count(split)) // size)
    return sum(1 for _ in task.batches(split, size))
