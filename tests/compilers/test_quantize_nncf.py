"""The stage: NNCF's ranges as a plan of layers."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from diffoundry.compilers.exported_program_from_torch import trace
from diffoundry.compilers.quantize_nncf import QuantizeNncf, alike
from diffoundry.compression.layers import find_layers
from diffoundry.compression.nncf_observing import NncfOptions, ask_nncf
from diffoundry.compression.sensitivity import Bench
from diffoundry.errors import StageError
from diffoundry.formats import quant_plan, recording
from diffoundry.formats.recording import Call
from tests.compilers.mini_component import MiniComponent
from tests.core.compression.recorded import watched_by_hooks
from tests.mini_pipelines import make_named


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    made = MiniComponent(
        make_named(tmp_path_factory.mktemp("mini"), "lcm"),
        tmp_path_factory.mktemp("calls"),
        "vae_decoder",
    )
    # As in a build: sizes that move are no reason to fail.
    batch = dataclasses.replace(made.contract.axis("batch"), max=4)
    axes = tuple(batch if one.name == "batch" else one for one in made.contract.axes)
    made.contract = dataclasses.replace(made.contract, axes=axes)
    return made


@pytest.fixture(scope="module")
def plan(mini):
    return quant_plan.load(mini.run(QuantizeNncf(own_ranges=False), "minmax")["plan"])


def test_every_layer_is_planned_and_the_plan_drifts_a_little(mini, plan):
    assert [one.module for one in plan.layers] == list(find_layers(mini.module))
    assert plan.by_module["decoder.conv_in"].scheme == "weight_only"
    static = [one for one in plan.layers if one.scheme == "static"]
    assert len(static) > 10 and all(one.activation for one in static)
    drift = Bench(mini.module, mini.contract, mini.calls(3, 9)).sqnr_db(plan)
    assert 15 < drift < 60
    assert plan.estimator == "quantize_nncf" and plan.settings["own_ranges"] is False


def test_minmax_ranges_are_what_the_layers_take(mini, plan):
    calls = recording.load_component(mini.inputs["calibration"].path).calls
    taken, _ = watched_by_hooks(mini.module, mini.contract, calls)
    same = 0
    for one in plan.layers:
        if one.scheme == "static":
            width = taken[one.module].high - taken[one.module].low
            # Never narrower than by the step that zero's place may cost; layers that share a
            # value may share the range of the widest.
            assert one.activation.low <= taken[one.module].low + 0.01 * width, one.module
            assert one.activation.high >= taken[one.module].high - 0.01 * width, one.module
            same += (one.activation.high - one.activation.low) < 1.1 * max(
                width, taken[one.module].high, -taken[one.module].low
            )
    assert same > 0.7 * sum(one.scheme == "static" for one in plan.layers)


def test_the_same_run_writes_the_same_bytes_and_prints_nothing(mini, plan, capfd):
    again = mini.run(QuantizeNncf(own_ranges=False), "again")["plan"]
    assert quant_plan.digest(again) == quant_plan.digest(mini.folder / "minmax" / "plan")
    out, err = capfd.readouterr()
    assert "Statistics collection" not in out + err and "nncf" not in out + err


def test_symmetric_grids_and_corrected_biases_on_request(mini):
    stage = QuantizeNncf(symmetric=True, bias_correction=True)
    plan = quant_plan.load(mini.run(stage, "symmetric")["plan"])
    for one in plan.layers:
        if one.scheme == "static":
            assert one.symmetric and one.activation.low <= 0 <= one.activation.high
    biases = [name for name in plan.tensors if name.endswith(".bias")]
    own = dict(mini.module.named_parameters())
    assert biases
    for name in biases:
        value = own[name].numpy()
        assert value.shape == plan.tensors[name].shape
        assert not np.array_equal(value, plan.tensors[name])


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"own_ranges": False, "ranges": "mse"}, "mse"),
        ({"quantize_outputs": ("conv",)}, "quantize_outputs"),
        ({"calls": 0}, "calls = 0"),
        ({"embedding": "static"}, "embedding"),
    ],
)
def test_options_that_nncf_does_not_have_are_refused(mini, wrong, word):
    with pytest.raises(StageError, match=word):
        mini.run(QuantizeNncf(**wrong), f"wrong_{word.replace(' ', '')}")


def test_equal_calls_are_refused(mini):
    before = mini.inputs["calibration"]
    mini.give_calls("equal", mini.calls(1, 0) * 12)
    mini.inputs["calibration"] = mini.inputs["equal"]
    try:
        with pytest.raises(StageError, match="12 calls, 1 of them different"):
            mini.run(QuantizeNncf(), "equalwork")
    finally:
        mini.inputs["calibration"] = before


def test_infinite_activations_are_refused_with_the_layers_names(mini):
    before = mini.inputs["calibration"]
    sick = []
    for call in mini.calls(4, 3):
        latent = call.feeds["latent"].copy()
        latent[0, 0, 0, 0] = np.inf
        sick.append(Call({"latent": latent}, call.outputs, call.shape, ""))
    mini.give_calls("sick", sick)
    mini.inputs["calibration"] = mini.inputs["sick"]
    try:
        with pytest.raises(StageError, match=r"NaN or infinity in .*resnets\.0\.conv1"):
            mini.run(QuantizeNncf(), "sickwork")
    finally:
        mini.inputs["calibration"] = before


def test_all_layers_that_the_graph_lacks_are_named(mini):
    calls = recording.load_component(mini.inputs["calibration"].path).calls
    program = trace(mini.module, mini.contract, dynamic=False)
    with pytest.raises(StageError, match=r"no node of no\.such, nor\.this"):
        ask_nncf(program, mini.contract, calls, ["no.such", "nor.this"], NncfOptions(calls=1))


def test_the_commonest_shape_is_looked_at(mini):
    one, two, three = mini.calls(3, 0)
    wide = [dataclasses.replace(call, shape={**call.shape, "batch": 2}) for call in (one, two)]
    shape, calls = alike([one, *wide])
    assert shape["batch"] == 2 and [id(call) for call in calls] == [id(call) for call in wide]
    assert len(alike([one, *wide, two, three])[1]) == 3


def test_importing_nncf_sends_nothing():
    """In a process of its own: here it is imported already."""
    code = (
        "import sys; from diffoundry.compression.nncf_observing import import_nncf; import_nncf();"
        "from nncf.telemetry import telemetry;"
        "assert sys.modules['openvino_telemetry'] is None;"
        "assert type(telemetry).__name__ == 'MagicMock', telemetry"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "NNCF"))}
    made = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=clean,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert made.returncode == 0, made.stderr
