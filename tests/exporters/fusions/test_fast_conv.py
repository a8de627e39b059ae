"""Convolutions as products of matrices: which, at which shapes, and in bands."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from diffoundry.exporters.fusions import fast_conv
from diffoundry.exporters.fusions.editing import Graph
from diffoundry.exporters.fusions.sizes import Sizes
from diffoundry.types import Array

TAKEN, GIVEN = 128, 160


def _model(
    enlarged: bool = False,
    bias: bool = True,
    kernel: int = 3,
    readers: int = 1,
    **attributes: object,
) -> ModelProto:
    """One convolution called /layer/Conv, of x or of x with its pixels repeated."""
    random = np.random.default_rng(0)
    group = int(attributes.get("group", 1))  # type: ignore[call-overload]
    weight = random.standard_normal((GIVEN, TAKEN // group, kernel, kernel)) / 34
    tensors = {"layer.weight": weight.astype(np.float32)}
    if bias:
        tensors["layer.bias"] = random.standard_normal(GIVEN).astype(np.float32)
    nodes, source = [], "x"
    if enlarged:
        tensors["scales"] = np.array([1, 1, 2, 2], np.float32)
        source = "/up/Resize"
        nodes.append(helper.make_node(
            "Resize", ["x", "", "scales"], [source], source, mode="nearest",
            nearest_mode="floor", coordinate_transformation_mode="asymmetric",
        ))  # fmt: skip
    attributes = {"pads": [1] * 4, **attributes}
    inputs = [source, *(name for name in tensors if name != "scales")]
    nodes.append(helper.make_node("Conv", inputs, ["y"], "/layer/Conv", **attributes))
    outputs = ["y"]
    for number in range(1, readers):
        nodes.append(helper.make_node("Neg", [source], [f"n{number}"], f"/other/Neg_{number}"))
        outputs.append(f"n{number}")
    edges = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("b", None, "h", "w"))
             for name in ("x", *outputs)]  # fmt: skip
    stored = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "one", edges[:1], edges[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _rewritten(model: ModelProto, side: int, smallest: int = 0) -> tuple[ModelProto, int]:
    usual = {"y": (1, GIVEN, side, side)}
    least = {"y": (1, GIVEN, smallest or side, smallest or side)}
    made = ir.from_proto(model)
    count = fast_conv.apply(Graph(made, Sizes(usual, [least])))
    return ir.to_proto(made), count


def _run(model: ModelProto, x: Array) -> Array:
    return onnxruntime.InferenceSession(model.SerializeToString()).run(["y"], {"x": x})[0]


def _x(*shape: int) -> Array:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("enlarged", [False, True])
@pytest.mark.parametrize("side", [16, 32])
@pytest.mark.parametrize("bias", [False, True])
def test_it_computes_the_convolution_at_any_shape(enlarged: bool, side: int, bias: bool) -> None:
    model = _model(enlarged, bias)
    fast, count = _rewritten(model, side, smallest=5)
    assert count == 1
    assert not {"Resize", "Softmax"} & {node.op_type for node in fast.graph.node}
    for shape in ((1, TAKEN, 16, 16), (2, TAKEN, 5, 11), (1, TAKEN, 1, 2)):
        exact, found = _run(model, _x(*shape)), _run(fast, _x(*shape))
        assert exact.shape == found.shape
        assert np.abs(exact - found).max() < 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("enlarged", [False, True])
def test_large_planes_go_through_in_bands(enlarged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(enlarged)
    whole, _ = _rewritten(model, 64, smallest=12)
    monkeypatch.setattr(fast_conv, "BAND_BYTES", 1_500_000)
    banded, _ = _rewritten(model, 64, smallest=12)
    products = [sum(node.op_type == "MatMul" for node in m.graph.node) for m in (whole, banded)]
    assert products == [1, 3]  # not four: twelve rows are three tiles
    for shape in ((1, TAKEN, 32, 32), (2, TAKEN, 14, 9), (1, TAKEN, 12 // (1 + enlarged), 7)):
        exact, found = _run(whole, _x(*shape)), _run(banded, _x(*shape))
        assert exact.shape == found.shape
        assert np.abs(exact - found).max() < 1e-6 * np.abs(exact).max()


def test_nothing_is_cut_where_tiles_are_whole_at_every_shape() -> None:
    whole, _ = _rewritten(_model(), 32, smallest=8)
    cut, _ = _rewritten(_model(), 32, smallest=6)
    assert "Slice" not in {node.op_type for node in whole.graph.node}
    assert "Slice" in {node.op_type for node in cut.graph.node}


@pytest.mark.parametrize(
    "other",
    [{"kernel": 1, "pads": [0] * 4}, {"strides": [2, 2]}, {"dilations": [2, 2], "pads": [2] * 4},
     {"pads": [0] * 4}, {"group": 2}],
    ids=["1x1", "stride", "dilation", "unpadded", "groups"],
)  # fmt: skip
def test_other_convolutions_are_left_alone(other: dict[str, object]) -> None:
    assert _rewritten(_model(**other), 32)[1] == 0  # type: ignore[arg-type]


def test_small_planes_and_unknown_ones_are_left_alone() -> None:
    assert _rewritten(_model(), 8)[1] == 0
    made = ir.from_proto(_model())
    assert fast_conv.apply(Graph(made, Sizes({}))) == 0


def test_an_enlarged_plane_that_others_read_too_stays() -> None:
    fast, count = _rewritten(_model(enlarged=True, readers=2), 32)
    assert count == 1 and "Resize" in {node.op_type for node in fast.graph.node}
