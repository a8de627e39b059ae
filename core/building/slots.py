"""How many stages work at once: so many processes, and so much memory between them."""

from __future__ import annotations

import threading


class Slots:
    """Counts running stages and the memory they are expected to hold.

    A stage that is expected to hold more than all of `memory` (bytes) still runs, alone.
    """

    def __init__(self, count: int, memory: int) -> None:
        self._free = count
        self._memory = memory
        self._held = 0
        self._running = 0
        self._waiting: list[tuple[int, int]] = []
        self._change = threading.Condition()

    def acquire(self, peak: int, rank: int = 0) -> None:
        """Wait until one more process may hold `peak` bytes. Of those that wait and fit, the one
        of the lowest rank goes first."""
        mine = (rank, peak)
        with self._change:
            self._waiting.append(mine)
            self._change.wait_for(lambda: self._fits(peak) and self._is_first(rank))
            self._waiting.remove(mine)
            self._change.notify_all()  # another may be first now
            self._free -= 1
            self._running += 1
            self._held += peak

    def release(self, peak: int) -> None:
        """Give back what `acquire(peak)` took."""
        with self._change:
            self._free += 1
            self._running -= 1
            self._held -= peak
            self._change.notify_all()

    def _is_first(self, rank: int) -> bool:
        return not any(other < rank and self._fits(peak) for other, peak in self._waiting)

    def _fits(self, peak: int) -> bool:
        fits = self._held + peak <= self._memory or self._running == 0
        return self._free > 0 and fits
