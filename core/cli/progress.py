"""Shows a build as it goes: a live table on a terminal, plain lines when piped, nothing in JSON."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from diffoundry.building.driver import Event
from diffoundry.cli.console import console

if TYPE_CHECKING:
    from rich.progress import Progress

MARKS = {
    "hit": ("cached", "dim"),
    "done": ("done", "green"),
    "failed": ("FAILED", "red"),
    "skipped": ("skipped", "yellow"),
}


def _title(event: Event) -> str:
    return event.node.title if event.node else ""


def plain_reporter() -> Callable[[Event], None]:
    """One line an event, for logs and CI."""
    started = time.perf_counter()

    def report(event: Event) -> None:
        clock = f"[{time.perf_counter() - started:6.1f}s]"
        if event.kind == "start":
            print(f"{clock} start    {_title(event)}", flush=True)
        elif event.kind in ("say", "note"):
            print(f"{clock}          {_title(event)} {event.text}".rstrip(), flush=True)
        else:
            word = MARKS[event.kind][0]
            seconds = f" {event.seconds:.1f} s" if event.kind == "done" else ""
            print(f"{clock} {word:8} {_title(event)}{seconds}", flush=True)
            if event.text:
                print("           " + event.text.replace("\n", "\n           "), flush=True)

    return report


class LiveReporter:
    """A rich progress display: one line for each running stage, finished ones scroll above."""

    def __init__(self, total: int) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
        )

        self._progress: Progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console(),
            transient=True,
        )
        self._all = self._progress.add_task("build", total=total)
        self._running: dict[str, int] = {}

    def __enter__(self) -> LiveReporter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        node_id = event.node.id if event.node else ""
        if event.kind == "start":
            self._running[node_id] = self._progress.add_task(_title(event), total=1)
        elif event.kind == "say" and node_id in self._running:
            text = f"{_title(event)} [dim]{event.text}[/dim]"
            self._progress.update(self._running[node_id], description=text)  # type: ignore[arg-type]
        elif event.kind == "note":
            self._progress.console.print(event.text, markup=False, highlight=False)
        elif event.kind in MARKS:
            self._finish(event, node_id)

    def _finish(self, event: Event, node_id: str) -> None:
        word, style = MARKS[event.kind]
        seconds = f"{event.seconds:6.1f} s" if event.kind == "done" else " " * 8
        self._progress.console.print(f"[{style}]{word:8}[/] {seconds}  {_title(event)}")
        if event.text:
            self._progress.console.print(event.text, style=style, markup=False)
        if node_id in self._running:
            self._progress.remove_task(self._running.pop(node_id))  # type: ignore[arg-type]
        self._progress.advance(self._all)
