"""What is asked of TensorRT's builder, and how its refusals are told. The builder is a stand-in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffoundry.errors import StageError
from diffoundry.runtimes.tensorrt.builder import build_engine
from tests.runtimes.tensorrt.doubling import doubling_build


def asked(trt: Any, tmp_path: Path, **options: Any) -> dict[str, Any]:
    artifact = doubling_build(tmp_path / "build", **options)
    return dict(json.loads(build_engine(trt, artifact.path, tmp_path / "timings")))


def test_by_default_nothing_lowers_the_precision(trt: Any, tmp_path: Path) -> None:
    plan = asked(trt, tmp_path)
    assert plan["flags"] == [] and plan["workspace"] is None and plan["level"] == 3
    assert plan["profiles"] == [
        {"x": [[1, 1], [1, 2], [4, 2]]},
        {"x": [[1, 3], [1, 4], [4, 8]]},
    ]


def test_every_option_reaches_the_builder(trt: Any, tmp_path: Path) -> None:
    plan = asked(
        trt,
        tmp_path,
        workspace_bytes=2**20,
        weight_streaming=True,
        refit=True,
        version_compatible=True,
        optimization_level=5,
    )
    assert plan["flags"] == ["REFIT", "VERSION_COMPATIBLE", "WEIGHT_STREAMING"]
    assert (plan["workspace"], plan["level"]) == (2**20, 5)


def test_timings_of_earlier_builds_are_used_and_kept(trt: Any, tmp_path: Path) -> None:
    file = tmp_path / "cache" / "timings"
    artifact = doubling_build(tmp_path / "build")
    build_engine(trt, artifact.path, file)
    assert file.read_bytes() == b"timings"
    build_engine(trt, artifact.path, file)
    trt.now.refuses_timings = True
    build_engine(trt, artifact.path, file)
    assert [plan["timings"] for plan in trt.now.built] == ["", "timings", ""]


def test_what_the_parser_refuses_is_told_with_the_node(trt: Any, tmp_path: Path) -> None:
    trt.now.parser_errors = [
        trt.ParserError("twice", "Add", "no importer"),
        trt.ParserError("thrice", "Mul", "bad type"),
    ]
    with pytest.raises(StageError) as caught:
        asked(trt, tmp_path)
    assert "node 3 twice (Add): no importer" in caught.value.found
    assert "thrice (Mul): bad type" in caught.value.found


def test_what_the_builder_refuses_names_the_layer_at_fault(trt: Any, tmp_path: Path) -> None:
    trt.now.builder_error = "Could not find any implementation for node /conv_out/Conv."
    with pytest.raises(StageError) as caught:
        asked(trt, tmp_path)
    assert caught.value.where.endswith(": /conv_out/Conv")
    assert "Could not find any implementation" in caught.value.found


def test_a_profile_that_is_refused_is_told(trt: Any, tmp_path: Path) -> None:
    trt.now.refuses_profile = True
    with pytest.raises(StageError, match="optimization profile"):
        asked(trt, tmp_path)
