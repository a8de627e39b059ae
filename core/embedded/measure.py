"""Measures the trained networks: pictures from prompts, read back by the recogniser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from diffoundry.embedded.networks import LATENT_CHANNELS, LATENT_SIDE, NOISE_SCHEDULE
from diffoundry.embedded.prompts import PromptSeed
from diffoundry.embedded.recogniser import recognise
from diffoundry.embedded.scenes import caption, draw
from diffoundry.embedded.training import pick_scenes

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, LatentConsistencyModelPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer


def share_right(images: np.ndarray, prompts: Sequence[str]) -> float:
    """Share, 0..1, of pictures [n, 64, 64, 3] (float in 0..1) that show all of their prompt."""
    right = 0
    for image, prompt in zip(images, prompts, strict=True):
        scene = recognise(image)
        right += scene is not None and caption(scene) == prompt
    return right / len(prompts)


def measure_vae(vae: AutoencoderKL, count: int, seed: int) -> dict[str, float]:
    """The round trip of `count` freshly drawn scenes: share read back right, and PSNR in dB."""
    import torch

    rng = np.random.default_rng([seed, 6])
    scenes = pick_scenes(count, rng)
    drawn = np.stack([draw(scene, rng) for scene in scenes]).astype(np.float32) / 255
    pixels = torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1
    with torch.no_grad():
        decoded = [
            vae.decode(vae.encode(part.to(vae.device)).latent_dist.mean).sample.cpu()
            for part in pixels.split(50)
        ]
    images = pixels_from(torch.cat(decoded))
    error = float(((images - drawn) ** 2).mean())
    right = share_right(images, [caption(scene) for scene in scenes])
    return {"right": right, "psnr_db": -10 * float(np.log10(error))}


def sample_teacher(
    pairs: Sequence[PromptSeed],
    *,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    factor: float,
    guidance: float,
    steps: int = 25,
) -> np.ndarray:
    """DDIM pictures of an ordinary (not distilled) U-Net: float32 [n, 64, 64, 3] in 0..1.

    `factor` is the scaling factor of the latents.
    """
    import torch
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    images = []
    for start in range(0, len(pairs), 50):
        part = pairs[start : start + 50]
        prompts = [pair.prompt for pair in part] + [""] * len(part)
        ids = tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        shape = (1, LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(p.seed)) for p in part]
        latent = torch.cat(noise).to(unet.device)
        with torch.no_grad():
            text = text_encoder(ids.to(unet.device)).last_hidden_state
            for t in scheduler.timesteps:
                with_text, without = unet(latent.repeat(2, 1, 1, 1), t, text).sample.chunk(2)
                guided = without + guidance * (with_text - without)
                latent = scheduler.step(guided, t, latent).prev_sample
            images.append(pixels_from(vae.decode(latent / factor).sample.cpu()))
    return np.concatenate(images)


def sample_lcm(
    pipeline: LatentConsistencyModelPipeline,
    pairs: Sequence[PromptSeed],
    *,
    steps: int,
    guidance: float,
) -> np.ndarray:
    """The pipeline's pictures, each from its own seed: float32 [n, 64, 64, 3] in 0..1."""
    import torch

    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(pairs), 50):
        part = pairs[start : start + 50]
        result = pipeline(
            [pair.prompt for pair in part],
            height=64,
            width=64,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(pair.seed) for pair in part],
            output_type="np",
        )
        images.append(result.images)
    return np.concatenate(images)


def pixels_from(decoded: torch.Tensor) -> np.ndarray:
    """Decoder output [n, 3, h, w] around -1..1 -> pictures [n, h, w, 3], float32 in 0..1."""
    return (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().numpy()
