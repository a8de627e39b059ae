"""Limits: which are broken, in words, and how near the others are."""

from __future__ import annotations

import pytest

from diffoundry.parity.limits import LOSSLESS, has_limits, judge, strain
from diffoundry.types import Limits, Measure

GOOD = Measure(1e-6, 1e-7, 0.9999, 80.0, 70.0, peak=2.0, floor=1e-7)


def with_error(max_abs: float, peak: float = 2.0, floor: float | None = 1e-7) -> Measure:
    return Measure(max_abs, 0.0, 1.0, 80.0, 70.0, peak, floor)


@pytest.mark.parametrize(
    ("measure", "ok"),
    [
        (with_error(1.9e-5), True),  # below 1e-5 × peak
        (with_error(2.1e-5), False),
        (with_error(0.9e-3, floor=1e-4), True),  # below 10 × floor
        (with_error(1.1e-3, floor=1e-4), False),
        (with_error(1.9e-5, floor=None), True),
        (with_error(1e-9, peak=0.0, floor=0.0), False),
        (with_error(0.0, peak=0.0, floor=0.0), True),
    ],
)
def test_the_lossless_limit_follows_peak_and_floor(measure, ok):
    assert (judge(measure, LOSSLESS) == []) is ok
    assert (strain(measure, LOSSLESS) <= 1) is ok


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(max_abs=1e-7), "max_abs 1e-06 is above 1e-07"),
        (Limits(cosine=0.99999), "cosine 0.9999 is below 0.99999"),
        (Limits(psnr_db=90), "psnr_db 80 is below 90"),
        (Limits(sqnr_db=71), "sqnr_db 70 is below 71"),
    ],
)
def test_each_figure_has_its_own_limit(limits, words):
    assert judge(GOOD, limits) == [words]
    assert strain(GOOD, limits) > 1
    assert has_limits(limits)


def test_every_broken_limit_is_named():
    assert len(judge(GOOD, Limits(max_abs=1e-9, cosine=1.0, psnr_db=99, sqnr_db=99))) == 4


def test_an_absolute_limit_tightens_the_relative_one():
    both = Limits(peak_factor=1e-5, max_abs=1e-6)
    assert judge(with_error(1.9e-5), both)
    assert not judge(with_error(0.9e-6), both)


def test_nothing_limited():
    assert not has_limits(Limits(ssim=0.9, floor_factor=3.0))
    assert judge(GOOD, Limits()) == []
