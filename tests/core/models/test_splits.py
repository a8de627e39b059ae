"""Layers in two parts compute what the whole did."""

from __future__ import annotations

import pytest
import torch

from diffoundry.errors import ModelError
from diffoundry.models.splits import (
    doubling_convolutions,
    split_convolution,
    split_doubling,
    split_first_token,
)


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


class Doubler(torch.nn.Module):
    """diffusers' Upsample2D and AutoencoderTiny's way of doubling, and what is neither."""

    def __init__(self) -> None:
        from diffusers.models.upsampling import Upsample2D

        super().__init__()
        self.block = Upsample2D(6, use_conv=True, out_channels=4)
        self.bare = Upsample2D(6)
        self.transposed = Upsample2D(6, use_conv_transpose=True, out_channels=4)
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(4, 6, 3, padding=1),
            torch.nn.Upsample(scale_factor=2),
            torch.nn.Conv2d(6, 5, 3, padding=1, bias=False),
            torch.nn.Upsample(scale_factor=2, mode="bilinear"),
            torch.nn.Conv2d(5, 5, 3, padding=1),
            torch.nn.Upsample(scale_factor=2),
            torch.nn.Conv2d(5, 3, 1),
        )

    def forward(self, x):
        return self.layers(self.block(x))


def doubler():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Doubler().eval().requires_grad_(False)


@pytest.mark.parametrize("size", [(5, 7), (1, 4)])
def test_convolutions_behind_a_doubling_in_four_are_the_same(size):
    net, x = doubler(), torch.randn(2, 6, *size, generator=torch.Generator().manual_seed(0))
    wanted = net(x)
    assert doubling_convolutions(net) == ("block.conv", "layers.2")
    for name in doubling_convolutions(net):
        split_doubling(net, name)
    torch.testing.assert_close(net(x), wanted, atol=1e-5, rtol=1e-5)
    assert doubling_convolutions(net) == ()
    parts = dict(net.block.conv.named_children())
    assert list(parts) == ["even_even", "even_odd", "odd_even", "odd_odd"]
    assert {tuple(one.weight.shape) for one in parts.values()} == {(4, 6, 2, 2)}
    assert net.layers[2].odd_odd.bias is None and not parts["odd_odd"].weight.requires_grad
    assert (net.block.conv.in_channels, net.block.conv.out_channels) == (6, 4)


def test_weights_are_added_up_in_float64():
    net = doubler()
    net.block.conv.weight.fill_(1.0)
    net.block.conv.weight[0, 0] = torch.tensor([[0, 0, 0], [0, 1e8, 1.0], [0, -1e8, 0]])
    split_doubling(net, "block.conv")
    assert net.block.conv.even_even.weight[0, 0, 1, 1] == 1.0


@pytest.mark.parametrize("name", ["layers.0", "layers.4", "layers.6", "transposed.conv", "nowhere"])
def test_a_convolution_without_a_doubling_before_it_is_refused_by_name(name):
    with pytest.raises(ModelError, match=f"surgery: split of '{name}'"):
        split_doubling(doubler(), name)
