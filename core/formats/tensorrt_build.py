"""The `tensorrt_build` format: everything TensorRT needs to build an engine, and no engine.

A folder with `onnx/` (the exact graph that TensorRT will parse), `build.json` (how to build it)
and what a person needs to compare the two by hand (`README.md`, `polygraphy_inputs.py`). It is
the same on every host; the engine is made where the GPU is, and never becomes part of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffoundry.errors import ArtifactError
from diffoundry.formats import canonical, onnx
from diffoundry.types import Contract, Precision, ShapePolicy

SCHEMA = "diffoundry.tensorrt-build/1.0"
SPEC_FILE = "build.json"
ONNX_FOLDER = "onnx"
README_FILE = "README.md"
INPUTS_FILE = "polygraphy_inputs.py"
OLDEST = "10.8"
BELOW = "12"

_REMEDY = "build it again, or get the bundle again from whoever made it"


@dataclass(frozen=True)
class Range:
    """The shapes of one input that one optimization profile covers."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


Profile = Mapping[str, Range]


@dataclass(frozen=True)
class BuildSpec:
    """How an engine is built from the graph beside it.

    `profiles`: one optimization profile a shape range: input -> range. `typing` "strong": the
    graph's own types decide the precision of every layer. `workspace_bytes`: scratch memory that
    a layer may use (None: all there is). `optimization_level`: 0 to 5 (None: TensorRT's own).
    `cuda_graph`: the runtime replays a captured graph from the second call at a shape on.
    TensorFloat-32 is always off: fp32 layers compute in fp32.
    """

    precision: Precision
    profiles: tuple[Profile, ...]
    onnx_digest: str
    tensorrt_at_least: str = OLDEST
    tensorrt_below: str = BELOW
    typing: Literal["strong"] = "strong"
    workspace_bytes: int | None = None
    weight_streaming: bool = False
    refit: bool = False
    version_compatible: bool = False
    optimization_level: int | None = None
    cuda_graph: bool = False
    schema: Literal["diffoundry.tensorrt-build/1.0"] = "diffoundry.tensorrt-build/1.0"


def profiles_of(contract: Contract, policy: ShapePolicy) -> tuple[Profile, ...]:
    """One profile over the axes where shapes are dynamic, else one at each promised shape."""
    if policy.kind == "dynamic":
        corners = (
            {axis.name: axis.min for axis in contract.axes},
            contract.opt_shape(),
            {axis.name: axis.max for axis in contract.axes},
        )
        return ({s.name: Range(*(s.shape(corner) for corner in corners)) for s in contract.inputs},)
    found: list[Profile] = []
    for shape in policy.shapes:
        profile = {s.name: Range(*[s.shape(dict(shape))] * 3) for s in contract.inputs}
        if profile not in found:  # shapes that differ only in axes that the component lacks
            found.append(profile)
    return tuple(found)


def onnx_path(path: Path) -> Path:
    """The `onnx` artifact inside a `tensorrt_build`."""
    return path / ONNX_FOLDER


def write_spec(spec: BuildSpec, path: Path) -> None:
    """Write build.json: sorted keys, so that equal specifications have equal bytes."""
    canonical.atomic_write(path / SPEC_FILE, canonical.pretty_json(spec))


def read_spec(path: Path) -> BuildSpec:
    """Read build.json. Raises ArtifactError for one that is missing, damaged or newer."""
    from pydantic import ValidationError

    file = canonical.inside(path, SPEC_FILE)
    try:
        return canonical.parse(BuildSpec, json.loads(file.read_bytes()))
    except (OSError, ValidationError, ValueError, RecursionError) as error:
        raise ArtifactError(
            str(file),
            expected=f"a build specification of {SCHEMA}",
            found=str(error).splitlines()[0][:300],
            remedy=_REMEDY,
        ) from error


def validate(path: Path) -> None:
    """Check the graph, the specification, and that they belong together. Raises ArtifactError."""
    spec = read_spec(path)
    inner = onnx_path(path)
    onnx.validate(inner)
    found = onnx.digest(inner)
    if found != spec.onnx_digest:
        raise _damaged(path, f"the graph {spec.onnx_digest} that build.json names", found)
    dims = {
        value.name: [
            d.dim_value if d.HasField("dim_value") else None
            for d in value.type.tensor_type.shape.dim
        ]
        for value in onnx.read_model(inner).graph.input
    }
    if not spec.profiles:
        raise _damaged(path, "at least one optimization profile", "none")
    for index, profile in enumerate(spec.profiles):
        problems = _profile_problems(profile, dims)
        if problems:
            raise _damaged(path, f"optimization profile {index} to fit the graph", problems[0])


def integer_layers(path: Path) -> dict[str, str]:
    """Qualified module name -> scheme of every INT8 layer of the graph. Raises ArtifactError."""
    return onnx.integer_layers(onnx_path(path))


def canonicalise(path: Path) -> None:
    """Rewrite the graph and the specification so that equal builds have equal bytes."""
    onnx.canonicalise(onnx_path(path))
    write_spec(read_spec(path), path)


def digest(path: Path) -> str:
    """Digest of the folder's contents."""
    return canonical.tree_digest(path)


def size_bytes(path: Path) -> int:
    """Size of all files of the folder."""
    return canonical.tree_size_bytes(path)


def _profile_problems(profile: Profile, dims: Mapping[str, Sequence[int | None]]) -> list[str]:
    if set(profile) != set(dims):
        return [f"inputs {', '.join(sorted(profile))}, the graph has {', '.join(sorted(dims))}"]
    problems = []
    for name, shapes in profile.items():
        if not len(shapes.min) == len(shapes.opt) == len(shapes.max) == len(dims[name]):
            problems.append(f"{name}: another number of dimensions than the graph's")
            continue
        for low, usual, high, fixed in zip(
            shapes.min, shapes.opt, shapes.max, dims[name], strict=True
        ):
            if not 0 <= low <= usual <= high:
                problems.append(f"{name}: {low} ≤ {usual} ≤ {high} does not hold")
            if fixed is not None and {low, usual, high} != {fixed}:
                problems.append(f"{name}: {low}..{high} where the graph says {fixed}")
    return problems


def _damaged(path: Path, expected: str, found: str) -> ArtifactError:
    return ArtifactError(str(path), expected=expected, found=found, remedy=_REMEDY)
