"""Recorded calls of a large model cut to a smaller picture, for what runs them dozens of times.

At Stable Diffusion 1.5's size a call takes seconds at 512×512, and most of what it holds is one map
of attention scores, which grows with the fourth power of the picture's side. What a search asks
(which operation rounds loudly, which channel is worth least) 256×256 answers in a quarter of the
time; engines are checked on whole calls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diffoundry.types import Contract, Shape

LARGE = 1e12
"""Weight values times pixels of a call, from which on calls are counted, and cut for searches."""
PIXELS = 256 * 256

Feeds = Mapping[str, Any]


def is_large(weight_values: int, contract: Contract, feeds: Feeds) -> bool:
    """Whether a component of so many weight values is large at the shape of `feeds`."""
    return weight_values * math.prod(contract.check_feeds(feeds).values()) > LARGE


def smaller_shape(contract: Contract, shape: Shape) -> dict[str, int]:
    """`shape` with batch 1 and at most PIXELS pixels, as far down as the axes go."""
    smaller = dict(shape)
    for axis in contract.axes:
        step = max(axis.multiple_of, 1)
        side = 1 if axis.name == "batch" else math.isqrt(PIXELS) // step * step
        smaller[axis.name] = min(smaller[axis.name], max(axis.min, side))
    return smaller


def cut(feeds: Feeds, contract: Contract, shape: Shape) -> dict[str, Any]:
    """The first values of each input along every axis: the upper left corner of a latent."""
    return {
        spec.name: feeds[spec.name][tuple(slice(0, size) for size in spec.shape(shape))].copy()
        for spec in contract.inputs
    }
