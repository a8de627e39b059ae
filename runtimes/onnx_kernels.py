"""What the kernels in a profile of onnxruntime compute in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SUFFIX = "_kernel_time"
# The products that multiply integers; onnxruntime makes the last one of DynamicQuantizeLinear and
# MatMulIntegerToFloat.
_INTEGER = ("QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger",
            "MatMulIntegerToFloat", "DynamicQuantizeMatMul")  # fmt: skip


def summary(events: Sequence[Mapping[str, Any]], layers: Mapping[str, str]) -> dict[str, Any]:
    """kernels_by_provider, kernels_by_type, float16_kernels, integer_layers and note of a profile.

    `layers`: name of each node of the file that multiplies an INT8 weight -> module. Names of
    nodes that onnxruntime fused or moved begin with the same module.
    """
    by_provider: dict[str, int] = {}
    by_type: dict[str, int] = {}
    half: dict[str, int] = {}
    modules = {_path(name): module for name, module in layers.items()}
    integer: set[str] = set()
    for event in events:
        args = event.get("args", {})
        if event.get("cat") != "Node" or not event["name"].endswith(_SUFFIX):
            continue
        provider, operator = args.get("provider", "unknown"), args.get("op_name", "unknown")
        by_provider[provider] = by_provider.get(provider, 0) + 1
        shapes = [*args.get("input_type_shape", []), *args.get("output_type_shape", [])]
        kinds = {kind for shape in shapes for kind in shape} & {"float", "float16", "double"}
        if operator in _INTEGER:
            kinds = {"int8"}
            integer.update({modules[path]} if (path := _path(event["name"])) in modules else ())
        for kind in kinds if operator != "Cast" else ():
            by_type[kind] = by_type.get(kind, 0) + 1
        if "float16" in kinds and operator != "Cast":
            half[operator] = half.get(operator, 0) + 1
    found: dict[str, Any] = {
        "kernels_by_provider": dict(sorted(by_provider.items())),
        "kernels_by_type": dict(sorted(by_type.items())),
        "float16_kernels": dict(sorted(half.items())),
    }
    if layers:
        found["integer_layers"] = sorted(integer)
    return {**found, "note": _note(by_type, half)}


def _path(node_name: str) -> str:
    return node_name.rpartition("/")[0]


def _note(by_type: Mapping[str, int], half: Mapping[str, int]) -> str:
    single, integer = by_type.get("float", 0), by_type.get("int8", 0)
    if integer:
        return f"{integer} kernels multiply 8-bit integers, {single} compute in float32"
    if not half:
        return "every kernel computes in float32"
    return f"{sum(half.values())} kernels take float16, {single} compute in float32 between casts"
