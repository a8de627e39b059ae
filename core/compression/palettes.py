"""Tables of few values that stand for many: k-means in one dimension.

There clusters are ranges of the sorted values, so prefix sums make a step cost as much as the table
is long (Lloyd 1982, "Least squares quantization in PCM").
"""

from __future__ import annotations

import numpy as np

from diffoundry.types import Array

_MOST_STEPS = 300
_BINS = 64


def palette(values: Array, bits: int) -> tuple[Array, Array]:
    """A table of 2^bits values, and for each of `values` (flat, in order) its index, uint8.

    Minimises the squared error by Lloyd's steps; always the same.
    """
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


def palettized(weight: Array, bits: int, group: int) -> Array:
    """`weight` [out, ...] with at most 2^bits values, or with as many for each `group` of output
    channels (0: one table for all). A weight that has no more than that is returned as it is."""
    made = np.empty_like(weight)
    step = group or len(weight)
    for start in range(0, len(weight), step):
        part = weight[start : start + step]
        made[start : start + step] = part
        if len(np.unique(part)) > 2**bits:
            table, indices = palette(part, bits)
            made[start : start + step] = table[indices].reshape(part.shape)
    return made


def _spread(ordered: Array, count: int) -> Array:
    """`count` values to start from, as dense as the cube root of how dense the values lie.

    That is the best spacing for many entries (Panter and Dite 1951, "Quantization distortion in
    pulse-count modulation"); equal shares would leave the rare large weights without an entry.
    """
    found, edges = np.histogram(ordered, bins=_BINS)
    share = np.concatenate([[0.0], np.cumsum(np.cbrt(found))])
    return np.interp((np.arange(count) + 0.5) / count * share[-1], share, edges)
