"""One contender in a process of its own: peak memory and seconds until its first picture.

Several engines in one process share libraries and arenas, so what each holds can be told apart
only in fresh processes: `python -m diffoundry.benching.alone`, one JSON request on standard input.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffoundry.benching.contenders import Entry, open_contender
from diffoundry.benching.request import PictureTask
from diffoundry.errors import DiffoundryError
from diffoundry.formats import canonical
from diffoundry.memory import peak_memory


@dataclass(frozen=True)
class Order:
    """What the process is to do."""

    bundle: Path
    entry: Entry
    task: PictureTask
    threads: int


@dataclass(frozen=True)
class Alone:
    """What one fresh process needed for opening and one picture.

    `peak_memory_bytes` counts everything resident, the interpreter and libraries too; memory of a
    GPU is not in it. `problem` says why the other two are None.
    """

    peak_memory_bytes: int | None = None
    first_picture_seconds: float | None = None
    problem: str = ""


def measure_alone(order: Order) -> Alone:
    """Run `order` in a fresh process and wait. A process that dies is a problem, not an error."""
    found, problem = run_module("diffoundry.benching.alone", order)
    return Alone(problem=problem) if problem else canonical.parse(Alone, found)


def run_module(module: str, order: object) -> tuple[Any, str]:
    """`python -m module` with `order` as JSON on its standard input: what its last line says, and
    in words why there is none."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(canonical.plain(order)),
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1]), ""
    if done.returncode < 0:
        return None, f"the process was ended by signal {-done.returncode}"
    said = done.stderr.strip().splitlines()
    return None, said[-1] if said else f"exit code {done.returncode}"


def run_order(order: Order, started: float) -> Alone:
    """Open the contender here and make one picture. `started`: when the work began."""
    from diffoundry.artifacts.bundle import open_bundle

    contender = open_contender(open_bundle(order.bundle), order.entry, order.task, order.threads)
    contender.picture(0)
    return Alone(peak_memory(), time.perf_counter() - started)


def main() -> None:
    """Read the order, keep the original standard output for the answer alone."""
    started = time.perf_counter()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print
    order = canonical.parse(Order, json.load(sys.stdin))
    try:
        answer = run_order(order, started)
    except DiffoundryError as error:
        answer = Alone(problem=str(error))
    answers.write(json.dumps(canonical.plain(answer)) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
