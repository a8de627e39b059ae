"""An engine judged by every check of a component, and what to look for in the result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffoundry.formats.recording import ComponentRecording
from diffoundry.parity.component import check_component
from diffoundry.types import Array, ArtifactType, CheckResult, Limits, ParityResult, ShapePolicy
from tests.core.parity import fakes
from tests.core.parity.fakes import CONTRACT, FakeSession


def judge(
    recording: ComponentRecording,
    session: FakeSession,
    policy: ShapePolicy | None = None,
    precision: Any = "fp32",
    fp32: FakeSession | None = None,
    limits: Limits | None = None,
) -> ParityResult:
    return check_component(
        lambda: session,
        ArtifactType("onnx", precision, policy),
        CONTRACT,
        recording,
        limits or Limits(peak_factor=1e-5),
        (lambda: fp32) if fp32 else None,
    )


def lines(result: ParityResult, level: str, status: str = "failed") -> list[CheckResult]:
    return [c for c in result.checks if c.level == level and c.status == status]


def failed_levels(result: ParityResult) -> set[str]:
    return {check.level for check in result.checks if check.status == "failed"}


def drop(name: str) -> Any:
    """Recompute the outputs with one input held at its first recorded value."""
    kept: dict[str, Array] = {}

    def spoil(outputs: dict[str, Array], feeds: Mapping[str, Array]) -> dict[str, Array]:
        value = kept.setdefault(name, feeds[name])
        if value.shape != feeds[name].shape:
            return outputs
        return fakes.original({**feeds, name: value})

    return spoil
