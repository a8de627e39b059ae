"""Runs a command in a control group that has so much memory, and says how much of it was used.

    .venv/bin/python benchmarks/within_limit.py 8GiB .venv/bin/diffoundry build DIR \
        --profile onnx-cpu --memory-budget 8GiB --no-cache --out build/limited

The kernel kills what goes beyond, so that a command which finishes has stayed within. Needs the
right to make a control group (root, on Linux).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from diffoundry.cli.main import parse_size

GROUPS = Path("/sys/fs/cgroup")
FILES = {
    # version of control groups -> folder, limit, highest use, processes
    2: (GROUPS, "memory.max", "memory.peak", "cgroup.procs"),
    1: (GROUPS / "memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes", "cgroup.procs"),
}


@contextlib.contextmanager
def limited(size: int) -> Iterator[tuple[Path, Path]]:
    """A control group of `size` bytes: the file that takes processes, and that of its peak."""
    version = 1 if (GROUPS / "memory").is_dir() else 2
    root, limit, peak, processes = FILES[version]
    group = root / f"diffoundry-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(size))
    except OSError as error:
        sys.exit(f"no control group can be made here: {error}")
    with contextlib.suppress(OSError):  # swap would hide what does not fit
        (group / ("memory.swap.max" if version == 2 else "memory.swappiness")).write_text("0")
    try:
        yield group / processes, group / peak
    finally:
        ends = time.monotonic() + 5
        while group.exists() and time.monotonic() < ends:
            with contextlib.suppress(OSError):
                group.rmdir()
            time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("size", type=parse_size)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    with limited(options.size) as (processes, peak):
        started = time.perf_counter()
        done = subprocess.run(
            options.command, preexec_fn=lambda: processes.write_text(str(os.getpid()))
        )
        seconds = time.perf_counter() - started
        used = int(peak.read_text()) / (1 << 30)
    limit = options.size / (1 << 30)
    print(
        f"exit code {done.returncode}, {seconds:.0f} s, at most {used:.2f} of {limit:.2f} GiB, "
        "the file cache (which the kernel takes back) in it"
    )
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
