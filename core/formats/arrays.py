"""Dataclasses that hold arrays, as JSON data beside one safetensors file.

Each array becomes a reference {"tensor": name}; equal arrays share one tensor.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffoundry.errors import ArtifactError
from diffoundry.types import Array

_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|b1",
}


def detach(value: Any, arrays: dict[str, Array], names: dict[str, str]) -> Any:
    """Turn `value` into JSON data whose arrays are references {"tensor": name} into `arrays`."""
    import numpy as np

    if isinstance(value, np.ndarray):
        return {"tensor": _keep(np.ascontiguousarray(value), arrays, names)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {f.name: detach(getattr(value, f.name), arrays, names) for f in fields}
    if isinstance(value, Mapping):
        return {str(key): detach(item, arrays, names) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [detach(item, arrays, names) for item in value]
    return value


def _keep(array: Array, arrays: dict[str, Array], names: dict[str, str]) -> str:
    """Name an array by its order of first use; an equal one gets the name it already has."""
    key = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()
    if key not in names:
        names[key] = f"{len(names):05d}"
        arrays[names[key]] = array
    return names[key]


def attach(value: Any, read: Callable[[str], Array]) -> Any:
    """The inverse of `detach`."""
    if isinstance(value, dict):
        if value.keys() == {"tensor"}:
            return read(str(value["tensor"]))
        return {key: attach(item, read) for key, item in value.items()}
    if isinstance(value, list):
        return [attach(item, read) for item in value]
    return value


def open_tensors(path: Path) -> Callable[[str], Array]:
    """Map the file into memory; return a function from name to (writable, private) view."""
    import numpy as np
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):  # checks header, bounds and overlaps
            pass
    except (SafetensorError, OSError) as error:
        raise _damaged(path, "a safetensors file", str(error)) from error
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    # Copy-on-write: callers such as torch.from_numpy want writable arrays; the file stays.
    memory = np.memmap(path, dtype=np.uint8, mode="c")

    def read(name: str) -> Array:
        entry = header.get(name)
        if entry is None or entry.get("dtype") not in _DTYPES:
            raise _damaged(path, f"a tensor {name!r} of a known dtype", str(entry))
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        flat = np.asarray(memory[begin:end])
        return flat.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])

    return read


def _damaged(path: Path, expected: str, found: str) -> ArtifactError:
    return ArtifactError(
        str(path),
        expected=expected,
        found=found,
        remedy="make it again, or get it again from whoever made it",
    )
