"""Writes a quantization plan into a TFLite file.

A layer is found by its weight: the converter renames and merges operations, but behind fences
(`tflite_fences`) the weights stay the module's own, bit for bit.

    static        x -> QUANTIZE -> [int8 layer, int8 weight, int32 bias] -> DEQUANTIZE -> y
    dynamic       x -> [float layer, int8 weight] -> y      (the kernel puts x on a grid)
    weight_only   int8 weight -> DEQUANTIZE -> [float layer]; rows of a table are looked up in int8

What else reads such a weight gets it through a DEQUANTIZE.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffoundry.errors import StageError
from diffoundry.exporters import tflite_fences
from diffoundry.formats.quant_plan import (
    LayerPlan,
    QuantPlan,
    grid_of,
    integer_weight,
    refuse_missing,
)
from diffoundry.formats.tflite_editing import Graph, Model
from diffoundry.formats.tflite_int8 import LOOKUPS, PRODUCTS, WEIGHT
from diffoundry.types import Array

_STAGE = "tflite_from_exported_program"


@dataclass(frozen=True)
class Layer:
    """A planned layer and what it is made of. `weight`: float32 [out, ...] as in the module."""

    plan: LayerPlan
    weight: Array
    scale: Array
    added_bias: Array | None = None


@dataclass(frozen=True)
class Match:
    """A constant of the file that is a layer's weight: `order` of its axes, and the `axis` that
    its output channels lie on."""

    layer: Layer
    order: tuple[int, ...]
    axis: int


def layers_to_fence(plan: QuantPlan) -> set[str]:
    """The layers that nothing may be merged with."""
    return {one.module for one in plan.layers if one.integer_weight and one.kind != "embedding"}


def apply_plan(source: Path, target: Path, plan: QuantPlan, weights: Mapping[str, Array]) -> None:
    """Write `source` (fp32, with fences) to `target` as the plan says.

    `weights`: parameters by name, as the plan's module has them. Raises StageError for a static
    layer without a range of its output, ArtifactError that names all layers that are not there.
    """
    layers = layers_of(plan, weights)
    known = _by_content(layers)
    model = Model.read(source)
    found = {one.module for one in plan.layers if not one.integer_weight}
    for graph in model.graphs():
        tflite_fences.tear_down(graph)
        found |= _quantize_graph(graph, known, layers)
    refuse_missing(plan, found, f"{_STAGE}: weights of the converted file")
    model.write(target)


def layers_of(plan: QuantPlan, weights: Mapping[str, Array]) -> list[Layer]:
    """The layers that become INT8. Raises ArtifactError and StageError as `apply_plan` does."""
    names = {name.removesuffix(".weight") for name in weights if name.endswith(".weight")}
    refuse_missing(plan, names, _STAGE)
    without = [one.module for one in plan.layers if one.scheme == "static" and one.output is None]
    if without:
        raise StageError(
            f"{_STAGE}: {plan.component}",
            expected="a range of the output of every static layer: LiteRT's static kernels write "
            "integers",
            found=f"none for {', '.join(without)}",
            remedy="let the estimator watch outputs (quantize_outputs), or use the scheme "
            "'dynamic', whose kernels write floats",
        )
    made = []
    for one in plan.layers:
        if one.integer_weight:
            own, corrected = weights.get(f"{one.module}.bias"), plan.bias(one.module)
            added = corrected if own is None or corrected is None else corrected - own
            weight = weights[f"{one.module}.weight"]
            made.append(Layer(one, weight, plan.weight_scale(one.module), added))
    return made


def _by_content(layers: list[Layer]) -> dict[bytes, list[Match]]:
    known: dict[bytes, list[Match]] = {}
    for layer in layers:
        for order, axis in _orders(layer.weight.ndim):
            match = Match(layer, order, axis)
            known.setdefault(_key(layer.weight.transpose(order)), []).append(match)
    return known


def _orders(rank: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """How a weight may lie in the file: order of the axes, and where its channels then are."""
    if rank == 4:
        yield (0, 2, 3, 1), 0
    else:
        yield (0, 1), 0
        yield (1, 0), 1


def _key(value: Array) -> bytes:
    value = _squeezed(value)
    head = f"{value.dtype}{value.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(value).tobytes()).digest()


def _squeezed(value: Array) -> Array:
    """[1, rows, columns] as [rows, columns]."""
    return value[0] if value.ndim == 3 and len(value) == 1 else value


def _quantize_graph(
    graph: Graph, known: Mapping[bytes, list[Match]], layers: list[Layer]
) -> set[str]:
    """Quantize what the graph has of the layers; their names."""
    taken: set[str] = set()
    for index, value in graph.constants():
        candidates = known.get(_key(value)) or _beginnings(value, layers)
        # Of layers with equal weights, one that no other constant is yet.
        free = [one for one in candidates if one.layer.plan.module not in taken]
        for match in (free or candidates)[:1]:
            _store(graph, index, match, rows=_squeezed(value).shape[0])
            taken.add(match.layer.plan.module)
    return taken


def _beginnings(value: Array, layers: list[Layer]) -> list[Match]:
    """Tables that begin with these rows: positions are looked up when the file is made."""
    rows = _squeezed(value)
    return [
        Match(layer, (0, 1), 0)
        for layer in layers
        if layer.plan.kind == "embedding"
        and rows.ndim == 2
        and rows.shape[1:] == layer.weight.shape[1:]
        and len(rows) < len(layer.weight)
        and np.array_equal(rows, layer.weight[: len(rows)])
    ]


def _store(graph: Graph, index: int, match: Match, rows: int) -> None:
    """Make the constant INT8, and let each of its readers do with it what the plan says."""
    layer, plan = match.layer, match.layer.plan
    integers = integer_weight(layer.weight, layer.scale)
    scale = layer.scale
    if plan.kind == "embedding":
        integers, scale = integers[:rows], scale[:rows]
    readers = graph.reading(index)
    axis = match.axis + graph.rank(index) - integers.ndim
    graph.make_integer(index, integers.transpose(match.order), scale, axis, plan.module + WEIGHT)
    direct = LOOKUPS if plan.kind == "embedding" else PRODUCTS if plan.integer_kernel else ()
    dequantized: int | None = None
    for operator in readers:
        kind = graph.kind(operator)
        if layer.added_bias is not None and kind in PRODUCTS:
            graph.add_to_bias(operator, layer.added_bias)
        if kind not in direct or match.axis != 0 or operator.inputs[1] != index:
            if dequantized is None:
                dequantized = graph.dequantized_constant(index)
            graph.replace_input(operator, index, dequantized)
        elif plan.scheme == "dynamic":
            graph.quantize_inputs_asymmetrically(operator)
        elif plan.scheme == "static":
            _make_static(graph, operator, layer)


def _make_static(graph: Graph, operator: Any, layer: Layer) -> None:
    plan = layer.plan
    assert plan.activation is not None and plan.output is not None
    grid = grid_of(plan.activation, plan.symmetric)
    graph.quantize_input(operator, grid)
    graph.make_bias_integer(operator, layer.scale * np.float32(grid.scale))
    graph.dequantize_output(operator, grid_of(plan.output, plan.symmetric))
