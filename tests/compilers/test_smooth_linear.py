"""The stage: the same function, with less for its linear layers' inputs to be coarse about."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffoundry.compilers.smooth_linear import SmoothLinear
from diffoundry.compression.pruning import network_of
from diffoundry.compression.smoothing import find_folds
from diffoundry.errors import StageError
from diffoundry.formats import torch_module
from diffoundry.models.components import load_component
from tests.compilers.mini_component import MiniComponent
from tests.mini_pipelines import make_named


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return make_named(tmp_path_factory.mktemp("mini"), "lcm")


@pytest.fixture(scope="module")
def minis(pipeline, tmp_path_factory):
    return {
        name: MiniComponent(pipeline, tmp_path_factory.mktemp(name), name)
        for name in ("unet", "text_encoder", "vae_decoder")
    }


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("component", ["unet", "text_encoder", "vae_decoder"])
def test_the_function_stays_the_same_to_rounding(minis, component, alpha):
    mini = minis[component]
    folder = mini.run(SmoothLinear(alpha), f"alpha{alpha}")["module"]
    torch_module.validate(folder)
    smoothed = load_component(folder, component)
    before = dict(mini.module.named_parameters())
    assert any(not torch.equal(value, before[name]) for name, value in smoothed.named_parameters())
    name = mini.contract.outputs[0].name
    for call in mini.calls(2, 5):
        found, wanted = mini.answer(smoothed, call.feeds)[name], call.outputs[name]
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_scales_move_into_all_that_the_method_names(minis):
    producers = {
        name: {fold.producer.removeprefix("down_blocks.0.attentions.0.transformer_blocks.0.")
               for fold in find_folds(network_of(minis[name].module))}
        for name in minis
    }  # fmt: skip
    assert producers["unet"] >= {"norm1", "norm2", "norm3", "ff.net.0.proj", "attn1.to_v",
                                 "attn2.to_v"}  # fmt: skip
    assert {name.rpartition("layers.0.")[2] for name in producers["text_encoder"]} >= {
        "layer_norm1", "layer_norm2", "self_attn.v_proj"}  # fmt: skip
    assert any(name.endswith("group_norm") for name in producers["vae_decoder"])


def test_an_outlier_channel_loses_its_reach(minis):
    mini = minis["unet"]
    name = "down_blocks.0.attentions.0.transformer_blocks.0"
    block = mini.module.network.get_submodule(name)
    # Blow one channel up, exactly: what a norm gives more of, the next layer takes less of.
    block.norm3.weight.data[1] *= 50
    block.norm3.bias.data[1] *= 50
    block.ff.net[0].proj.weight.data[:, 1] /= 50
    from diffoundry.models.rewriting import write_rewritten

    folder = mini.folder / "outlier"
    write_rewritten(folder, mini.path, mini.module.network)
    before = dict(mini.inputs)
    mini.inputs["module"] = mini.artifact("torch_module", folder)
    try:
        smoothed = load_component(mini.run(SmoothLinear(0.5), "outlierwork")["module"], "unet")
    finally:
        mini.inputs.update(before)
        block.norm3.weight.data[1] /= 50
        block.norm3.bias.data[1] /= 50
        block.ff.net[0].proj.weight.data[:, 1] *= 50

    def spread(module):
        found = []
        layer = module.network.get_submodule(f"{name}.ff.net.0.proj")
        hook = layer.register_forward_pre_hook(
            lambda _, inputs: found.append(inputs[0].abs().flatten(0, -2).amax(0))
        )
        mini.answer(module, mini.calls(1, 5)[0].feeds)
        hook.remove()
        return float(found[0].max() / found[0].median())

    assert spread(smoothed) < 0.5 * spread(load_component(folder, "unet"))


def test_the_same_run_writes_the_same_bytes(minis):
    mini = minis["text_encoder"]
    digests = [
        torch_module.digest(mini.run(SmoothLinear(), name)["module"]) for name in ("one", "two")
    ]
    assert digests[0] == digests[1]


def test_wrong_options_and_calibration_are_refused(minis):
    mini = minis["text_encoder"]
    with pytest.raises(StageError, match="alpha between 0 and 1"):
        mini.run(SmoothLinear(1.5), "wrong")
    before = mini.inputs["calibration"]
    mini.give_calls("equal", mini.calls(1, 0) * 8)
    mini.inputs["calibration"] = mini.inputs["equal"]
    try:
        with pytest.raises(StageError, match="8 calls, 1 of them different"):
            mini.run(SmoothLinear(), "equalwork")
    finally:
        mini.inputs["calibration"] = before
