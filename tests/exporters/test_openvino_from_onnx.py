"""The OpenVINO stage: names, types and bounds of the edges, parity, fp16 weights, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from diffoundry.errors import ProfileError, StageError
from diffoundry.exporters.openvino_from_onnx import OpenvinoFromOnnx
from diffoundry.formats import onnx, openvino
from diffoundry.runtimes.openvino_session import OpenvinoSession
from diffoundry.types import (
    Array,
    Artifact,
    ArtifactType,
    Axis,
    AxisRef,
    Contract,
    ShapePolicy,
    TensorSpec,
)
from tests.compilers import small_network as small
from tests.exporters.small_openvino import ONE_SHAPE, convert, shared_openvino


def _infer(artifact: Artifact, feeds: dict[str, Array]) -> Array:
    return OpenvinoSession().open(artifact, small.CONTRACT, "cpu", 1).infer(feeds)["model_output"]


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 16, 16), (4, 64, 24)])
def test_fp32_computes_what_pytorch_computes(shape: tuple[int, int, int]) -> None:
    feeds = small.feeds_at(*shape)
    expected = small.reference(small.small_network(), feeds)
    np.testing.assert_allclose(_infer(shared_openvino(), feeds), expected, atol=2e-6)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_edges_are_float32_named_and_bounded_as_in_the_contract(precision: str) -> None:
    model = openvino.load(shared_openvino(precision).path)
    edges = {port.any_name: port for port in [*model.inputs, *model.outputs]}
    assert [port.any_name for port in model.inputs] == ["sample", "timestep", "context"]
    assert list(edges) == ["sample", "timestep", "context", "model_output"]
    assert all(port.get_names() == {name} for name, port in edges.items())
    assert {str(port.element_type.to_dtype()) for port in edges.values()} == {"float32"}
    bounds = [(d.get_min_length(), d.get_max_length()) for d in edges["sample"].partial_shape]
    assert bounds == [(1, 4), (4, 4), (2, 16), (2, 16)]


def test_a_fixed_shape_is_a_constant_of_the_model() -> None:
    model = openvino.load(shared_openvino("fp32", ONE_SHAPE).path)
    assert {port.any_name: tuple(port.shape) for port in model.inputs} == {
        "sample": (1, 4, 4, 4),
        "timestep": (1,),
        "context": (1, 5, 8),
    }
    feeds = small.feeds_at()
    expected = small.reference(small.small_network(), feeds)
    np.testing.assert_allclose(
        _infer(shared_openvino("fp32", ONE_SHAPE), feeds), expected, atol=2e-6
    )


def test_enumerated_shapes_bound_the_sizes() -> None:
    shapes = [{"batch": 1, "height": 8, "width": 16}, {"batch": 1, "height": 32, "width": 16}]
    policy = ShapePolicy("enumerated", tuple(tuple(sorted(shape.items())) for shape in shapes))
    (sample, *_) = openvino.load(shared_openvino("fp32", policy).path).inputs
    assert str(sample.partial_shape) == "[1,4,2..8,4]"


def test_int64_inputs_stay_int64(tmp_path: Path) -> None:
    import onnx as onnx_package

    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    main (int64[batch, 3] input_ids) => (float[batch, 3, 2] prompt_embeds)
    <float[4, 2] table = {0.0, 0.1, 1.0, 1.1, 2.0, 2.1, 3.0, 3.1}>
    { prompt_embeds = Gather(table, input_ids) }
    """
    onnx.write_model(onnx_package.parser.parse_model(text), tmp_path)
    batch = AxisRef("batch")
    contract = Contract(
        "text_encoder",
        (TensorSpec("input_ids", "int64", (batch, 3)),),
        (TensorSpec("prompt_embeds", "float32", (batch, 3, 2)),),
        (Axis("batch", 1, 1, 4),),
    )
    made = convert(tmp_path, Artifact(ArtifactType("onnx", "fp32"), tmp_path, ""), contract)
    (ids,) = openvino.load(made.path).inputs
    assert str(ids.element_type.to_dtype()) == "int64"
    session = OpenvinoSession().open(made, contract, "cpu", 1)
    found = session.infer({"input_ids": np.array([[3, 0, 2]], dtype="int64")})
    np.testing.assert_allclose(found["prompt_embeds"][0, :, 0], [3, 0, 2])


def test_fp16_halves_the_weights_and_only_them() -> None:
    half, single = shared_openvino("fp16"), shared_openvino()
    sizes = [openvino.weights_file(artifact.path).stat().st_size for artifact in (half, single)]
    assert sizes[0] < 0.65 * sizes[1]
    feeds = small.feeds_at(seed=7)
    exact, found = _infer(single, feeds), _infer(half, feeds)
    assert 0 < np.abs(exact - found).max() < 0.02 * np.abs(exact).max()


def test_weights_beside_the_onnx_file_are_taken(tmp_path: Path) -> None:
    made = convert(tmp_path, small.shared_onnx(external=True))
    assert made.digest == shared_openvino().digest


def test_layers_bear_the_names_of_the_networks_modules() -> None:
    names = openvino.value_names(openvino.load(shared_openvino().path))
    assert "/conv_in/Conv" in names and any(name.startswith("/block/query/") for name in names)


def test_an_impossible_precision_is_refused() -> None:
    with pytest.raises(ProfileError, match="precision"):
        OpenvinoFromOnnx(precision="int4")  # type: ignore[arg-type]


def test_an_fp16_source_is_refused(tmp_path: Path) -> None:
    source = Artifact(ArtifactType("onnx", "fp16"), small.shared_onnx().path, "")
    with pytest.raises(StageError, match="an fp32 ONNX model"):
        convert(tmp_path, source)


def test_a_model_that_lost_an_input_is_refused(tmp_path: Path) -> None:
    """The contract says four inputs, the ONNX model has three."""
    more = (*small.CONTRACT.inputs, TensorSpec("timestep_cond", "float32", (small.BATCH, 8)))
    with pytest.raises(StageError, match="timestep_cond"):
        convert(tmp_path, small.shared_onnx(), dataclasses.replace(small.CONTRACT, inputs=more))


def test_an_operator_that_openvino_lacks_is_named_with_the_component(tmp_path: Path) -> None:
    source = small.copied(small.shared_onnx(), tmp_path)
    model = onnx.read_model(source.path)
    model.opset_import.add(domain="nobody", version=1)
    model.graph.node[-1].domain = "nobody"
    onnx.write_model(model, source.path)
    with pytest.raises(StageError, match=r"unet(.|\n)*nobody"):
        convert(tmp_path, source)


def test_a_shape_that_the_source_does_not_have_is_refused(tmp_path: Path) -> None:
    other = dataclasses.replace(small.CONTRACT.inputs[2], dims=(small.BATCH, 6, 9))
    contract = dataclasses.replace(small.CONTRACT, inputs=(*small.CONTRACT.inputs[:2], other))
    with pytest.raises(StageError, match="context"):
        convert(tmp_path, small.shared_onnx(), contract)


def test_a_folder_with_a_comma_in_its_name_is_converted(tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    source = small.copied(small.shared_onnx(), tmp_path / "a,b")
    made = convert(tmp_path / "a,b", source)
    assert openvino.value_names(openvino.load(made.path))
