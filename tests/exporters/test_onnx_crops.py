"""Convolutions whose result is cropped: less padding, the same values; what must stay stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffoundry.exporters.onnx_crops import crop_convolutions
from diffoundry.types import Array

END = 2**63 - 1
Crop = tuple[int, int, int, int]
"""start, end, axis, step"""


def model_of(*crops: Crop, read_twice: bool = False, **attributes: Any) -> ir.Model:
    """x [1, 2, h, w] -> Conv 2 x 2 -> one Slice for each of `crops` -> y."""
    weight = np.random.default_rng(0).standard_normal((3, 2, 2, 2)).astype(np.float32)
    nodes = [helper.make_node("Conv", ["x", "w"], ["c0"], **{"pads": [1] * 4, **attributes})]
    constants = [numpy_helper.from_array(weight, "w")]
    for number, crop in enumerate(crops):
        names = [f"{what}{number}" for what in ("start", "end", "axis", "step")]
        constants += [
            numpy_helper.from_array(np.array([value]), name)
            for name, value in zip(names, crop, strict=True)
        ]
        nodes.append(helper.make_node("Slice", [f"c{number}", *names], [f"c{number + 1}"]))
    last = f"c{len(crops)}"
    other = "c0" if read_twice else last
    nodes.append(helper.make_node("ReduceMax", [other], ["most"], keepdims=0))
    nodes.append(helper.make_node("Mul", [last, "most"], ["y"]))
    edge = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "cropped",
        [edge("x", TensorProto.FLOAT, [1, 2, "h", "w"])],
        [edge("y", TensorProto.FLOAT, [1, 3, "p", "q"])],
        constants,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return ir.from_proto(proto)


def infer(model: ir.Model) -> Array:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    x = np.random.default_rng(1).standard_normal((1, 2, 5, 6)).astype(np.float32)
    found: Array = session.run(None, {"x": x})[0]
    return found


@pytest.mark.parametrize(
    ("crops", "pads"),
    [
        (((0, -1, 2, 1), (0, -1, 3, 1)), [1, 1, 0, 0]),
        (((0, -1, 2, 1), (1, END, 3, 1)), [1, 0, 0, 1]),
        (((1, -1, -1, 1),), [1, 0, 1, 0]),
        (((1, END, 2, 1), (1, END, 3, 1)), [0, 0, 1, 1]),
    ],
)
def test_a_crop_becomes_less_padding(crops: tuple[Crop, ...], pads: list[int]) -> None:
    model = model_of(*crops)
    wanted = infer(model)
    assert crop_convolutions(model) == len(crops)
    kinds = [node.op_type for node in model.graph]
    assert "Slice" not in kinds
    assert list(model.graph[0].attributes["pads"].as_ints()) == pads
    np.testing.assert_array_equal(infer(model), wanted)


@pytest.mark.parametrize(
    "model",
    [
        model_of((2, END, 2, 1)),
        model_of((0, -2, 2, 1)),
        model_of((0, 3, 2, 1)),
        model_of((-3, END, 2, 1)),
        model_of((0, END, 2, 2)),
        model_of((1, END, 1, 1)),
        model_of((0, -1, 2, 1), strides=[2, 1]),
        model_of((0, -1, 2, 1), read_twice=True),
    ],
    ids=[
        "more-than-padded",
        "far-end",
        "a-number",
        "from-the-end",
        "steps",
        "channels",
        "strides",
        "read-twice",
    ],
)
def test_what_is_no_such_crop_stays(model: ir.Model) -> None:
    wanted = infer(model)
    assert crop_convolutions(model) == 0
    np.testing.assert_array_equal(infer(model), wanted)
