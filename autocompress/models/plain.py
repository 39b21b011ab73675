"""A stranger's module as a plain one: wrappers off, weights that layers compute from others computed once, float32."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedBuffer, is_lazy
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from autocompress.models.trace import examples, still
from autocompress.models.weights import fill
from autocompress.tasks import InputSpec
from autocompress.types import UserError

GIVEN = "_as_given"  # of a folded layer: itself before, which its trainer's files fill
READERS = ("torch.nn.utils.parametrizations", "torch.nn.utils.spectral_norm")
LEARN = (_ConvNd, nn.Linear, _NormBase, nn.GroupNorm, nn.LayerNorm)


class Given:
    """A layer as it was given, beside the folded one and no part of it: it is not written, and stays here."""

    def __init__(self, layer: nn.Module | None) -> None:
        self.layer = layer

    def __deepcopy__(self, memo: dict[int, Any]) -> Given:
        """Shared, since it is only read."""
        return self

    def __reduce__(self) -> tuple[type[Given], tuple[None]]:
        """Left behind: classes that torch makes for parametrized layers cannot be pickled."""
        return Given, (None,)


def plain(module: nn.Module, spec: InputSpec, name: str) -> nn.Module:
    """The network that ops can act on, of `module` and in its place; returns it, or what it was wrapped around.

    Wrappers of DataParallel, DistributedDataParallel and torch.compile come off; lazy layers get their shapes from one
    run on `spec`; weight and spectral norm, other parametrizations and masks of `torch.nn.utils.prune` are computed
    once; all becomes float32; convolutions, linear layers and norms learn also where they were frozen, since what a
    candidate loses comes back by training. Raises UserError for TorchScript, and for lazy layers that cannot run.
    """
    module = unwrapped(module)
    for part in module.modules():
        for key, child in list(part._modules.items()):
            if child is not None:
                part._modules[key] = unwrapped(child)
        if part._compiled_call_impl is not None:  # of module.compile()
            part._compiled_call_impl = None
    _no_script(module, name)
    if any(is_lazy(one) for one in (*module.parameters(), *module.buffers())):
        _materialise(module, spec, name)
    for part in list(module.modules()):
        if _computed(part):
            given = copied(part)
            fold(part)
            part.__dict__[GIVEN] = Given(given.eval())
    for part in module.modules():
        if isinstance(part, LEARN):
            part.requires_grad_(True)
    return module.float()


def copied(module: nn.Module) -> nn.Module:
    """A deep copy, also of layers that torch's own refuses: after a forward with `weight_norm`, lazy ones."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for one in (*part.__dict__.values(), *part._buffers.values()):
            if isinstance(one, UninitializedBuffer):
                kind: Any = UninitializedBuffer  # torch's annotation lacks its arguments
                memo[id(one)] = kind(device=one.device, dtype=one.dtype)
            elif isinstance(one, Tensor) and not one.is_leaf:
                memo[id(one)] = one.detach().clone()
    return copy.deepcopy(module, memo)


def as_folded(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict saved before `plain` folded layers by the names after it; other tensors as they are."""
    found = dict(tensors)
    for name, part in module.named_modules():
        given = part.__dict__.get(GIVEN, Given(None)).layer
        if given is None:
            continue
        prefix = f"{name}." if name else ""
        wanted = given.state_dict()
        if any(getattr(found.get(prefix + key), "shape", None) != tensor.shape for key, tensor in wanted.items()):
            continue  # folded already, or another network's, which is said where names are compared
        filled = copied(given)
        fill(filled, {key: found.pop(prefix + key) for key in wanted})
        found |= {prefix + key: tensor for key, tensor in fold(filled).state_dict().items()}
    return found


def fold(part: nn.Module) -> nn.Module:
    """Compute a layer's weights, as in inference, once and for all; in place."""
    mode = part.training
    part.eval()  # spectral norm goes on with its power iteration in training
    if parametrize.is_parametrized(part):
        _unparametrized(part)
    for hook in list(_hooks(part)):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(part, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(part, hook.name)
        else:
            prune.remove(part, hook._tensor_name)
    for key, other in list(part._load_state_dict_pre_hooks.items()):
        # what read the old names; torch (up to 2.13) leaves it behind, to miss what has been removed
        if getattr(getattr(other, "hook", other), "__module__", "") in READERS:
            del part._load_state_dict_pre_hooks[key]
    return part.train(mode)


def _unparametrized(part: nn.Module) -> None:
    """As `parametrize.remove_parametrizations`, which takes the tensor from copies too: they share a class with it."""
    sources = dict(part.get_submodule("parametrizations").named_children())
    computed = {key: getattr(part, key).detach().clone() for key in sources}
    learned = {key: any(True for _ in source.parameters()) for key, source in sources.items()}
    del part.parametrizations
    part.__class__ = type(part).__bases__[0]
    for key, tensor in computed.items():
        if learned[key]:
            part.register_parameter(key, nn.Parameter(tensor))
        else:
            part.register_buffer(key, tensor)


def _computed(part: nn.Module) -> bool:
    return parametrize.is_parametrized(part) or any(True for _ in _hooks(part))


def _hooks(part: nn.Module) -> Iterator[Any]:
    """What computes a weight before every forward."""
    return (
        hook
        for hook in part._forward_pre_hooks.values()
        if isinstance(hook, WeightNorm | SpectralNorm | prune.BasePruningMethod)
    )


def unwrapped(module: nn.Module) -> nn.Module:
    """Without what DataParallel, DistributedDataParallel and torch.compile put around a module."""
    while True:
        if isinstance(module, nn.DataParallel | DistributedDataParallel):
            module = module.module
        elif type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules:
            module = module.get_submodule("_orig_mod")  # its class is behind an import of seconds
        else:
            return module


def _no_script(module: nn.Module, name: str) -> None:
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            where = f"its {path}" if path else "it"
            raise UserError(
                f"model {name}: {where} is TorchScript, in which nothing can be changed; "
                "give the nn.Module that it was made from, and its weights"
            )


def _materialise(module: nn.Module, spec: InputSpec, name: str) -> None:
    try:
        with still(module):
            module(*examples(spec, 2))
    except Exception as error:  # a stranger's forward may raise anything
        raise UserError(
            f"model {name}: its lazy layers cannot get their shapes from the task's input "
            f"{', '.join(str(one.shape) for one in spec.every)}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
