"""What TensorRT's ONNX parser would refuse, found without TensorRT and told by node.

Operators and types come from the parser's published table (`tensorrt_parser_tables`). The rest
is what the table says in words, and what NVIDIA's documentation says of quantization ("Working
with Quantized Types": symmetric, per-tensor scales on activations) and of shapes ("Dynamic
Shapes: Advanced Topics": shapes are computed from dimensions and constants).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffoundry.errors import StageError
from diffoundry.formats import onnx as onnx_format
from diffoundry.formats.tensorrt_parser_graph import Graph, label
from diffoundry.formats.tensorrt_parser_tables import TABLES, ParserTable

if TYPE_CHECKING:
    from onnx import NodeProto

_LISTED = 12
_REDUCE = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
_CONSTANT_INPUTS: Mapping[str, tuple[int, str]] = {
    **{f"Reduce{kind}": (1, "axes") for kind in _REDUCE},
    "CumSum": (1, "axis"),
    "OneHot": (1, "depth"),
    "Squeeze": (1, "axes"),
    "Unsqueeze": (1, "axes"),
    "Dropout": (2, "training_mode"),
}
_ONE_OUTPUT = ("LayerNormalization", "MaxPool")
_ALLOWED_ATTRIBUTES: Mapping[tuple[str, str], tuple[Any, ...]] = {
    ("Resize", "mode"): ("nearest", "linear"),
    ("Resize", "coordinate_transformation_mode"): (
        "half_pixel",
        "pytorch_half_pixel",
        "tf_half_pixel_for_nn",
        "asymmetric",
        "align_corners",
    ),
    ("Resize", "nearest_mode"): ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"),
    ("Resize", "keep_aspect_ratio_policy"): ("stretch",),
    ("Resize", "antialias"): (0,),
    ("ScatterND", "reduction"): ("none",),
    ("TopK", "sorted"): (1,),
    ("LSTM", "layout"): (0,),
    ("LSTM", "input_forget"): (0,),
}
_SHAPE_INPUTS: Mapping[str, tuple[int, ...]] = {
    "Reshape": (1,),
    "Expand": (1,),
    "Slice": (1, 2, 3, 4),
    "Resize": (2, 3),
    "Upsample": (1,),
    "Tile": (1,),
    "Pad": (1, 3),
    "ConstantOfShape": (0,),
    "Split": (1,),
    "TopK": (1,),
}
"""Inputs whose values decide the shape of a result."""
_DIMENSION_MATH = """
    Abs Add And Cast Ceil Concat ConstantOfShape Div Equal Expand Flatten Floor Gather Greater
    GreaterOrEqual Identity Less LessOrEqual Max Min Mod Mul Neg Not Or Range ReduceMax ReduceMin
    ReduceProd ReduceSum Reshape Round Slice Squeeze Sub Unsqueeze Where"""
_SHAPE_MATH = frozenset(_DIMENSION_MATH.split())
"""Operators that TensorRT can compute on dimensions, before it runs the network."""


def tables_for(at_least: str) -> tuple[ParserTable, ...]:
    """The tables that a graph must fit to be taken by TensorRT `at_least` and all newer."""
    wanted = _number(at_least)
    older = [table for table in TABLES if _number(table.version) <= wanted]
    newer = [table for table in TABLES if _number(table.version) > wanted]
    return (*older[-1:], *newer)


def refuse_unsupported(path: Path, at_least: str, where: str) -> None:
    """Raise StageError that names every node of the `onnx` artifact `path` which is not taken.

    `at_least` is the oldest TensorRT ("10.8") that has to take it.
    """
    graph = Graph(onnx_format.read_model(path), onnx_format.model_file(path).parent)
    found: dict[str, list[str]] = {}
    for table in tables_for(at_least):
        for problem in problems_of(graph, table):
            found.setdefault(problem, []).append(table.version)
    if not found:
        return
    lines = [f"{problem} (TensorRT {', '.join(on)})" for problem, on in found.items()]
    more = f"; and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
    raise StageError(
        where,
        expected="a graph that the ONNX parser of TensorRT takes",
        found="; ".join(lines[:_LISTED]) + more,
        remedy="change these nodes in the model or its export (another opset may do), or leave "
        "this component to another target",
    )


def problems_of(graph: Graph, table: ParserTable) -> list[str]:
    """Everything in `graph` that the parser of `table.version` would refuse, each with its node."""
    problems = []
    if graph.opset not in table.opsets:
        last = table.opsets[-1]
        problems.append(f"opset {graph.opset}: it takes {table.opsets[0]} to {last}")
    for node in graph.nodes:
        problems += [f"{label(node)}: {problem}" for problem in _node_problems(graph, node, table)]
    return problems


def _node_problems(graph: Graph, node: NodeProto, table: ParserTable) -> Iterator[str]:
    types = table.operators.get(node.op_type)
    if node.domain not in ("", "ai.onnx"):
        yield f"an operator of the domain {node.domain}"
        return
    if types is None:
        yield "an operator that it does not take"
        return
    if node.op_type == "GroupNormalization" and graph.opset >= 21 and _older_than(table, "10.9"):
        yield "GroupNormalization of opset 21, taken since 10.9"
    yield from _type_problems(graph, node, types)
    yield from _restriction_problems(graph, node)
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        yield from _quantization_problems(graph, node)
    yield from _shape_problems(graph, node)


def _type_problems(graph: Graph, node: NodeProto, types: frozenset[str]) -> Iterator[str]:
    values = [name for name in (*node.input, *node.output) if name]
    if any(graph.dtype(name) == "float64" for name in values):
        yield "float64, which it would round to float32 without a word"
        return
    for name in graph.data_values(node):
        dtype = graph.dtype(name)
        if dtype is not None and dtype not in types:
            yield f"{dtype} data, it takes {', '.join(sorted(types))}"
            return


def _restriction_problems(graph: Graph, node: NodeProto) -> Iterator[str]:
    index, what = _CONSTANT_INPUTS.get(node.op_type, (0, ""))
    given = node.input[index] if what and len(node.input) > index else ""
    if given and not graph.is_constant(given):
        yield f"{what} that is no constant"
    if node.op_type in _ONE_OUTPUT and any(node.output[1:]):
        yield "more than its first output"
    for attribute in node.attribute:
        value = graph.attribute(node, attribute.name)
        allowed = _ALLOWED_ATTRIBUTES.get((node.op_type, attribute.name))
        if allowed is not None and value not in allowed:
            yield f"{attribute.name} {value}, it takes {' or '.join(str(a) for a in allowed)}"
        if node.op_type.endswith("Pool") and attribute.name == "dilations" and set(value) != {1}:
            yield f"dilations {list(value)}, it takes only ones"


def _quantization_problems(graph: Graph, node: NodeProto) -> Iterator[str]:
    """Q/DQ pairs must be symmetric INT8, with one scale where the data is an activation."""
    inputs = [*node.input, "", ""][:3]
    data, scale, zero = inputs
    if node.op_type == "QuantizeLinear" and not zero and not graph.attribute(node, "output_dtype"):
        yield "no zero point, which means uint8: give it an int8 zero point of 0"
    if zero and str(graph.dtype(zero)).startswith("uint"):
        yield f"a zero point of {graph.dtype(zero)}, it takes symmetric int8"
    elif zero:
        values = graph.constant_value(zero)
        if values is None:
            yield "a zero point that is no constant"
        elif values.any():
            yield f"an asymmetric zero point ({int(values.flat[values.argmax()])}), it takes 0"
    scales = graph.constant_value(scale)
    if scales is None:
        yield "a scale that is no constant"
    elif scales.size > 1 and not graph.is_constant(data):
        yield f"{scales.size} scales per channel on an activation, it takes one"


def _shape_problems(graph: Graph, node: NodeProto) -> Iterator[str]:
    for index in _SHAPE_INPUTS.get(node.op_type, ()):
        if len(node.input) > index and node.input[index]:
            yield from _sources(graph, node.input[index], set())


def _sources(graph: Graph, name: str, seen: set[str]) -> Iterator[str]:
    """Why the value `name` cannot be computed from dimensions and constants alone."""
    if not name or name in seen or graph.is_constant(name):
        return
    seen.add(name)
    maker = graph.maker(name)
    if maker is None:
        yield f"the values of {name!r} decide a shape, it takes only dimensions and constants"
    elif maker.op_type in _SHAPE_MATH:
        for source in maker.input:
            yield from _sources(graph, source, seen)
    elif maker.op_type not in ("Shape", "Size"):
        yield f"a shape computed by {label(maker)}, which would not fold"


def _older_than(table: ParserTable, version: str) -> bool:
    return _number(table.version) < _number(version)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
