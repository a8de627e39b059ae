"""GELU as one operator.

    x ── Div(√2) ── Erf ── Add(1) ── Mul(0.5) ── Mul ── y        x ── Gelu ── y
    └────────────────────────────────────────────┘

Five passes over a value of [4096, 1280] become one. onnxruntime's own fusion knows other orders of
these products. Exact: its kernel computes the same error function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffoundry.exporters.fusions.editing import MICROSOFT, Graph, constant, maker, read_once

if TYPE_CHECKING:
    import onnx_ir as ir


def apply(graph: Graph) -> int:
    """Rewrite each GELU that is written with an error function."""
    count = sum(_rewrite(graph, node) for node in graph.nodes("Erf"))
    graph.clean()
    return count


def _rewrite(graph: Graph, erf: ir.Node) -> bool:
    scaled = maker(erf.inputs[0], "Div")
    if scaled is None or not _is(scaled.inputs[1], 2**0.5):
        return False
    x = scaled.inputs[0]
    shifted = _reader(erf.outputs[0], "Add", 1.0)
    half = _reader(shifted, "Mul", 0.5)
    if half is None or not read_once(half):
        return False
    last = half.uses()[0].node
    if (last.domain, last.op_type) != ("", "Mul") or x not in last.inputs:
        return False
    made = graph.node(last, "Gelu", [x], domain=MICROSOFT)
    graph.replace(last.outputs[0], made)
    return True


def _reader(value: ir.Value | None, operator: str, number: float) -> ir.Value | None:
    """What the one node makes that reads `value`, where it is `operator` with `number`."""
    if value is None or not read_once(value):
        return None
    node = value.uses()[0].node
    if (node.domain, node.op_type) != ("", operator):
        return None
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    return node.outputs[0] if _is(other, number) else None


def _is(value: ir.Value | None, number: float) -> bool:
    found = constant(value)
    return found is not None and found.size == 1 and abs(float(found.item()) - number) < 1e-6
