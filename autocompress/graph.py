"""ONNX graphs: put an exporter's leavings in order, run one, hash one (floor F2).

After `settle` and `rename` a graph's nodes and tensors have short names that depend on nothing but the graph
(`stages.0.0.conv1/Conv`, `Add_3`, `head.weight`), and no node computes what is constant.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper, shape_inference

from autocompress.onnxfile import read, session
from autocompress.types import TrialFailure, UserError

IR_VERSION = 9
"""Newest file format that onnxruntime 1.17 reads; nothing written here needs a newer one."""
RESIZE_SIZES = 3
"""Where a Resize takes the shape that it gives."""
PROCESSOR = "CPUExecutionProvider"
SETTLED_BYTES = 1 << 20
"""Largest tensor computed from shapes (positions, masks) that is written into the file."""


def settle(model: onnx.ModelProto, example: Mapping[str, NDArray[Any]]) -> None:
    """Remove in place what the data do not decide: constant nodes, computed sizes, means that are pooling."""
    _inline_constants(model)
    _settle_sizes(model, example)
    _settle_means(model)
    _drop_dead(model)


def _inline_constants(model: onnx.ModelProto) -> None:
    """Constant nodes become initializers, identities are seen through."""
    graph = model.graph
    outputs = {output.name for output in graph.output}
    alias: dict[str, str] = {}
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = alias.get(name, name)
        if node.op_type == "Identity" and node.output[0] not in outputs:
            alias[node.output[0]] = node.input[0]
        elif node.op_type == "Constant" and node.attribute[0].name == "value":
            node.attribute[0].t.name = node.output[0]
            graph.initializer.append(node.attribute[0].t)
        else:
            kept.append(node)
    replace(graph.node, kept)


def _settle_sizes(model: onnx.ModelProto, example: Mapping[str, NDArray[Any]]) -> None:
    """What the file would compute from its tensors' shapes on every run becomes a constant where it is constant.

    TorchScript writes ten small nodes per channel shuffle or split into heads, both exporters four per resize. The
    values are read off at two batch sizes: equal ones are constant, and a Reshape may leave one axis to the runtime.
    """
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    derived = _of_shapes(model, constants)
    asking = [
        (node, place)
        for node in graph.node
        for place, name in enumerate(node.input)
        if name in derived and not derived.issuperset(node.output)
    ]
    if not asking:
        return
    resized = [node.input[0] for node, _ in asking if node.op_type == "Resize"]
    wanted = list(dict.fromkeys((*(node.input[place] for node, place in asking), *resized)))
    probe = _weightless(model, derived)
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in example)
    names = [output.name for output in probe.graph.output]
    probing = open_session(probe)
    found: list[dict[str, NDArray[Any]]] = []
    longer = {name: np.concatenate((values, values[:1])) for name, values in example.items()}
    used = {value.name for value in graph.input}  # an input that nothing reads is not in the file
    for inputs in (example, longer):
        feed = {name: values for name, values in inputs.items() if name in used}
        try:
            outputs: list[Any] = list(probing.run(names, feed))
        except Exception as error:
            # onnxruntime's exceptions share no base class
            raise TrialFailure(f"the exported file runs at one batch size only: {_line(error)}") from error
        found.append({**feed, **dict(zip(names, outputs, strict=True))})
    for node, place in asking:
        one, other = (np.array(values[node.input[place]]) for values in found)
        if node.op_type == "Resize" and place == RESIZE_SIZES:
            before = found[0][node.input[0]].shape
            scales = np.array([1.0, *(new / old for new, old in zip(one[1:], before[1:], strict=True))], np.float32)
            exact = [int(np.floor(old * scale)) for old, scale in zip(before, scales, strict=True)] == one.tolist()
            if exact and one[1:].tolist() == other[1:].tolist():  # else the runtime would round to another size
                graph.initializer.append(numpy_helper.from_array(scales, f"{node.output[0]}.scales"))
                replace(node.input, [*node.input[:2], f"{node.output[0]}.scales"])
            continue
        if node.op_type == "Reshape" and one.shape == other.shape and -1 not in one:
            moving = np.flatnonzero(one != other)
            if len(moving) == 1:
                one[moving] = other[moving] = -1
        if one.nbytes <= SETTLED_BYTES and one.shape == other.shape and one.tolist() == other.tolist():
            name = f"{node.output[0]}.settled{place}"
            graph.initializer.append(numpy_helper.from_array(one, name))
            node.input[place] = name


def _of_shapes(model: onnx.ModelProto, constants: set[str]) -> set[str]:
    """Tensors that are computed from shapes and constants alone, constants themselves left out."""
    derived: set[str] = set()
    for node in model.graph.node:
        inputs = [name for name in node.input if name]
        settled = bool(inputs) and all(name in constants or name in derived for name in inputs)
        random = node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial", "Dropout")
        if node.op_type == "Shape" or (settled and not random and not _has_graph(node)):
            derived.update(filter(None, node.output))
    return derived


def _weightless(model: onnx.ModelProto, derived: set[str]) -> onnx.ModelProto:
    """The graph without outputs, zeros for weights: large ones would be copied three times, and sizes ask for none."""
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    graph = light.graph
    graph.name = "sizes"
    graph.input.extend(model.graph.input)
    kept = {name for node in model.graph.node for name in node.input if derived.intersection(node.output)}
    for tensor in model.graph.initializer:
        if tensor.name in kept or tensor.data_type != onnx.TensorProto.FLOAT or np.prod(tensor.dims) < 4096:
            graph.initializer.append(tensor)
        else:
            shape = f"{tensor.name}.shape"
            graph.initializer.append(numpy_helper.from_array(np.array(tensor.dims, np.int64), shape))
            graph.node.append(helper.make_node("ConstantOfShape", [shape], [tensor.name]))
    graph.node.extend(model.graph.node)
    return light


def _has_graph(node: onnx.NodeProto) -> bool:
    """True for If, Loop and Scan, whose bodies read tensors that are not among the inputs."""
    return any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)


def _settle_means(model: onnx.ModelProto) -> None:
    """A mean over all positions of (n, c, h, w) becomes GlobalAveragePool, which has an integer form."""
    if not any(node.op_type == "ReduceMean" for node in model.graph.node):
        return
    ranks = {name: len(found.shape.dim) for name, found in types_of(model).items()}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    kept: list[onnx.NodeProto] = []
    for node in model.graph.node:
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        axes = attributes.get("axes", ())
        if node.op_type == "ReduceMean" and len(node.input) == 2 and node.input[1] in constants:
            axes = numpy_helper.to_array(constants[node.input[1]]).ravel().tolist()
        four = node.op_type == "ReduceMean" and ranks.get(node.input[0]) == 4
        if not four or sorted(axis % 4 for axis in axes) != [2, 3]:
            kept.append(node)
            continue
        flat = not attributes.get("keepdims", 1)
        pooled = f"{node.output[0]}.pooled" if flat else node.output[0]
        kept.append(helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], node.name))
        if flat:
            kept.append(helper.make_node("Flatten", [pooled], [node.output[0]], f"{node.name}.flat", axis=1))
    replace(model.graph.node, kept)


def _drop_dead(model: onnx.ModelProto) -> None:
    """Remove nodes and initializers that no output needs."""
    graph = model.graph
    needed = {output.name for output in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    replace(graph.node, kept[::-1])
    _keep(graph.initializer, needed)


def rename(model: onnx.ModelProto, sites: Mapping[int, str]) -> dict[str, tuple[str, ...]]:
    """Name nodes by site or type, tensors by node, weights by site; returns the nodes of every site that has some.

    Exporters merge equal initializers, so their number would depend on values: each user gets its own copy. What has
    one user keeps its values where they are.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    outer = {value.name for value in (*graph.input, *graph.output)}
    used: Counter[str] = Counter()
    tensors: dict[str, str] = {}
    fresh: dict[str, str] = {}  # name of a constant -> the exporter's
    by_site: defaultdict[str, list[str]] = defaultdict(list)

    def unique(stem: str) -> str:
        used[stem] += 1
        return stem if used[stem] == 1 else f"{stem}_{used[stem] - 1}"

    for index, node in enumerate(graph.node):
        site = sites.get(index)
        node.name = unique(f"{site}/{node.op_type}" if site else node.op_type)
        if site:
            by_site[site].append(node.name)
        for place, name in enumerate(node.input):
            if name in constants:
                role = ("input", "weight", "bias")[place] if site else str(place)
                # a module called twice keeps one weight; anything else never shares
                mine = f"{site}.{role}" if site else f"{node.name}.{role}"
                fresh[mine] = name
                node.input[place] = mine
            elif name:
                node.input[place] = tensors.get(name, name)
        for place, name in enumerate(node.output):
            if name and name not in outer:
                tensors[name] = node.name if place == 0 else f"{node.name}.out{place}"  # `.1` is a constant it reads
                node.output[place] = tensors[name]
    _keep(graph.initializer, set(fresh.values()))
    first: dict[str, str] = {}
    copies = [_renamed(constants[name], mine) for mine, name in fresh.items() if first.setdefault(name, mine) != mine]
    for name, mine in first.items():
        tensor = constants[name]
        if tensor.HasField("raw_data"):
            tensor.name = mine
        else:
            tensor.CopyFrom(_renamed(tensor, mine))
    graph.initializer.extend(copies)
    order = {mine: place for place, mine in enumerate(fresh)}
    graph.initializer.sort(key=lambda tensor: order[tensor.name])
    return {site: tuple(names) for site, names in by_site.items()}


def _renamed(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor), name)


def _keep(tensors: Any, names: Collection[str]) -> None:
    """Drop all others in place: what protobuf copies within a graph is not freed before the graph is."""
    for place in reversed(range(len(tensors))):
        if tensors[place].name not in names:
            del tensors[place]


def strip(model: onnx.ModelProto) -> None:
    """Drop what describes the exporter's run rather than the network, and cap the file format's version."""
    graph = model.graph
    for message in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        message.ClearField("doc_string")
        if "metadata_props" in message.DESCRIPTOR.fields_by_name:
            message.ClearField("metadata_props")
    graph.ClearField("value_info")
    graph.name = "autocompress"
    model.ir_version = min(model.ir_version, IR_VERSION)


def types_of(model: onnx.ModelProto) -> dict[str, onnx.TypeProto.Tensor]:
    """Element type and shape of every tensor that they can be inferred for, large weights not being copied."""
    inferred = shape_inference.infer_shapes(lightened(model)).graph
    found = {info.name: info.type.tensor_type for info in (*inferred.input, *inferred.value_info, *inferred.output)}
    for tensor in model.graph.initializer:
        if tensor.name not in found:
            found[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims).tensor_type
    return found


def lightened(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with its weights as inputs: what onnx's own functions can take, whose limit is 2 GB."""
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    graph = light.graph
    graph.name = "light"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    fed = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if len(tensor.dims) <= 1 and sum(tensor.dims) <= 64:  # sizes and axes, which shapes depend on
            graph.initializer.append(tensor)
        elif tensor.name not in fed:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return light


def weighted(light: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Give the weights of `model` back, in place, to what was made of `lightened(model)`."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for tensor in light.graph.initializer:
        weights.pop(tensor.name, None)
    replace(light.graph.input, [value for value in light.graph.input if value.name not in weights])
    light.graph.initializer.extend(weights.values())


def opset_of(model: onnx.ModelProto) -> int:
    """The model's version of ONNX's own operators."""
    return next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def replace(target: Any, items: Iterable[Any]) -> None:
    """New content for a repeated field (protobuf copies messages, so the items are taken out first)."""
    taken = list(items)
    del target[:]
    target.extend(taken)


def open_session(
    model: bytes | onnx.ModelProto,
    threads: int = 1,
    provider: str = PROCESSOR,
    settings: Mapping[str, str] | None = None,
) -> onnxruntime.InferenceSession:
    """Load a model on the processor, or another provider. Raises TrialFailure, with onnxruntime's own words, if not."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # what fails is raised, and said once
    try:
        made = session(model, options, [(provider, dict(settings or {}))])
        if made.get_providers()[0] != provider:  # it falls back to the processor without a word
            raise TrialFailure(f"onnxruntime does not run the file on {provider}")
        return made
    except (TrialFailure, UserError):
        raise
    except Exception as error:
        # onnxruntime's exceptions share no base class
        raise TrialFailure(f"onnxruntime cannot load the file: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def graph_hash(model: bytes, weights: bool) -> str:
    """Short hash of what the file computes, whatever its nodes and tensors are called.

    Without `weights`, of what its latency depends on: operations, attributes, types and shapes, and the values of
    whole-number constants (axes, sizes) and of a Resize's scales; not of weights or quantization scales.
    """
    graph = read(model, weights=weights).graph
    digest = hashlib.sha256()
    tensors = {tensor.name: _described(tensor, weights) for tensor in graph.initializer}
    values = {tensor.name: tensor for tensor in graph.initializer}
    numbers: dict[str, str] = {"": "none"}
    for value in (*graph.input, *graph.output):
        digest.update(value.type.SerializeToString(deterministic=True))
    for value in graph.input:
        numbers.setdefault(value.name, f"in{len(numbers)}")
    for node in graph.node:
        inputs: list[str] = []
        for name in node.input:
            if name in tensors:
                inputs.append(_described(values[name], True) if node.op_type == "Resize" else tensors[name])
            else:
                inputs.append(numbers[name])
        attributes = sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute)
        digest.update(repr((node.domain, node.op_type, inputs, attributes, len(node.output))).encode())
        for name in node.output:
            numbers.setdefault(name, f"t{len(numbers)}")
    digest.update(repr([numbers.get(value.name) for value in graph.output]).encode())
    return digest.hexdigest()[:16]


def _described(tensor: onnx.TensorProto, weights: bool) -> str:
    shape = f"{tensor.data_type}{list(tensor.dims)}"
    here = tensor.data_location != onnx.TensorProto.EXTERNAL  # else it was not read, being a large weight
    if here and (weights or tensor.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.BOOL)):
        return f"{shape}{hashlib.sha256(numpy_helper.to_array(tensor).tobytes()).hexdigest()}"
    return shape
