"""Every declared shape runs and is right; shapes that were not declared are refused.

"Dynamic" engines that only work at the traced size are caught at a shape that was never traced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from diffoundry.formats.recording import Call, ShapeCall
from diffoundry.parity.checks.calls import judge_calls
from diffoundry.parity.subject import Subject
from diffoundry.types import Array, CheckResult, Contract, Shape, ShapePolicy

LEVEL = "shape_range"
NOT_VISITED = "not_visited"
"""Marks, in `CheckResult.values`, a declared size that no build of this profile calls."""


def check_shape_range(subject: Subject) -> tuple[CheckResult, ...]:
    """One line per shape and output, one for what the recording lacks, one per refusal.

    What it lacks because it is too much work for a build is said ("info"): nobody who opens the
    engine can check it either, as there is no reference. Anything else fails.
    """
    contract, policy = subject.recording.contract, subject.policy
    wanted = [call for call in subject.recording.shape_calls if policy.allows(call.shape)]
    results: list[CheckResult] = []
    for call in wanted:
        results += judge_calls(subject, [call], LEVEL, _labels(contract, call))
    results += _coverage(subject, wanted)
    if policy.kind != "dynamic":
        results += [_check_refusal(subject, shape, feeds) for shape, feeds in _others(subject)]
    return tuple(results)


def sizes_not_checked(checks: Iterable[CheckResult]) -> str:
    """ "; NOT checked: batch=4, height=1024": what stands beside "passed"; "" where nothing is."""
    sizes = sorted({one.name.removeprefix("at ") for one in checks if one.values.get(NOT_VISITED)})
    return f"; NOT checked: {', '.join(sizes)}" if sizes else ""


def say_shape(shape: Shape) -> str:
    """ "batch=1 height=64 width=64": the same order everywhere."""
    return " ".join(f"{axis}={value}" for axis, value in sorted(shape.items()))


def _labels(contract: Contract, call: ShapeCall) -> dict[str, str]:
    untraced = "" if call.traced else " (untraced)"
    return {s.name: f"{s.name} at {say_shape(call.shape)}{untraced}" for s in contract.outputs}


def _coverage(subject: Subject, shape_calls: Sequence[ShapeCall]) -> list[CheckResult]:
    """Lines for what was declared and stands in no reference call: it cannot count as proven."""
    left_out = [shape for shape in subject.recording.left_out if subject.policy.allows(shape)]
    lines = []
    for lacking in _uncovered(subject, shape_calls):
        if any(lacking.items() <= shape.items() for shape in left_out):
            message = "not visited: more work than the usual shape, and the model is large"
            name = f"at {say_shape(lacking)}"
            mark = {NOT_VISITED: True}
            lines.append(
                CheckResult(LEVEL, name, "info", subject.component, values=mark, message=message)
            )
        else:
            text = f"no reference call at {say_shape(lacking)}"
            lines.append(_failed(subject, "coverage", text))
    inner = subject.policy.kind == "dynamic" and _has_inner_shape(subject.recording.contract)
    if inner and all(call.traced for call in shape_calls):
        text = "no reference call at a shape that was never traced"
        lines.append(_failed(subject, "coverage", text))
    return lines


def _uncovered(subject: Subject, shape_calls: Sequence[ShapeCall]) -> list[Shape]:
    """The declared shapes, or of a dynamic engine the corners of each axis, without a call."""
    contract, policy = subject.recording.contract, subject.policy
    calls: list[Call] = [*subject.recording.calls, *shape_calls]
    seen = [call.shape for call in calls if policy.allows(call.shape)]
    if policy.kind != "dynamic":
        axes = {axis.name for axis in contract.axes}
        listed = ({k: v for k, v in shape if k in axes} for shape in policy.shapes)
        return [shape for shape in listed if shape not in seen]
    corners = [
        {axis.name: value}
        for axis in contract.axes
        for value in sorted({axis.min, axis.opt, axis.max})
    ]
    return [one for one in corners if not any(one.items() <= shape.items() for shape in seen)]


def _has_inner_shape(contract: Contract) -> bool:
    """Whether some axis has a value that is neither its usual one nor its smallest or largest."""
    return any(
        len(range(axis.min, axis.max + 1, axis.multiple_of)) > len({axis.min, axis.opt, axis.max})
        for axis in contract.axes
    )


def _others(subject: Subject) -> list[tuple[Shape, Mapping[str, Array]]]:
    """Feeds at shapes the engine has not: recorded ones, else one made of zeros."""
    policy = subject.policy
    recorded = [
        (call.shape, call.feeds)
        for call in (*subject.recording.calls, *subject.recording.shape_calls)
        if not policy.allows(call.shape)
    ]
    distinct = {say_shape(shape): (shape, feeds) for shape, feeds in recorded}
    if distinct:
        return list(distinct.values())
    shape = undeclared_shape(subject.recording.contract, policy)
    return [(shape, zero_feeds(subject.recording.contract, shape))]


def undeclared_shape(contract: Contract, policy: ShapePolicy) -> dict[str, int]:
    """A shape the model could take and `policy` does not allow: one step up on some axis."""
    usual = contract.opt_shape()
    axes = sorted(contract.axes, key=lambda axis: axis.name == "batch")
    for steps in range(1, len(policy.shapes) + 2):
        for axis in axes:
            shape = {**usual, axis.name: usual[axis.name] + steps * axis.multiple_of}
            if not policy.allows(shape):
                return shape
    raise RuntimeError("more shapes than the policy has are all allowed by it")


def zero_feeds(contract: Contract, shape: Shape) -> dict[str, Array]:
    """Feeds of zeros at `shape`, for a call that must be refused before it runs."""
    return {spec.name: np.zeros(spec.shape(shape), spec.dtype) for spec in contract.inputs}


def _check_refusal(subject: Subject, shape: Shape, feeds: Mapping[str, Array]) -> CheckResult:
    name = f"refuses {say_shape(shape)}"
    run = subject.engine.run(feeds)
    if run.outputs is not None:
        return _failed(subject, name, "ran at a shape that was not declared")
    if not run.refused:
        return _failed(subject, name, f"broke instead of refusing it in words: {run.error}")
    return CheckResult(LEVEL, name, "passed", subject.component, values={"refusal": run.error})


def _failed(subject: Subject, name: str, message: str) -> CheckResult:
    return CheckResult(LEVEL, name, "failed", subject.component, message=message)
