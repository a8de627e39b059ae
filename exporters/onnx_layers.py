"""Finds the layers of a quantization plan in an ONNX graph, and writes nodes and weights there.

A layer's node is named after its module ("/down_blocks.0/resnets.0/conv1/Conv", see
`formats.onnx_canonical`), so a plan's qualified names find it without any metadata.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from diffoundry.errors import StageError
from diffoundry.exporters.onnx_names import FreeNames
from diffoundry.formats.quant_plan import LayerPlan, QuantPlan, integer_weight, refuse_missing
from diffoundry.types import Array

if TYPE_CHECKING:
    import onnx_ir as ir

_OPERATORS = {"conv": ("Conv",), "linear": ("MatMul", "Gemm"), "embedding": ("Gather",)}


@dataclass(frozen=True, eq=False)
class Layer:
    """One node that computes a planned layer. `weight` is input `place` of `node`, a constant.

    `axis` is the weight's axis of output channels as it lies in the graph: 0, or 1 where the
    weight of a linear layer is stored [in, out]. `add` is the node that adds a bias to a MatMul.
    A table of positions that the exporter looked up in advance is an Add of a constant
    [1, positions, width]: its axis is 1.
    """

    entry: LayerPlan
    node: ir.Node
    place: int
    axis: int
    add: ir.Node | None = None

    @property
    def weight(self) -> Array:
        """float32, as it lies in the graph."""
        array = constant(self.node.inputs[self.place])
        assert array is not None
        return array

    def integers(self, plan: QuantPlan) -> tuple[Array, Array]:
        """int8 weight as it lies in the graph, and its scale [out]."""
        import numpy as np

        scale = plan.weight_scale(self.entry.module).astype(np.float32).reshape(-1)
        weight = np.moveaxis(self.weight, self.axis, 0)
        scale = scale[: weight.shape[0]]  # positions that no input reaches were left out
        stored = np.moveaxis(integer_weight(weight, scale), 0, self.axis)
        # One layer's float32 weight is in memory at a time, where they lie in a file of their own.
        del weight
        _let_go(self.node.inputs[self.place])
        return stored, scale

    def bias(self, plan: QuantPlan) -> Array | None:
        """float32 [out]: the plan's corrected bias, else the graph's, else None."""
        corrected = plan.bias(self.entry.module)
        if corrected is not None:
            return corrected.reshape(-1)
        if self.add is not None:
            return next(a for a in map(constant, self.add.inputs) if a is not None).reshape(-1)
        inputs = self.node.inputs
        if self.node.op_type in ("Conv", "Gemm") and len(inputs) > 2 and inputs[2] is not None:
            return constant(inputs[2])
        return None

    @property
    def last(self) -> ir.Node:
        """The node whose output is the layer's."""
        return self.add or self.node

    @cached_property
    def path(self) -> str:
        """ "/down_blocks.0/resnets.0/conv1": what names of nodes here begin with."""
        return (self.node.name or "").rpartition("/")[0]


def find_layers(model: ir.Model, plan: QuantPlan) -> list[Layer]:
    """Every node of every layer that has an integer weight, in execution order.

    Raises ArtifactError that names all layers which are not there, StageError where a weight
    does not fit its scales or is no constant.
    """
    planned = _graph_names(model, plan)
    found = [
        _layer(planned[module], node)
        for node in model.graph
        if (module := module_of(node.name or "")) in planned
        and node.op_type in _OPERATORS[planned[module].kind]
    ]
    names = {layer.entry.module for layer in found}
    for name, entry in planned.items():
        if entry.kind == "embedding" and entry.module not in names:
            found += _looked_up(model, name, entry, plan)
    names = {layer.entry.module for layer in found}
    wanted = tuple(entry for entry in plan.layers if entry.integer_weight)
    refuse_missing(dataclasses.replace(plan, layers=wanted), names, "quantize_onnx")
    order = {node: place for place, node in enumerate(model.graph)}
    for layer in found:
        _check(layer, plan)
    return sorted(found, key=lambda layer: order[layer.node])


def module_of(node_name: str) -> str:
    """The module in a node's name: "/a.0/b/Conv_1" -> "a.0.b"."""
    return node_name.strip("/").rpartition("/")[0].replace("/", ".")


def _graph_names(model: ir.Model, plan: QuantPlan) -> dict[str, LayerPlan]:
    """Layers with integer weights by the name that the graph has for them.

    Names of nodes leave out a module that holds all others ("network.").
    """
    present = {module_of(node.name or "") for node in model.graph}
    wanted = {entry.module: entry for entry in plan.layers if entry.integer_weight}
    if present & wanted.keys():
        return wanted
    return {name.partition(".")[2]: entry for name, entry in wanted.items()}


def _layer(entry: LayerPlan, node: ir.Node) -> Layer:
    if entry.kind == "conv":
        return Layer(entry, node, 1, 0)
    if entry.kind == "embedding":
        return Layer(entry, node, 0, 0)
    if node.op_type == "Gemm":
        return Layer(entry, node, 1, 0 if _integer(node, "transB") else 1)
    users = [use.node for use in node.outputs[0].uses()]
    adds = [
        user
        for user in users
        if user.op_type == "Add"
        and module_of(user.name or "") == module_of(node.name or "")
        and any(a is not None and a.ndim == 1 for a in map(constant, user.inputs))
    ]
    return Layer(entry, node, 1, 1, adds[0] if len(users) == len(adds) == 1 else None)


def _looked_up(model: ir.Model, name: str, entry: LayerPlan, plan: QuantPlan) -> list[Layer]:
    """The Add of a table whose rows the exporter looked up in advance (positions 0, 1, 2, …)."""
    parent, rows = name.rpartition(".")[0], plan.weight_scale(entry.module).size
    for node in model.graph:
        if node.op_type == "Add" and module_of(node.name or "") == parent:
            for place, value in enumerate(node.inputs):
                table = constant(value)
                if table is not None and table.ndim == 3 and table.shape[0] == 1 < rows:
                    return [Layer(entry, node, place, 1)] if table.shape[1] <= rows else []
    return []


def _check(layer: Layer, plan: QuantPlan) -> None:
    array = constant(layer.node.inputs[layer.place])
    rows = plan.weight_scale(layer.entry.module).size
    shape = "no constant" if array is None else f"{list(array.shape)}, axis {layer.axis}"
    fits = array is not None and (array.shape[layer.axis] == rows or layer.node.op_type == "Add")
    usual = layer.node.op_type != "Gemm" or all(
        _float(layer.node, name) == 1 for name in ("alpha", "beta")
    )
    if not fits or not usual or _integer(layer.node, "transA"):
        raise StageError(
            f"quantize_onnx: {layer.entry.module} ({layer.node.name})",
            expected=f"a constant weight with {rows} output channels, as the plan has scales",
            found=shape if usual else "a product that is scaled",
            remedy="the plan belongs to another model: make it anew from this one",
        )


def _integer(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return int(attribute.as_int()) if attribute is not None else 0


def _float(node: ir.Node, name: str) -> float:
    attribute = node.attributes.get(name)
    return float(attribute.as_float()) if attribute is not None else 1.0


def constant(value: ir.Value | None) -> Array | None:
    """The array of an initializer, also behind a Transpose; None for anything else."""
    import numpy as np

    if value is None:
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Transpose":
        array = constant(producer.inputs[0])
        order = producer.attributes.get("perm")
        return None if array is None else np.transpose(array, order and list(order.as_ints()))
    if value.is_initializer() and value.const_value is not None:
        return value.const_value.numpy()
    return None


def _let_go(value: ir.Value | None) -> None:
    """Unmap the file that an initializer's array was read from; the next reader maps it again."""
    import onnx_ir as ir

    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "Transpose":
        value = producer.inputs[0]
    if value is not None and isinstance(value.const_value, ir.ExternalTensor):
        value.const_value.release()


class Writer:
    """Puts nodes and constants into a graph under names that the canonicaliser keeps."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._names = FreeNames(node.name for node in model.graph)
        self._constants: dict[str, ir.Value] = {}

    def constant(self, name: str, array: Array) -> ir.Value:
        """An initializer; the same name gives the same one again."""
        import numpy as np
        import onnx_ir as ir

        if name not in self._constants:
            tensor = ir.tensor(np.ascontiguousarray(array), name=name)
            value = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )  # fmt: skip
            old = self._graph.initializers.pop(name, None)
            if old is not None:  # other nodes may still read it
                old.name = f"{name}.float"
                self._graph.initializers[old.name] = old
            self._graph.initializers[name] = value
            self._constants[name] = value
        return self._constants[name]

    def node(
        self,
        layer: Layer,
        operator: str,
        inputs: Sequence[ir.Value | None],
        *,
        domain: str = "",
        after: ir.Node | None = None,
        outputs: int = 1,
        **attributes: Any,
    ) -> list[ir.Value]:
        """A node before the layer's (or after the node `after`); its outputs."""
        import onnx_ir as ir

        made = ir.Node(
            domain, operator, inputs, ir.convenience.convert_attributes(attributes),
            num_outputs=outputs, name=self._names.take(f"{layer.path}/{operator}"),
        )  # fmt: skip
        for place, value in enumerate(made.outputs):
            value.name = f"{made.name}.out{place}" if place else made.name
        if after is None:
            self._graph.insert_before(layer.node, made)
        else:
            self._graph.insert_after(after, made)
        return list(made.outputs)

    def replace(self, old: ir.Node, new: ir.Value, drop: Iterable[ir.Node]) -> None:
        """Everything that read `old` reads `new`; the nodes `drop` go, last first."""
        self.redirect(old, new)
        for node in drop:
            self._graph.remove(node, safe=True)

    def redirect(self, old: ir.Node, new: ir.Value, but: ir.Node | None = None) -> None:
        """Every reader of `old` reads `new`, except the node `but`; so does a graph output."""
        value = old.outputs[0]
        for use in list(value.uses()):
            if use.node is not but:
                use.node.replace_input_with(use.idx, new)
        for place, output in enumerate(self._graph.outputs):
            if output is value:
                name, value.name = value.name, f"{old.name}.float"
                new.name, new.shape, new.type = name, value.shape, value.type
                self._graph.outputs[place] = new
