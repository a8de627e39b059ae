"""NaN and infinity anywhere; constant or saturated outputs where the original's are not.

These are the black and blank pictures of other tools. The first node that goes wrong is named
where the format can be probed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffoundry.errors import ModelError
from diffoundry.formats.recording import Call
from diffoundry.parity.blame import find_bad_node
from diffoundry.parity.checks.shape_range import say_shape
from diffoundry.parity.subject import Subject
from diffoundry.types import Array, CheckResult

LEVEL = "sick_numbers"
CONSTANT_SHARE = 0.01
"""Constant: the values spread less than this share of the reference's spread."""

SATURATED_EXCESS = 0.05
"""Saturated: this share more of all values lies at a limit than in the reference."""

SMALLEST_TO_SATURATE = 64
"""Below so many values, two equal ones are a share already."""

PICTURE_OUTPUT = "image"
"""The output whose values are cut at -1 and 1 when a picture is made of them."""


@dataclass(frozen=True)
class Sickness:
    """What is wrong with one output of one call. `kind`: not_finite, constant or saturated."""

    kind: str
    words: str
    call: Call


def check_sick_numbers(subject: Subject) -> tuple[CheckResult, ...]:
    """One line per output, over all recorded calls, swaps and shapes that the engine has."""
    calls = _all_calls(subject)
    lines = []
    for spec in subject.recording.contract.outputs:
        if not calls:
            lines.append(_line(subject, spec.name, "the recording holds no call"))
            continue
        lines.append(_check_output(subject, spec.name, calls))
        lines += _reference_warnings(subject, spec.name, calls)
    return tuple(lines)


def _all_calls(subject: Subject) -> list[Call]:
    recording = subject.recording
    swapped = [
        Call(swap.feeds, swap.outputs, recording.bases[swap.base].shape, swap.value)
        for swap in recording.swaps
        if swap.status != "no_influence"
    ]
    everything = [*recording.calls, *recording.shape_calls, *swapped]
    return [call for call in everything if subject.policy.allows(call.shape)]


def _check_output(subject: Subject, name: str, calls: list[Call]) -> CheckResult:
    sick: list[Sickness] = []
    for call in calls:
        run = subject.engine.run(call.feeds)
        if run.outputs is None:
            return _line(subject, name, f"could not be looked at: {run.error}")
        found = diagnose(name, call.outputs[name], run.outputs[name])
        if found:
            sick.append(Sickness(found[0], found[1], call))
    values: dict[str, Any] = {"calls": len(calls), "sick_calls": len(sick)}
    if not sick:
        return CheckResult(LEVEL, name, "passed", subject.component, values=values)
    first = sick[0]
    sick_feeds = {id(one.call.feeds) for one in sick}
    healthy = next((call.feeds for call in calls if id(call.feeds) not in sick_feeds), None)
    blame = find_bad_node(subject, first.kind, first.call.feeds, healthy)
    message = f"{first.words} at {say_shape(first.call.shape)} in {len(sick)} of {len(calls)} calls"
    return CheckResult(
        LEVEL,
        name,
        "failed",
        subject.component,
        values={**values, "kind": first.kind, **blame.values},
        message=f"{message}; {blame.words}",
    )


def diagnose(name: str, reference: Array, value: Array) -> tuple[str, str] | None:
    """(kind, words) of what is sick in `value` and not in `reference`, or None.

    Both are [batch, …]; every item of the batch is looked at. Raises ModelError where the
    reference itself is not finite.
    """
    if not np.isfinite(reference).all():
        raise ModelError(
            f"the PyTorch reference of {name}",
            expected="finite values",
            found="NaN or infinity",
            remedy="the model itself is at fault: check its weights",
        )
    bad = int(value.size - np.isfinite(value).sum())
    if bad:
        return "not_finite", f"{bad} of {value.size} values are NaN or infinite"
    for item, (wanted, found) in enumerate(zip(reference, value, strict=True)):
        if not is_flat(wanted) and _spread(found) <= CONSTANT_SHARE * _spread(wanted):
            return "constant", f"item {item} is constant, the reference is not"
        excess = saturated_share(name, found) - saturated_share(name, wanted)
        if excess > SATURATED_EXCESS and not is_flat(wanted):
            share = f"{100 * saturated_share(name, found):.0f} %"
            return "saturated", f"{share} of item {item} lies at a limit, the reference does not"
    return None


def is_flat(item: Array) -> bool:
    """Whether the values of an array are all the same, but for rounding."""
    peak = float(np.abs(np.asarray(item, dtype=np.float64)).max(initial=0.0))
    return _spread(item) <= 1e-6 * peak or item.size < 2


def saturated_share(name: str, item: Array) -> float:
    """Share, 0..1, of values at their own extremes, or beyond -1..1 in a picture."""
    if item.size < SMALLEST_TO_SATURATE:
        return 0.0
    at_extremes = float(((item == item.max()) | (item == item.min())).mean())
    if name != PICTURE_OUTPUT:
        return at_extremes
    return max(at_extremes, float((np.abs(item) >= 1).mean()))


def _spread(item: Array) -> float:
    return float(np.asarray(item, dtype=np.float64).std())


def _reference_warnings(subject: Subject, name: str, calls: list[Call]) -> list[CheckResult]:
    """A flat or mostly saturated reference picture is the model's own: said, never decided on."""
    if name != PICTURE_OUTPUT:
        return []
    flat = sum(any(is_flat(item) for item in call.outputs[name]) for call in calls)
    full = sum(
        any(saturated_share(name, item) > 0.5 for item in call.outputs[name]) for call in calls
    )
    words: Mapping[str, int] = {"flat": flat, "mostly saturated": full}
    return [
        CheckResult(
            LEVEL,
            f"{name} of the reference",
            "info",
            subject.component,
            message=f"warning: {count} of {len(calls)} reference pictures are {word}",
        )
        for word, count in words.items()
        if count
    ]


def _line(subject: Subject, name: str, message: str) -> CheckResult:
    return CheckResult(LEVEL, name, "failed", subject.component, message=message)
