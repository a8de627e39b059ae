"""Reads from OpenVINO IR which of a model's layers have INT8 weights, and how they compute.

What the converter makes of Q/DQ: a weight is Const (i8) - Convert - Multiply, an activation on its
grid comes from a FakeQuantize; one quantized at every call from a Convert of 8-bit values.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator

_WEIGHT = ".weight"
_PRODUCTS = ("Convolution", "GroupConvolution", "MatMul", "Gather", "Add")
_MOVES = ("Reshape", "Squeeze", "Transpose", "Unsqueeze")


def integer_layers_of(root: ET.Element) -> dict[str, str]:
    """Module -> "static", "dynamic" or "weight_only"."""
    graph = _Graph(root)
    found = {module: graph.scheme(user) for module, user in graph.products()}
    return dict(sorted(found.items()))


def layer_nodes(root: ET.Element) -> dict[str, str]:
    """Name of the layer that multiplies an INT8 weight -> module."""
    graph = _Graph(root)
    return {graph.layers[user].get("name", ""): module for module, user in graph.products()}


class _Graph:
    def __init__(self, root: ET.Element) -> None:
        self.layers = {layer.get("id", ""): layer for layer in root.iterfind("layers/layer")}
        self._sources: dict[str, list[tuple[int, str]]] = {}
        self._users: dict[str, list[str]] = {}
        for edge in root.iterfind("edges/edge"):
            source, user = edge.get("from-layer", ""), edge.get("to-layer", "")
            self._sources.setdefault(user, []).append((int(edge.get("to-port", "0")), source))
            self._users.setdefault(source, []).append(user)

    def products(self) -> Iterator[tuple[str, str]]:
        """Module, and the number of the layer that multiplies its INT8 weight."""
        for number, layer in self.layers.items():
            data, name = layer.find("data"), layer.get("name", "")
            if layer.get("type") != "Const" or data is None or not name.endswith(_WEIGHT):
                continue
            if data.get("element_type") == "i8":
                for user in self._readers(number):
                    yield name.removesuffix(_WEIGHT), user

    def _readers(self, number: str) -> Iterator[str]:
        """The layers that compute with a weight, behind what makes it float."""
        for user in self._users.get(number, []):
            if self._kind(user) in _PRODUCTS:
                yield user
            else:
                yield from self._readers(user)

    def scheme(self, product: str) -> str:
        if self._kind(product) in ("Gather", "Add"):
            return "weight_only"
        source = self._first(product)
        seen: list[str] = []
        while source and self._kind(source) in (*_MOVES, "Convert", "Subtract", "Multiply"):
            seen.append(self._kind(source))
            if seen[-1] == "Convert" and self._stores_bytes(source):
                return "dynamic"
            source = self._first(source)
        return "static" if source and self._kind(source) == "FakeQuantize" else "weight_only"

    def _kind(self, number: str) -> str:
        return self.layers[number].get("type", "")

    def _first(self, number: str) -> str | None:
        """What is read at the first port."""
        sources = sorted(self._sources.get(number, []))
        return sources[0][1] if sources else None

    def _stores_bytes(self, convert: str) -> bool:
        source = self._first(convert)
        ports = self.layers[source].findall("output/port") if source else []
        return any(port.get("precision") in ("U8", "I8") for port in ports)
