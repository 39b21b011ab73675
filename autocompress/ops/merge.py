"""Many convolutions into one: fitted to what a residual branch answers on calibration data.

After Fu et al. 2022 ("DepthShrinker", section 3) and Kim et al. 2024 ("LayerMerge"), who train the linearised branch
and multiply its kernels; here the one convolution is the least-squares solution, so that training starts from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autocompress.models.calls import main
from autocompress.models.merging import Chain
from autocompress.models.trace import still
from autocompress.ops.fit import HELD, IMAGES, RIDGE, Moments, calibration, images_for, patches, ridge, sample
from autocompress.tasks import Task, batch_size
from autocompress.types import Record, UserError

ROWS = 8192
"""Sampled rows per block: two merged blocks of CIFAR's ResNet-20 gain a point by twice the rows, up to 16384."""
WANTED = 2
"""Rows per column for which more examples are read."""
ENOUGH_ROWS = 4
"""Rows per column from which a fit needs no more than a trace of ridge."""
SHORT = 0.1
"""Ridge where there are fewer: two merged blocks keep 77 % instead of 53 % when rows are as many as columns."""
ENOUGH = 1.02
"""A smaller merged kernel is taken where its error is at most this many times that of the best."""


class Merged(Record):
    """`layer` becomes a dense convolution (inputs, outputs, kernel, stride), `silenced` parts become identities.

    Names are relative to the block. `was` are the weight shapes of the layer and the convolutions that fall silent.
    """

    kind: Literal["merge"] = "merge"
    block: str
    layer: str
    silenced: tuple[str, ...]
    inputs: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    was: dict[str, tuple[int, ...]]


def fit(
    module: nn.Module, chains: Mapping[str, Chain], task: Task
) -> Iterator[tuple[str, Merged | str, dict[str, float], dict[str, Tensor]]]:
    """Merged convolutions of `chains` by block, with what they reach and their weights.

    The target is what the last convolution answers in the network as it is; batch norm behind it stays.
    """
    waiting = list(chains)
    while waiting:
        held, portion = 0, []
        for site in waiting:
            held += 8 * _columns(chains[site]) ** 2
            if portion and held > HELD:
                break
            portion.append(site)
        waiting = waiting[len(portion) :]
        learned = {site: _Pair(module.get_submodule(site), chains[site]) for site in portion}
        limit = max(_examples(chains[site], task) for site in portion)
        with still(module):
            try:
                for pair in learned.values():
                    pair.listen(ROWS / limit)
                for inputs in calibration(task, limit):
                    module(*inputs)
                    for pair in learned.values():
                        pair.seen += batch_size(inputs)
            finally:
                for pair in learned.values():
                    pair.leave()
        for site in portion:
            yield site, *_solve(site, module.get_submodule(site), chains[site], learned.pop(site).moments)


def _columns(found: Chain) -> int:
    return found.inputs * max(found.kernels) ** 2


def _examples(found: Chain, task: Task) -> int:
    """Calibration examples that give enough positions for a fit of so many weights per output."""
    wanted = math.ceil(WANTED * _columns(found) / (found.size[0] * found.size[1]))
    return max(images_for(task.input), min(wanted, IMAGES))


def skeleton(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    """A dense convolution, not initialised, that keeps the middle: padding (kernel - 1) / 2."""
    made: Any = nn.utils.skip_init(nn.Conv2d, inputs, outputs, kernel, stride, (kernel - 1) // 2)
    return made


class _Pair:
    """Listens to a block's input and to the output of its last convolution."""

    def __init__(self, block: nn.Module, found: Chain) -> None:
        self.block, self.layer = block, block.get_submodule(found.layer)
        self.shape = skeleton(found.inputs, found.outputs, max(found.kernels), found.stride)
        self.moments = Moments(self.shape.weight[0].numel(), found.outputs)
        self.seen = 0
        self.hooks: list[Any] = []
        self.x: Tensor | None = None

    def listen(self, share: float) -> None:
        """Add `share` rows per example from now on."""

        def arrive(part: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:  # noqa: ARG001
            key = main(args, named)
            x = args[key] if isinstance(key, int) else named[str(key)]
            self.x = x.detach().clone()  # it may be changed in place before the last convolution answers

        def answer(part: nn.Module, args: Any, output: Tensor) -> None:  # noqa: ARG001
            assert self.x is not None
            size = (int(output.shape[-2]), int(output.shape[-1]))
            total = len(output) * size[0] * size[1]
            chosen = sample(total, max(1, round(share * len(output))), self.seen)
            targets = output.detach().permute(0, 2, 3, 1).flatten(0, 2)[chosen]
            self.moments.add(patches(self.shape, self.x, chosen, size), targets)
            self.x = None

        self.hooks.append(self.block.register_forward_pre_hook(arrive, with_kwargs=True))
        self.hooks.append(self.layer.register_forward_hook(answer))

    def leave(self) -> None:
        """Stop listening."""
        for hook in self.hooks:
            hook.remove()


def _solve(
    site: str, block: nn.Module, found: Chain, moments: Moments
) -> tuple[Merged | str, dict[str, float], dict[str, Tensor]]:
    layer = block.get_submodule(found.layer)
    assert isinstance(layer, nn.Conv2d)
    held = moments.centred()
    if not held.speaks:
        return "its branch answers with nothing but a constant on the calibration data", {}, {}
    largest = max(found.kernels)
    strength = RIDGE if moments.count >= ENOUGH_ROWS * _columns(found) else SHORT
    solved: dict[int, tuple[float, Tensor]] = {}
    for kernel in found.kernels:
        margin = (largest - kernel) // 2
        mask = torch.zeros(found.inputs, largest, largest, dtype=torch.bool)
        mask[:, margin : margin + kernel, margin : margin + kernel] = True
        inside = mask.flatten().nonzero().flatten()
        part = held._replace(xx=held.xx[inside][:, inside], xy=held.xy[inside], x=held.x[inside])
        weight = ridge(part.xx, part.xy, strength=strength)
        solved[kernel] = (part.error(weight), torch.cat([weight, part.bias(weight)[:, None]], 1))
    best = min(error for error, _ in solved.values())
    kernel = min(kernel for kernel, (error, _) in solved.items() if error <= ENOUGH * best)
    error, both = solved[kernel]
    plan = planned(site, block, found, kernel)
    weight = both[:, :-1].reshape(found.outputs, found.inputs, kernel, kernel)
    dtype = layer.weight.dtype
    weights = {f"{site}/merged.weight": weight.to(dtype).contiguous(), f"{site}/merged.bias": both[:, -1].to(dtype)}
    return plan, {"error": error, "macs": found.cost(kernel) / found.macs, "rows": float(moments.count)}, weights


def planned(site: str, block: nn.Module, found: Chain, kernel: int) -> Merged:
    """The change that merges a chain into a convolution of this kernel; nothing is fitted for that."""
    layer = block.get_submodule(found.layer)
    inner = {
        name: part for s in found.silenced for name, part in block.named_modules() if f"{name}.".startswith(f"{s}.")
    }
    convs = {name: part for name, part in {**inner, found.layer: layer}.items() if isinstance(part, nn.Conv2d)}
    return Merged(
        block=site,
        layer=found.layer,
        silenced=found.silenced,
        inputs=found.inputs,
        outputs=found.outputs,
        kernel=kernel,
        stride=found.stride,
        padding=(kernel - 1) // 2,
        was={name: tuple(part.weight.shape) for name, part in convs.items()},
    )


def load(conv: nn.Conv2d, site: str, tensors: Mapping[str, Tensor]) -> None:
    """Fill a merged convolution. Raises UserError where a tensor is missing or of another shape."""
    with torch.no_grad():
        for name, parameter in conv.named_parameters():
            key = f"{site}/merged.{name}"
            if key not in tensors:
                raise UserError(f"block at site {site}: tensor {key!r} is missing; give the receipt's own")
            if tensors[key].shape != parameter.shape:
                raise UserError(
                    f"block at site {site}: tensor {key!r} is {tuple(tensors[key].shape)}, "
                    f"not {tuple(parameter.shape)}; give the receipt's own tensors"
                )
            parameter.copy_(tensors[key])
