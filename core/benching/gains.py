"""Compressed engines beside their fp32 baseline, component by component, interleaved.

This is the short form of a bench that every build of a compressed variant runs. It happens in a
process of its own (`python -m diffoundry.benching.gains`, one JSON order on standard input): an
engine that crashes must not take the build with it, nor must two large ones stay in its memory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffoundry.artifacts.gain import PAYS, Gain
from diffoundry.benching.alone import run_module
from diffoundry.benching.measuring import component_call
from diffoundry.benching.timing import Call, interleave, ratio_of, spread_of
from diffoundry.discovery import runtime_named
from diffoundry.errors import DiffoundryError
from diffoundry.formats import canonical, recording
from diffoundry.formats.canonical import tree_size_bytes
from diffoundry.sessions import CheckedSession, open_session
from diffoundry.types import Artifact, Contract

AGREE = 0.7
"""Share of the rounds that have to be faster, each beside its neighbour."""
BUDGET_SECONDS = 1.5
"""About how long the rounds of one component take, where its calls are short."""
ROUNDS = (3, 30)
"""Fewest and most rounds."""


@dataclass(frozen=True)
class Pair:
    """One component's engine, what it is held against, and the recording that both are fed from."""

    component: str
    engine: Artifact
    baseline: Artifact
    contract: Contract
    recording: Path

    @property
    def same(self) -> bool:
        """Whether nothing was done to this component."""
        return self.engine.digest == self.baseline.digest

    @property
    def size_bytes(self) -> tuple[int, int]:
        """Of the engine and of its baseline."""
        return tree_size_bytes(self.engine.path), tree_size_bytes(self.baseline.path)


@dataclass(frozen=True)
class GainOrder:
    """What to time: the variant's runtime and device, its baseline's, and the pairs."""

    runtime: str
    baseline_runtime: str
    device: str
    threads: int
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Seconds:
    """Seconds of a call, round by round; the same call of the baseline stands at the same place."""

    engine: tuple[float, ...]
    baseline: tuple[float, ...]


@dataclass(frozen=True)
class GainAnswer:
    """Component -> what its calls took; `problem` says why there is nothing."""

    seconds: Mapping[str, Seconds]
    problem: str = ""


def measure_gains(order: GainOrder) -> GainAnswer:
    """Run `order` in a fresh process and wait. A process that dies is a problem, not an error."""
    found, problem = run_module("diffoundry.benching.gains", order)
    return GainAnswer({}, problem) if problem else canonical.parse(GainAnswer, found)


def gain_of(
    baseline: Sequence[float], engine: Sequence[float], sizes: tuple[int, int] | None = None
) -> Gain:
    """What the rounds of an engine say beside those of its baseline. `sizes`: the engine's bytes
    and the baseline's.

    It pays where its median is faster and enough rounds agree: of thirty that only chance decides,
    21 agree in one case of fifty (a sign test).
    """
    own, base = spread_of(engine), spread_of(baseline)
    speed, ratios = base.median / own.median, ratio_of(baseline, engine)
    agree = sum(one > other for one, other in zip(baseline, engine, strict=True))
    return Gain(
        pays=speed >= PAYS and agree >= AGREE * own.rounds,
        speed=speed,
        p10=ratios.p10,
        p90=ratios.p90,
        rounds=own.rounds,
        seconds=own.median,
        baseline_seconds=base.median,
        size_bytes=sizes[0] if sizes else None,
        baseline_size_bytes=sizes[1] if sizes else None,
    )


def picture_gain(order: GainOrder, answer: GainAnswer, calls: Mapping[str, int]) -> Gain | None:
    """A whole picture, added up from its calls (component -> how often it is called).

    The sampler's own arithmetic is left out. None where a component that is needed is missing.
    """
    if not calls or not set(calls) <= set(answer.seconds):
        return None
    rounds = min(len(answer.seconds[name].engine) for name in calls)

    def whole(of: Callable[[Seconds], Sequence[float]]) -> list[float]:
        return [
            sum(count * of(answer.seconds[name])[number] for name, count in calls.items())
            for number in range(rounds)
        ]

    sizes = [pair.size_bytes for pair in order.pairs if pair.component in calls]
    both = (sum(own for own, _ in sizes), sum(base for _, base in sizes))
    return gain_of(whole(lambda s: s.baseline), whole(lambda s: s.engine), both)


def run_order(order: GainOrder) -> GainAnswer:
    """Time every pair here, one after the other, so that two engines are open at most."""
    return GainAnswer({pair.component: _time_pair(pair, order) for pair in order.pairs})


def _time_pair(pair: Pair, order: GainOrder) -> Seconds:
    feeds = recording.load_component(pair.recording).calls[0].feeds
    sessions = [_open(pair.engine, order.runtime, pair, order)]
    try:
        if not pair.same:
            sessions.append(_open(pair.baseline, order.baseline_runtime, pair, order))
        calls = {str(place): component_call(one, feeds) for place, one in enumerate(sessions)}
        timed = interleave(calls, _rounds(calls), warm_ups=0)
    finally:
        for session in sessions:
            session.close()
    found = [tuple(one.seconds) for one in timed.values()]
    return Seconds(found[0], found[-1])


def _open(artifact: Artifact, runtime: str, pair: Pair, order: GainOrder) -> CheckedSession:
    return open_session(
        runtime_named(runtime), artifact, pair.contract, order.device, order.threads
    )


def _rounds(calls: Mapping[str, Call]) -> int:
    """As many as the budget holds, going by a second call of each: two calls to warm up."""
    seconds = 0.0
    for call in calls.values():
        call(0)
        started = time.perf_counter()
        call(0)
        seconds += time.perf_counter() - started
    fewest, most = ROUNDS
    return max(fewest, min(most, int(BUDGET_SECONDS / max(seconds, 1e-6))))


def main() -> None:
    """Read the order, keep the original standard output for the answer alone."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print
    order = canonical.parse(GainOrder, json.load(sys.stdin))
    try:
        answer = run_order(order)
    except DiffoundryError as error:
        answer = GainAnswer({}, str(error))
    answers.write(json.dumps(canonical.plain(answer)) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
