"""The stage: checked before anything is written, the same bytes everywhere, no engine built."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from diffoundry.compilers.tensorrt_from_onnx import TensorrtFromOnnx
from diffoundry.errors import ProfileError, StageError
from diffoundry.formats import onnx as onnx_format, tensorrt_build
from diffoundry.types import Artifact, ArtifactType, ShapePolicy, StageContext
from tests.compilers import small_network as small


def run(folder: Path, model: Artifact, **options: Any) -> Path:
    folder.mkdir(parents=True)
    said: list[str] = []
    context = StageContext(folder, "unet", small.CONTRACT, threads=1, say=said.append)
    made = TensorrtFromOnnx(**options).run({"model": model}, context)["build"]
    assert any("deferred: the engine is not built here" in line for line in said)
    return made.path


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_graph_is_the_one_that_was_given(tmp_path: Path, precision: str) -> None:
    model = small.shared_onnx() if precision == "fp32" else small.shared_onnx(precision)
    build = run(tmp_path / "a", model, precision=precision)
    tensorrt_build.validate(build)
    assert onnx_format.digest(build / "onnx") == onnx_format.digest(model.path)
    spec = tensorrt_build.read_spec(build)
    assert spec.precision == precision and spec.onnx_digest == onnx_format.digest(model.path)
    assert spec.profiles[0]["sample"].max == (4, 4, 16, 16)


def test_the_same_build_twice_is_byte_equal(tmp_path: Path) -> None:
    model = small.shared_onnx()
    digests = set()
    for name in "ab":
        build = run(tmp_path / name, model, workspace_mib=512, refit=True)
        tensorrt_build.canonicalise(build)
        digests.add(tensorrt_build.digest(build))
    assert len(digests) == 1


def test_options_reach_the_specification(tmp_path: Path) -> None:
    policy = ShapePolicy("fixed", ((("batch", 1), ("height", 16), ("width", 16)),))
    build = run(
        tmp_path / "a",
        small.shared_onnx(),
        at_least="11.0",
        workspace_mib=64,
        weight_streaming=True,
        version_compatible=True,
        optimization_level=2,
        cuda_graph=True,
        shape_policy=policy,
    )
    spec = tensorrt_build.read_spec(build)
    assert (spec.tensorrt_at_least, spec.workspace_bytes) == ("11.0", 64 * 2**20)
    assert spec.weight_streaming and spec.version_compatible and spec.cuda_graph
    assert spec.optimization_level == 2 and not spec.refit
    assert len(spec.profiles) == 1 and spec.profiles[0]["sample"].min == (1, 4, 4, 4)


@pytest.mark.parametrize(
    "options",
    [
        {"at_least": "10.7"},
        {"at_least": "12.0"},
        {"at_least": "latest"},
        {"at_least": 10.8},
        {"workspace_mib": -1},
        {"optimization_level": 6},
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ProfileError, match="tensorrt_from_onnx"):
        TensorrtFromOnnx(**options)


def test_another_precision_than_the_graphs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="fp16"):
        run(tmp_path / "a", small.shared_onnx(), precision="fp16")


def test_a_graph_that_is_not_taken_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    edges = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 2]) for n in ("x", "y")]
    nodes = [
        helper.make_node("Det", ["x"], ["d"], name="/block/det"),
        helper.make_node("Add", ["x", "d"], ["y"], name="add"),
    ]
    graph = helper.make_graph(nodes, "bad", edges[:1], edges[1:])
    (tmp_path / "model").mkdir()
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), tmp_path / "model" / "model.onnx")
    model = Artifact(ArtifactType("onnx", "fp32"), tmp_path / "model", "sha256:0", "unet")
    with pytest.raises(StageError, match=r"/block/det \(Det\)"):
        run(tmp_path / "a", model)
    assert not list((tmp_path / "a").iterdir())


def test_polygraphy_takes_our_command_and_reads_our_feeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("polygraphy")
    build = run(tmp_path / "a", small.shared_onnx(), refit=True, workspace_mib=8)
    small.make_recording(tmp_path / "golden")
    monkeypatch.setenv("GOLDEN", str(tmp_path / "golden" / "recording"))
    text = (build / tensorrt_build.README_FILE).read_text()
    command = text.partition("polygraphy run ")[2].partition("```")[0].replace("\\\n", " ")
    program = str(Path(sys.executable).with_name("polygraphy"))
    arguments = [program, "run", *shlex.split(command)]
    asked = polygraphy([*arguments, "--gen-script", str(tmp_path / "asked.py")], build)
    assert (tmp_path / "asked.py").is_file(), asked
    script = (tmp_path / "asked.py").read_text()
    assert "strongly_typed=True" in script and "refittable=True" in script
    # The same command without TensorRT runs here: graph and feeds fit each other.
    ran = polygraphy([one for one in arguments if one != "--trt"], build)
    assert "PASSED" in ran


def polygraphy(arguments: list[str], folder: Path) -> str:
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_feeds_are_the_recorded_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = run(tmp_path / "a", small.shared_onnx())
    small.make_recording(tmp_path / "golden")
    monkeypatch.setenv("GOLDEN", str(tmp_path / "golden" / "recording"))
    space: dict[str, Any] = {"__file__": str(build / tensorrt_build.INPUTS_FILE)}
    exec((build / tensorrt_build.INPUTS_FILE).read_text(), space)
    calls = list(space["load_data"]())
    assert len(calls) == 3
    for seed, feeds in enumerate(calls):
        expected = small.feeds_at(seed=seed)
        assert set(feeds) == set(expected)
        for name, value in feeds.items():
            np.testing.assert_array_equal(value, expected[name])
