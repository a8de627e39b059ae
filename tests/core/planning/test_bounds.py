"""What a build of a large model visits, and what it leaves out and says so."""

from __future__ import annotations

import pytest

from diffoundry.planning import bounds
from diffoundry.planning.planner import make_plan
from tests.mini_pipelines import make_named

PROFILE = """
schema = "diffoundry.profile/1.0"
name = "mine"
{check}
[axes.batch]
min = 1
opt = 1
max = 4
[axes.height]
unit = "pixels"
min = 16
opt = 32
max = 64
[axes.width]
unit = "pixels"
min = 16
opt = 32
max = 64
"""
VARIANT = """
[[variants]]
name = "{name}"
runtime = "onnx_session"
shapes = {shapes}
precision = "{precision}"
route = [
  {{ stage = "exported_program_from_torch" }},
  {{ stage = "onnx_from_exported_program", precision = "{precision}" }},
]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_named(tmp_path_factory.mktemp("model") / "lcm", "lcm")


@pytest.fixture
def plan_of(model, tmp_path):
    def plan(*shapes, check="", precision="fp32"):
        variants = [
            VARIANT.format(name=f"v{i}", shapes=one, precision=precision)
            for i, one in enumerate(shapes)
        ]
        file = tmp_path / "mine.toml"
        file.write_text(PROFILE.format(check=check) + "".join(variants))
        return make_plan(model, str(file))

    return plan


def captures(plan):
    nodes = [node for node in plan.nodes.values() if node.stage == "capture"]
    return {node.options["split"]: node.options for node in nodes}


def test_a_small_model_is_visited_at_every_corner(plan_of):
    options = captures(plan_of('"dynamic"'))["evaluation"]
    assert dict(options["shapes"][-1]) == {"batch": 4, "height": 64, "width": 64}
    assert "probe" not in options and "left_out" not in options


def test_a_large_model_is_visited_where_it_is_no_more_work_than_usual(plan_of, monkeypatch):
    monkeypatch.setattr(bounds, "LARGE", 1.0)
    options = captures(plan_of('"dynamic"'))["evaluation"]
    assert [dict(shape) for shape in options["shapes"]] == [{"batch": 1, "height": 16, "width": 16}]
    (untraced,) = options["untraced_shapes"]
    assert dict(untraced) == {"batch": 2, "height": 20, "width": 16}
    assert dict(options["probe"])["height"] == 16
    assert [dict(s) for s in options["left_out"]] == [{"batch": 4, "height": 64, "width": 64}]
    assert options["precisions"] == ("fp32",) and options["max_calls"] == 2


def test_all_shapes_can_be_asked_for(plan_of, monkeypatch):
    monkeypatch.setattr(bounds, "LARGE", 1.0)
    options = captures(plan_of('"dynamic"', check='[check]\nshapes = "all"'))["evaluation"]
    assert len(options["shapes"]) == 3 and "probe" not in options


def test_the_probe_is_a_shape_that_every_variant_has(plan_of, monkeypatch):
    monkeypatch.setattr(bounds, "LARGE", 1.0)
    listed = "[{ height = 32, width = 32 }, { height = 16, width = 32 }]"
    options = captures(plan_of('"dynamic"', listed))["evaluation"]
    assert dict(options["probe"]) == {"batch": 1, "height": 16, "width": 32}
    options = captures(plan_of('"fixed"'))["evaluation"]
    assert dict(options["probe"])["height"] == 32 and options["shapes"] == ()


def test_fp16_floors_are_measured_where_a_variant_needs_them(plan_of, monkeypatch):
    monkeypatch.setattr(bounds, "LARGE", 1.0)
    found = captures(plan_of('"dynamic"', precision="fp16"))
    assert found["evaluation"]["precisions"] == ("fp32", "fp16")
    assert len(found["calibration"]["pairs"]) == 2 and found["calibration"]["max_calls"] == 8


def test_a_large_models_text_encoder_still_reads_every_prompt_of_the_profile(plan_of, monkeypatch):
    """Its calls are cheap, and fewer than four of them calibrate nothing."""
    check = "[check]\ncalibration_pairs = 6\ntuning_pairs = 3"
    small = captures(plan_of('"dynamic"', check=check, precision="fp16"))
    monkeypatch.setattr(bounds, "LARGE", 1.0)
    large = captures(plan_of('"dynamic"', check=check, precision="fp16"))
    assert "calibration" in large and "texts" not in small["calibration"]
    for split, count in (("calibration", 2), ("tuning", 1)):
        if split in large:
            prompts = tuple(prompt for prompt, _ in small[split]["pairs"])
            assert large[split]["pairs"] == small[split]["pairs"][:count]
            assert large[split]["texts"] == prompts[count:]
    assert "texts" not in large["evaluation"]


@pytest.mark.parametrize("profile", ["openvino-cpu-bf16", "openvino-cpu-int8-bf16"])
def test_bfloat16_floors_are_measured_where_a_variant_computes_in_it(model, profile):
    found = captures(make_plan(model, profile))
    assert found["evaluation"]["precisions"] == ("fp32", "fp16", "bf16")
    assert "precisions" not in captures(make_plan(model, "openvino-cpu"))["evaluation"]
