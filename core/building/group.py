"""The consecutive stages of one component: their process, and the slot each of them holds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from diffoundry.building.slots import Slots
from diffoundry.building.worker import Answer, Request
from diffoundry.building.workers import Worker

HEAVY_BYTES = 3 << 30
"""A stage that is expected to hold more has a process of its own: what a process once held, its
allocator does not all give back, and starting another takes seconds."""


class Group:
    """A worker process that starts when its first stage must run.

    `slots` bounds how many groups work at once. A slot is held for one stage: between two stages,
    and while a group waits, those of a lower `rank` go first.
    """

    def __init__(self, launch: Callable[[], Worker], slots: Slots, rank: int = 0) -> None:
        self._launch = launch
        self._slots = slots
        self._rank = rank
        self._worker: Worker | None = None

    @contextlib.contextmanager
    def slot(self, peak: int) -> Iterator[None]:
        """Hold a slot in which `peak` bytes fit, for one stage."""
        heavy = peak > HEAVY_BYTES
        if heavy:
            self.close()
        self._slots.acquire(peak, self._rank)
        try:
            yield
        finally:
            if heavy:
                self.close()
            self._slots.release(peak)

    def run(self, request: Request, say: Callable[[str], None]) -> Answer:
        """Run one stage in the group's process; a new one is started where the last has died."""
        if self._worker is None or not self._worker.alive():
            self.close()
            self._worker = self._launch()
        return self._worker.run(request, say)

    def close(self) -> None:
        """End the process; also one that died: its pipes are still open."""
        if self._worker is not None:
            self._worker.close()
        self._worker = None
