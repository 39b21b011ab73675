"""Cut channels out of tensors by plain indexing: what a prune receipt says, obeyed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from autocompress.types import Record

HEADS = ("heads", "num_heads", "num_attention_heads", "n_heads")
"""Attributes that hold a number of heads."""
PRODUCTS = ("attn_dim", "all_head_size")
"""Attributes that hold heads times head size."""
WIDTHS = ("hidden_dim", "hidden_size", "embed_dim", "attn_dim", "dim", "dim_out", "out_dim", "channels", "d_model")
"""Attributes of containers that hold a number of channels by which their forward pass reshapes."""
NORMS = ("num_features", "num_channels", "normalized_shape")
"""The same of normalisations without weights."""
ATTRIBUTES = frozenset((*HEADS, *PRODUCTS, *WIDTHS, *NORMS, "groups"))
"""What a receipt may set on a module: numbers of heads and channels, nothing else."""


class Cut(Record):
    """Keep the positions `kept`, in this order, of axes that have `was` of them.

    A place is `<parameter or buffer>:<axis>`. With `groups` it is the input side of a grouped convolution: axis 1 holds
    was / groups positions, which each group reads from channels of its own.
    """

    places: tuple[str, ...]
    was: int
    kept: tuple[int, ...]
    groups: int = 1


class Mismatch(Exception):  # noqa: N818  a refusal, not an error
    """A cut that was written for another network; the message says why."""


Holders = Mapping[int, list[tuple[nn.Module, str]]]
"""Who holds a tensor, by its id: more than one where it is shared."""


def difference(module: nn.Module, cut: Cut) -> str:
    """Why `cut` does not fit `module`, empty where it does."""
    if not cut.kept or len(set(cut.kept)) != len(cut.kept) or not set(cut.kept) <= set(range(cut.was)):
        return f"it keeps channels of {cut.places[0] if cut.places else '?'} that are not there, or none, or one twice"
    for place in cut.places:
        name, _, digits = place.rpartition(":")
        tensor = find(module, name)
        if tensor is None:
            return f"it cuts {name}, which is not there"
        axis = int(digits) if digits.isdigit() else -1
        if not 0 <= axis < tensor.dim():
            return f"it cuts axis {digits} of {name}, which has {tensor.dim()} axes here"
        found = tensor.shape[axis] * cut.groups
        if found != cut.was:
            return f"{name} has {found} {_words(axis, cut)} here and had {cut.was} there"
        layer = module.get_submodule(name.rpartition(".")[0])
        groups = layer.groups if axis == 1 and isinstance(layer, nn.modules.conv._ConvNd) else 1
        if groups != cut.groups and not getattr(layer, "transposed", False):
            return f"{name} has {groups} groups here and had {cut.groups} there"
    if len(cut.kept) % cut.groups:
        return f"it keeps {len(cut.kept)} channels of {cut.places[0]}, which has {cut.groups} groups"
    return ""


def _words(axis: int, cut: Cut) -> str:
    return "output channels" if axis == 0 else "input channels" if axis == 1 or cut.groups > 1 else "channels"


def find(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer by its name, None where there is none."""
    parent, _, own = name.rpartition(".")
    try:
        part = module.get_submodule(parent)
    except AttributeError:
        return None
    tensor = part._parameters.get(own)
    return part._buffers.get(own) if tensor is None else tensor


def holders(module: nn.Module) -> Holders:
    """Who holds which tensor."""
    found: defaultdict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for part in module.modules():
        for own, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                found[id(tensor)].append((part, own))
    return found


def apply(module: nn.Module, cuts: Iterable[Cut], attributes: Mapping[str, Mapping[str, int]] | None = None) -> None:
    """Cut in place, one after the other. Shared tensors stay shared.

    Raises:
        Mismatch: a cut does not fit when its turn comes, or an attribute is none that a receipt may set.
    """
    held = dict(holders(module))
    for cut in cuts:
        if why := difference(module, cut):
            raise Mismatch(why)
        kept = torch.tensor(cut.kept, dtype=torch.long)
        for place in cut.places:
            name, _, digits = place.rpartition(":")
            old = find(module, name)
            assert old is not None, "difference has looked"
            axis = int(digits)
            data = old.detach()
            new = _of_groups(data, kept, cut) if cut.groups > 1 else data.index_select(axis, kept.to(data.device))
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, old.requires_grad)
            owners = held.pop(id(old))
            held[id(new)] = owners
            for owner, own in owners:
                setattr(owner, own, new)
                _update(owner, own)
    for name, values in (attributes or {}).items():
        try:
            part = module.get_submodule(name)
        except AttributeError:
            raise Mismatch(f"it sets attributes of {name}, which is not there") from None
        for attribute, value in values.items():
            if attribute not in ATTRIBUTES or not hasattr(part, attribute) or type(value) is not int or value < 1:
                raise Mismatch(f"it cannot set {name}.{attribute} to {value!r}")
            setattr(part, attribute, (value,) if attribute == "normalized_shape" else value)
            if attribute == "groups":
                _update(part, "weight")


def _of_groups(weight: Tensor, kept: Tensor, cut: Cut) -> Tensor:
    """Each group keeps its own positions, equally many per group."""
    width, rows = cut.was // cut.groups, weight.shape[0] // cut.groups
    positions = kept.view(cut.groups, -1) % width
    blocks = weight.split(rows)
    return torch.cat([block.index_select(1, own) for block, own in zip(blocks, positions, strict=True)])


def _update(layer: nn.Module, name: str) -> None:
    """Bring a layer's own numbers in line with its tensors."""
    tensor = getattr(layer, name)
    if isinstance(layer, nn.modules.conv._ConvNd):
        if name == "weight":
            rows, columns = tensor.shape[:2]
            sizes = (rows, columns * layer.groups) if layer.transposed else (columns * layer.groups, rows)
            layer.in_channels, layer.out_channels = sizes
    elif isinstance(layer, nn.Linear):
        if name == "weight":
            layer.out_features, layer.in_features = tensor.shape
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = tensor.shape
    elif isinstance(layer, nn.modules.batchnorm._NormBase):
        layer.num_features = len(tensor)
    elif isinstance(layer, nn.GroupNorm):
        layer.num_channels = len(tensor)
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = len(tensor)
    elif name == "weight" and isinstance(vars(layer).get("normalized_shape"), tuple):
        layer.normalized_shape = tuple(tensor.shape)  # type: ignore[assignment]
    elif name == "weight" and {"nf", "nx"} <= vars(layer).keys():  # transformers' Conv1D
        layer.nx, layer.nf = tensor.shape
