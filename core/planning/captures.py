"""What a build records of the original: the options of its captures."""

from __future__ import annotations

from typing import Any

from diffoundry.planning.bounds import CALLS, PAIRS, Visits
from diffoundry.planning.graph import Plan
from diffoundry.planning.shapes import named


def capture_options(plan: Plan, visits: Visits, split: str) -> dict[str, Any]:
    """The options of `stages.capture.Capture` for one split; `visits` are the build's shapes, which
    the evaluation split alone goes to."""
    judging, check = plan.judging, plan.profile.check
    # Only of a model whose calls are counted is there a probe.
    evaluation, bounded = split == "evaluation", visits.probe is not None
    pairs = {"evaluation": judging.pairs, "calibration": judging.calibration,
             "tuning": judging.tuning}[split]  # fmt: skip
    max_calls = None if evaluation else check.calibration_calls
    if bounded:
        pairs = pairs[: PAIRS[split]]
        max_calls = min(max_calls or CALLS[split], CALLS[split])
    found = visits if evaluation else Visits((), None)
    return {
        "split": split,
        "pairs": pairs,
        "negative": judging.negative,
        "steps": judging.steps,
        "guidance": judging.guidance,
        "scheduler": judging.scheduler,
        "calls_per_component": check.recorded_trajectories if evaluation else len(pairs),
        **({} if max_calls is None else {"max_calls": max_calls}),
        "shapes": tuple(named(shape) for shape in found.shapes),
        "untraced_shapes": (named(found.untraced),) if found.untraced else (),
        **(_probing(plan, visits) if evaluation and bounded else {}),
    }


def _probing(plan: Plan, visits: Visits) -> dict[str, Any]:
    """What only a large model's evaluation asks for: one small call to measure floors on."""
    lower = any(v.precision != "fp32" for v in plan.profile.variants)
    return {
        "probe": named(visits.probe or {}),
        "precisions": ("fp32", "fp16") if lower else ("fp32",),
        "left_out": tuple(named(shape) for shape in visits.left_out),
    }
