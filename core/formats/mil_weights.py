"""weight.bin of an .mlpackage: whether every weight that a MIL program names is there, whole.

The file is MIL blob storage, version 2: a header of 64 bytes (count, version), then for each
weight a record of 64 bytes at the offset that the program names (sentinel, type, size in bytes,
offset of the data), and its data.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffoundry.errors import ArtifactError

REMEDY = "build it again, or get the bundle again from whoever made it"
HEADER_BYTES = RECORD_BYTES = 64
SENTINEL, VERSION = 0xDEADBEEF, 2
_HEADER = struct.Struct("<II")
_RECORD = struct.Struct("<IIQQ")

# Type in a record -> (MIL's name, bits of one value).
TYPES = {
    1: ("FLOAT16", 16), 2: ("FLOAT32", 32), 3: ("UINT8", 8), 4: ("INT8", 8), 5: ("BFLOAT16", 16),
    6: ("INT16", 16), 7: ("UINT16", 16), 8: ("INT4", 4), 9: ("UINT1", 1), 10: ("UINT2", 2),
    11: ("UINT4", 4), 12: ("UINT3", 3), 13: ("UINT6", 6), 14: ("INT32", 32), 15: ("UINT32", 32),
}  # fmt: skip


def check_weight(file: Path, stated: Any) -> None:
    """Check one `blobFileValue` (a MIL_pb2.Value) against its record in `file`.

    Raises ArtifactError where the record is not there, is of another type or size than the
    program states, or its data are cut off.
    """
    from coremltools.proto import MIL_pb2

    offset, tensor = stated.blobFileValue.offset, stated.type.tensorType
    name = MIL_pb2.DataType.Name(tensor.dataType)
    count = math.prod(dim.constant.size for dim in tensor.dimensions)
    size = file.stat().st_size
    with file.open("rb") as stream:
        stream.seek(offset)
        raw = stream.read(_RECORD.size)
    sentinel, kind, length, start = _RECORD.unpack(raw) if len(raw) == _RECORD.size else (0,) * 4
    if sentinel != SENTINEL or kind not in TYPES:
        found = f"no record at {offset} of {size} bytes (the weights of another model, or cut off)"
    elif (TYPES[kind][0], length) != (name, math.ceil(count * TYPES[kind][1] / 8)):
        found = f"{TYPES[kind][0]} in {length} bytes at {offset} (the weights of another model?)"
    elif start + length > size:
        found = f"a file of {size} bytes, where a weight ends at {start + length}"
    else:
        return
    shape = [dim.constant.size for dim in tensor.dimensions]
    raise ArtifactError(
        str(file), expected=f"{name}{shape} at {offset}, as the program states", found=found,
        remedy=REMEDY,
    )  # fmt: skip


def check_header(file: Path) -> None:
    """Raise ArtifactError for a file that is missing or is no blob storage of version 2."""
    if not file.is_file() or file.is_symlink():
        raise ArtifactError(str(file), expected="the program's weights", found="no such file",
                            remedy=REMEDY)  # fmt: skip
    with file.open("rb") as stream:
        raw = stream.read(HEADER_BYTES)
    version = _HEADER.unpack_from(raw)[1] if len(raw) == HEADER_BYTES else None
    if version != VERSION:
        raise ArtifactError(
            str(file),
            expected=f"MIL blob storage, version {VERSION}",
            found=f"{len(raw)} bytes, version {version}",
            remedy=REMEDY,
        )


def blob_values(program: Any) -> Iterator[Any]:
    """Every value of a MIL program (MIL_pb2.Program) that lies in a weight file."""
    for function in program.functions.values():
        for block in function.block_specializations.values():
            yield from _in_block(block)


def _in_block(block: Any) -> Iterator[Any]:
    for operation in block.operations:
        for value in operation.attributes.values():
            yield from _in_value(value)
        for argument in operation.inputs.values():
            for binding in argument.arguments:
                if binding.WhichOneof("binding") == "value":
                    yield from _in_value(binding.value)
        for inner in operation.blocks:
            yield from _in_block(inner)


def _in_value(value: Any) -> Iterator[Any]:
    if value.WhichOneof("value") == "blobFileValue":
        yield value
