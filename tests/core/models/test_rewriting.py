"""A changed component written as a folder that loads again."""

from __future__ import annotations

import json

import torch

from diffoundry.formats import torch_module
from diffoundry.models.components import load_component
from diffoundry.models.rewriting import write_rewritten
from diffoundry.models.splits import split_first_token
from diffoundry.models.surgery import Prune, SplitFirstToken
from tests.mini_pipelines import make_named


def test_the_other_half_of_an_autoencoder_is_copied(tmp_path):
    source = make_named(tmp_path / "pipeline", "lcm") / "vae"
    decoder = load_component(source, "vae_decoder")
    with torch.no_grad():
        decoder.decoder.conv_in.bias += 1
    write_rewritten(tmp_path / "made", source, decoder)
    torch_module.validate(tmp_path / "made")
    assert not (tmp_path / "made" / "surgery.json").exists()
    again = load_component(tmp_path / "made", "vae_decoder")
    torch.testing.assert_close(again.decoder.conv_in.bias, decoder.decoder.conv_in.bias)
    wanted = load_component(source, "vae_encoder").state_dict()
    found = load_component(tmp_path / "made", "vae_encoder").state_dict()
    assert all(torch.equal(wanted[name], value) for name, value in found.items())


def test_operations_follow_the_sources_own_and_replaced_tensors_go(tmp_path):
    source = make_named(tmp_path / "pipeline", "lcm") / "unet"
    module = load_component(source, "unet")
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    split_first_token(module.network, name)
    added = SplitFirstToken(operation="split_first_token", module=name)
    write_rewritten(tmp_path / "one", source, module.network, [name], [added])
    loaded = load_component(tmp_path / "one", "unet")
    assert f"{name}.rest.weight" in loaded.network.state_dict()
    feed_forward = "down_blocks.0.attentions.0.transformer_blocks.0.ff"
    units = loaded.network.get_submodule(feed_forward).net[2].in_features
    kept = tuple(range(units - 1))
    prune = Prune(operation="prune_feed_forward", module=feed_forward, units=units, kept=kept)
    prune.resize(loaded.network)
    write_rewritten(tmp_path / "two", tmp_path / "one", loaded.network, [], [prune])
    surgery = json.loads((tmp_path / "two" / "surgery.json").read_text())["operations"]
    assert [one["operation"] for one in surgery] == ["split_first_token", "prune_feed_forward"]
    load_component(tmp_path / "two", "unet")
