"""Holds measures against limits and says in words which are broken."""

from __future__ import annotations

from diffoundry.types import Limits, Measure

LOSSLESS = Limits(peak_factor=1e-5, floor_factor=10.0)
"""The default: max_abs ≤ max(1e-5 × peak, 10 × floor), the floor at the engine's precision."""

_AT_LEAST = ("cosine", "psnr_db", "sqnr_db")


def judge(measure: Measure, limits: Limits) -> list[str]:
    """Every limit that `measure` breaks, in words; empty where it keeps all of them.

    A limit that was asked for and cannot be judged (no figure) counts as broken.
    """
    broken = []
    allowed = allowed_max_abs(measure, limits)
    if allowed is not None and not measure.max_abs <= allowed:
        broken.append(f"max_abs {measure.max_abs:.3g} is above {allowed:.3g}")
    for name in _AT_LEAST:
        least = getattr(limits, name)
        found = getattr(measure, name)
        if least is not None and not found >= least:
            broken.append(f"{name} {found:.6g} is below {least:.6g}")
    return broken


def allowed_max_abs(measure: Measure, limits: Limits) -> float | None:
    """The largest max_abs that `limits` allow for this peak and floor; None where unlimited."""
    allowed = limits.max_abs
    if limits.peak_factor is not None:
        floor = measure.floor or 0.0
        relative = max(limits.peak_factor * measure.peak, limits.floor_factor * floor)
        allowed = relative if allowed is None else min(allowed, relative)
    return allowed


def has_limits(limits: Limits) -> bool:
    """Whether `judge` has anything to hold a measure against."""
    figures = (limits.peak_factor, limits.max_abs, *(getattr(limits, n) for n in _AT_LEAST))
    return any(figure is not None for figure in figures)


def strain(measure: Measure, limits: Limits) -> float:
    """How much of the limits is used up: above 1 where `judge` finds one broken.

    Puts measures of several calls in order, worst last, also where none is broken.
    """
    used = [0.0]
    allowed = allowed_max_abs(measure, limits)
    if allowed is not None:
        used.append(_quotient(measure.max_abs, allowed))
    if limits.cosine is not None:
        used.append(_quotient(1 - measure.cosine, 1 - limits.cosine))
    for name in ("psnr_db", "sqnr_db"):
        least = getattr(limits, name)
        if least is not None:
            used.append(10 ** ((least - getattr(measure, name)) / 20))
    return max(used)


def _quotient(part: float, whole: float) -> float:
    if part <= 0:
        return 0.0
    return part / whole if whole > 0 else float("inf")
