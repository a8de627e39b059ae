"""The `tflite` format: a folder with model.tflite and model.json.

model.tflite holds one named signature for each shape; their weights are stored once. model.json
says in plain words what is in it, for people and apps: each signature's shape and tensors, what
the weights are stored in, and what a file past 2 GiB needs of the runtime that opens it.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffoundry.errors import ArtifactError
from diffoundry.formats import canonical, tflite_int8
from diffoundry.types import Contract, Shape

MODEL_FILE = "model.tflite"
FACTS_FILE = "model.json"
SCHEMA = "diffoundry.tflite/1.0"

LARGE_FILE_BYTES = 2**31
"""A flatbuffer's own offsets end here; weights beyond it need a runtime that reads them apart."""
LARGE_FILE_RUNTIME = "2.3.0"
"""The oldest LiteRT that was seen to open such a file (64-bit Linux)."""
LARGE_FILE_REMEDIES = (
    "store the weights in fp16 (precision = 'fp16')",
    "store the weights in INT8",
    f"ship LiteRT {LARGE_FILE_RUNTIME} or newer to 64-bit devices only",
)
REDUCED_PRECISION = "reduced_precision_support"
"""Metadata that lets XNNPACK compute in fp16 without being asked."""

_IDENTIFIER = b"TFL3"
_REMEDY = "build it again, or get the bundle again from whoever made it"
# The schema's TensorType by number; only what an engine of ours can have.
_DTYPES = {0: "float32", 1: "float16", 2: "int32", 3: "uint8", 4: "int64", 6: "bool", 9: "int8"}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the file states it. `dtype` is numpy's name."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    """One named entry of the file: its graph, and its inputs and outputs by name."""

    name: str
    subgraph: int
    inputs: Mapping[str, TensorInfo]
    outputs: Mapping[str, TensorInfo]


def model_file(path: Path) -> Path:
    """The .tflite file of a `tflite` artifact (a folder, or the file itself)."""
    return path / MODEL_FILE if path.is_dir() else path


def signature_name(contract: Contract, shape: Shape) -> str:
    """ "b1_h64_w64": the first letter of each axis that the component has, and its size."""
    return "_".join(f"{axis.name[0]}{shape[axis.name]}" for axis in contract.axes)


def read_signatures(path: Path) -> tuple[Signature, ...]:
    """The signatures of the file, in its order. Raises ArtifactError for a damaged file."""
    return _read(path, _signatures)


def metadata_names(path: Path) -> tuple[str, ...]:
    """The names of the file's metadata entries. Raises ArtifactError for a damaged file."""
    return _read(path, lambda model: tuple(_text(m.Name()) for m in _items(model, "Metadata")))


def weight_types(path: Path) -> dict[str, int]:
    """Dtype -> bytes of the constant tensors, a shared one once. Raises ArtifactError."""
    return _read(path, _weight_types)


def integer_layers(path: Path) -> dict[str, str]:
    """Qualified name -> "static", "dynamic" or "weight_only" of every layer that is INT8 in the
    file; whatever else is comes by its tensor's name as "unplanned". Raises ArtifactError."""
    return _read(path, tflite_int8.schemes_of)


def integer_weights(path: Path, subgraph: int) -> dict[int, str]:
    """Index of each INT8 weight of a graph -> its layer. Raises ArtifactError."""
    return _read(path, lambda model: dict(tflite_int8.weights_of(model, subgraph)))


def operations(path: Path, subgraph: int) -> tuple[tuple[int, str], ...]:
    """(Index, name) of each tensor that an operation of a graph computes, in execution order."""

    def computed(model: Any) -> tuple[tuple[int, str], ...]:
        graph = model.Subgraphs(subgraph)
        return tuple(
            (index, _text(graph.Tensors(index).Name()))
            for operator in _items(graph, "Operators")
            for index in map(int, operator.OutputsAsNumpy())
            if index >= 0
        )

    return _read(path, computed)


def write_facts(path: Path, contract: Contract, weights: str) -> dict[str, Any]:
    """Write model.json of the folder `path` and return it."""
    size_bytes = model_file(path).stat().st_size
    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "model_size_bytes": size_bytes,
        "weights": weights,
        "signatures": {
            one.name: {
                "inputs": _described(one.inputs, [spec.name for spec in contract.inputs]),
                "outputs": _described(one.outputs, [spec.name for spec in contract.outputs]),
            }
            for one in read_signatures(path)
        },
    }
    if size_bytes >= LARGE_FILE_BYTES:
        facts["large_file"] = {
            "needs": f"LiteRT {LARGE_FILE_RUNTIME} or newer on a 64-bit system; older and 32-bit "
            "runtimes read at most 2 GiB",
            "otherwise": list(LARGE_FILE_REMEDIES),
        }
    canonical.atomic_write(path / FACTS_FILE, canonical.pretty_json(facts))
    return facts


def read_facts(path: Path) -> dict[str, Any]:
    """What model.json says. Raises ArtifactError."""
    file = canonical.inside(path, FACTS_FILE)
    try:
        facts = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(
            str(file), expected="facts about the model", found=str(error), remedy=_REMEDY
        ) from error
    if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
        raise ArtifactError(str(file), expected=SCHEMA, found="another document", remedy=_REMEDY)
    return facts


def validate(path: Path) -> None:
    """Check that the model is whole and is the one that model.json describes.

    Raises ArtifactError for a truncated or foreign file, weights outside the file, an index
    that points nowhere, and facts about another model.
    """
    found = _read(path, _walk)
    if not path.is_dir():
        return
    facts, file = read_facts(path), model_file(path)
    if facts.get("model_size_bytes") != file.stat().st_size:
        raise ArtifactError(
            str(file),
            expected=f"{facts.get('model_size_bytes')} bytes",
            found=f"{file.stat().st_size} bytes",
            remedy=_REMEDY,
        )
    if sorted(facts.get("signatures", {})) != sorted(found):
        raise ArtifactError(
            str(file),
            expected=f"the signatures {', '.join(sorted(facts.get('signatures', {})))}",
            found=", ".join(sorted(found)) or "none",
            remedy=_REMEDY,
        )


def canonicalise(path: Path) -> None:
    """Nothing to do: the converter writes equal bytes for equal programs, and model.json is
    written sorted (a test converts twice, in two processes)."""


def digest(path: Path) -> str:
    """Digest of the folder's bytes."""
    return canonical.tree_digest(path)


def size_bytes(path: Path) -> int:
    """Size of all files of the folder."""
    return canonical.tree_size_bytes(path)


def _read(path: Path, what: Any) -> Any:
    """`what` of the file's model. The file is mapped, not read: it may be larger than memory."""
    from ai_edge_litert import schema_py_generated as schema

    file = model_file(path)
    if not file.is_file() or file.is_symlink():
        raise ArtifactError(
            str(file), expected="a TFLite model", found="no such file", remedy=_REMEDY
        )
    with file.open("rb") as stream:
        head = stream.read(8)
        if len(head) < 8 or head[4:] != _IDENTIFIER:
            raise ArtifactError(
                str(file),
                expected="a TFLite model",
                found=f"{file.stat().st_size} bytes that do not begin as one",
                remedy=_REMEDY,
            )
        # Not closed by hand: an error's traceback may still hold views of it.
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return what(schema.Model.GetRootAs(data, 0))
    # What reading past the end, or through a wrong offset, comes to.
    except (struct.error, IndexError, ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(
            str(file),
            expected="a whole TFLite model",
            found=f"a damaged or truncated one ({type(error).__name__}: {error})",
            remedy=_REMEDY,
        ) from error


def _items(table: Any, name: str) -> list[Any]:
    """The entries of a vector of tables. Raises ValueError where one is missing."""
    found = [getattr(table, name)(i) for i in range(getattr(table, f"{name}Length")())]
    if any(one is None for one in found):
        raise ValueError(f"an empty entry among {name}")
    return found


def _text(raw: bytes | None) -> str:
    return (raw or b"").decode()


def _info(tensor: Any) -> TensorInfo:
    shape = [int(tensor.Shape(i)) for i in range(tensor.ShapeLength())]
    number = tensor.Type()
    return TensorInfo(_text(tensor.Name()), _DTYPES.get(number, f"type {number}"), tuple(shape))


def _signatures(model: Any) -> tuple[Signature, ...]:
    found = []
    for definition in _items(model, "SignatureDefs"):
        graph = model.Subgraphs(definition.SubgraphIndex())
        ends = [
            {_text(one.Name()): _info(graph.Tensors(one.TensorIndex())) for one in maps}
            for maps in (_items(definition, "Inputs"), _items(definition, "Outputs"))
        ]
        key = _text(definition.SignatureKey())
        found.append(Signature(key, int(definition.SubgraphIndex()), *ends))
    return tuple(found)


def _weight_types(model: Any) -> dict[str, int]:
    bytes_of: dict[str, int] = {}
    seen: set[int] = set()
    for graph in _items(model, "Subgraphs"):
        for tensor in _items(graph, "Tensors"):
            buffer = model.Buffers(tensor.Buffer())
            size = int(buffer.Size() or buffer.DataLength())
            if size and tensor.Buffer() not in seen:
                seen.add(tensor.Buffer())
                dtype = _info(tensor).dtype
                bytes_of[dtype] = bytes_of.get(dtype, 0) + size
    return dict(sorted(bytes_of.items()))


def _walk(model: Any) -> list[str]:
    """Visit everything an interpreter follows; the names of the signatures.

    Raises what reading outside the file raises, and ValueError for an index that points nowhere.
    """
    end = len(model._tab.Bytes)
    buffers = _items(model, "Buffers")
    for buffer in buffers:
        if not buffer.DataIsNone():
            data = buffer._tab.Offset(4)
            start, length = buffer._tab.Vector(data), buffer.DataLength()
        else:
            # 0 and 1 say that there is no data outside the flatbuffer.
            start, length = (buffer.Offset(), buffer.Size()) if buffer.Offset() > 1 else (0, 0)
        if start + length > end:
            raise ValueError(f"weights that end at byte {start + length} of {end}")
    for graph in _items(model, "Subgraphs"):
        _walk_graph(graph, len(buffers), model.OperatorCodesLength())
    names = [one.name for one in _signatures(model)]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"signatures {names}")
    return names


def _walk_graph(graph: Any, buffers: int, codes: int) -> None:
    tensors = _items(graph, "Tensors")
    for tensor in tensors:
        _info(tensor)
        if tensor.Buffer() >= buffers:
            raise ValueError(f"tensor {_info(tensor).name} without weights")
    ends = [graph.InputsAsNumpy(), graph.OutputsAsNumpy()]
    for operator in _items(graph, "Operators"):
        if operator.OpcodeIndex() >= codes:
            raise ValueError("an operation of no kind")
        ends += [operator.InputsAsNumpy(), operator.OutputsAsNumpy()]
    # The schema gives 0 for a vector that is not there; -1 is an input that was left out.
    indices = [int(i) for one in ends if not isinstance(one, int) for i in one]
    if any(not -1 <= index < len(tensors) for index in indices):
        raise ValueError("an operation on a tensor that is not there")


def _described(tensors: Mapping[str, TensorInfo], order: list[str]) -> dict[str, Any]:
    return {
        name: {"dtype": tensors[name].dtype, "shape": list(tensors[name].shape)}
        for name in order
        if name in tensors
    }
