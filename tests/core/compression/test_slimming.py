"""Widths: ordered units are the same network, and a narrow one is a prefix."""

from __future__ import annotations

import copy

import pytest
import torch

from diffoundry.compression.importance import Ranking
from diffoundry.compression.slimming import (
    Slices,
    best_first,
    distil,
    fit_widths,
    losses_by_width,
    narrow,
    order_units,
    prefix,
)
from diffoundry.errors import ModelError
from diffoundry.models.components import load_component
from diffoundry.models.pruning import Site, find_sites, permute
from tests.core.compression.blocks import CONTRACT, INNER, make_network, record
from tests.mini_pipelines import make_named

SITE = Site("channels", "block", 12, 1, 3, (("block.conv1", 1),), "block.conv2")


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    return load_component(make_named(tmp_path_factory.mktemp("mini"), "lcm") / "unet", "unet")


def test_best_units_come_first_within_each_group_of_the_norm():
    order = tuple(range(12))  # 11 is worth most
    assert best_first(Ranking(SITE, order)) == (3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8)


@pytest.mark.parametrize(("width", "left"), [(0.01, 1), (0.5, 2), (0.6, 3), (0.75, 3), (1.0, 4)])
def test_a_width_keeps_the_first_of_each_group_and_never_none(width, left):
    kept = prefix(SITE, width)
    assert kept == tuple(group * 4 + place for group in range(3) for place in range(left))
    assert SITE.problem_with(kept) is None


def test_an_order_that_leaves_a_norms_group_is_refused():
    with pytest.raises(ModelError, match="3 groups of 4"):
        permute(torch.nn.Module(), SITE, [4, *range(1, 4), 0, *range(5, 12)])


def test_units_in_another_order_are_the_same_function(unet):
    module = copy.deepcopy(unet)
    torch.manual_seed(0)
    feeds = (torch.randn(2, 4, 8, 8), torch.tensor([1.0, 500.0]), torch.randn(2, 12, 16),
             torch.randn(2, 16))  # fmt: skip
    whole = module(*feeds)
    rankings = []
    for site in find_sites(module.network):
        rounds = torch.randperm(site.units // site.groups).tolist()
        per_group = len(rounds)
        rankings.append(Ranking(site, tuple(g * per_group + i for i in rounds
                                            for g in range(site.groups))))  # fmt: skip
    order_units(module.network, rankings)
    state, before = module.state_dict(), unet.state_dict()
    assert any(not torch.equal(state[name], before[name]) for name in state)
    assert torch.allclose(module(*feeds), whole, atol=1e-5)


def test_slices_of_the_wide_weights_are_the_narrow_network(unet):
    module = copy.deepcopy(unet)
    sites = find_sites(module.network)
    cut = copy.deepcopy(unet)
    narrow(cut.network, sites, 0.5)
    made = Slices(module, sites, 0.5).of(dict(module.named_parameters()))
    wanted = dict(cut.named_parameters())
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)


def test_widths_fitted_together_are_all_nearer_than_cut_ones():
    network = make_network()
    calls = record(network, 24)
    sites = find_sites(network)
    widths = (0.5, 0.75, 1.0)
    before = losses_by_width(network, sites, widths, CONTRACT, calls)
    fit_widths(network, sites, widths, CONTRACT, calls, 1.0, 0.01)
    after = losses_by_width(network, sites, widths, CONTRACT, calls)
    assert after[0.5] < 0.7 * before[0.5] and after[0.75] < before[0.75]
    assert after[1.0] < after[0.5]


def test_the_full_width_alone_is_fitted_to_itself():
    network = make_network()
    calls = record(network, 24)
    fit_widths(network, find_sites(network), (1.0,), CONTRACT, calls, 1.0, 0.01)
    assert losses_by_width(network, (), (1.0,), CONTRACT, calls)[1.0] < 1e-9


def test_joint_distillation_helps_the_narrow_widths_and_keeps_the_wide_one():
    network = make_network()
    calls = record(network, 24)
    sites = find_sites(network)
    widths = (0.5, 1.0)
    before = losses_by_width(network, sites, widths, CONTRACT, calls)
    distil(network, sites, widths, CONTRACT, calls, 150, 1e-2)
    after = losses_by_width(network, sites, widths, CONTRACT, calls)
    assert before[1.0] < 1e-9
    assert after[0.5] < 0.3 * before[0.5] and after[1.0] < after[0.5]
    assert network.ff.net[2].in_features == INNER
