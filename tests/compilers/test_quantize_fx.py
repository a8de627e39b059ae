"""The stage: recorded calls in, a plan out."""

from __future__ import annotations

import numpy as np
import pytest

from diffoundry.compilers.quantize_fx import QuantizeFx
from diffoundry.compression.layers import find_layers
from diffoundry.compression.sensitivity import Bench
from diffoundry.errors import StageError
from diffoundry.formats import quant_plan
from diffoundry.formats.recording import Call
from tests.compilers.mini_component import MiniComponent
from tests.mini_pipelines import make_named


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    made = MiniComponent(
        make_named(tmp_path_factory.mktemp("mini"), "lcm"), tmp_path_factory.mktemp("calls")
    )
    made.give_program()
    return made


def test_every_layer_is_planned_and_the_plan_drifts_a_little(mini):
    plan = quant_plan.load(mini.run(QuantizeFx(), "all")["plan"])
    assert [one.module for one in plan.layers] == list(find_layers(mini.module))
    schemes = {one.module: one.scheme for one in plan.layers}
    assert schemes["network.conv_in"] == "weight_only"
    assert schemes["network.down_blocks.0.resnets.0.conv1"] == "static"
    assert plan.estimator == "quantize_fx" and plan.settings["ranges"] == "minmax"
    drift = Bench(mini.module, mini.contract, mini.calls(3, 9)).sqnr_db(plan)
    assert 15 < drift < 60


def test_the_same_run_writes_the_same_bytes(mini):
    digests = [
        quant_plan.digest(mini.run(QuantizeFx(bias_correction=True), name)["plan"])
        for name in ("one", "two")
    ]
    assert digests[0] == digests[1]


def test_options_change_the_plan(mini):
    stage = QuantizeFx(linear="dynamic", symmetric=True, quantize_outputs=("conv",), keep=())
    plan = quant_plan.load(mini.run(stage, "options")["plan"])
    for one in plan.layers:
        assert one.scheme == {"conv": "static", "linear": "dynamic"}[one.kind]
        assert one.symmetric and (one.output is not None) == (one.kind == "conv")


@pytest.mark.parametrize("count", [0, 3])
def test_too_few_calls_are_refused(mini, count):
    before = mini.inputs["calibration"]
    mini.give_calls(f"few{count}", mini.calls(count, 0))
    mini.inputs["calibration"] = mini.inputs[f"few{count}"]
    try:
        with pytest.raises(StageError, match="calibration prompts"):
            mini.run(QuantizeFx(), f"few{count}work")
    finally:
        mini.inputs["calibration"] = before
    assert not list((mini.folder / f"few{count}work").iterdir())


def test_equal_calls_are_refused(mini):
    before = mini.inputs["calibration"]
    mini.give_calls("equal", mini.calls(1, 0) * 12)
    mini.inputs["calibration"] = mini.inputs["equal"]
    try:
        with pytest.raises(StageError, match="12 calls, 1 of them different"):
            mini.run(QuantizeFx(), "equalwork")
    finally:
        mini.inputs["calibration"] = before


def test_infinite_activations_are_refused_with_the_layers_names(mini):
    before = mini.inputs["calibration"]
    sick = []
    for call in mini.calls(4, 3):
        feeds = {**call.feeds, "sample": np.full_like(call.feeds["sample"], np.inf)}
        sick.append(Call(feeds, call.outputs, call.shape, ""))
    mini.give_calls("sick", sick)
    mini.inputs["calibration"] = mini.inputs["sick"]
    try:
        with pytest.raises(StageError) as caught:
            mini.run(QuantizeFx(), "sickwork")
    finally:
        mini.inputs["calibration"] = before
    text = caught.value.text()
    assert "network.down_blocks.0.resnets.0.conv1" in text and "NaN or infinity" in text


def test_wrong_options_are_refused(mini):
    with pytest.raises(StageError, match="embedding"):
        mini.run(QuantizeFx(embedding="dynamic"), "wrong")
    with pytest.raises(StageError, match="none for \\*nowhere"):
        mini.run(QuantizeFx(in_float=("*nowhere",)), "nowhere")


def test_outputs_of_named_layers_have_their_zero_in_the_middle(mini):
    names = ("*attn1.to_q", "*attn1.to_k")
    plan = quant_plan.load(mini.run(QuantizeFx(outputs_of=names), "named")["plan"])
    with_output = [one for one in plan.layers if one.output is not None]
    assert with_output and all(one.module.endswith(("attn1.to_q", "attn1.to_k"))
                               for one in with_output)  # fmt: skip
    for one in with_output:
        assert one.output is not None and quant_plan.grid_of(one.output).zero_point == 128


def test_a_pattern_that_meets_no_layer_is_refused(mini):
    with pytest.raises(StageError, match="outputs_of"):
        mini.run(QuantizeFx(outputs_of=("*no_such",)), "nosuch")


def test_where_a_call_is_dear_fewer_are_looked_at(mini):
    said: list[str] = []
    mini.run(QuantizeFx(max_multiply_adds=1.0), "dear", say=said.append)
    assert any("4 of 5 calls" in line for line in said)
