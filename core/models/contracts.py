"""The declared contract of each component: flat tensors over the axes batch, height, width."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from diffoundry.errors import ModelError
from diffoundry.models.geometry import Geometry
from diffoundry.models.pipeline import PREVIEW, PipelineSource
from diffoundry.types import Axis, AxisRef, Contract, Dim, TensorSpec

BATCH = AxisRef("batch")
RGB = 3


class RequestedAxis(Protocol):
    """An axis as a profile asks for it: pixels, or multiples of the native size."""

    @property
    def unit(self) -> str: ...
    @property
    def min(self) -> float: ...
    @property
    def opt(self) -> float: ...
    @property
    def max(self) -> float: ...


def native_axes(source: PipelineSource, requested: Mapping[str, RequestedAxis]) -> tuple[Axis, ...]:
    """The pipeline's axes (batch, height, width) at the requested sizes.

    `requested` maps an axis to an object with `unit` ("pixels" or "native"), `min`, `opt`, `max`.
    In the unit "native", height and width are fractions of the model's own size and are rounded
    to the nearest legal value; "pixels" must be legal. An axis that is not requested has one
    value: 1, or the native size. Raises ModelError that lists every axis that cannot be taken.
    """
    geometry = source.geometry
    native = {
        "batch": (1, 1),
        "height": (geometry.native_height_pixels, geometry.pixel_multiple_of),
        "width": (geometry.native_width_pixels, geometry.pixel_multiple_of),
    }
    problems = [
        f"unknown axis {name!r} (this model has {', '.join(native)})"
        for name in requested
        if name not in native
    ]
    axes = []
    for name, (size, multiple_of) in native.items():
        found = _axis(name, size, multiple_of, requested.get(name))
        if isinstance(found, Axis):
            axes.append(found)
        else:
            problems += found
    if problems:
        raise ModelError(
            f"axes of {source.path}",
            expected=f"height and width in multiples of {geometry.pixel_multiple_of} pixels",
            found="; ".join(problems),
            remedy="change the axes in the profile",
        )
    return tuple(axes)


def _axis(name: str, native: int, multiple_of: int, requested: Any) -> Axis | list[str]:
    """The axis, or what is wrong with it."""
    if requested is None:
        native = _nearest(native, multiple_of)
        return Axis(name, native, native, native, multiple_of)
    if requested.unit not in ("count", "pixels", "native"):
        return [f"{name}: unknown unit {requested.unit!r} (pixels or native)"]
    values, problems = [], []
    for bound in ("min", "opt", "max"):
        value = getattr(requested, bound)
        if requested.unit == "native" and multiple_of > 1:
            values.append(_nearest(value * native, multiple_of))
            continue
        if value < 1 or value != int(value) or int(value) % multiple_of:
            problems.append(f"{name} {bound}={value} {_legal_neighbours(value, multiple_of)}")
        values.append(int(value))
    if not problems and not values[0] <= values[1] <= values[2]:
        problems.append(f"{name}: min={values[0]}, opt={values[1]}, max={values[2]} do not rise")
    return problems or Axis(name, values[0], values[1], values[2], multiple_of)


def _nearest(value: float, multiple_of: int) -> int:
    return max(1, math.floor(value / multiple_of + 0.5)) * multiple_of


def _legal_neighbours(value: float, multiple_of: int) -> str:
    below = math.floor(value / multiple_of) * multiple_of
    legal = [size for size in (below, below + multiple_of) if size >= multiple_of]
    if multiple_of == 1:
        return "is not a whole number of 1 or more"
    return f"is not a multiple of {multiple_of} (nearest: {' and '.join(map(str, legal))})"


def contract_for(source: PipelineSource, component: str, axes: tuple[Axis, ...]) -> Contract:
    """The contract of `component` over `axes` (of which it keeps those that it has).

    text_encoder: input_ids [batch, tokens] -> prompt_embeds [batch, tokens, text width]
    unet: sample [batch, C, height/f, width/f], timestep [batch], encoder_hidden_states
        [batch, tokens, text width] (, timestep_cond [batch, D]) -> model_output like sample
    vae_encoder: image [batch, 3, height, width] in -1..1 -> latent_mean, latent_std (or latent)
    vae_decoder: latent [batch, C, height/f, width/f] -> image [batch, 3, height, width]
    preview_decoder: the same, of the latent as the U-Net leaves it

    Raises ModelError for an unknown component.
    """
    if component not in source.components:
        raise ModelError(
            f"component {component!r}",
            expected=f"one of {', '.join(source.components)}",
            found=component,
            remedy="choose a component that the pipeline has",
        )
    geometry = source.geometry
    if component == "text_encoder":
        inputs, outputs = _text_encoder(geometry)
    elif component == "unet":
        inputs, outputs = _unet(geometry)
    elif component == "vae_encoder":
        inputs, outputs = _vae_encoder(geometry, source.components[component].class_name)
    elif component == PREVIEW:
        inputs, outputs = _preview_decoder(geometry)
    else:
        inputs, outputs = _vae_decoder(geometry)
    used = {dim.axis for spec in inputs for dim in spec.dims if isinstance(dim, AxisRef)}
    return Contract(component, inputs, outputs, tuple(axis for axis in axes if axis.name in used))


Specs = tuple[TensorSpec, ...]


def _latent_dims(geometry: Geometry) -> tuple[Dim, ...]:
    factor = geometry.vae_factor
    sides = (AxisRef("height", divisor=factor), AxisRef("width", divisor=factor))
    return (BATCH, geometry.latent_channels, *sides)


def _image(description: str) -> TensorSpec:
    return TensorSpec(
        "image", "float32", (BATCH, RGB, AxisRef("height"), AxisRef("width")), description
    )


def _text_encoder(geometry: Geometry) -> tuple[Specs, Specs]:
    dims = (BATCH, geometry.tokens)
    inputs: Specs = (TensorSpec("input_ids", "int64", dims, "token ids, padded"),)
    if geometry.uses_attention_mask:
        inputs += (TensorSpec("attention_mask", "int64", dims, "1 for a token, 0 for padding"),)
    embeds = TensorSpec(
        "prompt_embeds", "float32", (*dims, geometry.text_width), "last hidden state, normed"
    )
    return inputs, (embeds,)


def _unet(geometry: Geometry) -> tuple[Specs, Specs]:
    latent = _latent_dims(geometry)
    text = (BATCH, geometry.tokens, geometry.text_width)
    inputs: Specs = (
        TensorSpec("sample", "float32", latent, "noisy latent, scaled for the step"),
        TensorSpec("timestep", "float32", (BATCH,), "the scheduler's timestep"),
        TensorSpec("encoder_hidden_states", "float32", text, "prompt_embeds"),
    )
    if geometry.guidance_embedding_dim is not None:
        dims = (BATCH, geometry.guidance_embedding_dim)
        inputs += (TensorSpec("timestep_cond", "float32", dims, "embedding of the guidance"),)
    prediction = f"prediction ({geometry.prediction_type})"
    return inputs, (TensorSpec("model_output", "float32", latent, prediction),)


def _vae_encoder(geometry: Geometry, vae_class: str) -> tuple[Specs, Specs]:
    latent = _latent_dims(geometry)
    if vae_class == "AutoencoderTiny":
        outputs: Specs = (TensorSpec("latent", "float32", latent, "unscaled latent"),)
    else:
        outputs = (
            TensorSpec("latent_mean", "float32", latent, "mean of the unscaled latent"),
            TensorSpec("latent_std", "float32", latent, "standard deviation of it"),
        )
    return (_image("RGB in -1..1"),), outputs


def _vae_decoder(geometry: Geometry) -> tuple[Specs, Specs]:
    latent = TensorSpec(
        "latent", "float32", _latent_dims(geometry), "divided by the scaling factor, shifted"
    )
    return (latent,), (_image("RGB in about -1..1"),)


def _preview_decoder(geometry: Geometry) -> tuple[Specs, Specs]:
    latent = TensorSpec("latent", "float32", _latent_dims(geometry), "as the U-Net leaves it")
    return (latent,), (_image("preview: RGB in -1..1, of a smaller decoder"),)
