"""Expected peaks grow with weights and pictures, and stand in every node."""

from __future__ import annotations

from diffoundry.models.pipeline import open_pipeline
from diffoundry.planning.memory import weights_bytes
from diffoundry.planning.planner import make_plan
from tests.mini_pipelines import make_pipeline

MIB = 1 << 20


def peaks(model):
    plan = make_plan(model, "onnx-cpu")
    return {(n.component, n.stage): n.expected_peak for n in plan.nodes.values()}


def test_peaks_grow_with_the_component_they_belong_to(tmp_path):
    small = make_pipeline(tmp_path / "small", kind="lcm")
    large = make_pipeline(tmp_path / "large", kind="lcm", widths=(64, 96))
    source = open_pipeline(large)
    weights = weights_bytes(source, "unet")
    before, after = peaks(small), peaks(large)
    grown = {key for key in after if after[key] > before[key]}
    assert {component for component, _ in grown} == {"unet", None}
    traced = ("unet", "exported_program_from_torch")
    assert after[traced] - before[traced] >= weights - weights_bytes(open_pipeline(small), "unet")
    assert min(after.values()) >= 100 * MIB


def test_an_autoencoders_halves_are_counted_apart(tmp_path):
    source = open_pipeline(make_pipeline(tmp_path / "model", kind="lcm"))
    both = sum(file.stat().st_size for file in source.components["vae_encoder"].weights)
    halves = [weights_bytes(source, name) for name in ("vae_encoder", "vae_decoder")]
    assert 0.6 * both < sum(halves) <= both and all(0 < half < both for half in halves)
