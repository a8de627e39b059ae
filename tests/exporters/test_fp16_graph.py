"""The float16 rewriting: where casts go, which weights are converted, what stays as it is."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from diffoundry.errors import StageError
from diffoundry.exporters import fp16_graph

TEXT = """
<ir_version: 10, opset_import: ["" : 18]>
main (float[2, 4] x) => (float[2, 4] y, float[2, 4] s)
<float[4] w = {1.5, -2.25, 0.1, 3.0}, float[2] scales = {1.0, 1.0}>
{
    a = Mul(x, w)
    s = Softmax(a)
    b = Add(a, w)
    y = Resize(b, , scales)
}
"""


def _model(text: str = TEXT) -> ir.Model:
    import onnx

    model = onnx.parser.parse_model(text)
    for node in model.graph.node:
        node.name = f"/{node.op_type}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def _run(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})


def _types(model: ir.Model) -> dict[str, str]:
    return {node.name or "": str(node.outputs[0].dtype) for node in model.graph}


def test_everything_is_half_and_the_edges_stay_single() -> None:
    model = _model()
    x = np.array([[1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4]], np.float32)
    exact = _run(model, x)
    fp16_graph.to_fp16(model, set())
    assert _types(model)["/Mul"] == _types(model)["/Softmax"] == "FLOAT16"
    assert [str(v.dtype) for v in [*model.graph.inputs, *model.graph.outputs]] == ["FLOAT"] * 3
    assert [v.name for v in model.graph.outputs] == ["y", "s"]
    for found, expected in zip(_run(model, x), exact, strict=True):
        assert 0 < np.abs(found - expected).max() < 0.01


def test_a_node_that_stays_fp32_is_cast_on_both_sides_once() -> None:
    model = _model()
    fp16_graph.to_fp16(model, {"/Mul"})
    types = _types(model)
    assert (types["/Mul"], types["/Softmax"], types["/Add"]) == ("FLOAT", "FLOAT16", "FLOAT16")
    # One cast of Mul's value for its two readers, and one for each output.
    assert Counter(node.op_type for node in model.graph)["Cast"] == 3
    _run(model, np.ones((2, 4), np.float32))


def test_a_weight_read_in_both_precisions_exists_in_both() -> None:
    model = _model()
    fp16_graph.to_fp16(model, {"/Mul"})
    kinds = {name: str(value.dtype) for name, value in model.graph.initializers.items()}
    assert kinds["w"] == "FLOAT" and kinds["w.fp16"] == "FLOAT16"


def test_an_input_whose_definition_has_no_float16_stays_float32() -> None:
    model = _model()
    fp16_graph.to_fp16(model, set())
    assert str(model.graph.initializers["scales"].dtype) == "FLOAT"
    assert _types(model)["/Resize"] == "FLOAT16"


def test_nothing_changes_where_every_node_stays() -> None:
    model = _model()
    fp16_graph.to_fp16(model, {"/Mul", "/Softmax", "/Add", "/Resize"})
    assert not [node for node in model.graph if node.op_type == "Cast"]


def test_control_flow_is_refused() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    main (float[2] x, bool c) => (float[2] y)
    { y = If(c) <then_branch = g1 () => (float[2] t) { t = Neg(x) },
                 else_branch = g2 () => (float[2] e) { e = Abs(x) }> }
    """
    with pytest.raises(StageError, match="control flow"):
        fp16_graph.to_fp16(_model(text), set())
