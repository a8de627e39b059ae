"""The tables that build and verify print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffoundry.parity.table import COLUMNS, condensed_rows, messages, rows
from diffoundry.types import ParityResult

if TYPE_CHECKING:
    from rich.table import Table

    from diffoundry.building.driver import Outcome

STYLES = {"passed": "green", "failed": "bold red", "deferred": "yellow", "info": "dim"}


def parity_table(results: Sequence[ParityResult], title: str = "", *, full: bool = False) -> Table:
    """A variant's checks: figure, limit, floor, status.

    Unless `full`, checks of one kind on one component that came to the same status share a line,
    which shows the one nearest to its limit.
    """
    from rich.markup import escape
    from rich.table import Table

    table = Table(*COLUMNS, title=title, title_justify="left", box=None, pad_edge=False)
    for row in rows(results) if full else condensed_rows(results):
        style = STYLES.get(row[-1], "")
        status = f"[{style}]{row[-1]}[/]" if style else row[-1]
        table.add_row(*map(escape, row[:-1]), status)
    return table


def parity_notes(results: Sequence[ParityResult]) -> list[str]:
    """What the checks say beside their figures, failures first."""
    return sorted(messages(results), key=lambda line: not line.startswith("failed"))


def stage_table(outcomes: Sequence[Outcome]) -> Table:
    """What the stages that ran have cost."""
    from rich.table import Table

    table = Table("stage", "seconds", "peak MB", "output MB", box=None, pad_edge=False)
    for outcome in outcomes:
        if outcome.entry is not None:
            size = sum(output.size_bytes for output in outcome.entry.outputs.values())
            table.add_row(
                outcome.node.title,
                f"{outcome.entry.seconds:.1f}",
                f"{outcome.entry.peak_memory_bytes / 1e6:.0f}",
                f"{size / 1e6:.1f}",
            )
    return table
