"""Attention written out: fused products become linear layers of their own, so that heads can be pruned and exported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_flop_count

SPLIT = {"q": 0, "k": 1, "v": 2}  # rows of `in_proj_weight`, in thirds


FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

if FUSED not in flop_registry:  # torch (up to 2.13) counts the products of attention on accelerators alone

    @register_flop_formula(FUSED)
    def _flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2) of four linear layers, called like nn.MultiheadAttention.

    `heads` divides the outputs of `q`, `k` and `v` and the inputs of `proj`; whoever cuts heads cuts these and sets it.
    State dicts of nn.MultiheadAttention load as well as its own.
    """

    # What torch's Transformer layers read to decide on a fused kernel that takes the weights from here: never
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(
        self,
        q: nn.Linear,
        k: nn.Linear,
        v: nn.Linear,
        proj: nn.Linear,
        heads: int,
        *,
        dropout: float = 0.0,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = q, k, v, proj
        self.heads, self.dropout, self.batch_first = heads, dropout, batch_first
        self.register_load_state_dict_pre_hook(_accept)

    @property
    def num_heads(self) -> int:
        """What nn.MultiheadAttention calls `heads`."""
        return self.heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Queries (l, n, e) to outputs (l, n, e), axes n and l swapped with `batch_first`, or (l, e) without a batch.

        Weights (n, l, s), per head (n, heads, l, s), come second if asked for, else None. Boolean masks leave out what
        is True, others are added: `attn_mask` (l, s) or (n * heads, l, s), `key_padding_mask` (n, s) or (s,).
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("need attn_mask if specifying the is_causal hint")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self._split(self.q(query)), self._split(self.k(key)), self._split(self.v(value))
        mask = self._mask(attn_mask, key_padding_mask, q.dtype)
        dropout = self.dropout if self.training else 0.0
        weights = None
        # written out for a file: what runtimes know as attention, without the sizes that the fused form computes
        if need_weights or torch.onnx.is_in_onnx_export():
            scores = (q * int(q.shape[-1]) ** -0.5) @ k.transpose(-2, -1)
            shares = (scores if mask is None else scores + mask).softmax(-1)
            shares = functional.dropout(shares, dropout) if dropout else shares
            mixed = shares @ v
            if need_weights:
                weights = shares.mean(1) if average_attn_weights else shares
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
        mixed = mixed.transpose(1, 2)
        output = self.proj(mixed.reshape(mixed.shape[0], mixed.shape[1], self.heads * int(mixed.shape[3])))
        if not batched:
            output, weights = output.squeeze(0), None if weights is None else weights.squeeze(0)
        elif not self.batch_first:
            output = output.transpose(0, 1)
        return output, weights

    def _split(self, joined: Tensor) -> Tensor:
        """(n, l, heads * d) to (n, heads, l, d)."""
        width = int(joined.shape[2]) // self.heads  # the layers' own, never the data's: a constant in a file
        return joined.reshape(joined.shape[0], joined.shape[1], self.heads, width).transpose(1, 2)

    def _mask(self, attn: Tensor | None, padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Both masks as one to add to scores (n, heads, l, s)."""
        masks: list[Tensor] = []
        if attn is not None:
            attn = _added(attn, dtype)
            masks.append(attn if attn.dim() == 2 else attn.unflatten(0, (-1, self.heads)))
        if padding is not None:
            masks.append(_added(padding, dtype)[:, None, None, :])
        return None if not masks else masks[0] if len(masks) == 1 else masks[0] + masks[1]


def _accept(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:  # noqa: ARG001  a hook
    """Before an `Attention` loads: names of nn.MultiheadAttention become its own, in place."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        renamed = _own(name.removeprefix(prefix), state_dict[name])
        if renamed is not None:
            del state_dict[name]
            state_dict.update({prefix + own: tensor for own, tensor in renamed.items()})


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask


def _own(name: str, tensor: Tensor) -> dict[str, Tensor] | None:
    """A tensor of nn.MultiheadAttention by the names it has here; None if it is not one."""
    if name in ("in_proj_weight", "in_proj_bias"):
        parts = tensor.chunk(3)
        return {f"{layer}.{name.removeprefix('in_proj_')}": parts[third] for layer, third in SPLIT.items()}
    if name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        return {f"{name[0]}.weight": tensor}
    if name.startswith("out_proj."):
        return {f"proj.{name.removeprefix('out_proj.')}": tensor}
    return None


def own_names(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict saved before `unfold` by the names after it; other tensors as they are."""
    prefixes = [f"{name}." if name else "" for name, part in module.named_modules() if isinstance(part, Attention)]
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix = next((one for one in prefixes if name.startswith(one)), None)
        renamed = None if prefix is None else _own(name.removeprefix(prefix), tensor)
        found |= {name: tensor} if renamed is None else {f"{prefix}{own}": one for own, one in renamed.items()}
    return found


def unfold(module: nn.Module) -> nn.Module:
    """Replace every nn.MultiheadAttention in place by an equal `Attention`; returns `module`, or what stands for it.

    What is shared stays shared: modules and parameters. Left as they are, and so not prunable: subclasses with a
    forward of their own, and extra learned keys (`add_bias_kv`, `add_zero_attn`).
    """
    modules: dict[nn.Module, Attention] = {}
    thirds: dict[Tensor, tuple[nn.Parameter, ...]] = {}
    if _unfolds(module):
        return _unfolded(module, thirds)
    for part in list(module.modules()):
        if isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False  # decided when it was made; it would read weights that are gone
        for name, child in list(part._modules.items()):  # named_children() passes over a second name
            if child is not None and _unfolds(child):
                if child not in modules:
                    modules[child] = _unfolded(child, thirds)
                setattr(part, name, modules[child])
    return module


def _unfolds(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
        and module.bias_k is None
        and not module.add_zero_attn
    )


def _unfolded(fused: nn.Module, thirds: dict[Tensor, tuple[nn.Parameter, ...]]) -> Attention:
    assert isinstance(fused, nn.MultiheadAttention)

    def third(joined: nn.Parameter) -> tuple[nn.Parameter, ...]:
        if joined not in thirds:
            parts = joined.detach().chunk(3)
            thirds[joined] = tuple(nn.Parameter(part.clone(), joined.requires_grad) for part in parts)
        return thirds[joined]

    if fused.in_proj_weight is not None:
        weights = third(fused.in_proj_weight)
    else:
        weights = tuple(fused.get_parameter(f"{layer}_proj_weight") for layer in SPLIT)
    biases = (None,) * 3 if fused.in_proj_bias is None else third(fused.in_proj_bias)
    q, k, v = (_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))
    proj = _linear(fused.out_proj.get_parameter("weight"), fused.out_proj.bias)
    made = Attention(q, k, v, proj, fused.num_heads, dropout=fused.dropout, batch_first=fused.batch_first)
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        getattr(made, hooks).update(getattr(fused, hooks))
    return made.train(fused.training)


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A layer of these very parameters, without drawing random numbers."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.register_parameter("weight", weight)
    layer.register_parameter("bias", bias)
    return layer
