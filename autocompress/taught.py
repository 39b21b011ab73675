"""A teacher's answers, computed once where training batches are not augmented, and found again by a sample's bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from autocompress.tasks import Task, several
from autocompress.types import UserError

LIMIT = 256 * 2**20
"""Bytes of answers that are kept."""


class Answers:
    """Outputs by sample. They are computed on the plain pass over the data, whatever order training takes.

    So a training that is resumed hears the same to the bit, and every trial of a process shares one pass.
    """

    def __init__(self, outputs: list[Any], places: dict[bytes, int]) -> None:
        self.outputs = [torch.cat(parts) for parts in zip(*map(several, outputs), strict=True)]
        self.single = isinstance(outputs[0], Tensor)
        self.places = places

    def of(self, inputs: tuple[Tensor, ...]) -> Any:
        """The outputs of a batch, as the teacher gives them. Raises UserError for a sample that was never seen."""
        try:
            rows = torch.tensor([self.places[key] for key in keys(inputs)])
        except KeyError as error:
            raise UserError(
                "distillation: the task says `augments = False`, but a shuffled batch holds a sample that the plain "
                "pass has not; leave `augments` away, or let both give the same samples"
            ) from error
        found = tuple(one[rows] for one in self.outputs)
        return found[0] if self.single else found


def keys(inputs: tuple[Tensor, ...]) -> Iterator[bytes]:
    """One key per sample of a batch: a hash of its bytes."""
    rows = [one.detach().contiguous().flatten(1).numpy() for one in inputs]
    for sample in zip(*rows, strict=True):
        key = hashlib.blake2b(digest_size=16)
        for row in sample:
            key.update(row.data)
        yield key.digest()


_HELD: WeakKeyDictionary[nn.Module, tuple[Task, tuple[int, bool, bytes], Answers | None]] = WeakKeyDictionary()


def answers_of(
    teacher: nn.Module,
    task: Task,
    batch: int,
    *,
    bf16: bool,
    prepare: Callable[[Any], tuple[Tensor, ...]],
    pause: Callable[[], object],
) -> Answers | None:
    """All answers of a teacher on a task's training split, from memory where this process has heard them.

    `prepare` makes arguments of a batch's inputs. None where they would take more than `LIMIT` bytes.
    """
    state = (batch, bf16, digest(teacher))
    held = _HELD.get(teacher)
    if held is None or held[0] is not task or held[1] != state:
        _HELD[teacher] = held = (task, state, _ask(teacher, task, batch, bf16, prepare, pause))
    return held[2]


def digest(module: nn.Module) -> bytes:
    """A hash of all parameters and buffers."""
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.digest()


def _ask(
    teacher: nn.Module,
    task: Task,
    batch: int,
    bf16: bool,
    prepare: Callable[[Any], tuple[Tensor, ...]],
    pause: Callable[[], object],
) -> Answers | None:
    outputs: list[Any] = []
    places: dict[bytes, int] = {}
    size = count = 0
    for inputs, _ in task.batches("train", batch):
        pause()
        arguments = prepare(inputs)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            found = teacher(*arguments)
        found = found.float() if isinstance(found, Tensor) else tuple(one.float() for one in found)
        outputs.append(found)
        size += sum(one.nbytes for one in several(found))
        if size > LIMIT:
            return None
        for key in keys(arguments):
            places.setdefault(key, count)
            count += 1
    return Answers(outputs, places) if outputs else None
