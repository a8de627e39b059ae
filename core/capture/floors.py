"""The floor of a component: how far rounding alone moves its outputs, per precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from diffoundry.capture.reference import Reference
from diffoundry.formats.recording import Call, Floor
from diffoundry.types import Array

MAX_DB = 300.0


Floors = Mapping[str, Mapping[str, Floor]]
"""Precision -> output -> Floor."""


def measure_floors(
    reference: Reference,
    calls: Sequence[Call],
    say: Callable[[str], None],
    precisions: Collection[str] = ("fp32", "fp16"),
) -> list[Floors]:
    """The floors of each call, at each of `precisions`.

    fp32: the recorded fp32 outputs against float64. fp16, bf16: weights and each operation's
    result rounded so (see `precision.EmulatedHalf`) against the recorded fp32 outputs. Operations
    that overflow fp16 count as kept in fp32, and `say` tells.
    """
    found: list[dict[str, Mapping[str, Floor]]] = []
    overflows = False
    for call in calls:
        floors: dict[str, Mapping[str, Floor]] = {}
        if "fp32" in precisions:
            floors["fp32"] = _compare_all(call.outputs, reference.infer_double(call.feeds))
        if "fp16" in precisions:
            half, overflowed = reference.infer_half(call.feeds)
            floors["fp16"] = _compare_all(half, call.outputs)
            overflows = overflows or overflowed
        if "bf16" in precisions:
            floors["bf16"] = _compare_all(reference.infer_half(call.feeds, "bf16")[0], call.outputs)
        found.append(floors)
    if overflows:
        say(f"{reference.contract.component}: fp16 overflows; parts of it must stay fp32")
    return list(found)


def worst_floors(floors: Sequence[Floors]) -> dict[str, dict[str, Floor]]:
    """The largest figures of each output over several calls."""
    worst: dict[str, dict[str, Floor]] = {}
    for one in floors:
        for precision, outputs in one.items():
            known = worst.setdefault(precision, {})
            for name, floor in outputs.items():
                known[name] = _larger(floor, known.get(name, floor))
    return worst


def _compare_all(measured: Mapping[str, Array], truth: Mapping[str, Array]) -> dict[str, Floor]:
    return {name: compare(array, truth[name]) for name, array in measured.items()}


def _larger(one: Floor, other: Floor) -> Floor:
    return Floor(
        max(one.max_abs, other.max_abs),
        max(one.mean_abs, other.mean_abs),
        max(one.rms, other.rms),
        min(one.sqnr_db, other.sqnr_db),
    )


def compare(measured: Array, truth: Array) -> Floor:
    """Figures of measured − truth, computed in float64."""
    exact = truth.astype(np.float64)
    error = np.abs(measured.astype(np.float64) - exact)
    noise, signal = float(np.mean(error**2)), float(np.mean(exact**2))
    sqnr_db = MAX_DB
    if noise > 0:
        sqnr_db = 10 * math.log10(signal / noise) if signal > 0 else -MAX_DB
    capped_db = max(-MAX_DB, min(MAX_DB, sqnr_db))
    return Floor(float(error.max()), float(error.mean()), math.sqrt(noise), capped_db)
