"""Fitting to the original's residual stream: it repairs what blocks before have damaged."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

from diffoundry.compression.compensation import cut_site
from diffoundry.compression.pruning import damage_of
from diffoundry.compression.refitting import Stream, refit, stream_after
from diffoundry.compression.statistics import gather_moments
from diffoundry.formats.recording import Call
from diffoundry.models.pruning import find_sites
from diffoundry.types import Axis, AxisRef, Contract, TensorSpec

TOKENS = (AxisRef("batch"), 6, 16)
IMAGE = (AxisRef("batch"), 8, 6, 6)


def contract_over(dims):
    return Contract("unet", (TensorSpec("x", "float32", dims),),
                    (TensorSpec("y", "float32", dims),), (Axis("batch", 1, 1, 4),))  # fmt: skip


class Resnet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.block = ResnetBlock2D(in_channels=8, out_channels=8, temb_channels=None, groups=2,
                                   output_scale_factor=2.0)  # fmt: skip

    def forward(self, x):
        return self.block(x, None)


class Transformer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.block = BasicTransformerBlock(16, 4, 4)

    def forward(self, x):
        return self.block(x)


def prepare(kind, dims, count=40):
    torch.manual_seed(0)
    network = kind().eval().requires_grad_(False)
    contract = contract_over(dims)
    if kind is Resnet:
        network.block.conv1.weight[[2, 3, 6, 7]] *= 4
    calls = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(1, *dims[1:], generator=generator)
        calls.append(Call({"x": x.numpy()}, {"y": network(x).numpy()}, {"batch": 1}, ""))
    return network, contract, calls


def test_the_stream_after_each_site_is_where_its_sum_is():
    network = Transformer()
    streams = [stream_after(network, site) for site in find_sites(network)]
    assert streams == [Stream("block.norm3", "input"), Stream("block", "output")]
    (site,) = find_sites(Resnet())
    assert stream_after(Resnet(), site) == Stream("block", "output", 2.0)


@pytest.mark.parametrize(("kind", "dims"), [(Resnet, IMAGE), (Transformer, TOKENS)])
def test_a_network_that_was_not_cut_stays_as_it_is(kind, dims):
    network, contract, calls = prepare(kind, dims, 8)
    whole = copy.deepcopy(network)
    for site in find_sites(network):
        refit(network, network, (whole, whole), contract, calls, [1.0] * 8, site, 0.01)
    assert damage_of(network, contract, calls) < 1e-9


def test_the_fit_of_a_later_block_repairs_an_earlier_one():
    damages = {}
    for name in ("own", "original"):
        network, contract, calls = prepare(Transformer, TOKENS)
        whole = copy.deepcopy(network)
        heads, inner = find_sites(network)
        cut_site(network, heads, (0, 2), None)
        kept = tuple(range(0, inner.units, 2))
        if name == "own":
            ((_, moments),) = gather_moments(network, network, contract, calls, [inner.consumer],
                                             [1.0] * len(calls))  # fmt: skip
            cut_site(network, inner, kept, moments)
        else:
            cut_site(network, inner, kept, None)
            refit(network, network, (whole, whole), contract, calls, [1.0] * len(calls), inner,
                  0.01)  # fmt: skip
        damages[name] = damage_of(network, contract, calls)
    assert damages["original"] < 0.9 * damages["own"]


def test_the_fit_of_a_resnet_block_knows_that_its_norm_sees_other_channels():
    damages = []
    for against_original in (False, True):
        network, contract, calls = prepare(Resnet, IMAGE)
        whole = copy.deepcopy(network)
        (site,) = find_sites(network)
        ((_, moments),) = gather_moments(network, network, contract, calls, [site.consumer],
                                         [1.0] * len(calls))  # fmt: skip
        cut_site(network, site, (0, 1, 4, 5), moments)
        if against_original:
            refit(network, network, (whole, whole), contract, calls, [1.0] * len(calls), site,
                  0.01)  # fmt: skip
        damages.append(damage_of(network, contract, calls))
    assert damages[1] < 0.9 * damages[0]
