"""Layers in two parts compute what the whole did."""

from __future__ import annotations

import pytest
import torch

from diffoundry.errors import ModelError
from diffoundry.models.splits import split_convolution, split_first_token


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return (
            torch.nn.ModuleDict(
                {
                    "conv": torch.nn.Conv2d(6, 4, 3, stride=2, padding=1, dilation=2),
                    "plain": torch.nn.Conv2d(6, 4, 1, bias=False),
                    "grouped": torch.nn.Conv2d(6, 4, 1, groups=2),
                    "linear": torch.nn.Linear(6, 4, bias=False),
                }
            )
            .eval()
            .requires_grad_(False)
        )


@pytest.mark.parametrize("name", ["conv", "plain"])
@pytest.mark.parametrize("channels", [1, 4])
def test_a_convolution_in_two_is_the_same(name, channels):
    net, x = network(), torch.randn(2, 6, 9, 9, generator=torch.Generator().manual_seed(0))
    wanted = net[name](x)
    split_convolution(net, name, channels)
    torch.testing.assert_close(net[name](x), wanted, atol=1e-5, rtol=1e-5)
    assert net[name].first.weight.shape[1] == channels
    assert net[name].second.weight.shape[1] == 6 - channels and net[name].second.bias is None
    assert not net[name].first.weight.requires_grad


def test_the_first_token_apart_is_the_same():
    net, x = network(), torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    wanted = net["linear"](x)
    split_first_token(net, "linear")
    torch.testing.assert_close(net["linear"](x), wanted)
    with torch.no_grad():
        net["linear"].rest.weight.zero_()
    changed = net["linear"](x)
    torch.testing.assert_close(changed[:, 0], wanted[:, 0])
    assert not changed[:, 1:].any()
    assert (net["linear"].in_features, net["linear"].out_features) == (6, 4)


def test_heads_whose_tokens_are_apart_are_no_place_to_prune():
    from diffusers.models.attention_processor import Attention

    from diffoundry.models.pruning import find_sites

    net = torch.nn.ModuleDict({"attn": Attention(8, cross_attention_dim=6, heads=2, dim_head=4)})
    assert [site.kind for site in find_sites(net)] == ["heads"]
    split_first_token(net, "attn.to_k")
    assert find_sites(net) == ()


@pytest.mark.parametrize(
    "split",
    [
        lambda net: split_convolution(net, "conv", 6),
        lambda net: split_convolution(net, "grouped", 2),
        lambda net: split_convolution(net, "linear", 2),
        lambda net: split_convolution(net, "nowhere", 2),
        lambda net: split_first_token(net, "conv"),
        lambda net: split_first_token(net, "nowhere"),
    ],
)
def test_what_is_no_such_layer_is_refused_by_name(split):
    with pytest.raises(ModelError, match=r"surgery: split of '(conv|grouped|linear|nowhere)'"):
        split(network())
