"""A runtime that only another host has, and the stand-in that runs its artifacts here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from diffoundry.errors import DeferredError, DiffoundryError
from diffoundry.types import Artifact, ArtifactType, Contract, Runtime, Session, StandIn

NATIVE, UNDERSTUDY = "elsewhere", "understudy"
NOTE = "checked by the understudy, not on the device"


@dataclass
class Elsewhere:
    """Native runtime: deferred while `problem` is set, else it opens what the understudy opens."""

    tools: ClassVar[tuple[str, ...]] = ("numpy",)
    extra: ClassVar[str] = "onnx"
    stand_ins: ClassVar[tuple[str, ...]] = (UNDERSTUDY,)

    understudy: Runtime
    problem: Exception | None = field(
        default_factory=lambda: DeferredError(
            "elsewhere", found="not that host", remedy="use that host"
        )
    )
    damaged: DiffoundryError | None = None
    kinds: tuple[str, ...] = ("onnx",)

    def accepts(self, artifact_type: ArtifactType) -> bool:
        return artifact_type.kind in self.kinds

    def unavailable(self, device: str) -> Exception | None:
        return self.problem

    def open(
        self, artifact: Artifact, contract: Contract, device: str, threads: int = 0
    ) -> Session:
        return self.understudy.open(artifact, contract, "cpu", threads)

    def stand_in(self, artifact: Artifact) -> StandIn | None:
        if self.damaged is not None:
            raise self.damaged
        return StandIn(UNDERSTUDY, artifact, NOTE)


def named(native: Any, understudy: Any) -> Callable[[str], Any]:
    """What stands in for `runtime_named`: the native runtime by every other name."""
    return lambda name: understudy if name == UNDERSTUDY else native
