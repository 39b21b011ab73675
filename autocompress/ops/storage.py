"""An ONNX file in less space: weights as zstd, bitmap and values, or indices into a table; read back bit for bit.

The file is a line of JSON (what lies where, and a checksum of the ONNX file) and raw sections; reading it executes
nothing. What a weight's values are is not changed here: op `store` has rounded them to few values before.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from autocompress import memory
from autocompress.onnxfile import read, write
from autocompress.types import UserError

Codec = Literal["zstd", "sparse", "codebook", "pow2"]
FORMAT = "autocompress.store/1"
LEVEL = 6
"""Of zstd: higher ones save next to nothing on weights and take twenty times as long."""
MOST_ENTRIES = 256
COPIES = 4
"""Times a file that storing it takes beside it: its graph, what is written, and the file made again to compare."""


def storage(model: bytes, codecs: Mapping[str, Codec]) -> bytes:
    """The file in less space. `codecs` says how which constant is written; "" stands for everything else, zstd only.

    A constant for which a codec saves nothing stays as it is. Raises UserError for a constant that is not in the file,
    one of more values than a table holds, where memory is too short, or without zstandard where it is asked for.
    """
    memory.check(COPIES * len(model), f"storing a file of {len(model) / 1e9:.1f} GB in less space", UserError)
    proto = read(model)
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    unknown = sorted(set(codecs) - set(constants) - {""})
    if unknown:
        raise UserError(f"store: the file has no constant {unknown[0]!r}")
    sections: list[bytes] = []
    rows: list[dict[str, Any]] = []
    for name, codec in codecs.items():
        if not name or not constants[name].HasField("raw_data"):
            continue
        tensor = constants[name]
        parts = _ENCODE[codec](_bits(tensor))
        if sum(map(len, parts)) < len(tensor.raw_data):
            rows.append({"name": name, "codec": codec, "sections": [len(part) for part in parts]})
            rows[-1]["bytes"] = len(tensor.raw_data)
            sections += parts
            tensor.raw_data = b""
    rest = write(proto)
    del proto, constants
    whole = _zstd().compress(rest) if "" in codecs else zlib.compress(rest, 9)
    kind = "zstd" if "" in codecs else "zlib"
    if len(whole) >= len(rest):
        whole, kind = rest, "raw"
    header = {
        "format": FORMAT,
        "sha256": hashlib.sha256(model).hexdigest(),
        "rest": {"codec": kind, "section": len(whole)},
        "constants": rows,
    }
    done = b"".join((json.dumps(header, separators=(",", ":")).encode(), b"\n", whole, *sections))
    del rest, whole, sections
    if restore(done) != model:
        raise UserError("store: the file was not written by this version of onnx, its bytes cannot be rebuilt")
    return done


def restore(data: bytes) -> bytes:
    """The ONNX file, bit for bit. Raises UserError if `data` is no such file or is damaged."""
    try:
        end = data.index(b"\n")
        header, body = json.loads(data[:end]), memoryview(data)[end + 1 :]
        if header["format"] != FORMAT:
            raise UserError(f"store: format {header['format']!r} is not {FORMAT!r}")
        place = header["rest"]["section"]
        rest = body[:place]
        if header["rest"]["codec"] != "raw":
            rest = _zstd().decompress(rest) if header["rest"]["codec"] == "zstd" else zlib.decompress(rest)
        proto = read(bytes(rest))
        del rest
        constants = {tensor.name: tensor for tensor in proto.graph.initializer}
        for row in header["constants"]:
            parts: list[bytes] = []
            for size in row["sections"]:
                parts.append(bytes(body[place : place + size]))
                place += size
            tensor = constants[row["name"]]
            found = _DECODE[row["codec"]](parts, row["bytes"], _width(tensor))
            tensor.raw_data = found
        model = write(proto)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes the decoders raise
        raise UserError(f"store: this is no stored model, or it is damaged: {type(error).__name__}") from error
    if hashlib.sha256(model).hexdigest() != header["sha256"]:
        raise UserError("store: the stored model is damaged: its checksum does not agree")
    return model


def _width(tensor: onnx.TensorProto) -> int:
    """Bytes of one value; four bits are looked at in pairs."""
    return max(1, onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _bits(tensor: onnx.TensorProto) -> NDArray[Any]:
    """A constant's values as whole numbers of their own bits, so that nothing is lost on signs of zero."""
    return np.frombuffer(tensor.raw_data, f"<u{_width(tensor)}")


# --- codecs: values to sections and back ----------------------------------------------------------------------------


def _dense(values: NDArray[Any]) -> list[bytes]:
    """Bytes of equal weight side by side (exponents, then mantissas): they are alike, and zstd finds it."""
    planes = values.view(np.uint8).reshape(-1, values.itemsize).T
    return [_zstd().compress(np.ascontiguousarray(planes).tobytes())]


def _from_dense(parts: list[bytes], size: int, width: int) -> bytes:
    planes = np.frombuffer(_zstd().decompress(parts[0]), np.uint8).reshape(width, size // width)
    return np.ascontiguousarray(planes.T).tobytes()


def _sparse(values: NDArray[Any]) -> list[bytes]:
    """A bit per value that says whether it is anything but zero, and those that are."""
    kept = values != 0
    return [np.packbits(kept).tobytes(), values[kept].tobytes()]


def _from_sparse(parts: list[bytes], size: int, width: int) -> bytes:
    kept = np.unpackbits(np.frombuffer(parts[0], np.uint8), count=size // width).astype(bool)
    values = np.zeros(size // width, f"<u{width}")
    values[kept] = np.frombuffer(parts[1], values.dtype)
    return values.tobytes()


def _table(values: NDArray[Any]) -> list[bytes]:
    """The distinct values, and indices into them of as few bits as these need; zlib where that is shorter."""
    distinct, indices = np.unique(values, return_inverse=True)
    if len(distinct) > MOST_ENTRIES:
        raise UserError(f"store: a constant of {len(distinct)} different values fits no table of {MOST_ENTRIES}")
    depth = max(1, int(len(distinct) - 1).bit_length())
    planes = (indices.ravel()[:, None] >> np.arange(depth)) & 1
    packed = np.packbits(planes.astype(np.uint8)).tobytes()
    plain = indices.astype(np.uint8).tobytes()  # what entropy coding works best on
    shorter = min((b"p" + packed, b"z" + zlib.compress(plain, 9)), key=len)
    return [distinct.tobytes(), shorter]


def _from_table(parts: list[bytes], size: int, width: int) -> bytes:
    distinct = np.frombuffer(parts[0], f"<u{width}")
    count = size // width
    if parts[1][:1] == b"z":
        indices = np.frombuffer(zlib.decompress(parts[1][1:]), np.uint8)
    else:
        depth = max(1, int(len(distinct) - 1).bit_length())
        planes = np.unpackbits(np.frombuffer(parts[1][1:], np.uint8), count=count * depth).reshape(count, depth)
        indices = planes @ (1 << np.arange(depth))
    return distinct[indices].tobytes()


_ENCODE: dict[str, Callable[[NDArray[Any]], list[bytes]]] = {
    "zstd": _dense,
    "sparse": _sparse,
    "codebook": _table,
    "pow2": _table,
}
_DECODE: dict[str, Callable[[list[bytes], int, int], bytes]] = {
    "zstd": _from_dense,
    "sparse": _from_sparse,
    "codebook": _from_table,
    "pow2": _from_table,
}


class _Zstd:
    """zstandard at one level, without what depends on the machine."""

    def __init__(self, library: Any) -> None:
        self.compress = library.ZstdCompressor(level=LEVEL, write_content_size=True).compress
        self.decompress = library.ZstdDecompressor().decompress


def need_zstd() -> Any:
    """The library. Raises UserError with the pip line where it is not installed."""
    try:
        import zstandard  # noqa: PLC0415  an extra
    except ModuleNotFoundError as error:
        raise UserError("store: zstd needs one more package: pip install 'autocompress[storage]'") from error
    return zstandard


def _zstd() -> _Zstd:
    return _Zstd(need_zstd())
