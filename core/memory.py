"""How much memory this process has held at most."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path


def reset_peak_memory() -> None:
    """Let the kernel's peak counter start again (Linux; elsewhere the process's peak counts)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Peak resident memory in bytes since the last reset.

    On Linux from VmHWM: unlike ru_maxrss, it does not start at the parent's peak.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
