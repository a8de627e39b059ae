"""The teacher of shapes-lcm as a whole Stable Diffusion pipeline, for tests of ordinary sampling.

tests/data/shapes-teacher holds its U-Net (fp16) and scheduler; text encoder, VAE and tokenizer are
those of the embedded model.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from diffoundry.embedded import SHAPES_LCM

DATA = Path(__file__).parent / "data" / "shapes-teacher"


def assemble_teacher(folder: Path) -> Path:
    """Write the teacher's diffusers directory into `folder` and return it."""
    shutil.copytree(DATA, folder)
    for part in ("text_encoder", "vae", "tokenizer"):
        shutil.copytree(SHAPES_LCM / part, folder / part)
    return folder
