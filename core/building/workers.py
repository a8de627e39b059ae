"""The driver's end of a worker process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from diffoundry import errors
from diffoundry.building.worker import LOG, OUT_OF_MEMORY, Answer, Request
from diffoundry.errors import DiffoundryError, StageError
from diffoundry.formats import canonical
from diffoundry.memory import peak_of_process, said

WATCH_SECONDS = 0.2
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "HF_HUB_OFFLINE": "1",
    # A thread that waits for the others by spinning takes the core that they need: beside one other
    # process, a U-Net call on two cores takes 4.8 s so and 3.1 s without; alone 1.6 and 1.7 s.
    "OMP_WAIT_POLICY": "PASSIVE",
}
COMMAND = [sys.executable, "-m", "diffoundry.building.worker"]


class Worker:
    """One process that runs the consecutive stages of one component."""

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                encoding="utf-8",
                env={**os.environ, **ENVIRONMENT},
                start_new_session=True,  # Ctrl-C reaches the driver, which decides
            )
        self._held = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def run(self, request: Request, say: Callable[[str], None]) -> Answer:
        """Send one request and wait for its end. Raises what the stage raised, or StageError."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._held = 0
        try:
            self._process.stdin.write(json.dumps(canonical.plain(request)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._died(request) from error
        for line in self._process.stdout:
            event = json.loads(line)
            if event["event"] == "say":
                say(event["text"])
            elif event["event"] == "done":
                return canonical.parse(Answer, event["answer"])
            else:
                raise as_exception(event["error"], self.log)
        raise self._died(request)

    def _died(self, request: Request) -> StageError:
        code = self._process.wait()
        reason = f"exit code {code}"
        if code < 0:
            reason = f"signal {signal.Signals(-code).name}"
        remedy = f"see {self.log}, then run the same build again: everything finished is kept"
        if code in (-signal.SIGKILL, -signal.SIGABRT):
            held = f", it had held {said(self._held)}" if self._held else ""
            reason += f" (as happens when memory runs out{held})"
            remedy = OUT_OF_MEMORY
        return StageError(
            f"stage {request.stage}" + (f" on {request.component}" if request.component else ""),
            expected="the worker process to finish",
            found=f"it ended by {reason}; its log is {self.log}",
            remedy=remedy,
        )

    def _watch(self) -> None:
        """Note what the process holds at most, for the case that it dies."""
        while self._process.poll() is None:
            self._held = max(self._held, peak_of_process(self._process.pid) or 0)
            time.sleep(WATCH_SECONDS)

    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """End the process once its input is at its end."""
        if self._process.stdin:
            with contextlib.suppress(BrokenPipeError):  # what a dead process did not read
                self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.kill()
        if self._process.stdout:
            self._process.stdout.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def as_exception(data: dict[str, str], log: Path) -> DiffoundryError:
    """Rebuild the error that a worker reported, with its own class and exit code."""
    cls = getattr(errors, str(data["kind"]), StageError)
    return cls(
        data["where"],
        expected=data["expected"],
        found=data["found"],
        remedy=data["what_to_do"].replace(LOG, str(log)),
    )
