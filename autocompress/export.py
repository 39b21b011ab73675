"""From a torch module to the ONNX file that ships, in parts, with the map from sites to nodes.

Both of torch's exporters are offered; they give different graphs, so one is used for a whole run. What they leave
behind is put in order here: constants become initializers, batch normalisation is part of its convolution, nodes and
tensors get short names that depend on nothing but the graph (`stages.0.0.conv1/Conv`, `Add_3`), source locations go.
Equal input gives equal bytes under equal versions of torch and onnx.
"""

from __future__ import annotations

import copy
import linecache
import logging
import re
import sys
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import compose as onnx_compose
from onnx import helper, version_converter
from torch import nn
from torch.jit._trace import TracerWarning
from torch.onnx._internal.torchscript_exporter import utils
from torch.overrides import TorchFunctionMode

from autocompress import branches, memory, onnxfile
from autocompress.graph import (
    graph_hash,
    lightened,
    open_session,
    opset_of,
    rename,
    replace,
    settle,
    strip,
    weighted,
)
from autocompress.models import routing
from autocompress.models.trace import examples, still
from autocompress.tasks import InputSpec, Predict, several
from autocompress.types import Profile, TrialFailure, UserError

__all__ = ["EXPORTERS", "Exported", "Exporter", "Part", "compose", "export", "graph_hash", "parity", "predictor"]

Exporter = Literal["torchscript", "dynamo"]
EXPORTERS: tuple[Exporter, ...] = ("torchscript", "dynamo")
"""In the order in which a network is given to them: the first takes a tenth of the other's time."""
TOLERANCE = 1e-3
"""Largest relative difference between file and module. Sums in another order give 1e-6 to 1e-5, a wrong weight 1e-2."""
ROUNDING, TOLERATED = 4.0, 2e-2
DYNAMO_OPSET = 18
"""What the dynamo exporter writes of itself; older opsets are converted from it."""
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_LOCK = threading.Lock()  # torch's exporters keep their state in globals, Python its warning filters


@dataclass(frozen=True)
class Part:
    """One ONNX file: `nodes` maps every site that has weights here (and what contains it) to its weighted nodes.

    Of a network that decides by its input it is the plain form, which computes every path and picks by row; `routes`
    says by which `Where` each of its routes decides (`branches`).
    """

    name: str
    model: bytes = field(repr=False)
    nodes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    routes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Exported:
    """A network as parts; each part's output is the next one's input."""

    parts: tuple[Part, ...]
    opset: int
    exporter: Exporter
    learned: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    """Ranges that training has found: site -> {"input": (low, high), "output": (low, high)}."""


def export(module: nn.Module, spec: InputSpec, *, opset: int, exporter: Exporter = "torchscript") -> Exported:
    """Write `module` in evaluation mode; the first axis of every input and output is the symbolic `batch`.

    The module's modes are as before afterwards. Raises TrialFailure, with the exporter's own words, if it cannot.
    """
    example = examples(spec, 2)
    modes = {part: part.training for part in module.modules()}
    size = memory.module_bytes(module)
    memory.check(memory.FILE * size, f"exporting a network of {size / 1e9:.1f} GB")
    # training leaves weights in channels-last order, from which the dynamo exporter writes another, slower graph
    layouts = [(weight, weight.data) for weight in module.parameters() if weight.ndim > 3 and _reordered(weight)]
    module.eval()
    try:
        for weight, data in layouts:
            weight.data = torch.empty(data.shape, dtype=data.dtype).copy_(data)  # contiguous() keeps strides of 1x1
        calls = _weighted_calls(module, example)
        with _LOCK, _no_dump(), warnings.catch_warnings():
            # torch >= 2.9 announces the end of this exporter, which takes a tenth of the other's time
            warnings.filterwarnings("ignore", "You are using the legacy TorchScript-based", DeprecationWarning)
            warnings.filterwarnings("ignore", "The feature will be removed. Please", DeprecationWarning)
            # traced control flow is judged by parity at another batch size, not by its form, and so is everything else
            # that an exporter has doubts about (negative indices, fixed sizes ...)
            warnings.simplefilter("ignore", TracerWarning)
            warnings.simplefilter("ignore", UserWarning)
            # torch 2.13's dynamo exporter calls what its own pytree deprecates
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            write = _with_torchscript if exporter == "torchscript" else _with_dynamo
            model = write(module, example, [one.name for one in spec.every], opset)
    except (TrialFailure, UserError):
        raise
    except Exception as error:
        # exporters raise whatever their passes raise; for the search all of it means: this candidate has no file
        raise TrialFailure(f"export ({exporter}) failed: {_own_function(error) or _cause(error)}") from error
    finally:
        for weight, data in layouts:
            weight.data = data
        for part, mode in modes.items():
            part.training = mode
    settle(model, {one.name: value.numpy() for one, value in zip(spec.every, example, strict=True)})
    _keep_inputs(model, spec)
    sites = _match(model, calls, dict(module.named_parameters()))
    decided = branches.decisions(model, routing.thresholds(module))
    nodes = _with_containers(rename(model, sites))
    routes = {route: model.graph.node[place].name for route, place in decided.items()}
    if (written := opset_of(model)) != opset:
        model = _convert(model, written, opset)
    strip(model)
    part = Part("model", onnxfile.write(model), nodes, routes)
    return Exported(parts=(part,), opset=opset, exporter=exporter)


def _reordered(weight: torch.Tensor) -> bool:
    """Whether a weight's strides are others than a fresh one's (is_contiguous() looks over those of 1x1)."""
    return weight.stride() != torch.empty(weight.shape, device="meta").stride()


def _keep_inputs(model: onnx.ModelProto, spec: InputSpec) -> None:
    """All inputs in their order, also one that nothing reads any more: dropped layers must not change how to call."""
    there = {value.name: value for value in model.graph.input}
    kinds = {one.name: helper.np_dtype_to_tensor_dtype(np.dtype(one.dtype)) for one in spec.every}
    replace(
        model.graph.input,
        [
            there.get(one.name) or helper.make_tensor_value_info(one.name, kinds[one.name], ["batch", *one.shape])
            for one in spec.every
        ],
    )


def _own_function(error: BaseException) -> str:
    """Said of a torch.autograd.Function that has no `symbolic` and computes what no file can hold, else nothing."""
    found = re.search(r"Defined at:\s+(\S+)\((\d+)\): \w+\s+\S*autograd/function\.py", str(error))
    place = f"{Path(found[1]).name}:{found[2]}" if found else ""
    return f"the torch.autograd.Function at {place} computes what ONNX cannot; give it a `symbolic`" if place else ""


def _cause(error: BaseException) -> str:
    """What began it: the dynamo exporter packs an error into advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {_line(error)}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


# --- the two exporters ------------------------------------------------------------------------------------------


@contextmanager
def _no_dump() -> Iterator[None]:
    """Of a graph that it cannot write, torch (up to 2.13) prints every node, though it was not asked to be verbose.

    It also hands over the defaults of arguments that are left out, those that go by keyword alone as positional ones.
    """
    log, defaults = torch._C._jit_onnx_log, utils._decide_input_format
    torch._C._jit_onnx_log = lambda *_: None
    utils._decide_input_format = lambda _, given: given
    try:
        yield
    finally:
        torch._C._jit_onnx_log, utils._decide_input_format = log, defaults


def _with_torchscript(
    module: nn.Module, example: tuple[torch.Tensor, ...], inputs: list[str], opset: int
) -> onnx.ModelProto:
    outputs = _output_names(module, example)
    axes = {name: {0: "batch"} for name in (*inputs, *outputs)}
    names = {"input_names": inputs, "output_names": outputs, "dynamic_axes": axes}

    def write(target: Any) -> None:  # a file object is accepted, though torch's annotation has paths alone
        torch.onnx.export(module, example, target, dynamo=False, opset_version=opset, **names)

    if (size := memory.module_bytes(module)) <= onnxfile.LIMIT:
        file = BytesIO()
        write(file)
        return onnx.load_model_from_string(file.getvalue())
    with onnxfile.scratch(size) as folder:  # above 2 GB this exporter writes files only, every weight into its own
        write(str(folder / "model.onnx"))
        model = onnx.load_model(str(folder / "model.onnx"))
    for tensor in model.graph.initializer:  # what was read says so, what never left does not
        tensor.ClearField("data_location")
    return model


def _with_dynamo(
    module: nn.Module, example: tuple[torch.Tensor, ...], inputs: list[str], opset: int
) -> onnx.ModelProto:
    outputs = _output_names(module, example)
    names: dict[str, Any] = {"input_names": inputs, "output_names": outputs}
    names["dynamic_shapes"] = tuple({0: "batch"} for _ in example)
    told = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with redirect_stderr(StringIO()):  # of a network that it cannot take, torch prints every operation
            program = torch.onnx.export(
                module, example, dynamo=True, opset_version=max(opset, DYNAMO_OPSET), verbose=False, **names
            )
    finally:
        logging.disable(told)
    if program is None:
        raise TrialFailure("export (dynamo) gave no program")
    return program.model_proto


def _output_names(module: nn.Module, example: tuple[torch.Tensor, ...]) -> list[str]:
    """`output`, or `output0`, `output1` ... where there are several."""
    with torch.no_grad():
        count = len(several(module(*example)))
    return ["output"] if count == 1 else [f"output{index}" for index in range(count)]


def _convert(model: onnx.ModelProto, written: int, opset: int) -> onnx.ModelProto:
    try:
        large = onnxfile.weight_bytes(model) > onnxfile.LIMIT
        converted = version_converter.convert_version(lightened(model) if large else model, opset)
        for node in converted.graph.node:  # the converter leaves an attribute behind that older reductions lack
            noop = next((one for one in node.attribute if one.name == "noop_with_empty_axes"), None)
            if noop is not None and not noop.i and opset < DYNAMO_OPSET:
                node.attribute.remove(noop)
        onnx.checker.check_model(converted)  # and others, which no older form says
        if large:
            weighted(converted, model)
        return converted
    except (RuntimeError, onnx.checker.ValidationError) as error:
        raise TrialFailure(f"export: opset {written} cannot be converted to {opset}: {_line(error)}") from error


# --- sites and their nodes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    site: str
    shapes: tuple[tuple[int, ...], ...]  # the weight, and as a matrix product wants it


def _weighted_calls(module: nn.Module, example: tuple[torch.Tensor, ...]) -> list[_Call]:
    """Modules with a weight of two or more axes, in the order in which one forward pass calls them."""
    calls: list[_Call] = []
    handles: list[Any] = []
    for name, part in module.named_modules():
        weight: Any = getattr(part, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim < 2:
            continue
        shape = tuple(weight.shape)
        call = _Call(name or ".", (shape, shape[::-1]) if len(shape) == 2 else (shape,))
        handles.append(part.register_forward_pre_hook(lambda *_, call=call: calls.append(call)))
    try:
        with torch.no_grad():
            module(*example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _match(model: onnx.ModelProto, calls: Sequence[_Call], parameters: Mapping[str, Any]) -> dict[int, str]:
    """Index of a weighted node -> site.

    Both exporters keep the order of the calls, so nodes and calls are walked together. A call is a node's if the
    shapes agree and so does the weight's name where it survived (folding renames), else the scope in the node's name
    (TorchScript) or metadata (dynamo). Calls without a node (embeddings, dead ends) and nodes without a call
    (functional products) are passed over.
    """
    dims = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    found: dict[int, str] = {}
    start = 0
    for index, node in enumerate(model.graph.node):
        if node.op_type not in _WEIGHTED:
            continue
        weight = node.input[1]
        for position in range(start, len(calls)):
            call = calls[position]
            if dims.get(weight) in call.shapes and _speaks_of(node, weight, call.site, parameters):
                found[index] = call.site
                start = position + 1
                break
    return found


def _speaks_of(node: onnx.NodeProto, weight: str, site: str, parameters: Mapping[str, Any]) -> bool:
    if weight in parameters:
        return weight == ("weight" if site == "." else f"{site}.weight")
    scopes = [prop.value for prop in node.metadata_props if prop.key == "pkg.torch.onnx.name_scopes"]
    if scopes:
        return f"'{site}'" in scopes[0]
    path = node.name.split("/")
    if len(path) < 3:  # no scope was written
        return True
    # TorchScript writes a module's name from its last part that is no number, and _N after repeated calls
    short = re.search(r"(?:^|\.)([^.]*[^.\d][^.]*(?:\.\d+)*|[\d.]+)$", site)
    return bool(short) and re.fullmatch(re.escape(short[1]) + r"(_\d+)?", path[-2]) is not None


def _with_containers(sites: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Nodes by site, by every module that contains it, and by "." for the whole network."""
    nodes: defaultdict[str, list[str]] = defaultdict(list)
    for site, names in sites.items():
        atoms = site.split(".") if site != "." else []
        for depth in range(len(atoms) + 1):
            nodes[".".join(atoms[:depth]) or "."].extend(names)
    return {site: tuple(nodes[site]) for site in sorted(nodes)}


# --- parts, parity, identity --------------------------------------------------------------------------------------


def compose(exported: Exported) -> bytes:
    """One file from all parts, each fed by the one before; a single part is returned as it is.

    One that decides by its input becomes the file that computes one way, for one sample at a time. Raises UserError if
    there is no part.
    """
    if not exported.parts:
        raise UserError("compose: there is no part to compose")
    if len(exported.parts) == 1:
        (part,) = exported.parts
        return branches.branched(part.model, part.routes) if part.routes else part.model
    if (size := sum(len(part.model) for part in exported.parts)) > onnxfile.LIMIT:
        raise TrialFailure(f"{len(exported.parts)} parts of {size / 1e9:.1f} GB are too large to be joined")
    models = [onnxfile.read(part.model) for part in exported.parts]
    first, last = models[0].graph.input[0].name, models[-1].graph.output[0].name
    prefixed = [
        onnx_compose.add_prefix(model, f"{part.name}:") for part, model in zip(exported.parts, models, strict=True)
    ]
    whole = prefixed[0]
    for following in prefixed[1:]:
        link = (whole.graph.output[0].name, following.graph.input[0].name)
        whole = onnx_compose.merge_models(whole, following, io_map=[link])
    outer = {whole.graph.input[0].name: first, whole.graph.output[0].name: last}
    for value in (*whole.graph.input, *whole.graph.output):
        value.name = outer.get(value.name, value.name)
    for node in whole.graph.node:
        replace(node.input, [outer.get(name, name) for name in node.input])
        replace(node.output, [outer.get(name, name) for name in node.output])
    strip(whole)
    return onnxfile.write(whole)


def parity(module: nn.Module, model: bytes, *inputs: NDArray[Any]) -> float:
    """Largest difference between file and module relative to the module's largest output, the worst of all outputs.

    Relative, because a network whose batch-norm statistics are not estimated yet answers with about 1e-15, which any
    absolute tolerance passes. Some deep networks magnify rounding above TOLERANCE: there the file may be ROUNDING times
    as far from the module in double precision as the module in single precision is, and at most TOLERATED. Raises
    TrialFailure beyond, or if either answers with NaN, infinity or only zeros.
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            answers = several(module(*(torch.from_numpy(one) for one in inputs)))
    finally:
        for part, mode in modes.items():
            part.training = mode
    predict = predictor(model)
    try:
        found = several(predict(inputs))
    except Exception as error:  # onnxruntime's errors have no class of their own
        raise TrialFailure(
            f"parity: the file does not run on a batch of {len(inputs[0])}; a network that turns its batch size into a "
            f"number, as int(x.shape[0]), cannot be exported: {_line(error)}"
        ) from error
    if len(found) != len(answers):
        raise TrialFailure(f"parity: the file has {len(found)} outputs, torch {len(answers)}")
    try:
        return max(_disagreement(one, other.float().numpy()) for one, other in zip(found, answers, strict=True))
    except TrialFailure as failure:
        rounding = _by_rounding(module, found, tuple(one.float().numpy() for one in answers), inputs)
        if rounding is not None:
            return rounding
        if place := _branch(module, tuple(torch.from_numpy(one) for one in inputs)):
            raise TrialFailure(f"{failure}; the network decides at {place}, of which a file keeps one way") from failure
        raise


def _by_rounding(
    module: nn.Module, found: Sequence[Any], single: Sequence[Any], inputs: Sequence[NDArray[Any]]
) -> float | None:
    """The file's error against the module in double precision where rounding explains it, else None."""
    if 2 * memory.module_bytes(module) > memory.available():
        return None
    arguments = [torch.from_numpy(one) for one in inputs]
    try:
        double = copy.deepcopy(module).double().eval()
        with torch.no_grad():
            exact = several(double(*(one.double() if one.is_floating_point() else one for one in arguments)))
    except Exception:  # noqa: BLE001  a network that cannot compute in double precision keeps its verdict
        return None
    worst = 0.0
    for ours, theirs, reference in zip(found, single, (one.double().numpy() for one in exact), strict=True):
        if not ours.shape == theirs.shape == reference.shape:
            return None
        largest = float(np.abs(reference).max())
        error, own = (float(np.abs(one - reference).max()) / largest if largest else np.nan for one in (ours, theirs))
        if not error <= min(ROUNDING * own, TOLERATED):
            return None
        worst = max(worst, error)
    return worst


def decided(module: nn.Module, *inputs: torch.Tensor) -> str:
    """Where the network's own code makes a Python value of its data, of which a file keeps one: file:line, or nothing.

    Libraries' code is left out (they ask for shapes and flags), and so is what does not hang on the inputs.
    """
    asked = _Asked()
    try:
        with still(module), asked:
            module(*inputs)
    except Exception:  # noqa: BLE001  what does not run says so elsewhere
        return ""
    own = {(file, line) for file, line in asked.places if not _LIBRARIES.search(Path(file).as_posix())}
    kinds = ("boolean", "number", "integer", "float", "list")
    return next((_place(*one) for one in _made_python(module, inputs, kinds) if one in own), "") if own else ""


_LIBRARIES = re.compile(r"/(site|dist)-packages/(torch|torchvision|timm|transformers|onnx\w*)/")


class _Asked(TorchFunctionMode):
    """Notes the lines at which tensors become Python's numbers and truth values; shapes, being none, do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[tuple[str, int]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__bool__", "__int__", "__float__", "__index__", "item", "tolist"):
            frame = sys._getframe(1)
            self.places.add((frame.f_code.co_filename, frame.f_lineno))
        return func(*args, **(kwargs or {}))


def _branch(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> str:
    """Where the module asks a computed tensor for a truth value: file:line and the line, or nothing."""
    return next((_place(*one) for one in _made_python(module, inputs, ("boolean",))), "")


def _made_python(module: nn.Module, inputs: tuple[torch.Tensor, ...], kinds: Sequence[str]) -> list[tuple[str, int]]:
    """File and line where what hangs on the inputs becomes a Python value, as torch's tracer sees it."""
    try:
        with _LOCK, still(module), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.jit.trace(module, inputs, check_trace=False, strict=False)
    except Exception:  # noqa: BLE001  what cannot be traced keeps the reason that it has
        return []
    return [
        (one.filename, one.lineno)
        for one in told
        if issubclass(one.category, TracerWarning) and any(f"a Python {kind}" in str(one.message) for kind in kinds)
    ]


def _place(file: str, line: int) -> str:
    code = linecache.getline(file, line).strip()
    return f"{Path(file).name}:{line}" + (f" ({code})" if code else "")


def _disagreement(found: NDArray[Any], expected: NDArray[Any]) -> float:
    if found.shape != expected.shape:
        raise TrialFailure(f"parity: the file answers with shape {found.shape}, torch with {expected.shape}")
    largest = float(np.abs(expected).max())
    error = float(np.abs(found - expected).max()) / largest if largest > 0 else float("nan")
    if not error <= TOLERANCE:
        raise TrialFailure(
            f"parity: file and torch differ by {error:.2g} of the largest output {largest:.2g} (limit {TOLERANCE:g})"
        )
    return error


def predictor(model: bytes, threads: int = 1, profile: Profile | None = None) -> Predict:
    """Run a model with onnxruntime: inputs (n, ...) to its output (n, ...), tuples of them where there are several.

    A file for one sample at a time is run on each.
    On the processor, or on the provider of a `profile` of this host. Raises TrialFailure if it cannot load.
    """
    if profile is None:
        session = open_session(model, threads)
    else:
        session = open_session(model, profile.threads, profile.provider, profile.provider_options)
    names = [one.name for one in session.get_inputs()]

    single = all(one.shape and one.shape[0] == 1 for one in session.get_inputs())

    def predict(inputs: Any) -> Any:
        feed = {name: np.ascontiguousarray(one) for name, one in zip(names, several(inputs), strict=True)}
        count = len(feed[names[0]]) if single else 1
        rows = [{name: one[i : i + 1] for name, one in feed.items()} for i in range(count)] if count > 1 else [feed]
        answers = [list(map(np.asarray, session.run(None, row))) for row in rows]
        outputs = [np.concatenate(one) for one in zip(*answers, strict=True)] if count > 1 else answers[0]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return predict
