"""How much to cut where: by the damage that was measured, within one target for the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffoundry.errors import StageError


@dataclass(frozen=True)
class Rung:
    """One size that a site may take: `kept` units stay, `damage` is what that alone does to the
    component's outputs (mean square error over their mean square)."""

    kept: int
    damage: float


@dataclass(frozen=True)
class Ladder:
    """The sizes that were tried at one site, from the largest down; `units` is all of it."""

    site: str
    units: int
    unit_cost: float
    rungs: tuple[Rung, ...]


def allocate(ladders: Sequence[Ladder], wanted: float) -> dict[str, int]:
    """Site name -> how many units stay, so that at least `wanted` cost leaves.

    Damages of different sites are taken to add up, as they nearly do while they are small. Each
    step goes down the ladder where it does the least damage for what it saves, jumping over a
    rung where a lower one is the better bargain. Raises StageError where all ladders together
    cannot save as much.
    """
    left = {ladder.site: ladder.units for ladder in ladders}
    most = sum(
        (ladder.units - ladder.rungs[-1].kept) * ladder.unit_cost
        for ladder in ladders
        if ladder.rungs
    )
    # Costs are sums of floats: a share that is met exactly must not fail by the last bit.
    wanted = min(wanted, most) if wanted <= most * (1 + 1e-9) else wanted
    if most < wanted:
        raise StageError(
            "pruning",
            expected=f"blocks that can lose {wanted:,.0f} together",
            found=f"at most {most:,.0f}, with the floor and the keep-list",
            remedy="ask for less, lower the floor, or keep fewer blocks whole",
        )
    saved = 0.0
    while saved < wanted * (1 - 1e-9):
        _, ladder, rung = min(
            (
                (_price(ladder, left[ladder.site], rung), ladder, rung)
                for ladder in ladders
                for rung in ladder.rungs
                if rung.kept < left[ladder.site]
            ),
            key=lambda one: (one[0], one[1].site, one[2].kept),
        )
        saved += (left[ladder.site] - rung.kept) * ladder.unit_cost
        left[ladder.site] = rung.kept
    return left


def _price(ladder: Ladder, now: int, rung: Rung) -> float:
    """Damage added for each unit of cost saved, from `now` units down to the rung."""
    before = next((r.damage for r in ladder.rungs if r.kept == now), 0.0)
    return max(0.0, rung.damage - before) / ((now - rung.kept) * ladder.unit_cost)


def rung_counts(possible: Sequence[int], units: int, floor: float, rungs: int) -> tuple[int, ...]:
    """At most `rungs` of the possible counts, evenly spread, none below `floor` × units."""
    allowed = [count for count in possible if count >= max(1, floor * units)]
    if len(allowed) <= rungs:
        return tuple(allowed)
    step = len(allowed) / rungs
    return tuple(allowed[min(len(allowed) - 1, round((i + 1) * step) - 1)] for i in range(rungs))
