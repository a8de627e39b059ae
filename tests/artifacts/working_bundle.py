"""A bundle whose engines run: three hand-made ONNX networks with golden vectors of their own.

The reference is what the engines themselves compute, so a bundle that nobody touched verifies,
and one with another model's engine does not. No torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from diffoundry.artifacts.content import BundleContent, VariantContent
from diffoundry.artifacts.manifest import ModelRecord, SamplingRecord
from diffoundry.formats import recording, step_table
from diffoundry.formats.canonical import sha256_bytes, tree_digest
from diffoundry.formats.recording import (
    Call,
    ComponentRecording,
    Effect,
    Floor,
    PipelineRecording,
    ShapeCall,
    Swap,
    Trajectory,
)
from diffoundry.generation import TextToImage
from diffoundry.models.tokenizer import Tokenizer
from diffoundry.runtimes.onnx_session import OnnxSession
from diffoundry.sampling.noise import draw_initial
from diffoundry.sessions import CheckedSession, open_session
from diffoundry.types import (
    Array,
    Artifact,
    ArtifactType,
    Axis,
    AxisRef,
    Contract,
    Limits,
    ShapePolicy,
    TensorSpec,
)
from tests.artifacts.tiny_bundle import GEOMETRY as TINY
from tests.mini_pipelines import write_tokenizer

VARIANT = "onnx-cpu-fp32"
PROMPT = "a small red circle"
GEOMETRY = dataclasses.replace(TINY, native_height_pixels=24, native_width_pixels=24)
BATCH = AxisRef("batch")
AXES = (Axis("batch", 1, 1, 2), Axis("height", 16, 24, 32, 8), Axis("width", 16, 24, 32, 8))
LATENT = (BATCH, 3, AxisRef("height", 4), AxisRef("width", 4))
TEXT = TensorSpec("prompt_embeds", "float32", (BATCH, 24, 16))
CONTRACTS = {
    "text_encoder": Contract(
        "text_encoder", (TensorSpec("input_ids", "int64", (BATCH, 24)),), (TEXT,), AXES[:1]
    ),
    "unet": Contract(
        "unet",
        (
            TensorSpec("sample", "float32", LATENT),
            TensorSpec("timestep", "float32", (BATCH,)),
            dataclasses.replace(TEXT, name="encoder_hidden_states"),
        ),
        (TensorSpec("model_output", "float32", LATENT),),
        AXES,
    ),
    "vae_decoder": Contract(
        "vae_decoder",
        (TensorSpec("latent", "float32", LATENT),),
        (TensorSpec("image", "float32", (BATCH, 3, AxisRef("height"), AxisRef("width"))),),
        AXES,
    ),
}
NODES: Mapping[str, list[tuple[str, list[str], list[str], dict[str, Any]]]] = {
    "text_encoder": [("Gather", ["embedding", "input_ids"], ["prompt_embeds"], {})],
    "unet": [
        ("ReduceMean", ["encoder_hidden_states", "tokens_axis"], ["text"], {"keepdims": 0}),
        ("MatMul", ["text", "text_weight"], ["text_bias"], {}),
        ("Mul", ["timestep", "time_scale"], ["time"], {}),
        ("Reshape", ["time", "as_column"], ["time_column"], {}),
        ("Add", ["text_bias", "time_column"], ["bias"], {}),
        ("Unsqueeze", ["bias", "pixel_axes"], ["bias_map"], {}),
        ("Add", ["sample", "bias_map"], ["hidden"], {}),
        ("Tanh", ["hidden"], ["active"], {}),
        ("Conv", ["active", "kernel"], ["model_output"], {}),
    ],
    "vae_decoder": [
        ("Resize", ["latent", "", "scales"], ["large"], {"mode": "nearest"}),
        ("Conv", ["large", "kernel"], ["colours"], {}),
        ("Tanh", ["colours"], ["image"], {}),
    ],
}


def write_engine(folder: Path, component: str, seed: int, vocabulary: int) -> Path:
    """One network as `folder`/model.onnx; another seed is another model of the same form."""
    draw = np.random.default_rng(seed)
    weights = {
        "embedding": draw.standard_normal((vocabulary, 16)).astype(np.float32),
        "tokens_axis": np.array([1], np.int64),
        "text_weight": draw.standard_normal((16, 3)).astype(np.float32),
        "time_scale": np.array(0.001, np.float32),
        "as_column": np.array([-1, 1], np.int64),
        "pixel_axes": np.array([2, 3], np.int64),
        "kernel": draw.standard_normal((3, 3, 1, 1)).astype(np.float32) * 0.5,
        "scales": np.array([1, 1, 4, 4], np.float32),
    }
    contract = CONTRACTS[component]
    used = {name for _, names, _, _ in NODES[component] for name in names}
    graph = helper.make_graph(
        [helper.make_node(op, i, o, name=o[0], **more) for op, i, o, more in NODES[component]],
        component,
        [_value(spec) for spec in contract.inputs],
        [_value(spec) for spec in contract.outputs],
        [numpy_helper.from_array(a, name) for name, a in weights.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    return folder


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    kind = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}[spec.dtype]
    dims = [str(dim) if isinstance(dim, AxisRef) else dim for dim in spec.dims]
    return helper.make_tensor_value_info(spec.name, kind, dims)


def working_content(parts: Path, seed: int = 0) -> BundleContent:
    """Engines, golden vectors, step tables and tokenizer, written below `parts`."""
    tokenizer = write_tokenizer(parts / "tokenizer", GEOMETRY.tokens)
    vocabulary = 1 + int(Tokenizer.open(tokenizer, GEOMETRY.tokens).encode("").ids.max())
    kind = ArtifactType("onnx", "fp32", ShapePolicy())
    engines = {}
    for number, name in enumerate(CONTRACTS):
        folder = write_engine(parts / "engines" / name, name, seed + number, vocabulary)
        engines[name] = Artifact(kind, folder, tree_digest(folder), name)
    tables = parts / "steps"
    tables.mkdir()
    step_table.save(step_table.SchedulerTables("ddim", True, {2: _table()}), tables)
    sessions = {
        name: open_session(OnnxSession(), artifact, CONTRACTS[name])
        for name, artifact in engines.items()
    }
    golden = {name: parts / "golden" / name for name in (*CONTRACTS, "pipeline")}
    pipeline = TextToImage(
        sessions,
        Tokenizer.open(tokenizer, GEOMETRY.tokens),
        step_table.open_tables(tables),
        GEOMETRY,
    )
    recording.save(_record_pipeline(pipeline), golden["pipeline"])
    for name, session in sessions.items():
        recording.save(_record(session, name, vocabulary), golden[name])
        session.close()
    limits = {
        "call": Limits(peak_factor=1e-5, cosine=0.99999),
        "trajectory": Limits(max_abs=1e-3),
        "image": Limits(psnr_db=50),
    }
    variant = VariantContent(
        VARIANT, "onnx_session", "cpu", "fp32", ShapePolicy(), engines, limits, "onnx",
        {"onnxruntime": "1.23"},
    )  # fmt: skip
    return BundleContent(
        model=ModelRecord(
            name="hand-made",
            source_digest=sha256_bytes(str(seed).encode()),
            pipeline_class="StableDiffusionPipeline",
            geometry=GEOMETRY,
        ),
        profile="onnx-cpu",
        contracts=CONTRACTS,
        variants=(variant,),
        sampling=SamplingRecord(schedulers=("ddim",), scheduler="ddim", steps=2, guidance=3.0),
        golden=golden,
        step_tables=tables,
        tokenizer=tokenizer,
    )


def _table() -> step_table.StepTable:
    ones = np.ones(2, np.float32)
    columns = ones[:, None]
    return step_table.StepTable(
        "ddim", 2, 1.0, np.array([600, 100], np.float32), ones, 0.9 * columns, -0.4 * columns,
        0 * ones,
    )  # fmt: skip


def _record_pipeline(pipeline: TextToImage) -> PipelineRecording:
    shape = {"batch": 1, "height": 24, "width": 24}
    initial = draw_initial(7, (1, 3, 6, 6))
    latents = pipeline.denoise(PROMPT, steps=2, guidance=3.0, initial_latents=initial)
    image = pipeline.decode(latents)
    one = Trajectory(PROMPT, "", 7, "ddim", 2, 3.0, shape, initial, None, latents, image)
    return PipelineRecording((one,), "evaluation")


def _record(session: CheckedSession, component: str, vocabulary: int) -> ComponentRecording:
    contract = CONTRACTS[component]

    def call(shape: Mapping[str, int], seed: int) -> Call:
        own = {axis.name: shape[axis.name] for axis in contract.axes}
        draw = np.random.default_rng(seed)
        feeds = {s.name: _draw(s, own, draw, vocabulary) for s in contract.inputs}
        return Call(feeds, session.infer(feeds), own, PROMPT)

    usual = {"batch": 1, "height": 24, "width": 24}
    calls = (call(usual, 0), call(usual, 1))
    shapes = [dict(zip(usual, sizes, strict=True)) for sizes in ((1, 16, 16), (2, 32, 32))]
    return ComponentRecording(
        contract,
        calls,
        tuple(_swap(session, calls, spec.name) for spec in contract.inputs),
        tuple(ShapeCall(**vars(call(shape, 2)), traced=True) for shape in shapes),
        {"fp32": {spec.name: Floor(2e-7, 5e-8, 8e-8, 140.0) for spec in contract.outputs}},
    )


def _draw(
    spec: TensorSpec, shape: Mapping[str, int], draw: np.random.Generator, vocabulary: int
) -> Array:
    size = spec.shape(shape)
    if spec.dtype == "int64":
        return draw.integers(0, vocabulary, size)
    if spec.name == "timestep":
        return np.full(size, draw.uniform(0, 1000), np.float32)
    return draw.standard_normal(size).astype(np.float32)


def _swap(session: CheckedSession, calls: tuple[Call, Call], name: str) -> Swap:
    feeds = {**calls[0].feeds, name: calls[1].feeds[name]}
    outputs = session.infer(feeds)
    effects = {}
    for output, before in calls[0].outputs.items():
        change = outputs[output] - before
        effects[output] = Effect(
            float(np.abs(change).max()), float(np.sqrt(np.square(change).mean()))
        )
    largest = max(effect.max_abs for effect in effects.values())
    return Swap(name, 0, feeds, outputs, "real", largest, effects, "call 1")
