"""Which recorded calls float16 is tried on: of a large model one, cut to a smaller picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffoundry.errors import StageError
from diffoundry.formats import recording
from diffoundry.formats.smaller_calls import cut, is_large, smaller_shape
from diffoundry.types import Contract

TRIALS = 16
"""Measurements of a large model at most: each runs the whole graph."""

Feeds = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """The calls to measure on, the axis values of each, and how many trials there may be."""

    calls: tuple[Feeds, ...]
    shapes: tuple[Mapping[str, int], ...]
    max_trials: int


def calls_to_measure(
    folder: Path, contract: Contract, count: int, max_trials: int, weight_values: int
) -> Measured:
    """`count` recorded calls, spread evenly; of a large model the middle one, cut to PIXELS.

    `weight_values`: how many numbers the component's weights hold, 0 where no call can be cut: it
    was traced at one shape. Raises StageError for a
    recording without calls.
    """
    calls = recording.load_component(folder).calls
    if not calls:
        raise StageError(f"recording {folder}", expected="recorded calls", found="none",
                         remedy="record the calibration split again")  # fmt: skip
    found = [dict(call.feeds) for call in recording.spread(calls, count)]
    shapes = [contract.check_feeds(feeds) for feeds in found]
    if is_large(weight_values, contract, found[0]):
        middle = dict(calls[len(calls) // 2].feeds)
        smaller = smaller_shape(contract, contract.check_feeds(middle))
        found, shapes = [cut(middle, contract, smaller)], [smaller]
        max_trials = min(max_trials, TRIALS)
    return Measured(tuple(found), tuple(shapes), max_trials)
