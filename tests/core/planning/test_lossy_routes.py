"""Variants that are lossy on purpose: what the planner adds, and what it asks of profiles."""

from __future__ import annotations

import json

import pytest

from diffoundry.artifacts.store import Store
from diffoundry.building.driver import Driver
from diffoundry.errors import ProfileError
from diffoundry.planning.graph import Plan, node_of
from diffoundry.planning.planner import make_plan
from tests.mini_pipelines import make_named

HEAD = """
schema = "diffoundry.profile/1.0"
name = "mine"
"""
BUDGET = "[limits.drift]\nsqnr_db = 22\n"
VARIANT = """
[[variants]]
name = "one"
runtime = "onnx_session"
precision = "{precision}"
route = [{route}]
"""
INT8 = """
    { stage = "exported_program_from_torch" },
    { stage = "quantize_fx" },
    { stage = "choose_precision" },
    { stage = "onnx_from_exported_program", opset = 21 },
    { stage = "quantize_onnx" },
"""
PRUNED = """
    { stage = "prune_structured" },
    { stage = "exported_program_from_torch" },
    { stage = "onnx_from_exported_program" },
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_named(tmp_path_factory.mktemp("model") / "lcm", "lcm")


@pytest.fixture
def plan_of(model, tmp_path):
    def plan(route: str, precision: str, budget: str = BUDGET, **more: float) -> Plan:
        text = HEAD + budget + VARIANT.replace("{precision}", precision).replace("{route}", route)
        (tmp_path / "mine.toml").write_text(text)
        return make_plan(model, str(tmp_path / "mine.toml"), **more)

    return plan


def check_of(plan: Plan, component: str = "unet"):
    return plan.nodes[node_of(plan.variants[0].checks[component])]


def stages_behind(plan: Plan, reference: str) -> set[str]:
    return {plan.nodes[node_id].stage for node_id in plan.ancestors([reference])}


def test_an_int8_engine_is_checked_against_a_simulation_of_its_plan(plan_of):
    plan = plan_of(INT8, "int8")
    check = check_of(plan)
    simulate = plan.nodes[node_of(check.inputs["simulation"])]
    assert simulate.stage == "simulate" and simulate.options["planned"] is True
    chosen = check.inputs["plan"]
    assert plan.nodes[node_of(chosen)].stage == "choose_precision", "the last plan counts"
    assert simulate.inputs["plan"] == chosen
    assert plan.variants[0].simulations["unet"] == check.inputs["simulation"]


def test_the_fp32_reference_of_an_int8_engine_has_no_plan_behind_it(plan_of):
    plan = plan_of(INT8, "int8")
    reference = check_of(plan).inputs["reference_engine"]
    assert stages_behind(plan, reference) == {
        "exported_program_from_torch",
        "onnx_from_exported_program",
    }


def test_a_pruned_fp32_engine_is_lossy_too(plan_of):
    plan = plan_of(PRUNED, "fp32")
    check = check_of(plan)
    simulate = plan.nodes[node_of(check.inputs["simulation"])]
    assert simulate.options["planned"] is False
    assert plan.nodes[node_of(simulate.inputs["module"])].stage == "prune_structured"
    assert "plan" not in check.inputs
    assert "prune_structured" not in stages_behind(plan, check.inputs["reference_engine"])


def test_what_computes_the_same_is_not_lossy_and_stays_in_the_fp32_reference(plan_of):
    split = '{ stage = "split_upsampling" }, '
    exact = plan_of(PRUNED.replace("prune_structured", "split_upsampling"), "fp32", budget="")
    assert not exact.variants[0].simulations and "simulation" not in check_of(exact).inputs
    int8 = plan_of(split + INT8, "int8")
    reference = check_of(int8).inputs["reference_engine"]
    assert "split_upsampling" in stages_behind(int8, reference)
    traces = [n for n in int8.nodes.values() if n.stage == "exported_program_from_torch"]
    assert len([n for n in traces if n.component == "unet"]) == 1


def test_the_budget_reaches_the_check_and_whoever_chooses(plan_of):
    plan = plan_of(INT8, "int8")
    assert check_of(plan).options["drift_limits"].sqnr_db == 22
    choosers = [n for n in plan.nodes.values() if n.stage == "choose_precision"]
    assert {n.options["drift_budget_db"] for n in choosers} == {22}


def test_a_budget_of_the_caller_takes_the_profiles_place(plan_of):
    plan = plan_of(INT8, "int8", drift_budget_db=31.0)
    assert check_of(plan).options["drift_limits"].sqnr_db == 31
    choosers = [n for n in plan.nodes.values() if n.stage == "choose_precision"]
    assert {n.options["drift_budget_db"] for n in choosers} == {31.0}


@pytest.mark.parametrize(("route", "precision"), [(INT8, "int8"), (PRUNED, "fp32")])
def test_a_lossy_variant_without_a_budget_is_refused(plan_of, route, precision):
    with pytest.raises(ProfileError, match=r"\[limits.drift\]"):
        plan_of(route, precision, budget="")


def test_ranges_and_choices_are_made_on_splits_of_their_own(plan_of):
    plan = plan_of(INT8, "int8")
    for stage, name, split in (
        ("quantize_fx", "calibration", "calibration"),
        ("choose_precision", "tuning", "tuning"),
    ):
        for node in plan.nodes.values():
            if node.stage == stage:
                assert plan.nodes[node_of(node.inputs[name])].options["split"] == split


def test_another_calibration_set_makes_another_plan_and_another_engine(model, tmp_path):
    """And no other evaluation: an engine must not come from ranges that nobody asked for."""

    def plan_with(seed: int) -> Plan:
        prompts = {
            "calibration": [[f"a cat {n}", seed + n] for n in range(4)],
            "tuning": [["a dog", 500]],
            "evaluation": [["a hat", 900]],
        }
        (tmp_path / "prompts.json").write_text(json.dumps(prompts))
        text = HEAD + f'prompts = "{tmp_path / "prompts.json"}"\n' + BUDGET
        text += VARIANT.replace("{precision}", "int8").replace("{route}", INT8)
        (tmp_path / "mine.toml").write_text(text)
        return make_plan(model, str(tmp_path / "mine.toml"))

    one, other = plan_with(0), plan_with(100)
    engines = [plan.variants[0].engines["unet"] for plan in (one, other)]
    assert engines[0] != engines[1]
    by_key = [{row.node.id: row.key for row in keys_of(plan, tmp_path)} for plan in (one, other)]
    assert set(by_key[0].values()).isdisjoint(
        key for node, key in by_key[1].items() if ".quantize_" in node
    )
    assert one.recordings["unet"] == other.recordings["unet"]


def keys_of(plan: Plan, folder):
    return Driver(plan, Store(folder / "store")).dry_run()


def test_what_nothing_can_read_is_no_reason_to_refuse_every_foreign_model(model):
    """The shipped limit of prompt accuracy is of pictures that the recogniser reads."""

    def limits_of(plan: Plan) -> list[float | None]:
        image = plan.nodes[node_of(plan.variants[0].checks["pipeline"])].options["image_limits"]
        return [image.prompt_accuracy_drop, image.psnr_db]

    assert limits_of(make_plan(model, "onnx-cpu-int8")) == [None, 25]
    assert limits_of(make_plan(None, "onnx-cpu-int8")) == [0.07, 25]
