"""Any nn.Module as a builder: a stranger's network keeps its own names, its sites are found by running it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocompress.models.attention import unfold
from autocompress.models.calls import idle
from autocompress.models.plain import copied, plain, unwrapped
from autocompress.models.residual import blocks
from autocompress.models.trace import examples, sites, still
from autocompress.tasks import InputSpec, several
from autocompress.types import Arch, Choice, Site, TrialFailure, UserError

SMALLER = (0.875, 0.75, 0.625, 0.5)  # of the image's side: choices of resolution


class Foreign:
    """A network that a function (or an object's copy) gives. Input and output are the task's.

    Its only knob is `resolution`, where the input is a square image and the network takes smaller ones; blocks are
    dropped and layers replaced by ops, since a stranger's constructor has no arguments for that.
    """

    def __init__(self, name: str, make: Callable[[], nn.Module], spec: InputSpec) -> None:
        self.name, self.make, self.spec = name, make, spec

    @classmethod
    def of(cls, module: nn.Module, spec: InputSpec) -> Foreign:
        """The builder of a network that exists already; `build` gives copies with its weights."""
        kind = type(unwrapped(module))
        name = f"{kind.__module__}:{kind.__qualname__}"
        return cls(name, Copy(plain(copied(module), spec, name)), spec)

    @property
    def knobs(self) -> Mapping[str, Choice]:
        """`resolution` in pixels, if the network can be fed smaller images."""
        return {"resolution": self._sides[0]} if len(self._sides) > 1 else {}

    def choices(self) -> dict[str, tuple[Choice, ...]]:
        """What each knob may be, the parent's own first: resolutions with which the network gives as many answers."""
        return {"resolution": self._sides} if len(self._sides) > 1 else {}

    @cached_property
    def _sides(self) -> tuple[int, ...]:
        shape = self.spec.shape
        if self.spec.others or len(shape) != 3 or shape[1] != shape[2] or shape[1] < 16:
            return ()
        side, step = shape[1], 8 if shape[1] >= 64 else 4
        smaller = dict.fromkeys(round(side * share / step) * step for share in SMALLER)
        answers = {one: self._answers(one) for one in (side, *smaller) if one <= side}
        return tuple(one for one, found in answers.items() if found and found == answers[side])

    def _answers(self, side: int) -> list[tuple[int, ...]]:
        """Shapes of the outputs for a square image, none if the network does not take it."""
        one = self.spec.model_copy(update={"shape": (self.spec.shape[0], side, side)})
        try:
            with still(self._parent), idle(self._parent):
                return [tuple(output.shape) for output in several(self._parent(*examples(one)))]
        except Exception:  # noqa: BLE001  whatever it raises: it does not take other sizes
            return []

    def build(self, arch: Arch) -> nn.Module:
        """The network as its function makes it. Raises UserError if that fails, or for unknown knobs."""
        if unknown := [knob for knob in arch if knob != "resolution"]:
            known = ", ".join(self.knobs) or "none"
            raise UserError(f"builder {self.name}: unknown knob {unknown[0]!r}; it has {known}")
        try:
            module = self.make()
        except (UserError, TrialFailure):
            raise
        except Exception as error:  # a stranger's function may raise anything
            raise UserError(f"model {self.name}: cannot be made: {type(error).__name__}: {_line(error)}") from error
        if not isinstance(module, nn.Module):
            raise UserError(f"model {self.name}: gives a {type(module).__name__}, not an nn.Module")
        module = unfold(plain(module, self.spec, self.name))
        module.register_forward_hook(answer)
        side = self.spec.shape[-1] if self.spec.shape else 0
        size = arch.get("resolution", side)
        if size != side:
            if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= side:
                raise UserError(f"builder {self.name}: resolution {size!r} is no number of pixels up to {side}")
            module.register_forward_pre_hook(Resize(size))
        return module

    def sites(self) -> tuple[Site, ...]:
        """Convolutions, linear layers and residual blocks, from input to output. Raises UserError if it cannot run."""
        return self._sites

    def inherit(self, child: nn.Module, parent: nn.Module, arch: Arch) -> None:  # noqa: ARG002  same layers always
        """Copy all weights: no knob of a stranger's network changes a shape."""
        child.load_state_dict(parent.state_dict())

    @cached_property
    def _parent(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            return self.build({})

    @cached_property
    def _sites(self) -> tuple[Site, ...]:
        parent = self._parent
        try:
            with still(parent), idle(parent):
                parent(*examples(self.spec, 2))
        except Exception:  # noqa: BLE001  whatever it is, true values show it too or do without it
            self._explain(parent)
        try:
            found = [*blocks(parent, examples(self.spec)), *sites(parent, examples(self.spec))]
        except Exception:
            self._explain(parent)
            raise
        return tuple(sorted(found, key=lambda site: site.depth))

    def _explain(self, parent: nn.Module) -> None:
        """Say in words what is wrong with running it, if it is that."""
        shapes = ", ".join(str(one.shape) for one in self.spec.every)
        self._runs(parent, 1, f"does not run on the task's input {shapes}")
        self._runs(parent, 2, "runs on one sample but not on a batch of two; let it take any number")

    def _runs(self, parent: nn.Module, size: int, trouble: str) -> None:
        try:
            with still(parent):
                parent(*examples(self.spec, size))
        except (UserError, TrialFailure):  # says already what and where
            raise
        except Exception as error:  # a stranger's forward may raise anything
            raise UserError(f"model {self.name}: {trouble}: {type(error).__name__}: {_line(error)}") from error

    def __getstate__(self) -> dict[str, Any]:
        """What travels to workers: the tracing's network stays here."""
        return {name: value for name, value in self.__dict__.items() if name != "_parent"}


class Copy:
    """Gives copies of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self) -> nn.Module:
        """A copy with its weights."""
        return copy.deepcopy(self.module)


class Resize:
    """Forward pre-hook: images (n, c, h, w) to a smaller square before the network."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ARG002
        """Bilinear, as training pipelines resize."""
        images, *others = inputs
        return (functional.interpolate(images, size=(self.size, self.size), mode="bilinear"), *others)


def answer(module: nn.Module, inputs: Any, outputs: Any) -> Tensor | tuple[Tensor, ...]:  # noqa: ARG001  a hook
    """Forward hook: a tensor, or a tuple of tensors where the network has several answers.

    Of records with `logits` (Hugging Face, Inception in training) the logits; of mappings with `out` (torchvision's
    segmentation networks) that; of other mappings and tuples every tensor in order.
    """
    if isinstance(outputs, Tensor):
        return outputs
    given = type(outputs).__name__
    logits = getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(outputs, Mapping):
        for key in ("logits", "out"):
            if isinstance(outputs.get(key), Tensor):
                return outputs[key]
        outputs = tuple(outputs.values())
    tensors = tuple(one for one in outputs if isinstance(one, Tensor)) if isinstance(outputs, tuple | list) else ()
    if not tensors:
        raise UserError(f"model {type(module).__name__}: answers with a {given} that holds no tensor; return tensors")
    return tensors[0] if len(tensors) == 1 else tensors


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
