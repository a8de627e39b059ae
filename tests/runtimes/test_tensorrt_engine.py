"""TensorRT where it is not: deferred, said so, and the exact graph checked by onnxruntime."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffoundry.discovery import runtime_named
from diffoundry.errors import ArtifactError, DeferredError, UsageError
from diffoundry.formats import tensorrt_build
from diffoundry.runtimes.onnx_session import OnnxSession
from diffoundry.runtimes.tensorrt import bindings, driver
from diffoundry.runtimes.tensorrt_engine import TensorrtEngine
from diffoundry.sessions import choose_opening, open_session
from diffoundry.types import Artifact, ArtifactType, HasStandIn, ShapePolicy
from tests.runtimes.tensorrt.doubling import CONTRACT, doubling_build


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARY", "libnosuchdriver.so.1")


def test_without_a_gpu_it_is_deferred_whether_or_not_the_bindings_are_here(no_gpu: None) -> None:
    problem = TensorrtEngine().unavailable("cuda")
    assert isinstance(problem, DeferredError)
    assert "GPU" in problem.found and "verify BUNDLE --complete" in problem.remedy
    assert isinstance(TensorrtEngine().unavailable("cpu"), UsageError)


def test_with_a_gpu_and_without_the_libraries_it_is_deferred(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "device_count", lambda: 1)
    problem = TensorrtEngine().unavailable("cuda")
    assert isinstance(problem, DeferredError)
    assert "≥ 10.8, < 12" in problem.expected and "tensorrt" in problem.found


@pytest.mark.parametrize(
    ("version", "taken"),
    [("10.7.0.23", False), ("10.8.0.43", True), ("10.13.0.35", True), ("11.4.0.106", True),
     ("11.0rc1", True), ("12.0.0.1", False), ("8.6.1", False)],
)  # fmt: skip
def test_only_releases_of_the_range_are_taken(
    monkeypatch: pytest.MonkeyPatch, version: str, taken: bool
) -> None:
    module = types.ModuleType("tensorrt")
    module.__dict__["__version__"] = version
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setitem(sys.modules, "tensorrt_bindings", None)
    if taken:
        assert bindings.load() is module
    else:
        with pytest.raises(DeferredError, match=version):
            bindings.load()


def test_opening_on_this_host_is_deferred_not_a_crash(no_gpu: None, tmp_path: Path) -> None:
    artifact = doubling_build(tmp_path / "build")
    with pytest.raises(DeferredError):
        open_session(TensorrtEngine(), artifact, CONTRACT, "cuda")
    assert TensorrtEngine().built_engine(artifact, "cuda") is None


def test_a_plain_onnx_file_is_no_engine(no_gpu: None, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="tensorrt_build"):
        TensorrtEngine().open(Artifact(ArtifactType("onnx"), tmp_path, ""), CONTRACT, "cuda")


def test_onnxruntime_stands_in_on_the_exact_graph(no_gpu: None, tmp_path: Path) -> None:
    artifact = doubling_build(tmp_path / "build")
    runtime: Any = TensorrtEngine()
    assert isinstance(runtime, HasStandIn)
    opening = choose_opening(runtime_named, "tensorrt_engine", artifact, CONTRACT, "cuda")
    assert isinstance(opening.runtime, OnnxSession) and opening.device == "cpu"
    assert (
        opening.stand_in is not None and "the engine itself is not built" in opening.stand_in.note
    )
    assert opening.artifact.path == tensorrt_build.onnx_path(artifact.path)
    assert opening.artifact.digest == tensorrt_build.read_spec(artifact.path).onnx_digest
    session = opening.open()
    feeds = {"x": np.ones((2, 3), np.float32)}
    np.testing.assert_array_equal(session.infer(feeds)["y"], 2 * feeds["x"])
    session.close()


def test_the_stand_in_keeps_the_shapes_that_the_engine_promises(
    no_gpu: None, tmp_path: Path
) -> None:
    policy = ShapePolicy("fixed", ((("batch", 1), ("width", 2)),))
    made = doubling_build(tmp_path / "build")
    artifact = Artifact(ArtifactType("tensorrt_build", "fp32", policy), made.path, made.digest)
    session = choose_opening(runtime_named, "tensorrt_engine", artifact, CONTRACT, "cuda").open()
    session.infer({"x": np.ones((1, 2), np.float32)})
    with pytest.raises(Exception, match="fixed shapes"):
        session.infer({"x": np.ones((2, 2), np.float32)})


def test_a_damaged_build_has_no_stand_in(no_gpu: None, tmp_path: Path) -> None:
    artifact = doubling_build(tmp_path / "build")
    (artifact.path / tensorrt_build.SPEC_FILE).write_text("{")
    with pytest.raises(ArtifactError):
        TensorrtEngine().stand_in(artifact)


def test_what_a_bundle_requires_and_says_is_the_same_on_every_host() -> None:
    assert TensorrtEngine.lowest == {"tensorrt": "10.8"}
    assert TensorrtEngine.note.startswith("deferred: the engines are not built here")
