"""From what was seen of an activation to the range that its grid covers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from diffoundry.errors import StageError
from diffoundry.formats.quant_plan import Range, grid_of
from diffoundry.types import Array

RangeMethod = Literal["minmax", "percentile", "mse"]
SAMPLES_PER_CALL = 1 << 13
_SHRINKS = np.linspace(0.3, 1.0, 36)


@dataclass
class Seen:
    """What passed one point of the graph over all calls.

    `samples` are every n-th value of each call, at most SAMPLES_PER_CALL; `sums` are per channel
    along `axis`, over `count` positions (`means`: False leaves them out; they are the dear part).
    """

    axis: int
    means: bool = True
    low: float = np.inf
    high: float = -np.inf
    samples: list[Array] = field(default_factory=list)
    sums: Array | None = None
    count: int = 0

    def add(self, x: Array) -> None:
        """One call's value, any shape, float32."""
        flat = x.reshape(-1)
        # numpy's carry NaN along, of any call; Python's would drop it.
        self.low = float(np.minimum(self.low, flat.min()))
        self.high = float(np.maximum(self.high, flat.max()))
        # An odd step never walks along one channel alone.
        step = max(1, -(-flat.size // SAMPLES_PER_CALL)) | 1
        self.samples.append(flat[::step].copy())
        self.count += x.size // x.shape[self.axis]
        if self.means:
            others = tuple(i for i in range(x.ndim) if i != self.axis % x.ndim)
            total = x.sum(axis=others, dtype=np.float64)
            self.sums = total if self.sums is None else self.sums + total

    @property
    def mean(self) -> Array:
        """Per channel, float64."""
        if self.sums is None:
            raise StageError("calibration", expected="at least one call", found="none")
        return self.sums / self.count

    @property
    def constant(self) -> bool:
        return self.low == self.high


def span_of(seen: Seen, method: RangeMethod, percentile: float, symmetric: bool) -> Range:
    """The range for the grid.

    minmax: everything seen. percentile: all but (100 − percentile) % of the values at each end.
    mse: of 36 shrunk ranges, the one whose rounding and clipping errors are smallest together
    (as TensorRT's and PyTorch's histogram calibrators look for, here on samples).
    """
    full = Range(seen.low, seen.high)
    if method == "minmax" or seen.constant:
        return full
    values = np.concatenate(seen.samples)
    if method == "percentile":
        low, high = np.percentile(values, [100 - percentile, percentile])
        return Range(float(low), float(high))
    spans = [Range(full.low * shrink, full.high * shrink) for shrink in _SHRINKS]
    errors = [_rounding_error(values, span, symmetric) for span in spans]
    return spans[int(np.argmin(errors))]


def _rounding_error(values: Array, span: Range, symmetric: bool) -> float:
    grid = grid_of(span, symmetric)
    zero = grid.signed_zero_point
    steps = np.clip(np.rint(values / grid.scale) + zero, -128, 127)
    return float(np.mean(np.square((steps - zero) * grid.scale - values)))
