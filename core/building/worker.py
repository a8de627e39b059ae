"""The worker process: runs stages it is sent as JSON lines, and answers in JSON lines.

Started as `python -m diffoundry.building.worker`. One request per line on standard input; events
(`say`, `done`, `error`) go to the original standard output, while anything that libraries print
goes to standard error. Ends when its input closes or its parent dies.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffoundry.discovery import stage_class
from diffoundry.errors import DiffoundryError, StageError
from diffoundry.formats import canonical
from diffoundry.formats.kinds import format_of
from diffoundry.memory import limit_memory, peak_memory, reset_peak_memory, said
from diffoundry.types import Artifact, ArtifactType, Contract, StageContext

LOG = "{log}"
"""Stands in an error for the worker's log file, whose path only the driver knows."""


OUT_OF_MEMORY = (
    "give it more (--memory-budget), free some, or build fewer things at once (--jobs 1); then run "
    "the same build again: everything finished is kept"
)


@dataclass(frozen=True)
class Request:
    """One stage run. `work` is an empty folder; `journal` see `StageContext`; `memory_limit` in
    bytes is what the process may allocate."""

    stage: str
    options: dict[str, Any]
    inputs: dict[str, Artifact]
    outputs: dict[str, ArtifactType]
    work: Path
    component: str | None = None
    contracts: dict[str, Contract] = field(default_factory=dict)
    threads: int = 2
    journal: Path | None = None
    memory_limit: int | None = None


@dataclass(frozen=True)
class MadeOutput:
    """One output after canonicalising: where it lies, its digest and size."""

    path: Path
    digest: str
    size_bytes: int
    contract: Contract | None = None


@dataclass(frozen=True)
class Answer:
    """What a finished stage reports."""

    outputs: dict[str, MadeOutput]
    seconds: float
    peak_memory_bytes: int


def run_request(request: Request, say: Callable[[str], None]) -> Answer:
    """Run one stage here, then canonicalise, validate and hash what it made."""
    started = time.perf_counter()
    reset_peak_memory()
    stage = canonical.parse(stage_class(request.stage), request.options)
    context = StageContext(
        work=request.work,
        component=request.component,
        contract=request.contracts.get(request.component or ""),
        contracts=request.contracts,
        threads=request.threads,
        journal=request.journal,
        say=say,
    )
    produced = stage.run(request.inputs, context)
    missing = sorted(set(request.outputs) - set(produced))
    if missing:
        raise StageError(
            f"stage {request.stage}", expected=f"outputs {missing}", found=", ".join(produced)
        )
    outputs = {}
    for name, artifact_type in request.outputs.items():
        path = produced[name].path
        module = format_of(artifact_type.kind)
        for step in ("canonicalise", "validate"):
            if hasattr(module, step):
                getattr(module, step)(path)
        digest = getattr(module, "digest", canonical.tree_digest)(path)
        outputs[name] = MadeOutput(
            path, digest, canonical.tree_size_bytes(path), produced[name].contract
        )
    return Answer(outputs, time.perf_counter() - started, peak_memory())


def error_event(error: BaseException, stage: str, component: str | None) -> dict[str, Any]:
    """An error as an event; a foreign exception becomes a StageError that keeps its message."""
    if not isinstance(error, DiffoundryError):
        traceback.print_exc()
        if out_of_memory(error):
            return {"event": "error", "error": _too_large(error, stage, component).as_json()}
        error = StageError(
            f"stage {stage}" + (f" on {component}" if component else ""),
            expected="to finish",
            found=f"{type(error).__name__}: {error}",
            remedy=f"see {LOG} for the whole story; if it is our fault, report it with that",
        )
    return {"event": "error", "error": error.as_json()}


def out_of_memory(error: BaseException) -> bool:
    """Whether an error, ours or a library's, says that memory has run out."""
    if isinstance(error, MemoryError):
        return True
    said_so = ("can't allocate memory", "bad_alloc", "Cannot allocate memory", "bad allocation")
    return isinstance(error, RuntimeError | OSError) and any(w in str(error) for w in said_so)


def _too_large(error: BaseException, stage: str, component: str | None) -> StageError:
    text = str(error).strip().splitlines()
    reason = f": {text[0][:200]}" if text else ""
    return StageError(
        f"stage {stage}" + (f" on {component}" if component else ""),
        expected="to finish within the memory it was given",
        found=f"memory ran out; the process had held {said(peak_memory())}{reason}",
        remedy=OUT_OF_MEMORY,
    )


def _die_with_parent() -> None:
    """Leave no worker behind when the driver is killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Answer requests until standard input ends."""
    _die_with_parent()
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # libraries may print; the protocol has its own descriptor
    sys.stdout = sys.stderr

    def send(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")

    for line in sys.stdin:
        request = canonical.parse(Request, json.loads(line))
        limit_memory(request.memory_limit)
        try:
            answer = run_request(request, lambda text: send({"event": "say", "text": text}))
            send({"event": "done", "answer": canonical.plain(answer)})
        except Exception as error:  # noqa: BLE001 - crosses a process border, cause is kept
            send(error_event(error, request.stage, request.component))


if __name__ == "__main__":
    main()
