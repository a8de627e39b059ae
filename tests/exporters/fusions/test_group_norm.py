"""Group norms over very large groups: as exact as sums of rows are."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from diffoundry.exporters.fusions import group_norm
from diffoundry.exporters.fusions.editing import Graph
from diffoundry.exporters.fusions.sizes import Sizes

CHANNELS, GROUPS = 4, 2
SHAPES = ((1, CHANNELS, 512, 512), (2, CHANNELS, 40, 24))


def _model() -> ModelProto:
    """A group norm as torch exports it."""
    random = np.random.default_rng(0)
    tensors = {
        "groups": np.array([0, GROUPS, -1], np.int64),
        "ones": np.ones(GROUPS, np.float32),
        "zeros": np.zeros(GROUPS, np.float32),
        "scale": random.standard_normal((CHANNELS, 1, 1)).astype(np.float32),
        "shift": random.standard_normal((CHANNELS, 1, 1)).astype(np.float32),
    }
    made = helper.make_node
    nodes = [
        made("Reshape", ["x", "groups"], ["r"], "/norm/Reshape"),
        made("InstanceNormalization", ["r", "ones", "zeros"], ["i"], "/norm/Instance"),
        made("Shape", ["x"], ["s"], "/norm/Shape"),
        made("Reshape", ["i", "s"], ["back"], "/norm/Reshape_1"),
        made("Mul", ["back", "scale"], ["m"], "/norm/Mul"),
        made("Add", ["m", "shift"], ["y"], "/norm/Add"),
    ]
    edges = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("b", CHANNELS, "h", "w"))
             for name in ("x", "y")]  # fmt: skip
    stored = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "one", edges[:1], edges[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _rewritten(usual: tuple[int, ...]) -> tuple[ModelProto, int]:
    model = ir.from_proto(_model())
    count = group_norm.apply(Graph(model, Sizes({"x": usual})))
    return ir.to_proto(model), count


def _exact(x: np.ndarray) -> np.ndarray:
    tensors = {t.name: numpy_helper.to_array(t) for t in _model().graph.initializer}
    groups = x.astype(np.float64).reshape(x.shape[0], GROUPS, -1)
    normed = (groups - groups.mean(2, keepdims=True)) / np.sqrt(groups.var(2, keepdims=True) + 1e-5)
    return normed.reshape(x.shape) * tensors["scale"] + tensors["shift"]


def _run(model: ModelProto, x: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_are_exact_at_every_shape(shape: tuple[int, ...]) -> None:
    model, count = _rewritten(SHAPES[0])
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32) * 3 + 1
    error = np.abs(_run(model, x) - _exact(x)).max()
    assert count == 1 and "InstanceNormalization" not in str(model)
    assert error < 4e-6
    if shape == SHAPES[0]:
        assert error < np.abs(_run(_model(), x) - _exact(x)).max() / 2


def test_small_groups_are_left_alone() -> None:
    model, count = _rewritten(SHAPES[1])
    assert count == 0 and "InstanceNormalization" in str(model)
