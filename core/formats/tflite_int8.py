"""Which layers of a TFLite file are INT8, read from its operations alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRODUCTS = ("CONV_2D", "FULLY_CONNECTED", "DEPTHWISE_CONV_2D")
LOOKUPS = ("EMBEDDING_LOOKUP",)
WEIGHT = ".weight"
"""What the name of a layer's INT8 weight ends with, after its qualified name."""
UNPLANNED = "unplanned"
_INT8 = 9


class Reading:
    """The INT8 layers of one graph of a file (objects of the schema)."""

    def __init__(self, model: Any, graph: Any) -> None:
        self._model, self._graph = model, graph
        self._operators = [graph.Operators(i) for i in range(graph.OperatorsLength())]
        self._readers: dict[int, list[Any]] = {}
        for operator in self._operators:
            for index in _indices(operator.InputsAsNumpy()):
                self._readers.setdefault(index, []).append(operator)

    def schemes(self) -> dict[str, str]:
        """Qualified name -> "static", "dynamic" or "weight_only".

        Whatever else is in INT8 comes under its tensor's name as "unplanned".
        """
        found: dict[str, str] = {}
        layers = []
        for index, name in self.weights().items():
            readers = self._readers.get(index, [])
            schemes = {self._scheme(operator, index) for operator in readers}
            found[name] = schemes.pop() if len(schemes) == 1 else UNPLANNED
            layers += readers
        allowed = self._around(layers)
        for operator in self._operators:
            for index in _indices(operator.OutputsAsNumpy()):
                if self._type(index) == _INT8 and index not in allowed:
                    found[self._name(index)] = UNPLANNED
        return found

    def weights(self) -> dict[int, str]:
        """Tensor -> the layer, of every INT8 constant."""
        found = {}
        for index in range(self._graph.TensorsLength()):
            if self._type(index) == _INT8 and self._constant(index):
                found[index] = self._name(index).removesuffix(WEIGHT)
        return found

    def _scheme(self, operator: Any, weight: int) -> str:
        kind = self.kind(operator)
        if kind in LOOKUPS or kind == "DEQUANTIZE":
            return "weight_only"
        first, second = _indices(operator.InputsAsNumpy())[:2]
        if kind not in PRODUCTS or second != weight:
            return UNPLANNED
        return "static" if self._type(first) == _INT8 else "dynamic"

    def _around(self, layers: list[Any]) -> set[int]:
        """Integer values that belong to layers: what they read first, and what they write."""
        around: set[int] = set()
        for operator in layers:
            around.update(_indices(operator.OutputsAsNumpy()))
            first = _indices(operator.InputsAsNumpy())[0]
            if all(reader in layers for reader in self._readers[first]):
                around.add(first)
        return around

    def kind(self, operator: Any) -> str:
        """ "CONV_2D"."""
        code = self._model.OperatorCodes(operator.OpcodeIndex())
        return _kinds()[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]

    def _type(self, index: int) -> int:
        return int(self._graph.Tensors(index).Type())

    def _name(self, index: int) -> str:
        return bytes(self._graph.Tensors(index).Name() or b"").decode()

    def _constant(self, index: int) -> bool:
        buffer = self._model.Buffers(self._graph.Tensors(index).Buffer())
        return bool(buffer.Size() or buffer.DataLength())


def schemes_of(model: Any) -> dict[str, str]:
    """The schemes over all graphs; one that differs between them is "unplanned"."""
    found: dict[str, str] = {}
    for number in range(model.SubgraphsLength()):
        for name, scheme in Reading(model, model.Subgraphs(number)).schemes().items():
            found[name] = scheme if found.get(name, scheme) == scheme else UNPLANNED
    return dict(sorted(found.items()))


def weights_of(model: Any, graph: int) -> Mapping[int, str]:
    """Tensor -> layer of the INT8 weights of one graph."""
    return Reading(model, model.Subgraphs(graph)).weights()


def _indices(array: Any) -> list[int]:
    # The schema gives 0 for a vector that is not there; -1 is an input that was left out.
    return [] if isinstance(array, int) else [int(one) for one in array if one >= 0]


def _kinds() -> Mapping[int, str]:
    from ai_edge_litert import schema_py_generated as schema

    members = vars(schema.BuiltinOperator).items()
    return {number: name for name, number in members if isinstance(number, int)}
