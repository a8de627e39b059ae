"""Reads constants of a MIL program: immediate values, and weights memory-mapped from weight.bin.

What weight.bin looks like stands in `diffoundry.formats.mil_weights`.
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

_PLACE = struct.Struct("<8xQQ")  # of a weight's record: size in bytes, offset of its data
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

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a value of `shape` is of this type's shape."""
        return len(shape) == len(self.shape) and all(
            stated is None or stated == size for stated, size in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('?' if d is None else str(d) for d in self.shape)}]"


@dataclass(frozen=True)
class Constant:
    """A constant of the program. Weights are read when `value` is called, and not kept."""

    type: TensorType
    immediate: Any = None
    blob: Blob | None = None

    def value(self) -> Any:
        """A str, a tuple of values, or an array (a view of the file where that is possible)."""
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
    """A memory-mapped weight.bin: pages are read when they are touched, and shared.

    `mlpackage.validate` has seen that every record is there and is what the program states.
    """

    path: Path
    _map: mmap.mmap | None = field(default=None, repr=False)

    def read(self, offset: int, stated: TensorType) -> Array:
        """The weight whose record is at `offset`.

        Integers of fewer than eight bits are unpacked to int8 or uint8.
        """
        if self._map is None:
            with self.path.open("rb") as stream:
                # Copy on write: torch wants arrays that may be written to; none ever is.
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        size, start = _PLACE.unpack_from(self._map, offset)
        return decode(memoryview(self._map)[start : start + size], stated.dtype, stated.shape)


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
