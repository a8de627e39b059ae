"""`build` and `verify` for TensorRT on a host without it: everything but the engine, said aloud."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffoundry.errors import ExitCode
from diffoundry.runtimes.tensorrt_engine import TensorrtEngine
from tests.end_to_end.commands import run
from tests.mini_pipelines import make_named

PROFILE = """
schema = "diffoundry.profile/1.0"
name = "tensorrt-mini"

[[variants]]
name = "tensorrt-mini"
runtime = "tensorrt_engine"
device = "cuda"
precision = "fp32"
shapes = "fixed"
route = [
    { stage = "exported_program_from_torch" },
    { stage = "onnx_from_exported_program" },
    { stage = "tensorrt_from_onnx", cuda_graph = true },
]
"""


@pytest.mark.slow
def test_a_build_is_published_deferred_and_says_so(tmp_path: Path) -> None:
    if TensorrtEngine().unavailable("cuda") is None:
        pytest.skip("this host has TensorRT: nothing is deferred")
    model, out = make_named(tmp_path / "lcm", "lcm"), tmp_path / "bundle"
    (tmp_path / "mini.toml").write_text(PROFILE)
    cache, profile = tmp_path / "cache", tmp_path / "mini.toml"
    code, text = run(cache, "build", model, "--profile", profile, "--out", out)
    assert code == ExitCode.DONE, text
    assert "deferred: the engine is not built here" in text
    assert "DEFERRED to the target host" in text
    build = out / "engines" / "tensorrt-mini" / "unet"
    assert {path.name for path in build.iterdir()} == {
        "README.md",
        "build.json",
        "onnx",
        "polygraphy_inputs.py",
    }
    assert not list(out.rglob("*.plan"))
    code, text = run(cache, "verify", out)
    assert code == ExitCode.DEFERRED, text
    assert "tensorrt_engine cannot run on this host" in " ".join(text.split())
    code, text = run(cache, "verify", out, "--allow-deferred")
    assert code == ExitCode.DONE, text
