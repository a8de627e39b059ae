"""The one place where a picture changes its size before a network of a metric sees it."""

from __future__ import annotations

import numpy as np

from diffoundry.types import Array


def resize(picture: Array, height: int, width: int, *, rounded: bool) -> Array:
    """uint8 [h, w, 3] -> float32 [height, width, 3] in 0..255; the same size stays untouched.

    Pillow's bicubic filter (a = -0.5), which is widened when it shrinks a picture (antialias); it
    has no such thing to do when it enlarges. `rounded`: to whole values, as when an 8-bit picture
    is resized (CLIP's own preprocessing); without it each channel is resized as floating point
    (FID after Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN
    Evaluation"). Values that the filter overshoots are clipped.
    """
    from PIL import Image

    if picture.shape[:2] == (height, width):
        return picture.astype(np.float32)
    size = (width, height)
    if rounded:
        small = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
        return np.asarray(small, np.float32)
    channels = [
        np.asarray(Image.fromarray(channel).resize(size, Image.Resampling.BICUBIC))
        for channel in picture.astype(np.float32).transpose(2, 0, 1)
    ]
    return np.clip(np.stack(channels, axis=-1), 0, 255)


def resize_shorter_side(picture: Array, side: int) -> Array:
    """Resize, rounded, so that the shorter side has `side` pixels; the longer one is cut down."""
    height, width = picture.shape[:2]
    shorter = min(height, width)
    return resize(picture, height * side // shorter, width * side // shorter, rounded=True)


def crop_centre(picture: Array, height: int, width: int) -> Array:
    """The middle [height, width] of a picture that is at least so large."""
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return picture[top : top + height, left : left + width]
