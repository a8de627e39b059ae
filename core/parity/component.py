"""All checks of one component's engine against its recording."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from diffoundry.formats.quant_plan import LayerPlan
from diffoundry.formats.recording import ComponentRecording
from diffoundry.formats.simulation import Simulation
from diffoundry.parity.checks.calls import LEVEL as CALL, check_calls
from diffoundry.parity.checks.drift import LEVEL as DRIFT, check_drift
from diffoundry.parity.checks.nothing_dropped import LEVEL as NOTHING_DROPPED, check_nothing_dropped
from diffoundry.parity.checks.planned import LEVEL as PLAN, check_planned
from diffoundry.parity.checks.precision import LEVEL as PRECISION, check_precision
from diffoundry.parity.checks.shape_range import LEVEL as SHAPE_RANGE, check_shape_range
from diffoundry.parity.checks.sick_numbers import LEVEL as SICK_NUMBERS, check_sick_numbers
from diffoundry.parity.engine import Engine
from diffoundry.parity.limits import LOSSLESS
from diffoundry.parity.subject import Subject, guarded
from diffoundry.sessions import SessionOnDemand
from diffoundry.types import (
    INT8,
    ArtifactType,
    CheckResult,
    Contract,
    Limits,
    ParityResult,
    Session,
    ShapePolicy,
)

OpenSession = Callable[[], Session]

CHECKS: tuple[tuple[str, Callable[[Subject], tuple[CheckResult, ...]]], ...] = (
    (PRECISION, check_precision),
    (CALL, check_calls),
    (NOTHING_DROPPED, check_nothing_dropped),
    (SHAPE_RANGE, check_shape_range),
    (SICK_NUMBERS, check_sick_numbers),
)
"""In the order of the table."""

INT8_CHECKS: tuple[tuple[str, Callable[[Subject], tuple[CheckResult, ...]]], ...] = (
    (PLAN, check_planned),
)
"""What comes on top for an INT8 engine."""

LOSSY_CHECKS: tuple[tuple[str, Callable[[Subject], tuple[CheckResult, ...]]], ...] = (
    (DRIFT, check_drift),
)
"""What comes on top where a variant is lossy on purpose."""


def check_component(
    open_engine: OpenSession,
    artifact_type: ArtifactType,
    contract: Contract,
    recording: ComponentRecording,
    limits: Limits = LOSSLESS,
    open_fp32: OpenSession | None = None,
    proven_at_build: bool = False,
    simulation: Simulation | None = None,
    drift_limits: Limits | None = None,
    planned: tuple[LayerPlan, ...] | None = None,
    stored: Mapping[str, str] | None = None,
) -> ParityResult:
    """Open an engine, run every check on it, close it.

    `contract` is the engine's own (it may differ from the recording's in dtypes). `open_fp32`
    opens the fp32 artifact of the same export, whose contract is the recording's; of the two
    engines one is open at a time. `simulation` and `drift_limits` come with a variant that is lossy
    on purpose, `planned` and `stored` (see `Subject`) with an INT8 one. An engine that does not
    open has failed; one that this host cannot open is deferred. Raises MissingToolError and
    ModelError.
    """
    subject_name = recording.contract.component
    session, plain = _one_open_at_a_time(open_engine, contract, open_fp32, recording.contract)

    def run() -> tuple[CheckResult, ...]:
        session.open()
        subject = Subject(
            engine=Engine(session, contract),
            recording=recording,
            precision=artifact_type.precision or "fp32",
            policy=artifact_type.shape_policy or ShapePolicy(),
            limits=limits,
            fp32_engine=None if plain is None else Engine(plain, recording.contract),
            proven_at_build=proven_at_build,
            simulation=simulation,
            drift_limits=drift_limits,
            planned=planned,
            stored=stored,
        )
        return check_subject(subject)

    try:
        checks = guarded("open", subject_name, run)
    finally:
        for one in (session, plain):
            if one is not None:
                one.close()
    return ParityResult(subject_name, checks)


def _one_open_at_a_time(
    open_engine: OpenSession,
    contract: Contract,
    open_fp32: OpenSession | None,
    fp32_contract: Contract,
) -> tuple[SessionOnDemand, SessionOnDemand | None]:
    """Sessions of which each frees what the other holds before it opens: that may be gigabytes."""
    if open_fp32 is None:
        return SessionOnDemand(open_engine, contract), None

    def opening(way: OpenSession, other: Callable[[], SessionOnDemand]) -> OpenSession:
        def alone() -> Session:
            other().pause()
            return way()

        return alone

    session = SessionOnDemand(opening(open_engine, lambda: plain), contract)
    plain = SessionOnDemand(opening(open_fp32, lambda: session), fp32_contract)
    return session, plain


def check_subject(subject: Subject) -> tuple[CheckResult, ...]:
    """Every check, each guarded: one that crashes does not hide the others."""
    lines: list[CheckResult] = []
    checks = CHECKS
    checks += INT8_CHECKS if subject.precision in INT8 else ()
    checks += LOSSY_CHECKS if subject.simulation is not None else ()
    for level, check in checks:
        lines += guarded(level, subject.component, functools.partial(check, subject))
    return tuple(lines)
