"""What a process may still take: the machine's memory, or its control group's."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from diffoundry.memory import MappedFile, free_memory

GIB = 1 << 30


@pytest.mark.parametrize(
    ("limit", "statistics", "held"),
    [
        ("memory.max", "memory.stat", "anon"),
        ("memory/memory.limit_in_bytes", "memory/memory.stat", "total_rss"),
    ],
)
def test_a_control_group_leaves_its_limit_without_what_is_held_and_the_cache_counts_as_free(
    tmp_path: Path, limit: str, statistics: str, held: str
) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / limit).write_text(f"{GIB // 4}\n")
    (tmp_path / statistics).write_text(f"{held} {GIB // 16}\nfile {GIB // 8}\n")
    assert free_memory(tmp_path) == GIB // 4 - GIB // 16


def test_a_group_without_a_limit_bounds_nothing(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.stat").write_text("anon 5\n")
    assert free_memory(tmp_path) > GIB // 4


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is given back")
def test_pages_of_a_mapped_file_go_back_to_what_it_holds_and_others_stay(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    np.arange(4096, dtype=np.float32).tofile(file)
    mapped = np.memmap(file, np.float32, mode="c")
    mapped += 1  # in memory only, page by page
    other = mapped.copy()
    pages = MappedFile(file)
    assert pages.give_back(mapped.ctypes.data, mapped.nbytes) == mapped.nbytes
    assert pages.give_back(other.ctypes.data, other.nbytes) == 0
    assert np.array_equal(mapped, np.arange(4096)) and np.array_equal(other, mapped + 1)
    assert pages.give_back(mapped.ctypes.data + 4, 100) == 0  # no whole page
    assert MappedFile(tmp_path / "none").give_back(mapped.ctypes.data, mapped.nbytes) == 0
