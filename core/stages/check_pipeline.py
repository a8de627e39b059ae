"""The check of a variant's engines together: trajectories and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from diffoundry.discovery import runtime_named
from diffoundry.formats import parity_result, recording, step_table
from diffoundry.generation import PICTURE_COMPONENTS
from diffoundry.models.pipeline import open_pipeline
from diffoundry.models.tokenizer import Tokenizer
from diffoundry.parity.pipeline import IMAGE_LIMITS, TRAJECTORY_LIMITS, check_pipeline
from diffoundry.parity.table import summary
from diffoundry.sessions import open_session
from diffoundry.types import Artifact, ArtifactType, Limits, Produced, Session, StageContext


@dataclass(frozen=True)
class CheckPipeline:
    """Plays every recorded trajectory on the engines; a failed parity is a result, not an error.

    runtime, device: what opens the engines. threads: 0 takes the build's number.
    """

    tools: ClassVar[tuple[str, ...]] = ("numpy", "scikit-image", "tokenizers")
    extra: ClassVar[str] = "build"

    runtime: str = "onnx_session"
    device: str = "cpu"
    threads: int = 0
    trajectory_limits: Limits = TRAJECTORY_LIMITS
    image_limits: Limits = IMAGE_LIMITS

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        """Engines of any kind by component, the recorded trajectories, and what runs them."""
        return {
            **dict.fromkeys(PICTURE_COMPONENTS, ()),
            "recording": (ArtifactType("recording"),),
            "step_tables": (ArtifactType("step_tables"),),
            "pipeline_files": (ArtifactType("pipeline_files"),),
        }

    def outputs(self) -> Mapping[str, ArtifactType]:
        """The result, also where it failed."""
        return {"parity_result": ArtifactType("parity_result")}

    def run(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Produced]:
        """Check. Raises MissingToolError, ModelError, and ArtifactError for a bad input."""
        source = open_pipeline(inputs["pipeline_files"].path)
        result = check_pipeline(
            lambda: self._open(inputs, context),
            Tokenizer.open(source.tokenizer_path, source.geometry.tokens),
            step_table.open_tables(inputs["step_tables"].path),
            source.geometry,
            recording.load_pipeline(inputs["recording"].path),
            self.trajectory_limits,
            self.image_limits,
            context.say,
        )
        context.say(summary(result))
        path = context.work / parity_result.FILE
        parity_result.save(result, path)
        return {"parity_result": Produced(path)}

    def _open(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Session]:
        runtime = runtime_named(self.runtime)
        threads = self.threads or context.threads
        sessions: dict[str, Session] = {}
        try:
            for name in PICTURE_COMPONENTS:
                contract = context.contracts[name]
                sessions[name] = open_session(runtime, inputs[name], contract, self.device, threads)
        except BaseException:
            for session in sessions.values():
                session.close()
            raise
        return sessions
