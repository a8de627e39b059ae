"""Rewrites the graph of OpenVINO IR so that two conversions of one model give equal bytes.

What varies between two conversions: layers that the converter names by a counter of the whole
process ("Constant_4762"), the versions and paths in the model's rt_info.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping

SEAL = "rt_info/diffoundry/weights"
"""Where the digest of the weights stands, as the attribute `value`."""

_COUNTED = re.compile(r"[A-Z][A-Za-z0-9]*_[0-9]+(_compressed)?")
_HISTORY = ("fused_names", "fused_names_0")
"""Attributes of layers that only tell which layers they were made from."""


def canonicalise(root: ET.Element, weights_digest: str) -> str:
    """Strip what varies from `root`, seal it with `weights_digest`, and return the text.

    Inputs and outputs keep their tensor names; inner tensors lose theirs. Layer-wise runtime
    attributes that change the arithmetic stay.
    """
    for graph in (root, *root.iter("body")):
        _name_layers(graph)
        _drop_inner_tensor_names(graph)
    for holder in root.iter("rt_info"):
        for attribute in list(holder):
            if attribute.get("name") in _HISTORY:
                holder.remove(attribute)
    for old in root.findall("rt_info"):
        root.remove(old)
    parent = root
    for tag in SEAL.split("/"):
        parent = ET.SubElement(parent, tag)
    parent.set("value", weights_digest)
    ET.indent(root, "")  # a line an element: tabs were a sixth of a quantized model
    return '<?xml version="1.0"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _name_layers(graph: ET.Element) -> None:
    """Name counted layers after the layer that uses them: "/conv_in/Conv/Const"."""
    layers = {layer.get("id", ""): layer for layer in graph.iterfind("layers/layer")}
    users = _first_users(graph, list(layers))
    names = {number: layer.get("name", "") for number, layer in layers.items()}
    stable = {number: name for number, name in names.items() if not _COUNTED.fullmatch(name)}
    bases, taken = dict(stable), set(stable.values())
    # The file lists a layer before its users: from the end, a layer's user is known already.
    for number in reversed(list(layers)):
        if number not in bases and users.get(number) in bases:
            bases[number] = bases[users[number]]
    for number, layer in layers.items():
        if number not in stable:
            kind, base = layer.get("type", ""), bases.get(number)
            layer.set("name", _free(f"{base}/{kind}" if base else kind, taken))


def _first_users(graph: ET.Element, order: Iterable[str]) -> Mapping[str, str]:
    """Layer -> the first layer, in the order of the file, that reads one of its outputs."""
    place = {number: position for position, number in enumerate(order)}
    users: dict[str, str] = {}
    for edge in graph.iterfind("edges/edge"):
        source, user = edge.get("from-layer", ""), edge.get("to-layer", "")
        if source not in users or place.get(user, 0) < place.get(users[source], 0):
            users[source] = user
    return users


def _free(name: str, taken: set[str]) -> str:
    found, count = name, 1
    while found in taken:
        count += 1
        found = f"{name}_{count}"
    taken.add(found)
    return found


def _drop_inner_tensor_names(graph: ET.Element) -> None:
    layers = list(graph.iterfind("layers/layer"))
    results = {layer.get("id") for layer in layers if layer.get("type") == "Result"}
    leaving = {
        (edge.get("from-layer"), edge.get("from-port"))
        for edge in graph.iterfind("edges/edge")
        if edge.get("to-layer") in results
    }
    for layer in layers:
        for port in layer.iterfind("output/port"):
            if (
                layer.get("type") != "Parameter"
                and (layer.get("id"), port.get("id")) not in leaving
            ):
                port.attrib.pop("names", None)
