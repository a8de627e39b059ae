"""How far a variant that is lossy on purpose is from the original: within the profile's budget."""

from __future__ import annotations

import dataclasses

from diffoundry.parity.limits import has_limits, judge
from diffoundry.parity.subject import Subject
from diffoundry.quality.differences import measure, pooled_sqnr_db
from diffoundry.types import CheckResult, Limits

LEVEL = "drift"


def check_drift(subject: Subject) -> tuple[CheckResult, ...]:
    """One line per output, of a variant that is lossy on purpose: figures over all calls as one.

    SQNR is of all calls together, the other figures are the worst call's. No budget is no pass.
    """
    calls = [c for c in subject.recording.calls if subject.policy.allows(c.shape)]
    runs = [subject.engine.run(call.feeds) for call in calls]
    problem = "" if calls else "the recording holds no call at a shape that this engine has"
    problem = next((run.error for run in runs if run.outputs is None), problem)
    limits = subject.drift_limits or Limits()
    if not has_limits(limits):
        problem = problem or "no budget is set, so nothing is proven"
    if problem:
        return (CheckResult(LEVEL, LEVEL, "failed", subject.component, message=problem),)
    lines = []
    for spec in subject.recording.contract.outputs:
        wanted = [call.outputs[spec.name] for call in calls]
        found = [run.outputs[spec.name] for run in runs if run.outputs is not None]
        each = [measure(one, other) for one, other in zip(wanted, found, strict=True)]
        worst = min(each, key=lambda one: one.sqnr_db)
        pooled = dataclasses.replace(worst, sqnr_db=pooled_sqnr_db(wanted, found))
        broken = judge(pooled, limits)
        lines.append(
            CheckResult(
                LEVEL,
                spec.name,
                "failed" if broken else "passed",
                subject.component,
                pooled,
                limits,
                values={"calls": len(calls), "worst_sqnr_db": worst.sqnr_db},
                message="; ".join(broken),
            )
        )
    return tuple(lines)
