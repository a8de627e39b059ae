"""Which layers there are, what each is to be, and their weights' scales."""

from __future__ import annotations

import fnmatch

import numpy as np
import pytest
import torch

from diffoundry.compression.layers import (
    KEEP,
    corrected_bias,
    find_layers,
    outline,
    weight_scale,
)
from diffoundry.errors import StageError
from diffoundry.formats.quant_plan import integer_weight
from tests.compilers.small_network import small_network

LAYERS = {"time_embedding.linear_1": "linear", "body": "conv", "words": "embedding"}
STATIC = {"conv": "static", "linear": "static", "embedding": "weight_only"}


def test_layers_are_found_in_the_order_of_the_modules():
    found = find_layers(small_network())
    assert found == {
        "time": "linear",
        "conv_in": "conv",
        "block.conv": "conv",
        "block.query": "linear",
        "conv_out": "conv",
    }
    assert list(found)[:2] == ["time", "conv_in"]
    assert find_layers(torch.nn.ModuleDict({"e": torch.nn.Embedding(3, 2)})) == {"e": "embedding"}


def test_the_keep_list_leaves_activations_in_float_and_in_float_everything():
    plans = {one.module: one for one in outline(LAYERS, STATIC, KEEP, (), True)}
    assert plans["time_embedding.linear_1"].scheme == "weight_only"
    assert "*time_embedding.*" in plans["time_embedding.linear_1"].why
    assert plans["body"].scheme == "static" and plans["body"].symmetric
    assert plans["words"].scheme == "weight_only"
    plans = {one.module: one for one in outline(LAYERS, STATIC, KEEP, ("time*", "b*"), False)}
    assert plans["time_embedding.linear_1"].scheme == plans["body"].scheme == "float"
    assert "b*" in plans["body"].why


def test_a_pattern_that_meets_nothing_is_refused_by_name():
    with pytest.raises(StageError, match="none for nowhere\\*, elsewhere"):
        outline(LAYERS, STATIC, (), ("body", "nowhere*", "elsewhere"), False)


def test_the_keep_list_meets_the_names_of_a_real_unet():
    from diffoundry.embedded import SHAPES_LCM
    from diffoundry.models.components import load_component

    names = find_layers(load_component(SHAPES_LCM / "unet", "unet"))
    idle = [one for one in KEEP if not any(fnmatch.fnmatchcase(name, one) for name in names)]
    assert idle == ["*.first_token"]  # of split_for_quantization


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_scales_are_per_channel_and_positive(method):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(5, 4, 3, 3)).astype(np.float32)
    weight[2] = 0
    weight[3] *= 100
    scale = weight_scale(weight, method)
    assert scale.dtype == np.float32 and scale.shape == (5,)
    assert scale[2] == 1 and scale[3] > 20 * scale[0]
    full = np.abs(weight).reshape(5, -1).max(axis=1) / 127
    if method == "minmax":
        np.testing.assert_allclose(scale[[0, 1, 3, 4]], full[[0, 1, 3, 4]], rtol=1e-6)


def test_mse_scales_round_less_where_one_weight_stands_out():
    weight = np.random.default_rng(0).normal(size=(2, 4000)).astype(np.float32)
    weight[:, 0] = 7

    def error(scale):
        return np.square(integer_weight(weight, scale) * scale[:, None] - weight).sum(axis=1)

    assert (error(weight_scale(weight, "mse")) < 0.98 * error(weight_scale(weight, "minmax"))).all()


@pytest.mark.parametrize("bias", [None, "own"])
def test_a_corrected_bias_gives_the_mean_output_back(bias):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3, 50)).astype(np.float32)
    own = None if bias is None else rng.normal(size=3).astype(np.float32)
    x = (rng.normal(size=(400, 50)) + rng.uniform(1, 5, 50)).astype(np.float32)
    scale = weight_scale(weight, "minmax") * 8  # coarse, so that there is something to correct
    rounded = integer_weight(weight, scale) * scale[:, None]
    start = np.zeros(3, np.float32) if own is None else own
    wanted = (x @ weight.T + start).mean(axis=0)
    before = np.abs((x @ rounded.T + start).mean(axis=0) - wanted)
    corrected = corrected_bias(weight, scale, own, x.mean(axis=0))
    after = np.abs((x @ rounded.T + corrected).mean(axis=0) - wanted)
    assert (after < 1e-3).all() and (after < before / 20).all()


def test_a_convolutions_bias_is_corrected_by_channel_means():
    weight = np.random.default_rng(0).normal(size=(2, 3, 3, 3)).astype(np.float32)
    scale = weight_scale(weight, "minmax") * 8
    x = np.ones((1, 3, 5, 5), np.float32) * np.array([1.0, 2.0, 3.0], np.float32)[:, None, None]
    rounded = (integer_weight(weight, scale) * scale.reshape(-1, 1, 1, 1)).astype(np.float32)
    bias = corrected_bias(weight, scale, None, np.array([1.0, 2.0, 3.0]))
    conv = torch.nn.functional.conv2d
    wanted = conv(torch.from_numpy(x), torch.from_numpy(weight))
    found = conv(torch.from_numpy(x), torch.from_numpy(rounded), torch.from_numpy(bias))
    np.testing.assert_allclose(found.numpy(), wanted.numpy(), atol=1e-4)
