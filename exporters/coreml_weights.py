"""Stores the weights of a Core ML model in fewer bits, with coremltools.optimize.

Lookup tables come from a k-means of our own: coremltools asks for scikit-learn wherever a tensor
is small or in fp32. In one dimension clusters are ranges of the sorted values, so prefix sums make
a step cost as much as the table is long (Lloyd 1982, "Least squares quantization in PCM").
"""

from __future__ import annotations

from typing import Any

from diffoundry.types import Array

FORMS = ("float", "int8", "palette8", "palette6", "palette4")
SMALLEST = 2048
"""Values that a tensor must have to be compressed; a table would cost more than it saves."""
_MOST_STEPS = 300
_BINS = 64


def compress(model: Any, form: str) -> Any:
    """`model` (an MLModel) with its weights in `form`; itself for "float"."""
    if form == "float":
        return model
    import coremltools.optimize.coreml as cto

    if form == "int8":
        linear = cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=SMALLEST)
        return cto.linear_quantize_weights(model, cto.OptimizationConfig(global_config=linear))
    bits = int(form.removeprefix("palette"))
    table = cto.OpPalettizerConfig(
        mode="custom",
        lut_function=lambda values: palette(values, bits),
        weight_threshold=SMALLEST,
    )
    return cto.palettize_weights(model, cto.OptimizationConfig(global_config=table))


def palette(values: Array, bits: int) -> tuple[Array, Array]:
    """A table of 2^bits values, and for each of `values` (flat, in order) its index, uint8.

    Minimises the squared error by Lloyd's steps; always the same.
    """
    import numpy as np

    flat = np.asarray(values, np.float64).reshape(-1)
    ordered = np.sort(flat)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    count = 2**bits
    table = _spread(ordered, count)
    for _ in range(_MOST_STEPS):
        # A value belongs to the nearest entry: the borders lie half-way.
        ends = np.searchsorted(ordered, (table[1:] + table[:-1]) / 2)
        edges = np.concatenate([[0], ends, [len(ordered)]])
        sizes = np.diff(edges)
        means = (sums[edges[1:]] - sums[edges[:-1]]) / np.maximum(sizes, 1)
        moved = np.sort(np.where(sizes > 0, means, table))
        if np.array_equal(moved, table):
            break
        table = moved
    table = table.astype(values.dtype)
    borders = (table[1:].astype(np.float64) + table[:-1].astype(np.float64)) / 2
    return table, np.searchsorted(borders, flat).astype(np.uint8)


def _spread(ordered: Array, count: int) -> Array:
    """`count` values to start from, as dense as the cube root of how dense the values lie.

    That is the best spacing for many entries (Panter and Dite 1951, "Quantization distortion in
    pulse-count modulation"); equal shares would leave the rare large weights without an entry.
    """
    import numpy as np

    found, edges = np.histogram(ordered, bins=_BINS)
    share = np.concatenate([[0.0], np.cumsum(np.cbrt(found))])
    return np.interp((np.arange(count) + 0.5) / count * share[-1], share, edges)
