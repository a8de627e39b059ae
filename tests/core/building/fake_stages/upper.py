"""Writes its input's text in capitals; fails when told to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from diffoundry.types import Artifact, ArtifactType, Produced, StageContext

RUNS: list[str] = []


@dataclass(frozen=True)
class Upper:
    suffix: str = ""
    fail: bool = False
    tools: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = "build"

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        return {"text": (ArtifactType("text"),)}

    def outputs(self) -> Mapping[str, ArtifactType]:
        return {"text": ArtifactType("text")}

    def run(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Produced]:
        RUNS.append(f"{context.component}{self.suffix}")
        context.say("writing")
        if self.fail:
            raise RuntimeError("the converter's own words")
        path = context.work / "out.txt"
        path.write_text(inputs["text"].path.read_text().upper() + self.suffix)
        return {"text": Produced(path)}
