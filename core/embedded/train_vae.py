"""Phase 1: the autoencoder, then a cache of encoded scenes for the later phases."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffoundry.embedded.networks import build_vae
from diffoundry.embedded.training import Phase, Settings, draw_batch, pick_scenes

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL


def train_vae(work: Path, settings: Settings, device: str) -> tuple[AutoencoderKL, list[Phase]]:
    """Trains the autoencoder on drawn scenes (L1 + MSE + KL) and returns it in evaluation mode.

    In a second part pixels near an edge weigh more: they are few, and the shape is there.
    """
    import torch

    torch.manual_seed(settings.seed)
    vae = build_vae().to(device)
    parts = [
        ("vae", settings.vae_steps, settings.vae_rate, 0.0),
        ("vae_edges", settings.vae_edge_steps, settings.vae_edge_rate, settings.vae_edge_weight),
    ]
    phases = []
    for name, steps, rate, edge_weight in parts:
        optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=rate, total_steps=steps, pct_start=0.15
        )
        phase = Phase(name, work, steps, {"vae": vae}, optimizer, schedule)
        phase.resume()
        vae.train()
        while phase.step < phase.steps:
            _step_vae(vae, phase, settings, device, edge_weight)
        phases.append(phase)
    return vae.eval().requires_grad_(False), phases


def _step_vae(
    vae: AutoencoderKL, phase: Phase, settings: Settings, device: str, edge_weight: float
) -> None:
    import torch
    from torch.nn import functional

    rng = np.random.default_rng([settings.seed, 7 if edge_weight else 1, phase.step])
    images = draw_batch(pick_scenes(settings.vae_batch, rng), rng).to(device)
    # The last fifth runs in float32: the small errors left by then are bfloat16's own.
    low = settings.low_precision and phase.step < 0.8 * phase.steps
    with torch.autocast(device, dtype=torch.bfloat16, enabled=low):
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    error = decoded.float() - images
    around = functional.max_pool2d(images, 5, 1, 2) + functional.max_pool2d(-images, 5, 1, 2)
    weight = 1 + edge_weight * (around.amax(1, keepdim=True) > 0.2).float()
    distance = ((error.abs() + error.square()) * weight).mean() / weight.mean()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    phase.take_step(distance + settings.vae_kl * kl)


def encode_cache(
    vae: AutoencoderKL, work: Path, settings: Settings, device: str
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Draws and encodes `settings.cached_scenes` scenes once.

    Returns the posterior's moments, float32 [n, 2, 4, 16, 16] (mean, standard deviation),
    already multiplied by the scaling factor; the scene of each, an index into
    `scenes.all_scenes()`, int64 [n]; and the scaling factor, 1 / std of the latents.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from diffoundry.embedded.scenes import all_scenes

    path = work / "latents.safetensors"
    if not path.exists():
        scenes = all_scenes()
        rng = np.random.default_rng([settings.seed, 2])
        # Every scene equally often, in a shuffled order.
        index = rng.permutation(np.arange(settings.cached_scenes) % len(scenes))
        chunks = []
        with torch.no_grad():
            for start in range(0, len(index), 256):
                chosen = [scenes[i] for i in index[start : start + 256]]
                posterior = vae.encode(draw_batch(chosen, rng).to(device)).latent_dist
                chunks.append(torch.stack([posterior.mean, posterior.std], dim=1).cpu())
        moments = torch.cat(chunks)
        tensors = {"moments": moments, "scene": torch.from_numpy(index)}
        save_file(tensors, path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)
    tensors = load_file(path)
    moments = tensors["moments"]
    variance = moments[:, 0].var() + moments[:, 1].square().mean()
    factor = round(1 / float(variance.sqrt()), 6)
    return (moments * factor).to(device), tensors["scene"], factor
