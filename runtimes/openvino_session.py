"""Opens OpenVINO models with OpenVINO, on the CPU, or by name on Intel's GPU and NPU."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from diffoundry.errors import (
    ArtifactError,
    ContractError,
    DeferredError,
    MissingToolError,
    UsageError,
)
from diffoundry.formats import openvino
from diffoundry.runtimes.openvino_blobs import compile_or_load
from diffoundry.types import BF16, Array, Artifact, ArtifactType, Contract

_DEVICES = {"cpu": "CPU", "gpu": "GPU", "npu": "NPU"}
_EDGES = ("Const", "Input", "Output", "Parameter", "Result")
_BYTES = ("i8", "u8", "int8_t", "uint8_t")
_FLOATS = ("f64", "f32", "f16", "bf16")
_PRODUCTS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")


@dataclass(frozen=True)
class OpenvinoSession:
    """Runtime: openvino -> session, on "cpu", "gpu" or "npu"."""

    tools: ClassVar[tuple[str, ...]] = ("openvino", "numpy")
    extra: ClassVar[str] = "openvino"

    def accepts(self, artifact_type: ArtifactType) -> bool:
        return artifact_type.kind == "openvino"

    def unavailable(self, device: str) -> Exception | None:
        """MissingToolError without openvino, DeferredError without that device."""
        if device not in _DEVICES:
            return UsageError("openvino_session: device", expected=" or ".join(_DEVICES),
                              found=device)  # fmt: skip
        if importlib.util.find_spec("openvino") is None:
            return MissingToolError(
                "openvino_session needs openvino",
                expected=f"the extra {self.extra!r}",
                found="not installed",
                remedy=f"pip install 'diffoundry[{self.extra}]'",
            )
        if device == "cpu":
            return None
        found = openvino.import_openvino().Core().available_devices
        if any(name.startswith(_DEVICES[device]) for name in found):
            return None
        return DeferredError(
            f"openvino_session: device {device}",
            expected="an Intel device of that kind and its driver",
            found=f"OpenVINO sees {', '.join(found) or 'no device'} on this host",
            remedy="complete this check on a host that has one",
        )

    def computes_in(self, precision: str | None, device: str) -> str | None:
        """`precision`, or "fp32" in place of bfloat16 on a device without units for it."""
        if precision not in BF16 or self.unavailable(device) is not None:
            return precision
        core = openvino.import_openvino().Core()
        known = core.get_property(_DEVICES[device], "OPTIMIZATION_CAPABILITIES")
        return precision if "BF16" in known else "fp32"

    def open(
        self, artifact: Artifact, contract: Contract, device: str, threads: int = 0
    ) -> OpenedOpenvino:
        """Open with `threads` threads (0: OpenVINO's choice).

        Raises ArtifactError for another kind of file or a damaged model.
        """
        problem = self.unavailable(device)
        if problem is not None:
            raise problem
        if not self.accepts(artifact.type):
            raise ArtifactError(str(artifact.path), expected="an openvino artifact",
                                found=artifact.type.kind)  # fmt: skip
        name = _DEVICES[device]
        precision = self.computes_in(artifact.type.precision, device)
        options = compile_options(name, precision, threads)
        return OpenedOpenvino(artifact.path, name, options)


def compile_options(device: str, precision: str | None, threads: int) -> dict[str, Any]:
    """What a model is compiled with; nothing that changes the arithmetic is left to OpenVINO.

    A CPU with bfloat16 units would compute fp32 models, and fp16 ones too, in bfloat16; only a
    model that is made for it may.
    """
    half = precision == "fp16" and device != "CPU"
    hint = "bf16" if precision in BF16 else "f16" if half else "f32"
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint}
    if device == "CPU":
        options |= {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            # Weights stored as integers would be multiplied with activations rounded to 8 bits.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            # A picture uses several sessions, a host several processes: all would take core 0.
            "ENABLE_CPU_PINNING": False,
        }
    return options


class OpenedOpenvino:
    """A model compiled by OpenVINO. Writes nothing beside the model."""

    def __init__(self, path: Path, device: str, options: Mapping[str, Any]) -> None:
        self._path, self._device, self._options = path, device, options
        self._core = openvino.import_openvino().Core()
        try:
            self._compiled, self.from_cache = compile_or_load(self._core, path, device, options)
        except RuntimeError as error:
            raise _refused(path, device, error) from error
        self._request = self._compiled.create_infer_request()

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        results = _run(self._request, feeds, self._path)
        return {port.any_name: results[place] for place, port in enumerate(self._compiled.outputs)}

    def value_names(self) -> list[str]:
        """Every value that `probe` can read, in execution order."""
        return openvino.value_names(openvino.load(self._path))

    def probe(
        self, feeds: Mapping[str, Array], names: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Intermediate values by name, in execution order, each made a result of the model.

        A value has the name of the layer that makes it, for example
        "/down_blocks.0/resnets.0/conv1/Conv". Raises ContractError for an unknown name.
        """
        model, found = openvino.with_results(openvino.load(self._path), names)
        try:
            compiled = self._core.compile_model(model, self._device, dict(self._options))
        except RuntimeError as error:
            raise _refused(self._path, self._device, error) from error
        results = _run(compiled.create_infer_request(), feeds, self._path)
        return dict(zip(found, results, strict=True))

    def precision_used(self) -> dict[str, Any]:
        """What OpenVINO computes in, read back from the layers of the compiled model.

        Keys: device; precision_hint (as compiled); kernels_by_type (float types of all layers
        that compute, and integer types of products); kernels (layer type -> type -> count);
        integer_layers (modules whose product is one of integers; only where the model has INT8
        weights); threads; note.
        """
        hint = str(self._compiled.get_property("INFERENCE_PRECISION_HINT").to_string())
        used: dict[str, Any] = {"device": self._device, "precision_hint": hint}
        try:
            layers = self._compiled.get_runtime_model().get_ordered_ops()
        except RuntimeError:
            # What this device compiles cannot be looked into: the property has to do.
            return {**used, "compute": hint, "note": "by the device's own word, no layers shown"}
        kernels = _kernels(layers)
        by_type = _by_type(kernels)
        nodes = openvino.integer_nodes(self._path)
        if nodes:
            used["integer_layers"] = _integer_layers(layers, nodes)
        return {
            **used,
            "kernels_by_type": by_type,
            "kernels": kernels,
            "threads": self._threads(),
            "note": _note(by_type, hint),
        }

    def _threads(self) -> int:
        """As many as OpenVINO really uses (0: the device computes by itself)."""
        known = "INFERENCE_NUM_THREADS" in self._compiled.get_property("SUPPORTED_PROPERTIES")
        return int(self._compiled.get_property("INFERENCE_NUM_THREADS")) if known else 0

    def close(self) -> None:
        """Free the model."""
        for name in ("_request", "_compiled"):
            self.__dict__.pop(name, None)


def _run(request: Any, feeds: Mapping[str, Array], path: Path) -> list[Array]:
    """Every output, by position. Raises ContractError where the feeds do not fit the model."""
    import numpy as np

    tensor = openvino.import_openvino().Tensor
    ports = request.model_inputs
    try:
        if len(feeds) != len(ports):
            raise ValueError(f"{len(feeds)} inputs: {', '.join(feeds)}")
        # The tensors share the arrays' memory, so both have to live until the end.
        held = {name: tensor(np.ascontiguousarray(array), True) for name, array in feeds.items()}
        for name, value in held.items():
            request.set_tensor(name, value)
        request.infer()
        return [np.array(request.get_output_tensor(i).data)
                for i in range(len(request.model_outputs))]  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise ContractError(
            f"{path}: OpenVINO could not run the model",
            expected="; ".join(_described(port) for port in ports),
            found=str(error).strip()[:400],
            remedy="pass these inputs, in a shape that this engine was built for",
        ) from error


def _described(port: Any) -> str:
    return f"{port.any_name}: {port.element_type.to_dtype().name}{port.partial_shape}"


def _refused(path: Path, device: str, error: RuntimeError) -> ArtifactError:
    version = str(openvino.import_openvino().__version__).split("-")[0]
    return ArtifactError(
        str(openvino.model_file(path)),
        expected=f"a model that OpenVINO {version} compiles for {device}",
        found=str(error).strip()[:400],
        remedy="build it again, or install a newer openvino",
    )


def _kernels(layers: Sequence[Any]) -> dict[str, dict[str, int]]:
    """Layer type -> precision it runs in -> number of layers."""
    found: dict[str, Counter[str]] = {}
    for layer in layers:
        facts = layer.get_rt_info()
        kind, precision = (facts[key].astype(str) for key in ("layerType", "runtimePrecision"))
        if kind in _PRODUCTS and precision in _BYTES and not _multiplies_bytes(layer):
            precision = "f32"  # only its weights are stored in 8 bits
        if kind not in _EDGES:
            found.setdefault(kind, Counter())[precision] += 1
    return {kind: dict(sorted(found[kind].items())) for kind in sorted(found)}


def _integer_layers(layers: Sequence[Any], nodes: Mapping[str, str]) -> list[str]:
    """The modules whose product is one of integers.

    `nodes`: name of each layer of the file that multiplies an INT8 weight -> module. Names of
    layers that OpenVINO fused begin with the same module.
    """
    modules = {name.rpartition("/")[0]: module for name, module in nodes.items()}
    found = set()
    for layer in layers:
        facts = layer.get_rt_info()
        if facts["layerType"].astype(str) in _PRODUCTS and _multiplies_bytes(layer):
            names = [
                layer.get_friendly_name(),
                *facts["originalLayersNames"].astype(str).split(","),
            ]
            paths = (path for name in names for path in _parents(name))
            found.update({modules[path] for path in paths if path in modules})
    return sorted(found)


def _parents(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(2, len(parts))]


def _multiplies_bytes(layer: Any) -> bool:
    """Whether what a product reads first is stored in 8 bits."""
    inputs = layer.inputs()
    return bool(inputs) and inputs[0].get_element_type().to_string() in _BYTES


def _note(by_type: Mapping[str, int], hint: str) -> str:
    if "f16" in by_type and hint == "f32":
        # Tried: such a product is as exact as float32's with these weights.
        return "layers whose weights are stored in f16 bear that name; they compute in f32"
    return f"every layer computes in {' or '.join(by_type) or 'integers'}"


def _by_type(kernels: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Precision -> layers that compute in it. Integer layers but products work on shapes."""
    found: Counter[str] = Counter()
    for kind, precisions in kernels.items():
        for precision, count in precisions.items():
            if precision in _FLOATS or kind in _PRODUCTS:
                found[precision] += count
    return dict(sorted(found.items()))
