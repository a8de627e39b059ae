"""A network with an int64 input and a wide layer, converted once for all tests of a process."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from diffoundry.compilers.exported_program_from_torch import trace
from diffoundry.exporters.tflite_from_exported_program import TfliteFromExportedProgram
from diffoundry.formats import exported_program
from diffoundry.types import (
    Array,
    Artifact,
    ArtifactType,
    Axis,
    AxisRef,
    Contract,
    ShapePolicy,
    StageContext,
    TensorSpec,
)

BATCH = AxisRef("batch")
EDGE = (BATCH, 4, AxisRef("height", 4), AxisRef("width", 4))
CONTRACT = Contract(
    "unet",
    (TensorSpec("sample", "float32", EDGE), TensorSpec("input_ids", "int64", (BATCH, 5))),
    (TensorSpec("model_output", "float32", EDGE), TensorSpec("words", "float32", (BATCH, 512))),
    (Axis("batch", 1, 1, 4), Axis("height", 8, 16, 64, 8), Axis("width", 8, 16, 64, 8)),
)
USUAL = {"batch": 1, "height": 16, "width": 16}
OTHER = {"batch": 2, "height": 32, "width": 16}
POLICY = ShapePolicy("enumerated", tuple(tuple(sorted(shape.items())) for shape in (USUAL, OTHER)))


class TinyNetwork(torch.nn.Module):
    """Embedding, a wide linear layer, group norm, convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(50, 512)
        self.wide = torch.nn.Linear(512, 512)
        self.narrow = torch.nn.Linear(512, 8)
        self.conv_in = torch.nn.Conv2d(4, 8, 3, padding=1)
        self.norm = torch.nn.GroupNorm(2, 8)
        self.conv_out = torch.nn.Conv2d(8, 4, 3, padding=1)

    def forward(
        self, sample: torch.Tensor, input_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        words = self.wide(self.words(input_ids).mean(1))
        x = self.conv_in(sample) + self.narrow(words)[:, :, None, None]
        return self.conv_out(torch.nn.functional.silu(self.norm(x))), words


def tiny_network() -> torch.nn.Module:
    """Seeded, in eval mode, without gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TinyNetwork().eval().requires_grad_(False)


def feeds_at(shape: Mapping[str, int], seed: int = 0) -> dict[str, Array]:
    """Ordinary inputs at one shape, in the component's own dtypes."""
    random = np.random.default_rng(seed)
    sample, ids = (spec.shape(shape) for spec in CONTRACT.inputs)
    return {
        "sample": random.standard_normal(sample).astype(np.float32),
        "input_ids": random.integers(0, 50, ids, dtype=np.int64),
    }


def on_device(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The same in the engine's dtypes."""
    return {**feeds, "input_ids": feeds["input_ids"].astype(np.int32)}


def reference(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What PyTorch computes."""
    with torch.inference_mode():
        found = tiny_network()(*(torch.from_numpy(value) for value in feeds.values()))
    return {s.name: v.numpy() for s, v in zip(CONTRACT.outputs, found, strict=True)}


def make_program(
    folder: Path, network: torch.nn.Module | None = None, contract: Contract = CONTRACT
) -> Artifact:
    """The exported program of the network in `folder` / program."""
    target = folder / "program"
    target.mkdir(parents=True)
    exported_program.save(trace(network or tiny_network(), contract), target)
    return Artifact(ArtifactType("exported_program"), target, "sha256:0", "unet")


def make_tflite(
    folder: Path,
    stage: TfliteFromExportedProgram,
    program: Artifact | None = None,
    **more: Artifact,
) -> Artifact:
    """Run the stage in `folder` / work."""
    program = program or make_program(folder)
    work = folder / "work"
    work.mkdir(parents=True)
    made = stage.run({"program": program, **more}, StageContext(work, "unet", CONTRACT, threads=1))
    kind = dataclasses.replace(stage.outputs()["model"], shape_policy=stage.shape_policy)
    return Artifact(kind, made["model"].path, "sha256:0", "unet", contract=made["model"].contract)


def shared_tflite(precision: str = "fp32") -> Artifact:
    """One converted model for all tests of a process. Tests that damage it copy it first."""
    return _converted(precision)


@functools.cache
def _converted(precision: str) -> Artifact:
    folder = Path(tempfile.mkdtemp(prefix="diffoundry-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    stage = TfliteFromExportedProgram(POLICY, precision)  # type: ignore[arg-type]
    return make_tflite(folder, stage)


def copied(folder: Path, precision: str = "fp32") -> Artifact:
    """The same artifact in `folder`, to be damaged there."""
    artifact = shared_tflite(precision)
    shutil.copytree(artifact.path, folder / "copy")
    return dataclasses.replace(artifact, path=folder / "copy")
