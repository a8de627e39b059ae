"""Plays recorded trajectories again on engines: same prompt, same injected noise."""

from __future__ import annotations

from dataclasses import dataclass

from diffoundry.errors import DeferredError, DiffoundryError, MissingToolError
from diffoundry.formats.recording import Trajectory
from diffoundry.generation import TextToImage
from diffoundry.types import Array


@dataclass(frozen=True)
class Played:
    """What the engines made of one trajectory; where an array is None, `error` says why.

    `latents` [batch, C, h, w] is the final latent. `image` [batch, H, W, 3], float32 in 0..1, is
    decoded from those latents.
    """

    reference: Trajectory
    latents: Array | None = None
    image: Array | None = None
    error: str = ""


def play(pipeline: TextToImage, trajectory: Trajectory) -> Played:
    """Run the denoising loop and the decoder; an error of an engine is kept, not raised.

    Raises MissingToolError and DeferredError.
    """
    latents = None
    try:
        latents = pipeline.denoise(
            trajectory.prompt,
            trajectory.negative,
            steps=trajectory.steps,
            guidance=trajectory.guidance,
            scheduler=trajectory.scheduler or None,
            initial_latents=trajectory.initial_latents,
            step_noise=trajectory.noise,
        )
        return Played(trajectory, latents, pipeline.decode(latents))
    except (MissingToolError, DeferredError):
        raise
    except DiffoundryError as error:
        return Played(trajectory, latents, error=error.text())
    except Exception as error:  # noqa: BLE001 - whatever an engine raises is its answer
        return Played(trajectory, latents, error=f"{type(error).__name__}: {error}")
