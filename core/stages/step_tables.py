"""Stage: the step tables of every scheduler that fits a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from diffoundry.errors import ModelError
from diffoundry.formats import step_table
from diffoundry.models.pipeline import open_pipeline
from diffoundry.sampling.schedulers import fitting
from diffoundry.types import Artifact, ArtifactType, Memory, Produced, StageContext


@dataclass(frozen=True)
class StepTables:
    """pipeline_files (a diffusers directory) -> a folder of `<scheduler>.safetensors`.

    A scheduler that cannot run the model's configuration is left out, and said so; when it is
    the default one, the build fails with ModelError.
    """

    tools: ClassVar[tuple[str, ...]] = ("torch", "diffusers")
    extra: ClassVar[str] = "build"
    memory: ClassVar[Memory] = Memory(libraries=500 << 20, weights=0, activations=0)

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        return {"pipeline_files": (ArtifactType("pipeline_files"),)}

    def outputs(self) -> Mapping[str, ArtifactType]:
        return {"step_tables": ArtifactType(step_table.KIND)}

    def run(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Produced]:
        from diffoundry.sampling.probing import probe_scheduler

        source = open_pipeline(inputs["pipeline_files"].path)
        fits = fitting(source.geometry, source.scheduler)
        folder = context.work / "step_tables"
        folder.mkdir()
        for name in fits.names:
            default = name == fits.default
            try:
                tables = probe_scheduler(name, source.scheduler, source.pipeline_class, default)
            except ModelError as error:
                if default:
                    raise
                context.say(f"{name} left out: {error.found}")
                continue
            step_table.save(tables, folder)
        return {"step_tables": Produced(folder)}
