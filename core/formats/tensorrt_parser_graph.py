"""An ONNX graph as TensorRT's parser meets it: types of values, and what is constant."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffoundry.types import Array

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

_RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike")
_NOT_FOLDED = (*_RANDOM, "If", "Loop")
_DATA_INPUTS = {"QuantizeLinear": 0, "DequantizeLinear": 0, "Where": 1, "OneHot": 2}


def label(node: NodeProto) -> str:
    """What a node is called in a message: its name and operator."""
    return f"{node.name or next(iter(node.output), '?')} ({node.op_type})"


class Graph:
    """A model's nodes, those of its subgraphs included, after ONNX's own type inference.

    `folder` holds the external weights, which are read only where a value is asked for.
    """

    def __init__(self, model: ModelProto, folder: Path) -> None:
        import onnx

        self.opset = max(
            (o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0
        )
        self._folder = folder
        self._types: dict[str, str] = {}
        self._weights: dict[str, Any] = {}
        self._makers: dict[str, NodeProto] = {}
        self._constant: dict[str, bool] = {}
        self.nodes = list(self._walk(onnx.shape_inference.infer_shapes(model).graph))

    def dtype(self, name: str) -> str | None:
        """The element type of a value ("float16", "int64"), or None where inference ends."""
        return self._types.get(name)

    def maker(self, name: str) -> NodeProto | None:
        """The node that computes a value; None for inputs and weights."""
        return self._makers.get(name)

    def attribute(self, node: NodeProto, name: str) -> Any:
        """An attribute's value (text decoded), or None."""
        import onnx

        for attribute in node.attribute:
            if attribute.name == name:
                value = onnx.helper.get_attribute_value(attribute)
                return value.decode() if isinstance(value, bytes) else value
        return None

    def is_constant(self, name: str) -> bool:
        """Whether a value can be computed when the engine is built: from weights alone."""
        waiting = [name]
        while waiting:  # no recursion: graphs are thousands of nodes deep
            value = waiting[-1]
            made = self._makers.get(value)
            if value in self._constant:
                waiting.pop()
            elif made is None or not self._folds(made):
                self._constant[value] = made is None and value in self._weights
            elif unknown := [i for i in made.input if i and i not in self._constant]:
                waiting += unknown
            else:
                self._constant[value] = all(self._constant[i] for i in made.input if i)
        return self._constant[name]

    def constant_value(self, name: str) -> Array | None:
        """The array of a weight or a Constant node; None for anything else."""
        import onnx

        tensor = self._weights.get(name)
        made = self._makers.get(name)
        if made is not None and made.op_type == "Constant":
            tensor = self.attribute(made, "value")
        if not isinstance(tensor, onnx.TensorProto):
            return None
        return onnx.numpy_helper.to_array(tensor, str(self._folder))

    def data_values(self, node: NodeProto) -> list[str]:
        """The values whose type the parser's table speaks of: the data, not indices or axes.

        The inputs that share the type parameter of the result, else of the first input.
        """
        import onnx

        if node.op_type in _DATA_INPUTS:
            return list(node.input[_DATA_INPUTS[node.op_type] :][:1])
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opset, "")
        except onnx.defs.SchemaError:
            return [name for name in node.input[:1] if name]
        parameters = [entry.type_str for entry in schema.inputs]
        given = {out.type_str for out in schema.outputs[:1]} & set(parameters)
        wanted = given.pop() if given else (parameters or [""])[0]
        last = parameters[-1:] * max(0, len(node.input) - len(parameters))  # variadic inputs
        found = [
            name
            for name, parameter in zip(node.input, [*parameters, *last], strict=False)
            if name and parameter == wanted
        ]
        made = () if node.input and node.op_type not in ("Cast", "ConstantOfShape") else node.output
        return [*found, *made]

    def _folds(self, node: NodeProto) -> bool:
        return node.op_type not in _NOT_FOLDED and bool(node.input or node.op_type == "Constant")

    def _walk(self, graph: GraphProto) -> Iterator[NodeProto]:
        import onnx

        def name_of(elem_type: int) -> str:
            return _short(onnx.TensorProto.DataType.Name(elem_type).lower())

        for value in (*graph.input, *graph.value_info, *graph.output):
            if value.type.HasField("tensor_type") and value.type.tensor_type.elem_type:
                self._types[value.name] = name_of(value.type.tensor_type.elem_type)
        for tensor in graph.initializer:
            self._types[tensor.name] = name_of(tensor.data_type)
            self._weights[tensor.name] = tensor
        for node in graph.node:
            for output in node.output:
                self._makers[output] = node
            yield node
            for attribute in node.attribute:
                for subgraph in [attribute.g, *attribute.graphs]:
                    yield from self._walk(subgraph)


def _short(name: str) -> str:
    """ONNX's type name in numpy's spelling; the kinds of float8 and float4 are one each."""
    if name.startswith(("float8", "float4")):
        return name[:6]
    return {"float": "float32", "double": "float64"}.get(name, name)
