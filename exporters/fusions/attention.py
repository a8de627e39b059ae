"""Attention as one operator, whose scores stay in a cache.

    q ── Reshape ── Transpose ── Mul ───────────────────┐
    k ── Reshape ── Transpose ── … ── Transpose ── Mul ── MatMul ── Softmax ──┐
    v ── Reshape ── Transpose ────────────────────────────────────────── MatMul ──┐
                                                              y ── Reshape ── Transpose

    q, k, v ── MultiHeadAttention ── y

q, k, v, y are [batch, tokens, heads × width]. The scores of 8 heads and 4096 tokens would be
512 MB, written once and read twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffoundry.exporters.fusions.editing import (
    MICROSOFT,
    Graph,
    constant,
    integers,
    maker,
    read_once,
)
from diffoundry.exporters.fusions.sizes import Sizes

if TYPE_CHECKING:
    import onnx_ir as ir

_HEADS_FIRST = [0, 2, 1, 3]


@dataclass(frozen=True)
class _Heads:
    """`tokens` [batch, tokens, heads × width], which became [batch, heads, tokens, width]."""

    tokens: ir.Value
    heads: int
    width: int
    factor: float = 1.0


def apply(graph: Graph) -> int:
    """Rewrite each attention that has no mask."""
    count = sum(_rewrite(graph, node) for node in graph.nodes("Softmax"))
    graph.clean()
    return count


def _rewrite(graph: Graph, softmax: ir.Node) -> bool:
    sizes = graph.sizes
    scores = maker(softmax.inputs[0], "MatMul")
    read = softmax.outputs[0]
    axis = softmax.attributes.get("axis")
    if scores is None or not read_once(read) or (axis is not None and axis.as_int() != -1):
        return False
    mixed = read.uses()[0].node
    if (mixed.domain, mixed.op_type) != ("", "MatMul") or mixed.inputs[0] is not read:
        return False
    query, key = _split(scores.inputs[0], sizes), _split(_turned_back(scores.inputs[1]), sizes)
    value, end = _split(mixed.inputs[1], sizes), _joined(mixed)
    if query is None or key is None or value is None or end is None:
        return False
    if len({(one.heads, one.width) for one in (query, key, value)}) != 1 or value.factor != 1:
        return False
    factor = query.factor * key.factor * _factor(scores.inputs[1])
    if sizes.usual(end.name) is None or len(sizes.usual(end.name) or ()) != 3:
        return False
    node = end.producer()
    assert node is not None
    made = graph.node(
        node, "MultiHeadAttention", [query.tokens, key.tokens, value.tokens],
        domain=MICROSOFT, num_heads=query.heads, scale=float(factor),
    )  # fmt: skip
    graph.replace(end, made)
    return True


def _split(value: ir.Value | None, sizes: Sizes) -> _Heads | None:
    """Where [batch, heads, tokens, width] comes from: [batch, tokens, heads × width], scaled."""
    value, factor = _unscaled(value)
    turned = maker(value, "Transpose")
    if turned is None or integers(turned, "perm", ()) != _HEADS_FIRST:
        return None
    split = maker(turned.inputs[0], "Reshape")
    last = _last(split.inputs[1], 2) if split is not None else None
    if split is None or last is None or split.inputs[0] is None:
        return None
    tokens, (heads, width) = split.inputs[0], last
    before = sizes.usual(tokens.name)
    whole = before is not None and len(before) == 3 and before[2] == heads * width
    return _Heads(tokens, heads, width, factor) if whole else None


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """Behind a product with one number: what it multiplies, and the number."""
    node = maker(value, "Mul")
    if node is None:
        return value, 1.0
    for place in (0, 1):
        number = constant(node.inputs[place])
        if number is not None and number.size == 1:
            return node.inputs[1 - place], float(number.reshape(()))
    return value, 1.0


def _factor(value: ir.Value | None) -> float:
    return _unscaled(value)[1]


def _turned_back(value: ir.Value | None) -> ir.Value | None:
    """The keys before their last two axes were exchanged.

    torch writes that for any number of axes: [-1, tokens, width], turned, and back to four axes,
    each size read from the keys' own shape.
    """
    value, _ = _unscaled(value)
    turned = maker(value, "Transpose")
    if turned is not None and integers(turned, "perm", ()) == [0, 1, 3, 2]:
        return turned.inputs[0]
    back = maker(value, "Reshape")
    turned = maker(back.inputs[0], "Transpose") if back is not None else None
    if back is None or turned is None or integers(turned, "perm", ()) != [0, 2, 1]:
        return None
    flat = maker(turned.inputs[0], "Reshape")
    if flat is None:
        return None
    keys = flat.inputs[0]
    wanted = ([-1, (-2, -1), (-1, None)], [(None, -2), (-1, None), (-2, -1)])
    found = (_sizes_read(flat.inputs[1], keys), _sizes_read(back.inputs[1], keys))
    return keys if found == wanted else None


def _sizes_read(
    shape: ir.Value | None, of: ir.Value | None
) -> list[int | tuple[int | None, int | None]] | None:
    """The parts of a shape: numbers, and (start, end) of what is read from the shape of `of`."""
    joined = maker(shape, "Concat")
    if joined is None:
        return None
    parts: list[int | tuple[int | None, int | None]] = []
    for part in joined.inputs:
        number, cut = constant(part), maker(part, "Slice")
        if number is not None and number.size == 1:
            parts.append(int(number.reshape(())))
            continue
        source = maker(cut.inputs[0], "Shape") if cut is not None else None
        if cut is None or source is None or source.inputs[0] is not of or len(cut.inputs) != 3:
            return None
        start, end = (constant(bound) for bound in cut.inputs[1:])
        if start is None or end is None:
            return None
        parts.append((_bound(int(start.item())), _bound(int(end.item()))))
    return parts


def _bound(number: int) -> int | None:
    """None for a bound beyond every axis."""
    return None if abs(number) > 2**31 else number


def _last(shape: ir.Value | None, count: int) -> tuple[int, ...] | None:
    """The last numbers of a shape of four, where they are constants."""
    whole = constant(shape)
    if whole is not None:
        return tuple(int(n) for n in whole[-count:]) if whole.size == 4 else None
    joined = maker(shape, "Concat")
    if joined is None or len(joined.inputs) != 4:
        return None
    parts = [constant(part) for part in joined.inputs[-count:]]
    if any(part is None or part.size != 1 for part in parts):
        return None
    return tuple(int(part.item()) for part in parts if part is not None)


def _joined(mixed: ir.Node) -> ir.Value | None:
    """The value in which the heads lie side by side again, behind Transpose and Reshape."""
    value = mixed.outputs[0]
    for operator in ("Transpose", "Reshape"):
        if not read_once(value):
            return None
        node = value.uses()[0].node
        if (node.domain, node.op_type) != ("", operator) or node.inputs[0] is not value:
            return None
        if operator == "Transpose" and integers(node, "perm", ()) != _HEADS_FIRST:
            return None
        value = node.outputs[0]
    return value
