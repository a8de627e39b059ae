"""The stage: a U-Net whose split layers load again, compute the same, and have their own ranges."""

from __future__ import annotations

import json

import numpy as np
import pytest

from diffoundry.compilers.split_for_quantization import SplitForQuantization
from diffoundry.compression.estimating import PlanSettings
from diffoundry.errors import ModelError, StageError
from diffoundry.formats import torch_module
from diffoundry.models.components import load_component
from tests.compilers.mini_component import MiniComponent
from tests.core.compression.recorded import plan_of
from tests.mini_pipelines import make_named


@pytest.fixture(scope="module", params=["lcm", "no_mid_block"])
def mini(request, tmp_path_factory):
    return MiniComponent(
        make_named(tmp_path_factory.mktemp("mini"), request.param), tmp_path_factory.mktemp("calls")
    )


def test_both_splits_load_again_and_compute_the_same(mini):
    folder = mini.run(SplitForQuantization(), "both")["module"]
    torch_module.validate(folder)
    loaded = load_component(folder, "unet")
    for call in mini.calls(2, 5):
        found = mini.answer(loaded, call.feeds)["model_output"]
        wanted = call.outputs["model_output"]
        np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())
    names = {name for name, _ in loaded.network.named_modules()}
    parts = [name for name in names if name.endswith("conv_shortcut.second")]
    tokens = [name for name in names if name.endswith("attn2.to_k.first_token")]
    assert len(parts) == 4 and tokens  # every resnet block of the upward half of two levels
    surgery = json.loads((folder / "surgery.json").read_text())["operations"]
    assert {one["operation"] for one in surgery} == {"split_convolution", "split_first_token"}


def test_a_split_layer_is_planned_in_two_and_off_the_keep_list(mini):
    folder = mini.run(SplitForQuantization(bos_token=False), "plan")["module"]
    loaded = load_component(folder, "unet")
    plan = plan_of(loaded, mini.calls(4, 6), PlanSettings(), mini.contract)
    parts = {one.module: one for one in plan.layers if ".conv_shortcut." in one.module}
    assert len(parts) == 8 and {one.scheme for one in parts.values()} == {"static"}
    first = [name for name in parts if name.endswith("first")][-1]
    second = first.removesuffix("first") + "second"
    assert parts[first].activation != parts[second].activation


def test_the_first_tokens_layer_keeps_its_activations_in_float(mini):
    folder = mini.run(SplitForQuantization(skip_concat=False), "tokens")["module"]
    plan = plan_of(load_component(folder, "unet"), mini.calls(4, 6), None, mini.contract)
    schemes = {one.module.rpartition(".")[2]: one.scheme for one in plan.layers}
    assert (schemes["first_token"], schemes["rest"]) == ("weight_only", "static")


def test_the_same_run_writes_the_same_bytes(mini):
    digests = [
        torch_module.digest(mini.run(SplitForQuantization(), name)["module"])
        for name in ("one", "two")
    ]
    assert digests[0] == digests[1]


def test_what_has_nothing_to_split_is_refused(mini, tmp_path):
    with pytest.raises(StageError, match="leave this stage out"):
        mini.run(SplitForQuantization(skip_concat=False, bos_token=False), "nothing")


def test_surgery_of_another_model_is_refused(mini):
    folder = mini.run(SplitForQuantization(), "strange")["module"]
    surgery = json.loads((folder / "surgery.json").read_text())
    surgery["operations"][0]["module"] += ".elsewhere"
    (folder / "surgery.json").write_text(json.dumps(surgery))
    with pytest.raises(ModelError, match="elsewhere"):
        load_component(folder, "unet")
