"""Model spaces of NNI 3's hub as builders: what the space leaves open are the knobs, a frozen sample is the network."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.models.foreign import Foreign
from autocompress.registry import optional
from autocompress.shelves import suggest
from autocompress.tasks import InputSpec
from autocompress.types import Arch, Choice, Site, TrialFailure, UserError
from autocompress.vision import import_torchvision

HUB = "nni.nas.hub.pytorch"
FINEST = 3  # values that a range of numbers is asked at


class NniSpace:
    """A space of `nni.nas.hub.pytorch` by name. `options` are its constructor's, input and output are the task's.

    The parent has the largest choice of everything: widths, depths, the candidate layer with most parameters. Where
    a choice is of several things (the inputs of a cell's node) its value is what is chosen, joined by `+`.
    """

    def __init__(self, space: str, options: Mapping[str, Any], spec: InputSpec) -> None:
        self.name, self.space, self.options, self.spec = f"nni:{space}", space, dict(options), spec

    @property
    def knobs(self) -> Mapping[str, Choice]:
        """The parent's choices: what the space leaves open, and `resolution` where the network takes smaller images."""
        return {**self._parent, **self._whole.knobs}

    def choices(self) -> dict[str, tuple[Choice, ...]]:
        """What each knob may be, the parent's own first."""
        own = {
            knob: (self._parent[knob], *(one for one in values if one != self._parent[knob]))
            for knob, values in self._values.items()
        }
        return {**own, **self._whole.choices()}

    def build(self, arch: Arch) -> nn.Module:
        """The frozen sample. Raises UserError for a knob or a value that the space does not have.

        Raises TrialFailure for values that do not go together.
        """
        for knob, choice in arch.items():
            values = self._values.get(knob)
            if values is None and knob != "resolution":
                raise UserError(f"builder {self.name}: unknown knob {knob!r}; {suggest(knob, self.knobs)}")
            if values is not None and choice not in values:
                known = ", ".join(map(str, values))
                raise UserError(f"builder {self.name}: {knob} is one of {known}, not {choice!r}")
        own = {**self._parent, **{knob: choice for knob, choice in arch.items() if knob in self._values}}
        rest = {knob: choice for knob, choice in arch.items() if knob not in self._values}
        return Foreign(self.name, partial(self._frozen, own), self.spec).build(rest)

    def sites(self) -> tuple[Site, ...]:
        """Those of the parent; a smaller network lacks some of them."""
        return self._whole.sites()

    def inherit(self, child: nn.Module, parent: nn.Module, arch: Arch) -> None:  # noqa: ARG002  names and shapes say it
        """Copy what fits: the first channels, the middle of a kernel; what the parent lacks keeps its own numbers."""
        given = parent.state_dict()
        with torch.no_grad():
            for name, tensor in child.state_dict().items():
                if name in given and given[name].ndim == tensor.ndim:
                    into, where = _overlap(tensor, given[name])
                    tensor[into] = given[name][where]

    def __getstate__(self) -> dict[str, Any]:
        """What travels to workers: the space is made again there."""
        return {name: getattr(self, name) for name in ("name", "space", "options", "spec")}

    @cached_property
    def _whole(self) -> Foreign:
        return Foreign(self.name, partial(self._frozen, self._parent), self.spec)

    @cached_property
    def _space(self) -> Any:
        import_torchvision()  # which NNI imports
        with _quiet():
            hub = optional(HUB, f"model {self.name!r}")
            if self.space not in (known := [name for name in dir(hub) if _is_space(getattr(hub, name))]):
                raise UserError(f"NNI has no model space {self.space!r}; {suggest(self.space, known)}")
            with torch.random.fork_rng(devices=[]):  # some layers keep the weights that the space was made with
                torch.manual_seed(0)
                try:
                    return getattr(hub, self.space)(**self.options)
                except Exception as error:  # a space's constructor may raise anything
                    why = f"{type(error).__name__}: {_line(error)}"
                    raise UserError(f"model {self.name}: cannot be made: {why}") from error

    @cached_property
    def _values(self) -> dict[str, dict[Choice, Any]]:
        """Knob -> choice -> what NNI calls it."""
        return {knob: _values(f"{self.name}: {knob}", mutable) for knob, mutable in self._space.simplify().items()}

    @cached_property
    def _parent(self) -> dict[str, Choice]:
        """The largest choice of every knob."""
        sizes: dict[str, dict[Choice, int]] = {}
        for part in self._space.modules():
            if type(part).__name__ == "LayerChoice":
                sizes.setdefault(part.label, {name: _size(part[name]) for name in part.names})
        parent: dict[str, Choice] = {}
        joints = 0
        for knob, values in self._values.items():
            listed = list(values)
            if isinstance(values[listed[0]], list):
                # a cell's node reads what is just before it and, every second time, what the cell begins with
                parent[knob] = listed[0] if joints % 2 else listed[-1]
                joints += 1
            elif knob in sizes:
                parent[knob] = max(listed, key=lambda choice, size=sizes[knob]: size.get(choice, 0))
            else:
                numbers = all(isinstance(choice, int | float) for choice in listed)
                parent[knob] = max(listed, key=_number) if numbers else listed[0]
        return parent

    def _frozen(self, choices: Mapping[str, Choice]) -> nn.Module:
        """A network of its own: NNI hands some layers of the space on from sample to sample.

        Raises TrialFailure for a sample that NNI cannot freeze: not all combinations need make sense.
        """
        sample = {knob: self._values[knob][choice] for knob, choice in choices.items()}
        with _quiet():
            try:
                return copy.deepcopy(self._space.freeze(sample))
            except Exception as error:  # whatever a space's constructor raises
                why = f"{type(error).__name__}: {_line(error)}"
                raise TrialFailure(f"model {self.name}: NNI cannot freeze this sample: {why}") from error


def _is_space(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, nn.Module) and callable(getattr(found, "freeze", None))


def _values(what: str, mutable: Any) -> dict[Choice, Any]:
    """The choices of one of NNI's variables, by the name that they have here."""
    try:
        found = list(mutable.values) if _plain(mutable) else list(mutable.grid(granularity=FINEST))
    except (AttributeError, TypeError, NotImplementedError) as error:
        raise UserError(f"model {what} is a {type(mutable).__name__}, whose choices cannot be listed") from error
    return {_named(one): one for one in found}


def _plain(mutable: Any) -> bool:
    return type(mutable).__name__ == "Categorical"


def _named(value: Any) -> Choice:
    if isinstance(value, list | tuple):
        return _named(value[0]) if len(value) == 1 else "+".join(map(str, value))
    return value if isinstance(value, bool | int | float | str) else str(value)


def _number(choice: Choice) -> float:
    return float(choice)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _overlap(child: Tensor, parent: Tensor) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """What two tensors share, of each: beginnings of channels, middles of a convolution's kernel."""
    pairs = [
        _shared(one, other, centred=child.ndim == 4 and axis > 1)
        for axis, (one, other) in enumerate(zip(child.shape, parent.shape, strict=True))
    ]
    return tuple(into for into, _ in pairs), tuple(where for _, where in pairs)


def _shared(child: int, parent: int, *, centred: bool) -> tuple[slice, slice]:
    size = min(child, parent)
    into, where = ((child - size) // 2, (parent - size) // 2) if centred else (0, 0)
    return slice(into, into + size), slice(where, where + size)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of NNI 3.0, which is archived and full of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
