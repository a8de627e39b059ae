"""A network of a few layers with what the big ones have, and helpers that run stages on it."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from diffoundry.compilers.exported_program_from_torch import trace
from diffoundry.exporters.onnx_from_exported_program import OnnxFromExportedProgram
from diffoundry.formats import exported_program, recording
from diffoundry.types import (
    Array,
    Artifact,
    ArtifactType,
    Axis,
    AxisRef,
    Contract,
    StageContext,
    TensorSpec,
)

BATCH = AxisRef("batch")
EDGE = (BATCH, 4, AxisRef("height", 4), AxisRef("width", 4))
CONTRACT = Contract(
    "unet",
    (
        TensorSpec("sample", "float32", EDGE),
        TensorSpec("timestep", "float32", (BATCH,)),
        TensorSpec("context", "float32", (BATCH, 5, 8)),
    ),
    (TensorSpec("model_output", "float32", EDGE),),
    (Axis("batch", 1, 1, 4), Axis("height", 8, 16, 64, 8), Axis("width", 8, 16, 64, 8)),
)


class Block(torch.nn.Module):
    """Group norm, convolution, attention to the context."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.GroupNorm(2, 8)
        self.conv = torch.nn.Conv2d(8, 8, 3, padding=1)
        self.query = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.silu(self.conv(self.norm(x)))
        query = self.query(x.flatten(2).transpose(1, 2))[:, None]
        words = context[:, None]
        found = torch.nn.functional.scaled_dot_product_attention(query, words, words)[:, 0]
        return x + found.transpose(1, 2).reshape(x.shape)


class SmallNetwork(torch.nn.Module):
    """A U-Net's inputs and layers. `gain` scales an inner value (to leave fp16's range)."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain
        self.time = torch.nn.Linear(8, 8)
        self.conv_in = torch.nn.Conv2d(4, 8, 3, padding=1)
        self.block = Block()
        self.conv_out = torch.nn.Conv2d(8, 4, 3, padding=1)
        frequencies = torch.exp(-torch.arange(4) * 2.0)
        self.register_buffer("frequencies", frequencies)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor
    ) -> torch.Tensor:
        phase = timestep[:, None] * self.frequencies[None]
        embedding = self.time(torch.cat([phase.sin(), phase.cos()], dim=-1))
        x = self.conv_in(sample) + embedding[:, :, None, None]
        x = (x * self.gain) / self.gain
        return self.conv_out(self.block(x, context))


def small_network(gain: float = 1.0) -> torch.nn.Module:
    """Seeded, in eval mode, without gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SmallNetwork(gain).eval().requires_grad_(False)


def feeds_at(batch: int = 1, height: int = 16, width: int = 16, seed: int = 0) -> dict[str, Array]:
    """Ordinary inputs at one shape."""
    random = np.random.default_rng(seed)
    shape = {"batch": batch, "height": height, "width": width}
    feeds = {
        spec.name: random.standard_normal(spec.shape(shape)).astype(spec.dtype)
        for spec in CONTRACT.inputs
    }
    feeds["timestep"] = random.uniform(500, 999, batch).astype("float32")
    return feeds


def reference(network: torch.nn.Module, feeds: dict[str, Array]) -> Array:
    """What PyTorch computes."""
    with torch.inference_mode():
        return network(*(torch.from_numpy(value) for value in feeds.values())).numpy()


def make_program(folder: Path, gain: float = 1.0) -> Artifact:
    """The exported program of the small network in `folder` / program."""
    target = folder / "program"
    target.mkdir(parents=True)
    exported_program.save(trace(small_network(gain), CONTRACT), target)
    return Artifact(
        ArtifactType("exported_program"), target, exported_program.digest(target), "unet"
    )


def make_recording(folder: Path, gain: float = 1.0) -> Artifact:
    """Three recorded calls of the small network in `folder` / recording."""
    network, calls = small_network(gain), []
    for seed in range(3):
        feeds = feeds_at(seed=seed)
        outputs = {"model_output": reference(network, feeds)}
        calls.append(recording.Call(feeds, outputs, CONTRACT.opt_shape(), "a cat"))
    made = recording.ComponentRecording(
        contract=CONTRACT, calls=tuple(calls), swaps=(), shape_calls=(), floors={}
    )
    recording.save(made, folder / "recording")
    return Artifact(ArtifactType("recording"), folder / "recording", "sha256:0", "unet")


def make_onnx(
    folder: Path, program: Artifact, stage: OnnxFromExportedProgram, **more: Artifact
) -> Artifact:
    """Run the exporting stage in `folder` / onnx."""
    work = folder / "onnx"
    work.mkdir(parents=True)
    context = StageContext(work, "unet", CONTRACT, threads=1)
    produced = stage.run({"program": program, **more}, context)["model"]
    return Artifact(ArtifactType("onnx", stage.precision), produced.path, "sha256:0", "unet")


@functools.cache
def shared_onnx(precision: str = "fp32", external: bool = False) -> Artifact:
    """One exported model for all tests of a process. Tests that damage it copy it first."""
    folder = Path(tempfile.mkdtemp(prefix="diffoundry-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    threshold = 100 if external else 10**9
    stage = OnnxFromExportedProgram(
        precision=precision,  # type: ignore[arg-type]
        external_data_threshold_bytes=threshold,
    )
    return make_onnx(folder, make_program(folder), stage, recording=make_recording(folder))


def copied(artifact: Artifact, folder: Path) -> Artifact:
    """The same artifact in `folder`, to be damaged there."""
    target = folder / "copy"
    shutil.copytree(artifact.path, target)
    return Artifact(artifact.type, target, artifact.digest, artifact.component)
