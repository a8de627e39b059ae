"""Opens PyTorch and this project's engines for `sd15_speed.py` (see `answering`).

The description: {"kind": "eager", "compiled", "engines" or "bundle", "model": folder,
"what": [...], "threads": 2, "side": 512, "steps": 4}, and for engines {"engines": {component:
folder}}, for a bundle {"folder": ..., "variant": ...}. The runtimes' own adapters open engines.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from answering import Call, Opened, answer_calls, timed

from diffoundry.artifacts.bundle import open_bundle
from diffoundry.benching.measuring import component_call
from diffoundry.choosing import open_variant, text_to_image
from diffoundry.discovery import runtime_named
from diffoundry.formats import step_table
from diffoundry.formats.edges import engine_contract
from diffoundry.generation import PICTURE_COMPONENTS, TextToImage
from diffoundry.models.contracts import contract_for
from diffoundry.models.pipeline import PipelineSource, open_pipeline
from diffoundry.models.tokenizer import Tokenizer
from diffoundry.sampling.probing import probe_scheduler
from diffoundry.sampling.schedulers import fitting
from diffoundry.sessions import CheckedSession, open_session
from diffoundry.types import Array, Artifact, ArtifactType, Axis, Contract, ShapePolicy

PROMPT = "a small red circle on a blue background"
KINDS = {"model.onnx": ("onnx", "onnx_session"), "model.xml": ("openvino", "openvino_session"),
         "model.tflite": ("tflite", "tflite_interpreter")}  # fmt: skip


def contracts_of(source: PipelineSource, side: int) -> dict[str, Contract]:
    """The components' contracts over batch 1 to 4 and every side up to 1024 pixels, or `side`."""
    step = source.geometry.pixel_multiple_of
    sides = (Axis(name, step, side, max(side, 1024), step) for name in ("height", "width"))
    axes = (Axis("batch", 1, 1, 4), *sides)
    return {name: contract_for(source, name, axes) for name in PICTURE_COMPONENTS}


def drawn(contract: Contract, side: int) -> dict[str, Array]:
    """Feeds of one call at `side` pixels, batch 1."""
    draw = np.random.default_rng(0)
    shape = {"batch": 1, "height": side, "width": side}
    feeds: dict[str, Array] = {}
    for spec in contract.inputs:
        size = spec.shape(shape)
        if spec.name == "timestep":
            feeds[spec.name] = np.full(size, 499.0, np.float32)
        elif spec.dtype == "float32":
            feeds[spec.name] = draw.standard_normal(size, np.float32)
        else:
            feeds[spec.name] = draw.integers(0, 1000, size).astype(spec.dtype)
    return feeds


def open_torch(order: Any, contract: Contract, source: PipelineSource) -> CheckedSession:
    """The original, eager or compiled (which the first call pays for)."""
    import torch

    from diffoundry.models.components import load_component
    from diffoundry.runtimes.torch_eager import OpenedModule

    name = contract.component
    module: Any = load_component(source.components[name].folder, name)
    if order["kind"] == "compiled":
        module = torch.compile(module)
    return CheckedSession(OpenedModule(module, contract, "cpu", order["threads"]), contract)


def open_engine(order: Any, contract: Contract) -> CheckedSession:
    """An engine by its runtime's adapter; its kind is what lies in the folder."""
    folder = Path(order["engines"][contract.component])
    file = next(name for name in KINDS if (folder / name).exists())
    kind, runtime = KINDS[file]
    asked = [one for one in ("int8", "bf16") if one in order["name"].lower()]
    precision: Any = "_".join(asked) or "fp32"
    own = engine_contract(contract) if kind == "tflite" else None
    artifact = Artifact(
        ArtifactType(kind, precision, ShapePolicy()), folder, "sha256:", contract.component,
        contract=own,
    )  # fmt: skip
    return open_session(runtime_named(runtime), artifact, contract, "cpu", order["threads"])


def pipeline_of(source: PipelineSource, sessions: Mapping[str, Any], steps: int) -> TextToImage:
    """Text to picture over the sessions, with the model's own scheduler as a step table."""
    with tempfile.TemporaryDirectory(prefix="diffoundry-steps-") as name:
        default = fitting(source.geometry, source.scheduler).default
        table = probe_scheduler(default, source.scheduler, source.pipeline_class, True)
        step_table.save(table, Path(name))
        tables = _Loaded(default, step_table.open_tables(Path(name)).load(default, steps))
    tokenizer = Tokenizer.open(source.path / "tokenizer")
    return TextToImage(sessions, tokenizer, tables, source.geometry)


@dataclass(frozen=True)
class _Loaded:
    """The one table that pictures here are made with."""

    default: str
    table: step_table.StepTable

    def load(self, scheduler: str | None, steps: int) -> step_table.StepTable:
        return self.table


def open_contender(order: dict[str, Any]) -> Opened:
    """Open what the description asks for."""
    warnings.simplefilter("ignore")
    picture = "picture" in order["what"]
    wanted = PICTURE_COMPONENTS if picture else tuple(order["what"])
    if order["kind"] == "bundle":
        return open_bundle_variant(order, wanted)
    source = open_pipeline(Path(order["model"]))
    contracts = contracts_of(source, order["side"])
    sessions: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for name in wanted:
        opening = partial(open_engine, order, contracts[name])
        if order["kind"] != "engines":
            opening = partial(open_torch, order, contracts[name], source)
        sessions[name], seconds[name] = timed(opening)
    return _opened(
        order, sessions, seconds, pipeline_of(source, sessions, order["steps"]) if picture else None
    )


def open_bundle_variant(order: dict[str, Any], wanted: tuple[str, ...]) -> Opened:
    """A variant of a bundle, with whatever engines it has."""
    bundle = open_bundle(Path(order["folder"]))
    variant = bundle.manifest.variant(order["variant"])
    names = tuple(variant.engines) if "picture" in order["what"] else wanted
    sessions: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for name in names:
        opened, seconds[name] = timed(
            partial(open_variant, bundle, variant, (name,), order["threads"])
        )
        sessions.update(opened)
    pipeline = text_to_image(bundle, sessions) if "picture" in order["what"] else None
    return _opened(order, sessions, seconds, pipeline)


def _opened(
    order: dict[str, Any],
    sessions: Mapping[str, Any],
    seconds: Mapping[str, float],
    pipeline: TextToImage | None,
) -> Opened:
    calls: dict[str, Call] = {}
    for what in order["what"]:
        if what != "picture":
            feeds = drawn(sessions[what].contract, order["side"])
            calls[what] = component_call(sessions[what], feeds)
        elif pipeline is not None:
            calls[what] = partial(_picture, pipeline, order)
    return Opened(calls, seconds)


def _picture(pipeline: TextToImage, order: dict[str, Any], seed: int) -> object:
    side = order["side"]
    return pipeline.generate([PROMPT], steps=order["steps"], seed=seed, height=side, width=side)


if __name__ == "__main__":
    answer_calls(open_contender)
