"""Interleaving: everyone once a round, with the same seeds; spreads are ordered."""

from __future__ import annotations

from collections import Counter

from diffoundry.benching.timing import interleave, spread_of


class StepMeter:
    """One joule each time it is read."""

    name = "steps"

    def __init__(self) -> None:
        self.read = 0

    def joules(self) -> float:
        self.read += 1
        return float(self.read)


def test_everyone_is_called_once_a_round_with_the_round_as_seed() -> None:
    said: list[tuple[str, int]] = []
    calls = {
        name: (lambda number, name=name: said.append((name, number))) for name in ("a", "b", "c")
    }
    timed = interleave(calls, 4, warm_ups=1)
    assert all(timed[name].spread.rounds == 4 for name in calls)
    rounds = [said[start : start + 3] for start in range(0, len(said), 3)]
    assert len(rounds) == 5
    for number, one in zip((0, 0, 1, 2, 3), rounds, strict=True):
        assert {seed for _, seed in one} == {number}
        assert {name for name, _ in one} == set(calls)
    firsts = Counter(one[0][0] for one in rounds[1:])
    assert len(firsts) == 3  # no one always goes first


def test_without_a_meter_there_are_no_joules_and_with_one_their_mean() -> None:
    calls = {"a": lambda number: None}
    assert interleave(calls, 2)["a"].mean_joules is None
    assert interleave(calls, 2, StepMeter())["a"].mean_joules == 1.0


def test_nobody_to_call_is_nothing_timed() -> None:
    assert interleave({}, 3) == {}


def test_the_spread_lies_around_the_median() -> None:
    spread = spread_of([float(value) for value in range(1, 12)])
    assert (spread.p10, spread.median, spread.p90, spread.rounds) == (2.0, 6.0, 10.0, 11)
    assert spread_of([3.0]).median == 3.0
