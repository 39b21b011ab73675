"""Op `lowrank`: replace a layer by two or three thinner ones.

`svd`: a k x k convolution becomes k x k to `rank` channels and 1x1 from them, a linear layer two (Denton et al. 2014).
`spatial`: kh x 1 and then 1 x kw (Jaderberg et al. 2014, section 2). `tucker`: 1x1, k x k on few channels, 1x1 (Kim et
al. 2016, section 3.1). With `data` the output's error on calibration data is least rather than the weight's (Zhang et
al. 2016, "Accelerating Very Deep Convolutional Networks", section 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.models.calls import idle
from autocompress.models.trace import examples, still
from autocompress.ops import Phase, whiten
from autocompress.ops.chain import Layer, Method, Split, cost, difference, fill, full_ranks, put, strides, thin
from autocompress.ops.factors import pair, spatial, tucker
from autocompress.ops.fit import ROWS, Moments, Reading, by_portions
from autocompress.ops.whiten import Answers
from autocompress.tasks import Task
from autocompress.types import Choice, Entry, Profile, Receipt, Record, Rule, TrialFailure, UserError

METHODS: dict[str, Method] = {"svd": "svd", "spatial": "spatial", "tucker": "tucker"}


class Wish(Record):
    """What a rule asks for."""

    rank: float
    method: Method
    data: bool


class LowRank:
    """`rank` is the share of the full rank to keep (1: leave alone), `method` svd, spatial or tucker.

    Where the kernel is 1 (and on Conv1d) every method is `svd`. `data`: truncate by the error of the outputs.
    """

    name = "lowrank"
    phase: Phase = "structure"

    def __init__(self) -> None:
        self.params: dict[str, Any] = {"rank": 1.0, "method": "svd", "data": False}

    def check(self, rule: Rule) -> None:
        """Raise UserError for settings that are unknown or out of range; reads nothing but the rule."""
        wish(rule)

    def decide(
        self,
        subject: nn.Module,
        rules: Sequence[Rule],
        task: Task,
        profile: Profile,
        tensors: dict[str, Tensor] | None = None,
    ) -> Receipt:
        """Choose ranks; the chains' weights go into `tensors` as `<layer>/0.weight`, `<layer>/1.weight` (and `.bias`).

        Raises UserError for a setting that makes no sense, TrialFailure where the network does not run.
        """
        wishes = [(rule, wish(rule)) for rule in rules]
        wishes = [(rule, wished) for rule, wished in wishes if wished.rank < 1]
        verdicts: list[dict[str, Split | str]] = []
        taken: dict[str, Wish] = {}
        shared = sharing(subject)
        for rule, wished in wishes:
            found: dict[str, Split | str] = {}
            for name in layers(subject, rule.site):
                if name in taken:
                    found[name] = "an earlier rule has split it"
                    continue
                found[name] = shared.get(name) or plan(subject, name, wished, profile.channel_multiple)
                if isinstance(found[name], Split):
                    taken[name] = wished
            verdicts.append(found)
        splits = [verdict for found in verdicts for verdict in found.values() if isinstance(verdict, Split)]
        refused = unusable(subject, splits, examples(task.input))
        splits = [split for split in splits if split.layer not in refused]
        if tensors is not None:
            for split in splits:
                if not taken[split.layer].data:
                    tensors |= factors(subject.get_submodule(split.layer), split)
            seeing = {split.layer: split for split in splits if taken[split.layer].data}
            for name, seen in looks(subject, seeing, task):
                tensors |= factors(subject.get_submodule(name), seeing[name], seen)
        return Receipt(
            op=self.name,
            entries=tuple(
                entry(subject, rule, {name: refused.get(name, verdict) for name, verdict in found.items()})
                for (rule, _), found in zip(wishes, verdicts, strict=True)
            ),
        )

    def enact(self, subject: nn.Module, receipt: Receipt, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Replace layers in place by Sequentials, filled from `tensors` or left zero (trained weights follow).

        Raises UserError where the receipt was written for another network or a tensor of it is missing.
        """
        for entry in receipt.entries:
            for raw in entry.facts.get("splits", ()):
                split = Split.model_validate(raw)
                why = difference(subject, split)
                if why:
                    raise UserError(f"lowrank at site {entry.site}: the receipt is of another network: {why}")
                layer = subject.get_submodule(split.layer)
                assert isinstance(layer, Layer)
                chain = thin(layer, split)
                if tensors is not None:
                    fill(chain, split, tensors, entry.site)
                put(subject, split.layer, chain)
        return subject


def wish(rule: Rule) -> Wish:
    """A rule's settings, checked. Raises UserError for one that is unknown or makes no sense."""
    known: dict[str, Choice] = {"rank": 1.0, "method": "svd", "data": False, **rule.settings}
    where = f"lowrank at site {rule.site}"
    if unknown := set(rule.settings) - {"rank", "method", "data"}:
        raise UserError(f"{where}: unknown setting {min(unknown)!r}; known are rank, method, data")
    rank, data = known["rank"], known["data"]
    method = METHODS.get(str(known["method"]))
    if isinstance(rank, bool | str) or not 0 < rank <= 1:
        raise UserError(f"{where}: rank {rank!r} is no share in (0, 1]")
    if method is None:
        raise UserError(f"{where}: method {known['method']!r}; choose one of {', '.join(METHODS)}")
    if not isinstance(data, bool):
        raise UserError(f"{where}: data {data!r}; choose true or false")
    return Wish(rank=float(rank), method=method, data=data)


def layers(module: nn.Module, site: str) -> tuple[str, ...]:
    """Names of the convolutions (1d and 2d) and linear layers at `site` or under it; "." is the whole network."""
    return tuple(
        name
        for name, part in module.named_modules()
        if isinstance(part, Layer) and (site in (".", name) or name.startswith(f"{site}."))
    )


def sharing(module: nn.Module) -> dict[str, str]:
    """Why layers whose parameters other modules use too are left alone, by layer."""
    owners: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    found: dict[str, str] = {}
    for names in owners.values():
        for name in names if len(names) > 1 else ():
            other = next(one for one in names if one != name)
            found[name.rpartition(".")[0]] = f"{name} is shared with {other}"
    return found


def plan(module: nn.Module, name: str, wished: Wish, multiple: int) -> Split | str:
    """The split of one layer, or why it is left alone. Ranks are rounded to `multiple`."""
    layer = module.get_submodule(name)
    assert isinstance(layer, Layer)
    if why := peculiar(layer, name):
        return why
    shape = tuple(layer.weight.shape)
    method: Method = wished.method if len(shape) == 4 and math.prod(shape[2:]) > 1 else "svd"
    full = full_ranks(shape, method)
    ranks = [min(math.floor(wished.rank * one / multiple + 0.5) * multiple, one) for one in full]
    if not all(ranks):
        least = min(wished.rank * one for one in full)
        if multiple > 1:
            return f"rank {least:.3g} of {name} is less than half the profile's channel multiple {multiple}"
        ranks = [max(1, rank) for rank in ranks]
    split = Split(layer=name, shape=shape, rank=ranks[0], method=method, inner=ranks[1] if len(ranks) > 1 else 0)
    share = cost(split, strides(layer)) / math.prod(shape)
    if share >= 1:
        return f"rank {split.rank} of {name} costs {share:.2f} times the layer"
    return split


def peculiar(layer: Layer, name: str) -> str:
    """Why a layer computes something else than its weight says or cannot be taken out, empty where neither is so."""
    if not name:
        return "it is the whole network"
    if not isinstance(layer, nn.Linear) and layer.groups > 1:
        return f"{name} is a {'depthwise' if layer.groups == layer.in_channels else 'grouped'} convolution"
    base = next(base for base in (nn.Conv2d, nn.Conv1d, nn.Linear) if isinstance(layer, base))
    methods = ("forward",) if base is nn.Linear else ("forward", "_conv_forward")
    own = any(getattr(type(layer), method) is not getattr(base, method) for method in methods)
    if own or nn.utils.parametrize.is_parametrized(layer):
        return f"{name} is a {type(layer).__name__}, which computes with another weight than it holds"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return f"{name} has hooks, which a replacement would lose"
    if not layer.weight.is_floating_point() or not bool(layer.weight.isfinite().all()):
        return f"the weight of {name} is not finite"
    return ""


def entry(module: nn.Module, rule: Rule, verdicts: Mapping[str, Split | str]) -> Entry:
    """What came of a rule; skipped where none of its layers is split."""
    splits = [verdict for verdict in verdicts.values() if isinstance(verdict, Split)]
    if not splits:
        why = next((verdict for verdict in verdicts.values() if isinstance(verdict, str)), "no layer is there")
        return Entry(site=rule.site, status="skipped", why=why, asked=rule.settings)
    found = [(split, module.get_submodule(split.layer)) for split in splits]
    macs = sum(cost(split, strides(layer)) for split, layer in found if isinstance(layer, Layer))
    return Entry(
        site=rule.site,
        asked=rule.settings,
        achieved={
            "rank": sum(split.rank for split in splits) / sum(full_ranks(s.shape, s.method)[0] for s in splits),
            "macs": macs / sum(math.prod(split.shape) for split in splits),
        },
        facts={"splits": [split.model_dump(mode="json", exclude_defaults=True) for split in splits]},
    )


def unusable(module: nn.Module, splits: Sequence[Split], inputs: tuple[Tensor, ...]) -> dict[str, str]:
    """Why splits cannot stay, by layer: a parent reads the layer's weight itself, or never calls it in inference.

    Found by running the network with these layers replaced; it is given back as it was. Raises TrialFailure where it
    does not run even without.
    """
    if not splits:
        return {}
    why = attempt(module, splits, inputs)
    if not isinstance(why, str):
        return {split.layer: _UNREACHED.format(split.layer) for split in splits if split.layer not in why}
    whole = attempt(module, (), inputs)
    if isinstance(whole, str):
        raise TrialFailure(f"lowrank: the network does not run on the task's input: {whole}")
    refused: dict[str, str] = {}
    for split in splits:
        alone = attempt(module, [split], inputs)
        if isinstance(alone, str):
            refused[split.layer] = f"{split.layer} is used by its parent in a way that no chain can stand for: {alone}"
        elif not alone:
            refused[split.layer] = _UNREACHED.format(split.layer)
    return refused


_UNREACHED = "{} is not called in inference"


def attempt(module: nn.Module, splits: Sequence[Split], inputs: tuple[Tensor, ...]) -> set[str] | str:
    """Which chains a forward pass calls, or what it raises; `module` is left as it was."""
    called: set[str] = set()
    held = {split.layer: module.get_submodule(split.layer) for split in splits}
    try:
        for split in splits:
            layer = held[split.layer]
            assert isinstance(layer, Layer)
            chain = thin(layer, split)
            chain.register_forward_hook(lambda *_, name=split.layer: called.add(name))
            put(module, split.layer, chain)
        with still(module):
            try:
                with idle(module):
                    module(*inputs)
            except Exception:  # noqa: BLE001  a stranger's network may need true values
                called.clear()
                module(*inputs)
    except Exception as error:  # noqa: BLE001  a stranger's forward may raise anything
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    finally:
        for name, layer in held.items():
            put(module, name, layer)
    return called


def by_answers(split: Split) -> bool:
    """Whether the outputs' moments are enough for the data-aware optimum, and the inputs' larger (or not to be had)."""
    return split.method == "svd" and (len(split.shape) == 3 or split.shape[0] <= math.prod(split.shape[1:]))


def looks(module: nn.Module, splits: Mapping[str, Split], task: Task) -> Iterator[tuple[str, Moments | Answers]]:
    """Layers with what was seen of them on calibration data."""
    listeners: dict[str, tuple[int, Callable[[], Reading | Answers]]] = {}
    for name, split in splits.items():
        layer = module.get_submodule(name)
        if by_answers(split):
            listeners[name] = 8 * split.shape[0] ** 2, lambda outputs=split.shape[0]: Answers(outputs)
        else:
            listeners[name] = Reading.bytes(layer, ROWS), lambda layer=layer: Reading(layer, ROWS)
    for name, found in by_portions(module, listeners, task):
        yield name, found.moments(answers=False) if isinstance(found, Reading) else found


def factors(layer: nn.Module, split: Split, found: Moments | Answers | None = None) -> dict[str, Tensor]:
    """The chain's tensors by receipt key: nearest to the weight, or to the outputs where moments are given."""
    assert isinstance(layer, Layer)
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    exact = weight if weight.dtype == torch.float64 else weight.float()
    ranks = (split.inner, split.rank) if split.method == "tucker" else (split.rank,)
    read = found.moments if isinstance(found, Answers) else found
    shift = torch.zeros(len(weight))
    if read is None or not read.count or not bool(read.xx.isfinite().all()):
        chain = PLAIN[split.method](exact, *ranks)
    elif isinstance(found, Answers):
        chain, shift = whiten.principal(exact, found, split.rank, biased=bias is not None)
    else:
        goal = whiten.Goal.of(exact, read, biased=bias is not None)
        chain = WHITENED[split.method](goal, *ranks)
        if split.method != "svd":  # the other two are no optimum: positions were taken as independent
            chain = whiten.better(goal, chain, PLAIN[split.method](exact, *ranks))
        shift = goal.shift(chain, read.x / read.count)
    tensors = {f"{place}.weight": one.to(weight.dtype).contiguous() for place, one in enumerate(chain)}
    if bias is not None:
        tensors[f"{len(chain) - 1}.bias"] = (bias + shift).to(bias.dtype)
    return {f"{split.layer}/{name}": tensor for name, tensor in tensors.items()}


PLAIN = {"svd": pair, "spatial": spatial, "tucker": tucker}
WHITENED = {"svd": whiten.pair, "spatial": whiten.spatial, "tucker": whiten.tucker}
