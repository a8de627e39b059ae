"""Prepares an ONNX graph for TensorRT: checked, with its build written down, no engine built.

An engine is bound to the GPU it was built on. So the stage makes the same folder on every host,
and the runtime `tensorrt_engine` builds from it where a GPU and TensorRT are.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from diffoundry.compilers.tensorrt_handover import INPUTS_SCRIPT, readme_text
from diffoundry.errors import ProfileError, StageError
from diffoundry.formats import onnx, tensorrt_build
from diffoundry.formats.tensorrt_parser import refuse_unsupported
from diffoundry.types import (
    Artifact,
    ArtifactType,
    Precision,
    Produced,
    ShapePolicy,
    StageContext,
)


@dataclass(frozen=True)
class TensorrtFromOnnx:
    """Stage: onnx -> tensorrt_build (the graph, build.json, and how to compare by hand).

    `precision`: that of the ONNX graph, whose types are binding ("strongly typed").
    `at_least`: oldest TensorRT that has to take the graph. `workspace_mib`: scratch memory that a
    layer may use (0: all there is). `weight_streaming`, `refit`, `version_compatible`,
    `optimization_level` (0 to 5, None: TensorRT's own): as TensorRT calls them. `cuda_graph`: the
    runtime captures the launch of an engine and replays it. One optimization profile a range:
    one over the axes at dynamic shapes, else one for each promised shape.
    """

    precision: Precision = "fp32"
    at_least: str = tensorrt_build.OLDEST
    workspace_mib: int = 0
    weight_streaming: bool = False
    refit: bool = False
    version_compatible: bool = False
    optimization_level: int | None = None
    cuda_graph: bool = False
    shape_policy: ShapePolicy = field(default_factory=ShapePolicy)

    tools: ClassVar[tuple[str, ...]] = ("onnx",)
    extra: ClassVar[str] = "onnx"

    def __post_init__(self) -> None:
        if isinstance(self.shape_policy, Mapping):  # options may come as plain data
            object.__setattr__(self, "shape_policy", ShapePolicy(**self.shape_policy))
        where = "tensorrt_from_onnx"
        if not _is_release(self.at_least) or not _in_range(self.at_least):
            raise ProfileError(
                f"{where}: at_least",
                expected=f"a TensorRT release from {tensorrt_build.OLDEST} on, below "
                f'{tensorrt_build.BELOW}, as text: "10.8"',
                found=repr(self.at_least),
            )
        if self.workspace_mib < 0:
            raise ProfileError(
                f"{where}: workspace_mib", expected="0 or more MiB", found=str(self.workspace_mib)
            )
        if self.optimization_level not in (None, 0, 1, 2, 3, 4, 5):
            raise ProfileError(
                f"{where}: optimization_level",
                expected="0 to 5",
                found=str(self.optimization_level),
            )

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        return {"model": (ArtifactType("onnx"),)}

    def outputs(self) -> Mapping[str, ArtifactType]:
        return {"build": ArtifactType("tensorrt_build", self.precision)}

    def run(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Produced]:
        """Check the graph, then write. Raises StageError that names the nodes not taken."""
        model = inputs["model"]
        contract = model.contract or context.contract
        where = f"tensorrt_from_onnx: {context.component}"
        if contract is None:
            raise StageError(where, expected="a component's contract", found="none")
        if model.type.precision not in (None, self.precision):
            raise StageError(
                where,
                expected=f"an ONNX graph in {self.precision}, as the stage's precision says",
                found=f"one in {model.type.precision}",
                remedy="give both stages of the route the same precision",
            )
        context.say(f"checking against TensorRT's ONNX parser, {self.at_least} and newer")
        refuse_unsupported(model.path, self.at_least, where)
        folder = context.work / "build"
        shutil.copytree(onnx.model_file(model.path).parent, tensorrt_build.onnx_path(folder))
        spec = tensorrt_build.BuildSpec(
            precision=self.precision,
            profiles=tensorrt_build.profiles_of(contract, self.shape_policy),
            onnx_digest=onnx.digest(tensorrt_build.onnx_path(folder)),
            tensorrt_at_least=self.at_least,
            workspace_bytes=self.workspace_mib * 2**20 or None,
            weight_streaming=self.weight_streaming,
            refit=self.refit,
            version_compatible=self.version_compatible,
            optimization_level=self.optimization_level,
            cuda_graph=self.cuda_graph,
        )
        tensorrt_build.write_spec(spec, folder)
        (folder / tensorrt_build.README_FILE).write_text(
            readme_text(contract.component, spec), encoding="utf-8"
        )
        (folder / tensorrt_build.INPUTS_FILE).write_text(INPUTS_SCRIPT, encoding="utf-8")
        tensorrt_build.validate(folder)
        context.say("deferred: the engine is not built here; a host with TensorRT builds it")
        return {"build": Produced(folder, model.contract)}


def _is_release(version: str) -> bool:
    parts = version.split(".") if isinstance(version, str) else []
    return len(parts) == 2 and all(part.isdigit() for part in parts)


def _in_range(version: str) -> bool:
    def number(text: str) -> list[int]:
        return [int(part) for part in text.split(".")]

    low, high = number(tensorrt_build.OLDEST), number(tensorrt_build.BELOW)
    return low <= number(version) < high
