"""The parity_result format: round trip, equal bytes, damage noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffoundry.errors import ArtifactError
from diffoundry.formats import parity_result
from diffoundry.types import CheckResult, Limits, Measure, ParityResult

RESULT = ParityResult(
    "unet",
    (
        CheckResult(
            "call",
            "model_output",
            "failed",
            "unet",
            Measure(1e-6, 1e-7, 0.999, 80.0, 70.0, 2.0, None),
            Limits(peak_factor=1e-5),
            {"calls": 2, "failed_calls": [1]},
            "max_abs is above",
        ),
        CheckResult("precision", "arithmetic", "deferred", message="no GPU"),
    ),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / parity_result.FILE
    parity_result.save(RESULT, file)
    return file


def test_it_comes_back_as_it_was(path):
    assert parity_result.load(path) == RESULT
    parity_result.validate(path)
    assert parity_result.size_bytes(path) == path.stat().st_size


def test_equal_results_give_equal_bytes(path, tmp_path):
    other = tmp_path / "other.json"
    parity_result.save(RESULT, other)
    assert parity_result.digest(other) == parity_result.digest(path)


def test_figures_that_json_cannot_hold_are_refused(tmp_path):
    sick = ParityResult("unet", (CheckResult("call", "x", "passed", values={"a": float("nan")}),))
    with pytest.raises(ArtifactError, match="finite"):
        parity_result.save(sick, tmp_path / "x.json")
    assert not list(tmp_path.iterdir())


def test_a_status_that_does_not_exist_is_refused(path):
    path.write_text(path.read_text().replace('"failed"', '"fine"'))
    with pytest.raises(ArtifactError):
        parity_result.load(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "diffoundry.parity_result/1.0"}'])
def test_a_file_that_is_no_result_is_refused(path, text):
    path.write_text(text)
    with pytest.raises(ArtifactError):
        parity_result.validate(path)


def test_a_newer_major_schema_is_refused_and_a_newer_minor_is_read(path):
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "schema": "diffoundry.parity_result/1.7"}))
    assert parity_result.load(path) == RESULT
    path.write_text(json.dumps({**document, "schema": "diffoundry.parity_result/2.0"}))
    with pytest.raises(ArtifactError):
        parity_result.load(path)
