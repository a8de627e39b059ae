"""Grids, and the two files of a plan."""

from __future__ import annotations

import json

import numpy as np
import pytest

from diffoundry.errors import ArtifactError
from diffoundry.formats import quant_plan
from diffoundry.formats.quant_plan import LayerPlan, QuantPlan, Range, grid_of, integer_weight


def make_plan() -> QuantPlan:
    layers = (
        LayerPlan("net.conv", "conv", "static", "default", Range(-1.5, 2.0), Range(-3.0, 3.0)),
        LayerPlan("net.out", "linear", "weight_only", "keep-list: *out"),
        LayerPlan("net.words", "embedding", "float"),
    )
    tensors = {
        "net.out.weight_scale": np.full(2, 0.25, np.float32),
        "net.conv.weight_scale": np.array([0.5, 1.0, 2.0], np.float32),
        "net.conv.bias": np.array([1.0, 2.0, 3.0], np.float32),
    }
    return QuantPlan("unet", "by hand", {"keep": ["*out"]}, layers, tensors)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (0.0, 0.0)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_grid_covers_its_range_and_holds_zero(low, high, symmetric):
    grid = grid_of(Range(low, high), symmetric)
    assert grid.scale > 0 and 0 <= grid.zero_point <= 255
    lowest, highest = (0 - grid.zero_point) * grid.scale, (255 - grid.zero_point) * grid.scale
    assert lowest <= low + grid.scale / 2 and highest >= high - grid.scale / 2
    if symmetric:
        assert grid.signed_zero_point == 0


@pytest.mark.parametrize("span", [Range(-np.inf, 1.0), Range(0.0, np.inf), Range(np.nan, np.nan)])
def test_a_range_that_is_not_finite_has_no_grid(span):
    with pytest.raises(ArtifactError, match="finite"):
        grid_of(span)


def test_a_weight_is_nearest_on_its_channels_grid():
    weight = np.random.default_rng(0).normal(size=(4, 3, 2, 2)).astype(np.float32)
    scale = np.abs(weight).reshape(4, -1).max(axis=1) / 127
    stored = integer_weight(weight, scale)
    assert stored.dtype == np.int8 and np.abs(stored.astype(int)).max() == 127
    error = np.abs(stored * scale.reshape(4, 1, 1, 1) - weight)
    assert (error <= scale.reshape(4, 1, 1, 1) * 0.5001).all()
    assert integer_weight(weight, scale / 2).min() == -127


def test_a_plan_comes_back_and_equal_plans_are_equal_bytes(tmp_path):
    plan = make_plan()
    quant_plan.save(tmp_path / "one", plan)
    turned = QuantPlan(plan.component, plan.estimator, plan.settings, plan.layers,
                       dict(reversed(plan.tensors.items())))  # fmt: skip
    quant_plan.save(tmp_path / "two", turned)
    assert quant_plan.digest(tmp_path / "one") == quant_plan.digest(tmp_path / "two")
    back = quant_plan.load(tmp_path / "one")
    assert back.layers == plan.layers and back.settings == plan.settings
    assert back.tensors.keys() == plan.tensors.keys()
    np.testing.assert_array_equal(back.weight_scale("net.conv"), [0.5, 1.0, 2.0])
    np.testing.assert_array_equal(back.bias("net.conv"), [1.0, 2.0, 3.0])
    assert back.bias("net.out") is None
    assert [layer.integer_kernel for layer in back.layers] == [True, False, False]


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def other_version(path):
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "schema": "diffoundry.quant_plan/9.0"}))


def unknown_scheme(path):
    path.write_text(path.read_text().replace("weight_only", "binary"))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("plan.json", cut),
        ("plan.json", other_version),
        ("plan.json", unknown_scheme),
        ("plan.safetensors", cut),
        ("plan.json", lambda path: path.unlink()),
        ("plan.safetensors", lambda path: path.unlink()),
    ],
)
def test_a_damaged_plan_is_refused(tmp_path, file, damage):
    quant_plan.save(tmp_path, make_plan())
    damage(tmp_path / file)
    with pytest.raises(ArtifactError):
        quant_plan.validate(tmp_path)


@pytest.mark.parametrize("scale", [np.zeros(3), np.full(3, np.nan), np.array([1.0, -1.0, 1.0])])
def test_what_cannot_be_meant_is_refused_by_name(tmp_path, scale):
    plan = make_plan()
    tensors = {**plan.tensors, "net.conv.weight_scale": scale.astype(np.float32)}
    del tensors["net.out.weight_scale"]
    layers = (*plan.layers, LayerPlan("net.blind", "conv", "static"))
    quant_plan.save(tmp_path, QuantPlan("unet", "x", {}, layers, tensors))
    with pytest.raises(ArtifactError) as caught:
        quant_plan.load(tmp_path)
    for name in ("net.conv", "net.out", "net.blind: static, but no activation range"):
        assert name in caught.value.text()


def test_all_layers_that_are_not_there_are_named():
    with pytest.raises(ArtifactError) as caught:
        quant_plan.refuse_missing(make_plan(), {"net.out"}, "here")
    text = caught.value.text()
    assert "2 that are not: net.conv, net.words" in text and "net.out" not in text
    quant_plan.refuse_missing(make_plan(), {"net.out", "net.conv", "net.words", "more"}, "here")
