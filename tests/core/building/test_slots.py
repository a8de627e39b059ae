"""Processes at once, and the memory between them."""

from __future__ import annotations

import threading

from diffoundry.building.group import Group
from diffoundry.building.slots import Slots

GIB = 1 << 30


def waits(slots: Slots, peak: int) -> threading.Thread:
    thread = threading.Thread(target=slots.acquire, args=(peak,), daemon=True)
    thread.start()
    return thread


def test_two_that_fit_run_at_once_and_a_third_waits() -> None:
    slots = Slots(2, 8 * GIB)
    slots.acquire(3 * GIB)
    slots.acquire(3 * GIB)
    third = waits(slots, 1)
    third.join(0.1)
    assert third.is_alive()
    slots.release(3 * GIB)
    third.join(5)
    assert not third.is_alive()


def test_what_does_not_fit_beside_another_waits_for_it() -> None:
    slots = Slots(2, 8 * GIB)
    slots.acquire(5 * GIB)
    second = waits(slots, 4 * GIB)
    second.join(0.1)
    assert second.is_alive()
    slots.release(5 * GIB)
    second.join(5)
    assert not second.is_alive()


def test_of_those_that_fit_the_lowest_rank_goes_first() -> None:
    slots = Slots(1, 8 * GIB)
    slots.acquire(GIB)
    got: list[str] = []

    def want(name: str, peak: int, rank: int) -> threading.Thread:
        def run() -> None:
            slots.acquire(peak, rank)
            got.append(name)
            slots.release(peak)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while not any(one == (rank, peak) for one in slots._waiting):
            thread.join(0.001)
        return thread

    threads = [want("checks", GIB, 5), want("export", GIB, 2), want("capture", 2 * GIB, 0)]
    slots.release(GIB)
    for thread in threads:
        thread.join(5)
    assert got == ["capture", "export", "checks"]


def test_more_than_everything_runs_alone() -> None:
    slots = Slots(2, GIB)
    slots.acquire(9 * GIB)
    slots.release(9 * GIB)


class CountedWorker:
    made = 0

    def __init__(self) -> None:
        CountedWorker.made += 1
        self.closed = False

    def run(self, request, say):
        return request

    def alive(self) -> bool:
        return not self.closed

    def close(self) -> None:
        self.closed = True


def test_light_stages_share_a_process_and_heavy_ones_have_their_own() -> None:
    CountedWorker.made = 0
    group = Group(CountedWorker, Slots(1, 64 * GIB))
    for peak, processes in ((GIB, 1), (GIB, 1), (9 * GIB, 2), (9 * GIB, 3), (GIB, 4)):
        with group.slot(peak):
            group.run(None, print)
        assert CountedWorker.made == processes
    group.close()


def test_between_two_stages_of_a_group_another_of_a_lower_rank_goes_first() -> None:
    slots = Slots(1, 64 * GIB)
    got: list[str] = []
    export, capture = Group(CountedWorker, slots, 2), Group(CountedWorker, slots, 0)

    def take(name: str, group: Group) -> None:
        with group.slot(GIB):
            got.append(name)

    with export.slot(GIB):
        thread = threading.Thread(target=take, args=("capture", capture), daemon=True)
        thread.start()
        while not slots._waiting:
            thread.join(0.001)
    take("export", export)
    thread.join(5)
    assert got == ["capture", "export"]
