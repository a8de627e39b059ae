"""Safetensors files: read and checked without their values, written one tensor at a time.

Layout (huggingface/safetensors, README "Format"): 8 bytes little-endian header length, a JSON
object name -> {dtype, shape, data_offsets}, then the values with no holes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffoundry.errors import ModelError
from diffoundry.types import Array

# The limit of the reference implementation; a longer header is an attack on memory.
MAX_HEADER_BYTES = 100_000_000
ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


NAMES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16",
    "float16": "F16", "int32": "I32", "uint32": "U32", "float32": "F32", "float64": "F64",
    "int64": "I64", "uint64": "U64",
}  # fmt: skip
"""numpy's name of a dtype -> safetensors'."""


@dataclass(frozen=True)
class TensorHeader:
    """One tensor as its file describes it; `dtype` is safetensors' name ("F32")."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Tensors of `path` by name.

    Raises ModelError when the file is truncated, has bytes too many, or its header is damaged.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size_bytes < 8 or length > min(size_bytes - 8, MAX_HEADER_BYTES):
            raise _damaged(path, f"a header of {length} bytes in a file of {size_bytes} bytes")
        raw = stream.read(length)
    try:
        entries = json.loads(raw)
    except ValueError as error:
        raise _damaged(path, f"a header that is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise _damaged(path, "a header that is not a JSON object")
    entries.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in entries.items():
        tensors[name], span = _tensor(path, name, entry)
        spans.append(span)
    _check_spans(path, sorted(spans), size_bytes - 8 - length)
    return tensors


def write_stream(
    path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors` (name -> numpy array) in the order of their names, one at a time.

    The library's own writer copies all of them first; here arrays that are mapped from files stay
    mapped. The same arrays give the same bytes.
    """
    import numpy as np

    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in sorted(tensors):
        array = tensors[name]
        end = position + array.nbytes
        header[name] = {
            "dtype": NAMES[str(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            stream.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)


def _tensor(path: Path, name: str, entry: Any) -> tuple[TensorHeader, tuple[int, int]]:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"no dtype, shape and offsets for {name!r}") from error
    bits = ITEM_BITS.get(dtype)
    if bits is None:
        raise _damaged(path, f"{name!r} with the unknown dtype {dtype!r}")
    if min(shape, default=0) < 0 or end - begin != math.prod(shape) * bits // 8:
        raise _damaged(path, f"{name!r} with {end - begin} bytes for {dtype}{list(shape)}")
    return TensorHeader(name, dtype, shape), (begin, end)


def _check_spans(path: Path, spans: list[tuple[int, int]], data_bytes: int) -> None:
    position = 0
    for begin, end in spans:
        if begin != position:
            raise _damaged(path, f"values at byte {begin} where {position} was expected")
        position = end
    if position != data_bytes:
        state = "cut off" if position > data_bytes else "too long"
        raise _damaged(path, f"{state}: {data_bytes} bytes of values, the header says {position}")


def _damaged(path: Path, found: str) -> ModelError:
    return ModelError(
        f"weights {path}",
        expected="a whole safetensors file",
        found=found,
        remedy="copy or download the file again; it is damaged",
    )
