"""A stand-in for TensorRT's module, for tests of our own control flow. It builds no engine.

What it calls a plan is JSON of what our code asked for; its "execution" is onnxruntime, on the
addresses that it was given.
"""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from tests.runtimes.tensorrt import fake_cuda

__version__ = "11.4.0.106"

BuilderFlag = Enum("BuilderFlag", "TF32 WEIGHT_STREAMING REFIT VERSION_COMPATIBLE")
MemoryPoolType = Enum("MemoryPoolType", "WORKSPACE")
ProfilingVerbosity = Enum("ProfilingVerbosity", "DETAILED")
TensorIOMode = Enum("TensorIOMode", "INPUT OUTPUT")
TensorLocation = Enum("TensorLocation", "DEVICE HOST")
LayerInformationFormat = Enum("LayerInformationFormat", "JSON")


class NetworkDefinitionCreationFlag:
    STRONGLY_TYPED = 1


class Behaviour:
    """What the next calls do; reset by `reset`."""

    parser_errors: list[Any]
    builder_error: str
    refuses_profile: bool
    refuses_timings: bool
    loads: bool
    layers: str
    built: list[dict[str, Any]]

    def reset(self) -> None:
        self.parser_errors, self.builder_error, self.built = [], "", []
        self.refuses_profile = self.refuses_timings = False
        self.loads, self.layers = True, layers("Half")


def layers(*types: str) -> str:
    outputs = [[{"Name": "x", "Format/Datatype": one}] for one in types]
    return json.dumps({"Layers": [{"Name": f"l{i}", "Outputs": o} for i, o in enumerate(outputs)]})


now = Behaviour()
_DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64"}


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, VERBOSE = range(4)


class Dims(list[int]):
    pass


def nptype(dtype: str) -> Any:
    return getattr(np, dtype)


@dataclass
class ParserError:
    name: str
    operator: str
    text: str

    def node(self) -> int:
        return 3

    def node_name(self) -> str:
        return self.name

    def node_operator(self) -> str:
        return self.operator

    def desc(self) -> str:
        return self.text


class OnnxParser:
    def __init__(self, network: Network, log: Any) -> None:
        self.network = network

    @property
    def num_errors(self) -> int:
        return len(now.parser_errors)

    def get_error(self, index: int) -> Any:
        return now.parser_errors[index]

    def parse_from_file(self, path: str) -> bool:
        assert Path(path).is_file()
        self.network.model = path
        return not now.parser_errors


@dataclass
class Layer:
    name: str


class Network:
    num_layers = 2
    model = ""

    def get_layer(self, index: int) -> Layer:
        return Layer(("/conv_in/Conv", "/conv_out/Conv")[index])


class Blob(bytes):
    def serialize(self) -> bytes:
        return b"timings"


@dataclass
class Config:
    flags: set[str] = field(default_factory=lambda: {"TF32"})
    workspace: int | None = None
    profiles: list[Any] = field(default_factory=list)
    timings: Any = None
    builder_optimization_level: int = 3
    profiling_verbosity: Any = None

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag.name)

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag.name)

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.workspace = size

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile.shapes)
        return -1 if now.refuses_profile else len(self.profiles) - 1

    def create_timing_cache(self, data: bytes) -> Blob:
        return Blob(data)

    def set_timing_cache(self, cache: Blob, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        if now.refuses_timings and cache:
            return False
        self.timings = cache
        return True


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, *corners: Dims) -> None:
        assert all(isinstance(corner, Dims) for corner in corners)
        self.shapes[name] = [list(corner) for corner in corners]


class Builder:
    def __init__(self, log: Any) -> None:
        self.log = log

    def create_network(self, flags: int) -> Network:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return Network()

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        if now.builder_error:
            self.log.log(ILogger.ERROR, now.builder_error)
            return None
        asked = {
            "model": network.model,
            "flags": sorted(config.flags),
            "workspace": config.workspace,
            "level": config.builder_optimization_level,
            "profiles": config.profiles,
            "timings": bytes(config.timings).decode(),
        }
        now.built.append(asked)
        return json.dumps(asked).encode()


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, log: Any) -> None:
        self.log = log

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        if not now.loads:
            self.log.log(ILogger.ERROR, "serialized with another version")
            return None
        return Engine(json.loads(plan))


class Engine:
    """The graph that was "parsed", run by onnxruntime."""

    num_layers = 4

    def __init__(self, asked: dict[str, Any]) -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(asked["model"])
        self.inputs = {one.name: _DTYPES[one.type] for one in self.session.get_inputs()}
        self.outputs = {one.name: _DTYPES[one.type] for one in self.session.get_outputs()}
        self.num_io_tensors = len(self.inputs) + len(self.outputs)
        self.profiles = asked["profiles"]
        self.num_optimization_profiles = len(self.profiles)
        self.weight_streaming_budget_v2 = 0

    def get_weight_streaming_automatic_budget(self) -> int:
        return 5

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        return TensorLocation.DEVICE

    def get_tensor_dtype(self, name: str) -> str:
        return {**self.inputs, **self.outputs}[name]

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        return list(self.profiles[index][name])

    def create_execution_context(self) -> Context:
        return Context(self)

    def create_engine_inspector(self) -> Inspector:
        return Inspector()


class Inspector:
    def get_engine_information(self, kind: Any) -> str:
        return now.layers


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.profile, self.launches = engine, 0, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.at: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.profiles[self.profile][name]
        self.shapes[name] = shape
        return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))

    def infer_shapes(self) -> list[str]:
        return sorted(set(self.engine.inputs) - set(self.shapes))

    def get_tensor_shape(self, name: str) -> Dims:
        zeros = {n: np.zeros(self.shapes[n], d) for n, d in self.engine.inputs.items()}
        return Dims(self.engine.session.run([name], zeros)[0].shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.at[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        self.launches += 1
        if not fake_cuda.count("capturing"):
            feeds = {n: self._memory(n, self.shapes[n]) for n in self.engine.inputs}
            found = self.engine.session.run(list(self.engine.outputs), feeds)
            for name, value in zip(self.engine.outputs, found, strict=True):
                self._memory(name, value.shape)[...] = value
        return True

    def _memory(self, name: str, shape: tuple[int, ...]) -> Any:
        """The "device" memory at a tensor's address, as an array."""
        dtype = np.dtype(self.engine.get_tensor_dtype(name))
        size = int(np.prod(shape)) * dtype.itemsize
        block = (ctypes.c_char * size).from_address(self.at[name])
        return np.frombuffer(block, dtype).reshape(shape)
