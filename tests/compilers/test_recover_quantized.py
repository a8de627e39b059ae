"""The stage: what the plan takes away, a short training gives back in part."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from diffoundry.compilers.recover_quantized import RecoverQuantized
from diffoundry.compression.distilling import straight_through
from diffoundry.compression.estimating import PlanSettings
from diffoundry.compression.layers import weight_scale
from diffoundry.compression.sensitivity import Bench
from diffoundry.compression.simulator import simulated
from diffoundry.errors import ArtifactError, StageError
from diffoundry.formats import quant_plan, torch_module
from diffoundry.formats.quant_plan import Range
from diffoundry.models.components import load_component
from tests.compilers.mini_component import MiniComponent
from tests.core.compression.recorded import plan_of, state_of
from tests.mini_pipelines import make_named


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calls")
    made = MiniComponent(make_named(tmp_path_factory.mktemp("mini"), "lcm"), folder, "text_encoder")
    calls = made.calls(32, 0)
    made.give_calls("calibration", calls)
    settings = PlanSettings(keep=(), bias_correction=True)
    plan = plan_of(made.module, calls, settings, made.contract)
    # Clipped a little, so that there is something to win.
    layers = [dataclasses.replace(one, activation=narrowed(one.activation)) for one in plan.layers]
    plan = dataclasses.replace(plan, layers=tuple(layers))
    quant_plan.save(folder / "plan", plan)
    made.inputs["plan"] = made.artifact("quant_plan", folder / "plan")
    return made


def narrowed(span: Range | None) -> Range | None:
    return span and Range(span.low * 0.8, span.high * 0.8)


def test_training_in_the_loop_computes_as_the_simulator_and_has_gradients(tmp_path):
    mini = MiniComponent(make_named(tmp_path / "pipeline", "no_mid_block"), tmp_path)
    calls = mini.calls(5, 4)
    plan = plan_of(mini.module, calls, PlanSettings(keep=(), quantize_outputs=("conv",)),
                   mini.contract)  # fmt: skip
    feeds = calls[0].feeds
    with simulated(mini.module, plan):
        wanted = mini.answer(mini.module, feeds)["model_output"]
    before = state_of(mini.module)
    mini.module.requires_grad_(True)
    with straight_through(mini.module, plan):
        found = mini.module(*(torch.from_numpy(feeds[s.name]) for s in mini.contract.inputs))
        found.square().mean().backward()
    after = state_of(mini.module)
    np.testing.assert_allclose(found.detach().numpy(), wanted, atol=1e-4)
    for name, value in mini.module.named_parameters():
        np.testing.assert_array_equal(before[name], after[name])
        if name.endswith((".conv1.weight", ".to_v.weight", ".conv2.bias")):
            assert value.grad is not None and value.grad.abs().max() > 0, name


def test_drift_falls_on_calls_that_were_not_trained_on(mini):
    stage = RecoverQuantized(steps=30, rate=1e-3)
    made = mini.run(stage, "recovered")
    trained, plan = load_component(made["module"], "text_encoder"), quant_plan.load(made["plan"])
    torch_module.validate(made["module"])
    calls = mini.calls(8, 99)
    before = Bench(mini.module, mini.contract, calls).sqnr_db(
        quant_plan.load(mini.inputs["plan"].path)
    )
    after = Bench(trained, mini.contract, calls).sqnr_db(plan)
    assert after > before + 0.5
    layers = dict(trained.named_modules())
    for one in plan.layers:
        weight = layers[one.module].weight.numpy()
        np.testing.assert_array_equal(plan.weight_scale(one.module), weight_scale(weight, "minmax"))
        # A corrected bias is the layer's own now, where it has one.
        assert (plan.bias(one.module) is None) or layers[one.module].bias is None
    assert plan.settings["recovered"]["steps"] == 30


def test_the_same_run_writes_the_same_bytes(mini):
    digests = []
    for name in ("one", "two"):
        made = mini.run(RecoverQuantized(steps=3), name)
        digests.append((torch_module.digest(made["module"]), quant_plan.digest(made["plan"])))
    assert digests[0] == digests[1]


def test_a_training_that_does_not_help_is_not_kept(mini):
    said: list[str] = []
    made = mini.run(RecoverQuantized(steps=2, rate=0.5), "wild", say=said.append)
    assert said[-1].endswith("not kept")
    assert quant_plan.digest(made["plan"]) == quant_plan.digest(mini.inputs["plan"].path)
    kept = state_of(load_component(made["module"], "text_encoder"))
    assert all(np.array_equal(kept[name], value) for name, value in state_of(mini.module).items())


def test_a_plan_of_another_model_is_refused_with_its_layers(mini):
    plan = quant_plan.load(mini.inputs["plan"].path)
    layers = tuple(
        dataclasses.replace(one, module=f"x.{one.module}", scheme="float", activation=None)
        for one in plan.layers[:2]
    )
    quant_plan.save(mini.folder / "strange", dataclasses.replace(plan, layers=layers))
    before = mini.inputs["plan"]
    mini.inputs["plan"] = mini.artifact("quant_plan", mini.folder / "strange")
    try:
        with pytest.raises(ArtifactError, match=f"{layers[0].module}, {layers[1].module}"):
            mini.run(RecoverQuantized(steps=1), "strangework")
    finally:
        mini.inputs["plan"] = before


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch": 0}, {"rate": 0.0}])
def test_wrong_options_are_refused(mini, wrong):
    with pytest.raises(StageError, match="above 0"):
        mini.run(RecoverQuantized(**wrong), f"wrong{next(iter(wrong))}")
