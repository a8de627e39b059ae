"""The consecutive stages of one component: their process, and the slot it holds while it works."""

from __future__ import annotations

import threading
from collections.abc import Callable

from diffoundry.building.worker import Answer, Request
from diffoundry.building.workers import Worker


class Group:
    """A worker process that starts when its first stage must run.

    `slots` bounds how many groups work at once; a group gives its slot back while it waits.
    """

    def __init__(self, launch: Callable[[], Worker], slots: threading.Semaphore) -> None:
        self._launch = launch
        self._slots = slots
        self._worker: Worker | None = None
        self._holds = False

    def acquire(self) -> None:
        """Wait for a slot, unless the group holds one."""
        if not self._holds:
            self._slots.acquire()
            self._holds = True

    def release(self) -> None:
        """Give the slot back: an idle process must not hold one that others need."""
        if self._holds:
            self._slots.release()
            self._holds = False

    def run(self, request: Request, say: Callable[[str], None]) -> Answer:
        """Run one stage in the group's process; a new one is started where the last has died."""
        self.acquire()
        if self._worker is None or not self._worker.alive():
            self._worker = self._launch()
        return self._worker.run(request, say)

    def close(self) -> None:
        """End the process and give the slot back."""
        if self._worker is not None and self._worker.alive():
            self._worker.close()
        self.release()
