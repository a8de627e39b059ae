"""Figures against values worked out by hand, and what happens at their edges."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from diffoundry.errors import ContractError, MissingToolError, ModelError
from diffoundry.quality.differences import (
    DB_CAP,
    NOT_FINITE,
    cosine,
    image_psnr_db,
    image_ssim,
    measure,
    ratio_db,
)


def test_figures_of_a_known_error():
    reference = np.array([3.0, -4.0], np.float32)
    found = measure(reference, np.array([3.5, -4.0], np.float32), floor=0.25)
    assert found.max_abs == 0.5
    assert found.mean_abs == 0.25
    assert found.peak == 4.0
    assert found.floor == 0.25
    assert found.psnr_db == pytest.approx(10 * np.log10(16 / 0.125))
    assert found.sqnr_db == pytest.approx(10 * np.log10(12.5 / 0.125))
    assert found.cosine == pytest.approx((3 * 3.5 + 16) / (5 * np.hypot(3.5, 4)))


def test_identical_arrays_are_capped_not_infinite():
    found = measure(np.ones(3), np.ones(3))
    assert (found.max_abs, found.cosine, found.psnr_db, found.sqnr_db) == (0, 1, DB_CAP, DB_CAP)


def test_sums_are_kept_in_float64():
    """In float16 the sum of squares would overflow."""
    reference = np.full(1000, 300, np.float16)
    found = measure(reference, reference + np.float16(1))
    assert found.mean_abs == pytest.approx(1.0)
    assert found.cosine == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_gets_the_worst_finite_figures(bad):
    found = measure(np.ones(2), np.array([1.0, bad]))
    assert (found.max_abs, found.cosine, found.sqnr_db) == (NOT_FINITE, -1.0, -DB_CAP)


def test_a_reference_that_is_not_finite_is_refused():
    with pytest.raises(ModelError):
        measure(np.array([np.nan]), np.ones(1))


@pytest.mark.parametrize(("left", "right"), [((2,), (3,)), ((0,), (0,)), ((1, 2), (2,))])
def test_shapes_that_differ_or_hold_nothing_are_refused(left, right):
    with pytest.raises(ContractError):
        measure(np.zeros(left), np.zeros(right))


def test_cosine_of_zero_vectors():
    assert cosine(np.zeros(3), np.zeros(3)) == 1.0
    assert cosine(np.zeros(3), np.ones(3)) == 0.0
    assert cosine(np.ones(3), -np.ones(3)) == -1.0


@pytest.mark.parametrize(
    ("signal", "noise", "db"), [(1, 0, 300), (0, 1, -300), (100, 1, 20), (1, 1e-99, 300)]
)
def test_decibels(signal, noise, db):
    assert ratio_db(signal, noise) == pytest.approx(db)


def picture(side: int) -> np.ndarray:
    return np.random.default_rng(0).random((side, side, 3)).astype(np.float32)


def test_psnr_of_a_picture_has_peak_one():
    assert image_psnr_db(picture(8), picture(8) + 0.01) == pytest.approx(40, abs=1e-3)


@pytest.mark.parametrize("side", [3, 4, 6, 7, 64])
def test_ssim_adapts_its_window_to_small_pictures(side):
    assert image_ssim(picture(side), picture(side)) == pytest.approx(1.0)
    assert image_ssim(picture(side), 1 - picture(side)) < 0.5


def test_ssim_of_a_sick_picture_is_the_worst():
    assert image_ssim(picture(8), np.full((8, 8, 3), np.nan)) == -1.0
    assert image_psnr_db(picture(8), np.full((8, 8, 3), np.inf)) == -DB_CAP


def test_ssim_refuses_pictures_it_cannot_compare():
    with pytest.raises(ContractError):
        image_ssim(picture(2), picture(2))
    with pytest.raises(ContractError):
        image_ssim(picture(8), picture(9))


def test_ssim_without_its_package_is_a_missing_tool(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(MissingToolError, match="scikit-image"):
        image_ssim(picture(8), picture(8))
