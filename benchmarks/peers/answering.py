"""One contender in a process of its own that stays open: a line of JSON in, a line of JSON out.

The first line describes the contender; then each {"call": WHAT, "number": N} runs it once. Standard
library alone: the same loop serves environments that hold nothing of this project.

    {"open": {...}}                      -> {"seconds": {"unet": 1.2}, "notes": {}, "memory": BYTES}
    {"call": "unet", "number": 0}        -> {"seconds": 4.5}
    {"memory": true}                     -> {"peak": BYTES, "resident": BYTES}
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Call = Callable[[int], object]


@dataclass
class Opened:
    """What an opened contender can do: WHAT -> a call that takes the round's number."""

    calls: Mapping[str, Call]
    seconds: Mapping[str, float]
    notes: Mapping[str, Any] = field(default_factory=dict)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` gives, and the seconds that it took."""
    started = time.perf_counter()
    found = work()
    return found, time.perf_counter() - started


def memory() -> dict[str, int]:
    """Peak and present resident bytes of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    names = {"peak": "VmHWM", "resident": "VmRSS", "anonymous": "RssAnon"}
    return {name: int(fields[key].split()[0]) * 1024 for name, key in names.items()}


def answer_calls(open_contender: Callable[[dict[str, Any]], Opened]) -> None:
    """Answer until standard input ends. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    opened: Opened | None = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if "open" in order:
                opened = open_contender(order["open"])
                said = {"seconds": opened.seconds, "notes": opened.notes, "what": [*opened.calls]}
            elif "call" in order:
                assert opened is not None
                call, number = opened.calls[order["call"]], int(order["number"])
                said = {"seconds": timed(lambda: call(number))[1]}  # noqa: B023 - runs at once
            else:
                said = memory()
        except Exception as error:  # noqa: BLE001 - crosses a process border
            said = {"problem": f"{type(error).__name__}: {str(error).strip()[:400]}"}
        answers.write(json.dumps(said) + "\n")
