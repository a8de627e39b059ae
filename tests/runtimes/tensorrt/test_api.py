"""What our code uses of TensorRT's API exists in the real bindings of 10 and 11, as we use it.

The bindings are NVIDIA's own; the libraries behind them are stubs that can build nothing.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from diffoundry.runtimes import tensorrt
from tests.runtimes.tensorrt.api_uses import CHECK, RECEIVERS, Uses, collect, collect_files
from tests.tensorrt_stubs import MAJORS, run_with_bindings

SOURCE = Path(tensorrt.__file__).parent
both_majors = pytest.mark.parametrize("major", MAJORS)


def check(major: str, uses: Uses) -> tuple[str, list[str], int]:
    found = run_with_bindings(major, CHECK, {**dataclasses.asdict(uses), "receivers": RECEIVERS})
    return found["version"], found["problems"], found["checked"]


@both_majors
def test_every_name_flag_and_signature_that_we_use_is_there(major: str) -> None:
    version, problems, checked = check(major, collect_files(SOURCE))
    assert version.split(".")[0] == major
    assert not problems, "\n".join(problems)
    assert checked > 60


def test_the_list_comes_from_our_source() -> None:
    found = {".".join([chain[0], *(step[0] for step in chain[1:])])
             for chain in collect_files(SOURCE).chains}  # fmt: skip
    assert {
        "Builder.create_network",
        "Builder.build_serialized_network",
        ".BuilderFlag.WEIGHT_STREAMING",
        "IBuilderConfig.builder_optimization_level",
        "OnnxParser.get_error",
        "ParserError.node_name",
        "IOptimizationProfile.set_shape",
        "IExecutionContext.execute_async_v3",
        "ICudaEngine.weight_streaming_budget_v2",
        "EngineInspector.get_engine_information",
        "INetworkDefinition.get_layer.name",
    } <= found


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("builder.create_netwerk()", "Builder.create_netwerk does not exist"),
        ("config.set_flag(trt.BuilderFlag.FP17)", "BuilderFlag.FP17 does not exist"),
        ("config.set_memory_pool_limit(1)", "set_memory_pool_limit is called with"),
        ("config.set_memory_pool_limit(1, limit=2)", "set_memory_pool_limit is called with"),
        ("parser.num_errors()", "num_errors is a property, called"),
        ("self._context.name.x", ""),
        ("self._engine.num_layers = 1", "num_layers cannot be set"),
        ("network = builder.create_builder_config()", "RECEIVERS says INetworkDefinition"),
        ("somewhere = trt.Runtime(log)", "RECEIVERS says None"),
        ("network.get_layer(0).nam", "get_layer.nam does not exist"),
    ],
)
def test_a_use_that_does_not_fit_is_found(line: str, problem: str) -> None:
    _, problems, _ = check("11", collect(line))
    assert any(problem in found for found in problems) if problem else not problems


def test_what_eleven_dropped_would_be_found() -> None:
    """Weak typing ended with 10: code that leaned on it fails here, not on a user's host."""
    dropped = collect("config.set_flag(trt.BuilderFlag.FP16)")
    assert not check("10", dropped)[1]
    assert check("11", dropped)[1]


BEHAVIOUR = """
from pathlib import Path
from diffoundry.errors import DeferredError, DiffoundryError
from diffoundry.formats import tensorrt_build
from diffoundry.runtimes.tensorrt import bindings, builder

trt = bindings.load()
log = bindings.new_log(trt)
log.log(trt.ILogger.ERROR, "at fault")
log.log(trt.ILogger.WARNING, "careful")
log.log(trt.ILogger.VERBOSE, "chatter")
found = {
    "version": trt.__version__,
    "errors": log.errors,
    "warnings": log.warnings,
    "flag": 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
    "dims": list(trt.Dims([1, 4, 8])),
    "types": [trt.nptype(t).__name__ for t in (trt.DataType.HALF, trt.DataType.INT64)],
}
try:
    bindings.load("12.0", "13")
except DeferredError as error:
    found["refused"] = error.found
tensorrt_build.read_spec = lambda path: None
try:
    builder.build_engine(trt, Path("some-build"), Path("timings"))
except DiffoundryError as error:
    found["not built"] = [type(error).__name__, error.expected]
answer(found)
"""


@both_majors
def test_our_loader_and_logger_work_with_the_real_bindings(major: str) -> None:
    found = run_with_bindings(major, BEHAVIOUR)
    assert found["version"].startswith(f"{major}.")
    assert (found["errors"], found["warnings"]) == (["at fault"], ["careful"])
    assert found["flag"] > 0 and found["dims"] == [1, 4, 8]
    assert found["types"] == ["float16", "int64"]
    assert f"tensorrt_bindings {found['version']}" in found["refused"]


@both_majors
def test_libraries_that_do_not_start_are_an_error_with_a_remedy(major: str) -> None:
    name, expected = run_with_bindings(major, BEHAVIOUR)["not built"]
    assert name == "StageError" and "whose libraries start" in expected
