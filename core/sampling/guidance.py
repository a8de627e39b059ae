"""Guidance: the embedding that a distilled model takes, and classifier-free guidance."""

from __future__ import annotations

import numpy as np

from diffoundry.types import Array


def guidance_embedding(guidance: float, width: int, batch: int = 1) -> Array:
    """What an LCM U-Net takes as `timestep_cond`: float32 [batch, width].

    As LatentConsistencyModelPipeline.get_guidance_scale_embedding of diffusers, with w =
    guidance − 1 (Imagen's scale, not the LCM paper's): sines and cosines of 1000·w at `width`/2
    frequencies from 1 down to 1e-4. The arguments reach thousands, so they are rounded to
    float32 where diffusers rounds them; what is left is the last bit of its exponential.
    """
    half = width // 2
    rate = np.log(np.float32(10000.0)) / np.float32(half - 1)
    exponents = np.arange(half, dtype=np.float32) * -rate
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = (np.float32(guidance - 1) * np.float32(1000.0) * frequencies).astype(np.float64)
    row = np.zeros(width, dtype=np.float32)
    row[:half], row[half : 2 * half] = np.sin(angles), np.cos(angles)
    return np.tile(row, (batch, 1))


def combine(unconditional: Array, conditional: Array, guidance: float) -> Array:
    """Classifier-free guidance (Ho & Salimans 2022), in diffusers' form: u + g·(c − u)."""
    return unconditional + guidance * (conditional - unconditional)
