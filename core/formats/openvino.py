"""The `openvino` format: a folder with OpenVINO IR: model.xml (the graph), model.bin (weights).

`canonicalise` (see `openvino_canonical`) makes two conversions of the same model byte-equal and
seals the weights: model.xml carries the digest of model.bin, so that another model's weights are
noticed. OpenVINO itself would compute with them.
"""

from __future__ import annotations

import difflib
import importlib
import math
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffoundry.errors import ArtifactError, ContractError
from diffoundry.formats import canonical
from diffoundry.formats.openvino_canonical import SEAL, canonicalise as _canonicalise_graph
from diffoundry.formats.openvino_int8 import integer_layers_of, layer_nodes

MODEL_FILE = "model.xml"
WEIGHTS_FILE = "model.bin"

_REMEDY = "build it again, or get the bundle again from whoever made it"
_BITS = {
    **dict.fromkeys(("f64", "i64", "u64"), 64),
    **dict.fromkeys(("f32", "i32", "u32"), 32),
    **dict.fromkeys(("f16", "bf16", "i16", "u16"), 16),
    **dict.fromkeys(("i8", "u8", "boolean"), 8),
    **dict.fromkeys(("i4", "u4"), 4),
}
_NOT_COMPUTED = ("Constant", "Parameter", "Result")


def import_openvino() -> Any:
    """The package `openvino`, without the usage statistics that importing it would send.

    `import openvino` reports itself to its maker from a forked process and leaves files in the
    home folder. Without the package `openvino_telemetry` it takes its own stub instead.
    """
    if "openvino" not in sys.modules and "openvino_telemetry" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    return importlib.import_module("openvino")


def model_file(path: Path) -> Path:
    """The graph's file of an `openvino` artifact."""
    return path / MODEL_FILE


def weights_file(path: Path) -> Path:
    """The weights' file of an `openvino` artifact."""
    return path / WEIGHTS_FILE


def read_graph(path: Path) -> ET.Element:
    """The root element of model.xml.

    Raises ArtifactError for a file that is missing, truncated or not OpenVINO IR.
    """
    file = _present(model_file(path), "an OpenVINO model")
    data = file.read_bytes()
    try:
        root = ET.fromstring(data)
    except ET.ParseError as error:
        raise ArtifactError(
            str(file),
            expected="an OpenVINO model",
            found=f"{len(data)} bytes that do not parse as XML (truncated, or another kind of "
            f"file): {error}",
            remedy=_REMEDY,
        ) from error
    kinds = {layer.get("type") for layer in root.iterfind("layers/layer")}
    if root.tag != "net" or root.find("edges") is None or not {"Parameter", "Result"} <= kinds:
        raise ArtifactError(
            str(file),
            expected="an OpenVINO model: <net> with layers, edges, Parameter and Result",
            found=f"<{root.tag}> without some of them",
            remedy=_REMEDY,
        )
    return root


def validate(path: Path) -> None:
    """Check that graph and weights are whole and belong together.

    Raises ArtifactError for a missing, truncated or foreign model.xml, for a model.bin that is
    shorter than the graph says, and for one that is not the one this graph was sealed with.
    """
    root = read_graph(path)
    _check_extents(path, root)
    seal = root.find(SEAL)
    expected = "none" if seal is None else seal.get("value", "none")
    found = canonical.sha256_file(weights_file(path))
    if expected != found:
        raise ArtifactError(
            str(weights_file(path)),
            expected=f"the weights of {MODEL_FILE}: {expected}",
            found=f"the weights of another model, or damaged ones: {found}",
            remedy=_REMEDY,
        )


def canonicalise(path: Path) -> None:
    """Rewrite model.xml so that equal models have equal bytes, and seal the weights."""
    root = read_graph(path)
    _check_extents(path, root)
    text = _canonicalise_graph(root, canonical.sha256_file(weights_file(path)))
    canonical.atomic_write(model_file(path), text)


def digest(path: Path) -> str:
    """Digest of the folder's bytes (of the canonicalised artifact)."""
    return canonical.tree_digest(path)


def size_bytes(path: Path) -> int:
    """Size of all files of the folder."""
    return canonical.tree_size_bytes(path)


def load(path: Path) -> Any:
    """The validated model as an `openvino.Model`. Raises ArtifactError."""
    validate(path)
    openvino = import_openvino()
    try:
        return openvino.Core().read_model(model_file(path), weights_file(path))
    except RuntimeError as error:
        raise ArtifactError(
            str(model_file(path)),
            expected=f"a model that OpenVINO {openvino.__version__.split('-')[0]} reads",
            found=str(error).strip()[:400],
            remedy="build it again, or install a newer openvino",
        ) from error


def integer_layers(path: Path) -> dict[str, str]:
    """Qualified module name -> scheme ("static", "dynamic", "weight_only") of every INT8 layer.

    Read from the saved graph. Raises ArtifactError.
    """
    return integer_layers_of(read_graph(path))


def integer_nodes(path: Path) -> dict[str, str]:
    """Name of each layer that multiplies an INT8 weight -> qualified module name."""
    return layer_nodes(read_graph(path))


def value_names(model: Any) -> list[str]:
    """Every value that a layer computes, in execution order ("layer", or "layer:1" of several)."""
    return list(_values(model))


def with_results(model: Any, names: Sequence[str] | None = None) -> tuple[Any, list[str]]:
    """A copy of the model whose results are the values `names` (all when None), and their names.

    They stand in execution order. Inputs and constants are no values that can be probed. Raises
    ContractError for a name that no layer computes.
    """
    openvino = import_openvino()
    copy = model.clone()
    values = _values(copy)
    wanted = list(values) if names is None else [name for name in values if name in set(names)]
    unknown = sorted(set(names or ()) - set(values))
    if unknown:
        near = difflib.get_close_matches(unknown[0], list(values), n=3, cutoff=0.4)
        raise ContractError(
            f"probe of {', '.join(unknown)}",
            expected="names of values that a layer of the model computes",
            found="unknown names",
            remedy=f"did you mean {', '.join(near)}?" if near else "list the values first",
        )
    results = [openvino.opset13.result(values[name]) for name in wanted]
    return openvino.Model(results, copy.get_parameters(), "probe"), wanted


def _values(model: Any) -> dict[str, Any]:
    found = {}
    for layer in model.get_ordered_ops():
        if layer.get_type_name() in _NOT_COMPUTED:
            continue
        name, outputs = layer.get_friendly_name(), layer.outputs()
        for position, output in enumerate(outputs):
            found[name if len(outputs) == 1 else f"{name}:{position}"] = output
    return found


def _present(file: Path, what: str) -> Path:
    if not file.is_file() or file.is_symlink():
        raise ArtifactError(str(file), expected=what, found="no such file", remedy=_REMEDY)
    return file


def _check_extents(path: Path, root: ET.Element) -> None:
    """Check that every constant has the size of its shape and lies inside model.bin."""
    file = _present(weights_file(path), f"the weights of {MODEL_FILE}")
    held = file.stat().st_size
    for layer in root.iter("layer"):
        data = layer.find("data")
        if layer.get("type") != "Const" or data is None:
            continue
        end = _end_of(data)
        if end is None:
            raise ArtifactError(
                f"{model_file(path)}: constant {layer.get('name')!r}",
                expected="an offset, and a size that fits its shape",
                found=str(dict(data.attrib)),
                remedy=_REMEDY,
            )
        if end > held:
            raise ArtifactError(
                str(file),
                expected=f"at least {end} bytes of weights ({layer.get('name')!r} ends there)",
                found=f"{held} bytes",
                remedy=_REMEDY,
            )


def _end_of(data: ET.Element) -> int | None:
    """The byte after a constant, or None where offset, size and shape make no sense."""
    try:
        offset, size = int(data.attrib["offset"]), int(data.attrib["size"])
        dims = [int(part) for part in data.get("shape", "").split(",") if part.strip()]
    except (KeyError, ValueError):
        return None
    bits = _BITS.get(data.get("element_type", ""))
    fits = bits is None or size == (math.prod(dims) * bits + 7) // 8
    return offset + size if fits and offset >= 0 and size >= 0 else None
