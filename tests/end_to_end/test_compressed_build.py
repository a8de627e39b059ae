"""A build with a pruned variant: its records travel, it is timed, and the gate holds it back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffoundry.artifacts.bundle import open_bundle
from diffoundry.artifacts.evidence import evidence_path, read_evidence
from diffoundry.errors import ExitCode
from diffoundry.formats.canonical import sha256_file
from tests.end_to_end.commands import run, run_json
from tests.mini_pipelines import make_named

PROFILE = """
schema = "diffoundry.profile/1.0"
name = "pruned-mini"

[axes.batch]
min = 1
opt = 1
max = 2

[limits.drift]
sqnr_db = 0.1

[limits.trajectory]
psnr_db = 1

[limits.image]
psnr_db = 1

[[variants]]
name = "full"
runtime = "onnx_session"
route = [{ stage = "exported_program_from_torch" }, { stage = "onnx_from_exported_program" }]

[[variants]]
name = "pruned"
runtime = "onnx_session"
power = "low"
route = [{ stage = "exported_program_from_torch" }, { stage = "onnx_from_exported_program" }]

[variants.component_routes]
unet = [
    { stage = "prune_structured", ratio = 0.05 },
    { stage = "exported_program_from_torch" },
    { stage = "onnx_from_exported_program" },
]
"""


@pytest.mark.slow
def test_a_pruned_variant_says_what_it_gains_and_travels_with_its_records(tmp_path: Path) -> None:
    model, out, cache = make_named(tmp_path / "lcm", "lcm"), tmp_path / "bundle", tmp_path / "cache"
    profile = tmp_path / "pruned.toml"
    profile.write_text(PROFILE)
    code, text = run(cache, "build", model, "--profile", profile, "--out", out)
    assert code == ExitCode.DONE, text
    assert "does it pay? pruned against full, on this host:" in text
    assert "pruned · unet: " in text and "pruned · text_encoder: the same engine" in text
    bundle = open_bundle(out)
    full, pruned = bundle.manifest.variants
    assert not full.compressed and pruned.power == "low" and set(pruned.compression) == {"unet"}
    _, (record,) = bundle.compression(pruned, "unet")
    parameters = json.loads(record.read_text())["parameters"]
    assert parameters["after"] < parameters["before"]
    gain = read_evidence(evidence_path(out)).variants["pruned"].gain
    assert gain is not None and gain.picture is not None and gain.against == "full"
    code, again = run(cache, "build", model, "--profile", profile, "--out", out)
    assert code == ExitCode.DONE and f"pruned · unet: {gain.components['unet'].word}" in again
    code, text = run(cache, "verify", out)
    assert code == ExitCode.DONE, text
    _gate(model, profile, out, cache)
    code, document = run_json(cache, "generate", out, "a red circle", "--power", "low",
                              "--out", tmp_path / "p")  # fmt: skip
    assert code == ExitCode.DONE and document["variant"] == "pruned"
    assert document["why"].startswith("the first of power low")
    code, text = run(cache, "generate", out, "x", "--power", "full")
    assert code == ExitCode.FAILED and "pruned (low)" in text


def _gate(model: Path, profile: Path, out: Path, cache: Path) -> None:
    """The variant that gains too little is left out, the other is published; exit 1."""
    before = sha256_file(out / "manifest.json")
    elsewhere = out.with_name("gated")
    code, text = run(cache, "build", model, "--profile", profile, "--out", elsewhere,
                     "--require-gain", "1000")  # fmt: skip
    assert code == ExitCode.FAILED and "pruned: not published, --require-gain 1000 failed" in text
    assert "at least 1000 × as fast" in " ".join(text.split())
    assert [v.name for v in open_bundle(elsewhere).manifest.variants] == ["full"]
    assert sha256_file(out / "manifest.json") == before
