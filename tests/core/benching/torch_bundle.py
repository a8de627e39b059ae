"""A bundle whose engines are the PyTorch modules of a mini pipeline: real, and made in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diffoundry.artifacts.bundle import Bundle
from diffoundry.artifacts.content import BundleContent, VariantContent
from diffoundry.artifacts.manifest import ModelRecord, SamplingRecord
from diffoundry.artifacts.write_bundle import write_bundle
from diffoundry.formats import recording, step_table
from diffoundry.formats.canonical import sha256_bytes, tree_digest
from diffoundry.formats.recording import (
    Call,
    ComponentRecording,
    PipelineRecording,
    Trajectory,
)
from diffoundry.generation import TextToImage
from diffoundry.models.contracts import contract_for
from diffoundry.models.pipeline import PREVIEW, PipelineSource, open_pipeline
from diffoundry.models.preview import with_preview_decoder
from diffoundry.models.tokenizer import Tokenizer
from diffoundry.runtimes.torch_eager import TorchEager
from diffoundry.sampling.noise import draw_initial, draw_step_noise
from diffoundry.sampling.probing import probe_scheduler, quiet
from diffoundry.sessions import CheckedSession, open_session
from diffoundry.types import Artifact, ArtifactType, Axis, Limits, ShapePolicy

VARIANT = "torch-cpu-fp32"
COMPONENTS = ("text_encoder", "unet", "vae_decoder")
AXES = (Axis("batch", 1, 1, 2), Axis("height", 16, 16, 32, 4), Axis("width", 16, 16, 32, 4))
PROMPT = "a small red circle"


def torch_bundle(folder: Path, model: Path, preview: Path | None = None) -> Bundle:
    """Build it at `folder`/bundle from the mini pipeline at `model`, with the AutoencoderTiny in
    `preview` as its preview decoder where one is named."""
    source, names = open_pipeline(model), COMPONENTS
    if preview is not None:
        source, names = with_preview_decoder(source, preview), (*COMPONENTS, PREVIEW)
    parts = folder / "parts"
    kind = ArtifactType("torch_module", "fp32", ShapePolicy())
    engines = {
        name: Artifact(
            kind, source.components[name].folder, tree_digest(source.components[name].folder), name
        )
        for name in names
    }
    contracts = {name: contract_for(source, name, AXES) for name in names}
    sessions = {name: open_session(TorchEager(), engines[name], contracts[name]) for name in names}
    tables = parts / "steps"
    tables.mkdir(parents=True)
    with quiet():
        step_table.save(
            probe_scheduler("lcm", source.scheduler, source.pipeline_class, True), tables
        )
    tokenizer = Tokenizer.open(source.tokenizer_path, source.geometry.tokens)
    pipeline = TextToImage(sessions, tokenizer, step_table.open_tables(tables), source.geometry)
    golden = {name: parts / "golden" / name for name in (*names, "pipeline")}
    recording.save(_trajectory(pipeline, source), golden["pipeline"])
    for name in names:
        recording.save(_component(sessions[name], tokenizer), golden[name])
    variant = VariantContent(
        VARIANT, "torch_eager", "cpu", "fp32", ShapePolicy(), engines,
        {"call": Limits(cosine=0.999)}, "build", {"torch": "2.9"},
    )  # fmt: skip
    content = BundleContent(
        model=ModelRecord(
            name="mini",
            source_digest=sha256_bytes(b"mini"),
            pipeline_class=source.pipeline_class,
            geometry=source.geometry,
        ),
        profile="torch-cpu",
        contracts=contracts,
        variants=(variant,),
        sampling=SamplingRecord(schedulers=("lcm",), scheduler="lcm", steps=2, guidance=8.5),
        golden=golden,
        step_tables=tables,
        tokenizer=source.tokenizer_path,
    )
    return write_bundle(folder / "bundle", content).bundle


def _trajectory(pipeline: TextToImage, source: PipelineSource) -> PipelineRecording:
    geometry = source.geometry
    shape = {"batch": 1, "height": 16, "width": 16}
    initial = draw_initial(
        7, (1, geometry.latent_channels, 16 // geometry.vae_factor, 16 // geometry.vae_factor)
    )
    noise = draw_step_noise(7, 2, initial.shape)
    latents = pipeline.denoise(
        PROMPT, steps=2, guidance=8.5, initial_latents=initial, step_noise=noise
    )
    image = pipeline.decode(latents)
    one = Trajectory(PROMPT, "", 7, "lcm", 2, 8.5, shape, initial, noise, latents, image)
    return PipelineRecording((one,), "evaluation")


def _component(session: CheckedSession, tokenizer: Tokenizer) -> ComponentRecording:
    contract = session.contract
    shape = contract.opt_shape()
    draw = np.random.default_rng(0)
    feeds = {}
    for spec in contract.inputs:
        if spec.dtype == "int64":
            feeds[spec.name] = tokenizer.encode(PROMPT).ids[None]
        else:
            feeds[spec.name] = draw.standard_normal(spec.shape(shape)).astype(np.float32)
    call = Call(feeds, session.infer(feeds), shape, PROMPT)
    return ComponentRecording(contract, (call,), (), (), {})
