"""Engines in bfloat16, alone and beside INT8: built, checked as such, and read again."""

from __future__ import annotations

from pathlib import Path

from diffoundry.artifacts.bundle import open_bundle
from diffoundry.errors import ExitCode
from diffoundry.formats import openvino
from tests.end_to_end.commands import run_json
from tests.mini_pipelines import make_named

PROFILE = """
schema = "diffoundry.profile/1.0"
name = "bf16-mini"

[check]
judge_pairs = 1
recorded_trajectories = 1
calibration_pairs = 4
calibration_calls = 16
tuning_pairs = 2

[limits.drift]
sqnr_db = 15

[limits.trajectory]
psnr_db = 1

[limits.image]
psnr_db = 1

[[variants]]
name = "bf16"
runtime = "openvino_session"
precision = "bf16"
route = [
    { stage = "exported_program_from_torch" },
    { stage = "onnx_from_exported_program", opset = 18 },
    { stage = "openvino_from_onnx", precision = "bf16" },
]

[[variants]]
name = "int8-bf16"
runtime = "openvino_session"
precision = "int8_bf16"
route = [
    { stage = "exported_program_from_torch" },
    { stage = "quantize_fx" },
    { stage = "onnx_from_exported_program", opset = 18 },
    { stage = "quantize_onnx", form = "qdq" },
    { stage = "openvino_from_onnx", precision = "int8_bf16" },
]
"""


def test_bfloat16_engines_are_built_checked_as_such_and_verified(tmp_path: Path) -> None:
    model, out, cache = make_named(tmp_path / "lcm", "lcm"), tmp_path / "bundle", tmp_path / "cache"
    profile = tmp_path / "bf16.toml"
    profile.write_text(PROFILE)
    code, document = run_json(cache, "build", model, "--profile", profile, "--out", out)
    device = openvino.import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    units = "BF16" in device
    assert code == (ExitCode.DONE if units else ExitCode.DEFERRED), document
    precisions = {v.name: v.precision for v in open_bundle(out).manifest.variants}
    assert precisions == {"bf16": "bf16", "int8-bf16": "int8_bf16"}
    for variant in document["bundle"]["variants"]:
        checks = [check for result in variant["parity"] for check in result["checks"]]
        lines = [check for check in checks if check["level"] == "precision"]
        assert {line["status"] for line in lines} == {"passed" if units else "deferred"}
        used = {one for line in lines for one in line["values"]["computes_in"]}
        assert ("bf16" in used) is units and ("int8" in used) is (variant["name"] == "int8-bf16")
    code, document = run_json(cache, "verify", out)
    assert code == (ExitCode.DONE if units else ExitCode.DEFERRED), document
