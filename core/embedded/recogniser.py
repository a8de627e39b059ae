"""Reads a scene back from a picture by geometry and colour; nothing in it is trained.

It abstains where a picture is not plainly one of the scenes, so that noise, blanks and blends
don't count as right.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from diffoundry.embedded.scenes import COLOURS, PALETTE, RADII, SHAPES, SIDE, Scene, shape_coverage

COLOUR_TOLERANCE = 48.0
"""Largest RGB distance to a palette colour; two palette colours are at least 125 apart."""

MIN_FRAME_SHARE = 0.9
MAX_STRAY_SHARE = 0.015
STRAY_DISTANCE = 60.0
MIN_OBJECT_PX = 40
MAX_MISFIT = {"small": 0.26, "large": 0.16}
MIN_MISFIT_RATIO = 1.12
RADIUS_TOLERANCE = 0.17
MAX_ELONGATION = 1.6
"""Largest ratio of the variances along the object's axes: up to 1.06 in what is drawn, 1.5 in what
a model paints, and from 1.8 on where half an object is missing."""


def recognise(image: np.ndarray) -> Scene | None:
    """The scene in the picture, or None where it can't be read.

    `image` is [64, 64, 3], uint8 in 0..255 or floating point in 0..1. Raises ValueError for
    another shape or dtype. Method: background colour from the frame, object colour by count,
    each pixel's share of the object colour, then the shape whose drawing fits those shares best.
    """
    pixels = _to_rgb(image)
    colours = np.array(list(PALETTE.values()), dtype=np.float32)
    distances = np.linalg.norm(pixels[:, :, None] - colours, axis=-1)
    nearest = np.where(distances.min(-1) < COLOUR_TOLERANCE, distances.argmin(-1), -1)

    frame = np.concatenate([nearest[0], nearest[-1], nearest[1:-1, 0], nearest[1:-1, -1]])
    frame_counts = np.bincount(frame + 1, minlength=len(colours) + 1)[1:]
    back = int(frame_counts.argmax())
    if frame_counts[back] < MIN_FRAME_SHARE * frame.size:
        return None
    counts = np.bincount(nearest.ravel() + 1, minlength=len(colours) + 1)[1:]
    counts[back] = 0
    front = int(counts.argmax())
    if counts[front] < MIN_OBJECT_PX:
        return None

    span = colours[front] - colours[back]
    share = np.clip((pixels - colours[back]) @ span / (span @ span), 0, 1)
    off_line = np.linalg.norm(pixels - (colours[back] + share[..., None] * span), axis=-1)
    if (off_line > STRAY_DISTANCE).mean() > MAX_STRAY_SHARE:
        return None
    fitted = _fit_shape(share)
    if fitted is None:
        return None
    shape, size = fitted
    return Scene(COLOURS[front], shape, size, COLOURS[back])


def _to_rgb(image: np.ndarray) -> np.ndarray:
    if image.shape != (SIDE, SIDE, 3):
        raise ValueError(f"expected a picture [{SIDE}, {SIDE}, 3], got {list(image.shape)}")
    if image.dtype == np.uint8:
        return image.astype(np.float32)
    if np.issubdtype(image.dtype, np.floating):
        return image.astype(np.float32) * 255
    raise ValueError(f"expected uint8 or floating point pixels, got {image.dtype}")


def _fit_shape(share: np.ndarray) -> tuple[str, str] | None:
    """Shape and size whose drawing at the same centroid and area is nearest to `share`."""
    # A faint haze over the whole background would move the centroid and swell the area.
    share = np.where(share < 0.12, 0, share)
    area = float(share.sum())
    grid = np.arange(SIDE) + 0.5
    x = float((share.sum(0) * grid).sum() / area)
    y = float((share.sum(1) * grid).sum() / area)
    if _elongation(share, grid - x, grid - y) > MAX_ELONGATION:
        return None
    fits = []
    for shape in SHAPES:
        unit_area, shift = _unit_measures(shape)
        radius = (area / unit_area) ** 0.5
        if radius > SIDE / 2:
            continue
        drawn = shape_coverage(shape, x, y - shift * radius, radius)
        fits.append((float(np.abs(share - drawn).sum()) / area, shape, radius))
    fits.sort()
    if len(fits) < 2:
        return None
    misfit, shape, radius = fits[0]
    for size, nominal in RADII.items():
        if abs(radius - nominal) < RADIUS_TOLERANCE * nominal:
            clear = fits[1][0] >= MIN_MISFIT_RATIO * misfit
            return (shape, size) if clear and misfit <= MAX_MISFIT[size] else None
    return None


def _elongation(share: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> float:
    """Variance along the longest axis over that along the shortest; every shape's is near 1."""
    xx = float((share.sum(0) * dx**2).sum())
    yy = float((share.sum(1) * dy**2).sum())
    xy = float(dy @ share @ dx)
    shortest, longest = np.linalg.eigvalsh([[xx, xy], [xy, yy]])
    return float(longest / shortest) if shortest > 0 else float("inf")


@lru_cache(maxsize=len(SHAPES))
def _unit_measures(shape: str) -> tuple[float, float]:
    """Area of the shape of radius 1, and how far below its centre its centroid lies."""
    radius, centre = 20.0, SIDE / 2
    coverage = shape_coverage(shape, centre, centre, radius)
    area = float(coverage.sum())
    rows = np.arange(SIDE) + 0.5
    centroid = float((coverage.sum(1) * rows).sum()) / area
    return area / radius**2, (centroid - centre) / radius
