"""How a session drives an engine: shapes, buffers, profiles, graphs. The engine is a stand-in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffoundry.errors import ArtifactError, ContractError, StageError
from diffoundry.formats import tensorrt_engine
from diffoundry.runtimes.tensorrt.session import OpenedTensorrt, types_of_layers
from diffoundry.runtimes.tensorrt_engine import TensorrtEngine
from diffoundry.sessions import open_session
from diffoundry.types import Artifact, ArtifactType, Contract, TensorSpec
from tests.runtimes.tensorrt import fake_cuda, fake_trt
from tests.runtimes.tensorrt.doubling import CONTRACT, EDGE, doubling_build


def opened(folder: Path, **options: Any) -> OpenedTensorrt:
    return TensorrtEngine().open(doubling_build(folder, **options), CONTRACT, "cuda")


def feed(*shape: int) -> dict[str, Any]:
    return {"x": np.arange(np.prod(shape), dtype=np.float32).reshape(shape)}


def test_named_arrays_go_in_and_come_out(trt: Any, tmp_path: Path) -> None:
    session = opened(tmp_path / "build")
    for shape in ((1, 2), (4, 2), (2, 1), (1, 8), (1, 2)):
        feeds = feed(*shape)
        np.testing.assert_array_equal(session.infer(feeds)["y"], 2 * feeds["x"])
    assert fake_cuda.count("held") == 2
    strided = {"x": feed(4, 4)["x"][:, ::2]}
    np.testing.assert_array_equal(session.infer(strided)["y"], 2 * strided["x"])
    session.close()


def test_the_profile_that_covers_the_shape_is_taken(trt: Any, tmp_path: Path) -> None:
    session = opened(tmp_path / "build")
    session.infer(feed(1, 2))
    assert session._context.profile == 0
    session.infer(feed(1, 5))
    assert session._context.profile == 1
    session.close()


def test_a_shape_outside_every_profile_is_refused(trt: Any, tmp_path: Path) -> None:
    session = opened(tmp_path / "build")
    with pytest.raises(ContractError, match="optimization profile"):
        session.infer(feed(5, 2))
    session.close()


def test_without_the_option_nothing_is_captured(trt: Any, tmp_path: Path) -> None:
    before = fake_cuda.count("replays")
    session = opened(tmp_path / "build")
    for _ in range(3):
        session.infer(feed(1, 2))
    assert fake_cuda.count("replays") == before
    session.close()


def test_a_graph_is_captured_at_the_second_call_and_dropped_with_the_shape(
    trt: Any, tmp_path: Path
) -> None:
    session, before = opened(tmp_path / "build", cuda_graph=True), fake_cuda.count("replays")
    session.infer(feed(1, 2))
    assert (fake_cuda.count("graphs"), session._context.launches) == (0, 1)
    session.infer(feed(1, 2))
    session.infer(feed(1, 2))
    assert (fake_cuda.count("graphs"), session._context.launches) == (1, 2)
    assert fake_cuda.count("replays") == before + 2
    session.infer(feed(4, 2))
    assert (fake_cuda.count("graphs"), session._context.launches) == (0, 3)
    session.close()


def test_what_the_layers_compute_in_is_read_back(trt: Any, tmp_path: Path) -> None:
    session = opened(tmp_path / "build")
    assert session.precision_used()["compute"] == ["float16"]
    trt.now.layers = trt.layers("Half", "Float", "Int64", "Float")
    used = session.precision_used()
    assert used["layers_by_type"] == {"float16": 1, "float32": 2}
    assert used["tf32"] == "off" and used["tensorrt"] == trt.__version__
    session.close()


@pytest.mark.parametrize("text", ["no JSON", "{}", '{"Layers": ["only a name"]}', "[]"])
def test_an_inspector_that_names_no_types_says_nothing(text: str) -> None:
    assert types_of_layers(text) == {}


def test_types_are_told_apart() -> None:
    words = ("Row major linear FP32", "BFloat16", "FP16", "Int8", "FP8", "TF32", "Bool", "Int32")
    assert types_of_layers(fake_trt.layers(*words)) == {
        "float32": 1,
        "bfloat16": 1,
        "float16": 1,
        "int8": 1,
        "float8": 1,
        "tf32": 1,
    }


def test_an_engine_is_no_place_to_probe(trt: Any, tmp_path: Path) -> None:
    session = opened(tmp_path / "build")
    with pytest.raises(ContractError, match="ONNX"):
        session.probe(feed(1, 2))
    session.close()


def test_an_engine_that_does_not_load_is_refused_in_tensorrts_words(
    trt: Any, tmp_path: Path
) -> None:
    trt.now.loads = False
    with pytest.raises(ArtifactError, match="serialized with another version") as caught:
        opened(tmp_path / "build")
    assert "--complete" in caught.value.remedy


def test_tensors_that_are_not_the_contracts_are_refused(trt: Any, tmp_path: Path) -> None:
    other = Contract("doubler", CONTRACT.inputs, (TensorSpec("z", "float32", EDGE),), CONTRACT.axes)
    with pytest.raises(ArtifactError, match="z: float32"):
        TensorrtEngine().open(doubling_build(tmp_path / "build"), other, "cuda")


def test_weight_streaming_takes_tensorrts_own_budget(trt: Any, tmp_path: Path) -> None:
    session = opened(tmp_path / "build", weight_streaming=True, version_compatible=True)
    assert session._engine.weight_streaming_budget_v2 == 5
    assert session._runtime.engine_host_code_allowed
    session.close()


def test_the_second_opening_builds_nothing(trt: Any, tmp_path: Path) -> None:
    artifact = doubling_build(tmp_path / "build")
    for _ in range(2):
        open_session(TensorrtEngine(), artifact, CONTRACT, "cuda").close()
    assert len(trt.now.built) == 1
    folder = TensorrtEngine().built_engine(artifact, "cuda")
    assert folder is not None and folder.is_relative_to(tmp_path / "cache")
    (folder / "engine.plan").write_bytes(b"damaged")
    open_session(TensorrtEngine(), artifact, CONTRACT, "cuda").close()
    assert len(trt.now.built) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tensorrt", "10.13.0.35"),
        ("gpu", "NVIDIA L4"),
        ("compute_capability", "7.5"),
        ("driver", "CUDA 14.0"),
    ],
)
def test_an_engine_of_another_host_is_refused_with_the_remedy(
    trt: Any, tmp_path: Path, field: str, value: str
) -> None:
    artifact = doubling_build(tmp_path / "build")
    TensorrtEngine().open(artifact, CONTRACT, "cuda").close()
    folder = TensorrtEngine().built_engine(artifact, "cuda")
    assert folder is not None
    engine = Artifact(ArtifactType("tensorrt_engine"), folder, "", "doubler")
    TensorrtEngine().open(engine, CONTRACT, "cuda").close()
    document = json.loads((folder / tensorrt_engine.FINGERPRINT_FILE).read_text())
    document["built_on"][field] = value
    (folder / tensorrt_engine.FINGERPRINT_FILE).write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=value) as caught:
        TensorrtEngine().open(engine, CONTRACT, "cuda")
    assert "--complete" in caught.value.remedy


def test_a_build_that_fails_leaves_no_engine(trt: Any, tmp_path: Path) -> None:
    trt.now.builder_error = "no implementation"
    artifact = doubling_build(tmp_path / "build")
    with pytest.raises(StageError, match="no implementation"):
        TensorrtEngine().open(artifact, CONTRACT, "cuda")
    assert TensorrtEngine().built_engine(artifact, "cuda") is None
