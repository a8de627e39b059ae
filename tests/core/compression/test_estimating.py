"""What every estimator refuses, and what it makes of what was seen."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from diffoundry.compression.estimating import (
    PlanSettings,
    affordable,
    check_calls,
    check_settings,
    complete,
    draft,
)
from diffoundry.compression.layers import corrected_bias
from diffoundry.errors import StageError
from diffoundry.formats.quant_plan import Range
from tests.compilers.small_network import CONTRACT
from tests.core.compression.recorded import plan_of, shared, watched_by_hooks


@pytest.mark.parametrize("picked", [[], [0, 1, 2], [0] * 20, [0, 1, 2, 2, 1, 0]])
def test_too_few_calls_that_differ_are_refused_with_their_number(picked):
    _, calls, _ = shared()
    with pytest.raises(StageError) as caught:
        check_calls([calls[i] for i in picked], "here")
    assert f"{len(picked)} calls, {len(set(picked))} of them different" in caught.value.text()
    assert "calibration prompts" in caught.value.text()


def test_four_calls_that_differ_will_do_even_among_equal_ones():
    _, calls, _ = shared()
    check_calls([calls[i] for i in (0, 0, 1, 1, 2, 3)], "here")


@pytest.mark.parametrize(
    "wrong", [{"embedding": "static"}, {"percentile": 50.0}, {"percentile": 100.5}]
)
def test_options_that_cannot_be_met_are_refused(wrong):
    with pytest.raises(StageError, match=next(iter(wrong))):
        check_settings(PlanSettings(**wrong), "here")
    check_settings(PlanSettings(), "here")


def test_a_plan_has_ranges_where_activations_are_integers_and_scales_where_weights_are():
    network, calls, _ = shared()
    settings = PlanSettings(in_float=("time",), linear="dynamic")
    plan = plan_of(network, calls, settings)
    taken, _ = watched_by_hooks(network, CONTRACT, calls)
    assert {one.module: one.scheme for one in plan.layers} == {
        "time": "float",
        "conv_in": "weight_only",
        "block.conv": "static",
        "block.query": "dynamic",
        "conv_out": "weight_only",
    }
    spans = {one.module: one.activation for one in plan.layers if one.activation}
    seen = taken["block.conv"]
    assert spans == {"block.conv": Range(seen.low, seen.high)}
    assert plan.tensors.keys() == {
        f"{name}.weight_scale" for name in ("conv_in", "block.conv", "block.query", "conv_out")
    }


def test_outputs_have_ranges_only_of_the_kinds_asked_for():
    network, calls, _ = shared()
    plan = plan_of(network, calls, PlanSettings(keep=(), quantize_outputs=("conv",)))
    assert {one.module for one in plan.layers if one.output} == {
        "conv_in", "block.conv", "conv_out"}  # fmt: skip


def test_bias_correction_is_of_the_mean_input_and_only_on_request():
    network, calls, plain = shared()
    assert not any(name.endswith(".bias") for name in plain.tensors)
    plan = plan_of(network, calls, PlanSettings(keep=(), bias_correction=True))
    taken, _ = watched_by_hooks(network, CONTRACT, calls)
    layer = network.block.query
    wanted = corrected_bias(layer.weight.numpy(), plan.weight_scale("block.query"),
                            layer.bias.numpy(), taken["block.query"].mean)  # fmt: skip
    np.testing.assert_array_equal(plan.bias("block.query"), wanted)
    assert not np.array_equal(wanted, layer.bias.numpy())


def test_all_layers_with_values_that_are_not_finite_are_named():
    network, calls, _ = shared()
    taken, given = watched_by_hooks(network, CONTRACT, calls)
    for name, wrong in (("time", np.nan), ("conv_in", np.inf), ("block.conv", -np.inf)):
        taken[name] = dataclasses.replace(taken[name], low=wrong)
    settings = PlanSettings(keep=())
    with pytest.raises(StageError) as caught:
        layers = draft(network, settings)
        complete(network.state_dict(), "unet", "hooks", settings, layers, taken, given)
    text = caught.value.text()
    assert "time, conv_in, block.conv" in text and "block.query" not in text


def test_a_constant_input_is_planned_and_said():
    network, calls, _ = shared()
    taken, given = watched_by_hooks(network, CONTRACT, calls)
    taken["time"] = dataclasses.replace(taken["time"], low=0.0, high=0.0)
    settings = PlanSettings(keep=())
    layers = draft(network, settings)
    plan = complete(network.state_dict(), "unet", "x", settings, layers, taken, given)
    assert "constant" in plan.by_module["time"].why
    assert plan.by_module["time"].activation == Range(0.0, 0.0)
    assert "constant" not in plan.by_module["conv_in"].why


def test_two_large_calls_will_do_and_as_many_are_spread_as_can_be_paid():
    _, calls, _ = shared()
    big = {"sample": np.zeros((1, 4, 64, 64), np.float32)}
    large = [
        dataclasses.replace(call, feeds={**call.feeds, "sample": big["sample"] + number})
        for number, call in enumerate(calls)
    ]
    check_calls(large[:2], "here")
    with pytest.raises(StageError, match="at least 2 calls that differ"):
        check_calls(large[:1] * 2, "here")
    assert affordable(large, 10.0, 35.0) == [large[0], large[2], large[5]]
    assert affordable(large, 10.0, 1.0) == [large[0], large[5]]
    assert affordable(large, 10.0, 1e9) == large
    assert len(affordable(calls, 10.0, 1.0)) == 4
