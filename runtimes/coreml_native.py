"""Opens Core ML packages with Core ML itself, on macOS. Elsewhere it is deferred."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from diffoundry.errors import (
    ArtifactError,
    ContractError,
    DeferredError,
    MissingToolError,
    UsageError,
)
from diffoundry.formats import mlpackage
from diffoundry.types import Array, Artifact, ArtifactType, Contract, StandIn

UNITS = {
    "cpu": "CPU_ONLY",
    "cpu_gpu": "CPU_AND_GPU",
    "cpu_ne": "CPU_AND_NE",
    "all": "ALL",
}
"""Device -> compute units that Core ML may use."""
STAND_IN = "mil_reference"
NOTE = (
    "checked by the reference interpreter (fp32 arithmetic, fp16 storage), not on the device: "
    "the Neural Engine accumulates differently"
)


@dataclass(frozen=True)
class CoremlNative:
    """Runtime: mlpackage -> session, on "cpu", "cpu_gpu", "cpu_ne" (Neural Engine) or "all"."""

    tools: ClassVar[tuple[str, ...]] = ("coremltools", "numpy")
    extra: ClassVar[str] = "coreml"
    stand_ins: ClassVar[tuple[str, ...]] = (STAND_IN,)

    def accepts(self, artifact_type: ArtifactType) -> bool:
        return artifact_type.kind == mlpackage.KIND

    def unavailable(self, device: str) -> Exception | None:
        """DeferredError where this is no Mac, whatever is installed; else MissingToolError."""
        if device not in UNITS:
            return UsageError("coreml_native: device", expected=" or ".join(UNITS), found=device)
        if sys.platform != "darwin":
            return DeferredError(
                f"coreml_native: device {device}",
                expected="macOS, which has Core ML",
                found=f"this host runs {sys.platform}",
                remedy="run `diffoundry verify --complete` on the bundle on a Mac",
            )
        if importlib.util.find_spec("coremltools") is None:
            return MissingToolError(
                "coreml_native needs coremltools",
                expected=f"the extra {self.extra!r}",
                found="not installed",
                remedy=f"pip install 'diffoundry[{self.extra}]'",
            )
        return None

    def stand_in(self, artifact: Artifact) -> StandIn | None:
        """The reference interpreter, which opens the same package."""
        return StandIn(STAND_IN, artifact, NOTE)

    def open(
        self, artifact: Artifact, contract: Contract, device: str, threads: int = 0
    ) -> OpenedModel:
        """Compile and load. Raises ArtifactError for a package that is damaged or another's."""
        problem = self.unavailable(device)
        if problem is not None:
            raise problem
        if not self.accepts(artifact.type):
            raise ArtifactError(str(artifact.path), expected="an mlpackage artifact",
                                found=artifact.type.kind)  # fmt: skip
        mlpackage.validate(artifact.path)
        return OpenedModel(artifact, contract, device)


class OpenedModel:
    """A package that Core ML has loaded: one model, or one for each of its functions."""

    def __init__(self, artifact: Artifact, contract: Contract, device: str) -> None:
        self._contract, self._device = contract, device
        self._path = mlpackage.package(artifact.path)
        self._edges = mlpackage.read_edges(artifact.path)
        self._precision = artifact.type.precision or "fp32"
        self._models: dict[str, Any] = {}

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once. Raises ContractError for a shape that no function takes."""
        shapes = {name: tuple(array.shape) for name, array in feeds.items()}
        edges = mlpackage.edges_for(self._edges, shapes)
        found = self._model(edges.function).predict(dict(feeds))
        return {
            spec.name: mlpackage.from_pixels(found[spec.name])
            if spec.name in edges.images
            else found[spec.name].astype(spec.dtype, copy=False)
            for spec in self._contract.outputs
        }

    def probe(
        self, feeds: Mapping[str, Array], names: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Core ML shows no intermediate values: raises ContractError."""
        raise ContractError(
            f"probe of {self._path.name} in Core ML",
            expected="a runtime that shows intermediate values",
            found="coreml_native",
            remedy=f"open the package with {STAND_IN}",
        )

    def precision_used(self) -> dict[str, Any]:
        """What the program states. Core ML does not say what a compute unit really uses."""
        return {
            "compute": [self._precision],
            "compute_units": UNITS[self._device],
            "note": "as the program states it; the Neural Engine computes in fp16 only",
        }

    def close(self) -> None:
        """Free the models."""
        self._models.clear()

    def _model(self, function: str) -> Any:
        if function not in self._models:
            import coremltools as ct

            several = {"function_name": function} if len(self._edges) > 1 else {}
            self._models[function] = ct.models.MLModel(
                str(self._path),
                compute_units=getattr(ct.ComputeUnit, UNITS[self._device]),
                **several,
            )
        return self._models[function]
