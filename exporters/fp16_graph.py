"""Rewrites a float32 ONNX graph to float16, its inputs and outputs left float32.

sample ──── Conv ── Softmax ── model_output          (all float32)
sample ─Cast16─ Conv16 ─Cast32─ Softmax ── model_output    (Softmax stays float32)
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from diffoundry.errors import StageError

if TYPE_CHECKING:
    import onnx_ir as ir


# These read a shape and no values: any type will do, so nothing is cast for them.
_TYPELESS = ("Shape", "Size")


def float_inputs(node: ir.Node) -> list[tuple[int, ir.Value]]:
    """Positions and values of the inputs that become float16 when the node does."""
    import onnx_ir as ir

    return [
        (position, value)
        for position, value in enumerate(node.inputs)
        if value is not None
        and node.op_type not in _TYPELESS
        and value.dtype == ir.DataType.FLOAT
        and "tensor(float16)" in _types(node, position, output=False)
    ]


def float_outputs(node: ir.Node) -> list[ir.Value]:
    """The outputs that become float16 when the node does."""
    import onnx_ir as ir

    return [
        value
        for position, value in enumerate(node.outputs)
        if value.dtype == ir.DataType.FLOAT
        and "tensor(float16)" in _types(node, position, output=True)
    ]


def touches_float(node: ir.Node) -> bool:
    """Does the node read or compute float32 at all?"""
    import onnx_ir as ir

    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    floats = [value for value in values if value.dtype == ir.DataType.FLOAT]
    return node.op_type not in _TYPELESS and bool(floats)


def can_be_fp16(node: ir.Node) -> bool:
    """Does the operator's definition allow float16 for every float output and some float edge?"""
    import onnx_ir as ir

    floats = [value for value in node.outputs if value.dtype == ir.DataType.FLOAT]
    if len(float_outputs(node)) < len(floats) or "dtype" in node.attributes:
        return False
    # A ConstantOfShape's type stands in an attribute that we leave alone.
    return node.op_type != "ConstantOfShape" and bool(float_inputs(node) or floats)


def check_convertible(model: ir.Model) -> None:
    """Raise StageError for what this rewriting does not handle: control flow, functions, and
    values whose type is not known."""
    import onnx_ir as ir

    for node in model.graph:
        kinds = {attribute.type for attribute in node.attributes.values()}
        if kinds & {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}:
            raise StageError(f"fp16: node {node.name} ({node.op_type})",
                             expected="a graph without control flow", found="a subgraph",
                             remedy="export this component in fp32")  # fmt: skip
        if any(value.dtype is None for value in node.outputs):
            raise StageError(f"fp16: node {node.name} ({node.op_type})",
                             expected="values of known type", found="an unknown type",
                             remedy="export this component in fp32")  # fmt: skip


def to_fp16(model: ir.Model, stays_fp32: set[str]) -> None:
    """Rewrite `model` in place: every node that can be float16 is, but those named."""
    check_convertible(model)
    _Rewriter(model, stays_fp32).run()


class _Rewriter:
    """One pass over the graph; weights and casts are shared between their readers."""

    def __init__(self, model: ir.Model, stays_fp32: set[str]) -> None:
        self._graph = model.graph
        self._half = {
            node for node in model.graph if node.name not in stays_fp32 and can_be_fp16(node)
        }
        self._half_values: set[ir.Value] = set()
        self._made: dict[tuple[ir.Value, bool], ir.Value] = {}

    def run(self) -> None:
        import onnx_ir as ir

        nodes = list(self._graph)
        wishes = {node: self._wishes(node) for node in nodes}
        both = self._weights_read_as_both(wishes)
        for node in nodes:
            for position, (value, half) in wishes[node].items():
                node.replace_input_with(position, self._as_type(value, half, both))
            if node in self._half:
                self._half_values.update(float_outputs(node))
                if node.op_type == "Cast" and float_outputs(node):
                    node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT16))
        for value in self._half_values:
            value.dtype = ir.DataType.FLOAT16
        for position, value in enumerate(list(self._graph.outputs)):
            if value in self._half_values:
                self._cast_output(position, value)

    def _wishes(self, node: ir.Node) -> dict[int, tuple[ir.Value, bool]]:
        """Position -> (value, wanted as float16), for every float32 input."""
        import onnx_ir as ir

        half = {position for position, _ in float_inputs(node)} if node in self._half else set()
        return {
            position: (value, position in half)
            for position, value in enumerate(node.inputs)
            if value is not None
            and value.dtype == ir.DataType.FLOAT
            and node.op_type not in _TYPELESS
        }

    def _weights_read_as_both(self, wishes: dict[Any, Any]) -> set[ir.Value]:
        read = {pair for wish in wishes.values() for pair in wish.values()}
        return {value for value, half in read if half and (value, False) in read}

    def _as_type(self, value: ir.Value, half: bool, both: set[ir.Value]) -> ir.Value:
        if value.is_initializer():
            return self._weight(value, both) if half else value
        if half == (value in self._half_values):
            return value
        if (value, half) not in self._made:
            self._made[value, half] = self._cast(value, half)
        return self._made[value, half]

    def _weight(self, value: ir.Value, both: set[ir.Value]) -> ir.Value:
        import onnx_ir as ir

        if (value, True) in self._made:
            return self._made[value, True]
        tensor, name = value.const_value, value.name or ""
        assert tensor is not None  # an initializer has a value
        halved = ir.LazyTensor(
            lambda: ir.tensor(tensor.numpy().astype("float16")),
            dtype=ir.DataType.FLOAT16, shape=tensor.shape, name=name,
        )  # fmt: skip
        if value in both:
            made = ir.Value(
                name=f"{name}.fp16",
                shape=value.shape,
                type=ir.TensorType(ir.DataType.FLOAT16),
                const_value=halved,
            )
            self._graph.initializers[f"{name}.fp16"] = made
        else:
            value.const_value, value.dtype, made = halved, ir.DataType.FLOAT16, value
        self._made[value, True] = made
        return made

    def _cast(self, value: ir.Value, half: bool) -> ir.Value:
        producer = value.producer()
        origin = producer.name if producer is not None else f"/{value.name}"
        if producer is not None and value.index():
            origin = f"{origin}.out{value.index()}"
        node = _cast_node(value, half, f"{origin}/{'to_fp16' if half else 'to_fp32'}")
        if producer is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(producer, node)
        return node.outputs[0]

    def _cast_output(self, position: int, value: ir.Value) -> None:
        """Give the contract's output name to a float32 cast of the float16 value."""
        name, producer = value.name, value.producer()
        assert producer is not None  # only a node's output is in _half_values
        node = _cast_node(value, False, f"/{name}/to_fp32")
        value.name = f"{producer.name}.fp16"
        node.outputs[0].name = name
        node.outputs[0].shape = value.shape
        self._graph.append(node)
        self._graph.outputs[position] = node.outputs[0]


def _cast_node(value: ir.Value, half: bool, name: str) -> ir.Node:
    import onnx_ir as ir

    target = ir.DataType.FLOAT16 if half else ir.DataType.FLOAT
    output = ir.Value(name=name, shape=value.shape, type=ir.TensorType(target))
    attribute = ir.AttrInt64("to", int(target))
    return ir.Node("", "Cast", [value], [attribute], outputs=[output], name=name)


def _types(node: ir.Node, position: int, output: bool) -> frozenset[str]:
    version = node.version or (node.graph.opset_imports.get(node.domain, 0) if node.graph else 0)
    return _schema_types(node.domain, node.op_type, version or 0, position, output)


@lru_cache(maxsize=4096)
def _schema_types(
    domain: str, op_type: str, version: int, position: int, output: bool
) -> frozenset[str]:
    """The types that the operator's definition allows there (none for an unknown operator)."""
    import onnx

    try:
        schema = onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return frozenset()
    formal = schema.outputs if output else schema.inputs
    return frozenset(formal[min(position, len(formal) - 1)].types)
