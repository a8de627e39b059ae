"""Real pictures by the PyTorch original, with every component call on the way.

The loop is that of diffusers' pipelines with diffusers' own scheduler, while the initial latents
and each step's noise are injected (`sampling.noise`). It therefore also proves the step tables.
Components are visited one after the other, so that only one is in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffoundry.capture.reference import Reference
from diffoundry.formats.recording import Call
from diffoundry.models.pipeline import PipelineSource
from diffoundry.sampling.noise import draw_initial, draw_step_noise
from diffoundry.sampling.probing import make_scheduler, probe, run_scheduler
from diffoundry.types import Array, Shape


@dataclass(frozen=True)
class Settings:
    """How the pictures are made; `shape` holds the axis values of all of them."""

    steps: int
    guidance: float
    scheduler: str
    negative: str
    shape: Shape


@dataclass(frozen=True)
class Denoised:
    """What one denoising loop used and made; latents [batch, C, h, w]."""

    prompt: str
    seed: int
    initial: Array
    noise: Array | None
    final: Array
    calls: tuple[Call, ...]


def guides_by_two_calls(source: PipelineSource, guidance: float) -> bool:
    """Whether the pipeline uses classifier-free guidance (diffusers' own condition)."""
    return guidance > 1 and source.geometry.guidance_embedding_dim is None


def encode_prompts(
    text_encoder: Reference, source: PipelineSource, prompts: Sequence[str], shape: Shape
) -> dict[str, Call]:
    """Prompt -> the text encoder's call, the prompt repeated over the batch."""
    from diffoundry.models.tokenizer import Tokenizer

    tokenizer = Tokenizer.open(source.tokenizer_path, source.geometry.tokens)
    own = _own_shape(text_encoder, shape)
    calls: dict[str, Call] = {}
    for prompt in prompts:
        if prompt in calls:
            continue
        encoded = tokenizer.encode(prompt)
        rows = {"input_ids": encoded.ids}
        if source.geometry.uses_attention_mask:
            rows["attention_mask"] = encoded.attention_mask
        feeds = {
            name: np.tile(row.astype(np.int64)[None], (own["batch"], 1))
            for name, row in rows.items()
        }
        calls[prompt] = Call(feeds, text_encoder.infer(feeds), own, prompt)
    return calls


def embed_guidance(guidance: float, width: int, batch: int) -> Array:
    """diffusers' own guidance embedding, float32 [batch, width]."""
    import torch
    from diffusers import LatentConsistencyModelPipeline

    scale = torch.tensor(guidance - 1).repeat(batch)
    # The method uses nothing of its pipeline.
    embedding = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, scale, embedding_dim=width
    )
    return np.ascontiguousarray(embedding.to(torch.float32).numpy())


def denoise(
    unet: Reference,
    source: PipelineSource,
    settings: Settings,
    texts: Mapping[str, Call],
    prompt: str,
    seed: int,
) -> Denoised:
    """One denoising loop on the PyTorch U-Net."""
    scheduler = make_scheduler(settings.scheduler, source.scheduler, source.pipeline_class)
    table = probe(settings.scheduler, scheduler, settings.steps)
    own = _own_shape(unet, settings.shape)
    latent_shape = unet.contract.inputs[0].shape(own)
    predict = _Predict(unet, source, settings, texts, prompt)
    initial = draw_initial(seed, latent_shape)
    noise = draw_step_noise(seed, table.calls, latent_shape)
    final = run_scheduler(scheduler, settings.steps, initial, predict, noise)
    return Denoised(
        prompt,
        seed,
        initial,
        noise if table.needs_noise else None,
        np.ascontiguousarray(final, np.float32),
        tuple(predict.calls),
    )


class _Predict:
    """The pipeline's model call: guidance embedding, or classifier-free guidance in two calls."""

    def __init__(
        self,
        unet: Reference,
        source: PipelineSource,
        settings: Settings,
        texts: Mapping[str, Call],
        prompt: str,
    ) -> None:
        self.unet = unet
        self.own = _own_shape(unet, settings.shape)
        self.guidance = settings.guidance
        self.texts = texts
        self.prompts = [prompt]
        if guides_by_two_calls(source, settings.guidance):
            self.prompts = [settings.negative, prompt]
        self.extra = {}
        width = source.geometry.guidance_embedding_dim
        if width is not None:
            batch = self.own["batch"]
            self.extra = {"timestep_cond": embed_guidance(settings.guidance, width, batch)}
        self.calls: list[Call] = []

    def __call__(self, sample: Array, timestep: float, index: int) -> Array:
        outputs = [self._call(sample, timestep, prompt) for prompt in self.prompts]
        if len(outputs) == 1:
            return outputs[0]
        unconditional, conditional = outputs
        return unconditional + np.float32(self.guidance) * (conditional - unconditional)

    def _call(self, sample: Array, timestep: float, prompt: str) -> Array:
        feeds = {
            "sample": np.array(sample, np.float32),  # a copy: the scheduler owns the original
            "timestep": np.full(self.own["batch"], timestep, np.float32),
            "encoder_hidden_states": self.texts[prompt].outputs["prompt_embeds"],
            **self.extra,
        }
        outputs = self.unet.infer(feeds)
        self.calls.append(Call(feeds, outputs, self.own, prompt))
        return outputs["model_output"].copy()


def decode(decoder: Reference, source: PipelineSource, denoised: Denoised, shape: Shape) -> Call:
    """The decoder's call on the final latents."""
    geometry = source.geometry
    latent = denoised.final / geometry.latent_scaling_factor + geometry.latent_shift_factor
    feeds = {"latent": latent.astype(np.float32)}
    own = _own_shape(decoder, shape)
    return Call(feeds, decoder.infer(feeds), own, denoised.prompt)


def encode_picture(encoder: Reference, decoded: Call, shape: Shape) -> Call:
    """The encoder's call on a decoded picture, clipped to -1..1 as a picture is."""
    feeds = {"image": np.clip(decoded.outputs["image"], -1, 1)}
    return Call(feeds, encoder.infer(feeds), _own_shape(encoder, shape), decoded.prompt)


def picture(decoded: Call) -> Array:
    """The decoder's output as a picture: float32 [batch, height, width, 3] in 0..1."""
    image = np.clip(decoded.outputs["image"] / 2 + 0.5, 0, 1).astype(np.float32)
    return np.ascontiguousarray(image.transpose(0, 2, 3, 1))


def warn_about(image: Array, prompt: str) -> str | None:
    """What is odd about a reference picture (flat, saturated), or None."""
    if float(image.max() - image.min()) < 1 / 255:
        return f"the reference picture of {prompt!r} is flat: one value everywhere"
    saturated = float(np.mean((image <= 0) | (image >= 1)))
    if saturated > 0.95:
        return f"the reference picture of {prompt!r} is saturated: {saturated:.0%} black or white"
    return None


def _own_shape(reference: Reference, shape: Shape) -> dict[str, int]:
    """The axis values that this component has."""
    return {axis.name: shape[axis.name] for axis in reference.contract.axes}
