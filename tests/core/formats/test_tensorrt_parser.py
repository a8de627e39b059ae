"""What TensorRT's ONNX parser would not take is found without it, and told by node."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffoundry.errors import StageError
from diffoundry.formats import tensorrt_parser
from diffoundry.formats.tensorrt_parser import problems_of, refuse_unsupported, tables_for
from diffoundry.formats.tensorrt_parser_graph import Graph
from diffoundry.formats.tensorrt_parser_tables import TABLES

F32, F64, I64, U8, I8 = (
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
    TensorProto.INT64,
    TensorProto.UINT8,
    TensorProto.INT8,
)
BATCHED: tuple[int | str, ...] = ("batch", 4, 8, 8)


def model_of(
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, Any] | None = None,
    inputs: dict[str, tuple[int, Sequence[int | str]]] | None = None,
    opset: int = 18,
) -> onnx.ModelProto:
    edges = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, (kind, shape) in (inputs or {"x": (F32, BATCHED)}).items()
    ]
    graph = helper.make_graph(
        list(nodes),
        "small",
        edges,
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def problems(model: onnx.ModelProto, version: str = "11.1") -> list[str]:
    (table,) = [table for table in TABLES if table.version == version]
    return problems_of(Graph(model, Path()), table)


def node(
    op: str, inputs: list[str], output: str = "y", name: str = "fault", **attributes: Any
) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], name=name, **attributes)


QUANTIZED: dict[str, Any] = {"scale": np.float32(0.1), "zero": np.int8(0)}
PAIR = [
    node("QuantizeLinear", ["x", "scale", "zero"], "q", "quantize"),
    node("DequantizeLinear", ["q", "scale", "zero"], "y", "dequantize"),
]
SIXTEEN = np.ones(4, np.float32)


def test_ordinary_graphs_are_taken() -> None:
    shape_math = [
        node("Shape", ["x"], "dims", start=0, end=1),
        node("Concat", ["dims", "rest"], "wanted", axis=0),
        node("Reshape", ["x", "wanted"]),
    ]
    assert not problems(model_of(shape_math, {"rest": np.array([-1], np.int64)}))
    assert not problems(model_of(PAIR, QUANTIZED))
    weights = [
        node("DequantizeLinear", ["w", "scales", "zeros"], "kernel", "weights", axis=0),
        node("Conv", ["x", "kernel"]),
    ]
    stored = {"w": np.ones((4, 4, 1, 1), np.int8), "scales": SIXTEEN, "zeros": np.zeros(4, np.int8)}
    assert not problems(model_of(weights, stored))


@pytest.mark.parametrize(
    ("nodes", "weights", "said"),
    [
        ([node("Det", ["x"])], {}, "fault (Det): an operator that it does not take"),
        ([node("Gelu", ["x"], domain="com.microsoft")], {}, "the domain com.microsoft"),
        ([node("Add", ["x64", "x64"])], {}, "fault (Add): float64"),
        ([node("Cast", ["x"], to=F64)], {}, "fault (Cast): float64"),
        ([node("MatMul", ["ints", "ints"])], {}, "fault (MatMul): int64 data"),
        ([node("Mul", ["bytes", "bytes"])], {}, "uint8 data"),
        ([node("BitShift", ["bytes", "bytes"], direction="LEFT")], {}, "does not take"),
        ([node("Resize", ["x", "", "s"], mode="cubic")], {"s": SIXTEEN}, "mode cubic"),
        ([node("Resize", ["x", "", "s"], antialias=1)], {"s": SIXTEEN}, "antialias 1"),
        (
            [node("Resize", ["x", "", "s"], coordinate_transformation_mode="tf_crop_and_resize")],
            {"s": SIXTEEN},
            "coordinate_transformation_mode tf_crop_and_resize",
        ),
        (
            [node("MaxPool", ["x"], kernel_shape=[2, 2], dilations=[2, 2])],
            {},
            "dilations [2, 2]",
        ),
        (
            [helper.make_node("MaxPool", ["x"], ["y", "i"], name="fault", kernel_shape=[2, 2])],
            {},
            "more than its first output",
        ),
        ([node("ReduceMean", ["x", "ints"])], {}, "axes that is no constant"),
        (
            [helper.make_node("TopK", ["x", "k"], ["y", "i"], name="fault", sorted=0)],
            {"k": np.array([1])},
            "sorted 0",
        ),
    ],
)
def test_what_is_not_taken_names_the_node(
    nodes: list[onnx.NodeProto], weights: dict[str, Any], said: str
) -> None:
    inputs = {
        "x": (F32, BATCHED),
        "x64": (F64, [2, 2]),
        "ints": (I64, [2]),
        "bytes": (U8, [2, 2]),
    }
    found = problems(model_of(nodes, weights, inputs))
    assert any(said in problem for problem in found), found
    assert all(problem.startswith("fault (") for problem in found)


@pytest.mark.parametrize(
    ("nodes", "weights", "said"),
    [
        (
            [node("QuantizeLinear", ["x", "scale", "zero"], "y", "q")],
            {"scale": np.float32(0.1), "zero": np.uint8(0)},
            "q (QuantizeLinear): a zero point of uint8, it takes symmetric int8",
        ),
        (
            [node("QuantizeLinear", ["x", "scale"], "y", "q")],
            {"scale": np.float32(0.1)},
            "q (QuantizeLinear): no zero point, which means uint8",
        ),
        (
            [node("QuantizeLinear", ["x", "scale", "zero"], "y", "q")],
            {"scale": np.float32(0.1), "zero": np.int8(3)},
            "q (QuantizeLinear): an asymmetric zero point (3)",
        ),
        (
            [node("QuantizeLinear", ["x", "scales", "zeros"], "y", "q", axis=1)],
            {"scales": SIXTEEN, "zeros": np.zeros(4, np.int8)},
            "q (QuantizeLinear): 4 scales per channel on an activation",
        ),
        (
            [
                node("ReduceMax", ["x"], "scale", "range", keepdims=0),
                node("QuantizeLinear", ["x", "scale", "zero"], "y", "q"),
            ],
            {"zero": np.int8(0)},
            "q (QuantizeLinear): a scale that is no constant",
        ),
        (
            [node("DequantizeLinear", ["bias", "scale"], "y", "dq")],
            {"bias": np.ones(4, np.int32), "scale": np.float32(0.1)},
            "dq (DequantizeLinear): int32 data",
        ),
    ],
)
def test_only_symmetric_per_tensor_pairs_on_activations_are_taken(
    nodes: list[onnx.NodeProto], weights: dict[str, Any], said: str
) -> None:
    found = problems(model_of(nodes, weights))
    assert any(problem.startswith(said) for problem in found), found


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([node("Reshape", ["x", "wanted"])], "the values of 'wanted' decide a shape"),
        (
            [node("Add", ["wanted", "wanted"], "sum", "sum"), node("Expand", ["x", "sum"])],
            "the values of 'wanted' decide a shape",
        ),
        (
            [
                node("Shape", ["x"], "dims", "dims"),
                node("CumSum", ["dims", "axis"], "summed", "summed"),
                node("Reshape", ["x", "summed"]),
            ],
            "a shape computed by summed (CumSum), which would not fold",
        ),
        (
            [
                node("NonZero", ["x"], "found", "found"),
                node("Reshape", ["x", "found"]),
            ],
            "a shape computed by found (NonZero)",
        ),
    ],
)
def test_shapes_come_from_dimensions_and_constants(nodes: list[onnx.NodeProto], said: str) -> None:
    inputs = {"x": (F32, BATCHED), "wanted": (I64, [4])}
    found = problems(model_of(nodes, {"axis": np.int64(0)}, inputs))
    assert any(problem.startswith("fault (") and said in problem for problem in found), found


def test_the_versions_differ_as_their_tables_do() -> None:
    swish = model_of([node("Swish", ["x"])])
    norm = model_of([node("RMSNormalization", ["x", "s"])], {"s": np.ones(8, np.float32)}, None, 23)
    assert problems(swish, "10.8") and problems(norm, "10.8")
    assert not problems(norm, "11.1")
    assert "opset 23: it takes 9 to 20" in problems(norm, "10.8")


def test_group_normalization_of_opset_21_came_with_10_9() -> None:
    scale = {"s": np.ones(4, np.float32)}
    model = model_of([node("GroupNormalization", ["x", "s", "s"], num_groups=2)], scale, None, 21)
    assert any("taken since 10.9" in problem for problem in problems(model, "10.8"))
    assert not problems(model, "11.1")


def test_a_graph_must_fit_every_version_from_the_oldest_on() -> None:
    assert [table.version for table in tables_for("10.8")] == ["10.8", "11.1"]
    assert [table.version for table in tables_for("10.13")] == ["10.8", "11.1"]
    assert [table.version for table in tables_for("11.1")] == ["11.1"]


def test_nodes_of_subgraphs_are_checked(tmp_path: Path) -> None:
    inner = node("Det", ["x"], "d", "inner")
    branch = helper.make_graph([inner], "b", [], [onnx.ValueInfoProto(name="d")])
    both = {"then_branch": branch, "else_branch": branch}
    model = model_of(
        [node("If", ["condition"], **both)], {"condition": np.array(True)}, {"x": (F32, [2, 2])}
    )
    assert "inner (Det): an operator that it does not take" in problems(model)


def test_the_refusal_lists_nodes_and_versions_and_stops_somewhere(tmp_path: Path) -> None:
    nodes = [node("Det", ["x"], f"d{i}", f"det{i}") for i in range(20)] + [node("Sin", ["d0"])]
    onnx.save(model_of(nodes, None, {"x": (F32, [2, 2])}), tmp_path / "model.onnx")
    with pytest.raises(StageError) as caught:
        refuse_unsupported(tmp_path, "10.8", "here")
    assert caught.value.where == "here"
    assert "det0 (Det): an operator that it does not take (TensorRT 10.8, 11.1)" in (
        caught.value.found
    )
    assert caught.value.found.endswith("; and 8 more")
    assert "det11" in caught.value.found and "det12" not in caught.value.found


def test_external_weights_are_read_where_a_value_is_asked_for(tmp_path: Path) -> None:
    model = model_of(PAIR, {"scale": np.float32(0.1), "zero": np.int8(5)})
    onnx.save(
        model, tmp_path / "model.onnx", save_as_external_data=True, location="w", size_threshold=0
    )
    with pytest.raises(StageError, match="asymmetric"):
        refuse_unsupported(tmp_path, "10.8", "here")


def test_every_operator_of_the_tables_is_one_of_onnx() -> None:
    """A slip in transcribing would make an operator that nobody can use."""
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    ours = {name for table in TABLES for name in table.operators}
    # TensorRT lists these of old ONNX versions.
    assert ours - known <= {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}
    assert set(tensorrt_parser._CONSTANT_INPUTS) <= ours
    assert set(tensorrt_parser._SHAPE_INPUTS) <= ours
    assert ours >= tensorrt_parser._SHAPE_MATH
