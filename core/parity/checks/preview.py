"""What a preview decoder's pictures are worth: information, never a gate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffoundry.errors import DeferredError, MissingToolError
from diffoundry.formats.recording import Trajectory
from diffoundry.generation import TextToImage
from diffoundry.quality.differences import image_psnr_db
from diffoundry.types import CheckResult

LEVEL = "image"
NAME = "preview"


def compare_previews(previewing: TextToImage, golden: Sequence[Trajectory]) -> tuple[float, ...]:
    """PSNR in dB of each picture that the preview decoder makes of the recorded final latents,
    against what the original's full decoder made of them."""
    found: list[float] = []
    for one in golden:
        made = previewing.decode(one.final_latents)
        found += [image_psnr_db(*pair) for pair in zip(one.image, made, strict=True)]
    return tuple(found)


def check_previews(
    previewing: TextToImage, golden: Sequence[Trajectory]
) -> tuple[CheckResult, ...]:
    """One line of information: PSNR, worst and mean, over all pictures; or why there is none.

    Raises MissingToolError and DeferredError.
    """
    try:
        found = compare_previews(previewing, golden)
        values = {
            "pictures": len(found),
            "worst_psnr_db": min(found),
            "mean_psnr_db": float(np.mean(found)),
        }
        return (CheckResult(LEVEL, NAME, "info", values=values),)
    except (MissingToolError, DeferredError):
        raise
    except Exception as error:  # noqa: BLE001 - the check of the component itself has the say
        return (CheckResult(LEVEL, NAME, "info", message=f"no preview could be made: {error}"),)
