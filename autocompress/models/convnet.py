"""Builder `convnet`: a stem, stages of blocks with two convolution slots, a linear head; weights are inherited."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import nn

from autocompress.models.blocks import CELL, KINDS, Network, Stage
from autocompress.models.inheritance import hand_down
from autocompress.models.trace import sites as trace_sites
from autocompress.types import Arch, Choice, Site, UserError

PARENT: Mapping[str, Choice] = {
    "resolution": 16,
    **{f"depth.{stage}": 2 for stage in range(3)},
    **{f"width.{stage}": width for stage, width in enumerate((64, 128, 192))},
    **{f"kernel.{stage}": 3 for stage in range(3)},
    **{f"kind.{stage}": "residual" for stage in range(3)},
}
"""The parent's choices: 91 million multiply-adds at 16 x 16."""


def _shares(value: int, unit: int, shares: Sequence[float]) -> list[int]:
    """Shares of a number as multiples of `unit`, falling."""
    found = dict.fromkeys(round(value * share / unit) * unit for share in shares)
    return [one for one in found if 0 < one < value]


SMALLER: Mapping[str, Callable[[int], Sequence[int]]] = {
    "resolution": lambda value: _shares(value, 4, (0.875, 0.75, 0.5)),
    "depth": lambda value: range(value - 1, 0, -1),
    "width": lambda value: _shares(value, CELL, (0.75, 0.5, 0.25)),
    "kernel": lambda value: range(value - 2, 0, -2),
}
"""By the first part of a knob's name: what a derived space offers below its value."""


class ConvNet:
    """Networks of `resolution`, and per stage S `depth.S`, `width.S`, `kernel.S` and `kind.S`.

    `kind` is plain, residual, separable (depthwise and 1x1) or shuffle (channel shuffle and grouped convolution); all
    but plain have shortcuts. `arch` replaces choices of the parent. Input (N, in_channels, *size), output (N, classes).
    """

    name = "convnet"

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 10,
        size: tuple[int, int] = (8, 8),
        arch: Arch | None = None,
    ) -> None:
        self.in_channels = in_channels
        self.classes = classes
        self.size = size
        self.knobs: dict[str, Choice] = dict(PARENT)
        self.knobs = self._full(arch or {})
        self._stages(self.knobs)

    def choices(self) -> Mapping[str, tuple[Choice, ...]]:
        """What each knob may be in a derived space, the parent's own first: nothing above it, and the other kinds."""
        found: dict[str, tuple[Choice, ...]] = {}
        for knob, value in self.knobs.items():
            what, stage = knob.partition(".")[::2]
            if isinstance(value, int):
                found[knob] = (value, *SMALLER[what](value))
            else:  # a shuffle's groups ask for whole cells in this stage and in the one before
                near = [int(self.knobs[f"width.{n}"]) for n in {max(int(stage) - 1, 0), int(stage)}]
                kinds = [kind for kind in KINDS if kind != "shuffle" or not any(width % CELL for width in near)]
                found[knob] = (value, *(kind for kind in kinds if kind != value))
        return found

    def build(self, arch: Arch) -> nn.Module:
        """An untrained Network. Missing knobs take the parent's choice; raises UserError for unknown or bad ones."""
        full = self._full(arch)
        stages = self._stages(full)
        return Network(self.in_channels, self.classes, self.size, int(full["resolution"]), stages)

    def sites(self) -> tuple[Site, ...]:
        """Convolutions and linear layers of the parent, from input to output, with the arch choices they need."""
        return self._sites

    def inherit(self, child: nn.Module, parent: nn.Module, arch: Arch) -> None:
        """Fill `child = build(arch)` in place with the parent's weights, as well as they fit.

        Raises UserError where `child` or `parent` is not a network of this family or `child` is not what `arch` says.
        """
        if not isinstance(child, Network) or not isinstance(parent, Network):
            wrong = type(child if not isinstance(child, Network) else parent).__name__
            raise UserError(f"builder convnet: cannot inherit to or from a {wrong}; build both with this builder")
        widths = [stage.width for stage in self._stages(self._full(arch)).values()]
        found = [stage[0].bn2.num_features for stage in child.stages]  # type: ignore[index]
        if found != widths:
            raise UserError(f"builder convnet: the child has widths {found}, not {widths}; build it from `arch`")
        hand_down(child, parent)

    @cached_property
    def _sites(self) -> tuple[Site, ...]:
        with torch.random.fork_rng(devices=[]):  # sites do not depend on weights, and asking must not move the seed
            parent = self.build({})
        found = trace_sites(parent, torch.zeros(1, self.in_channels, *self.size))
        return tuple(site.model_copy(update={"when": self._when(site)}) for site in found)

    def _when(self, site: Site) -> dict[str, tuple[Choice, ...]]:
        """A block exists if its stage is deep enough; a projection also needs a kind with shortcuts."""
        parts = site.name.split(".")
        if parts[0] != "stages":
            return {}
        stage, block = int(parts[1]), int(parts[2])
        deepest = int(self.knobs[f"depth.{stage}"])
        conditions: dict[str, tuple[Choice, ...]] = {}
        if block:
            conditions[f"depth.{stage}"] = tuple(range(block + 1, deepest + 1))
        if parts[3] == "shortcut":
            conditions[f"kind.{stage}"] = tuple(kind for kind in KINDS if kind != "plain")
        return conditions

    def _full(self, arch: Arch) -> dict[str, Choice]:
        unknown = [knob for knob in arch if knob not in self.knobs]
        if unknown:
            raise UserError(f"builder convnet: unknown knob {unknown[0]!r}; known are {', '.join(self.knobs)}")
        return {**self.knobs, **arch}

    def _stages(self, full: Mapping[str, Choice]) -> dict[int, Stage]:
        """Check every value; raises UserError naming knob and value."""
        count = sum(knob.startswith("depth.") for knob in full)
        smallest = 2 ** (count - 1)
        _whole(full, "resolution", smallest, 1024)
        stages: dict[int, Stage] = {}
        for number in range(count):
            kind = full[f"kind.{number}"]
            if kind not in KINDS:
                raise UserError(f"builder convnet: kind.{number} = {kind!r}; choose one of {', '.join(KINDS)}")
            kernel = _whole(full, f"kernel.{number}", 1, 11)
            if kernel % 2 == 0:
                raise UserError(f"builder convnet: kernel.{number} = {kernel}; choose an odd number")
            depth = _whole(full, f"depth.{number}", 1, 32)
            width = _whole(full, f"width.{number}", 1, 8192)
            stages[number] = Stage(depth, width, kernel, str(kind), stride=1 if number == 0 else 2)
        for number, stage in stages.items():
            for near in {max(number - 1, 0), number}:
                if stage.kind == "shuffle" and stages[near].width % CELL:
                    raise UserError(
                        f"builder convnet: kind.{number} = 'shuffle' needs width.{near} to be a multiple of {CELL}, "
                        f"not {stages[near].width}"
                    )
        return stages


def _whole(full: Mapping[str, Choice], knob: str, low: int, high: int) -> int:
    value = full[knob]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UserError(f"builder convnet: {knob} = {value!r}; choose a whole number from {low} to {high}")
    return value
