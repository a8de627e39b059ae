"""The check of one component's engine against its recording."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from diffoundry.discovery import runtime_named
from diffoundry.formats import parity_result, recording
from diffoundry.parity.component import check_component
from diffoundry.parity.limits import LOSSLESS
from diffoundry.parity.table import summary
from diffoundry.sessions import open_session
from diffoundry.types import Artifact, ArtifactType, Limits, Produced, StageContext


@dataclass(frozen=True)
class CheckComponent:
    """Judges an engine by every check of a component; a failed parity is a result, not an error.

    runtime, device: what opens the engine. threads: 0 takes the build's number. The optional
    input `reference_engine` is the fp32 artifact of the same export, opened by the same runtime.
    """

    tools: ClassVar[tuple[str, ...]] = ("numpy",)
    extra: ClassVar[str] = "build"

    runtime: str = "onnx_session"
    device: str = "cpu"
    threads: int = 0
    call_limits: Limits = LOSSLESS

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        """An engine of any kind, and the recording of its original."""
        return {"engine": (), "recording": (ArtifactType("recording"),)}

    def outputs(self) -> Mapping[str, ArtifactType]:
        """The result, also where it failed."""
        return {"parity_result": ArtifactType("parity_result")}

    def run(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Produced]:
        """Check. Raises MissingToolError, ModelError, and ArtifactError for a bad recording."""
        engine = inputs["engine"]
        reference = inputs.get("reference_engine")
        recorded = recording.load_component(inputs["recording"].path)
        runtime = runtime_named(self.runtime)
        open_artifact = functools.partial(
            open_session,
            runtime,
            contract=recorded.contract,
            device=self.device,
            threads=self.threads or context.threads,
        )
        result = check_component(
            functools.partial(open_artifact, engine),
            engine.type,
            engine.contract or recorded.contract,
            recorded,
            self.call_limits,
            functools.partial(open_artifact, reference) if reference else None,
        )
        context.say(summary(result))
        path = context.work / parity_result.FILE
        parity_result.save(result, path)
        return {"parity_result": Produced(path)}
