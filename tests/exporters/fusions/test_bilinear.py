"""Algorithms for 3×3 convolutions: right along an axis, and not far from exact in float32."""

from __future__ import annotations

import numpy as np
import pytest

from diffoundry.exporters.fusions.bilinear import F2, F4, UP, Bilinear

ALGORITHMS = (F2, F4, UP)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)
def test_along_one_axis_it_is_a_convolution(algorithm: Bilinear) -> None:
    read, taps, write = algorithm.matrices
    random = np.random.default_rng(0)
    window, weights = random.standard_normal(algorithm.window), random.standard_normal(3)
    plane = np.repeat(window, 2)[1:-1] if algorithm is UP else window
    found = write @ ((taps @ weights) * (read @ window))
    assert np.allclose(found, np.correlate(plane, weights, "valid"), atol=1e-14)
    assert found.size == algorithm.tile


def test_products_are_fewer_than_nine_an_output() -> None:
    assert [a.planes / a.tile**2 for a in ALGORITHMS] == [4.0, 2.25, 2.25]


@pytest.mark.parametrize(("algorithm", "most"), [(F2, 2.5), (F4, 8.0), (UP, 2.5)])
def test_float32_rounds_little_more_than_a_direct_convolution(
    algorithm: Bilinear, most: float
) -> None:
    """The root mean square of the error of one tile over 256 channels."""
    random = np.random.default_rng(1)
    side = algorithm.window
    d = random.standard_normal((200, 256, side, side)).astype(np.float32)
    w = (random.standard_normal((8, 256, 3, 3)) / 48).astype(np.float32)
    planes = np.einsum("qij,ncij->qnc", algorithm.reading()[:, 0], d, optimize=True)
    products = np.matmul(planes, algorithm.weights(w).transpose(0, 2, 1))
    found = np.einsum("qno,qij->noij", products, algorithm.writing()[:, 0], optimize=True)
    plane = np.repeat(np.repeat(d, 2, 2), 2, 3)[..., 1:-1, 1:-1] if algorithm is UP else d
    windows = np.lib.stride_tricks.sliding_window_view(plane, (3, 3), (2, 3))
    rows = np.ascontiguousarray(windows.transpose(0, 2, 3, 1, 4, 5)).reshape(-1, 256 * 9)
    columns = w.reshape(8, -1).T
    shape = (200, algorithm.tile, algorithm.tile, 8)
    exact = (rows.astype(np.float64) @ columns.astype(np.float64)).reshape(shape)
    direct = (rows @ columns).reshape(shape)

    def error(values: np.ndarray) -> float:
        return float(np.sqrt(((values - exact) ** 2).mean()))

    assert found.dtype == np.float32
    assert error(found.transpose(0, 2, 3, 1)) < most * error(direct)
