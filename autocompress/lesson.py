"""What a student takes from its teacher during training: where both are watched, and the loss of what was seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.distill import (
    Distillation,
    attention_loss,
    feature_loss,
    pooled,
    relation_loss,
    responses_loss,
)
from autocompress.models.trace import still
from autocompress.tasks import several
from autocompress.taught import Answers
from autocompress.types import TrialFailure

MOST = 4
"""Places that are watched."""
SCALE = {"attention": 100.0, "features": 20.0, "both": 100.0}
"""Of hints beside the task's loss: at `weight` 0.5 both help a half-pruned ResNet-20 most (tried 1 to 150)."""
SPOKEN = ("response", "both")  # kinds in which the teacher's answers take a part of the loss
FEATURES = ("features", "both")


class Lesson:
    """One student, one teacher, one kind of distillation; watching only between `open` and `close`.

    `example` is one batch as the networks take it. `judge` is the task's own loss of responses, if it has one:
    `judge(outputs, taught, temperature)`. `answers` may be set to the teacher's kept ones, where responses are taught.
    Where features have other widths, an adapter of 1x1 learns with the student and is never part of it.
    """

    def __init__(
        self,
        settings: Distillation,
        teacher: nn.Module,
        student: nn.Module,
        example: tuple[Tensor, ...],
        *,
        judge: Any = None,
        seed: int = 0,
    ) -> None:
        """Raises TrialFailure where the two have no place in common that this kind needs."""
        self.settings, self.teacher, self.student, self.judge = settings, teacher, student, judge
        self.answers: Answers | None = None
        self.places: tuple[str, ...] = ()
        self.adapters = nn.ModuleDict()
        self._mine: dict[str, Tensor] = {}
        self._theirs: dict[str, Tensor] = {}
        self._taught: Any = None
        self._hooks: list[Any] = []
        if settings.kind == "response":
            return
        theirs, mine = survey(teacher, example), survey(student, example)
        if settings.kind == "relation":
            self.places = embedding(teacher, theirs, mine)
            return
        self.axis = 1 if any(isinstance(part, nn.Conv1d) for part in student.modules()) else -1
        self.places = shared_places(teacher, theirs, mine, flat=settings.kind in FEATURES, conv1d=self.axis == 1)
        if not self.places and settings.kind not in SPOKEN:
            what = "hidden" if settings.kind == "features" else "spatial"
            raise TrialFailure(
                f"distillation by {settings.kind}: no layer with {what} outputs has one name in candidate and parent"
            )
        if settings.kind in FEATURES:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                for place in self.places:
                    self._adapt(place, mine[place], theirs[place])

    def _adapt(self, place: str, mine: torch.Size, theirs: torch.Size) -> None:
        axis = channel_axis(theirs, self.axis)
        if mine[axis] != theirs[axis]:
            self.adapters[_key(place)] = nn.Linear(mine[axis], theirs[axis])  # a 1x1, whatever the spatial axes are

    @property
    def left(self) -> float:
        """The weight of the task's own loss: soft targets take a part of its place, hints are added to it."""
        return 1 - self.settings.weight if self.settings.kind in SPOKEN else 1.0

    def open(self) -> None:
        """Watch both networks."""
        for network, seen in ((self.student, self._mine), (self.teacher, self._theirs)):
            for place in self.places:
                self._hooks.append(_watch(network.get_submodule(place), place, seen, into=self._entering))

    def close(self) -> None:
        """Leave both networks as they were; what was seen is forgotten."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._mine.clear()
        self._theirs.clear()
        self._taught = None

    @property
    def _entering(self) -> bool:
        """A relation is among what goes into the last layer, the others are among what comes out."""
        return self.settings.kind == "relation"

    def listen(self, inputs: tuple[Tensor, ...]) -> None:
        """The teacher's side of a batch, kept or computed."""
        with torch.no_grad():
            self._taught = self.answers.of(inputs) if self.answers is not None else self.teacher(*inputs)

    def loss(self, outputs: Any) -> Tensor:
        """The scalar loss of the batch that student and teacher have just seen."""
        kind, mine, theirs = self.settings.kind, self._mine, self._theirs
        if kind == "response":
            return self._responses(outputs)
        if kind == "relation":
            if not self.places:
                return relation_loss(several(outputs)[0], several(self._taught)[0])
            return relation_loss(mine[self.places[0]], theirs[self.places[0]])
        losses = [self._place_loss(place, mine[place], theirs[place]) for place in self.places]
        if kind == "both" and not losses:  # nothing in common but the answers
            return self._responses(outputs)
        hints = SCALE[kind] * torch.stack(losses).mean()
        return hints + self._responses(outputs) if kind == "both" else hints

    def _responses(self, outputs: Any) -> Tensor:
        if self.judge is not None:
            return self.judge(outputs, self._taught, self.settings.temperature)
        return responses_loss(several(outputs), several(self._taught), self.settings.temperature)

    def _place_loss(self, place: str, mine: Tensor, theirs: Tensor) -> Tensor:
        axis = channel_axis(theirs.shape, self.axis)
        mine, theirs = mine.float().movedim(axis, 1), theirs.float().movedim(axis, 1)
        if self.settings.kind == "attention":
            return attention_loss(mine, theirs, 1)
        if _key(place) in self.adapters:
            mine = self.adapters[_key(place)](mine.movedim(1, -1)).movedim(-1, 1)
        return feature_loss(mine, pooled(theirs, mine.shape[2:]))

    def parameters(self) -> Iterator[nn.Parameter]:
        """What learns beside the student."""
        return self.adapters.parameters()


def survey(network: nn.Module, example: tuple[Tensor, ...]) -> dict[str, torch.Size]:
    """Output shapes of the modules that are called exactly once, in the order in which they end."""
    shapes: dict[str, torch.Size] = {}
    calls: dict[str, int] = {}

    def note(name: str, output: Any) -> None:
        calls[name] = calls.get(name, 0) + 1
        found = first(output)
        if found is not None:
            shapes[name] = found.shape

    hooks = [
        part.register_forward_hook(lambda _module, _inputs, output, name=name: note(name, output))
        for name, part in network.named_modules()
        if name
    ]
    try:
        with still(network):
            network(*example)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: shape for name, shape in shapes.items() if calls[name] == 1}


def first(output: Any) -> Tensor | None:
    """The tensor that a module gives, the first of a tuple, None where it gives no numbers."""
    found = output[0] if isinstance(output, tuple | list) and output else output
    return found if isinstance(found, Tensor) and found.is_floating_point() else None


def embedding(teacher: nn.Module, theirs: Mapping[str, torch.Size], mine: Mapping[str, torch.Size]) -> tuple[str, ...]:
    """The last linear layer of both, whose input is one vector per sample; none where it is not, or there is none."""
    for name in reversed(list(theirs)):
        if isinstance(teacher.get_submodule(name), nn.Linear):
            return (name,) if name in mine and len(theirs[name]) == len(mine[name]) == 2 else ()
    return ()


def channel_axis(shape: Sequence[int], tokens: int) -> int:
    """Where the channels are: the second axis of images, the last where height and width come first (Swin).

    `tokens` says it for three axes: the last of (n, tokens, d), the second of (n, channels, length).
    """
    if len(shape) == 4:
        return -1 if shape[1] == shape[2] != shape[3] else 1
    return tokens if len(shape) == 3 else -1


def shared_places(
    teacher: nn.Module,
    theirs: Mapping[str, torch.Size],
    mine: Mapping[str, torch.Size],
    *,
    flat: bool,
    conv1d: bool,
) -> tuple[str, ...]:
    """At most `MOST` modules that both networks have and end the same stages, from input to output.

    Images: the ends of stages. Tokens: blocks, evenly. `flat`: hidden vectors too, if all else fails.
    """
    common = [name for name in mine if name in theirs and len(mine[name]) == len(theirs[name])]
    ends = stage_ends({name: theirs[name] for name in common}, 1 if conv1d else -1)
    spread = [name for name in common if len(mine[name]) == 3 and mine[name][1] == theirs[name][1]]
    if len(ends) < 2 and spread:  # one size alone is that of patches before they become tokens
        return evenly(blocks(teacher, spread) or spread)
    if ends:
        return ends[-MOST:]
    answer = list(theirs.values())[-1:]
    hidden = [name for name in common if len(mine[name]) == 2 and [theirs[name]] != answer]
    return tuple(hidden[-MOST:]) if flat else ()


def stage_ends(shapes: Mapping[str, torch.Size], tokens: int) -> tuple[str, ...]:
    """The last module of each spatial size, as far out as it can be found, in the order in which they end."""
    sizes: dict[tuple[int, ...], list[str]] = {}
    for name, shape in shapes.items():
        axis = channel_axis(shape, tokens) % len(shape)
        if len(shape) == 4 or (len(shape) == 3 and axis == 1):
            size = tuple(length for place, length in enumerate(shape) if place not in (0, axis))
            if max(size) > 1:
                sizes.setdefault(size, []).append(name)
    outermost = {size: min(name.count(".") for name in names) for size, names in sizes.items()}
    top = min(outermost.values(), default=0)
    found: list[str] = []
    for size, names in sizes.items():
        # a size that only inner parts have (heads of an attention, a gate) is no stage; and inner parts of the next
        # stage's first block still have this one's size
        if outermost[size] <= top + 2:
            found.append([name for name in names if name.count(".") <= outermost[size] + 1][-1])
    return tuple(name for name in shapes if name in found)


def blocks(network: nn.Module, names: Sequence[str]) -> list[str]:
    """Those of `names` that are repeated blocks: siblings of one class that have parts, nearest to the root."""
    siblings: dict[tuple[int, str, type], list[str]] = {}
    for name in names:
        part = network.get_submodule(name)
        if next(part.children(), None) is not None:
            siblings.setdefault((name.count("."), name.rpartition(".")[0], type(part)), []).append(name)
    repeated = [(key[0], found) for key, found in siblings.items() if len(found) > 1]
    return min(repeated, key=lambda item: (item[0], -len(item[1])))[1] if repeated else []


def evenly(names: Sequence[str]) -> tuple[str, ...]:
    """At most `MOST` of `names`, evenly spaced, the last among them."""
    count = min(MOST, len(names))
    return tuple(names[(place + 1) * len(names) // count - 1] for place in range(count))


def _watch(part: nn.Module, place: str, seen: dict[str, Tensor], *, into: bool) -> Any:
    if into:
        return part.register_forward_pre_hook(lambda _module, inputs: seen.__setitem__(place, inputs[0]))

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        found = first(output)
        assert found is not None, f"{place} gives no tensor any more"
        seen[place] = found

    return part.register_forward_hook(keep)


def _key(place: str) -> str:
    """A place as a ModuleDict's key, which may hold no dot."""
    return place.replace(".", "/")
