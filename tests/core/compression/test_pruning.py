"""Ranking, compensation, allotment: each does on a block with a known answer what it says."""

from __future__ import annotations

import pytest
import torch

from diffoundry.compression import importance, statistics
from diffoundry.compression.allocation import Ladder, Rung, allocate, rung_counts
from diffoundry.compression.compensation import cut_site
from diffoundry.compression.costs import count_multiply_adds, count_parameters, unit_costs
from diffoundry.compression.importance import l1_norms, rank
from diffoundry.compression.pruning import Settings, damage_of, prune
from diffoundry.compression.recovery import recover, recover_if_better
from diffoundry.compression.replaying import sharing_copy
from diffoundry.compression.statistics import call_weights, feeds_of, gather_moments, pieces
from diffoundry.errors import StageError
from diffoundry.models.pruning import find_sites
from tests.core.compression.blocks import CONTRACT, INNER, WIDTH, make_network, record


def moments_of(network, calls):
    (site,) = find_sites(network)
    ((_, found),) = gather_moments(
        network, network, CONTRACT, calls, [site.consumer], [1.0] * len(calls)
    )
    return site, found


def test_moments_are_those_of_what_the_layer_reads():
    network = make_network()
    calls = record(network, 3)
    _, moments = moments_of(network, calls)
    inputs = []
    hook = network.ff.net[2].register_forward_pre_hook(lambda _, x: inputs.append(x[0][0]))
    for call in calls:
        network(*feeds_of(CONTRACT, call.feeds))
    hook.remove()
    x = torch.cat([torch.cat(inputs), torch.ones(12, 1)], dim=1).double()
    assert torch.allclose(moments.second, x.T @ x / 12, atol=1e-6)


@pytest.mark.parametrize("piece", [1, 1 << 20])
@pytest.mark.parametrize("stride", [1, 2])
def test_pieces_of_a_convolution_are_what_its_flattened_weight_multiplies(
    monkeypatch, piece, stride
):
    monkeypatch.setattr(statistics, "PIECE", piece)
    layer = torch.nn.Conv2d(3, 5, 3, padding=1, stride=stride)
    x = torch.randn(2, 3, 8, 8)
    wanted = layer(x)
    parts = list(pieces(layer, x, wanted))
    assert len(parts) == (1 if piece > 1 else 8 // stride)
    weight = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], dim=1)
    for rows, target in parts:
        assert torch.allclose(rows @ weight.T, target, atol=1e-5)


def test_calls_are_stacked_only_while_they_are_small(monkeypatch):
    network = make_network()
    calls = record(network, 5)
    _, stacked = moments_of(network, calls)
    assert len(list(statistics.batches_of(CONTRACT, calls))) == 1
    monkeypatch.setattr(statistics, "STACKED", 1)
    assert len(list(statistics.batches_of(CONTRACT, calls))) == 5
    _, single = moments_of(network, calls)
    assert torch.allclose(stacked.second, single.second, atol=1e-5)


def test_noisy_steps_weigh_more():
    calls = record(make_network(), 2)
    assert call_weights(calls, early=1.0) == pytest.approx([2.0, 1 + 799 / 999])
    assert call_weights(calls, early=0.0) == [1.0, 1.0]


def test_a_unit_that_repeats_another_goes_first_and_costs_nothing_when_compensated():
    network = make_network()
    first, second = network.ff.net[0].proj, network.ff.net[2]
    first.weight[5], first.bias[5] = first.weight[2], first.bias[2]
    second.weight.data *= 1 + torch.arange(INNER)  # nothing is small
    calls = record(network, 24)
    site, moments = moments_of(network, calls)
    ranking = rank(network, site, "second_order", moments, damping=1e-6)
    assert ranking.order[0] in (2, 5)
    cut_site(network, site, ranking.kept(INNER - 1), moments, damping=1e-6)
    assert damage_of(network, CONTRACT, calls) < 1e-8
    assert network.ff.net[2].weight.shape == (WIDTH, INNER - 1)


def test_the_second_order_ranking_is_that_of_what_each_removal_costs():
    """Against its definition: at every round the loss of fitting the rest without each unit."""
    network = make_network()
    site, moments = moments_of(network, record(network, 24))
    damped = importance.damped(moments.second[:-1, :-1], 0.01)
    weight, columns = importance._consumer(network, site)

    def loss(units: list[int]) -> float:
        kept = columns[units].flatten()
        fitted = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight.T).T
        error = weight.clone()
        error[:, kept] -= fitted
        return float(((error @ damped) * error).sum())

    left, order = list(range(site.units)), []
    while len(left) > 1:
        gone = min(left, key=lambda unit: loss([one for one in left if one != unit]))
        left.remove(gone)
        order.append(gone)
    assert site.groups == 1 and site.units >= 8, "several rounds, and none of balanced groups"
    found = rank(network, site, "second_order", moments, damping=0.01)
    assert found.order == (*order, *left)


def test_without_compensation_the_same_cut_hurts():
    network = make_network()
    calls = record(network, 24)
    site, moments = moments_of(network, calls)
    kept = rank(network, site, "second_order", moments).kept(5)
    other = make_network()
    cut_site(other, site, kept, None)
    cut_site(network, site, kept, moments)
    assert damage_of(network, CONTRACT, calls) < 0.5 * damage_of(other, CONTRACT, calls)


def test_a_constant_unit_moves_into_the_bias():
    network = make_network()
    network.ff.net[0].proj.weight[3] = 0
    network.ff.net[0].proj.bias[3] = 2.0
    calls = record(network, 24)
    site, moments = moments_of(network, calls)
    kept = [unit for unit in range(INNER) if unit != 3]
    cut_site(network, site, kept, moments, damping=1e-6)
    assert damage_of(network, CONTRACT, calls) < 1e-8


def test_l1_ranks_as_torch_does():
    from torch.nn.utils import prune as torch_prune

    network = make_network()
    site, moments = moments_of(network, record(network, 4))
    layer = make_network().ff.net[0].proj.requires_grad_(True)
    torch_prune.ln_structured(layer, "weight", amount=3, n=1, dim=0)
    gone = {i for i in range(INNER) if not layer.weight[i].any()}
    assert set(rank(network, site, "l1", moments).order[:3]) == gone
    assert torch.allclose(
        l1_norms(network, site), network.ff.net[0].proj.weight.double().abs().sum(1)
    )


def test_variance_lets_a_silent_unit_go_first():
    network = make_network()
    network.ff.net[2].weight[:, 6] = 0
    site, moments = moments_of(network, record(network, 8))
    assert rank(network, site, "variance", moments).order[0] == 6


def test_the_cheapest_damage_is_allotted_first_and_a_bargain_further_down_is_found():
    ladders = [
        Ladder("a", 10, 1.0, (Rung(8, 0.5), Rung(6, 0.6))),
        Ladder("b", 10, 1.0, (Rung(9, 0.2), Rung(8, 0.9))),
    ]
    assert allocate(ladders, 4) == {"a": 6, "b": 10}
    assert allocate(ladders, 5) == {"a": 6, "b": 9}
    with pytest.raises(StageError, match="at most 6"):
        allocate(ladders, 7)


def test_rungs_never_go_below_the_floor():
    assert rung_counts(range(15, 0, -1), 16, 0.25, 4) == (13, 10, 7, 4)
    assert rung_counts((8, 4), 12, 0.5, 4) == (8,)


def test_costs_are_what_really_leaves():
    network = make_network()
    (site,) = find_sites(network)
    feeds = feeds_of(CONTRACT, record(network, 1)[0].feeds)
    before = count_parameters(network), sum(count_multiply_adds(network, feeds).values())
    parameters = unit_costs(network, [site], None)[site.name]
    adds = unit_costs(network, [site], count_multiply_adds(network, feeds))[site.name]
    cut_site(network, site, [0, 1, 2], None)
    gone = INNER - 3
    assert before[0] - count_parameters(network) == gone * parameters
    assert before[1] - sum(count_multiply_adds(network, feeds).values()) == gone * adds


def test_prune_reaches_its_ratio_and_says_what_it_cut():
    network = make_network()
    result = prune(network, CONTRACT, record(network, 16), record(network, 4, seed=2),
                   Settings(ratio=0.3, floor=0.2))  # fmt: skip
    assert result.parameters[1] == count_parameters(network) <= 0.7 * result.parameters[0]
    assert result.multiply_adds[1] < result.multiply_adds[0]
    (one,) = result.cuts
    assert one.damage > 0 and len(one.kept) == network.ff.net[2].in_features
    with pytest.raises(StageError, match="at most"):
        prune(network, CONTRACT, record(network, 2), record(network, 1), Settings(ratio=0.9))


def test_a_block_on_the_keep_list_stays_whole():
    network = make_network()
    with pytest.raises(StageError, match="at most 0"):
        prune(network, CONTRACT, record(network, 2), record(network, 1),
              Settings(ratio=0.1, keep=("f*",)))  # fmt: skip
    assert network.ff.net[2].in_features == INNER


def test_recovery_brings_the_outputs_back():
    network = make_network()
    calls = record(network, 24)
    site, _ = moments_of(network, calls)
    cut_site(network, site, [0, 1, 2, 3], None)
    before = damage_of(network, CONTRACT, calls)
    recover(network, CONTRACT, calls, steps=200, rate=1e-2)
    assert damage_of(network, CONTRACT, calls) < 0.3 * before
    assert not network.ff.net[2].weight.requires_grad


@pytest.mark.parametrize(("rate", "kept"), [(1e-2, True), (10.0, False)])
def test_a_recovery_that_does_not_help_is_taken_back(rate, kept):
    network = make_network()
    calls, held_out = record(network, 24), record(network, 4, seed=2)
    site, _ = moments_of(network, calls)
    cut_site(network, site, [0, 1, 2, 3], None)
    before = network.ff.net[2].weight.clone()
    made = recover_if_better(network, CONTRACT, calls, held_out, 60, rate)
    assert made.kept == kept == (made.after < made.before)
    assert torch.equal(before, network.ff.net[2].weight) != kept


def test_a_copy_that_shares_its_weights_stays_whole_when_the_other_is_cut():
    network = make_network()
    (call,) = record(network, 1)
    feeds = feeds_of(CONTRACT, call.feeds)
    copied = sharing_copy(network)
    assert {p.data_ptr() for p in copied.parameters()} == {
        p.data_ptr() for p in network.parameters()
    }
    wanted = network(*feeds)
    site, moments = moments_of(network, record(network, 3))
    cut_site(network, site, range(site.units // 2), moments)
    assert torch.equal(copied(*feeds), wanted)
    assert not torch.equal(network(*feeds), wanted)
    assert count_parameters(network) < count_parameters(copied)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_blocks_that_rounding_has_made_indefinite_are_solved_too(sign):
    draw = torch.Generator().manual_seed(0)
    half = torch.randn(5, 4, 4, dtype=torch.float64, generator=draw)
    blocks = half @ half.mT + torch.eye(4, dtype=torch.float64)
    blocks[2] *= sign
    right = torch.randn(5, 4, 3, dtype=torch.float64, generator=draw)
    assert torch.allclose(blocks @ importance._solve(blocks, right), right, atol=1e-9)
