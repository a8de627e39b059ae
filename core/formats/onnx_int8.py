"""Reads from an ONNX graph which of its layers are in INT8, in whichever form they were written.

An INT8 layer is known by its weight, an int8 constant "<module>.weight"; how it computes, by what
the node that multiplies it reads beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

UNPLANNED = "unplanned"
_WEIGHT = ".weight"
# What moves values that are on a grid, and leaves them there.
_MOVES = ("Transpose", "Pad", "Slice", "Concat", "Reshape", "DequantizeLinear")
_QUANTIZES = ("QuantizeLinear", "DynamicQuantizeLinear")
_INTEGER = ("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "QLinearAdd",
            "QLinearConv", "QLinearMatMul", "DynamicQuantizeMatMul")  # fmt: skip


def integer_layers_of(model: ModelProto) -> dict[str, str]:
    """Module -> "static", "dynamic" or "weight_only"; "unplanned" for what is no layer's."""
    return dict(sorted(_Reader(model.graph).layers().items()))


def layer_nodes(model: ModelProto) -> dict[str, str]:
    """Name of the node that multiplies an INT8 weight -> module."""
    reader = _Reader(model.graph)
    return {
        node.name: module
        for name, module in reader.weights.items()
        for node in reader.products(name)
    }


class _Reader:
    def __init__(self, graph: GraphProto) -> None:
        self._graph = graph
        self._makers = {name: node for node in graph.node for name in node.output}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._tables = {
            tensor.name: tensor
            for tensor in graph.initializer
            if tensor.data_type == 3 and len(tensor.dims) > 1
        }
        self.weights = {
            name: name.removesuffix(_WEIGHT) for name in self._tables if name.endswith(_WEIGHT)
        }

    def layers(self) -> dict[str, str]:
        found = dict.fromkeys(self._tables.keys() - self.weights.keys(), UNPLANNED)
        known: set[str] = set()
        for name, module in self.weights.items():
            schemes = set()
            for node in self.products(name):
                known.add(node.name)
                schemes.add(self._scheme(node, name))
            found[module] = schemes.pop() if len(schemes) == 1 else UNPLANNED
        for node in self._graph.node:
            alone = node.op_type in _INTEGER and node.name not in known
            quantizes = node.op_type in _QUANTIZES
            if alone or (quantizes and not self._serves(node, known)):
                found[node.name] = UNPLANNED
        return found

    def products(self, name: str) -> Iterator[NodeProto]:
        """The nodes that multiply with a weight, or look its rows up."""
        for node in self._readers.get(name, []):
            if node.op_type == "DequantizeLinear":
                yield from self._readers.get(node.output[0], [])
            else:
                yield node

    def _scheme(self, node: NodeProto, weight: str) -> str:
        if node.op_type in ("Gather", "Add"):
            return "weight_only"
        maker = self._quantizer(node.input[0])
        if maker is None:
            return "weight_only"
        return "dynamic" if maker.op_type == "DynamicQuantizeLinear" else "static"

    def _quantizer(self, name: str) -> NodeProto | None:
        """What put a value on its grid, behind nodes that only move it; None for a float value."""
        node = self._makers.get(name)
        while node is not None and node.op_type in _MOVES:
            node = self._makers.get(node.input[0])
        return node if node is not None and node.op_type in _QUANTIZES else None

    def _serves(self, quantizer: NodeProto, layers: set[str]) -> bool:
        """Whether it quantizes what a layer reads or makes."""
        maker = self._makers.get(quantizer.input[0])
        while maker is not None and maker.op_type == "Add" and maker.name not in layers:
            maker = next((self._makers[n] for n in maker.input if n in self._makers), None)
        if maker is not None and maker.name in layers:
            return True
        waiting, seen = list(quantizer.output[:1]), set()
        while waiting:
            name = waiting.pop()
            for node in self._readers.get(name, []):
                if node.name in layers:
                    return True
                if node.op_type in _MOVES and node.name not in seen:
                    seen.add(node.name)
                    waiting += node.output
        return False
