"""A stage that takes the memory it is told to, and may end as the kernel would end it."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from diffoundry.types import Artifact, ArtifactType, Memory, Produced, StageContext


@dataclass(frozen=True)
class Allocates:
    megabytes: int = 1
    killed: bool = False
    tools: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = "build"
    memory: ClassVar[Memory] = Memory(libraries=5 << 30)

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        return {"text": (ArtifactType("text"),)}

    def outputs(self) -> Mapping[str, ArtifactType]:
        return {"text": ArtifactType("text")}

    def run(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Produced]:
        held = bytearray(b"x") * (self.megabytes << 20)
        if self.killed:
            os.kill(os.getpid(), signal.SIGKILL)
        path = context.work / "out.txt"
        path.write_text(str(len(held)))
        return {"text": Produced(path)}
