"""What Xcode shows of a package: what it is, whose, and what each input and output means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffoundry.errors import StageError
from diffoundry.formats import mlpackage
from diffoundry.types import Contract, TensorSpec

Shapes = Sequence[Mapping[str, int]]
_WEIGHTS = {
    "float": "",
    "int8": ", weights in INT8 (linear, per channel)",
    **{f"palette{bits}": f", weights from tables of {2**bits} values" for bits in (1, 2, 4, 6, 8)},
}


@dataclass(frozen=True)
class Notes:
    """What the description says besides the contract."""

    precision: str
    weights: str
    author: str
    license: str
    version: str


def describe(package: Path, contract: Contract, shapes: Shapes, kind: str, notes: Notes) -> None:
    """Write descriptions, author, license and version into the package's specification."""
    spec = mlpackage.read_spec(package)
    metadata = spec.description.metadata
    metadata.shortDescription = (
        f"{contract.component} of a diffusion pipeline in {notes.precision}"
        f"{_WEIGHTS[notes.weights]}, exported by Diffoundry"
    )
    metadata.author, metadata.license = notes.author, notes.license
    metadata.versionString = notes.version
    for functions in _described(spec):
        for specs, features in (
            (contract.inputs, functions.input),
            (contract.outputs, functions.output),
        ):
            by_name = {one.name: one for one in specs}
            for feature in features:
                if feature.name in by_name:
                    feature.shortDescription = text_of(by_name[feature.name], shapes, kind)
    mlpackage.write_spec(spec, package)


def text_of(spec: TensorSpec, shapes: Shapes, kind: str) -> str:
    """ "The noisy latent; float32 [batch, 4, height/8, width/8]: 1 × 4 × 64 × 64"."""
    own = list(dict.fromkeys(spec.shape(shape) for shape in shapes))
    sizes = " or ".join(" × ".join(str(size) for size in one) for one in own)
    usual = "usually " if kind == "dynamic" else ""
    dims = ", ".join(str(dim) for dim in spec.dims)
    meaning = f"{spec.description}; " if spec.description else ""
    return f"{meaning}{spec.dtype} [{dims}]: {usual}{sizes}"


def check_edges(package: Path, contract: Contract, shapes: Shapes) -> None:
    """Raise StageError where the package lost an input or output, or has another."""
    spec = mlpackage.read_spec(package)
    wanted = sorted(s.name for s in contract.inputs), sorted(s.name for s in contract.outputs)
    for described in _described(spec):
        found = sorted(f.name for f in described.input), sorted(f.name for f in described.output)
        if found != wanted:
            raise StageError(
                f"coreml_from_exported_program: {contract.component}: the package's edges",
                expected=f"{', '.join(wanted[0])} -> {', '.join(wanted[1])}",
                found=f"{', '.join(found[0])} -> {', '.join(found[1])}",
                remedy="an input that the model does not use may not be in its contract",
            )


def _described(spec: Any) -> list[Any]:
    """Where a package describes its edges: the model, or each of its functions."""
    return list(spec.description.functions) or [spec.description]
