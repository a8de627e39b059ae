"""Every recorded call through the engine, output by output, against the recorded outputs.

An engine of a variant that is lossy on purpose is held against the compressed component in PyTorch
(the simulation) instead: within the limits where it computes in floating point; where it computes
in integers, which round differently, its SQNR against the original is at most `MARGIN_DB` below the
simulation's (whose other layers are in float32: where the engine's are in bfloat16, its floor comes
on top).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from diffoundry.formats.recording import Call
from diffoundry.parity.limits import has_limits, judge, strain
from diffoundry.parity.subject import Subject
from diffoundry.quality.differences import measure, pooled_sqnr_db
from diffoundry.types import INT8, Array, CheckResult, Limits, Measure

LEVEL = "call"
MARGIN_DB = 1.0
SINGLE_MARGIN_DB = 3.0
"""Of one call alone, at a shape of its own: a few hundred values, rounded one way or another,
scatter by a decibel or two, and what is asked there is whether the shape works."""


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
        elif subject.simulation is not None and subject.precision in INT8:
            result = _judge_margin(subject, calls, level, spec.name, name)
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


def _judge_margin(
    subject: Subject, calls: Sequence[Call], level: str, output: str, name: str
) -> CheckResult:
    """The engine's SQNR against the original, over all calls, beside the simulation's."""
    wanted = [call.outputs[output] for call in calls]
    found = [_outputs_of(subject, call)[output] for call in calls]
    simulated = [_expected(subject, call)[output] for call in calls]
    engine_db = pooled_sqnr_db(wanted, found)
    simulated_db = _with_rounding(subject, output, pooled_sqnr_db(wanted, simulated))
    margin = MARGIN_DB if len(calls) > 1 else SINGLE_MARGIN_DB
    least = simulated_db - margin
    measures = [measure(one, other) for one, other in zip(wanted, found, strict=True)]
    worst = min(range(len(measures)), key=lambda i: measures[i].sqnr_db)
    shown = dataclasses.replace(measures[worst], sqnr_db=engine_db)
    message = ""
    if not engine_db >= least:
        message = (
            f"sqnr_db {engine_db:.4g} is more than {margin:g} dB below the simulation's "
            f"{simulated_db:.4g}"
        )
    return CheckResult(
        level,
        name,
        "failed" if message else "passed",
        subject.component,
        shown,
        Limits(sqnr_db=least),
        values={
            "calls": len(calls),
            "worst_call": worst,
            "worst_sqnr_db": measures[worst].sqnr_db,
            "simulation_sqnr_db": simulated_db,
        },
        message=message,
    )


def _with_rounding(subject: Subject, output: str, simulated_db: float) -> float:
    """The simulation's SQNR with the noise of layers that the engine computes in bfloat16."""
    if subject.precision != "int8_bf16":
        return simulated_db
    noises = (simulated_db, subject.floors()[output].sqnr_db)
    return -10 * math.log10(sum(10 ** (-decibels / 10) for decibels in noises))


def _measure_call(subject: Subject, call: Call, output: str, floor: float) -> Measure:
    return measure(_expected(subject, call)[output], _outputs_of(subject, call)[output], floor)


def _expected(subject: Subject, call: Call) -> Mapping[str, Array]:
    return subject.simulated(call) or call.outputs


def _outputs_of(subject: Subject, call: Call) -> Mapping[str, Array]:
    outputs = subject.engine.run(call.feeds).outputs
    if outputs is None:
        raise RuntimeError("a call that ran has no outputs any more")
    return outputs
