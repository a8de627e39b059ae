"""Drawn scenes: one plain shape on a plain background, with an exact caption.

The embedded model is trained on them, and `recogniser` reads them back. Numpy and Pillow only.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64
"""Height and width of a scene in pixels."""

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (222, 32, 36),
    "green": (30, 150, 50),
    "blue": (30, 70, 225),
    "yellow": (250, 220, 40),
    "purple": (150, 40, 205),
    "cyan": (60, 215, 225),
    "white": (245, 245, 245),
    "black": (18, 18, 18),
}
"""RGB in 0..255. No average of two of these colours lies near a third."""

COLOURS = tuple(PALETTE)
BACKGROUNDS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
RADII: dict[str, float] = {"small": 12.0, "large": 21.0}
"""Radius in pixels of the circle that the shape fits into."""

SIZES = tuple(RADII)
JITTER_PX: dict[str, float] = {"small": 5.0, "large": 4.0}
"""Largest offset of the shape's centre from the picture's centre, per axis."""

SCALE_JITTER = 0.03
OVERSAMPLING = 4


@dataclass(frozen=True, order=True)
class Scene:
    """What a picture shows; the words are those of `COLOURS`, `SHAPES`, `SIZES`, `BACKGROUNDS`."""

    colour: str
    shape: str
    size: str
    background: str


@lru_cache(maxsize=1)
def all_scenes() -> tuple[Scene, ...]:
    """Every scene there is, in a fixed order; an object never has its background's colour."""
    product = itertools.product(COLOURS, SHAPES, SIZES, BACKGROUNDS)
    return tuple(Scene(*words) for words in product if words[0] != words[3])


def caption(scene: Scene) -> str:
    """The one sentence that describes the scene: "a small red circle on a blue background"."""
    return f"a {scene.size} {scene.colour} {scene.shape} on a {scene.background} background"


def parse(text: str) -> Scene:
    """The scene that a caption describes. Raises ValueError for any other text."""
    words = text.split()
    if len(words) == 8:
        scene = Scene(colour=words[2], shape=words[3], size=words[1], background=words[6])
        if caption(scene) == text and scene in all_scenes():
            return scene
    raise ValueError(
        f"not a scene's caption: {text!r}; expected for example "
        "'a small red circle on a blue background'"
    )


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draws the scene, antialiased, at a place and scale drawn from `rng`.

    Returns uint8 [64, 64, 3]. The shape is always wholly inside the picture.
    """
    jitter = JITTER_PX[scene.size]
    x, y = SIDE / 2 + rng.uniform(-jitter, jitter, size=2)
    radius = RADII[scene.size] * (1 + rng.uniform(-SCALE_JITTER, SCALE_JITTER))
    coverage = shape_coverage(scene.shape, float(x), float(y), float(radius))[..., None]
    front = np.array(PALETTE[scene.colour], dtype=np.float32)
    back = np.array(PALETTE[scene.background], dtype=np.float32)
    return np.rint(back + coverage * (front - back)).astype(np.uint8)


def shape_coverage(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """How much of each pixel the shape covers: float32 [64, 64] in 0..1.

    `x`, `y` and `radius` are in pixels; pixel (0, 0) spans 0..1.
    """
    canvas = Image.new("L", (SIDE * OVERSAMPLING, SIDE * OVERSAMPLING), 0)
    pen = ImageDraw.Draw(canvas)
    for fill, points in _outlines(shape):
        corners = [
            ((x + radius * u) * OVERSAMPLING - 0.5, (y + radius * v) * OVERSAMPLING - 0.5)
            for u, v in points
        ]
        pen.polygon(corners, fill=fill)
    small = canvas.resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255


@lru_cache(maxsize=len(SHAPES))
def _outlines(shape: str) -> tuple[tuple[int, tuple[tuple[float, float], ...]], ...]:
    """Polygons in the unit circle, painted in order: (255 to fill or 0 to cut out, corners)."""
    if shape == "circle":
        return ((255, _ngon(48, 0.95)),)
    if shape == "ring":
        return ((255, _ngon(48, 1.0)), (0, _ngon(48, 0.55)))
    if shape == "square":
        half = 0.8
        return ((255, ((-half, -half), (half, -half), (half, half), (-half, half))),)
    if shape == "triangle":
        return ((255, ((0.0, -0.95), (1.0, 0.8), (-1.0, 0.8))),)
    if shape == "star":
        tips, notches = _ngon(5, 1.1), _ngon(5, 0.45, turn=0.5)
        return ((255, tuple(p for pair in zip(tips, notches, strict=True) for p in pair)),)
    if shape == "cross":
        a, b = 1.0, 0.33
        right = ((b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a))
        left = tuple((-u, -v) for u, v in right)
        return ((255, right + left),)
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def _ngon(corners: int, radius: float, turn: float = 0.0) -> tuple[tuple[float, float], ...]:
    angles = 2 * np.pi * (np.arange(corners) + turn) / corners
    xs, ys = radius * np.sin(angles), -radius * np.cos(angles)
    return tuple(zip(xs.tolist(), ys.tolist(), strict=True))
