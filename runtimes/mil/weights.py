"""Reads constants of a MIL program: immediate values, and weights memory-mapped from weight.bin.

weight.bin begins with 64 bytes of header. Each weight has a record of 64 bytes at the offset that
the program names: sentinel, type, size in bytes, offset of its data (MIL blob storage, version 2).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffoundry.errors import ArtifactError
from diffoundry.types import Array

if TYPE_CHECKING:
    import numpy as np

REMEDY = "build it again, or get the bundle again from whoever made it"

_SENTINEL = 0xDEADBEEF
_RECORD = struct.Struct("<IIQQQ")
_HEADER = struct.Struct("<II")
_BLOB_TYPES = {
    1: "fp16", 2: "fp32", 3: "uint8", 4: "int8", 6: "int16", 7: "uint16", 8: "int4", 9: "uint1",
    10: "uint2", 11: "uint4", 12: "uint3", 13: "uint6", 14: "int32", 15: "uint32",
}  # fmt: skip
_NUMPY = {
    "fp16": "float16", "fp32": "float32", "fp64": "float64", "int8": "int8", "int16": "int16",
    "int32": "int32", "int64": "int64", "uint8": "uint8", "uint16": "uint16", "uint32": "uint32",
    "uint64": "uint64", "bool": "bool",
}  # fmt: skip
_PACKED_BITS = {"int4": 4, "uint4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint6": 6}


@dataclass(frozen=True)
class TensorType:
    """Element type by MIL's name ("fp16", "int32", "uint4", "string") and shape (None: any)."""

    dtype: str
    shape: tuple[int | None, ...] = ()

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('?' if d is None else str(d) for d in self.shape)}]"


@dataclass(frozen=True)
class Constant:
    """A constant of the program. Weights are read when `value` is called, and not kept."""

    type: TensorType
    immediate: Any = None
    blob: Blob | None = None

    def value(self) -> Any:
        """A str, a tuple of values, or a numpy array (a view of the file where that is possible)."""
        return self.immediate if self.blob is None else self.blob.array(self.type)


@dataclass(frozen=True)
class Blob:
    """Where one weight lies."""

    file: BlobFile
    offset: int

    def array(self, wanted: TensorType) -> Array:
        return self.file.read(self.offset, wanted)


@dataclass
class BlobFile:
    """A memory-mapped weight.bin. Pages are read when they are touched, and shared with the file."""

    path: Path
    _map: mmap.mmap | None = field(default=None, repr=False)

    def read(self, offset: int, wanted: TensorType) -> Array:
        """The weight whose record is at `offset`.

        Integers of fewer than eight bits are unpacked to int8 or uint8. Raises ArtifactError where
        the record is not there or is of another type or size than the program states.
        """
        dtype, start, size = self.record(offset)
        count = math.prod(d or 0 for d in wanted.shape)
        needed = packed_bytes(wanted.dtype, count)
        if dtype != wanted.dtype or size != needed:
            raise ArtifactError(
                f"{self.path}: weight at {offset}",
                expected=f"{wanted} in {needed} bytes, as the program states",
                found=f"{dtype} in {size} bytes (the weights of another program?)",
                remedy=REMEDY,
            )
        return decode(memoryview(self.map())[start : start + size], wanted.dtype, wanted.shape)

    def record(self, offset: int) -> tuple[str, int, int]:
        """Type, start and size in bytes of the weight whose record is at `offset`."""
        data = self.map()
        problem = ""
        if offset + 64 > len(data):
            problem = f"a file of {len(data)} bytes"
        else:
            sentinel, kind, size, start, _ = _RECORD.unpack_from(data, offset)
            if sentinel != _SENTINEL or kind not in _BLOB_TYPES:
                problem = "no record there (the weights of another program?)"
            elif start + size > len(data):
                problem = f"a file of {len(data)} bytes, where the weight ends at {start + size}"
        if problem:
            raise ArtifactError(f"{self.path}: weight at {offset}", expected="a whole weight",
                                found=problem, remedy=REMEDY)  # fmt: skip
        return _BLOB_TYPES[kind], start, size

    def map(self) -> mmap.mmap:
        """The mapped file. Raises ArtifactError where it is missing or not blob storage."""
        if self._map is None:
            try:
                with self.path.open("rb") as stream:
                    # Copy on write: torch wants arrays that may be written to; none ever is.
                    found = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise ArtifactError(str(self.path), expected="the program's weights",
                                    found=str(error), remedy=REMEDY) from error  # fmt: skip
            version = _HEADER.unpack_from(found, 0)[1] if len(found) >= 64 else None
            if version != 2:
                raise ArtifactError(str(self.path), expected="MIL blob storage, version 2",
                                    found=f"version {version}, {len(found)} bytes",
                                    remedy=REMEDY)  # fmt: skip
            self._map = found
        return self._map


def packed_bytes(dtype: str, count: int) -> int:
    """Bytes that `count` elements of `dtype` take in the file."""
    if dtype in _PACKED_BITS:
        return math.ceil(count * _PACKED_BITS[dtype] / 8)
    return count * numpy_dtype(dtype).itemsize


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """numpy's type for a MIL type; int8 or uint8 for those of fewer bits."""
    import numpy as np

    if dtype in _PACKED_BITS:
        return np.dtype("uint8" if dtype.startswith("u") else "int8")
    if dtype not in _NUMPY:
        raise ArtifactError(f"type {dtype!r} of a MIL program", expected=", ".join(_NUMPY),
                            found=dtype)  # fmt: skip
    return np.dtype(_NUMPY[dtype])


def decode(data: bytes | memoryview, dtype: str, shape: Sequence[int | None]) -> Array:
    """An array of `shape` from the bytes as they lie in the file."""
    import numpy as np

    sizes = [d or 0 for d in shape]
    if dtype not in _PACKED_BITS:
        return np.frombuffer(data, numpy_dtype(dtype)).reshape(sizes)
    bits = _PACKED_BITS[dtype]
    found = unpack(np.frombuffer(data, np.uint8), bits, math.prod(sizes)).reshape(sizes)
    if dtype.startswith("u"):
        return found
    return ((found ^ (1 << bits - 1)).astype(np.int8) - (1 << bits - 1)).astype(np.int8)


def unpack(packed: Array, bits: int, count: int) -> Array:
    """`count` unsigned integers of `bits` bits from bytes, least significant bit first."""
    import numpy as np

    flat = np.unpackbits(packed, bitorder="little")[: count * bits].reshape(count, bits)
    return np.packbits(flat, axis=1, bitorder="little")[:, 0]
