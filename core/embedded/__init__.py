"""The small model shipped with Diffoundry, what it was trained on, and what reads its pictures."""

from pathlib import Path

SHAPES_LCM = Path(__file__).parent / "shapes-lcm"
"""The pipeline's folder, in the layout of diffusers."""

DEFAULT_GUIDANCE = 3.0
"""The guidance at which its pictures are made where none is asked for (distilled for 1 to 7)."""
