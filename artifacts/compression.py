"""What the compression records of a bundle say, in the few figures that people compare.

Records are files of a bundle that anyone may have made: what cannot be read counts for nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffoundry.artifacts.bundle import Bundle
from diffoundry.artifacts.manifest import VariantRecord

INTEGER = ("static", "dynamic")
"""Schemes that are meant to be computed in integers."""
Change = tuple[int, int]
"""A count before and after."""


@dataclass(frozen=True)
class Compressed:
    """How one component was made smaller: parameters and multiply-adds of one call before and
    after pruning (None: not pruned), and scheme -> number of layers in the quantization plan.
    `integer_modules` are the layers that it wants in integer kernels."""

    parameters: Change | None = None
    multiply_adds: Change | None = None
    layers: Mapping[str, int] = field(default_factory=dict)
    integer_modules: frozenset[str] = frozenset()

    def as_json(self) -> dict[str, Any]:
        return {
            "parameters": _as_json(self.parameters),
            "multiply_adds": _as_json(self.multiply_adds),
            "layers": dict(self.layers),
        }


def read_compression(bundle: Bundle, variant: VariantRecord) -> dict[str, Compressed]:
    """Component -> what its records say, for those components of the variant that have some."""
    found = {}
    for component in variant.compression:
        plan, prune = bundle.compression(variant, component)
        records = [_document(path) for path in prune]
        layers = _document(plan).get("layers") if plan is not None else None
        found[component] = Compressed(
            _change(records, "parameters"),
            _change(records, "multiply_adds"),
            _schemes(layers),
            _integer_modules(layers),
        )
    return found


def _document(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _change(records: list[Mapping[str, Any]], name: str) -> Change | None:
    """From before the first record to after the last."""
    steps = [step for record in records if isinstance(step := record.get(name), dict)]
    if not steps:
        return None
    before, after = steps[0].get("before"), steps[-1].get("after")
    if isinstance(before, int) and isinstance(after, int):
        return before, after
    return None


def _schemes(layers: Any) -> dict[str, int]:
    if not isinstance(layers, list):
        return {}
    schemes = [one.get("scheme") for one in layers if isinstance(one, dict)]
    return dict(sorted(Counter(str(one) for one in schemes if one is not None).items()))


def _integer_modules(layers: Any) -> frozenset[str]:
    if not isinstance(layers, list):
        return frozenset()
    planned = [one for one in layers if isinstance(one, dict) and one.get("scheme") in INTEGER]
    return frozenset(str(one["module"]) for one in planned if "module" in one)


def _as_json(change: Change | None) -> dict[str, int] | None:
    return None if change is None else {"before": change[0], "after": change[1]}
