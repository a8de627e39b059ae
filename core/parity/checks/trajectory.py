"""The whole denoising loop on engines, from injected noise: the final latent."""

from __future__ import annotations

from collections.abc import Sequence

from diffoundry.parity.limits import has_limits, judge, strain
from diffoundry.parity.playing import Played
from diffoundry.quality.differences import measure
from diffoundry.types import CheckResult, Limits

LEVEL = "trajectory"


def check_trajectories(played: Sequence[Played], limits: Limits) -> tuple[CheckResult, ...]:
    """One line: the trajectory that uses most of the limits; one that broke fails all."""
    measures = []
    for number, one in enumerate(played):
        if one.latents is None:
            return _failed(limits, f"trajectory {number} ({one.reference.prompt!r}): {one.error}")
        measures.append(measure(one.reference.final_latents, one.latents))
    if not measures:
        return _failed(limits, "the recording holds no trajectory")
    if not has_limits(limits):
        return _failed(limits, "no limit is set, so nothing is proven")
    broken = [judge(one, limits) for one in measures]
    bad = [number for number, words in enumerate(broken) if words]
    worst = max(range(len(measures)), key=lambda i: strain(measures[i], limits))
    message = ""
    if bad:
        message = f"{len(bad)} of {len(measures)} trajectories: " + "; ".join(broken[worst])
    return (
        CheckResult(
            LEVEL,
            "final_latents",
            "failed" if bad else "passed",
            measure=measures[worst],
            limits=limits,
            values={
                "trajectories": len(measures),
                "worst_trajectory": worst,
                "failed_trajectories": bad,
                "steps": played[worst].reference.steps,
                "scheduler": played[worst].reference.scheduler,
            },
            message=message,
        ),
    )


def _failed(limits: Limits, message: str) -> tuple[CheckResult, ...]:
    return (CheckResult(LEVEL, "final_latents", "failed", limits=limits, message=message),)
