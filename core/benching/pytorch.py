"""The PyTorch original as a contender: eager, compiled, and diffusers' own pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffoundry.artifacts.bundle import Bundle
from diffoundry.benching.request import PictureTask
from diffoundry.errors import ModelError
from diffoundry.formats import recording
from diffoundry.generation import PICTURE_COMPONENTS
from diffoundry.models.pipeline import PipelineSource, open_pipeline
from diffoundry.runtimes.torch_eager import OpenedModule
from diffoundry.sessions import CheckedSession

if TYPE_CHECKING:
    from torch import nn

SAME_MODEL_COSINE = 0.999999
"""Another device's rounding leaves far more; the same model trained a little further, 0.9995."""


def open_sessions(
    bundle: Bundle,
    model: Path,
    device: str,
    threads: int,
    components: tuple[str, ...],
    compiled: bool,
) -> Mapping[str, CheckedSession]:
    """The model's components in float32, as sessions; those of `components` that it has, since a
    preview decoder comes from elsewhere. Compiling waits for the first call.

    Raises ModelError where `model` is not what the bundle was built from.
    """
    import torch

    from diffoundry.models.components import load_component

    source = open_model(bundle, model)
    sessions = {}
    for name in (one for one in components if one in source.components):
        module: nn.Module = load_component(source.components[name].folder, name, dtype="float32")
        if compiled:
            module = torch.compile(module)  # type: ignore[assignment,unused-ignore]
        contract = bundle.contract(name)
        sessions[name] = CheckedSession(OpenedModule(module, contract, device, threads), contract)
    return sessions


def open_model(bundle: Bundle, model: Path) -> PipelineSource:
    """The model's folder, checked to have the sizes of the bundle's. Raises ModelError."""
    source = open_pipeline(model)
    if source.geometry != bundle.manifest.model.geometry:
        raise _another_model(bundle, model, "a model of other sizes")
    return source


def check_same_model(bundle: Bundle, model: Path, sessions: Mapping[str, CheckedSession]) -> None:
    """Raise ModelError where the original does not compute the bundle's golden vectors."""
    for name, session in sessions.items():
        call = recording.load_component(bundle.golden(name)).calls[0]
        for output, found in session.infer(call.feeds).items():
            wanted = np.asarray(call.outputs[output], np.float64).ravel()
            values = np.asarray(found, np.float64).ravel()
            norms = float(np.linalg.norm(wanted) * np.linalg.norm(values))
            if not float(wanted @ values) >= SAME_MODEL_COSINE * norms:
                raise _another_model(bundle, model, f"a {name} that computes something else")


def weight_bytes(bundle: Bundle, model: Path) -> dict[str, int]:
    """Component -> bytes of its weight files; the VAE's stand under its decoder only."""
    source = open_model(bundle, model)
    return {
        name: sum(path.stat().st_size for path in source.components[name].weights)
        for name in PICTURE_COMPONENTS
    }


def diffusers_call(
    model: Path, device: str, task: PictureTask, threads: int
) -> Callable[[int], object]:
    """diffusers' pipeline as its own user calls it, with the scheduler that it comes with."""
    import torch
    from diffusers import DiffusionPipeline

    _silence()
    pipeline = DiffusionPipeline.from_pretrained(
        model, dtype=torch.float32, safety_checker=None, feature_extractor=None
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)

    def call(seed: int) -> object:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return pipeline(
                task.prompt,
                num_inference_steps=task.steps,
                guidance_scale=task.guidance,
                height=task.height,
                width=task.width,
                generator=torch.Generator().manual_seed(seed),
            )
        finally:
            torch.set_num_threads(before)

    return call


def _silence() -> None:
    """No progress bars and hints of the two libraries between our own lines."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for one in (of_diffusers, of_transformers):
        one.set_verbosity_error()
        one.disable_progress_bar()


def _another_model(bundle: Bundle, model: Path, found: str) -> ModelError:
    return ModelError(
        f"model {model}",
        expected=f"the model that the bundle was built from, {bundle.manifest.model.name}",
        found=found,
        remedy="name that model's folder with --model",
    )
