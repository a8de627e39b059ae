"""Builds an engine from a `tensorrt_build`, with TensorRT 10 (10.8 on) and 11 alike.

Every network is strongly typed: a flag in 10, the only kind in 11. So fp16 and INT8 come from
the ONNX graph alone, and no flag of the builder lowers the precision.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffoundry.errors import StageError
from diffoundry.formats import onnx, tensorrt_build
from diffoundry.formats.canonical import atomic_write
from diffoundry.formats.tensorrt_build import BuildSpec, Profile
from diffoundry.runtimes.tensorrt.bindings import new_log

_REMEDY = "report the node with this TensorRT version, or build this component for another target"


def build_engine(trt: Any, build: Path, timing_cache: Path) -> bytes:
    """The serialized engine. `timing_cache` is read where it is there, and written.

    Raises StageError with the node at fault, as the parser or the builder names it.
    """
    spec = tensorrt_build.read_spec(build)
    where = f"building the TensorRT engine of {build.name}"
    log = new_log(trt)
    builder = _builder(trt, log, where)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    model = onnx.model_file(tensorrt_build.onnx_path(build))
    if not parser.parse_from_file(str(model)):
        raise _refused(parser, where, trt)
    config = builder.create_builder_config()
    _configure(trt, config, spec)
    for profile in spec.profiles:
        _add_profile(trt, builder, config, profile, where)
    cache = _attach_timing_cache(config, timing_cache)  # held: the builder does not
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _failed(network, log.errors, where, trt)
    timing_cache.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(timing_cache, bytes(cache.serialize()))
    return bytes(plan)


def _builder(trt: Any, log: Any, where: str) -> Any:
    """TensorRT's builder. Its bindings raise TypeError where its library cannot start."""
    try:
        return trt.Builder(log)
    except (TypeError, RuntimeError) as error:
        raise StageError(
            where,
            expected=f"a TensorRT {trt.__version__} whose libraries start on this host",
            found="; ".join(log.errors) or str(error),
            remedy="match the versions of TensorRT, its Python bindings and the NVIDIA driver",
        ) from error


def _configure(trt: Any, config: Any, spec: BuildSpec) -> None:
    # On by default; it would round fp32 products to 10 bits without a word.
    config.clear_flag(trt.BuilderFlag.TF32)
    if spec.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if spec.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if spec.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if spec.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec.workspace_bytes)
    if spec.optimization_level is not None:
        config.builder_optimization_level = spec.optimization_level
    # So that the engine can be asked what each layer computes in.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED


def _add_profile(trt: Any, builder: Any, config: Any, shapes: Profile, where: str) -> None:
    profile = builder.create_optimization_profile()
    for name, range_ in shapes.items():
        corners = (trt.Dims(list(c)) for c in (range_.min, range_.opt, range_.max))
        try:
            profile.set_shape(name, *corners)
        except ValueError as error:
            raise StageError(
                f"{where}: optimization profile of {name}",
                expected="a range that the network allows",
                found=str(error),
                remedy="change the axes of the profile, and build the bundle again",
            ) from error
    if config.add_optimization_profile(profile) < 0:
        raise StageError(
            where,
            expected="an optimization profile that TensorRT takes",
            found=", ".join(f"{name} {r.min}..{r.max}" for name, r in shapes.items()),
            remedy="change the axes of the profile, and build the bundle again",
        )


def _attach_timing_cache(config: Any, file: Path) -> Any:
    """Start from the timings of earlier builds; those of another device are left aside."""
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    if not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _refused(parser: Any, where: str, trt: Any) -> StageError:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    found = [
        f"node {e.node()} {e.node_name()} ({e.node_operator()}): {e.desc().strip()}" for e in errors
    ]
    return StageError(
        where,
        expected=f"a graph that the parser of TensorRT {trt.__version__} takes",
        found="; ".join(found) or "no reason given",
        remedy=_REMEDY,
    )


def _failed(network: Any, errors: list[str], where: str, trt: Any) -> StageError:
    said = "; ".join(error.strip() for error in errors) or "no reason given"
    layers = [network.get_layer(index).name for index in range(network.num_layers)]
    at_fault = [name for name in layers if name and name in said]
    return StageError(
        where + (f": {', '.join(at_fault[:5])}" if at_fault else ""),
        expected=f"an engine from the builder of TensorRT {trt.__version__}",
        found=said[:1500],
        remedy=_REMEDY,
    )
