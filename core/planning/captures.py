"""What a build records of the original: the options of its captures."""

from __future__ import annotations

from typing import Any

from diffoundry.capture.asked import DEFAULT_PRECISIONS
from diffoundry.planning.bounds import CALLS, PAIRS, Visits
from diffoundry.planning.graph import Plan
from diffoundry.planning.shapes import named
from diffoundry.types import BF16


def capture_options(plan: Plan, visits: Visits, split: str) -> dict[str, Any]:
    """The options of `stages.capture.Capture` for one split; `visits` are the build's shapes, which
    the evaluation split alone goes to."""
    judging, check = plan.judging, plan.profile.check
    # Only of a model whose calls are counted is there a probe.
    evaluation, bounded = split == "evaluation", visits.probe is not None
    pairs = {"evaluation": judging.pairs, "calibration": judging.calibration,
             "tuning": judging.tuning}[split]  # fmt: skip
    max_calls = None if evaluation else check.calibration_calls
    texts: tuple[str, ...] = ()
    if bounded:
        texts = tuple(prompt for prompt, _ in pairs)
        pairs = pairs[: PAIRS[split]]
        texts = texts[len(pairs) :]
        max_calls = min(max_calls or CALLS[split], CALLS[split])
    found = visits if evaluation else Visits((), None)
    return {
        "split": split,
        "pairs": pairs,
        **({"texts": texts} if texts else {}),
        "negative": judging.negative,
        "steps": judging.steps,
        "guidance": judging.guidance,
        "scheduler": judging.scheduler,
        "calls_per_component": check.recorded_trajectories if evaluation else len(pairs),
        **({} if max_calls is None else {"max_calls": max_calls}),
        "shapes": tuple(named(shape) for shape in found.shapes),
        "untraced_shapes": (named(found.untraced),) if found.untraced else (),
        **(_probing(visits) if evaluation and bounded else {}),
        **(_precisions(plan, bounded) if evaluation else {}),
    }


def _probing(visits: Visits) -> dict[str, Any]:
    """What only a large model's evaluation asks for: one small call to measure floors on."""
    return {
        "probe": named(visits.probe or {}),
        "left_out": tuple(named(shape) for shape in visits.left_out),
    }


def _precisions(plan: Plan, bounded: bool) -> dict[str, Any]:
    """Whose floors, where they are not those that every recording has: a large model is called for
    no floor that nothing needs, and bfloat16's is measured where a variant computes in it."""
    built = {variant.precision for variant in plan.profile.variants}
    halves = {"fp16": not bounded or built != {"fp32"}, "bf16": not built.isdisjoint(BF16)}
    found = ("fp32", *(name for name, wanted in halves.items() if wanted))
    return {} if found == DEFAULT_PRECISIONS and not bounded else {"precisions": found}
