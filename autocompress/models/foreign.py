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
from autocompress.models.residual import blocks
from autocompress.models.trace import examples, sites, still
from autocompress.tasks import InputSpec
from autocompress.types import Arch, Choice, Site, UserError


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
        kind = type(module)
        return cls(f"{kind.__module__}:{kind.__qualname__}", Copy(module), spec)

    @property
    def knobs(self) -> Mapping[str, Choice]:
        """`resolution` in pixels, if the network can be fed smaller images."""
        return self._knobs

    @cached_property
    def _knobs(self) -> dict[str, Choice]:
        shape = self.spec.shape
        if self.spec.others or len(shape) != 3 or shape[1] != shape[2] or shape[1] < 16:
            return {}
        smaller = self.spec.model_copy(update={"shape": (shape[0], shape[1] // 2, shape[1] // 2)})
        try:
            with still(self._parent):
                self._parent(*examples(smaller))
        except Exception:  # noqa: BLE001  whatever it raises: it does not take other sizes
            return {}
        return {"resolution": shape[1]}

    def build(self, arch: Arch) -> nn.Module:
        """The network as its function makes it. Raises UserError if that fails, or for unknown knobs."""
        if unknown := [knob for knob in arch if knob != "resolution"]:
            known = ", ".join(self.knobs) or "none"
            raise UserError(f"builder {self.name}: unknown knob {unknown[0]!r}; it has {known}")
        try:
            module = self.make()
        except UserError:
            raise
        except Exception as error:  # a stranger's function may raise anything
            raise UserError(f"model {self.name}: cannot be made: {type(error).__name__}: {_line(error)}") from error
        if not isinstance(module, nn.Module):
            raise UserError(f"model {self.name}: gives a {type(module).__name__}, not an nn.Module")
        module = unfold(module)
        module.register_forward_hook(answer)
        size = arch.get("resolution", self.spec.shape[-1] if self.spec.shape else 0)
        if "resolution" in arch and size != self.spec.shape[-1]:
            module.register_forward_pre_hook(Resize(int(size)))
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
            with still(parent):
                parent(*examples(self.spec))
        except Exception as error:  # a stranger's forward may raise anything
            shapes = ", ".join(str(one.shape) for one in self.spec.every)
            raise UserError(
                f"model {self.name}: does not run on the task's input {shapes}: {type(error).__name__}: {_line(error)}"
            ) from error
        found = [*blocks(parent, examples(self.spec)), *sites(parent, examples(self.spec))]
        return tuple(sorted(found, key=lambda site: site.depth))

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
        raise UserError(f"model {type(module).__name__}: answers with a {type(outputs).__name__} that holds no tensor")
    return tensors[0] if len(tensors) == 1 else tensors


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
