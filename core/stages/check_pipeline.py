"""The check of a variant's engines together: trajectories and pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from diffoundry.discovery import runtime_named
from diffoundry.formats import parity_result, recording, step_table
from diffoundry.generation import PICTURE_COMPONENTS
from diffoundry.models.pipeline import PREVIEW, open_pipeline
from diffoundry.models.tokenizer import Tokenizer
from diffoundry.parity.device import with_device_line
from diffoundry.parity.pipeline import IMAGE_LIMITS, TRAJECTORY_LIMITS, check_pipeline
from diffoundry.parity.table import summary
from diffoundry.sessions import Opening, choose_opening
from diffoundry.types import (
    Artifact,
    ArtifactType,
    Limits,
    Memory,
    Precision,
    Produced,
    Session,
    StageContext,
)


@dataclass(frozen=True)
class CheckPipeline:
    """Plays every recorded trajectory on the engines; a failed parity is a result, not an error.

    runtime, device: what opens the engines; where that runtime is deferred here, its stand-in
    does, and a deferred line says so. precision: the variant's. threads: 0 takes the build's
    number. The optional input `preview_decoder` adds a line that says what its pictures are worth.
    """

    tools: ClassVar[tuple[str, ...]] = ("numpy", "scikit-image", "tokenizers")
    extra: ClassVar[str] = "build"
    memory: ClassVar[Memory] = Memory(libraries=700 << 20, weights=2.1, activations=4)

    runtime: str = "onnx_session"
    device: str = "cpu"
    precision: Precision = "fp32"
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
        openings = self._openings(inputs, context)
        result = check_pipeline(
            lambda: _open_all(openings),
            Tokenizer.open(source.tokenizer_path, source.geometry.tokens),
            step_table.open_tables(inputs["step_tables"].path),
            source.geometry,
            recording.load_pipeline(inputs["recording"].path),
            self.trajectory_limits,
            self.image_limits,
            context.say,
        )
        result = with_device_line(result, list(openings.values()))
        context.say(summary(result))
        path = context.work / parity_result.FILE
        parity_result.save(result, path)
        return {"parity_result": Produced(path)}

    def _openings(
        self, inputs: Mapping[str, Artifact], context: StageContext
    ) -> Mapping[str, Opening]:
        threads = self.threads or context.threads
        return {
            name: choose_opening(
                runtime_named,
                self.runtime,
                inputs[name],
                context.contracts[name],
                self.device,
                threads,
            )
            for name in (*PICTURE_COMPONENTS, PREVIEW)
            if name in inputs
        }


def _open_all(openings: Mapping[str, Opening]) -> Mapping[str, Session]:
    """Every engine, opened; all are closed again if one does not open."""
    with contextlib.ExitStack() as stack:
        sessions: dict[str, Session] = {}
        for name, opening in openings.items():
            sessions[name] = opening.open()
            stack.callback(sessions[name].close)
        stack.pop_all()
        return sessions
