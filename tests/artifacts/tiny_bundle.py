"""A bundle of tiny files that are no real engines: enough for everything but parity."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from diffoundry.artifacts.content import BundleContent, VariantContent
from diffoundry.artifacts.evidence import StageMeasure, VariantEvidence
from diffoundry.artifacts.manifest import ModelRecord, SamplingRecord
from diffoundry.artifacts.write_bundle import Measured
from diffoundry.formats.canonical import sha256_bytes
from diffoundry.models.geometry import Geometry
from diffoundry.types import (
    Artifact,
    ArtifactType,
    Axis,
    AxisRef,
    CheckResult,
    Contract,
    Limits,
    Measure,
    ParityResult,
    ShapePolicy,
    TensorSpec,
)

GEOMETRY = Geometry(
    vae_factor=4,
    latent_channels=3,
    tokens=24,
    text_width=16,
    native_height_pixels=32,
    native_width_pixels=32,
    latent_scaling_factor=0.5,
    latent_shift_factor=0.0,
    prediction_type="epsilon",
    guidance_embedding_dim=None,
    pixel_multiple_of=8,
    is_lcm=False,
)
AXES = (Axis("batch", 1, 1, 4), Axis("height", 16, 32, 64, 8), Axis("width", 16, 32, 64, 8))
IMAGE = (AxisRef("batch"), 3, AxisRef("height"), AxisRef("width"))
LATENT = (AxisRef("batch"), 3, AxisRef("height", 4), AxisRef("width", 4))
CONTRACTS = {
    "text_encoder": Contract(
        "text_encoder",
        (TensorSpec("input_ids", "int64", (AxisRef("batch"), 24)),),
        (TensorSpec("prompt_embeds", "float32", (AxisRef("batch"), 24, 16)),),
        AXES[:1],
    ),
    "vae_decoder": Contract(
        "vae_decoder",
        (TensorSpec("latent", "float32", LATENT),),
        (TensorSpec("image", "float32", IMAGE),),
        AXES,
    ),
}
TYPE = ArtifactType("onnx", "fp32", ShapePolicy())


def write_files(folder: Path, files: Mapping[str, str]) -> Path:
    """Write small text files below `folder`."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def tiny_content(parts: Path, engine: str = "engine", name: str = "tiny") -> BundleContent:
    """The parts of a bundle, written below `parts`."""
    engines = {}
    for component in CONTRACTS:
        folder = write_files(parts / component, {"model.onnx": f"{component} {engine}"})
        digest = sha256_bytes(component.encode())
        engines[component] = Artifact(TYPE, folder, digest, component, lineage=(digest,))
    golden = {
        component: write_files(parts / "golden" / component, {"recording.json": component})
        for component in (*CONTRACTS, "pipeline")
    }
    limits = {"call": Limits(peak_factor=1e-5, cosine=0.99999), "image": Limits(psnr_db=50)}
    variant = VariantContent(
        name="onnx-cpu-fp32",
        runtime="onnx_session",
        device="cpu",
        precision="fp32",
        shape_policy=ShapePolicy(),
        engines=engines,
        limits=limits,
        extra="onnx",
        requires={"onnxruntime": "1.23"},
        notes=("kept in fp32: nothing",),
    )
    return BundleContent(
        model=ModelRecord(
            name=name,
            source_digest=sha256_bytes(b"model"),
            pipeline_class="StableDiffusionPipeline",
            geometry=GEOMETRY,
            left_out=("safety_checker: not part of the engines",),
            licence="Apache-2.0",
        ),
        profile="onnx-cpu",
        contracts=CONTRACTS,
        variants=(variant,),
        sampling=SamplingRecord(
            schedulers=("ddim", "euler"), scheduler="ddim", steps=25, guidance=7.5
        ),
        golden=golden,
        step_tables=write_files(parts / "steps", {"ddim.safetensors": "1"}),
        tokenizer=write_files(parts / "tokenizer", {"vocab.json": "{}", "README.md": "no"}),
        tools={"torch": "2.13.0"},
    )


def tiny_measured() -> Measured:
    """Something measured, for evidence."""
    check = CheckResult(
        "call", "image", "passed", "vae_decoder", Measure(1e-7, 1e-8, 1.0, 120.0, 120.0, 1.0)
    )
    result = ParityResult("vae_decoder", (check,))
    return Measured(
        {"onnx-cpu-fp32": VariantEvidence(results=(result,))},
        (StageMeasure(stage="capture", seconds=1.0, peak_memory_bytes=1),),
    )


def replace_content(content: BundleContent, **changes: object) -> BundleContent:
    return dataclasses.replace(content, **changes)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    """Path in the bundle -> bytes, evidence/ left out."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "evidence" not in path.parts
    }
