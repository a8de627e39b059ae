"""One opened engine: named numpy arrays in and out, on buffers that it keeps."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from diffoundry.errors import ArtifactError, ContractError
from diffoundry.formats.tensorrt_engine import REBUILD
from diffoundry.runtimes.tensorrt.bindings import new_log
from diffoundry.runtimes.tensorrt.driver import Cuda
from diffoundry.types import Array, Contract

# How the engine inspector writes the types of arithmetic, the longer words first.
_TYPES = (
    (r"bf16|bfloat16", "bfloat16"),
    (r"fp16|float16|half", "float16"),
    (r"fp8|float8", "float8"),
    (r"fp4|float4", "float4"),
    (r"tf32", "tf32"),
    (r"fp32|float32|float", "float32"),
    (r"int8", "int8"),
)


class Buffers:
    """Device memory by tensor name: grown where a larger shape comes, else used again."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._held: dict[str, tuple[int, int]] = {}

    def at(self, name: str, size_bytes: int) -> tuple[int, bool]:
        """Address of at least `size_bytes` for a tensor, and whether it is a new one."""
        address, capacity = self._held.get(name, (0, 0))
        if address and size_bytes <= capacity:
            return address, False
        if address:
            del self._held[name]
            self._cuda.free(address)
        address = self._cuda.allocate(max(size_bytes, 1))
        self._held[name] = (address, size_bytes)
        return address, True

    def close(self) -> None:
        while self._held:
            self._cuda.free(self._held.popitem()[1][0])


class OpenedTensorrt:
    """An engine in an execution context. Not to be used by two threads at once."""

    def __init__(
        self,
        trt: Any,
        plan: bytes,
        contract: Contract,
        cuda: Cuda,
        *,
        weight_streaming: bool = False,
        version_compatible: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        """Raises ArtifactError for an engine that does not load or fit the contract."""
        self._trt, self._contract, self._cuda = trt, contract, cuda
        self._log = new_log(trt)
        try:
            self._runtime = trt.Runtime(self._log)
        except (TypeError, RuntimeError) as error:  # its library could not start
            said = "; ".join(self._log.errors) or str(error)
            raise self._unusable("a TensorRT whose libraries start on this host", said) from error
        if version_compatible:
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self._unusable("an engine that TensorRT can load", "; ".join(self._log.errors))
        if weight_streaming:
            budget = self._engine.get_weight_streaming_automatic_budget()
            self._engine.weight_streaming_budget_v2 = budget
        self._inputs, self._outputs = self._tensors()
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise self._unusable("memory for the engine", "; ".join(self._log.errors))
        self._buffers = Buffers(cuda)
        self._profile = 0
        self._wants_graph = cuda_graph
        self._last_shapes: tuple[Any, ...] = ()
        self._graph = 0

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once. Raises ContractError for shapes outside the optimization profiles."""
        import numpy as np

        self._cuda.make_current()
        arrays = {
            name: np.ascontiguousarray(feeds[name], dtype) for name, dtype in self._inputs.items()
        }
        self._set_shapes(arrays)
        outputs = {
            name: np.empty(tuple(self._context.get_tensor_shape(name)), dtype)
            for name, dtype in self._outputs.items()
        }
        moved = [self._place(name, array) for name, array in {**arrays, **outputs}.items()]
        if any(moved):
            self._forget_graph()
        for name, array in arrays.items():
            self._cuda.upload(self._address(name, array), array.ctypes.data, array.nbytes)
        self._run(tuple((name, array.shape) for name, array in arrays.items()))
        for name, array in outputs.items():
            self._cuda.download(array.ctypes.data, self._address(name, array), array.nbytes)
        self._cuda.synchronize()
        return outputs

    def probe(
        self, feeds: Mapping[str, Array], names: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """An engine keeps no inner values: always raises ContractError."""
        raise ContractError(
            "probe of a TensorRT engine",
            expected="a format whose inner values can be read",
            found="an engine, whose layers are fused",
            remedy="probe the ONNX graph that it was built from, with onnx_session",
        )

    def precision_used(self) -> dict[str, Any]:
        """What the engine's layers give out, read back with TensorRT's inspector.

        Keys: compute (types of arithmetic), layers_by_type, layers, tf32, tensorrt.
        """
        inspector = self._engine.create_engine_inspector()
        text = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        counts = types_of_layers(text)
        return {
            "compute": sorted(counts),
            "layers_by_type": dict(sorted(counts.items())),
            "layers": self._engine.num_layers,
            "tf32": "on" if "tf32" in counts else "off",
            "tensorrt": str(self._trt.__version__),
        }

    def close(self) -> None:
        """Free the engine, its memory and its stream."""
        if "_context" in self.__dict__:
            self._cuda.make_current()
            self._forget_graph()
            self._buffers.close()
            del self._context
        self.__dict__.pop("_engine", None)
        self._cuda.close()

    def _tensors(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Name -> numpy type of inputs and outputs, held against the contract."""
        trt, engine = self._trt, self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        found: dict[Any, dict[str, Any]] = {trt.TensorIOMode.INPUT: {}, trt.TensorIOMode.OUTPUT: {}}
        for name in names:
            if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise self._unusable("tensors on the device", f"{name} on the host")
            dtype = trt.nptype(engine.get_tensor_dtype(name))
            found[engine.get_tensor_mode(name)][name] = dtype
        inputs, outputs = found[trt.TensorIOMode.INPUT], found[trt.TensorIOMode.OUTPUT]
        for specs, tensors in ((self._contract.inputs, inputs), (self._contract.outputs, outputs)):
            expected = {spec.name: spec.dtype for spec in specs}
            had = {name: dtype.__name__ for name, dtype in tensors.items()}
            if expected != had:
                raise self._unusable(_say(expected), _say(had))
        return inputs, outputs

    def _set_shapes(self, arrays: Mapping[str, Array]) -> None:
        self._choose_profile(arrays)
        refused = [
            f"{name} {list(array.shape)}"
            for name, array in arrays.items()
            if not self._context.set_input_shape(name, tuple(array.shape))
        ]
        refused += self._context.infer_shapes() if not refused else []
        if refused:
            raise self._outside(refused)

    def _choose_profile(self, arrays: Mapping[str, Array]) -> None:
        """Switch to the first optimization profile that covers these shapes."""
        for index in range(self._engine.num_optimization_profiles):
            if all(self._covers(name, array.shape, index) for name, array in arrays.items()):
                break
        else:
            raise self._outside([f"{name} {list(a.shape)}" for name, a in arrays.items()])
        if index != self._profile:
            self._forget_graph()
            self._context.set_optimization_profile_async(index, self._cuda.stream)
            self._cuda.synchronize()
            self._profile = index

    def _covers(self, name: str, shape: tuple[int, ...], profile: int) -> bool:
        low, _, high = self._engine.get_tensor_profile_shape(name, profile)
        ends = zip(shape, low, high, strict=True) if len(low) == len(shape) else ()
        return len(low) == len(shape) and all(a <= size <= b for size, a, b in ends)

    def _place(self, name: str, array: Array) -> bool:
        address, moved = self._buffers.at(name, array.nbytes)
        self._context.set_tensor_address(name, address)
        return moved

    def _address(self, name: str, array: Array) -> int:
        return self._buffers.at(name, array.nbytes)[0]

    def _run(self, shapes: tuple[Any, ...]) -> None:
        """Launch the engine; with `cuda_graph`, replay from the third call at a shape on.

        The first call at a shape lets TensorRT set itself up, which cannot be captured.
        """
        if shapes != self._last_shapes:
            self._forget_graph()
        elif self._wants_graph and not self._graph:
            self._graph = self._cuda.capture(self._launch)
        self._last_shapes = shapes
        if self._graph:
            self._cuda.replay(self._graph)
        else:
            self._launch()

    def _launch(self) -> None:
        if not self._context.execute_async_v3(self._cuda.stream):
            raise ContractError(
                f"{self._contract.component}: TensorRT could not run the engine",
                expected="a run without errors",
                found="; ".join(self._log.errors) or "no reason given",
                remedy=REBUILD,
            )

    def _forget_graph(self) -> None:
        if self._graph:
            self._cuda.forget(self._graph)
        self._graph = 0

    def _outside(self, refused: list[str]) -> ContractError:
        return ContractError(
            f"{self._contract.component}: no optimization profile of this engine takes the feeds",
            expected="shapes inside one of its "
            f"{self._engine.num_optimization_profiles} optimization profile(s)",
            found=", ".join(refused),
            remedy="use a shape of the contract, or build a variant with wider axes",
        )

    def _unusable(self, expected: str, found: str) -> ArtifactError:
        return ArtifactError(
            f"TensorRT engine of {self._contract.component}",
            expected=expected,
            found=found or "no reason given",
            remedy=REBUILD,
        )


def types_of_layers(text: str) -> dict[str, int]:
    """Type of arithmetic -> layers that give it out, from the inspector's JSON.

    Layers that give out only integers or booleans (shapes, indices) count for nothing; where the
    inspector names no types, the result is empty, which no check takes for a pass.
    """
    try:
        layers = json.loads(text).get("Layers", [])
    except (ValueError, AttributeError):
        return {}
    counts: dict[str, int] = {}
    for layer in layers:
        outputs = layer.get("Outputs", []) if isinstance(layer, dict) else []
        found = {_type_of(output) for output in outputs if isinstance(output, dict)}
        for kind in sorted(found - {""}):
            counts[kind] = counts.get(kind, 0) + 1
    return counts


def _type_of(tensor: Mapping[str, Any]) -> str:
    said = [str(value).lower() for key, value in tensor.items() if "datatype" in key.lower()]
    for pattern, name in _TYPES:
        if any(re.search(pattern, text) for text in said):
            return name
    return ""


def _say(types: Mapping[str, str]) -> str:
    return ", ".join(f"{name}: {dtype}" for name, dtype in types.items()) or "nothing"
