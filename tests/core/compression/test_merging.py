"""Heads that give nearly the same become one, and nothing changes."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention

from diffoundry.compression.merging import merge_heads, rank_heads
from diffoundry.compression.pruning import Settings, damage_of, prune
from diffoundry.compression.statistics import gather_moments
from diffoundry.formats.recording import Call
from diffoundry.models.pruning import cut, find_sites
from diffoundry.types import Axis, AxisRef, Contract, TensorSpec

WIDTH, HEADS, SIZE = 12, 4, 3
DIMS = (AxisRef("batch"), 5, WIDTH)
CONTRACT = Contract("unet", (TensorSpec("x", "float32", DIMS),),
                    (TensorSpec("y", "float32", DIMS),), (Axis("batch", 1, 1, 4),))  # fmt: skip


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention(WIDTH, heads=HEADS, dim_head=SIZE)

    def forward(self, x):
        return self.attn(x)


@pytest.fixture
def twins():
    """A network whose heads 1 and 3 attend alike; 3's values are those of 1 turned around."""
    torch.manual_seed(0)
    network = Network().eval().requires_grad_(False)
    attn = network.attn
    one, three = slice(SIZE, 2 * SIZE), slice(3 * SIZE, 4 * SIZE)
    for layer in (attn.to_q, attn.to_k):
        layer.weight[three] = layer.weight[one]
    attn.to_v.weight[three] = -2 * attn.to_v.weight[one].flip(0)
    attn.to_out[0].weight *= 4  # none of them is small
    generator = torch.Generator().manual_seed(1)
    calls = []
    for _ in range(30):
        x = 2 * torch.randn(1, 5, WIDTH, generator=generator)
        calls.append(Call({"x": x.numpy()}, {"y": network(x).numpy()}, {"batch": 1}, ""))
    (site,) = find_sites(network)
    ((_, moments),) = gather_moments(network, network, CONTRACT, calls, [site.consumer],
                                     [1.0] * len(calls))  # fmt: skip
    return network, calls, site, moments


def test_one_of_two_twins_goes_first_and_the_other_does_its_work(twins):
    network, calls, site, moments = twins
    gone, *rest = rank_heads(network, site, moments)
    assert gone in (1, 3)
    kept = sorted(rest)
    assert merge_heads(network, site, kept, moments) == ((gone, 4 - gone),)
    cut(network, site, kept)
    assert damage_of(network, CONTRACT, calls) < 1e-8


def test_heads_that_differ_are_not_merged(twins):
    network, _, site, moments = twins
    before = network.attn.to_out[0].weight.clone()
    assert merge_heads(network, site, [1, 2, 3], moments) == ()
    assert torch.equal(network.attn.to_out[0].weight, before)


@pytest.mark.parametrize("merging", [True, False])
def test_pruning_by_variance_merges_only_where_asked(twins, merging):
    network, calls, *_ = twins
    settings = Settings(0.2, kinds=("heads",), importance="variance", compensate=False,
                        merge_heads=merging)  # fmt: skip
    prune(network, CONTRACT, calls, calls[:4], settings)
    assert network.attn.heads == HEADS - 1
    damage = damage_of(network, CONTRACT, calls)
    assert damage < 1e-8 if merging else damage > 1e-3
