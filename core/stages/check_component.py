"""The check of one component's engine against its recording."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from diffoundry.discovery import runtime_named
from diffoundry.formats import parity_result, quant_plan, recording, simulation
from diffoundry.formats.kinds import integer_layers_of
from diffoundry.parity.component import check_component
from diffoundry.parity.device import with_device_line
from diffoundry.parity.limits import LOSSLESS
from diffoundry.parity.table import summary
from diffoundry.sessions import Opening, choose_opening
from diffoundry.types import (
    Artifact,
    ArtifactType,
    Limits,
    Memory,
    Precision,
    Produced,
    StageContext,
)


@dataclass(frozen=True)
class CheckComponent:
    """Judges an engine by every check of a component; a failed parity is a result, not an error.

    runtime, device: what opens the engine; where that runtime is deferred here, its stand-in does,
    and a deferred line says so. precision: the variant's; files of two precisions may be equal byte
    for byte, and compute differently. threads: 0 takes the build's number. The optional
    input `reference_engine` is the fp32 artifact of the same export, opened by the same runtime;
    the optional input `simulation` comes with a variant that is lossy on purpose, whose drift from
    the original is held to drift_limits, and `plan` with an INT8 one.
    """

    tools: ClassVar[tuple[str, ...]] = ("numpy",)
    extra: ClassVar[str] = "build"
    memory: ClassVar[Memory] = Memory(libraries=700 << 20, weights=2.1, activations=4)

    runtime: str = "onnx_session"
    device: str = "cpu"
    precision: Precision = "fp32"
    threads: int = 0
    call_limits: Limits = LOSSLESS
    drift_limits: Limits | None = None

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
        compressed = inputs.get("simulation")
        plan = inputs.get("plan")
        recorded = recording.load_component(inputs["recording"].path)

        def opening(artifact: Artifact) -> Opening:
            threads = self.threads or context.threads
            return choose_opening(
                runtime_named, self.runtime, artifact, recorded.contract, self.device, threads
            )

        way = opening(engine)
        result = check_component(
            way.open,
            engine.type,
            way.artifact.contract or recorded.contract,
            recorded,
            self.call_limits,
            opening(reference).open if reference else None,
            simulation=simulation.load(compressed.path) if compressed else None,
            drift_limits=self.drift_limits,
            planned=quant_plan.load(plan.path).layers if plan else None,
            stored=integer_layers_of(way.artifact) if plan else None,
        )
        result = with_device_line(result, [way])
        context.say(summary(result))
        path = context.work / parity_result.FILE
        parity_result.save(result, path)
        return {"parity_result": Produced(path)}
