"""Pictures by a small decoder in place of a bundle's full one: quick, less like, called previews.

What that costs in likeness is measured before the first picture is made, on the golden latents of
the bundle: the full decoder's pictures are recorded there.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffoundry.artifacts.bundle import Bundle, open_bundle
from diffoundry.artifacts.hash_cache import HashCache
from diffoundry.choosing import Choice, choose_variant, refuse_changed_files, variant_on_demand
from diffoundry.errors import UsageError
from diffoundry.formats import recording
from diffoundry.generation import Picture, TextToImage
from diffoundry.models.pipeline import PREVIEW
from diffoundry.parity.checks.preview import compare_previews

PIPELINE = "pipeline"
FULL = "vae_decoder"
MEASURED = 4
"""Golden pictures that a preview's likeness is measured on."""


@dataclass(frozen=True)
class Preview:
    """A pipeline whose last step is a small decoder.

    `psnr_db` is the mean over `pictures` golden pictures, of the preview against what the full
    decoder made in PyTorch. `bundle` is the digest of the bundle that the decoder is from; `by`
    says in words which it is.
    """

    pipeline: TextToImage
    bundle: str
    by: str
    psnr_db: float
    pictures: int

    def told(self) -> str:
        """One line for a person."""
        golden = "1 golden picture" if self.pictures == 1 else f"{self.pictures} golden pictures"
        return (
            f"preview: decoded by {self.by}, {self.psnr_db:.1f} dB PSNR from the full decoder "
            f"(mean of {golden})"
        )

    def label(self, picture: Picture) -> Picture:
        """The picture with what it is among its parameters."""
        facts = {"bundle": self.bundle, "psnr_db": round(self.psnr_db, 2)}
        return dataclasses.replace(picture, parameters={**picture.parameters, "preview": facts})


def preview_of(
    pipeline: TextToImage,
    bundle: Bundle,
    choice: Choice,
    own: bool,
    lender: Path | None,
    digests: Path,
) -> Preview | None:
    """`pipeline` of `bundle` with its `own` preview decoder, or that of the bundle `lender`; None
    where neither is asked for.

    `digests`: where digests of files are remembered. Raises UsageError where both are asked for,
    the bundle has none, or the lender's is of other latents; and what opening a bundle raises.
    """
    if own and lender is not None:
        raise UsageError(
            "--preview and --preview-from",
            expected="one of the two: the bundle's own decoder, or another bundle's",
            found="both",
            remedy="leave one of them out",
        )
    if lender is not None:
        return _borrowed(pipeline, bundle, open_bundle(lender, HashCache(digests)))
    return _own(pipeline, bundle, choice) if own else None


def _own(pipeline: TextToImage, bundle: Bundle, choice: Choice) -> Preview:
    variant = choice.variant
    if PREVIEW not in variant.engines:
        raise UsageError(
            "--preview",
            expected=f"a bundle with a {PREVIEW}",
            found=f"variant {variant.name} of {', '.join(variant.engines)}",
            remedy="build it with --preview-vae DIR, or take the decoder of another bundle: "
            "--preview-from BUNDLE",
        )
    sessions = variant_on_demand(
        bundle, variant, by_stand_in=choice.by_stand_in, components=(PREVIEW,)
    )
    changed = pipeline.with_decoder(sessions[PREVIEW])
    return _measured(changed, bundle, bundle.digest, "the bundle's preview decoder")


def _borrowed(pipeline: TextToImage, bundle: Bundle, lender: Bundle) -> Preview:
    """With the lender's preview decoder, else with the one that it has."""
    refuse_changed_files(lender)
    mine, its = pipeline.geometry, lender.manifest.model.geometry
    if (mine.vae_factor, mine.latent_channels) != (its.vae_factor, its.latent_channels):
        raise UsageError(
            "--preview-from",
            expected=f"a decoder of {mine.latent_channels} channels, × {mine.vae_factor}",
            found=f"{its.latent_channels} channels, × {its.vae_factor}",
            remedy="build it for a model with the same latents",
        )
    variant = choose_variant(lender).variant
    name = PREVIEW if PREVIEW in variant.engines else FULL
    session = variant_on_demand(lender, variant, components=(name,))[name]
    if name == PREVIEW:
        changed = pipeline.with_decoder(session)
    else:
        factors = (its.latent_scaling_factor, its.latent_shift_factor)
        changed = pipeline.with_decoder(session, *factors)
    return _measured(changed, bundle, lender.digest, "another model")


def _measured(changed: TextToImage, bundle: Bundle, digest: str, by: str) -> Preview:
    golden = recording.load_pipeline(bundle.golden(PIPELINE)).trajectories
    usual = [one for one in golden if one.final_latents.shape[0] == 1][:MEASURED] or golden[:1]
    found = compare_previews(changed, usual)
    return Preview(changed, digest, by, float(np.mean(found)), len(found))
