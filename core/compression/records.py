"""Cuts as they stand in surgery.json, and in prune.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diffoundry.compression.pruning import Cut
from diffoundry.models.surgery import Prune

if TYPE_CHECKING:
    from diffoundry.models.pruning import Site


def operation_of(site: Site, kept: Sequence[int]) -> Prune:
    """The entry of surgery.json for a cut."""
    names: dict[str, Any] = {
        kind: f"prune_{kind}" for kind in ("channels", "feed_forward", "heads")
    }
    return Prune(operation=names[site.kind], module=site.module, units=site.units, kept=tuple(kept))


def record_of(cut: Cut) -> dict[str, Any]:
    """The entry of prune.json for a cut."""
    return {
        "kind": cut.site.kind,
        "module": cut.site.module,
        "units": cut.site.units,
        "kept": len(cut.kept),
        "damage": float(f"{cut.damage:.4g}"),
    }
