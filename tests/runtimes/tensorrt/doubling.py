"""A `tensorrt_build` of y = 2 x, on [batch, 3] and [batch, 3, wide] profiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from diffoundry.formats import onnx as onnx_format, tensorrt_build
from diffoundry.formats.tensorrt_build import BuildSpec, Range
from diffoundry.types import Artifact, ArtifactType, Axis, AxisRef, Contract, TensorSpec

EDGE = (AxisRef("batch"), AxisRef("width"))
CONTRACT = Contract(
    "doubler",
    (TensorSpec("x", "float32", EDGE),),
    (TensorSpec("y", "float32", EDGE),),
    (Axis("batch", 1, 1, 4), Axis("width", 1, 2, 8)),
)
PROFILES = (
    {"x": Range((1, 1), (1, 2), (4, 2))},
    {"x": Range((1, 3), (1, 4), (4, 8))},
)


def doubling_build(folder: Path, **options: Any) -> Artifact:
    """Write one into `folder`; `options` are fields of its BuildSpec."""
    inner = folder / tensorrt_build.ONNX_FOLDER
    inner.mkdir(parents=True)
    edges = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", "width"]) for n in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"], name="twice")], "doubler", edges[:1], edges[1:]
    )
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), inner / "model.onnx")
    onnx_format.canonicalise(inner)
    given = {"precision": "fp32", "profiles": PROFILES, "onnx_digest": onnx_format.digest(inner)}
    tensorrt_build.write_spec(BuildSpec(**{**given, **options}), folder)
    return Artifact(
        ArtifactType("tensorrt_build", "fp32"), folder, tensorrt_build.digest(folder), "doubler"
    )
