"""The parity table in strings."""

from __future__ import annotations

from diffoundry.parity.table import COLUMNS, messages, rows, summary
from diffoundry.types import CheckResult, Limits, Measure, ParityResult

MEASURE = Measure(1.5e-6, 1e-7, 0.9999991, 120.0, 110.0, 2.0, 1e-7)


def result(*checks: CheckResult) -> ParityResult:
    return ParityResult("unet", checks)


def test_a_call_shows_figure_limit_floor_and_status():
    check = CheckResult(
        "call", "model_output", "passed", "unet", MEASURE, Limits(peak_factor=1e-5, cosine=0.99999)
    )
    (row,) = rows([result(check)])
    assert dict(zip(COLUMNS, row, strict=True)) == {
        "check": "call: model_output",
        "component": "unet",
        "figure": "max_abs 1.50e-06, 110 dB SQNR, cosine 0.999999",
        "limit": "max_abs ≤ 2.00e-05, cosine ≥ 0.99999",
        "floor": "1e-07",
        "status": "passed",
    }


def test_a_swap_shows_the_change():
    check = CheckResult(
        "nothing_dropped",
        "timestep",
        "failed",
        "unet",
        MEASURE,
        Limits(cosine=0.99),
        {"norm_ratio": 0.5, "norm_tolerance": 0.05},
    )
    (row,) = rows([result(check)])
    assert row[2:4] == ("cosine 0.999999, size × 0.500", "cosine ≥ 0.99, size within 5 %")


def test_no_checks_is_a_failed_row():
    assert rows([result()])[0][-1] == "failed"
    assert summary(result()) == "unet: failed, 0 checks"


def test_a_pipeline_check_shows_its_pictures():
    check = CheckResult(
        "image",
        "psnr",
        "passed",
        limits=Limits(psnr_db=50, ssim=0.99),
        values={"worst_psnr_db": 61.25, "mean_psnr_db": 70.0},
    )
    (row,) = rows([result(check)])
    assert row[1] == "pipeline"
    assert row[2] == "PSNR worst 61.25 dB, mean 70 dB"
    assert row[3] == "psnr ≥ 50 dB, ssim ≥ 0.99"


def test_messages_name_the_check_and_the_summary_counts():
    good = CheckResult("call", "a", "passed", "unet")
    bad = CheckResult("precision", "arithmetic", "failed", "unet", message="bf16")
    late = CheckResult("call", "b", "deferred", "unet", message="no GPU")
    assert messages([result(good, bad)]) == ["failed: precision: arithmetic of unet: bf16"]
    assert summary(result(good)) == "unet: passed, 1 checks"
    assert summary(result(good, bad, late)) == "unet: failed, 1 of 3 checks"
    assert summary(result(good, late)) == "unet: deferred, 1 of 2 checks"
