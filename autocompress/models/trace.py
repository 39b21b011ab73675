"""What a module consists of, found by running it: sites, multiply-adds, parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import thop
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autocompress.models.calls import idle
from autocompress.models.compact import forms
from autocompress.models.groups import is_depthwise, makes_channels
from autocompress.models.proof import prunable
from autocompress.tasks import InputSpec, batch_size, several
from autocompress.types import Site


def examples(spec: InputSpec, size: int = 1) -> tuple[Tensor, ...]:
    """Inputs of the right shapes and types, one tensor (size, ...) each: zeros, ones where they are integers."""
    kinds = [getattr(torch, one.dtype) for one in spec.every]
    return tuple(
        torch.full((size, *one.shape), 0 if kind.is_floating_point else 1, dtype=kind)
        for one, kind in zip(spec.every, kinds, strict=True)
    )


@contextmanager
def still(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, every submodule's mode restored afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Parameters without gradients: FlopCounterMode cannot take one that is a module's input (torch 2.13)."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def is_leaf(module: nn.Module) -> bool:
    """A layer that ops act on: Conv2d or Linear."""
    return isinstance(module, nn.Conv2d | nn.Linear)


def leaves(module: nn.Module, site: str) -> tuple[str, ...]:
    """Names of the convolutions and linear layers at `site` or under it; "." is the whole network."""
    return tuple(
        name
        for name, part in module.named_modules()
        if is_leaf(part) and (site in (".", name) or name.startswith(f"{site}."))
    )


def _order(module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, int]:
    """Layers that make channels, in the order the forward pass reaches them, with their multiply-adds for `inputs`.

    As torch's FlopCounterMode counts them, whose import takes longer than all of this.
    """
    reached: dict[str, int] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def add(layer: nn.Module, given: Any, output: Any) -> None:
            counted = given[0] if getattr(layer, "transposed", False) and given else output
            weight = layer.weight
            each = weight[0].numel() if isinstance(weight, Tensor) and not isinstance(layer, nn.Embedding) else 0
            reached[name] = reached.get(name, 0) + (counted.numel() * each if isinstance(counted, Tensor) else 0)

        return add

    hooks = [part.register_forward_hook(note(name)) for name, part in module.named_modules() if makes_channels(part)]
    try:
        with still(module):
            try:
                with idle(module):
                    module(*inputs)
            except Exception:  # noqa: BLE001  a stranger's network may need true values
                reached.clear()
                module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return reached


def sites(module: nn.Module, example: Tensor | tuple[Tensor, ...]) -> tuple[Site, ...]:
    """The places a policy can speak of, from input to output. `example` is one batch (N, ...); MACs are per example.

    `prune` is among a site's ops where it is the first producer of its coupled group, `lowrank` where it has no groups,
    `replace` where a dense k x k convolution has a cheaper form.
    """
    reached = _order(module, several(example))
    cuts = prunable(module, example)
    found: list[Site] = []
    for position, (name, macs) in enumerate(reached.items()):
        layer = module.get_submodule(name)
        parameters = sum(parameter.numel() for parameter in layer.parameters())
        compact = forms(layer)
        kind, inputs, outputs, kernel = _kind(layer)
        ops = [
            *(["replace"] if compact else []),
            *(["prune"] if name in cuts.roots else []),
            *(["lowrank"] if kind in ("conv", "linear") and not isinstance(layer, nn.Conv3d) else []),
            *(["sparsify", "qat", "quantize", "store"] if is_leaf(layer) else []),
        ]
        if not ops:
            continue
        found.append(
            Site(
                name=name or ".",
                kind=kind,
                ops=tuple(ops),
                parameters=parameters,
                macs=macs // batch_size(example),
                in_channels=inputs,
                out_channels=outputs,
                kernel=kernel,
                depth=position / max(len(reached) - 1, 1),
                choices={"replace": ("keep", *compact)} if compact else {},
            )
        )
    return tuple(found)


def _kind(layer: nn.Module) -> tuple[str, int, int, int]:
    """What a layer is, its channels in and out, its largest kernel."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        kinds = {"depthwise": is_depthwise(layer), "transposed": layer.transposed, "grouped": layer.groups > 1}
        kind = next((kind for kind, is_so in kinds.items() if is_so), "conv")
        return kind, layer.in_channels, layer.out_channels, max(layer.kernel_size)
    if isinstance(layer, nn.Embedding):
        return "embedding", layer.num_embeddings, layer.embedding_dim, 1
    assert isinstance(layer, nn.Linear)
    return "linear", layer.in_features, layer.out_features, 1


def count(module: nn.Module, example: Tensor | tuple[Tensor, ...]) -> tuple[int, int]:
    """(multiply-adds per example, parameters) by torch's FlopCounterMode: convolutions and matrix products."""
    with still(module), frozen(module), FlopCounterMode(display=False) as counter:
        module(*several(example))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return counter.get_total_flops() // 2 // batch_size(example), parameters


def thop_count(module: nn.Module, example: Tensor | tuple[Tensor, ...]) -> tuple[int, int]:
    """(multiply-adds per example, parameters) by thop, which also counts batch norm, pooling and the like.

    On convolutional networks its multiply-adds are up to 1 % above those of `count` (dense) or 6 % (separable).
    """
    copied = copy.deepcopy(module)  # thop leaves buffers behind
    with torch.no_grad():
        macs, parameters = thop.profile(copied, inputs=several(example), verbose=False)  # type: ignore[misc]
    return round(macs / batch_size(example)), round(parameters)
