"""Times several calls side by side: interleaved round by round, medians with spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from diffoundry.benching.energy import Meter

WARM_UPS = 2
Call = Callable[[int], object]
"""Does one piece of work; the number is the round's, which a picture takes as its seed."""


@dataclass(frozen=True)
class Spread:
    """Seconds of one kind of call: the median, and the tenth and ninetieth percentile."""

    median: float
    p10: float
    p90: float
    rounds: int


@dataclass
class Timed:
    """What every round took, in the order of the rounds. `joules` is empty without a meter."""

    seconds: list[float] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)

    @property
    def spread(self) -> Spread:
        return spread_of(self.seconds)

    @property
    def mean_joules(self) -> float | None:
        """The mean, not the median: counters move in steps that a short call may miss."""
        return sum(self.joules) / len(self.joules) if self.joules else None


def spread_of(seconds: Sequence[float]) -> Spread:
    """Median and percentiles of at least one figure."""
    p10, median, p90 = (float(value) for value in np.percentile(seconds, (10, 50, 90)))
    return Spread(median, p10, p90, len(seconds))


def ratio_of(baseline: Sequence[float], other: Sequence[float]) -> Spread:
    """How many times as fast `other` is, round by round: above 1 is faster."""
    return spread_of([one / two for one, two in zip(baseline, other, strict=True)])


def wholly_below(one: Spread, other: Spread) -> bool:
    """Whether the fast rounds and the slow ones are both faster: else noise may have decided."""
    return one.p10 < other.p10 and one.p90 < other.p90


def interleave(
    calls: Mapping[str, Call], rounds: int, meter: Meter | None = None, warm_ups: int = WARM_UPS
) -> dict[str, Timed]:
    """Call each once a round, so that what else the machine does meets all alike.

    Each round begins with another one: no call always comes after the same neighbour's caches.
    """
    timed = {name: Timed() for name in calls}
    names = list(calls)
    for number in range(-warm_ups, rounds):
        first = number % len(names) if names else 0
        for name in names[first:] + names[:first]:
            seconds, joules = _one(calls[name], max(number, 0), meter)
            if number >= 0:
                timed[name].seconds.append(seconds)
                if joules is not None:
                    timed[name].joules.append(joules)
    return timed


def _one(call: Call, number: int, meter: Meter | None) -> tuple[float, float | None]:
    before = meter.joules() if meter else 0.0
    started = time.perf_counter()
    call(number)
    seconds = time.perf_counter() - started
    return seconds, meter.joules() - before if meter else None
