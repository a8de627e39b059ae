"""Every stage that makes or changes a plan, in one build whose engines are checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffoundry.artifacts.bundle import open_bundle
from diffoundry.errors import ExitCode
from tests.end_to_end.commands import run
from tests.mini_pipelines import make_named

PROFILE = """
schema = "diffoundry.profile/1.0"
name = "options-mini"

[axes.batch]
min = 1
opt = 1
max = 2

[check]
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
name = "int8"
runtime = "onnx_session"
precision = "int8"
route = [
    { stage = "exported_program_from_torch" },
    { stage = "quantize_nncf", own_ranges = false },
    { stage = "choose_precision" },
    { stage = "onnx_from_exported_program", opset = 21 },
    { stage = "quantize_onnx" },
]

[variants.component_routes]
unet = [
    { stage = "split_upsampling", min_channels = 1 },
    { stage = "smooth_linear" },
    { stage = "split_for_quantization" },
    { stage = "exported_program_from_torch" },
    { stage = "quantize_fx", bias_correction = true },
    { stage = "recover_quantized", steps = 5 },
    { stage = "exported_program_from_torch" },
    { stage = "choose_precision" },
    { stage = "onnx_from_exported_program", opset = 21 },
    { stage = "quantize_onnx" },
]
"""


@pytest.mark.slow
def test_engines_of_every_option_are_what_their_plans_say(tmp_path: Path) -> None:
    model, out, cache = make_named(tmp_path / "lcm", "lcm"), tmp_path / "bundle", tmp_path / "cache"
    profile = tmp_path / "options.toml"
    profile.write_text(PROFILE)
    code, text = run(cache, "build", model, "--profile", profile, "--out", out)
    assert code == ExitCode.DONE, text
    (variant,) = open_bundle(out).manifest.variants
    assert set(variant.compression) == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
