"""Where units can be cut, and that a cut network is a smaller one that still runs."""

from __future__ import annotations

import pytest
import torch

from diffoundry.errors import ModelError
from diffoundry.models.components import load_component
from diffoundry.models.pruning import Site, cut, find_sites
from tests.mini_pipelines import make_named

FEEDS = {
    "unet": lambda: (torch.randn(2, 4, 8, 8), torch.tensor([1.0, 500.0]), torch.randn(2, 12, 16)),
    "text_encoder": lambda: (torch.randint(0, 10, (2, 12)),),
    "vae_decoder": lambda: (torch.randn(1, 4, 8, 8),),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_named(tmp_path_factory.mktemp("mini"), "sd")


def root(module):
    return getattr(module, "network", module)


@pytest.mark.parametrize(
    ("component", "kinds"),
    [
        ("unet", {"channels", "feed_forward", "heads"}),
        ("text_encoder", {"feed_forward", "heads"}),
        ("vae_decoder", {"channels"}),
    ],
)
def test_each_kind_of_block_is_found_and_can_lose_units(folder, component, kinds):
    module = load_component(folder / component.split("_")[0] if component == "vae_decoder"
                            else folder / component, component)  # fmt: skip
    sites = find_sites(root(module))
    assert {site.kind for site in sites} == kinds
    torch.manual_seed(0)
    feeds = FEEDS[component]()
    whole = module(*feeds)
    for site in sites:
        before = sum(p.numel() for p in module.parameters())
        leave = site.units // site.groups - 1
        per_group = site.units // site.groups
        kept = [g * per_group + i for g in range(site.groups) for i in range(leave)]
        expected = site.parameters(root(module)) * (site.units - len(kept))
        cut(root(module), site, kept)
        assert before - sum(p.numel() for p in module.parameters()) == expected, site.name
    made = module(*feeds)
    assert made.shape == whole.shape
    assert torch.isfinite(made).all() and not torch.allclose(made, whole)


def test_cutting_units_that_do_nothing_changes_nothing(folder):
    module = load_component(folder / "unet", "unet")
    feeds = FEEDS["unet"]()
    for site in find_sites(module.network):
        consumer = module.network.get_submodule(site.consumer)
        per_group = site.units // site.groups
        gone = [g * per_group for g in range(site.groups)]
        columns = [unit * site.width + i for unit in gone for i in range(site.width)]
        if site.kind == "channels":
            continue  # a norm sees its whole group
        consumer.weight.data[:, columns] = 0
    whole = module(*feeds)
    for site in find_sites(module.network):
        if site.kind != "channels":
            cut(module.network, site, list(range(1, site.units)))
    assert torch.allclose(module(*feeds), whole, atol=1e-5)


SITE = Site("channels", "block", 12, 1, 3, (("block.conv1", 1),), "block.conv2")


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ([], "nothing would be left"),
        ([0, 1, 4, 8], "equally many"),
        ([1, 0, 4, 8], "rising"),
        ([0, 4, 12], "rising"),
    ],
)
def test_a_cut_that_would_break_the_block_is_refused(kept, words):
    assert words in str(SITE.problem_with(kept))
    with pytest.raises(ModelError, match=words):
        cut(torch.nn.Module(), SITE, kept)


def test_one_channel_of_each_group_may_stay():
    assert SITE.problem_with([3, 4, 11]) is None
