"""The `onnx` format: a folder with model.onnx, model.onnx.data when the weights are external,
and precision.json when the precision of its nodes was chosen by measurement.

`canonicalise` (see `onnx_canonical`) makes two exports of the same model byte-equal.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffoundry.errors import ArtifactError, ContractError
from diffoundry.formats import canonical
from diffoundry.formats.onnx_canonical import canonicalise as _canonicalise_model
from diffoundry.formats.onnx_int8 import integer_layers_of, layer_nodes

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx import ModelProto, TensorProto

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
PRECISION_FILE = "precision.json"
# In the metadata of a model whose convolutions a runtime should not lay out anew (see `fuse_onnx`).
PLAIN_LAYOUT = ("diffoundry.layout", "plain")
# A runtime maps weights that lie in a file of their own; those inside the graph it reads and
# copies (a decoder of 189 MB: 626 MB and 1.0 s to open, beside it 280 MB and 0.3 s).
EXTERNAL_THRESHOLD_BYTES = 64 * 2**20

_REMEDY = "build it again, or get the bundle again from whoever made it"


def model_file(path: Path) -> Path:
    """The .onnx file of an `onnx` artifact (a folder, or the file itself)."""
    return path / MODEL_FILE if path.is_dir() else path


def read_model(path: Path) -> ModelProto:
    """Read the graph without its external weights.

    Raises ArtifactError for a file that is missing, truncated or not ONNX.
    """
    import onnx
    from google.protobuf.message import DecodeError

    file = model_file(path)
    if not file.is_file() or file.is_symlink():
        raise ArtifactError(
            str(file), expected="an ONNX model", found="no such file", remedy=_REMEDY
        )
    data = file.read_bytes()
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise ArtifactError(
            str(file),
            expected="an ONNX model",
            found=f"{len(data)} bytes that do not parse (truncated, or another kind of file)",
            remedy=_REMEDY,
        ) from error
    if not (model.ir_version and model.opset_import and model.graph.output):
        raise ArtifactError(
            str(file),
            expected="an ONNX model with an IR version, an opset and outputs",
            found=f"a file of {len(data)} bytes without them",
            remedy=_REMEDY,
        )
    return model


def write_model(model: ModelProto, path: Path) -> None:
    """Write the graph (external weights stay where they are) with deterministic bytes."""
    canonical.atomic_write(model_file(path), model.SerializeToString(deterministic=True))


def save_ir(model: ir.Model, folder: Path, threshold_bytes: int) -> None:
    """Write model.onnx, and model.onnx.data where the weights exceed the threshold."""
    import onnx_ir as ir

    tensors = [value.const_value for value in model.graph.initializers.values()]
    total = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    # What TensorRT and shape inference read as constants stays in the graph.
    external: dict[str, Any] = {}
    if total > threshold_bytes:
        external = {"external_data": DATA_FILE, "size_threshold_bytes": 1024}
    ir.save(model, folder / MODEL_FILE, **external)


def integer_layers(path: Path) -> dict[str, str]:
    """Qualified module name -> scheme ("static", "dynamic", "weight_only") of every INT8 layer.

    Read from the saved graph. Whatever else is in 8 bits and belongs to no layer stands there
    under its node's name, as "unplanned". Raises ArtifactError.
    """
    return integer_layers_of(read_model(path))


def integer_nodes(path: Path) -> dict[str, str]:
    """Name of each node that multiplies an INT8 weight -> qualified module name."""
    return layer_nodes(read_model(path))


def has_plain_layout(path: Path) -> bool:
    """Whether the model says that its convolutions are fastest as they are written."""
    return PLAIN_LAYOUT in [(one.key, one.value) for one in read_model(path).metadata_props]


def write_plain_layout(path: Path) -> None:
    """Make the model say so."""
    model = read_model(path)
    model.metadata_props.add(key=PLAIN_LAYOUT[0], value=PLAIN_LAYOUT[1])
    write_model(model, path)


def validate(path: Path) -> None:
    """Check that the model is whole and valid ONNX.

    Raises ArtifactError for a truncated or foreign file, missing or short external data,
    external data outside the folder, and whatever onnx.checker refuses.
    """
    import onnx

    file = model_file(path)
    model = read_model(path)
    for tensor in _tensors(model.graph):
        _check_external(file, tensor)
    try:
        onnx.checker.check_model(str(file))
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            str(file),
            expected="a model that onnx.checker accepts",
            found=str(error).strip().splitlines()[0][:300],
            remedy=_REMEDY,
        ) from error
    if path.is_dir():
        read_precision(path)


def canonicalise(path: Path) -> None:
    """Rewrite model.onnx and its data so that equal models have equal bytes."""
    model = read_model(path)
    for tensor in _tensors(model.graph):
        _check_external(model_file(path), tensor)
    _canonicalise_model(model, model_file(path).parent, DATA_FILE)
    write_model(model, path)


def digest(path: Path) -> str:
    """Digest of the folder's bytes (of the canonicalised artifact)."""
    return canonical.tree_digest(path)


def size_bytes(path: Path) -> int:
    """Size of all files of the folder."""
    return canonical.tree_size_bytes(path)


def read_precision(path: Path) -> dict[str, Any] | None:
    """What precision.json says about the nodes kept in fp32, or None where there is no such file.

    Keys: precision, target_sqnr_db, sqnr_db (per output), nodes, fp32_share, stays_fp32
    (list of node, op_type, reason, and the figures that decided). Raises ArtifactError.
    """
    file = path / PRECISION_FILE
    if not file.exists():
        return None
    try:
        document = json.loads(canonical.inside(path, PRECISION_FILE).read_bytes())
    except ValueError as error:
        raise ArtifactError(str(file), expected="JSON", found=str(error), remedy=_REMEDY) from error
    if not isinstance(document, dict) or not isinstance(document.get("stays_fp32"), list):
        raise ArtifactError(
            str(file), expected="an object with stays_fp32", found="another", remedy=_REMEDY
        )
    return document


def value_names(model: ModelProto) -> list[str]:
    """Every value that a node of the main graph computes, in execution order."""
    return [name for node in model.graph.node for name in node.output if name]


def with_outputs(model: ModelProto, names: Sequence[str] | None = None) -> ModelProto:
    """A copy of the model whose outputs are `names` (all values when None), in execution order.

    Inputs and initializers are no values that can be probed. Raises ContractError for a name
    that no node computes.
    """
    import onnx

    known = value_names(model)
    wanted = set(known if names is None else names)
    unknown = sorted(wanted - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=3, cutoff=0.4)
        raise ContractError(
            f"probe of {', '.join(unknown)}",
            expected="names of values that a node of the graph computes",
            found="unknown names",
            remedy=f"did you mean {', '.join(near)}?" if near else "list the values first",
        )
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    typed = {value.name: value for value in model.graph.output}
    del copy.graph.output[:]
    for name in known:
        if name in wanted:
            copy.graph.output.append(typed.get(name) or onnx.ValueInfoProto(name=name))
    return copy


def external_tensors(model: ModelProto) -> list[TensorProto]:
    """The weights that lie outside model.onnx."""
    import onnx

    external = onnx.TensorProto.EXTERNAL
    return [tensor for tensor in _tensors(model.graph) if tensor.data_location == external]


def _tensors(graph: Any) -> Iterator[TensorProto]:
    """Every tensor of a graph: initializers, and those in attributes and subgraphs."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for subgraph in [attribute.g, *attribute.graphs]:
                yield from _tensors(subgraph)


def _check_external(file: Path, tensor: TensorProto) -> None:
    """Check that the external data of one tensor lies in the model's own folder, whole."""
    import onnx

    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    data = canonical.inside(file.parent, location)
    try:
        end = int(entries.get("offset", "0")) + int(entries["length"])
    except (KeyError, ValueError) as error:
        raise ArtifactError(
            f"{file}: weights {tensor.name!r}",
            expected="external data with an offset and a length",
            found=str(entries),
            remedy=_REMEDY,
        ) from error
    size = data.stat().st_size if data.is_file() else -1
    if size < end:
        raise ArtifactError(
            str(data),
            expected=f"at least {end} bytes of external weights ({tensor.name!r} ends there)",
            found="no such file" if size < 0 else f"{size} bytes",
            remedy=_REMEDY,
        )
