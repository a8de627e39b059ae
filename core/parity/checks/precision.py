"""What the runtime really computes in, read back from it, against what was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from diffoundry.parity.subject import Subject
from diffoundry.types import BF16, CheckResult

LEVEL = "precision"
KEYS = ("compute", "kernels_by_type", "weights")
"""Keys of `Session.precision_used()` that name the types of the arithmetic, the plainest first."""

_NAMES = {
    "float64": "fp64",
    "double": "fp64",
    "f64": "fp64",
    "float32": "fp32",
    "float": "fp32",
    "f32": "fp32",
    "float16": "fp16",
    "f16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "i8": "int8",
    "u8": "int8",
    "uint8": "int8",
}

ALLOWED = {
    "fp32": ("fp64", "fp32"),
    # A CPU stores fp16 and computes in fp32: more exact than asked, which is no loss.
    "fp16": ("fp64", "fp32", "fp16"),
    # Weights are stored in fp16. A processor without such units computes in fp32: more exact, and
    # no proof of bfloat16.
    "bf16": ("fp64", "fp32", "fp16", "bf16"),
    "int8": ("fp64", "fp32", "fp16", "int8"),
    "int8_bf16": ("fp64", "fp32", "bf16", "int8"),
}
"""Precision asked for -> what the runtime may compute in."""


def check_precision(subject: Subject) -> tuple[CheckResult, ...]:
    """One line. What the runtime doesn't say is not a pass.

    Deferred where the arithmetic asked for is not this processor's: what passes here was computed
    in another.
    """
    used = subject.engine.session.precision_used()
    found = compute_precision(used)
    allowed = ALLOWED[subject.precision]
    status: Literal["passed", "failed", "deferred"] = "failed"
    if not found:
        message = f"the runtime does not say what it computes in ({dict(used)!r})"
    elif wrong := sorted(set(found) - set(allowed)):
        message = f"asked for {subject.precision}, the runtime computes in {', '.join(wrong)}"
    elif subject.precision in BF16 and "bf16" not in found:
        status = "deferred"
        message = (
            f"asked for {subject.precision}, this processor has no units for bf16 and computes "
            f"in {', '.join(found)}: complete this check on a host that has them"
        )
    else:
        status, message = "passed", ""
    return (
        CheckResult(
            LEVEL,
            "arithmetic",
            status,
            subject.component,
            values={
                "asked": subject.precision,
                "used": dict(used),
                "computes_in": list(found),
            },
            message=message,
        ),
    )


def compute_precision(used: Mapping[str, Any]) -> tuple[str, ...]:
    """What `used` says about the arithmetic, in Diffoundry's names; TensorFloat-32 counts too."""
    value = next((used[key] for key in KEYS if used.get(key)), ())
    names = [value] if isinstance(value, str) else list(value)
    if names and used.get("tf32") == "on":
        names.append("tf32")
    plain = [str(name).lower().removeprefix("torch.") for name in names]
    return tuple(dict.fromkeys(_NAMES.get(name, name) for name in plain))
