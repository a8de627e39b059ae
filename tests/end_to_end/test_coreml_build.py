"""A bundle of Core ML packages without a Mac: built, checked by the stand-in, and deferred."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from diffoundry.errors import ExitCode
from diffoundry.formats import mlpackage
from tests.end_to_end.commands import run, run_json
from tests.mini_pipelines import make_named

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="a Mac defers nothing")

PROFILE = """
schema = "diffoundry.profile/1.0"
name = "two-coreml"
description = "a variant that works, and one that coremltools cannot convert"

[axes.batch]
min = 1
opt = 1
max = 2

[[variants]]
name = "works"
runtime = "coreml_native"
device = "all"
shapes = "fixed"
route = [
    { stage = "exported_program_from_torch" },
    { stage = "coreml_from_exported_program", author = "Ann" },
]

[[variants]]
name = "batch-moves"
runtime = "coreml_native"
device = "all"
shapes = "dynamic"
route = [
    { stage = "exported_program_from_torch" },
    { stage = "coreml_from_exported_program" },
]
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[int, Any, Path]:
    """(exit code, the build's JSON document, the bundle)."""
    folder = tmp_path_factory.mktemp("coreml")
    model = make_named(folder / "lcm", "lcm")
    (folder / "profile.toml").write_text(PROFILE)
    out = folder / "bundle"
    code, document = run_json(
        cache, "build", model, "--profile", folder / "profile.toml", "--out", out
    )
    return code, document, out


def test_a_converter_that_raises_costs_its_own_variant(built: tuple[int, Any, Path]) -> None:
    code, document, _ = built
    assert code == ExitCode.FAILED
    works, moves = document["bundle"]["variants"]
    assert works["published"] and not moves["published"]
    assert "coreml_from_exported_program" in moves["error"]["where"]
    assert "symbolic" in moves["error"]["found"]


def test_the_stand_in_runs_everything_and_the_native_check_stays_deferred(
    built: tuple[int, Any, Path],
) -> None:
    works = built[1]["bundle"]["variants"][0]
    checks = [check for result in works["parity"] for check in result["checks"]]
    assert {check["status"] for check in checks} == {"passed", "info", "deferred"}
    deferred = [check for check in checks if check["status"] == "deferred"]
    assert len(deferred) == 5 and {check["level"] for check in deferred} == {"device"}
    assert all("not on the device" in check["message"] for check in deferred)


def test_verify_exits_4_and_says_who_checked(built: tuple[int, Any, Path], cache: Path) -> None:
    code, text = run(cache, "verify", built[2])
    assert code == ExitCode.DEFERRED and "only DEFERRED checks remain" in text
    assert "mil_reference" in text and "not on the device" in text


def test_generate_says_that_the_stand_in_draws_the_named_variant(
    built: tuple[int, Any, Path], cache: Path, tmp_path: Path
) -> None:
    code, text = run(cache, "generate", built[2], "a cat", "--out", tmp_path, "--variant", "works")
    assert code == ExitCode.DONE and "mil_reference stands in" in text
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_packages_are_named_after_their_component(built: tuple[int, Any, Path]) -> None:
    engines = built[2] / "engines" / "works"
    assert sorted(path.name for path in engines.glob("*/*")) == [
        "text_encoder.mlpackage", "unet.mlpackage", "vae_decoder.mlpackage",
        "vae_encoder.mlpackage",
    ]  # fmt: skip
    assert mlpackage.read_spec(engines / "unet").description.metadata.author == "Ann"
