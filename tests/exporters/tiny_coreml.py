"""Core ML packages of the tiny network, each converted once for all tests of a process."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from diffoundry.compilers.exported_program_from_torch import trace
from diffoundry.exporters.coreml_from_exported_program import CoremlFromExportedProgram
from diffoundry.formats import exported_program, mlpackage
from diffoundry.runtimes.mil_reference import MilReference
from diffoundry.sessions import CheckedSession, open_session
from diffoundry.types import Array, Artifact, ArtifactType, ShapePolicy, StageContext
from tests.exporters.tiny_tflite import CONTRACT, tiny_network

SIZES = ((16, 16), (24, 16), (16, 32))


def policy(*shapes: tuple[int, int, int]) -> ShapePolicy:
    """An enumeration of (batch, height, width)."""
    named = (dict(zip(("batch", "height", "width"), one, strict=True)) for one in shapes)
    return ShapePolicy("enumerated", tuple(tuple(sorted(one.items())) for one in named))


ENUMERATED = policy(*((1, *size) for size in SIZES))


@functools.cache
def folder() -> Path:
    made = Path(tempfile.mkdtemp(prefix="diffoundry-test-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def work() -> Path:
    """A new empty folder for a stage."""
    return Path(tempfile.mkdtemp(dir=folder()))


@functools.cache
def program(batches: int = 4) -> Artifact:
    """The exported program over batches 1 to `batches`, heights and widths."""
    target = work()
    first, *others = CONTRACT.axes
    contract = dataclasses.replace(
        CONTRACT, axes=(dataclasses.replace(first, max=batches), *others)
    )
    exported_program.save(trace(tiny_network(), contract), target)
    digest = exported_program.digest(target)
    return Artifact(ArtifactType("exported_program"), target, digest, "unet", contract=contract)


@functools.cache
def package(stage: CoremlFromExportedProgram, batches: int = 4) -> Artifact:
    """What `stage` makes. A test that damages it copies it first."""
    return convert(stage, work(), program(batches))


def convert(
    stage: CoremlFromExportedProgram, work: Path, source: Artifact, **more: Artifact
) -> Artifact:
    """Run the stage in `work`, and what the driver does after it."""
    context = StageContext(work, "unet", source.contract, threads=1)
    made = stage.run({"program": source, **more}, context)["model"]
    mlpackage.canonicalise(made.path)
    mlpackage.validate(made.path)
    named = stage.shape_policy.shapes or stage.shape_policy.kind == "dynamic"
    kind = ArtifactType("mlpackage", stage.precision, stage.shape_policy if named else None)
    return Artifact(kind, made.path, mlpackage.digest(made.path), "unet", contract=made.contract)


def opened(artifact: Artifact) -> CheckedSession:
    """The package, opened by the reference interpreter."""
    assert artifact.contract is not None
    return open_session(MilReference(), artifact, artifact.contract)


def psnr_db(reference: Array, found: Array) -> float:
    """Peak = max|reference|."""
    error = math.sqrt(float(np.square(found.astype(np.float64) - reference).mean()))
    return 20 * math.log10(float(np.abs(reference).max()) / max(error, 1e-12))


def feeds_at(shape: Mapping[str, int], seed: int = 0) -> dict[str, Array]:
    """Ordinary inputs, in the package's dtypes."""
    from tests.exporters.tiny_tflite import feeds_at as in_own_dtypes

    feeds = in_own_dtypes(shape, seed)
    return {**feeds, "input_ids": feeds["input_ids"].astype(np.int32)}


def reference(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What PyTorch computes."""
    import torch

    tensors = [torch.from_numpy(feeds["sample"]), torch.from_numpy(feeds["input_ids"]).long()]
    with torch.inference_mode():
        found = tiny_network()(*tensors)
    names = [spec.name for spec in CONTRACT.outputs]
    return {name: value.numpy() for name, value in zip(names, found, strict=True)}
