"""A component of a mini pipeline with recorded calls, as the inputs of compressing stages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from diffoundry.compilers.exported_program_from_torch import trace
from diffoundry.formats import exported_program, recording
from diffoundry.formats.recording import Call, ComponentRecording
from diffoundry.models.components import load_component
from diffoundry.models.contracts import contract_for, native_axes
from diffoundry.models.pipeline import open_pipeline
from diffoundry.types import Artifact, ArtifactType, StageContext


class MiniComponent:
    """`inputs` by the names that stages use; `context(name)` makes a fresh work folder."""

    def __init__(self, pipeline: Path, folder: Path, component: str = "unet", calls: int = 5):
        source = open_pipeline(pipeline)
        self.folder, self.component = folder, component
        self.contract = contract_for(source, component, native_axes(source, {}))
        self.path = source.components[component].folder
        self.module = load_component(self.path, component)
        self.inputs = {"module": self.artifact("torch_module", self.path)}
        for number, split in enumerate(("calibration", "tuning", "recording")):
            self.give_calls(split, self.calls(calls, number))

    def artifact(self, kind: str, path: Path) -> Artifact:
        return Artifact(ArtifactType(kind), path, "sha256:0", self.component)

    def give_calls(self, name: str, calls) -> None:
        """Record `calls` as the input `name`."""
        path = self.folder / name
        recording.save(ComponentRecording(self.contract, tuple(calls), (), (), {}), path)
        self.inputs[name] = self.artifact("recording", path)

    def give_program(self) -> None:
        """Trace the module as the input `program`."""
        path = self.folder / "program"
        path.mkdir()
        exported_program.save(trace(self.module, self.contract), path)
        self.inputs["program"] = self.artifact("exported_program", path)

    def only(self, stage) -> dict[str, Artifact]:
        return {name: self.inputs[name] for name in stage.inputs()}

    def context(self, name: str = "work", **more) -> StageContext:
        work = self.folder / name
        work.mkdir()
        return StageContext(work, self.component, self.contract, threads=1, **more)

    def run(self, stage, name: str = "work", **more):
        """The stage's paths by output name."""
        made = stage.run(self.only(stage), self.context(name, **more))
        return {output: produced.path for output, produced in made.items()}

    def calls(self, count: int, seed: int) -> list[Call]:
        rng = np.random.default_rng(seed)
        shape = self.contract.opt_shape()
        made = []
        for _ in range(count):
            feeds = {}
            for spec in self.contract.inputs:
                size = spec.shape(shape)
                if spec.dtype == "int64":
                    feeds[spec.name] = rng.integers(0, 10, size)
                elif spec.name == "timestep":
                    feeds[spec.name] = rng.uniform(0, 999, size).astype(np.float32)
                else:
                    feeds[spec.name] = rng.normal(size=size).astype(np.float32)
            made.append(Call(feeds, self.answer(self.module, feeds), shape, ""))
        return made

    def answer(self, module, feeds):
        inputs = (torch.from_numpy(np.array(feeds[s.name])) for s in self.contract.inputs)
        with torch.no_grad():
            made = module(*inputs)
        outputs = made if isinstance(made, tuple) else (made,)
        return {s.name: o.numpy() for s, o in zip(self.contract.outputs, outputs, strict=True)}
