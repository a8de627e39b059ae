"""Resizing of the last two dimensions: each output element names a point of the input grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffoundry.runtimes.mil.registry import Ints, operation


@operation()
def upsample_nearest_neighbor(
    x: Tensor, scale_factor_height: float = 1.0, scale_factor_width: float = 1.0
) -> Tensor:
    for axis, scale in ((-2, scale_factor_height), (-1, scale_factor_width)):
        points = torch.arange(math.floor(x.shape[axis] * scale), dtype=torch.float64) / scale
        x = _nearest(x, axis, points)
    return x


@operation()
def resize_nearest_neighbor(x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    for axis, size in ((-2, target_size_height), (-1, target_size_width)):
        x = _nearest(x, axis, torch.arange(size, dtype=torch.float64) * x.shape[axis] / size)
    return x


@operation()
def upsample_bilinear(
    x: Tensor,
    scale_factor_height: float = 1.0,
    scale_factor_width: float = 1.0,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    """The grid follows from the output size, not from the factor."""
    half = not align_corners if half_pixel_centers is None else half_pixel_centers
    if align_corners and half:
        raise ValueError("align_corners and half_pixel_centers exclude one another")
    mode = "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS" if half else "DEFAULT"
    for axis, scale in ((-2, scale_factor_height), (-1, scale_factor_width)):
        x = _linear(x, axis, _grid(mode, x.shape[axis], math.floor(x.shape[axis] * scale)))
    return x


@operation()
def resize_bilinear(
    x: Tensor,
    target_size_height: int = 1,
    target_size_width: int = 1,
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    for axis, size in ((-2, target_size_height), (-1, target_size_width)):
        x = _linear(x, axis, _grid(sampling_mode, x.shape[axis], size))
    return x


@operation()
def resize(
    x: Tensor,
    shape: Ints,
    resized_dims: int,
    interpolation_mode: str = "LINEAR",
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    """Nearest neighbours are defined for the DEFAULT grid only, as resize_nearest_neighbor."""
    sample = {"LINEAR": _linear, "NEAREST_NEIGHBOR": _nearest}[interpolation_mode]
    if sample is _nearest and sampling_mode != "DEFAULT":
        raise ValueError(f"nearest neighbours with sampling mode {sampling_mode} are not defined")
    for axis in range(-resized_dims, 0):
        size = shape[axis] or x.shape[axis]
        x = sample(x, axis, _grid(sampling_mode, x.shape[axis], size))
    return x


def _grid(mode: str, n: int, size: int) -> Tensor:
    """For each of `size` output elements, the point among `n` input elements it is taken from."""
    i = torch.arange(size, dtype=torch.float64)
    if mode == "ALIGN_CORNERS" and size == 1:
        points = i + (n - 1) / 2
    elif mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        points = i * (n - 1) / max(size - 1, 1)
    elif mode == "DEFAULT":
        points = i * n / size
    elif mode == "OFFSET_CORNERS":
        points = (i + 0.5) * max(1, n - 1) / size
    elif mode == "UNALIGN_CORNERS":
        points = (i + 0.5) * n / size - 0.5
    else:
        raise ValueError(f"unknown sampling mode {mode!r}")
    return points.clamp(0, n - 1)


def _nearest(x: Tensor, axis: int, points: Tensor) -> Tensor:
    # A point that is a whole number but for rounding is that number.
    return x.index_select(axis, (points + 1e-9).floor().long().clamp(max=x.shape[axis] - 1))


def _linear(x: Tensor, axis: int, points: Tensor) -> Tensor:
    low = points.floor().long()
    high = (low + 1).clamp(max=x.shape[axis] - 1)
    share = (points - low).float().reshape(-1, *[1] * (-1 - axis))
    x = x.float()
    return x.index_select(axis, low) * (1 - share) + x.index_select(axis, high) * share
