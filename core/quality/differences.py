"""Figures that say how far an array is from its reference. Numpy; scikit-image for SSIM."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from diffoundry.errors import ContractError, MissingToolError, ModelError
from diffoundry.types import Array, Measure

DB_CAP = 300.0
"""Identical arrays; keeps infinity out of JSON."""

NOT_FINITE = 3.4e38
"""`max_abs` and `mean_abs` where the value holds NaN or infinity."""

SSIM_WINDOW = 7
"""Side of the sliding window in pixels (Wang et al. 2004 as scikit-image does it)."""

SSIM_SMALLEST_WINDOW = 3


def measure(reference: Array, value: Array, floor: float | None = None) -> Measure:
    """Compare `value` with `reference`, any equal shapes, in float64.

    PSNR takes max|reference| as peak. A `value` with NaN or infinity gets the worst figures
    there are (`NOT_FINITE`, cosine -1, -300 dB). Raises ContractError for shapes that differ or
    hold nothing, ModelError for a reference that is not finite.
    """
    if reference.shape != value.shape or not reference.size:
        raise ContractError(
            "comparison of two arrays",
            expected=f"the reference's shape {list(reference.shape)}, and not empty",
            found=str(list(value.shape)),
        )
    left = np.asarray(reference, dtype=np.float64).ravel()
    right = np.asarray(value, dtype=np.float64).ravel()
    if not np.isfinite(left).all():
        raise ModelError(
            "the PyTorch reference",
            expected="finite values",
            found="NaN or infinity",
            remedy="the model itself is at fault: check its weights",
        )
    peak = float(np.abs(left).max())
    if not np.isfinite(right).all():
        return Measure(NOT_FINITE, NOT_FINITE, -1.0, -DB_CAP, -DB_CAP, peak, floor)
    error = right - left
    size = np.abs(error)
    mean_square = float(error @ error) / error.size
    signal = float(left @ left) / left.size
    return Measure(
        max_abs=min(float(size.max()), NOT_FINITE),
        mean_abs=min(float(size.mean()), NOT_FINITE),
        cosine=cosine(left, right),
        psnr_db=ratio_db(peak * peak, mean_square),
        sqnr_db=ratio_db(signal, mean_square),
        peak=peak,
        floor=floor,
    )


def pooled_sqnr_db(references: Sequence[Array], values: Sequence[Array]) -> float:
    """Signal over noise power of several arrays taken as one; `-DB_CAP` where one is not finite."""
    signal = noise = 0.0
    for reference, value in zip(references, values, strict=True):
        left = np.asarray(reference, dtype=np.float64)
        error = np.asarray(value, dtype=np.float64) - left
        if not np.isfinite(error).all():
            return -DB_CAP
        signal += float(np.sum(left * left))
        noise += float(np.sum(error * error))
    return ratio_db(signal, noise)


def cosine(left: Array, right: Array) -> float:
    """Cosine of the angle between two arrays taken as vectors; 1 where both are zero."""
    a = np.asarray(left, dtype=np.float64).ravel()
    b = np.asarray(right, dtype=np.float64).ravel()
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    if lengths == 0.0:
        return 1.0 if not a.any() and not b.any() else 0.0
    return max(-1.0, min(1.0, float(a @ b) / lengths))


def ratio_db(signal: float, noise: float) -> float:
    """10 × log10(signal / noise), within ±300."""
    if noise <= 0.0:
        return DB_CAP
    if signal <= 0.0:
        return -DB_CAP
    return max(-DB_CAP, min(DB_CAP, 10 * (math.log10(signal) - math.log10(noise))))


def image_psnr_db(reference: Array, image: Array) -> float:
    """PSNR of one picture, float [height, width, 3] in 0..1 (peak 1)."""
    error = np.asarray(image, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    if not np.isfinite(error).all():
        return -DB_CAP
    return ratio_db(1.0, float((error * error).mean()))


def image_ssim(reference: Array, image: Array) -> float:
    """SSIM of one picture, float [height, width, 3] in 0..1: 1 is the same, -1 where not finite.

    The window shrinks to an odd number of pixels that fits a small picture. Raises
    ContractError below 3 pixels a side, MissingToolError without scikit-image. Source: Wang,
    Bovik, Sheikh, Simoncelli, "Image quality assessment", 2004.
    """
    side = min(reference.shape[:2])
    window = min(SSIM_WINDOW, side - (side + 1) % 2)
    if window < SSIM_SMALLEST_WINDOW or reference.shape != image.shape:
        raise ContractError(
            "SSIM of two pictures",
            expected=f"equal shapes of at least {SSIM_SMALLEST_WINDOW} pixels a side",
            found=f"{list(reference.shape)} and {list(image.shape)}",
        )
    if not np.isfinite(image).all():
        return -1.0
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise MissingToolError(
            "SSIM of pictures",
            expected="the package scikit-image",
            found=str(error),
            remedy="pip install 'diffoundry[onnx]' (or scikit-image)",
        ) from error
    similarity = structural_similarity(
        np.asarray(reference, dtype=np.float64),
        np.asarray(image, dtype=np.float64),
        win_size=window,
        data_range=1.0,
        channel_axis=-1,
    )
    return float(similarity)
