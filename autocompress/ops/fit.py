"""Least squares for ops: what a layer reads on calibration data, as second moments; ridge solutions from them.

A convolution's rows are patches (channel, kernel row, kernel column) at sampled positions, a linear layer's rows are
its inputs. Everything is streamed: rows are made for one batch, added up in double precision, and forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocompress.models.trace import still
from autocompress.tasks import InputSpec, Task, batch_size, several

IMAGES = 256
"""Calibration examples of a fit, where one has at most `PIXELS` values; fewer of larger ones."""
PIXELS = 3 * 64 * 64
FEWEST = 32
ROWS = 4096
"""Sampled rows per layer."""
BATCH = 32
HELD = 256 * 2**20
"""Bytes of moments that one pass over the calibration data fills."""
RIDGE = 1e-4
"""Of the mean of the diagonal: enough to keep a fit from reading noise, too little to show in its error."""


class Moments:
    """Sums over `count` rows of x (inputs of length d) and y (outputs of length o), in double precision.

    `xx` (d, d), `xy` (d, o), `yy` (o,): sums of squares, `x` (d,) and `y` (o,): sums.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        self.xx = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.xy = torch.zeros(inputs, outputs, dtype=torch.float64)
        self.yy = torch.zeros(outputs, dtype=torch.float64)
        self.x = torch.zeros(inputs, dtype=torch.float64)
        self.y = torch.zeros(outputs, dtype=torch.float64)
        self.count = 0

    def add(self, rows: Tensor, targets: Tensor | None = None) -> None:
        """More rows (n, d), with their outputs (n, o) unless `explain` is to find them."""
        self.xx += rows.T @ rows
        self.x += rows.sum(0)
        self.count += len(rows)
        if targets is not None:
            self.xy += rows.T @ targets
            self.yy += targets.double().square().sum(0)
            self.y += targets.sum(0)

    def explain(self, weight: Tensor, bias: Tensor | None) -> None:
        """Outputs of a linear map (o, d) that holds exactly, without looking at any row again."""
        weight = weight.double()
        shift = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
        mapped, summed = self.xx @ weight.T, weight @ self.x
        self.xy = mapped + self.x[:, None] * shift
        self.yy = (weight.T * mapped).sum(0) + 2 * shift * summed + self.count * shift**2
        self.y = summed + self.count * shift

    def centred(self) -> Centred:
        """The same about the means: what a map with a bias has to explain."""
        count = max(self.count, 1)
        mean, answer = self.x / count, self.y / count
        return Centred(
            self.xx - count * mean[:, None] * mean,
            self.xy - count * mean[:, None] * answer,
            float((self.yy - count * answer**2).clamp_min(0).sum()),
            mean,
            answer,
        )


class Centred(NamedTuple):
    """Second moments about the means: `xx` (d, d), `xy` (d, o), `yy` summed over outputs; `x` and `y` are means."""

    xx: Tensor
    xy: Tensor
    yy: float
    x: Tensor
    y: Tensor

    @property
    def speaks(self) -> bool:
        """True where there is something to fit: outputs vary, and are numbers."""
        return 0 < self.yy < float("inf")

    def error(self, weight: Tensor) -> float:
        """Share of the outputs' variance that the map (o, d) with its best bias leaves unexplained."""
        weight = weight.double()
        explained = (weight.float() @ self.xx.float()).double()  # good to a millionth, in half the time
        left = self.yy - 2 * float((weight.T * self.xy).sum()) + float((explained * weight).sum())
        return max(left, 0.0) / self.yy if self.yy > 0 else 0.0

    def bias(self, weight: Tensor) -> Tensor:
        """The best bias (o,) of the map (o, d)."""
        return self.y - weight.double() @ self.x


def ridge(xx: Tensor, xy: Tensor, prior: Tensor | None = None, *, strength: float = RIDGE) -> Tensor:
    """The map (o, d) that explains `xy` (d, o) best, drawn a little towards `prior` (o, d) or zero.

    Where data say nothing (a channel that is always zero, fewer rows than columns) the prior stands.
    """
    size = len(xx)
    lift = strength * float(xx.diagonal().mean())
    lift = lift if lift > 0 else 1.0  # no signal at all
    held = torch.zeros_like(xy) if prior is None else prior.T.double()
    for _ in range(6):
        normal = xx + lift * torch.eye(size, dtype=xx.dtype)
        factor, failed = torch.linalg.cholesky_ex(normal)
        if not int(failed):
            return torch.cholesky_solve(xy + lift * held, factor).T
        lift *= 10  # rounding has made it indefinite
    return held.T


def images_for(spec: InputSpec) -> int:
    """How many examples a fit reads: one large image has as many positions as many small ones."""
    values = 1
    for length in spec.shape:
        values *= length
    return min(IMAGES, max(FEWEST, IMAGES * PIXELS // max(values, 1)))


def plain(layer: nn.Module) -> bool:
    """A Conv2d or Linear that computes what its weight says: no subclass with a forward of its own."""
    return type(layer) in (nn.Conv2d, nn.Linear)


def patches(layer: nn.Conv2d, x: Tensor, chosen: Tensor, size: tuple[int, int]) -> Tensor:
    """Rows (p, channels * kh * kw) that a convolution reads for the output positions `chosen` (p,) of (n, *size)."""
    if any(layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    height, width = size
    image = chosen // (height * width)
    taps = []
    for axis, start in ((0, chosen // width % height), (1, chosen % width)):
        steps = torch.arange(layer.kernel_size[axis]) * layer.dilation[axis]
        taps.append(start[:, None] * layer.stride[axis] + steps)
    rows = x[image[:, None, None], :, taps[0][:, :, None], taps[1][:, None, :]]  # (p, kh, kw, channels)
    return rows.permute(0, 3, 1, 2).flatten(1)


def sample(total: int, wanted: int, seed: int) -> Tensor:
    """At most `wanted` of `total` positions, always the same for the same seed."""
    if wanted >= total:
        return torch.arange(total)
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:wanted]


def rows_of(layer: nn.Module, x: Tensor, output: Tensor, wanted: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sampled rows of a layer's inputs, (p, d), and the positions they stand for, as indices into the outputs."""
    if isinstance(layer, nn.Conv2d):
        x = x if x.ndim == 4 else x[None]
        size = (int(output.shape[-2]), int(output.shape[-1]))
        chosen = sample(len(x) * size[0] * size[1], wanted, seed)
        return patches(layer, x, chosen, size), chosen
    flat = x.reshape(-1, x.shape[-1])
    chosen = sample(len(flat), wanted, seed)
    return flat[chosen], chosen


def calibration(task: Task, images: int | None = None) -> Iterator[tuple[Any, ...]]:
    """Inputs of calibration batches, as tuples."""
    limit = images_for(task.input) if images is None else images
    for inputs, _ in task.batches("calibration", min(BATCH, limit), limit=limit):
        yield several(inputs)


def moments(
    module: nn.Module, names: Sequence[str], task: Task, *, images: int | None = None, rows: int = ROWS
) -> dict[str, Moments]:
    """Moments of the named layers (Linear, or Conv2d without groups) in evaluation mode, all in one pass.

    At most `rows` rows each, spread over `images` calibration examples. A layer that is never called has count 0.
    Memory is 8 d^2 bytes per layer: `each` goes by portions where that is too much.
    """
    found = _gather(module, names, task, images, rows)
    return {name: _settled(module.get_submodule(name), found[name]) for name in names}


def each(
    module: nn.Module, names: Sequence[str], task: Task, *, images: int | None = None, rows: int = ROWS
) -> Iterator[tuple[str, Moments]]:
    """`moments` layer by layer: as many passes over the data as the memory limit `HELD` asks for."""
    waiting = list(names)
    while waiting:
        held, count = 0, 0
        for name in waiting:
            width = module.get_submodule(name).get_parameter("weight")[0].numel()
            held += min(8 * width, 4 * rows) * width
            if count and held > HELD:
                break
            count += 1
        found = _gather(module, waiting[:count], task, images, rows)
        for name in islice(waiting, count):
            yield name, _settled(module.get_submodule(name), found.pop(name))
        waiting = waiting[count:]


def _gather(
    module: nn.Module, names: Sequence[str], task: Task, images: int | None, rows: int
) -> dict[str, Moments | list[Tensor]]:
    """One pass: sums, or the rows themselves where those take less memory."""
    limit = images_for(task.input) if images is None else images
    found: dict[str, Moments | list[Tensor]] = {}
    hooks = []
    seen = [0]  # examples before this batch
    for name in names:
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        assert not (isinstance(layer, nn.Conv2d) and layer.groups > 1), f"{name} has groups"
        width = layer.weight[0].numel()
        found[name] = [] if rows < 2 * width else Moments(width, layer.weight.shape[0])
        hooks.append(layer.register_forward_hook(_adding(found[name], seen, rows / limit)))
    try:
        with still(module):
            for inputs in calibration(task, limit):
                module(*inputs)
                seen[0] += batch_size(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _adding(held: Moments | list[Tensor], seen: list[int], share: float) -> Callable[[nn.Module, Any, Tensor], None]:
    def add(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        x = inputs[0].detach()
        wanted = max(1, round(share * len(x)))
        found = rows_of(layer, x, output, wanted, seen[0])[0]
        if isinstance(held, Moments):
            held.add(found)
        else:
            held.append(found)

    return add


def _settled(layer: nn.Module, held: Moments | list[Tensor]) -> Moments:
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    weight = layer.weight.detach().flatten(1)
    if isinstance(held, list):
        rows, held = held, Moments(weight.shape[1], weight.shape[0])
        if rows:
            every = torch.cat(rows)
            held.add(every, functional.linear(every, weight, None if layer.bias is None else layer.bias.detach()))
    else:
        held.explain(weight, None if layer.bias is None else layer.bias.detach())
    return held
