"""Enumerated shapes: what a profile may list, and what the stages, recordings and checks get."""

from __future__ import annotations

import pytest

from diffoundry.errors import ProfileError
from diffoundry.planning.graph import node_of
from diffoundry.planning.planner import make_plan
from diffoundry.planning.shapes import declared_shapes, untraced_shape
from diffoundry.types import Axis
from tests.mini_pipelines import make_named

HEAD = """
schema = "diffoundry.profile/1.0"
name = "mine"
[axes.batch]
min = 1
opt = 1
max = 2
[axes.height]
unit = "pixels"
min = 32
opt = 32
max = 64
[axes.width]
unit = "pixels"
min = 32
opt = 32
max = 64
"""
ROUTE = """
route = [{ stage = "exported_program_from_torch" }, { stage = "onnx_from_exported_program" }]
"""
USUAL = "{ height = 32, width = 32 }"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_named(tmp_path_factory.mktemp("model") / "lcm", "lcm")


@pytest.fixture
def plan_of(model, tmp_path):
    def plan(*shapes, head=HEAD):
        variants = "".join(
            f'[[variants]]\nname = "v{i}"\nruntime = "onnx_session"\nshapes = {one}\n{ROUTE}'
            for i, one in enumerate(shapes)
        )
        (tmp_path / "mine.toml").write_text(head + variants)
        return make_plan(model, str(tmp_path / "mine.toml"))

    return plan


def policy_of(plan, component="unet", variant=0):
    node_id, _, output = plan.variants[variant].engines[component].partition(":")
    return plan.nodes[node_id].outputs[output].shape_policy


def captures(plan):
    return [n for n in plan.nodes.values() if n.options.get("split") == "evaluation"]


def test_a_list_of_shapes_becomes_an_enumerated_policy_with_usual_values_filled_in(plan_of):
    policy = policy_of(plan_of(f"[{USUAL}, {{ height = 64, batch = 2 }}]"))
    assert policy.kind == "enumerated"
    assert [dict(shape) for shape in policy.shapes] == [
        {"batch": 1, "height": 32, "width": 32},
        {"batch": 2, "height": 64, "width": 32},
    ]
    assert policy.allows({"batch": 2, "height": 64, "width": 32})
    assert policy.allows({"batch": 2})  # of a component without sides
    assert not policy.allows({"batch": 2, "height": 32, "width": 32})


def test_native_sizes_count_in_the_models_own_and_are_rounded_to_legal_ones(plan_of):
    plan = plan_of(f'[{USUAL}, {{ unit = "native", height = 3.05, width = 4 }}]')
    assert plan.source.geometry.native_height_pixels == 16
    (_, second) = policy_of(plan).shapes
    assert dict(second) == {"batch": 1, "height": 48, "width": 64}


def test_the_stages_are_told_that_shapes_are_enumerated_and_which(plan_of):
    plan = plan_of(f"[{USUAL}, {{ height = 64, width = 64 }}]")
    trace = next(n for n in plan.nodes.values() if n.stage == "exported_program_from_torch")
    assert trace.options["shapes"] == "enumerated"


def test_the_one_recording_holds_every_listed_shape_and_no_other(plan_of):
    plan = plan_of(f"[{USUAL}, {{ height = 64, width = 48 }}]")
    (capture,) = captures(plan)
    heights = [dict(shape)["height"] for shape in capture.options["shapes"]]
    assert heights == [32, 64] and capture.options["untraced_shapes"] == ()


def test_variants_of_all_kinds_share_one_recording(plan_of):
    plan = plan_of(f"[{USUAL}, {{ height = 64, width = 48 }}]", '"dynamic"', '"fixed"')
    (capture,) = captures(plan)
    recorded = [dict(shape) for shape in capture.options["shapes"]]
    assert {"batch": 1, "height": 64, "width": 48} in recorded
    assert {"batch": 2, "height": 64, "width": 64} in recorded  # the dynamic variant's corner
    assert len(capture.options["untraced_shapes"]) == 1
    for variant in plan.variants:
        check = plan.nodes[node_of(variant.checks["unet"])]
        assert node_of(check.inputs["recording"]) == capture.id


@pytest.mark.parametrize(
    ("shapes", "hint"),
    [
        ("[]", "needs at least one"),
        (f"[{USUAL}, {USUAL}]", "stands twice"),
        (f"[{USUAL}, {{ batch = 1, height = 32 }}]", "the same shape as shapes.0"),
        (f"[{USUAL}, {{ height = 42 }}]", "height=42 is not a multiple of"),
        (f"[{USUAL}, {{ width = 128 }}]", r"width=128 is outside 32\.\.64"),
        (f"[{USUAL}, {{ height = 48.5 }}]", "whole numbers"),
        (
            f"[{USUAL}, {{ heigth = 64 }}]",
            r"shapes\.1\.heigth: no such field .did you mean 'height'",
        ),
        (f"[{USUAL}, {{ batch = 0 }}]", r"shapes\.1\.batch"),
        ("[{ height = 64, width = 64 }]", "without the usual shape"),
        ('"dynamc"', "did you mean 'dynamic'"),
        ("7", "dynamic, fixed"),
    ],
)
def test_a_wrong_list_is_refused_and_says_which_shape_is_wrong(plan_of, shapes, hint):
    with pytest.raises(ProfileError, match=hint):
        plan_of(shapes)


def test_all_wrong_shapes_are_named_at_once(plan_of):
    with pytest.raises(ProfileError, match=r"shapes\.1: height=42.*shapes\.2: width=128"):
        plan_of(f"[{USUAL}, {{ height = 42 }}, {{ width = 128 }}]")


def test_an_untraced_shape_keeps_off_listed_values_on_every_axis():
    """A text encoder has the batch alone: a listed batch of 2 is no longer new to it."""
    axes = (Axis("batch", 1, 1, 4), Axis("height", 32, 64, 128, 16), Axis("width", 32, 64, 128, 16))
    listed = [{"batch": 2, "height": 48, "width": 96}]
    untraced = untraced_shape(axes, listed)
    assert untraced is not None
    assert all(untraced[name] != value for name, value in listed[0].items())
    assert untraced not in declared_shapes(axes, "dynamic")
