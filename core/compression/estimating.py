"""What every estimator of a quantization plan shares: settings, calls that will do, the plan."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from diffoundry.compression.layers import (
    KEEP,
    Kind,
    WeightMethod,
    corrected_bias,
    find_layers,
    outline,
    weight_scale,
)
from diffoundry.compression.ranges import RangeMethod, Seen, span_of
from diffoundry.errors import StageError
from diffoundry.formats.quant_plan import LayerPlan, QuantPlan, Range, Scheme
from diffoundry.formats.recording import spread
from diffoundry.types import Array

if TYPE_CHECKING:
    import torch

    from diffoundry.formats.recording import Call

MIN_CALLS = 4
"""Calls that differ, below which ranges are guesses."""

MIN_LARGE_CALLS = 2
LARGE_VALUES = 1 << 14
"""As many calls do where each brings a latent or picture of so many values (64 × 64 × 4)."""


@dataclass(frozen=True)
class PlanSettings:
    """How a plan is made. See `QuantizeFx` for the fields."""

    conv: Scheme = "static"
    linear: Scheme = "static"
    embedding: Scheme = "weight_only"
    keep: tuple[str, ...] = KEEP
    in_float: tuple[str, ...] = ()
    ranges: RangeMethod = "minmax"
    percentile: float = 99.99
    weight_ranges: WeightMethod = "minmax"
    symmetric: bool = False
    quantize_outputs: tuple[Kind, ...] = ()
    outputs_of: tuple[str, ...] = ()
    bias_correction: bool = False


def check_settings(settings: PlanSettings, where: str) -> None:
    """Raise StageError for what no runtime can do."""
    problems = []
    if settings.embedding not in ("weight_only", "float"):
        problems.append(f"embedding = {settings.embedding!r} (a table has no activation)")
    if not 50 < settings.percentile <= 100:
        problems.append(f"percentile = {settings.percentile}")
    if problems:
        raise StageError(where, expected="options that can be met", found="; ".join(problems),
                         remedy="correct the stage's options in the profile")  # fmt: skip


def check_calls(calls: Sequence[Call], where: str) -> None:
    """Raise StageError where there are too few calls, or too many are equal."""
    distinct, least = _distinct(calls), least_calls(calls)
    if distinct < least:
        raise StageError(
            f"{where}: the calibration recording",
            expected=f"at least {least} calls that differ",
            found=f"{len(calls)} calls, {distinct} of them different",
            remedy="give more calibration prompts, and different ones "
            "(check.calibration_pairs, check.calibration_calls in the profile)",
        )


def least_calls(calls: Sequence[Call]) -> int:
    """How many calls that differ make a calibration set: fewer where each is large."""
    sizes = [max(value.size for value in call.feeds.values()) for call in calls]
    return MIN_LARGE_CALLS if sizes and min(sizes) >= LARGE_VALUES else MIN_CALLS


def affordable(calls: Sequence[Call], multiply_adds: float, most: float) -> list[Call]:
    """As many calls, evenly spread, as `most` multiply-adds allow at `multiply_adds` a call; never
    fewer than make a calibration set."""
    count = min(len(calls), most / max(multiply_adds, 1.0))
    return spread(calls, max(least_calls(calls), int(count)))


def _distinct(calls: Sequence[Call]) -> int:
    seen: list[Mapping[str, Array]] = []
    for call in calls:
        if not any(all(np.array_equal(call.feeds[k], s[k]) for k in s) for s in seen):
            seen.append(call.feeds)
        if len(seen) >= MIN_CALLS:
            break
    return len(seen)


def draft(module: torch.nn.Module, settings: PlanSettings) -> tuple[LayerPlan, ...]:
    """The layers without ranges."""
    schemes: dict[Kind, Scheme] = {
        "conv": settings.conv,
        "linear": settings.linear,
        "embedding": settings.embedding,
    }
    return outline(find_layers(module), schemes, settings.keep, settings.in_float,
                   settings.symmetric)  # fmt: skip


def complete(
    tensors: Mapping[str, torch.Tensor],
    component: str,
    estimator: str,
    settings: PlanSettings,
    layers: Sequence[LayerPlan],
    taken: Mapping[str, Seen],
    given: Mapping[str, Seen],
) -> QuantPlan:
    """The plan from a draft and what was seen; `tensors` is the component's state dict.

    Raises StageError for values that are not finite, with the names of all such layers.
    """
    refuse_sick(component, estimator, taken)
    outputs = with_outputs(layers, settings)
    made, scales = [], {}
    for layer in layers:
        if layer.integer_weight:
            weight = tensors[f"{layer.module}.weight"].detach().numpy()
            scale = weight_scale(weight, settings.weight_ranges)
            scales[f"{layer.module}.weight_scale"] = scale
            if settings.bias_correction and layer.module in taken:
                own, mean = tensors.get(f"{layer.module}.bias"), taken[layer.module].mean
                bias = None if own is None else own.detach().numpy()
                scales[f"{layer.module}.bias"] = corrected_bias(weight, scale, bias, mean)
        seen = {layer.module: given[layer.module]} if layer.module in outputs else {}
        made.append(_with_ranges(layer, settings, taken, seen))
    return QuantPlan(component, estimator, _fields(settings), tuple(made), scales)


def _with_ranges(
    layer: LayerPlan,
    settings: PlanSettings,
    taken: Mapping[str, Seen],
    given: Mapping[str, Seen],
) -> LayerPlan:
    def span(seen: Seen) -> Any:
        return span_of(seen, settings.ranges, settings.percentile, layer.symmetric)

    if layer.scheme == "static":
        seen = taken[layer.module]
        why = f"{layer.why}; its input is constant" if seen.constant else layer.why
        layer = dataclasses.replace(layer, activation=span(seen), why=why)
        if layer.module in given:
            found = span(given[layer.module])
            if _named(layer, settings):
                # A product of two activations is one of integers only where both are signed: a
                # grid of -128..127 steps.
                most = max(-found.low, found.high * 128 / 127)
                found = Range(-most, most * 127 / 128)
            layer = dataclasses.replace(layer, output=found)
    return layer


def with_outputs(layers: Sequence[LayerPlan], settings: PlanSettings) -> frozenset[str]:
    """The static layers whose outputs are put on a grid too. Raises StageError for a pattern of
    `outputs_of` that meets none."""
    static = [layer for layer in layers if layer.scheme == "static"]
    idle = [p for p in settings.outputs_of
            if not any(fnmatch.fnmatchcase(one.module, p) for one in static)]  # fmt: skip
    if idle:
        raise StageError(
            "quantization: outputs_of",
            expected="patterns that meet a static layer",
            found=f"none for {', '.join(idle)}",
            remedy=f"layers are called like {static[0].module if static else 'none'}",
        )
    return frozenset(
        one.module
        for one in static
        if one.kind in settings.quantize_outputs or _named(one, settings)
    )


def _named(layer: LayerPlan, settings: PlanSettings) -> bool:
    return any(fnmatch.fnmatchcase(layer.module, p) for p in settings.outputs_of)


def _fields(settings: PlanSettings) -> dict[str, Any]:
    return {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}


def refuse_sick(component: str, estimator: str, taken: Mapping[str, Seen]) -> None:
    """Raise StageError that names every layer which took a value that is not finite."""
    sick = [name for name, s in taken.items() if not (np.isfinite(s.low) and np.isfinite(s.high))]
    if sick:
        raise StageError(
            f"{estimator}: {component}",
            expected="finite inputs of every layer on the calibration calls",
            found=f"NaN or infinity in {', '.join(sick)}",
            remedy="the model itself is at fault there; leave such layers in_float, or repair it",
        )
