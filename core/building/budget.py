"""What a build may hold in memory: refuse, before it starts, what cannot fit."""

from __future__ import annotations

from collections.abc import Sequence

from diffoundry.building.driver import PlannedRow
from diffoundry.errors import UsageError
from diffoundry.memory import said

LISTED = 6
STEP = 1 << 28


def refuse_what_cannot_fit(rows: Sequence[PlannedRow], budget: int | None) -> None:
    """Raise UsageError that names every stage that must run and is expected to hold more."""
    if budget is None:
        return
    large = [row.node for row in rows if row.status == "miss" and row.node.expected_peak > budget]
    if not large:
        return
    large.sort(key=lambda node: -node.expected_peak)
    listed = [f"{node.title} about {said(node.expected_peak)}" for node in large[:LISTED]]
    more = f", and {len(large) - LISTED} more" if len(large) > LISTED else ""
    enough = -(-large[0].expected_peak // STEP) * STEP
    raise UsageError(
        "--memory-budget",
        expected=f"stages that hold at most {said(budget)}",
        found=", ".join(listed) + more,
        remedy=f"--memory-budget {enough / (1 << 30):g}GiB would do; or leave components out "
        "(--component), make the usual shape smaller in the profile, or take another target",
    )
