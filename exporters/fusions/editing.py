"""Edits an onnx-ir graph: nodes under names that the canonicaliser keeps, constants, weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from diffoundry.exporters.fusions.sizes import Sizes
from diffoundry.exporters.onnx_names import FreeNames
from diffoundry.types import Array

if TYPE_CHECKING:
    import onnx_ir as ir

MICROSOFT = "com.microsoft"


def path_of(node: ir.Node) -> str:
    """ "/mid_block/resnets.0/conv1" of the node "/mid_block/resnets.0/conv1/Conv"."""
    return (node.name or "").rpartition("/")[0]


def constant(value: ir.Value | None, largest: int = 64) -> Array | None:
    """The array of an initializer with at most `largest` elements; None for anything else."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return value.const_value.numpy() if value.const_value.size <= largest else None


def integers(node: ir.Node, name: str, default: Sequence[int]) -> list[int]:
    """An attribute that is a list of integers."""
    attribute = node.attributes.get(name)
    return list(attribute.as_ints()) if attribute is not None else list(default)


def maker(value: ir.Value | None, operator: str) -> ir.Node | None:
    """The node that makes `value`, if it is an `operator` of ONNX's own."""
    node = value.producer() if value is not None else None
    return node if node is not None and (node.domain, node.op_type) == ("", operator) else None


def read_once(value: ir.Value) -> bool:
    """Whether one node reads the value, and nothing else does."""
    return len(value.uses()) == 1 and not value.is_graph_output()


class Graph:
    """A model's graph while rules rewrite it. Weights stay where they are until they are saved."""

    def __init__(self, model: ir.Model, sizes: Sizes) -> None:
        self.model, self.graph, self.sizes = model, model.graph, sizes
        self._names = FreeNames(node.name for node in model.graph)

    def nodes(self, operator: str) -> list[ir.Node]:
        """The nodes of an operator of ONNX's own, in execution order."""
        return [n for n in self.graph if (n.domain, n.op_type) == ("", operator)]

    def constant(self, name: str, array: Array) -> ir.Value:
        """A small initializer; one name is one array, wherever it is asked for."""
        import onnx_ir as ir

        known = self.graph.initializers.get(name)
        return known if known is not None else self._initializer(ir.tensor(array, name=name))

    def weight(self, name: str, shape: Sequence[int], make: Callable[[], Array]) -> ir.Value:
        """A float32 initializer that `make` computes each time it is written: never held.

        One name is one weight, wherever it is asked for.
        """
        import onnx_ir as ir

        if name in self.graph.initializers:
            return self.graph.initializers[name]

        tensor = ir.LazyTensor(
            lambda: ir.tensor(make(), name=name), ir.DataType.FLOAT, ir.Shape(list(shape)),
            name=name, cache=False,
        )  # fmt: skip
        return self._initializer(tensor)

    def _initializer(self, tensor: Any) -> ir.Value:
        import onnx_ir as ir

        value = ir.Value(
            name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )  # fmt: skip
        self.graph.initializers[tensor.name] = value
        return value

    def node(
        self,
        before: ir.Node,
        operator: str,
        inputs: Sequence[ir.Value | None],
        *,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """A node in front of `before`, named after its module; its output."""
        import onnx_ir as ir

        node = ir.Node(
            domain, operator, inputs, ir.convenience.convert_attributes(attributes),
            num_outputs=1, name=self._names.take(f"{path_of(before)}/{operator}"),
        )  # fmt: skip
        node.outputs[0].name = node.name
        self.graph.insert_before(before, node)
        if domain:
            self.model.opset_imports.setdefault(domain, 1)
        return node.outputs[0]

    def replace(self, old: ir.Value, new: ir.Value, drop: Iterable[ir.Node] = ()) -> None:
        """Everything that read `old` reads `new`, a graph's output too; the nodes `drop` go."""
        self.sizes.same(new.name, old.name)
        for use in list(old.uses()):
            use.node.replace_input_with(use.idx, new)
        for place, output in enumerate(self.graph.outputs):
            if output is old:
                new.name, old.name = old.name, f"{old.name}.before"
                new.shape, new.type = old.shape, old.type
                self.graph.outputs[place] = new
        for node in drop:
            self.graph.remove(node, safe=True)

    def clean(self) -> None:
        """Remove what nothing reads any more."""
        from onnx_ir.passes.common import RemoveUnusedNodesPass

        RemoveUnusedNodesPass()(self.model)
