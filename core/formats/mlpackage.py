"""The `mlpackage` format: a folder with one `<component>.mlpackage` (an ML program) in it.

`canonicalise` makes two conversions of the same program byte-equal: the manifest's random ids,
the date of conversion and debug files go; the protobuf is written in a fixed order. It also seals
the weights: their digest stands in the model's metadata, so that the weight file of another
model of the same architecture is noticed.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffoundry.errors import ArtifactError, ContractError, MissingToolError
from diffoundry.formats import canonical, mil_int8, mil_weights
from diffoundry.formats.mil_weights import REMEDY
from diffoundry.types import Array

if TYPE_CHECKING:
    from coremltools.proto.Model_pb2 import Model

KIND = "mlpackage"
SUFFIX = ".mlpackage"
MANIFEST = "Manifest.json"
DATA = "Data"
SPEC = "com.apple.CoreML/model.mlmodel"
WEIGHTS = "com.apple.CoreML/weights"
WEIGHT_FILE = f"{WEIGHTS}/weight.bin"
WEIGHTS_KEY = "diffoundry.weights"
PIXEL_HALF = 127.5
"""A pixel of an image edge is PIXEL_HALF × (value + 1): -1..1 becomes 0..255."""
_MODEL_PATH = "@model_path/"
# What says when and where a package was converted, not what it is.
_NOT_CONTENT = ("com.github.apple.coremltools.conversion_date",)
_IDS = uuid.UUID("6f1c7f0e-0a0c-5d6a-9f0e-3f6f2c1d7a10")


def package(path: Path) -> Path:
    """The .mlpackage of an artifact: the folder itself, or the one that lies in it.

    Raises ArtifactError where there is none, or more than one.
    """
    if (path / MANIFEST).is_file():
        return path
    found = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else []
    if len(found) != 1 or found[0].is_symlink():
        raise ArtifactError(
            str(path),
            expected=f"a folder with one {SUFFIX} in it",
            found=", ".join(one.name for one in found) or "none",
            remedy=REMEDY,
        )
    return found[0]


def import_coremltools() -> Any:
    """coremltools, without what it says about the libraries of a Mac. Raises MissingToolError."""
    if importlib.util.find_spec("coremltools") is None:
        raise MissingToolError("an .mlpackage", expected="the extra 'coreml'",
                               found="coremltools is not installed",
                               remedy='pip install "diffoundry[coreml]"')  # fmt: skip
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import coremltools
    finally:
        logging.disable(disabled)
    return coremltools


def spec_file(path: Path) -> Path:
    """The .mlmodel that the package's manifest names as its root. Raises ArtifactError."""
    folder = package(path)
    manifest = folder / MANIFEST
    try:
        document = json.loads(manifest.read_bytes())
        item = document["itemInfoEntries"][document["rootModelIdentifier"]]["path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            str(manifest),
            expected=f"the manifest of an {SUFFIX} that names its model",
            found=f"{type(error).__name__}: {error}",
            remedy=REMEDY,
        ) from error
    return canonical.inside(folder / DATA, str(item))


def read_spec(path: Path) -> Model:
    """The package's specification, without its weights.

    Raises ArtifactError for a file that is missing, cut off, or not an ML program, and
    MissingToolError without coremltools.
    """
    import_coremltools()
    from coremltools.proto import Model_pb2
    from google.protobuf.message import DecodeError

    file = spec_file(path)
    try:
        spec = Model_pb2.Model.FromString(file.read_bytes())
    except (OSError, DecodeError) as error:
        raise ArtifactError(str(file), expected="a Core ML model",
                            found=f"{type(error).__name__}: {error} (cut off?)",
                            remedy=REMEDY) from error  # fmt: skip
    if spec.WhichOneof("Type") != "mlProgram" or not spec.mlProgram.functions:
        raise ArtifactError(str(file), expected="an ML program",
                            found=str(spec.WhichOneof("Type")), remedy=REMEDY)  # fmt: skip
    return spec


def write_spec(spec: Model, path: Path) -> None:
    """Write the specification with deterministic bytes."""
    canonical.atomic_write(spec_file(path), spec.SerializeToString(deterministic=True))


def validate(path: Path) -> None:
    """Check that the package is whole and its weights are its own. Raises ArtifactError."""
    spec = read_spec(path)
    folder = spec_file(path).parent
    checked: set[Path] = set()
    for value in mil_weights.blob_values(spec.mlProgram):
        name = value.blobFileValue.fileName.removeprefix(_MODEL_PATH)
        file = canonical.inside(folder, name)
        if file not in checked:
            mil_weights.check_header(file)
            checked.add(file)
        mil_weights.check_weight(file, value)
    sealed = spec.description.metadata.userDefined.get(WEIGHTS_KEY, "")
    found = _weights_digest(path)
    if sealed and sealed != found:
        raise ArtifactError(
            str(package(path)),
            expected=f"weights {sealed}, which this program was written with",
            found=f"weights {found} (of another model, or damaged)",
            remedy=REMEDY,
        )


def canonicalise(path: Path) -> None:
    """Rewrite the package so that equal models have equal bytes, and seal its weights."""
    folder = package(path)
    spec = read_spec(folder)
    source = spec_file(folder)
    target = folder / DATA / SPEC
    if source != target:
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
    _drop_strangers(folder)
    (folder / MANIFEST).write_text(canonical.pretty_json(_manifest(folder)))
    defined = spec.description.metadata.userDefined
    for key in _NOT_CONTENT:
        if key in defined:
            del defined[key]
    defined[WEIGHTS_KEY] = _weights_digest(folder)
    spec.mlProgram.docString = ""
    write_spec(spec, folder)
    for file in canonical.files_under(folder):
        file.chmod(0o644)


def integer_layers(path: Path) -> dict[str, str]:
    """Qualified name -> "static" or "weight_only" of every layer that is INT8 in the package;
    whatever else is comes by its value's name as "unplanned". Raises ArtifactError."""
    return mil_int8.schemes_of(read_spec(path).mlProgram)


def digest(path: Path) -> str:
    """Digest of the folder's bytes (of the canonicalised artifact)."""
    return canonical.tree_digest(path)


def size_bytes(path: Path) -> int:
    """Size of all files of the folder."""
    return canonical.tree_size_bytes(path)


@dataclass(frozen=True)
class Edges:
    """What one function of a package states: the (usual) shape of each input, its images."""

    function: str
    shapes: Mapping[str, tuple[int, ...]]
    images: tuple[str, ...] = ()


def read_edges(path: Path) -> tuple[Edges, ...]:
    """The edges of every function of a package, the default one first. Raises ArtifactError."""
    description = read_spec(path).description
    if not description.functions:
        return (_edges("main", description),)
    found = [_edges(one.name, one) for one in description.functions]
    return tuple(sorted(found, key=lambda one: one.function != description.defaultFunctionName))


def _edges(function: str, described: Any) -> Edges:
    shapes = {one.name: tuple(one.type.multiArrayType.shape) for one in described.input}
    images = [one.name for one in described.output if one.type.WhichOneof("Type") == "imageType"]
    return Edges(function, shapes, tuple(images))


def edges_for(edges: Sequence[Edges], shapes: Mapping[str, tuple[int, ...]]) -> Edges:
    """The function for inputs of these shapes; one that stands alone takes what Core ML allows.

    Raises ContractError where none of several does.
    """
    if len(edges) == 1:
        return edges[0]
    for one in edges:
        if dict(one.shapes) == dict(shapes):
            return one
    raise ContractError(
        "a package with one function for each shape",
        expected="; ".join(f"{one.function}: {_sizes(one.shapes)}" for one in edges),
        found=_sizes(shapes),
        remedy="use a shape that this engine was built for",
    )


def _sizes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())


def from_pixels(image: Any) -> Array:
    """An image that Core ML handed over, as the component gives it: float32 [1, 3, H, W], -1..1.

    `image`: 0..255, as [1, 3, height, width], or as a PIL image of [height, width, 3 or 4].
    """
    import numpy as np

    pixels = np.asarray(image, dtype=np.float32)
    if pixels.ndim == 3:
        pixels = pixels[..., :3].transpose(2, 0, 1)[None]
    return pixels / np.float32(PIXEL_HALF) - np.float32(1)


def _weights_digest(path: Path) -> str:
    """Digest of the folder of weights, "none" for a program without them."""
    weights = package(path) / DATA / WEIGHTS
    return canonical.tree_digest(weights) if weights.is_dir() else "none"


def _drop_strangers(folder: Path) -> None:
    """Delete what the manifest of a package does not need (debug handles, thumbnails)."""
    for child in sorted(folder.iterdir()):
        if child.name not in (MANIFEST, DATA):
            child.unlink() if child.is_file() or child.is_symlink() else shutil.rmtree(child)
    for file in list(canonical.files_under(folder / DATA)):
        name = file.relative_to(folder / DATA).as_posix()
        if name != SPEC and not name.startswith(f"{WEIGHTS}/"):
            file.unlink()


def _manifest(folder: Path) -> dict[str, Any]:
    """What a package's manifest says, with ids that are made from the items' places."""
    items = {SPEC: ("model.mlmodel", "CoreML Model Specification")}
    if (folder / DATA / WEIGHTS).is_dir():
        items[WEIGHTS] = ("weights", "CoreML Model Weights")
    ids = {place: str(uuid.uuid5(_IDS, place)).upper() for place in items}
    return {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {
            ids[place]: {
                "author": "com.apple.CoreML",
                "description": description,
                "name": name,
                "path": place,
            }
            for place, (name, description) in items.items()
        },
        "rootModelIdentifier": ids[SPEC],
    }
