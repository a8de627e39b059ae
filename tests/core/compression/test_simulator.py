"""A plan in PyTorch: what it does to a layer, and that it leaves no trace."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from diffoundry.compression.estimating import PlanSettings
from diffoundry.compression.simulator import simulated
from diffoundry.errors import ArtifactError
from diffoundry.formats.quant_plan import (
    LayerPlan,
    QuantPlan,
    Range,
    grid_of,
    integer_weight,
)
from diffoundry.quality.differences import pooled_sqnr_db
from tests.compilers.small_network import reference, small_network
from tests.core.compression.recorded import plan_of, shared, state_of


def on_grid(x, span, symmetric=False):
    """The same rounding, written with unsigned numbers."""
    grid = grid_of(span, symmetric)
    steps = np.clip(np.rint(x / np.float32(grid.scale)) + grid.zero_point, 0, 255)
    return ((steps - grid.zero_point) * grid.scale).astype(np.float32)


def one_linear(bias=True):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 4, bias=bias)).eval().requires_grad_(False)


def plan_for(net, scheme, **more):
    weight = net[0].weight.numpy()
    scale = np.abs(weight).max(axis=1) / 127
    layer = LayerPlan("0", "linear", scheme, **more)
    return QuantPlan("x", "x", {}, (layer,), {"0.weight_scale": scale.astype(np.float32)})


X = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32) * 2


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scheme", ["static", "dynamic", "weight_only", "float"])
def test_each_scheme_is_integer_arithmetic_done_in_float(scheme, symmetric):
    net, span = one_linear(), Range(-1.0, 3.0)
    activation = span if scheme == "static" else None
    plan = plan_for(net, scheme, activation=activation, symmetric=symmetric)
    weight, scale = net[0].weight.numpy(), plan.weight_scale("0")
    if scheme != "float":
        weight = integer_weight(weight, scale) * scale[:, None]
    x = X
    if scheme == "static":
        x = on_grid(X, span, symmetric)
    elif scheme == "dynamic":
        x = on_grid(X, Range(float(X.min()), float(X.max())), symmetric)
    with simulated(net, plan):
        found = net(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(found, x @ weight.T + net[0].bias.numpy(), atol=1e-5)


def test_outputs_with_a_range_are_on_its_grid():
    net, span = one_linear(), Range(-0.5, 0.5)
    plan = plan_for(net, "static", activation=Range(-6, 6), output=span)
    with simulated(net, plan):
        found = net(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(found, on_grid(found, span), atol=1e-6)
    assert found.max() <= 0.51 and len(np.unique(found)) > 3


@pytest.mark.parametrize("bias", [True, False])
def test_a_corrected_bias_is_used_and_taken_back(bias):
    net = one_linear(bias)
    plan = plan_for(net, "weight_only")
    corrected = np.arange(4, dtype=np.float32)
    corrected_plan = dataclasses.replace(plan, tensors={**plan.tensors, "0.bias": corrected})
    with simulated(net, plan):
        plain = net(torch.from_numpy(X)).numpy()
    with simulated(net, corrected_plan):
        found = net(torch.from_numpy(X)).numpy()
    own = net[0].bias.numpy() if bias else 0
    np.testing.assert_allclose(found - plain, np.broadcast_to(corrected - own, found.shape),
                               atol=1e-5)  # fmt: skip
    assert (net[0].bias is not None) == bias


def test_the_whole_network_drifts_a_little_and_is_then_as_before():
    network, calls, plan = shared()
    state = state_of(network)
    with simulated(network, plan):
        found = reference(network, calls[0].feeds)
    drift = pooled_sqnr_db([calls[0].outputs["model_output"]], [found])
    assert 25 < drift < 60
    assert all(np.array_equal(state[name], value) for name, value in state_of(network).items())
    again = reference(network, calls[0].feeds)
    np.testing.assert_array_equal(again, calls[0].outputs["model_output"])


def test_it_is_as_before_after_an_error_too():
    network = small_network()
    _, calls, plan = shared()
    with pytest.raises(ZeroDivisionError), simulated(network, plan):
        raise ZeroDivisionError
    np.testing.assert_array_equal(
        reference(network, calls[0].feeds), calls[0].outputs["model_output"]
    )


def test_a_plan_of_another_model_changes_nothing_and_names_every_layer():
    network, calls, plan = shared()
    strange = tuple(
        dataclasses.replace(one, module=f"other.{one.module}") if i else one
        for i, one in enumerate(plan.layers)
    )
    with (
        pytest.raises(ArtifactError) as caught,
        simulated(network, dataclasses.replace(plan, layers=strange)),
    ):
        pass
    for name in ("other.conv_in", "other.block.conv", "other.block.query", "other.conv_out"):
        assert name in caught.value.text()
    np.testing.assert_array_equal(
        reference(network, calls[0].feeds), calls[0].outputs["model_output"]
    )


def test_a_constant_input_of_zero_survives():
    network, calls, _ = shared()
    plan = plan_of(network, calls, PlanSettings(keep=()))
    layers = [dataclasses.replace(one, activation=Range(0.0, 0.0)) for one in plan.layers]
    with simulated(network, dataclasses.replace(plan, layers=tuple(layers))):
        assert np.isfinite(reference(network, calls[0].feeds)).all()
