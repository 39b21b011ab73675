"""An ONNX model as one value of bytes and as one or two files, also above the 2 GB of a protobuf message (floor F2).

A model whose weights exceed `LIMIT` is its weights, then a graph that refers to them, then a short tail. On disk the
weights lie beside the graph: `model.onnx` and `model.onnx.data`, which onnxruntime finds by itself. Nothing else in
the project knows of this form; everybody passes bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from math import prod
from pathlib import Path
from shutil import copyfileobj, disk_usage
from tempfile import TemporaryDirectory
from typing import IO, Any

import onnx
import onnxruntime
from onnx import TensorProto, helper

from autocompress.store import cache_dir, write_atomic
from autocompress.types import TrialFailure, UserError

LIMIT = 1_500_000_000
"""Bytes of weights from which they leave the graph's file."""
LEAST = 1024
"""Bytes of a weight that leaves it."""
PAGE = 4096
"""A weight begins at a multiple, so that runtimes can map it (ONNX, "External data")."""
_LOCATION = "weights"
"""Name of the weights' file in a graph that has no name itself: equal graphs give equal bytes wherever they lie."""
_TAIL = struct.Struct("<Q24s")
_MAGIC = b"autocompress.external/1\n"
_REFERENCE = b"\n\x08location"
"""What the file of a graph holds that refers to another file."""
_WHOLE = frozenset((TensorProto.INT64, TensorProto.BOOL))
"""Axes, sizes and masks, which shapes are inferred from."""


def read(model: bytes, *, weights: bool = True) -> onnx.ModelProto:
    """A model's content; without `weights`, large ones stay references where they lie apart (dims and types hold)."""
    if not _apart(model):
        return onnx.load_model_from_string(model)
    graph, data = _sections(model)
    proto = onnx.load_model_from_string(bytes(graph))
    for tensor in _references(proto) if weights else ():
        _, start, size = _place(tensor)
        tensor.raw_data = bytes(data[start : start + size])
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    return proto


def write(model: onnx.ModelProto) -> bytes:
    """A graph as bytes; equal graphs give equal bytes."""
    heavy = _heavy(model)
    if not heavy:
        return model.SerializeToString(deterministic=True)
    file = BytesIO()
    graph = _pack(model, heavy, file, _LOCATION)
    size = file.tell()
    file.write(graph)
    file.write(_TAIL.pack(size, _MAGIC))
    return file.getvalue()


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of a graph's constants, none of them being looked at."""
    return sum(map(_bytes, model.graph.initializer))


def files(name: str, model: bytes) -> dict[str, bytes | memoryview]:
    """What lies on disk, by file name: `name` alone, or also `name`.data with the weights."""
    if not _apart(model):
        return {name: model}
    graph, data = _sections(model)
    return {f"{name}.data": data, name: _located(bytes(graph), f"{name}.data")}


def save(path: Path, model: bytes) -> None:
    """Write `path`, and its weights beside it where they lie apart, each whole or not at all. Raises UserError."""
    for name, data in files(path.name, model).items():  # the weights come first: a graph never refers to nothing
        write_atomic(path.with_name(name), data)


def remove(path: Path) -> None:
    """Delete what `save` wrote, where it is there."""
    path.unlink(missing_ok=True)
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)


def load(path: Path) -> bytes:
    """What `save` wrote. Raises UserError, naming the file that is missing, of another length or not beside."""
    try:
        graph = path.read_bytes()
        references = list(_references(onnx.load_model_from_string(graph))) if _REFERENCE in graph else []
        if not references:
            return graph
        beside, end = path.with_name(f"{path.name}.data"), 0
        for tensor in references:
            location, start, size = _place(tensor)
            if location != beside.name:
                raise UserError(f"{path}: weight {tensor.name!r} lies in {location!r}, not {beside.name}")
            end = max(end, start + size)
        if not beside.is_file():
            raise UserError(f"{beside}: missing; {path.name} has its weights there, keep the two together")
        if (there := beside.stat().st_size) != end:
            raise UserError(f"{beside}: {there} bytes where {path.name} has {end}; copy the two again, together")
        whole = BytesIO()
        with beside.open("rb") as file:
            copyfileobj(file, whole, 1 << 24)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    whole.write(_located(graph, _LOCATION))
    whole.write(_TAIL.pack(end, _MAGIC))
    return whole.getvalue()


def session(
    model: bytes | onnx.ModelProto, options: onnxruntime.SessionOptions, providers: list[Any]
) -> onnxruntime.InferenceSession:
    """onnxruntime on a model; raises what onnxruntime raises.

    Weights that lie apart are mapped from a file that is gone once the session stands: given from memory
    (add_external_initializers_from_files_in_memory) they are there twice, thrice while it loads, and load slower.
    """
    if isinstance(model, bytes):
        parts = files("model.onnx", model)
        if len(parts) == 1:
            return onnxruntime.InferenceSession(model, options, providers=providers)
        with scratch(len(model)) as folder:
            for name, data in parts.items():
                (folder / name).write_bytes(data)
            return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=providers)
    heavy = _heavy(model)
    if not heavy:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
    with scratch(weight_bytes(model)) as folder:
        with (folder / "model.onnx.data").open("wb") as file:
            graph = _pack(model, heavy, file, "model.onnx.data")
        (folder / "model.onnx").write_bytes(graph)
        return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=providers)


@contextmanager
def scratch(size: int) -> Iterator[Path]:
    """A folder for `size` bytes in the user's cache (/tmp may be memory), removed after. Raises TrialFailure."""
    cache = cache_dir()
    free = disk_usage(cache).free
    if free < size:
        raise TrialFailure(
            f"a network of {size / 1e9:.1f} GB needs that much in {cache}, where {free / 1e9:.1f} GB are free; "
            "set AUTOCOMPRESS_CACHE to a folder on a larger disk"
        )
    with TemporaryDirectory(prefix=".large.", dir=cache) as folder:
        yield Path(folder)


# --- the form -----------------------------------------------------------------------------------------------------


def _apart(model: bytes) -> bool:
    return model.endswith(_MAGIC)


def _sections(model: bytes) -> tuple[memoryview, memoryview]:
    """Graph and weights."""
    view = memoryview(model)
    size, _ = _TAIL.unpack(view[-_TAIL.size :])
    if size > len(view) - _TAIL.size:
        raise UserError("a model's weights are cut short; write it again")
    return view[size : -_TAIL.size], view[:size]


def _references(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    return (tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL)


def _place(tensor: onnx.TensorProto) -> tuple[str, int, int]:
    """File, first byte and bytes of a reference, as this file writes them."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    try:
        start, size = int(place["offset"]), int(place["length"])
    except (KeyError, ValueError):
        start = size = -1
    if min(start, size) < 0:
        raise UserError(f"weight {tensor.name!r} lies apart, but the model does not say where; write it again")
    return place.get("location", ""), start, size


def _bytes(tensor: onnx.TensorProto) -> int:
    """By dims and type: asking a message for its size serializes it."""
    width = 0 if tensor.data_type == TensorProto.STRING else helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return prod(tensor.dims) * width


def _heavy(model: onnx.ModelProto) -> Collection[str]:
    """Constants that leave the graph: none unless all together exceed the limit."""
    if weight_bytes(model) <= LIMIT:
        return ()
    return {
        tensor.name
        for tensor in model.graph.initializer
        if _bytes(tensor) >= LEAST and tensor.data_type not in _WHOLE and tensor.HasField("raw_data")
    }


def _pack(model: onnx.ModelProto, heavy: Collection[str], file: IO[bytes], location: str) -> bytes:
    """Write heavy constants to `file`, one after another; returns the graph that refers to them."""
    light = onnx.ModelProto()
    _copy(model, light, ("graph",))
    _copy(model.graph, light.graph, ("initializer",))
    for tensor in model.graph.initializer:
        if tensor.name not in heavy:
            light.graph.initializer.append(tensor)
            continue
        file.write(bytes(-file.tell() % PAGE))
        place = {"location": location, "offset": str(file.tell()), "length": str(file.write(tensor.raw_data))}
        reference = light.graph.initializer.add()
        _copy(tensor, reference, ("raw_data", "data_location"))
        reference.data_location = TensorProto.EXTERNAL
        for key, value in place.items():
            reference.external_data.add(key=key, value=value)
    return light.SerializeToString(deterministic=True)


def _copy(source: Any, target: Any, without: Iterable[str]) -> None:
    """A message's fields but some: copying all and clearing some would copy all."""
    for one, value in source.ListFields():
        if one.name in without:
            continue
        if hasattr(value, "extend"):
            getattr(target, one.name).extend(value)
        elif hasattr(value, "CopyFrom"):
            getattr(target, one.name).CopyFrom(value)
        else:
            setattr(target, one.name, value)


def _located(graph: bytes, location: str) -> bytes:
    """The graph with its weights in a file of another name."""
    proto = onnx.load_model_from_string(graph)
    for tensor in _references(proto):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    return proto.SerializeToString(deterministic=True)
