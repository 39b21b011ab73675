"""Whole heads of attention: which rows of which linear layers make one head, and which attributes count them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autocompress.models.slicing import HEADS, PRODUCTS

SIZES = ("head_dim", "attention_head_size", "attn_head_dim", "head_size")
TRIPLES = (("q", "k", "v"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q_proj", "k_proj", "v_proj"))


@dataclass(frozen=True)
class Attention:
    """Attention whose number of heads an attribute says. Layers by full name."""

    name: str
    layers: tuple[str, ...]  # what makes queries, keys and values: one layer for all or three
    heads: int
    size: int
    attributes: Mapping[str, int]  # attribute: what it counts per head
    kind: type[nn.Module]

    def units(self, layer: nn.Linear) -> Tensor:
        """The head of each output row."""
        return torch.arange(layer.out_features) % (self.heads * self.size) // self.size


def attentions(module: nn.Module) -> tuple[Attention, ...]:
    """Attention modules in `module`, told by their attributes; whether these suffice is for a trial cut to find out.

    Known so: `models.attention.Attention`, those of timm with a fused `qkv`, torchvision's shifted windows, and those
    of Hugging Face's BERT, RoBERTa, DistilBERT, ViT, DeiT and their kin.
    """
    found = (_attention(name, part) for name, part in module.named_modules())
    return tuple(one for one in found if one is not None)


def _attention(name: str, part: nn.Module) -> Attention | None:
    own = vars(part)
    count = next((attribute for attribute in HEADS if isinstance(own.get(attribute), int)), None)
    triple = next((names for names in TRIPLES if all(_linear(part, one) for one in names)), None)
    layers = triple or (("qkv",) if _linear(part, "qkv") else ())
    if count is None or not layers:
        return None
    widths = {part.get_parameter(f"{layer}.weight").shape[0] for layer in layers}
    heads, width = own[count], max(widths) // (1 if triple else 3)
    declared = next((own[attribute] for attribute in SIZES if isinstance(own.get(attribute), int)), None)
    if len(widths) > 1 or heads < 2 or width % heads or (declared or width // heads) * heads != width:
        return None  # keys shared by several heads, or heads of another size than the layers say
    size = width // heads
    products = {attribute: size for attribute in PRODUCTS if own.get(attribute) == width}
    prefix = f"{name}." if name else ""
    return Attention(name, tuple(prefix + layer for layer in layers), heads, size, {count: 1, **products}, type(part))


def _linear(part: nn.Module, name: str) -> bool:
    return isinstance(getattr(part, name, None), nn.Linear)
