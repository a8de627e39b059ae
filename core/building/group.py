"""The consecutive stages of one component: their process, and the slot it holds while it works."""

from __future__ import annotations

from collections.abc import Callable

from diffoundry.building.slots import Slots
from diffoundry.building.worker import Answer, Request
from diffoundry.building.workers import Worker

HEAVY_BYTES = 3 << 30
"""A stage that is expected to hold more has a process of its own: what a process once held, its
allocator does not all give back, and starting another takes seconds."""


class Group:
    """A worker process that starts when its first stage must run.

    `slots` bounds how many groups work at once; a group gives its slot back while it waits, and
    those of a lower `rank` go first.
    """

    def __init__(self, launch: Callable[[], Worker], slots: Slots, rank: int = 0) -> None:
        self._launch = launch
        self._slots = slots
        self._rank = rank
        self._worker: Worker | None = None
        self._peak: int | None = None

    def acquire(self, peak: int) -> None:
        """Wait for a slot in which `peak` bytes fit, unless the group holds such a one."""
        if self._peak is not None and self._peak != peak:
            self.release()
        if self._peak is None:
            if peak > HEAVY_BYTES:
                self._end()
            self._slots.acquire(peak, self._rank)
            self._peak = peak

    def release(self) -> None:
        """Give the slot back: an idle process must not hold one that others need."""
        if self._peak is not None:
            if self._peak > HEAVY_BYTES:
                self._end()
            self._slots.release(self._peak)
            self._peak = None

    def run(self, request: Request, say: Callable[[str], None]) -> Answer:
        """Run one stage in the group's process; a new one is started where the last has died."""
        if self._worker is None or not self._worker.alive():
            self._end()
            self._worker = self._launch()
        try:
            return self._worker.run(request, say)
        finally:
            if self._peak is not None and self._peak > HEAVY_BYTES:
                self._end()

    def close(self) -> None:
        """End the process and give the slot back."""
        self._end()
        self.release()

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.close()  # also one that died: its pipes are still open
        self._worker = None
