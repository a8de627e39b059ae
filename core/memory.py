"""How much memory a process has held at most, and how much there is to be had."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path

_DONTNEED = 4
"""MADV_DONTNEED of Linux: pages that are read again come from the file, as it is."""


def reset_peak_memory() -> None:
    """Let the kernel's peak counter start again (Linux; elsewhere the process's peak counts)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_of_process(process: int) -> int | None:
    """Peak resident memory in bytes of a running process, where the host tells (Linux)."""
    return _kilobytes(Path(f"/proc/{process}/status"), "VmHWM:")


def free_memory(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be taken now: the machine's, or what this container's control group leaves.

    The file cache counts as free, as the kernel takes it back. Where the host does not tell, a
    size that bounds nothing.
    """
    found = [_kilobytes(Path("/proc/meminfo"), "MemAvailable:") or sys.maxsize]
    for limit, statistics, held in (
        ("memory.max", "memory.stat", "anon"),
        ("memory/memory.limit_in_bytes", "memory/memory.stat", "total_rss"),
    ):
        with contextlib.suppress(OSError, ValueError, KeyError):
            lines = (groups / statistics).read_text().splitlines()
            used = dict(line.split() for line in lines)
            found.append(int((groups / limit).read_text()) - int(used[held]))
    return max(0, min(found))


def limit_memory(limit: int | None) -> None:
    """Let this process allocate no more than `limit` bytes (None: whatever there is).

    What goes beyond fails as a MemoryError instead of taking the machine down. Files that are
    mapped to be read do not count. Does nothing where the host has no such limit.
    """
    with contextlib.suppress(ImportError, AttributeError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = hard if limit is None else limit
        if hard != resource.RLIM_INFINITY and wanted != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


def said(size: int) -> str:
    """ "7.4 GiB"."""
    return f"{size / (1 << 30):.1f} GiB"


def _kilobytes(file: Path, label: str) -> int | None:
    """The value in bytes of one line of a file such as /proc/meminfo."""
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines():
            if line.startswith(label):
                return int(line.split()[1]) * 1024
    return None


def peak_memory() -> int:
    """Peak resident memory in bytes since the last reset.

    On Linux from VmHWM: unlike ru_maxrss, it does not start at the parent's peak.
    """
    found = peak_of_process(os.getpid())
    if found is not None:
        return found
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_memory_back() -> None:
    """Hand freed memory to the system (glibc keeps it for itself otherwise; elsewhere nothing)."""
    import gc

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class MappedFile:
    """Where this process has `file` mapped (Linux; elsewhere nowhere, and nothing is given back).

    For a file that nobody writes into: pages that were written to in memory (a private mapping's
    own copies) go back to what the file holds.
    """

    def __init__(self, file: Path) -> None:
        self._ranges: list[tuple[int, int]] = []
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/maps").read_text().splitlines():
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5] == str(file.resolve()):
                    start, end = (int(text, 16) for text in fields[0].split("-"))
                    self._ranges.append((start, end))

    def give_back(self, address: int, size: int) -> int:
        """Let go of the whole pages of [address, address + size); returns how many bytes.

        0 for memory that is not of this file.
        """
        page = os.sysconf("SC_PAGESIZE")
        start, end = -(-address // page) * page, (address + size) // page * page
        if end <= start or not any(low <= start and end <= high for low, high in self._ranges):
            return 0
        done = ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(_DONTNEED)
        )
        return end - start if done == 0 else 0
