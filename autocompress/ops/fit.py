"""Least squares for ops: what a layer reads on calibration data, as second moments; ridge solutions from them.

A convolution's rows are patches (channel, kernel row, kernel column) at sampled positions, a linear layer's rows are
its inputs. Everything is streamed: rows are made for one batch, added up in double precision, and forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeVar

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
VALUES = 2**20
"""Values of a calibration batch: few large images at a time stay in the cache, and their activations in memory."""
HELD = 320 * 2**20
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
        self.count, self.moved = 0, False

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

    def about_mean(self) -> Tensor:
        """`xx` about the mean from now on, in place: two of a wide layer's would be too much memory."""
        if self.count and not self.moved:
            self.xx.addr_(self.x, self.x, alpha=-1 / self.count)
            self.moved = True
        return self.xx

    def centred(self) -> Centred:
        """The same about the means: what a map with a bias has to explain."""
        count = max(self.count, 1)
        mean, answer = self.x / count, self.y / count
        return Centred(
            torch.addr(self.xx, mean, mean, alpha=-count),
            torch.addr(self.xy, mean, answer, alpha=-count),
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

    def part(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """`xx` and `xy` of some inputs (m,): (m, m) and (m, o)."""
        return self.xx[columns[:, None], columns], self.xy[columns]

    def filtered(self, filters: Tensor) -> tuple[Tensor, Tensor]:
        """`xx` (c, c) and `xy` (c, o) of what filters (c, t) make of the taps of each channel, c * t = d."""
        channels, taps = filters.shape
        between = self.xx.reshape(channels, taps, channels, taps)
        found = torch.einsum("atbs,at,bs->ab", between, filters, filters)
        return found, torch.einsum("ato,at->ao", self.xy.reshape(channels, taps, -1), filters)

    def narrowed(self, into: Tensor) -> tuple[Tensor, Tensor]:
        """`xx` (a * t, a * t) and `xy` (a * t, o) of what a 1x1 convolution (a, c) makes of the channels."""
        few, channels = into.shape
        taps = len(self.xx) // channels
        between = self.xx.reshape(channels, taps, channels, taps)
        xx = torch.einsum("ac,ctds,bd->atbs", into, between, into).reshape(few * taps, -1)
        return xx, torch.einsum("ac,cto->ato", into, self.xy.reshape(channels, taps, -1)).reshape(few * taps, -1)


@dataclass(frozen=True)
class Sampled:
    """The same as `Centred`, from the rows (n, d) about their mean and their answers (n, o) about theirs.

    Where a layer reads more values than rows are sampled, its moments would be larger than these, and slower.
    """

    rows: Tensor
    answers: Tensor
    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, rows: Tensor, answers: Tensor) -> Sampled:
        """Of rows as they were read; both are changed."""
        x, y = rows.mean(0), answers.mean(0)
        return cls(rows.sub_(x), answers.sub_(y), x.double(), y.double())

    @cached_property
    def xx(self) -> Tensor:
        """(d, d)."""
        return self._moments(self.rows)[0]

    @cached_property
    def xy(self) -> Tensor:
        """(d, o)."""
        return (self.rows.T @ self.answers).double()

    @cached_property
    def yy(self) -> float:
        """Summed over outputs."""
        return float(self.answers.double().square().sum())

    @property
    def speaks(self) -> bool:
        """True where there is something to fit: outputs vary, and are numbers."""
        return 0 < self.yy < float("inf")

    def error(self, weight: Tensor) -> float:
        """Share of the outputs' variance that the map (o, d) with its best bias leaves unexplained."""
        left = functional.linear(self.rows, weight.to(self.rows.dtype)).sub_(self.answers)
        return float(left.double().square().sum()) / self.yy if self.yy > 0 else 0.0

    def bias(self, weight: Tensor) -> Tensor:
        """The best bias (o,) of the map (o, d)."""
        return self.y - weight.double() @ self.x

    def part(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """`xx` and `xy` of some inputs (m,)."""
        return self._moments(self.rows[:, columns])

    def filtered(self, filters: Tensor) -> tuple[Tensor, Tensor]:
        """`xx` and `xy` of what filters (c, t) make of the taps of each channel."""
        return self._moments(torch.einsum("nct,ct->nc", self._taps(len(filters)), filters.to(self.rows.dtype)))

    def narrowed(self, into: Tensor) -> tuple[Tensor, Tensor]:
        """`xx` and `xy` of what a 1x1 convolution (a, c) makes of the channels."""
        narrow = torch.einsum("ac,nct->nat", into.to(self.rows.dtype), self._taps(into.shape[1]))
        return self._moments(narrow.flatten(1))

    def _taps(self, channels: int) -> Tensor:
        return self.rows.reshape(len(self.rows), channels, -1)

    def _moments(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return (rows.T @ rows).double(), (rows.T @ self.answers).double()


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
    return min(IMAGES, max(FEWEST, IMAGES * PIXELS // max(math.prod(spec.shape), 1)))


def batch_for(spec: InputSpec) -> int:
    """How many examples one pass takes at a time."""
    return max(1, VALUES // max(math.prod(spec.shape), 1))


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
    for inputs, _ in task.batches("calibration", min(BATCH, limit, batch_for(task.input)), limit=limit):
        yield several(inputs)


class Listener(Protocol):
    """Adds up what a layer shows on calibration data."""

    def hear(self, layer: Any, x: Tensor, output: Tensor, wanted: int, seed: int) -> None:
        """One call of the layer; `wanted` rows of it are asked for."""
        ...


L = TypeVar("L", bound=Listener)


class Reading:
    """What a Linear or a Conv2d without groups reads: sums, or the rows themselves where those take less memory."""

    def __init__(self, layer: nn.Module, rows: int) -> None:
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        assert not (isinstance(layer, nn.Conv2d) and layer.groups > 1), f"{layer} has groups"
        self.layer = layer
        width = layer.weight[0].numel()
        self.held: Moments | list[Tensor] = [] if rows < 2 * width else Moments(width, len(layer.weight))

    @staticmethod
    def bytes(layer: nn.Module, rows: int) -> int:
        """How many it holds."""
        width = layer.get_parameter("weight")[0].numel()
        return min(8 * width, 4 * rows) * width

    def hear(self, layer: Any, x: Tensor, output: Tensor, wanted: int, seed: int) -> None:
        """Read sampled rows."""
        found = rows_of(layer, x, output, wanted, seed)[0]
        if isinstance(self.held, Moments):
            self.held.add(found)
        else:
            self.held.append(found)

    def moments(self, *, answers: bool = True) -> Moments:
        """Sums over all rows, those of the outputs too where they are asked for."""
        weight, bias = self._map()
        if isinstance(self.held, list):
            rows, self.held = self.held, Moments(weight.shape[1], len(weight))
            if rows:
                every = torch.cat(rows)
                self.held.add(every, functional.linear(every, weight, bias) if answers else None)
        elif answers:
            self.held.explain(weight, bias)
        return self.held

    def centred(self) -> Centred | Sampled | None:
        """What there is to fit, None where nothing was read. What it holds is given away."""
        if isinstance(self.held, list) and self.held:
            rows = torch.cat(self.held)
            self.held = []
            return Sampled.of(rows, functional.linear(rows, *self._map()))
        found = self.moments()
        return found.centred() if found.count else None

    def _map(self) -> tuple[Tensor, Tensor | None]:
        return self.layer.weight.detach().flatten(1), None if self.layer.bias is None else self.layer.bias.detach()


def moments(
    module: nn.Module, names: Sequence[str], task: Task, *, images: int | None = None, rows: int = ROWS
) -> dict[str, Moments]:
    """Moments of the named layers (Linear, or Conv2d without groups) in evaluation mode, all in one pass.

    At most `rows` rows each, spread over `images` calibration examples. A layer that is never called has count 0.
    Memory is 8 d^2 bytes per layer: `each` goes by portions where that is too much.
    """
    found = {name: Reading(module.get_submodule(name), rows) for name in names}
    listen(module, found, task, images, rows)
    return {name: reading.moments() for name, reading in found.items()}


def each(
    module: nn.Module, names: Sequence[str], task: Task, *, images: int | None = None, rows: int = ROWS
) -> Iterator[tuple[str, Reading]]:
    """What layers read, one by one: as many passes over the data as the memory limit `HELD` asks for."""
    made: dict[str, tuple[int, Callable[[], Reading]]] = {}
    for name in names:
        layer = module.get_submodule(name)
        made[name] = Reading.bytes(layer, rows), lambda layer=layer: Reading(layer, rows)
    yield from by_portions(module, made, task, images=images, rows=rows)


def by_portions(
    module: nn.Module,
    listeners: Mapping[str, tuple[int, Callable[[], L]]],
    task: Task,
    *,
    images: int | None = None,
    rows: int = ROWS,
) -> Iterator[tuple[str, L]]:
    """Let listeners hear their layers, as many at a time as hold `HELD` bytes together; one by one they are given."""
    waiting = list(listeners)
    while waiting:
        held, count = 0, 0
        for name in waiting:
            held += listeners[name][0]
            if count and held > HELD:
                break
            count += 1
        found = {name: listeners[name][1]() for name in islice(waiting, count)}
        listen(module, found, task, images, rows)
        for name in islice(waiting, count):
            yield name, found.pop(name)
        waiting = waiting[count:]


def listen(
    module: nn.Module, listeners: Mapping[str, Listener], task: Task, images: int | None = None, rows: int = ROWS
) -> None:
    """One pass over the calibration data in evaluation mode, `rows` rows of each layer spread over it."""
    limit = images_for(task.input) if images is None else images
    seen = 0  # examples before this batch

    def hook(listener: Listener) -> Callable[[nn.Module, Any, Tensor], None]:
        def hear(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            wanted = max(1, round(rows / limit * len(inputs[0])))
            listener.hear(layer, inputs[0].detach(), output.detach(), wanted, seen)

        return hear

    hooks = [module.get_submodule(name).register_forward_hook(hook(one)) for name, one in listeners.items()]
    try:
        with still(module):
            for inputs in calibration(task, limit) if listeners else ():
                module(*inputs)
                seen += batch_size(inputs)
    finally:
        for one in hooks:
            one.remove()
