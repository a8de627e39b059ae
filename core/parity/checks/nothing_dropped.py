"""One input exchanged for another value: the engine's outputs must change as the original's do.

An engine that lost an input passes every shape test and often the call check too; here its
output does not move.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from diffoundry.formats.recording import FLOOR_MULTIPLE, Floor, Swap
from diffoundry.parity.engine import Engine
from diffoundry.parity.subject import Subject
from diffoundry.quality.differences import measure
from diffoundry.types import Array, CheckResult, Limits

LEVEL = "nothing_dropped"
COSINE = {"fp32": 0.99, "fp16": 0.99, "bf16": 0.99, "lossy": 0.9}
NORM_TOLERANCE = {"fp32": 0.05, "fp16": 0.05, "bf16": 0.05, "lossy": 0.25}
Grade = Literal["fp32", "fp16", "bf16", "lossy"]
"""What the change is judged as. "lossy": INT8, or smaller on purpose."""


def check_nothing_dropped(subject: Subject) -> tuple[CheckResult, ...]:
    """One line per input of the contract; an input that the recording forgot fails.

    What the engine itself cannot show comes last, on the fp32 engine: only one of the two is open
    at a time, and opening costs seconds.
    """
    names = [spec.name for spec in subject.recording.contract.inputs]
    grade = _grade(subject)
    clear = {name: bool(_deciding(subject, subject.recording.swaps_of(name), grade))
             for name in names}  # fmt: skip
    lines = {}
    for name in sorted(names, key=lambda name: not clear[name]):
        lines[name] = _check_input(subject, name)
    return tuple(lines[name] for name in names)


def _check_input(subject: Subject, name: str) -> CheckResult:
    swaps = subject.recording.swaps_of(name)
    if not swaps:
        return _line(subject, name, "failed", "the recording exchanges this input nowhere")
    if all(swap.status == "no_influence" for swap in swaps):
        return _line(subject, name, "info", "no influence in this model, not even in float64")
    grade = _grade(subject)
    deciding = _deciding(subject, swaps, grade)
    if deciding:
        return _judge(subject, subject.engine, name, deciding, grade, "")
    floor = f"{FLOOR_MULTIPLE:g} × the {grade} floor"
    deciding = _deciding(subject, swaps, "fp32")
    if grade == "fp32" or not deciding:
        return _line(subject, name, "failed", f"no recorded change reaches {floor}: not proven")
    if subject.fp32_engine is None and subject.proven_at_build:
        message = (
            f"every change is below {floor}: not seen here, proven at build on the fp32 engine of "
            "the same export, which this bundle does not hold"
        )
        return _line(subject, name, "info", message)
    if subject.fp32_engine is None:
        message = (
            f"every change is below {floor}, and there is no fp32 engine of the same export to "
            "prove it on"
        )
        return _line(subject, name, "failed", message)
    message = f"proven on the fp32 engine of the same export: every change is below {floor}"
    return _judge(subject, subject.fp32_engine, name, deciding, "fp32", message)


def _grade(subject: Subject) -> Grade:
    precision = subject.precision
    if subject.simulation is not None or precision == "int8" or precision == "int8_bf16":
        return "lossy"
    return precision


def _floors(subject: Subject, grade: Grade) -> Mapping[str, Floor]:
    """Rounding's floors; of a lossy engine, with what the compression changes on top."""
    if grade != "lossy":
        return subject.floors(grade)
    noise = subject.noise()
    return {
        name: dataclasses.replace(floor, rms=max(floor.rms, noise[name]))
        for name, floor in subject.floors().items()
    }


def _deciding(subject: Subject, swaps: Sequence[Swap], grade: Grade) -> list[Swap]:
    """The swaps, of those at shapes the engine has, that stand clear of the floor."""
    floors = _floors(subject, grade)
    return [
        swap
        for swap in swaps
        if subject.policy.allows(subject.recording.bases[swap.base].shape) and swap.decides(floors)
    ]


def _judge(
    subject: Subject,
    engine: Engine,
    name: str,
    swaps: Sequence[Swap],
    grade: Grade,
    note: str,
) -> CheckResult:
    """The worst line of all outputs that `swaps` decide, judged as `grade`."""
    floors = _floors(subject, grade)
    lines = []
    for swap in swaps:
        base = subject.recording.bases[swap.base]
        before, after = engine.run(base.feeds), engine.run(swap.feeds)
        if before.outputs is None or after.outputs is None:
            return _line(subject, name, "failed", before.error or after.error)
        for output in swap.decides(floors):
            wanted = _change(base.outputs[output], swap.outputs[output])
            found = _change(before.outputs[output], after.outputs[output])
            line = _judge_change(wanted, found, grade, floors[output].max_abs)
            values = {
                **line.values,
                "output": output,
                "swap": swap.status,
                "value": swap.value,
                "effect": swap.effect,
                "judged_at": grade,
            }
            words = [f"change of {output}: {line.message}"] if line.message else []
            message = "; ".join([*words, note] if note else words)
            lines.append(
                dataclasses.replace(
                    line, name=name, component=subject.component, values=values, message=message
                )
            )
    return max(lines, key=_badness)


def _judge_change(wanted: Array, found: Array, grade: Grade, floor: float) -> CheckResult:
    measured = measure(wanted, found, floor)
    ratio = _norm_ratio(wanted, found)
    problems = []
    if measured.cosine < COSINE[grade]:
        problems.append(f"cosine {measured.cosine:.4f} is below {COSINE[grade]}")
    if abs(ratio - 1) > NORM_TOLERANCE[grade]:
        problems.append(f"its size is {ratio:.3g} × the reference's")
    return CheckResult(
        LEVEL,
        "",
        "failed" if problems else "passed",
        measure=measured,
        limits=Limits(cosine=COSINE[grade]),
        values={"norm_ratio": ratio, "norm_tolerance": NORM_TOLERANCE[grade]},
        message=" and ".join(problems),
    )


def _badness(line: CheckResult) -> tuple[bool, float]:
    cosine = line.measure.cosine if line.measure else -1.0
    return line.status == "failed", max(1 - cosine, abs(line.values["norm_ratio"] - 1))


def _change(before: Array, after: Array) -> Array:
    return np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)


def _norm_ratio(wanted: Array, found: Array) -> float:
    ratio = float(np.linalg.norm(found) / np.linalg.norm(wanted))
    return ratio if np.isfinite(ratio) else 1e9


def _line(
    subject: Subject, name: str, status: Literal["failed", "info"], message: str
) -> CheckResult:
    return CheckResult(LEVEL, name, status, subject.component, message=message)
