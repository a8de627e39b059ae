"""The Fréchet distance between two sets of features, taken as normal distributions."""

from __future__ import annotations

import numpy as np

from diffoundry.errors import ContractError
from diffoundry.types import Array


def frechet_distance(one: Array, other: Array) -> float:
    """Squared Fréchet distance of features [n, d] and [m, d]; 0 or more. n, m ≥ 2.

    |μ1 − μ2|² + tr(Σ1) + tr(Σ2) − 2 tr((Σ1 Σ2)^½) (Dowson & Landau 1982; Heusel et al. 2017), with
    unbiased covariances. With square roots Σ = RᵀR the last trace is the sum of the singular
    values of R1 R2ᵀ. The centred features themselves are such roots, so no covariance is ever
    formed or rooted: fewer pictures than dimensions, the usual case here, cost no accuracy, where
    a general matrix square root needs an offset and returns complex numbers.
    Raises ContractError.
    """
    for features in (one, other):
        if features.ndim != 2 or len(features) < 2 or features.shape[1:] != one.shape[1:]:
            raise ContractError(
                "Fréchet distance",
                expected="two sets of at least two features of one length",
                found=f"{list(one.shape)} and {list(other.shape)}",
            )
        if not np.isfinite(features).all():
            raise ContractError(
                "Fréchet distance", expected="finite features", found="NaN or infinity"
            )
    (mean_one, root_one), (mean_other, root_other) = _moments(one), _moments(other)
    between = np.linalg.svd(root_one @ root_other.T, compute_uv=False).sum()
    spread = np.square(root_one).sum() + np.square(root_other).sum() - 2 * between
    # Rounding can leave a hair below zero where the two are equal.
    return max(0.0, float(np.square(mean_one - mean_other).sum() + spread))


def _moments(features: Array) -> tuple[Array, Array]:
    """Mean [d], and R [min(n, d), d] with RᵀR the covariance, in float64."""
    values = features.astype(np.float64)
    mean = values.mean(0)
    root = (values - mean) / np.sqrt(len(values) - 1)
    if len(root) > root.shape[1]:
        root = np.linalg.qr(root, mode="r")
    return mean, root
