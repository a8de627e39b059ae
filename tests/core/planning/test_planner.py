"""Planning: what a profile and a model become, without torch and without running anything."""

from __future__ import annotations

import subprocess
import sys

import pytest

from diffoundry.errors import ProfileError, UsageError
from diffoundry.planning.graph import node_of
from diffoundry.planning.planner import make_plan
from diffoundry.planning.shapes import declared_shapes, untraced_shape
from diffoundry.profiles.reading import shipped_profiles
from diffoundry.types import Axis
from tests.mini_pipelines import make_named

ROUTE = """
route = [{ stage = "exported_program_from_torch" }, { stage = "onnx_from_exported_program" }]
"""
HEAD = 'schema = "diffoundry.profile/1.0"\nname = "mine"\n'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_named(tmp_path_factory.mktemp("model") / "lcm", "lcm")


@pytest.fixture
def plan_of(model, tmp_path):
    def plan(text):
        (tmp_path / "mine.toml").write_text(HEAD + text)
        return make_plan(model, str(tmp_path / "mine.toml"))

    return plan


def variant(name, more=""):
    return f'[[variants]]\nname = "{name}"\nruntime = "onnx_session"\n{more}{ROUTE}'


@pytest.mark.parametrize("profile", sorted(shipped_profiles()))
def test_evaluation_recordings_reach_the_checks_and_nothing_else(model, profile):
    """Calibration and everything else that shapes an engine must never see what judges it."""
    plan = make_plan(model, profile)
    evaluation = {n.id for n in plan.nodes.values() if n.options.get("split") == "evaluation"}
    readers = {
        n.stage for n in plan.nodes.values() if {node_of(r) for r in n.inputs.values()} & evaluation
    }
    # What a compressed component computes on those calls is read by the checks alone.
    assert readers - {"simulate"} == {"check_component", "check_pipeline"}
    simulated = {n.id for n in plan.nodes.values() if n.stage == "simulate"}
    assert {
        n.stage for n in plan.nodes.values() if {node_of(r) for r in n.inputs.values()} & simulated
    } <= {"check_component"}
    pairs = set(plan.judging.pairs)
    for node in plan.nodes.values():
        if node.id not in evaluation:
            assert not pairs & set(node.options.get("pairs", ()))


def test_every_variant_is_checked_component_by_component_and_whole(model):
    (variant_plan,) = make_plan(model, "onnx-cpu").variants
    assert set(variant_plan.checks) == {*variant_plan.engines, "pipeline"}
    assert set(variant_plan.engines) == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}


def test_equal_stages_of_two_variants_are_one_node(plan_of):
    one = plan_of(variant("one"))
    two = plan_of(variant("one") + variant("two", 'device = "cuda"\n'))
    exports = [n for n in two.nodes.values() if n.stage.endswith(("_torch", "_program"))]
    assert len(exports) == sum(n.stage.endswith(("_torch", "_program")) for n in one.nodes.values())
    assert len(two.nodes) == len(one.nodes) + 5  # the second variant's checks


def test_a_fixed_variant_is_traced_at_the_usual_shape_and_says_so(plan_of):
    plan = plan_of(variant("fixed", 'shapes = "fixed"\n'))
    reference = plan.variants[0].engines["unet"]
    node_id, _, output = reference.partition(":")
    policy = plan.nodes[node_id].outputs[output].shape_policy
    assert policy.kind == "fixed" and len(policy.shapes) == 1
    assert plan.nodes[node_of(plan.nodes[node_id].inputs["program"])].options["shapes"] == "fixed"


def test_a_lower_precision_is_checked_beside_its_fp32_export(model):
    plan = make_plan(model, "onnx-cpu-fp16")
    check = plan.nodes[node_of(plan.variants[0].checks["unet"])]
    reference = plan.nodes[node_of(check.inputs["reference_engine"])]
    engine = plan.nodes[node_of(check.inputs["engine"])]
    assert reference.stage == engine.stage
    assert engine.options["precision"] == "fp16"
    assert reference.options.get("precision", "fp32") == "fp32"


def test_a_route_that_lacks_a_stage_says_which_input_nothing_makes(plan_of):
    text = variant("one").replace('{ stage = "exported_program_from_torch" }, ', "")
    with pytest.raises(ProfileError, match="exported_program"):
        plan_of(text)


def test_what_came_of_a_module_is_not_taken_for_its_successors(plan_of):
    trace = '{ stage = "exported_program_from_torch" }'
    drift = "limits = { drift = { sqnr_db = 20 } }\n"
    text = variant("one", drift).replace(trace, f'{trace}, {{ stage = "split_for_quantization" }}')
    with pytest.raises(ProfileError, match="only torch_module"):
        plan_of(text)
    # Traced again, it is the new module's.
    again = f'{trace}, {{ stage = "split_for_quantization" }}, {trace}'
    plan = plan_of(variant("one", drift).replace(trace, again))
    engine = plan.nodes[node_of(plan.nodes[node_of(
        plan.variants[0].checks["unet"])].inputs["engine"])]  # fmt: skip
    program = plan.nodes[node_of(engine.inputs["program"])]
    assert plan.nodes[node_of(program.inputs["module"])].stage == "split_for_quantization"


def test_a_route_that_ends_in_another_precision_than_the_variant_says_is_refused(plan_of):
    with pytest.raises(ProfileError, match="ends in fp16"):
        plan_of(variant("one", 'precision = "fp16"\n'))


def test_a_route_that_ends_in_what_the_runtime_cannot_open_is_refused(plan_of):
    text = variant("one").replace(', { stage = "onnx_from_exported_program" }', "")
    with pytest.raises(ProfileError, match="what onnx_session opens"):
        plan_of(text)


def test_more_judged_pairs_than_there_are_is_refused(plan_of):
    with pytest.raises(ProfileError, match="judge_pairs"):
        plan_of("[check]\njudge_pairs = 1000\n" + variant("one"))


def test_a_scheduler_that_does_not_fit_the_model_is_refused_before_anything_runs(plan_of):
    with pytest.raises(ProfileError, match="lcm, tcd"):
        plan_of('[check]\nscheduler = "euler"\n' + variant("one"))


def test_a_step_count_without_a_table_is_refused_before_anything_runs(plan_of):
    with pytest.raises(UsageError, match="1 to 8 steps"):
        plan_of("[check]\nsteps = 9\n" + variant("one"))


def test_declared_and_untraced_shapes():
    axes = (Axis("batch", 1, 1, 4), Axis("height", 32, 64, 128, 16), Axis("width", 32, 64, 128, 16))
    declared = declared_shapes(axes, "dynamic")
    assert [s["height"] for s in declared] == [64, 32, 128]
    untraced = untraced_shape(axes)
    assert untraced not in declared
    assert untraced["height"] != untraced["width"]
    assert all(axis.problem_with(untraced[axis.name]) is None for axis in axes)


def test_two_values_an_axis_still_give_an_untraced_shape():
    axes = (Axis("height", 64, 64, 128, 64), Axis("width", 64, 64, 128, 64))
    untraced = untraced_shape(axes)
    assert untraced is not None and untraced not in declared_shapes(axes, "dynamic")


def test_planning_imports_no_torch(model):
    code = (
        "import sys\n"
        "from diffoundry.planning.planner import make_plan\n"
        f"make_plan({str(model)!r}, 'onnx-cpu-fp16')\n"
        "bad = {'torch', 'diffusers', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_tensorrt_profile_ends_in_builds_and_is_proven_on_fp32_ones():
    plan = make_plan(None, "tensorrt-fp16")
    (variant,) = plan.variants
    for component, engine in variant.engines.items():
        node, _, output = engine.partition(":")
        assert plan.nodes[node].outputs[output].kind == "tensorrt_build"
        assert plan.nodes[node].outputs[output].precision == "fp16"
        check = plan.nodes[variant.checks[component].partition(":")[0]]
        assert (check.options["runtime"], check.options["device"]) == ("tensorrt_engine", "cuda")
        reference, _, output = check.inputs["reference_engine"].partition(":")
        assert plan.nodes[reference].outputs[output].precision == "fp32"
