"""A small decoder of another bundle in place of a bundle's own: quick pictures, called previews.

What it costs in likeness is measured before the first picture is made, on the golden latents of the
bundle: the full decoder's pictures are recorded there.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffoundry.artifacts.bundle import Bundle, open_bundle
from diffoundry.artifacts.hash_cache import HashCache
from diffoundry.choosing import choose_variant, refuse_changed_files, variant_on_demand
from diffoundry.errors import UsageError
from diffoundry.formats import recording
from diffoundry.generation import Picture, TextToImage
from diffoundry.quality.differences import image_psnr_db

PIPELINE = "pipeline"
MEASURED = 4
"""Golden pictures that a preview's likeness is measured on."""


@dataclass(frozen=True)
class Preview:
    """A pipeline whose last step is another bundle's decoder.

    `psnr_db` is the mean over `pictures` golden latents, of the preview against what the full
    decoder made of them in PyTorch. `bundle` is the digest of the bundle that lent its decoder.
    """

    pipeline: TextToImage
    bundle: str
    psnr_db: float
    pictures: int

    def told(self) -> str:
        """One line for a person."""
        return (
            f"preview: decoded by another model, {self.psnr_db:.1f} dB PSNR from the full decoder "
            f"(mean of {self.pictures} golden pictures)"
        )

    def label(self, picture: Picture) -> Picture:
        """The picture with what it is among its parameters."""
        facts = {"bundle": self.bundle, "psnr_db": round(self.psnr_db, 2)}
        return dataclasses.replace(picture, parameters={**picture.parameters, "preview": facts})


def with_preview(pipeline: TextToImage, bundle: Bundle, path: Path, digests: Path) -> Preview:
    """`pipeline` of `bundle` with the decoder of the bundle in `path`.

    `digests`: where digests of files are remembered. Raises UsageError for a decoder of other
    latents, and what opening a bundle and its engines raises.
    """
    lender = open_bundle(path, HashCache(digests))
    refuse_changed_files(lender)
    mine, its = pipeline.geometry, lender.manifest.model.geometry
    if (mine.vae_factor, mine.latent_channels) != (its.vae_factor, its.latent_channels):
        raise UsageError(
            "--preview",
            expected=f"a decoder of {mine.latent_channels} channels, × {mine.vae_factor}",
            found=f"{its.latent_channels} channels, × {its.vae_factor}",
            remedy="build it for a model with the same latents",
        )
    sessions = variant_on_demand(lender, choose_variant(lender).variant)
    changed = dataclasses.replace(
        pipeline,
        sessions={**pipeline.sessions, "vae_decoder": sessions["vae_decoder"]},
        geometry=dataclasses.replace(
            mine,
            latent_scaling_factor=its.latent_scaling_factor,
            latent_shift_factor=its.latent_shift_factor,
        ),
    )
    golden = recording.load_pipeline(bundle.golden(PIPELINE)).trajectories
    usual = [one for one in golden if one.final_latents.shape[0] == 1][:MEASURED] or golden[:1]
    found = [image_psnr_db(one.image, changed.decode(one.final_latents)) for one in usual]
    return Preview(changed, lender.digest, float(np.mean(found)), len(found))
