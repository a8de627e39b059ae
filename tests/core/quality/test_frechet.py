"""The Fréchet distance against closed forms, and against scipy's general matrix square root."""

from __future__ import annotations

import numpy as np
import pytest

from diffoundry.errors import ContractError
from diffoundry.quality.frechet import frechet_distance


def exact(mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Features whose sample mean and unbiased covariance are exactly these."""
    d = len(mean)
    points = np.vstack([np.eye(d), -np.eye(d)]) * np.sqrt((2 * d - 1) / 2)
    return mean + points @ np.linalg.cholesky(covariance).T


def test_one_dimension_has_the_well_known_form() -> None:
    one, other = exact(np.array([1.0]), np.eye(1) * 4), exact(np.array([4.0]), np.eye(1) * 25)
    assert frechet_distance(one, other) == pytest.approx((1 - 4) ** 2 + (2 - 5) ** 2)


def test_covariances_that_commute_differ_by_their_roots() -> None:
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.standard_normal((5, 5)))
    a, b = rng.uniform(0.1, 4, 5), rng.uniform(0.1, 4, 5)
    shift = rng.standard_normal(5)
    one = exact(np.zeros(5), turn @ np.diag(a) @ turn.T)
    other = exact(shift, turn @ np.diag(b) @ turn.T)
    expected = shift @ shift + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert frechet_distance(one, other) == pytest.approx(expected)


def test_any_covariances_agree_with_a_general_square_root() -> None:
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(1)
    one = rng.standard_normal((60, 8)) @ rng.standard_normal((8, 8))
    other = rng.standard_normal((50, 8)) @ rng.standard_normal((8, 8)) + 0.5
    a, b = np.cov(one.T), np.cov(other.T)
    shift = one.mean(0) - other.mean(0)
    expected = shift @ shift + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-9)


def test_fewer_pictures_than_dimensions_are_no_trouble() -> None:
    """Singular covariances, where a general square root needs an offset."""
    rng = np.random.default_rng(2)
    features = rng.standard_normal((6, 200)).astype(np.float32)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, features + 1) == pytest.approx(200, rel=1e-5)
    scaled = frechet_distance(features, 3 * features)
    spread, mean = features.var(0, ddof=1).sum(), np.square(features.mean(0)).sum()
    assert scaled == pytest.approx(4 * (spread + mean), rel=1e-5)


def test_the_order_of_pictures_does_not_matter() -> None:
    features = np.random.default_rng(3).standard_normal((40, 10))
    assert frechet_distance(features, features[::-1]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "other",
    [np.zeros((1, 4)), np.zeros((3, 5)), np.zeros(4), np.full((3, 4), np.nan)],
    ids=["one picture", "another length", "no set", "not finite"],
)
def test_what_has_no_distance_is_refused(other: np.ndarray) -> None:
    with pytest.raises(ContractError, match="Fréchet"):
        frechet_distance(np.ones((3, 4)), other)
