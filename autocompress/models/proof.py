"""The safety net under cutting: what is left must compute what the whole network computes when it ignores the channels.

A copy with weights of order one runs both ways. It fails where a network's code holds a number of channels by itself,
or takes channels another way than we believe.
"""

from __future__ import annotations

import copy
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from autocompress.models.attention import Attention
from autocompress.models.coupling import Coupling
from autocompress.models.following import following
from autocompress.models.groups import Group, choose
from autocompress.models.labels import Labels
from autocompress.models.slicing import Mismatch, apply
from autocompress.tasks import several
from autocompress.types import Record

SAME = 1e-3
"""Largest difference, relative to the largest output, that single precision may explain."""
EXACT = 1e-6
"""The same in double precision, which decides where single precision does not."""

TRIED = 0.55
"""Share of a group that a trial cut leaves: an odd one, lest numbers fit by chance."""

Kept = Mapping[Group, Sequence[int]]


def faults(module: nn.Module, coupling: Coupling, kept: Kept, inputs: tuple[Tensor, ...]) -> dict[Group, str]:
    """The groups that cannot be cut down to the units `kept`, and why; the others can, all at once.

    `inputs` are two samples or more where there is batch norm, whatever the network takes.
    """
    trial = _Trial(module, coupling, kept, inputs)
    if not kept or not trial.differs(list(kept)):
        return {}
    bad = _hopeless(trial, list(kept))
    good = _sift(trial.crashes, [], [group for group in kept if group not in bad], bad)
    _sift(trial.differs, [], good, bad)
    return bad


def couple(module: nn.Module, example: tuple[Tensor, ...]) -> Coupling:
    """The groups of a module, heads of attention bound to the channels that come in where its code needs that.

    What the network's own code raises passes unchanged.
    """
    coupling = Coupling(module, example)
    needing: set[type[nn.Module]] = set()
    for kind in dict.fromkeys(one.kind for one in coupling.attentions if one.kind is not Attention):
        one = next(one for one in coupling.attentions if one.kind is kind)
        heads = [group for group in coupling.groups if one.layers[0] in group.producers]
        kept = {group: _some(group, group.size - group.step) for group in heads if group.step < group.size}
        if kept and _Trial(module, coupling, kept, example).crashes(list(kept)):
            needing.add(kind)
    if needing:
        coupling.bind(needing)
    return coupling


def _some(group: Group, keep: int) -> list[int]:
    """Some units, here and there: what stays must not look like what was there first."""
    noise = torch.rand(group.size, generator=torch.Generator().manual_seed(group.size))
    return choose(noise, group.cells, keep)


class Prunable(Record):
    """The layers that stand for a group which can be cut, and why others make none."""

    roots: tuple[str, ...]
    refused: dict[str, str] = {}


def prunable(module: nn.Module, example: Tensor | tuple[Tensor, ...]) -> Prunable:
    """Try to cut every group of a network at once. A network that cannot be followed has none; `.` says why."""
    inputs = several(example)
    try:
        coupling = couple(module, inputs)
    except Exception as error:  # noqa: BLE001  a stranger's network may raise anything
        return Prunable(roots=(), refused={".": f"it cannot be followed: {type(error).__name__}: {error}"})
    generator = torch.Generator().manual_seed(0)
    size = 2 if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules()) else 1
    noise = tuple(
        torch.randn((size, *one.shape[1:]), generator=generator).to(one.dtype)
        if one.is_floating_point()
        else one[:1].repeat(size, *[1] * (one.dim() - 1))
        for one in inputs
    )
    kept = {
        group: _some(group, max(1, round(TRIED * group.size / group.step)) * group.step)
        for group in coupling.groups
        if group.step < group.size
    }
    bad = faults(module, coupling, kept, noise)
    whole = {group: "its channels can only go all together" for group in coupling.groups if group not in kept}
    return Prunable(
        roots=tuple(group.root for group in kept if group not in bad),
        refused=coupling.refused | {group.root: why for group, why in (whole | bad).items()},
    )


def _hopeless(trial: _Trial, groups: Sequence[Group]) -> dict[Group, str]:
    """Groups of layers of the same name (but for numbers) of which the first and the last fail, each by itself."""
    kinds: defaultdict[str, list[Group]] = defaultdict(list)
    for group in groups:
        kinds[re.sub(r"\d+", "#", group.root)].append(group)
    bad: dict[Group, str] = {}
    for alike in kinds.values():
        if len(alike) > 2 and (why := trial.crashes(alike[:1])) and trial.crashes(alike[-1:]):
            bad |= dict.fromkeys(alike, why)
    return bad


def _sift(
    fails: Callable[[Sequence[Group]], str], base: Sequence[Group], groups: Sequence[Group], bad: dict[Group, str]
) -> list[Group]:
    """The groups that pass together with `base`, found by halving where not all do; the rest go into `bad`."""
    if not groups:
        return []
    why = fails([*base, *groups])
    if not why:
        return list(groups)
    if len(groups) == 1:
        bad[groups[0]] = why
        return []
    half = len(groups) // 2
    left = _sift(fails, base, groups[:half], bad)
    return left + _sift(fails, [*base, *left], groups[half:], bad)


class _Trial:
    """One network and one wish, cut in various ways."""

    def __init__(self, module: nn.Module, coupling: Coupling, kept: Kept, inputs: tuple[Tensor, ...]) -> None:
        self.coupling, self.kept = coupling, kept
        self.module, self.inputs = module, inputs

    def crashes(self, groups: Sequence[Group]) -> str:
        """Why the smaller network does not run; on tensors without data where it does without."""
        module = _bare(self.module) if self._abstract else copy.deepcopy(self.module).eval()
        inputs = tuple(one.to("meta") for one in self.inputs) if self._abstract else self.inputs
        try:
            self._cut(module, groups)
            with torch.no_grad():
                module(*inputs)
        except Mismatch as error:
            return f"it cannot be cut: {error}"
        except Exception as error:  # noqa: BLE001  a stranger's forward may raise anything
            return f"the network does not run without them: {' '.join(str(error).split())[:160]}"
        return ""

    def differs(self, groups: Sequence[Group]) -> str:
        """How the smaller network differs from the whole one with its channels ignored."""
        try:
            error = self._error(groups, double=False)
            if not error <= SAME:  # also where it is not a number
                try:
                    error = self._error(groups, double=True) * SAME / EXACT
                except (RuntimeError, TypeError):
                    error /= 50  # it insists on single precision, whose errors a deep network multiplies
        except Exception as error:  # noqa: BLE001  a stranger's forward may raise anything
            return f"the network does not run without them: {' '.join(str(error).split())[:160]}"
        if error <= SAME:
            return ""
        if math.isnan(error):
            return "its output is not finite, so a cut cannot be checked"
        return "its channels go another way than they can be followed: cutting them changes what the rest computes"

    def _error(self, groups: Sequence[Group], *, double: bool) -> float:
        """Largest difference between both ways, relative to the largest output."""
        gone = self.coupling.mask({group: group.rest(self.kept[group]) for group in groups})
        network, inputs = lively(copy.deepcopy(self.module)), self.inputs
        if double:
            network, inputs = (
                network.double(),
                tuple(one.double() if one.is_floating_point() else one for one in inputs),
            )
        with torch.no_grad():
            with following(Labels(network, known=self.coupling.trace.places, gone=gone)):
                expected = _tensors(network(*inputs))
            self._cut(network, groups)
            found = _tensors(network(*inputs))
        if [one.shape for one in expected] != [one.shape for one in found]:
            return math.inf
        return max((_relative(one, other) for one, other in zip(expected, found, strict=True)), default=0.0)

    def _cut(self, module: nn.Module, groups: Sequence[Group]) -> None:
        plan, cuts = self.coupling.plan(), []
        attributes: dict[str, dict[str, int]] = {}
        for group in groups:
            found, values = plan.cut(group, self.kept[group])
            cuts += found
            for name, mine in values.items():
                attributes.setdefault(name, {}).update(mine)
        apply(module, cuts, attributes)

    @cached_property
    def _abstract(self) -> bool:
        try:
            with torch.no_grad():
                _bare(self.module)(*(one.to("meta") for one in self.inputs))
        except Exception:  # noqa: BLE001  it looks at data, or makes tensors of its own
            return False
        return True


def _bare(module: nn.Module) -> nn.Module:
    """A copy without data."""
    memo: dict[int, object] = {}
    for part in module.modules():
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None:
                bare = tensor.detach().to("meta")
                memo[id(tensor)] = nn.Parameter(bare, False) if isinstance(tensor, nn.Parameter) else bare
    return copy.deepcopy(module, memo).eval()


@torch.no_grad()
def lively(module: nn.Module) -> nn.Module:
    """In place: weights of order one in whatever state they were, batch norm by batch, so that no signal dies out."""
    generator = torch.Generator().manual_seed(0)
    module.eval()
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2:
            bias = name.endswith("bias")
            noise = torch.rand(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise - 0.1 if bias else 0.5 + noise)
            continue
        spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
        fan = max(1, parameter[0].numel())
        if not math.isfinite(spread) or spread < 1e-8:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            spread = 1.0
        parameter.mul_(math.sqrt(2 / fan) / spread)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.train()
    return module


def _tensors(outputs: object) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, Mapping):
        outputs = tuple(outputs.values())
    return [one for part in several(outputs) for one in _tensors(part)] if isinstance(outputs, list | tuple) else []


def _relative(expected: Tensor, found: Tensor) -> float:
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return float((expected - found).abs().max()) / max(scale, 1e-30) if expected.numel() else 0.0
