"""Residual blocks of a stranger's network: with its weights at zero such a block gives back what comes in."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from autocompress.models.calls import Call, idle, watch
from autocompress.models.merging import Chain, chain
from autocompress.models.trace import is_leaf, still
from autocompress.types import Site

CLOSE = 1e-4
"""Largest difference, relative to the largest input, that still counts as giving it back."""


def blocks(module: nn.Module, example: tuple[Tensor, ...]) -> tuple[Site, ...]:
    """Sites of the innermost residual blocks, by depth; `example` is one batch (N, ...) of inputs of the right shape.

    A block is called once, its main input and output have one shape, and with all weights at zero it gives back what
    arrives there when the network sees random normal images. Behind a layer norm it need give it back normalised
    only (BERT's layers). A block with weights besides one inner block stands beside it (BERT's layer and attention).
    """
    weighty = {
        name: part
        for name, part in module.named_modules()
        if name and not is_leaf(part) and any(parameter.ndim > 1 for parameter in part.parameters())
    }
    several = any(isinstance(part, _BatchNorm) for part in module.modules())
    inputs = tuple(_informative(one, 2 if several else 1, number) for number, one in enumerate(example))
    try:
        with _batch_statistics(module):
            seen = watch(module, inputs, weighty)
    except Exception:  # noqa: BLE001  a stranger's network may take no noise or no two samples: then what it does take
        inputs = example
        with still(module):
            seen = watch(module, inputs, weighty)
    size, last = len(inputs[0]), max(len(seen.leaves) - 1, 1)
    found: dict[str, Site] = {}
    with still(module):
        for name in reversed(weighty):  # inner ones come after the modules that hold them
            calls = seen.calls.get(name, ())
            if len(calls) != 1 or name in seen.odd or not _may_hold(module, name, found):
                continue
            call, part = calls[0], weighty[name]
            if call.form < 0 or call.shape != tuple(call.x.shape) or not gives_back(part, call):
                continue
            merges = isinstance(chain(part, call.again, call.x), Chain)
            found[name] = Site(
                name=name,
                kind="block",
                ops=("block",),
                parameters=sum(parameter.numel() for parameter in part.parameters()),
                macs=sum(macs for leaf, macs in seen.macs.items() if leaf.startswith(f"{name}.")) // size,
                in_channels=_channels(call.x),
                out_channels=_channels(call.x),
                depth=min(call.before / last, 1.0),
                choices={"block": ("keep", "drop", *(["merge"] if merges else []))},
            )
    return tuple(sorted(found.values(), key=lambda site: (site.depth, len(site.name))))


def gives_back(block: nn.Module, call: Call) -> bool:
    """True where the block with zero weights answers with its main input, or with that input normalised."""
    x = call.x
    if not bool(x.any()):
        return False  # an input of nothing shows nothing
    state: dict[str, Tensor] = {}
    for prefix, part in block.named_modules():
        norm = isinstance(part, nn.LayerNorm)
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if isinstance(tensor, nn.Parameter) or name in ("weight", "bias", "running_mean"):
                value = 1.0 if norm and name == "weight" else 0.0
                state[f"{prefix}.{name}" if prefix else name] = tensor.new_full((), value).expand(tensor.shape)
    try:
        with idle(block):
            answer = call.again(lambda *args, **named: functional_call(block, state, args, named))
    except Exception:  # noqa: BLE001  a stranger's module may refuse such weights in any way: then it is no block
        return False
    if answer.shape != x.shape:
        return False
    scale = float(x.abs().max())
    if float((answer - x).abs().max()) <= CLOSE * scale:
        return True
    if not any(isinstance(part, nn.LayerNorm) for part in block.modules()):
        return False
    normal = functional.layer_norm(x, x.shape[-1:])
    return float((answer - normal).abs().max()) <= 100 * CLOSE * float(normal.abs().max())


def _may_hold(module: nn.Module, name: str, found: Collection[str]) -> bool:
    """True where `name` holds no block, or weights besides the only one."""
    inner = [other for other in found if other.startswith(f"{name}.")]
    outermost = [one for one in inner if not any(one.startswith(f"{other}.") for other in inner)]
    if not outermost:
        return True
    if len(outermost) > 1:
        return False
    inside = {id(parameter) for parameter in module.get_submodule(outermost[0]).parameters()}
    return any(p.ndim > 1 and id(p) not in inside for p in module.get_submodule(name).parameters())


def _channels(x: Tensor) -> int:
    return x.shape[1] if x.ndim == 4 else x.shape[-1]


def _informative(example: Tensor, size: int, number: int) -> Tensor:
    """Normal noise (size, ...) where the input is an image or the like; integers stay what they are."""
    if not example.is_floating_point():
        return torch.cat([example[:1]] * size)
    generator = torch.Generator().manual_seed(number)
    return torch.randn(size, *example.shape[1:], generator=generator).to(example.dtype)


@contextmanager
def _batch_statistics(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, but batch norm takes the batch's own statistics and keeps none of them."""
    norms = [(part, part.track_running_stats) for part in module.modules() if isinstance(part, _BatchNorm)]
    with still(module):
        try:
            for norm, _ in norms:
                norm.training, norm.track_running_stats = True, False
            yield
        finally:
            for norm, tracked in norms:
                norm.track_running_stats = tracked
