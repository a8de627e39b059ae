"""Builds and runs TensorRT engines where a GPU and TensorRT are; elsewhere it is deferred."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from diffoundry.errors import ArtifactError, DeferredError, UsageError
from diffoundry.formats import tensorrt_build, tensorrt_engine
from diffoundry.runtimes.tensorrt import bindings, driver, engines
from diffoundry.runtimes.tensorrt.session import OpenedTensorrt
from diffoundry.types import Artifact, ArtifactType, Contract, StandIn

_BUILD, _ENGINE = "tensorrt_build", "tensorrt_engine"


@dataclass(frozen=True)
class TensorrtEngine:
    """Runtime: tensorrt_build -> session, on "cuda"; or an engine that was built before.

    The engine of a build is made on the first opening, kept in Diffoundry's cache under the
    fingerprint of TensorRT, GPU and driver, and opened from there afterwards.
    """

    tools: ClassVar[tuple[str, ...]] = ("tensorrt", "numpy")
    extra: ClassVar[str] = "tensorrt"
    stand_ins: ClassVar[tuple[str, ...]] = ("onnx_session",)
    lowest: ClassVar[Mapping[str, str]] = {"tensorrt": tensorrt_build.OLDEST}
    note: ClassVar[str] = (
        "deferred: the engines are not built here; this bundle holds the ONNX and the build "
        "specification, and `diffoundry verify . --complete` builds and checks them on a host "
        "with TensorRT and a GPU"
    )

    def accepts(self, artifact_type: ArtifactType) -> bool:
        return artifact_type.kind in (_BUILD, _ENGINE)

    def unavailable(self, device: str) -> Exception | None:
        """UsageError for another device, DeferredError without a GPU or TensorRT's libraries."""
        if device != "cuda":
            return UsageError("tensorrt_engine: device", expected="cuda", found=device)
        if not driver.device_count():
            return DeferredError(
                "tensorrt_engine",
                expected="an NVIDIA GPU, and TensorRT "
                f"≥ {tensorrt_build.OLDEST}, < {tensorrt_build.BELOW}",
                found="no NVIDIA driver or GPU on this host",
                remedy="complete this on a host that has them: diffoundry verify BUNDLE --complete",
            )
        try:
            bindings.load()
        except DeferredError as error:
            return error
        return None

    def stand_in(self, artifact: Artifact) -> StandIn | None:
        """onnxruntime, on the exact graph that TensorRT will be given."""
        if artifact.type.kind != _BUILD:
            return None
        spec = tensorrt_build.read_spec(artifact.path)
        inner = Artifact(
            ArtifactType("onnx", artifact.type.precision, artifact.type.shape_policy),
            tensorrt_build.onnx_path(artifact.path),
            spec.onnx_digest,
            artifact.component,
            artifact.variant,
            artifact.lineage,
            artifact.contract,
        )
        return StandIn(
            "onnx_session",
            inner,
            "onnxruntime ran the ONNX graph that TensorRT will be given; the engine itself is "
            "not built here, and its kernels round differently",
        )

    def open(
        self, artifact: Artifact, contract: Contract, device: str, threads: int = 0
    ) -> OpenedTensorrt:
        """Build the engine, or open the one that was built here before.

        Raises ArtifactError for an engine of another kind of host, StageError where it cannot
        be built, DeferredError where this host has no GPU or TensorRT.
        """
        if not self.accepts(artifact.type):
            raise ArtifactError(
                f"tensorrt_engine cannot open {artifact.path.name}",
                expected=f"{_BUILD} or {_ENGINE}",
                found=artifact.type.kind,
                remedy="open it with the runtime that its variant names",
            )
        problem = self.unavailable(device)
        if problem is not None:
            raise problem
        cuda = driver.Cuda()
        try:
            return self._open(artifact, contract, cuda)
        except BaseException:
            cuda.close()
            raise

    def built_engine(self, artifact: Artifact, device: str) -> Path | None:
        """Where the engine of a `tensorrt_build` is kept on this host; None if none is built."""
        if artifact.type.kind != _BUILD or self.unavailable(device) is not None:
            return None
        cuda = driver.Cuda()
        try:
            here = engines.fingerprint_here(artifact, bindings.load(), cuda.gpu())
        finally:
            cuda.close()
        folder = engines.engine_folder(here)
        return folder if (folder / tensorrt_engine.FINGERPRINT_FILE).is_file() else None

    def built_on(self, folder: Path) -> dict[str, Any]:
        """The fingerprint beside an engine."""
        return dataclasses.asdict(tensorrt_engine.read_fingerprint(folder))

    def _open(self, artifact: Artifact, contract: Contract, cuda: driver.Cuda) -> OpenedTensorrt:
        gpu = cuda.gpu()
        if artifact.type.kind == _ENGINE:
            trt = bindings.load()
            built = tensorrt_engine.read_fingerprint(artifact.path)
            here = tensorrt_engine.Fingerprint(
                str(trt.__version__),
                gpu.name,
                gpu.compute_capability,
                gpu.driver,
                built.build_digest,
            )
            tensorrt_engine.refuse_other_host(artifact.path, built, here)
            plan = tensorrt_engine.load(artifact.path)
            return OpenedTensorrt(
                trt, plan, contract, cuda, version_compatible=built.version_compatible
            )
        tensorrt_build.validate(artifact.path)
        spec = tensorrt_build.read_spec(artifact.path)
        trt = bindings.load(spec.tensorrt_at_least, spec.tensorrt_below)
        _, plan = engines.engine_of(artifact, trt, gpu)
        return OpenedTensorrt(
            trt,
            plan,
            contract,
            cuda,
            weight_streaming=spec.weight_streaming,
            version_compatible=spec.version_compatible,
            cuda_graph=spec.cuda_graph,
        )
