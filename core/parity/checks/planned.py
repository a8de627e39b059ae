"""The quantization plan against the saved file, and against what the runtime really runs.

Converters fold INT8 weights back to float, or quantize what nobody asked for, without a word; and a
runtime may compute an INT8 layer in float. Both are read back here.
"""

from __future__ import annotations

from diffoundry.parity.subject import Subject
from diffoundry.types import CheckResult, CheckStatus

LEVEL = "plan"
KERNELS = "integer kernels"
INTEGER_SHARE = 0.95
"""Of the layers planned for integer kernels: fewer are stated aloud."""


def check_planned(subject: Subject) -> tuple[CheckResult, ...]:
    """One line for the saved file, one for the kernels."""
    if subject.planned is None:
        return (_line(subject, "saved file", "failed", "no quantization plan is known"),)
    return (_check_file(subject), _check_kernels(subject))


def _check_file(subject: Subject) -> CheckResult:
    """Every planned layer is INT8 in the file, and nothing else is."""
    if subject.stored is None:
        message = "this format's layers cannot be read back: not proven"
        return _line(subject, "saved file", "failed", message)
    wanted = {layer.module for layer in subject.planned or () if layer.integer_weight}
    found = set(subject.stored)
    lost, extra = sorted(wanted - found), sorted(found - wanted)
    words = []
    if lost:
        words.append(f"planned in INT8, but float in the file: {', '.join(lost)}")
    if extra:
        words.append(f"INT8 in the file, but not planned: {', '.join(extra)}")
    values = {"planned": len(wanted), "stored": len(found)}
    status: CheckStatus = "failed" if words else "passed"
    return _line(subject, "saved file", status, "; ".join(words), values)


def _check_kernels(subject: Subject) -> CheckResult:
    wanted = {layer.module for layer in subject.planned or () if layer.integer_kernel}
    used = subject.engine.session.precision_used().get("integer_layers")
    if used is None:
        message = "the runtime does not say which layers it computes in integers"
        return _line(subject, KERNELS, "info", message, {"planned": len(wanted)})
    run = wanted & set(used)
    values = {"planned": len(wanted), "executed": len(run)}
    message = ""
    if len(run) < INTEGER_SHARE * len(wanted):
        idle = sorted(wanted - run)
        message = (
            f"only {len(run)} of {len(wanted)} planned layers run in integer kernels here; "
            f"not {', '.join(idle[:5])}{' …' if len(idle) > 5 else ''}"
        )
    return _line(subject, KERNELS, "info", message, values)


def _line(
    subject: Subject,
    name: str,
    status: CheckStatus,
    message: str,
    values: dict[str, int] | None = None,
) -> CheckResult:
    return CheckResult(
        LEVEL,
        name,
        status,
        subject.component,
        values=values or {},
        message=message,
    )
