"""Opens ONNX models with onnxruntime, on the CPU, on CUDA or through its TensorRT provider."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from diffoundry.errors import (
    ArtifactError,
    ContractError,
    DeferredError,
    DiffoundryError,
    MissingToolError,
    UsageError,
)
from diffoundry.formats import onnx
from diffoundry.runtimes.onnx_kernels import summary
from diffoundry.types import Array, Artifact, ArtifactType, Contract, StandIn

_EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
# TF32 would round float32 products to 10 bits without a word. CUDA's provider has an option for
# it; TensorRT has only NVIDIA's environment variable.
_TF32_SWITCH = "NVIDIA_TF32_OVERRIDE"
_CUDA = ("CUDAExecutionProvider", {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"})
_PROVIDERS: dict[str, list[Any]] = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": [_CUDA, "CPUExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", _CUDA, "CPUExecutionProvider"],
}


@dataclass(frozen=True)
class OnnxSession:
    """Runtime: onnx -> session, on "cpu", "cuda" or "tensorrt"."""

    tools: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnx", "numpy")
    extra: ClassVar[str] = "onnx"
    stand_ins: ClassVar[tuple[str, ...]] = ("onnx_session",)

    def accepts(self, artifact_type: ArtifactType) -> bool:
        return artifact_type.kind == "onnx"

    def unavailable(self, device: str) -> Exception | None:
        """MissingToolError without onnxruntime, DeferredError without a CUDA device."""
        if device not in _PROVIDERS:
            return UsageError("onnx_session: device", expected=" or ".join(_PROVIDERS),
                              found=device)  # fmt: skip
        extra = "onnx" if device == "cpu" else "onnx-gpu"
        if any(importlib.util.find_spec(name) is None for name in ("onnxruntime", "onnx")):
            return _missing("onnxruntime", extra)
        if device == "cpu":
            return None
        if not _cuda_devices():
            return DeferredError(f"onnx_session: device {device}",
                                 expected="an NVIDIA driver and GPU",
                                 found="no NVIDIA GPU on this host",
                                 remedy="complete this check on a host that has one")  # fmt: skip
        import onnxruntime

        if _provider_of(device) not in onnxruntime.get_available_providers():
            return _missing("onnxruntime-gpu (in place of onnxruntime)", extra)
        return None

    def stand_in(self, artifact: Artifact) -> StandIn | None:
        """The same graph on the CPU, where a device is not on this host."""
        return StandIn(
            "onnx_session",
            artifact,
            "onnxruntime ran the same graph on the CPU; the GPU's kernels round differently",
        )

    def open(
        self, artifact: Artifact, contract: Contract, device: str, threads: int = 0
    ) -> OpenedOnnx:
        """Open with `threads` intra-op threads (0: onnxruntime's choice).

        Raises ArtifactError for another kind of file or a damaged model.
        """
        problem = self.unavailable(device)
        if problem is not None:
            raise problem
        if not self.accepts(artifact.type):
            raise ArtifactError(str(artifact.path), expected="an onnx artifact",
                                found=artifact.type.kind)  # fmt: skip
        onnx.validate(artifact.path)
        return OpenedOnnx(artifact.path, contract, device, threads)


class OpenedOnnx:
    """A model opened by onnxruntime. Writes nothing beside the model."""

    def __init__(self, path: Path, contract: Contract, device: str, threads: int) -> None:
        self._path, self._contract = path, contract
        self._device, self._threads = device, threads
        self._session = self._create_session()
        self._outputs = [output.name for output in self._session.get_outputs()]

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return _run(self._session, self._outputs, feeds, self._path)

    def value_names(self) -> list[str]:
        """Every value that `probe` can read, in execution order."""
        return onnx.value_names(onnx.read_model(self._path))

    def probe(
        self, feeds: Mapping[str, Array], names: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Intermediate values by name, in execution order, with every optimizer off.

        A value has the name of the node that makes it, for example
        "/down_blocks.0/resnets.0/conv1/Conv". Raises ContractError for an unknown name.
        """
        import onnxruntime

        model = onnx.with_outputs(onnx.read_model(self._path), names)
        options = self._options()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        file = onnx.model_file(self._path)
        session = _create(file, model.SerializeToString(), options, self._device)
        return _run(session, [output.name for output in model.graph.output], feeds, self._path)

    def precision_used(self) -> dict[str, Any]:
        """What onnxruntime computed in, from a profile of one call at the smallest shape.

        Keys: providers; kernels_by_provider; kernels_by_type (the float type that each kernel of
        the optimised model reads or writes); float16_kernels (operators that compute in
        float16); tf32; threads; note.
        """
        del self._session  # two at once would hold the weights twice
        try:
            events, providers = self._profile()
        finally:
            self._session = self._create_session()
        return {
            "providers": providers,
            **summary(events, onnx.integer_nodes(self._path)),
            "tf32": _tf32(self._device),
            "threads": self._threads,
        }

    def _create_session(self) -> Any:
        file = onnx.model_file(self._path)
        return _create(file, file, self._options(), self._device)

    def _profile(self) -> tuple[list[dict[str, Any]], list[str]]:
        """What onnxruntime notes of one call at the smallest shape, and its providers."""
        with tempfile.TemporaryDirectory(prefix="diffoundry-") as folder:
            options = self._options()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            file = onnx.model_file(self._path)
            session = _create(file, file, options, self._device)
            _run(session, self._outputs, _smallest_feeds(self._contract), self._path)
            events = json.loads(Path(session.end_profiling()).read_text())
        return events, session.get_providers()

    def close(self) -> None:
        """Free the model."""
        self.__dict__.pop("_session", None)

    def _options(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.use_deterministic_compute = True
        # A picture uses several sessions: threads that spin in one take the cores of the next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self._device == "cpu" and onnx.has_plain_layout(self._path):
            # Without NCHWc: no copy of the few convolutions that are left, and no reordering.
            level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
            options.graph_optimization_level = level
        if self._device == "cpu":
            # Memory planned for a shape is taken beside what its first call took: a VAE decoder at
            # 256 × 256 held 752 MB with it and 520 MB without, at equal speed.
            options.enable_mem_pattern = False
            # Which value may lie where another lay is searched for when a model is opened: 1.9 of
            # 2.1 s of an INT8 U-Net of 860 M. The arena does it at run time, for as much memory and
            # time.
            options.enable_mem_reuse = False
        options.log_severity_level = 4
        # INT8 models say themselves which products are integers. What onnxruntime would make of
        # Q/DQ pairs is slower than float32, and MatMulAddFusion then breaks signed ones. Without
        # that, weights that are only stored in INT8 become float once, when the model is opened.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        return options


def _create(file: Path, model: Path | bytes, options: Any, device: str) -> Any:
    """Make a session. Raises ArtifactError where onnxruntime refuses the model."""
    import onnxruntime

    source: Any = model
    if isinstance(model, Path):
        source = str(model)
    else:
        options.add_session_config_entry(_EXTERNAL_FOLDER, str(file.parent))
    if device == "tensorrt":
        os.environ.setdefault(_TF32_SWITCH, "0")
    try:
        session = onnxruntime.InferenceSession(source, options, providers=_PROVIDERS[device])
    except _onnxruntime_errors() as error:
        raise ArtifactError(
            str(file),
            expected=f"a model that onnxruntime {onnxruntime.__version__} can run on {device}",
            found=str(error).strip()[:400],
            remedy="build it again, or install a newer onnxruntime",
        ) from error
    # Where the libraries of a provider are missing, onnxruntime takes the next one and goes on.
    if _provider_of(device) not in session.get_providers():
        raise DeferredError(
            f"onnx_session: device {device}",
            expected=f"{_provider_of(device)} with its libraries",
            found=f"onnxruntime fell back to {', '.join(session.get_providers())}",
            remedy="complete this check on a host that has them",
        )
    return session


def _provider_of(device: str) -> str:
    first = _PROVIDERS[device][0]
    return first if isinstance(first, str) else str(first[0])


def _tf32(device: str) -> str:
    if device == "cpu":
        return "none on a CPU"
    switched_off = device == "cuda" or os.environ.get(_TF32_SWITCH) == "0"
    return "off" if switched_off else "on"


def _run(
    session: Any, outputs: list[str], feeds: Mapping[str, Array], path: Path
) -> dict[str, Array]:
    try:
        found = session.run(outputs, dict(feeds))
    except _onnxruntime_errors() as error:
        raise ContractError(
            f"{path}: onnxruntime could not run the model",
            expected="; ".join(f"{i.name}: {i.type}{i.shape}" for i in session.get_inputs()),
            found=str(error).strip()[:400],
            remedy="use a shape that this engine was built for",
        ) from error
    return dict(zip(outputs, found, strict=True))


def _onnxruntime_errors() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile",
             "NotImplemented", "RuntimeException", "EPFail", "EngineError")  # fmt: skip
    found = tuple(getattr(state, name) for name in names if hasattr(state, name))
    return (*found, ValueError, RuntimeError)


def _smallest_feeds(contract: Contract) -> dict[str, Array]:
    import numpy as np

    shape = {axis.name: axis.opt if axis.min == axis.max else axis.min for axis in contract.axes}
    return {spec.name: np.zeros(spec.shape(shape), spec.dtype) for spec in contract.inputs}


def _cuda_devices() -> int:
    """Number of CUDA devices that the driver reports (0 without a driver)."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def _missing(tool: str, extra: str) -> DiffoundryError:
    return MissingToolError(
        f"onnx_session needs {tool}",
        expected=f"the extra {extra!r}",
        found="not installed",
        remedy=f"pip install 'diffoundry[{extra}]'",
    )
