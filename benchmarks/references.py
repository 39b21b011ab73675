"""Other ways to the same thing, for the technique table: libraries' own arms, and papers' formulas written out by hand.

Beside the development environment these need tensorly (Tucker-2), onnxconverter-common (float16) and scikit-learn
(k-means): `pip install tensorly onnxconverter-common scikit-learn`. None of them is a dependency of the package.
"""

from __future__ import annotations

import importlib
import logging
import tempfile
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch_pruning as tp
import zstandard
from arms import Found, Lab, Reference
from numpy.typing import NDArray
from oneshot import Reader
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.onnx_model import ONNXModel
from torch import Tensor, nn
from torch.ao import quantization as ao
from torch.ao.nn.intrinsic.qat import freeze_bn_stats
from torch.ao.pruning.sparsifier.weight_norm_sparsifier import WeightNormSparsifier
from torch.fx.experimental.optimization import fuse
from torch.nn import functional
from torch.nn.utils import prune as torch_prune

from autocompress.ops.chain import Split
from autocompress.ops.quantize import IMAGES
from autocompress.tasks import several
from autocompress.train import reestimate_batchnorm
from autocompress.types import Policy, UserError

Layer = nn.Conv2d | nn.Linear


def library(name: str, package: str) -> Any:
    """A library of the references alone. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"benchmarks/references.py needs {package}: pip install {package}") from error


def layers_of(module: nn.Module) -> list[tuple[str, Layer]]:
    """Convolutions and linear layers by name."""
    return [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)]


def weight_of(layer: Layer) -> NDArray[np.float64]:
    """A layer's weight in double precision."""
    return layer.weight.detach().double().numpy()


# --- structure ------------------------------------------------------------------------------------------------------


def pruned(importance: Callable[[], Any]) -> Reference:
    """torch-pruning with its own importance on the blocks' inner channels, the same recipe after it."""

    def make(lab: Lab, policy: Policy) -> bytes:  # noqa: ARG001
        module = lab.copy()
        inner = {part for name, part in module.named_modules() if name.endswith("conv1") and "layer" in name}
        outer: list[nn.Module] = [part for _, part in layers_of(module) if part not in inner]
        example = torch.zeros(1, 3, 32, 32)
        pruner = tp.pruner.BasePruner(module, example, importance=importance(), pruning_ratio=0.5, ignored_layers=outer)
        module.eval()
        for inputs, targets in lab.task.batches("calibration", 64, limit=256):
            lab.task.loss(module(inputs), targets).backward()
        pruner.step()
        module.zero_grad()
        return lab.finish(module)

    return make


def without(lab: Lab, policy: Policy) -> bytes:
    """The same blocks taken out by hand."""
    module = lab.copy()
    for rule in policy.of("block"):
        holder, _, child = rule.site.rpartition(".")
        setattr(module.get_submodule(holder), child, nn.Identity())
    reestimate_batchnorm(module, lab.task, 8)
    return lab.finish(module)


def halved(matrix: NDArray[np.float64], rank: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """numpy's truncated SVD: (rows, rank) and (rank, columns), singular values shared out evenly."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(values[:rank])
    return left[:, :rank] * root, root[:, None] * right[:rank]


def thinned(method: str, *, data: bool = False) -> Reference:
    """The same chains of thin layers at the same ranks, filled by numpy's SVD, tensorly or a whitened SVD by hand.

    Whitened: W S = U V with S S^T = E[x x^T] of the inputs, so that truncation is by the error of the outputs (Wang et
    al. 2025, "SVD-LLM", section 3.1), with a hundred-thousandth of the mean added to the diagonal.
    """

    def factors(layer: Layer, split: Split, inputs: Tensor | None) -> list[NDArray[np.float64]]:
        weight, rank = weight_of(layer), split.rank
        outputs, entering, *kernel = weight.shape
        if split.method == "tucker":
            decompose = library("tensorly.decomposition", "tensorly").partial_tucker
            (core, (out, into)), _ = decompose(weight, rank=[rank, split.inner], modes=[0, 1])
            return [into.T[:, :, None, None], core, out[:, :, None, None]]
        if split.method == "spatial":
            high, wide = kernel
            flat = weight.transpose(0, 3, 1, 2).reshape(outputs * wide, entering * high)
            second, first = halved(flat, rank)
            across = second.reshape(outputs, wide, rank).transpose(0, 2, 1)[:, :, None]
            return [first.reshape(rank, entering, high, 1), across]
        flat = weight.reshape(outputs, -1)
        if inputs is None:
            second, first = halved(flat, rank)
        else:
            moments = (inputs.T @ inputs / len(inputs)).numpy()
            moments += np.eye(len(moments)) * np.trace(moments) / len(moments) * 1e-5
            root = np.linalg.cholesky(moments)
            second, first = halved(flat @ root, rank)
            first = np.linalg.solve(root.T, first.T).T
        return [first.reshape(rank, entering, *kernel), second.reshape(outputs, rank, *[1] * len(kernel))]

    def make(lab: Lab, policy: Policy) -> bytes:
        shaped = lab.shaped(policy)
        raw = [
            split for receipt in shaped.receipts for entry in receipt.entries for split in entry.facts.get("splits", ())
        ]
        splits = [Split.model_validate(split) for split in raw]
        assert all(split.method == method or len(split.shape) == 2 for split in splits)
        parent, module = lab.work.parent, shaped.module
        for split in splits:
            layer: Any = parent.get_submodule(split.layer)
            found = factors(layer, split, entering(lab, split.layer) if data else None)
            chain: Any = module.get_submodule(split.layer)
            for part, weight in zip(chain, found, strict=True):
                part.weight.data.copy_(torch.from_numpy(np.ascontiguousarray(weight)))
            if chain[-1].bias is not None:
                chain[-1].bias.data.copy_(layer.bias.data)
        reestimate_batchnorm(module, lab.task, 8)
        return lab.finish(module)

    return make


def entering(lab: Lab, name: str, limit: int = 256) -> Tensor:
    """What a layer of the parent multiplies with on calibration data: rows of patches or vectors, in double."""
    layer: Any = lab.work.parent.get_submodule(name)
    rows: list[Tensor] = []

    def look(_module: nn.Module, inputs: Any) -> None:
        x = inputs[0].detach()
        if isinstance(layer, nn.Conv2d):
            patches = functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
            x = patches.transpose(1, 2)
            x = x[:, :: max(1, x.shape[1] // 64)]
        rows.append(x.flatten(0, -2).double())

    hook = layer.register_forward_pre_hook(look)
    with torch.no_grad():
        for inputs, _ in lab.task.batches("calibration", 64, limit=limit):
            lab.work.parent(*several(inputs))
    hook.remove()
    return torch.cat(rows)


# --- sparsity -------------------------------------------------------------------------------------------------------


def masked(ratio: float, *, together: bool = False) -> Reference:
    """torch.nn.utils.prune by magnitude, masks held while the same recipe trains at the same rate."""

    def make(lab: Lab, policy: Policy) -> bytes:
        module = lab.copy()
        parts = [(layer, "weight") for _, layer in layers_of(module)]
        if together:
            torch_prune.global_unstructured(parts, torch_prune.L1Unstructured, amount=ratio)
        else:
            for layer, name in parts:
                torch_prune.l1_unstructured(layer, name, amount=ratio)
        lab.loop(module, lab.response, lr=lab.rate(policy))
        for layer, name in parts:
            torch_prune.remove(layer, name)
        return lab.float_file(module)

    return make


def ramped(ratio: float, penalty: str = "none") -> Reference:
    """By hand: magnitudes cut on the cubic ramp (Zhu and Gupta 2018), or in one shot after a penalty has sorted them.

    Penalties as in the papers, L1 or the norms of filters and input channels times the root of their size (Wen et al.
    2016, equation 3), of our strength (0.1 of loss at the start) and for as long (30 % of the training).
    """

    def make(lab: Lab, policy: Policy) -> bytes:
        module = lab.copy()
        layers = [layer for _, layer in layers_of(module)]
        kept: dict[int, Tensor] = {}
        reached = [-1.0]

        def target(share: float) -> float:
            if penalty != "none":
                return ratio if share >= 0.3 else 0.0
            return ratio * (1 - (1 - min(1.0, int(share / 0.6 * 24 + 1e-9) / 24)) ** 3)

        @torch.no_grad()
        def before(share: float) -> None:
            wanted = target(share)
            for index, layer in enumerate(layers):
                if wanted > reached[0]:
                    sizes = layer.weight.abs().flatten()
                    going = sizes.argsort(stable=True)[: round(wanted * len(sizes))]
                    kept[index] = torch.ones_like(sizes).index_fill_(0, going, 0.0).view_as(layer.weight)
                layer.weight.mul_(kept[index])
            reached[0] = max(reached[0], wanted)

        def norm() -> Tensor:
            if penalty == "l1":
                return torch.stack([layer.weight.abs().sum() for layer in layers]).sum()
            slices = [layer.weight.movedim(axis, 0).flatten(1) for layer in layers for axis in (0, 1)]
            return torch.stack([one.norm(dim=1).sum() * one.shape[1] ** 0.5 for one in slices]).sum()

        start = float(norm().detach())

        def loss(outputs: Tensor, targets: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
            value = lab.response(outputs, targets, inputs)
            return value + norm() * (0.1 / start) if penalty != "none" and reached[0] < ratio else value

        lab.loop(module, loss, lr=lab.rate(policy), before=before)
        return lab.float_file(module)

    return make


def two_of_four(lab: Lab, policy: Policy) -> bytes:
    """torch.ao.pruning's WeightNormSparsifier: two of four neighbours along the input channels.

    It takes matrices only (torch 2.13), so it sees kernels as rows of input channels, one row per output and tap.
    """
    module = lab.copy()
    layers = {name: layer for name, layer in layers_of(module) if layer.weight.shape[1] % 4 == 0}
    flat = {name: layer.weight.detach().movedim(1, -1) for name, layer in layers.items()}
    rows = nn.ModuleList(nn.Linear(one.shape[-1], one.numel() // one.shape[-1], bias=False) for one in flat.values())
    for row, one in zip(rows, flat.values(), strict=True):
        row.weight.data = one.reshape(row.weight.shape).clone()  # type: ignore[union-attr, operator]
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(rows, [{"tensor_fqn": f"{index}.weight"} for index in range(len(rows))])
    sparsifier.step()
    sparsifier.squash_mask()
    for row, (name, layer) in zip(rows, layers.items(), strict=True):
        kept: Any = row.weight != 0
        torch_prune.custom_from_mask(layer, "weight", kept.reshape(flat[name].shape).movedim(-1, 1).float())
    lab.loop(module, lab.response, lr=lab.rate(policy))
    for layer in layers.values():
        torch_prune.remove(layer, "weight")
    return lab.float_file(module)


# --- integers and narrow floats ---------------------------------------------------------------------------------------


def in_files(model: bytes, change: Callable[[Path, Path], object]) -> bytes:
    """What a library makes of a file, that works on files."""
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name) / "float.onnx", Path(name) / "changed.onnx"
        source.write_bytes(model)
        change(source, target)
        return target.read_bytes()


def products_of_two(model: bytes) -> list[str]:
    """Matrix products of two activations, which our int8 leaves alone."""
    graph = onnx.load_from_string(model).graph
    constants = {one.name for one in graph.initializer}
    return [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] not in constants]


def integers(method: str = "MinMax", *, channel: bool = True, model: Callable[[Lab], bytes] | None = None) -> Reference:
    """onnxruntime's quantize_static with the profile's activation type on our calibration samples."""

    def make(lab: Lab, policy: Policy) -> bytes:  # noqa: ARG001
        data = lab.baseline.read_bytes() if model is None else model(lab)
        activation = QuantType.QUInt8 if lab.profile.numeric.activation == "uint8" else QuantType.QInt8
        text = lab.task.input.dtype != "float32"
        return in_files(
            data,
            lambda source, target: quantize_static(
                source,
                target,
                Reader(lab.task, IMAGES),
                quant_format=QuantFormat.QDQ,
                per_channel=channel,
                activation_type=activation,
                weight_type=QuantType.QInt8,
                calibrate_method=getattr(CalibrationMethod, method),
                op_types_to_quantize=["MatMul", "Gemm"] if text else None,
                nodes_to_exclude=products_of_two(data) if text else None,
            ),
        )

    return make


def dynamic(lab: Lab, policy: Policy) -> bytes:  # noqa: ARG001
    """onnxruntime's quantize_dynamic on matrix products."""
    return in_files(
        lab.baseline.read_bytes(),
        lambda source, target: quantize_dynamic(
            source, target, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8
        ),
    )


def four_bits(lab: Lab, policy: Policy) -> bytes:  # noqa: ARG001
    """onnxruntime's MatMulNBitsQuantizer, blocks of 32."""
    logging.getLogger("onnxruntime.quantization").setLevel(logging.WARNING)  # it tells of every node
    model = ONNXModel(onnx.load_from_string(lab.baseline.read_bytes()))
    model.replace_gemm_with_matmul()
    quantizer = MatMulNBitsQuantizer(model.model, block_size=32, is_symmetric=False, accuracy_level=4)
    quantizer.process()
    done: Any = quantizer.model
    return done.model.SerializeToString()


def half(lab: Lab, policy: Policy) -> bytes:  # noqa: ARG001
    """onnxconverter-common's float16."""
    convert = library("onnxconverter_common.float16", "onnxconverter-common").convert_float_to_float16
    return convert(onnx.load_from_string(lab.baseline.read_bytes()), keep_io_types=True).SerializeToString()


def simulated(lab: Lab, policy: Policy) -> Found:
    """torch.ao's eager quantization-aware training: its own fake-quantized network after the same recipe.

    Convolutions are fused with batch norms where their names say that they belong together (`conv1`, `bn1`).
    """
    module = lab.copy().train()
    names = {name for name, _ in module.named_modules()}
    pairs = [[name, name.replace("conv", "bn")] for name in names if name.rpartition(".")[2].startswith("conv")]
    if pairs := [pair for pair in pairs if pair[1] in names]:
        ao.fuse_modules_qat(module, pairs, inplace=True)
    activation = ao.FakeQuantize.with_args(
        observer=ao.MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8
    )
    weight = ao.FakeQuantize.with_args(
        observer=ao.MovingAveragePerChannelMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
    )
    asked = ao.QConfig(activation=activation, weight=weight)
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear) or type(part).__module__.startswith("torch.ao.nn.intrinsic"):
            part.qconfig = asked  # type: ignore[assignment]
    ao.prepare_qat(module, inplace=True)

    def before(share: float) -> None:
        if share >= 0.5:
            module.apply(freeze_bn_stats)
            module.apply(ao.disable_observer)

    return lab.seen(lab.loop(module, lab.response, lr=lab.rate(policy), before=before, bf16=False))


# --- equalization and bias correction by hand ---------------------------------------------------------------------


def folded(lab: Lab) -> nn.Module:
    """The parent with batch norms folded, by torch.fx."""
    return fuse(lab.copy())


def equalized(chain: Callable[[nn.Module], Sequence[str]]) -> Callable[[Lab], bytes]:
    """Ranges of neighbours made equal (Nagel et al. 2019, equation 11) along `chain`, names of layers in a row."""

    def make(lab: Lab) -> bytes:
        module = folded(lab)
        row: list[Any] = [module.get_submodule(name) for name in chain(module)]
        with torch.no_grad():
            for _ in range(8):
                for one, two in pairwise(row):
                    first = one.weight.abs().flatten(1).amax(1)
                    depthwise = isinstance(two, nn.Conv2d) and two.groups > 1
                    second = (
                        two.weight.abs().flatten(1).amax(1)
                        if depthwise
                        else two.weight.abs().transpose(0, 1).flatten(1).amax(1)
                    )
                    dead = (first == 0) | (second == 0)
                    scale = torch.where(dead, torch.ones_like(first), first / (first * second).sqrt())
                    one.weight.div_(scale.view(-1, *[1] * (one.weight.ndim - 1)))
                    one.bias.div_(scale)
                    shape = (-1, 1, 1, 1) if depthwise else (1, -1, *[1] * (two.weight.ndim - 2))
                    two.weight.mul_(scale.view(*shape))
        return lab.float_file(module)

    return make


def corrected(*, channel: bool) -> Callable[[Lab], bytes]:
    """Biases less the mean error of each channel's outputs with rounded weights, layer after layer (section 4.2).

    The means are measured on calibration data (Nagel et al. 2019, appendix D), as ours are.
    """

    def make(lab: Lab) -> bytes:
        exact, module = folded(lab), folded(lab)
        for name, _ in layers_of(module):
            layer: Any = module.get_submodule(name)
            given = layer.weight.detach().clone()
            size = given.abs().flatten(1).amax(1) if channel else given.abs().amax().expand(len(given))
            step = (size / 127).clamp_min(1e-12).view(-1, *[1] * (given.ndim - 1))
            layer.weight.data = (given / step).round().clamp(-127, 127) * step
            layer.bias.data -= mean_output(lab, module, name) - mean_output(lab, exact, name)
        kept = folded(lab)
        for name, _ in layers_of(kept):  # rounded weights would be rounded alike again; the given ones ship
            kept.get_submodule(name).bias.data = module.get_submodule(name).bias.data  # type: ignore[union-attr]
        return lab.float_file(kept)

    return make


def mean_output(lab: Lab, module: nn.Module, name: str) -> Tensor:
    """Mean of each channel that a layer gives on calibration data."""
    found: list[Tensor] = []
    layer = module.get_submodule(name)
    hook = layer.register_forward_hook(
        lambda _m, _i, out: found.append(out.mean((0, 2, 3)) if out.ndim == 4 else out.flatten(0, -2).mean(0))
    )
    with torch.no_grad():
        for inputs, _ in lab.task.batches("calibration", IMAGES, limit=IMAGES):
            module(*several(inputs))
    hook.remove()
    return torch.stack(found).mean(0)


# --- distillation ---------------------------------------------------------------------------------------------------


def hinted(kind: str, places: Sequence[str]) -> Reference:
    """The paper's loss in plain torch beside the task's own, on our student.

    relation: distances and angles of what enters the last layer, 25 and 50 times (Park et al. 2019, section 4).
    attention: beta / 2 of the squared difference of normalised maps, beta 1000 over their size, as the authors'
    program has it (Zagoruyko and Komodakis 2017, section 3.1). features: half the squared difference at the middle
    place through a learned 1x1 (Romero et al. 2015, equation 3).
    """

    def make(lab: Lab, policy: Policy) -> bytes:
        student, teacher = lab.shaped(policy).module, lab.work.parent
        seen: dict[str, list[Any]] = {}
        hooks = []
        entering_last = [name for name, part in teacher.named_modules() if isinstance(part, nn.Linear)][-1]
        watched = [entering_last] if kind == "relation" else list(places)
        for network in (student, teacher):
            for place in watched:
                part = network.get_submodule(place)
                if kind == "relation":
                    hooks.append(part.register_forward_pre_hook(_entered(seen, place)))
                else:
                    hooks.append(part.register_forward_hook(_left(seen, place)))
        middle = watched[len(watched) // 2]
        width = 0 if kind != "features" else _width(lab, teacher, middle, seen)
        adapter = nn.Linear(width, width) if width else None
        if adapter is not None:
            nn.init.eye_(adapter.weight)
            nn.init.zeros_(adapter.bias)

        def loss(outputs: Tensor, targets: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
            mine = {place: many[-1] for place, many in seen.items()}
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=lab.bf16):
                teacher(*inputs)
            theirs = {place: many[-1].float() for place, many in seen.items()}
            seen.clear()
            if kind == "relation":
                one, two = mine[entering_last].float(), theirs[entering_last]
                value = 25 * functional.smooth_l1_loss(_distances(one), _distances(two))
                value = value + 50 * functional.smooth_l1_loss(_angles(one), _angles(two))
            elif kind == "attention":
                value = torch.stack(
                    [500 * (_map(mine[p].float()) - _map(theirs[p])).square().mean() for p in watched]
                ).sum()
            else:
                assert adapter is not None
                axis = 1 if mine[middle].ndim == 4 else -1
                guess = adapter(mine[middle].float().movedim(axis, -1))
                value = 0.5 * (guess - theirs[middle].movedim(axis, -1)).square().mean()
            return functional.cross_entropy(outputs, targets) + value

        more: Iterable[nn.Parameter] = adapter.parameters() if adapter is not None else ()
        lab.loop(student, loss, more=tuple(more), lr=lab.rate(policy))
        for hook in hooks:
            hook.remove()
        return lab.float_file(student)

    return make


def answered(lab: Lab, policy: Policy) -> bytes:
    """Responses by hand on our student."""
    return lab.float_file(lab.loop(lab.shaped(policy).module, lab.response, lr=lab.rate(policy)))


def _entered(seen: dict[str, list[Any]], place: str) -> Any:
    return lambda _module, inputs: seen.setdefault(place, []).append(inputs[0])


def _left(seen: dict[str, list[Any]], place: str) -> Any:
    return lambda _module, _inputs, output: seen.setdefault(place, []).append(several(output)[0])


def _width(lab: Lab, teacher: nn.Module, place: str, seen: dict[str, list[Any]]) -> int:
    inputs, _ = next(iter(lab.task.batches("calibration", 2, limit=2)))
    with torch.no_grad():
        teacher(*several(inputs))
    shape = seen[place][-1].shape
    seen.clear()
    return shape[1] if len(shape) == 4 else shape[-1]


def _distances(rows: Tensor) -> Tensor:
    found = torch.cdist(rows, rows)
    return found / found[found > 0].mean()


def _angles(rows: Tensor) -> Tensor:
    seen = functional.normalize(rows.unsqueeze(0) - rows.unsqueeze(1), p=2, dim=2)
    return torch.bmm(seen, seen.transpose(1, 2))


def _map(features: Tensor) -> Tensor:
    """Where a layer looks: mean of squares over channels, flat and of unit length."""
    return functional.normalize(features.square().mean(1 if features.ndim == 4 else -1).flatten(1))


# --- storage --------------------------------------------------------------------------------------------------------


def replaced(model: bytes, change: Callable[[NDArray[Any]], NDArray[Any]]) -> bytes:
    """The file with every weight changed."""
    proto = onnx.load_from_string(model)
    for tensor in proto.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.ndim >= 2 and values.size >= 64 and values.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(change(values).astype(np.float32), tensor.name))
    return proto.SerializeToString()


def clustered(lab: Lab, policy: Policy) -> bytes:  # noqa: ARG001
    """scikit-learn's KMeans, 16 values per weight from a linear start (Han et al. 2016, section 3.2)."""
    kind = library("sklearn.cluster", "scikit-learn").KMeans

    def change(values: NDArray[Any]) -> NDArray[Any]:
        start = np.linspace(values.min(), values.max(), 16)[:, None]
        found = kind(16, init=start, n_init=1, max_iter=300).fit(values.reshape(-1, 1))
        return found.cluster_centers_[found.labels_].reshape(values.shape)

    return replaced(lab.baseline.read_bytes(), change)


def powers(lab: Lab, policy: Policy) -> bytes:  # noqa: ARG001
    """Rounding to powers of two of 5 bits by hand (Zhou et al. 2017, "INQ", equations 1-4), without retraining."""

    def change(values: NDArray[Any]) -> NDArray[Any]:
        top = int(np.floor(np.log2(4 * np.abs(values).max() / 3)))
        low = top + 1 - 2 ** (5 - 1) // 2
        table = np.array([0.0, *(2.0**power for power in range(low, top + 1))])
        out = np.zeros_like(values)
        for alpha, beta in pairwise(table.tolist()):  # equation 4
            inside = ((alpha + beta) / 2 <= np.abs(values)) & (np.abs(values) < 3 * beta / 2)
            out[inside] = (beta * np.sign(values))[inside]
        out[np.abs(values) >= 3 * table[-1] / 2] = (table[-1] * np.sign(values))[np.abs(values) >= 3 * table[-1] / 2]
        return out

    return replaced(lab.baseline.read_bytes(), change)


def squeezed(lab: Lab, policy: Policy) -> Found:  # noqa: ARG001
    """The zstandard library on the whole file, at our level."""
    model = lab.baseline.read_bytes()
    return Found(lab.right, len(zstandard.ZstdCompressor(level=6).compress(model)))
