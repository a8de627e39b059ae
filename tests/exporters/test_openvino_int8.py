"""INT8 through OpenVINO: weights stay INT8 in the file, planned layers run in integer kernels."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffoundry.errors import ProfileError, StageError
from diffoundry.exporters.openvino_from_onnx import OpenvinoFromOnnx
from diffoundry.formats import openvino
from diffoundry.formats.quant_plan import QuantPlan
from diffoundry.runtimes.openvino_session import OpenvinoSession
from diffoundry.types import Artifact, ArtifactType, Axis, AxisRef, Contract, TensorSpec
from tests.exporters import small_openvino, small_quantized as small


@functools.cache
def _converted(scheme: str, outputs: bool = False, symmetric: bool = False) -> Artifact:
    source = small.quantize(small.make_plan(scheme, outputs, symmetric), form="qdq")
    folder = Path(tempfile.mkdtemp(dir=source.path.parent))
    return small_openvino.convert(folder, source, small.CONTRACT, precision="int8")


def _integer(plan: QuantPlan) -> list[str]:
    return sorted(entry.module for entry in plan.layers if entry.scheme == "static")


@pytest.mark.parametrize("scheme", ["static", "dynamic", "weight_only"])
@pytest.mark.parametrize("outputs", [False, True])
def test_the_ir_holds_the_plan_and_computes_what_it_means(scheme: str, outputs: bool) -> None:
    plan, made = small.make_plan(scheme, outputs), _converted(scheme, outputs)
    assert made.type == ArtifactType("openvino", "int8", made.type.shape_policy)
    assert openvino.integer_layers(made.path) == small.schemes(plan)
    session = OpenvinoSession().open(made, small.CONTRACT, "cpu", 1)
    for seed, shape in enumerate(small.SHAPES):
        feeds = small.feeds_at(seed, shape)
        exact, meant = small.reference(feeds), small.reference(feeds, plan)
        found = session.infer(feeds)["model_output"]
        assert small.sqnr_db(meant, found) > (100 if scheme == "weight_only" else 30)
        assert 20 < small.sqnr_db(exact, meant) - 1 < small.sqnr_db(exact, found)


@pytest.mark.parametrize("symmetric", [False, True])
def test_every_static_layer_runs_in_an_integer_kernel(symmetric: bool) -> None:
    made = _converted("static", symmetric=symmetric)
    for _ in range(2):  # compiled, and from the blob kept of that
        session = OpenvinoSession().open(made, small.CONTRACT, "cpu", 1)
        used = session.precision_used()
        assert used["integer_layers"] == _integer(small.make_plan())
        assert used["kernels_by_type"].get("u8", 0) + used["kernels_by_type"].get("i8", 0) == 7
    assert session.from_cache


def test_weights_that_are_only_stored_in_int8_compute_in_float() -> None:
    used = OpenvinoSession().open(_converted("weight_only"), small.CONTRACT, "cpu").precision_used()
    assert used["integer_layers"] == []
    assert set(used["kernels_by_type"]) == {"f32"}


def test_the_other_form_of_quantize_onnx_is_refused_with_the_right_one(tmp_path: Path) -> None:
    source = small.quantize(small.make_plan())
    with pytest.raises(StageError, match="qdq"):
        small_openvino.convert(tmp_path, source, small.CONTRACT, precision="int8")


def test_each_precision_takes_its_own_kind_of_source(tmp_path: Path) -> None:
    (wanted,) = OpenvinoFromOnnx(precision="int8").inputs()["model"]
    assert wanted == ArtifactType("onnx", "int8")
    with pytest.raises(StageError, match="quantize_onnx"):
        small_openvino.convert(tmp_path, small.shared_fp32(), small.CONTRACT, precision="int8")
    with pytest.raises(ProfileError, match="int8"):
        OpenvinoFromOnnx(precision="int4")  # type: ignore[arg-type]


def _two_convolutions(folder: Path) -> Artifact:
    """A convolution without a bias whose result is quantized and added: Q/DQ, dynamic sizes."""
    draw = np.random.default_rng(0)
    arrays = {
        "one.weight": draw.integers(-127, 128, (8, 8, 3, 3)).astype(np.int8),
        "two.weight": draw.integers(-127, 128, (8, 8, 3, 3)).astype(np.int8),
        "weight_scale": np.full(8, 0.002, np.float32),
        "two.bias": draw.standard_normal(8).astype(np.float32),
        "scale": np.array(4 / 255, np.float32),
        "zero": np.array(128, np.uint8),
    }

    def layer(name: str, value: str, *bias: str) -> list[onnx.NodeProto]:
        feeds = [f"{name}.input", f"{name}.floats", *bias]
        return [
            helper.make_node(
                "DequantizeLinear", [f"{name}.weight", "weight_scale"], [feeds[1]], axis=0
            ),
            helper.make_node("QuantizeLinear", [value, "scale", "zero"], [f"{name}.integers"]),
            helper.make_node("DequantizeLinear", [f"{name}.integers", "scale", "zero"], [feeds[0]]),
            helper.make_node("Conv", feeds, [f"{name}.output"], f"/{name}/Conv", pads=[1] * 4),
        ]

    edges = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 8, "height", "width"])
        for name in ("latent", "image")
    ]
    add = helper.make_node("Add", ["two.output", "one.output"], ["image"])
    graph = helper.make_graph(
        [*layer("one", "latent"), *layer("two", "one.output", "two.bias"), add],
        "two",
        edges[:1],
        edges[1:],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    return Artifact(ArtifactType("onnx", "int8"), folder, "sha256:0")


def test_a_convolution_without_a_bias_computes_what_onnxruntime_computes(tmp_path: Path) -> None:
    """OpenVINO alone is at 4.5 dB here; an AutoencoderTiny has such layers."""
    source = _two_convolutions(tmp_path / "onnx")
    dims = (AxisRef("batch"), 8, AxisRef("height"), AxisRef("width"))
    contract = Contract(
        "two",
        (TensorSpec("latent", "float32", dims),),
        (TensorSpec("image", "float32", dims),),
        (Axis("batch", 1, 1, 2), Axis("height", 4, 8, 16), Axis("width", 4, 8, 16)),
    )
    made = small_openvino.convert(tmp_path, source, contract, precision="int8")
    latent = np.random.default_rng(1).standard_normal((1, 8, 8, 8)).astype(np.float32)
    wanted = onnxruntime.InferenceSession(source.path / "model.onnx").run(None, {"latent": latent})
    found = OpenvinoSession().open(made, contract, "cpu", 1).infer({"latent": latent})["image"]
    assert small.sqnr_db(wanted[0], found) > 40
