"""Every recorded call through the engine, output by output, against the recorded outputs."""

from __future__ import annotations

from collections.abc import Sequence

from diffoundry.formats.recording import Call
from diffoundry.parity.limits import has_limits, judge, strain
from diffoundry.parity.metrics import measure
from diffoundry.parity.subject import Subject
from diffoundry.types import CheckResult, Measure

LEVEL = "call"


def check_calls(subject: Subject) -> tuple[CheckResult, ...]:
    """One line per output: the worst call's figures, and every call held to the limits."""
    calls = [c for c in subject.recording.calls if subject.policy.allows(c.shape)]
    if not calls:
        message = "the recording holds no call at a shape that this engine has"
        return (CheckResult(LEVEL, LEVEL, "failed", subject.component, message=message),)
    return judge_calls(subject, calls, LEVEL, {})


def judge_calls(
    subject: Subject, calls: Sequence[Call], level: str, labels: dict[str, str]
) -> tuple[CheckResult, ...]:
    """Run `calls` and judge each output over all of them; `labels` maps an output to its name.

    A call without outputs fails every output. The measure shown is of the call that uses most
    of the limits.
    """
    errors = [
        f"call {index}: {run.error}"
        for index, call in enumerate(calls)
        if (run := subject.engine.run(call.feeds)).outputs is None
    ]
    results = []
    for spec in subject.recording.contract.outputs:
        name = labels.get(spec.name, spec.name)
        if errors:
            result = CheckResult(level, name, "failed", subject.component, message=errors[0])
        else:
            result = _judge_output(subject, calls, level, spec.name, name)
        results.append(result)
    return tuple(results)


def _judge_output(
    subject: Subject, calls: Sequence[Call], level: str, output: str, name: str
) -> CheckResult:
    measures = [
        _measure_call(subject, call, output, subject.floor_of(call, output)) for call in calls
    ]
    limits = subject.limits
    broken = [(index, judge(m, limits)) for index, m in enumerate(measures)]
    bad = [index for index, words in broken if words]
    worst = max(range(len(measures)), key=lambda i: strain(measures[i], limits))
    message = ""
    if not has_limits(limits):
        message = "no limit is set, so nothing is proven"
    elif bad:
        message = f"{len(bad)} of {len(calls)} calls: " + "; ".join(dict(broken)[worst])
    return CheckResult(
        level,
        name,
        "failed" if message else "passed",
        subject.component,
        measures[worst],
        limits,
        values={"calls": len(calls), "worst_call": worst, "failed_calls": bad},
        message=message,
    )


def _measure_call(subject: Subject, call: Call, output: str, floor: float) -> Measure:
    outputs = subject.engine.run(call.feeds).outputs
    if outputs is None:
        raise RuntimeError("a call that ran has no outputs any more")
    return measure(call.outputs[output], outputs[output], floor)
