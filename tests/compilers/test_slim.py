"""slim_structured and slim_width: one set of weights, of which the first units are a network."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from diffoundry.compilers.slim_structured import SlimStructured
from diffoundry.compilers.slim_width import SlimWidth
from diffoundry.errors import StageError
from diffoundry.formats import prune_record, recording, torch_module
from diffoundry.models.components import load_component
from diffoundry.models.pruning import find_sites
from diffoundry.types import Artifact, ArtifactType
from tests.compilers.test_prune_structured import prepare
from tests.mini_pipelines import make_named


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    return make_named(tmp_path_factory.mktemp("mini"), "lcm")


@pytest.fixture(scope="module")
def ordered(mini, tmp_path_factory):
    """A component's ordered folder, with what it was made from."""
    made = {}
    for component in ("unet", "text_encoder", "vae_decoder"):
        inputs, context, module = prepare(mini, tmp_path_factory.mktemp(component), component)
        produced = SlimStructured().run(inputs, context)
        made[component] = (inputs, context, module, produced)
    return made


def outputs_of(module, inputs, contract):
    (call, *_) = recording.load_component(inputs["tuning"].path).calls
    made = module(*(torch.from_numpy(np.array(call.feeds[s.name])) for s in contract.inputs))
    return made.numpy(), call.outputs[contract.outputs[0].name]


def narrowed(made, folder, width):
    inputs, context, _, produced = made
    path = produced["module"].path
    module = Artifact(ArtifactType("torch_module", "fp32"), path, "sha256:1", context.component)
    work = folder / f"{width}"
    work.mkdir()
    return SlimWidth(width=width).run({"module": module, "tuning": inputs["tuning"]},
                                      dataclasses.replace(context, work=work))  # fmt: skip


@pytest.mark.parametrize("component", ["unet", "text_encoder", "vae_decoder"])
def test_full_width_is_the_original_to_rounding(ordered, tmp_path, component):
    inputs, context, _, produced = ordered[component]
    torch_module.validate(produced["module"].path)
    full = narrowed(ordered[component], tmp_path, 1.0)
    for path in (produced["module"].path, full["module"].path):
        made, wanted = outputs_of(load_component(path, component), inputs, context.contract)
        assert np.abs(made - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert prune_record.load(full["record"].path)["sites"] == []


def test_a_narrow_networks_tensors_are_prefixes_of_the_ordered_ones(ordered, tmp_path):
    path = ordered["unet"][3]["module"].path
    wide = load_component(path, "unet").network
    made = narrowed(ordered["unet"], tmp_path, 0.5)
    half = load_component(made["module"].path, "unet").network
    smaller = 0
    for site in find_sites(wide):
        old, new = (net.get_submodule(site.consumer).weight for net in (wide, half))
        groups = site.groups
        old = old.unflatten(1, (groups, -1))
        new = new.unflatten(1, (groups, -1))
        assert torch.equal(new, old[:, :, : new.shape[2]]), site.name
        smaller += new.numel() < old.numel()
        for name, repeats in site.producers:
            rows = [net.get_submodule(name).weight.flatten(1).unflatten(0, (repeats * groups, -1))
                    for net in (wide, half)]  # fmt: skip
            assert torch.equal(rows[1], rows[0][:, : rows[1].shape[1]]), name
    assert smaller > 5
    record = prune_record.load(made["record"].path)
    assert record["parameters"]["after"] == sum(p.numel() for p in half.parameters())
    assert record["parameters"]["after"] < 0.8 * record["parameters"]["before"]
    assert record["multiply_adds"]["after"] < record["multiply_adds"]["before"]
    inputs, context, *_ = ordered["unet"]
    narrow = load_component(made["module"].path, "unet")
    output, wanted = outputs_of(narrow, inputs, context.contract)
    assert 0 < np.square(output - wanted).mean() < np.square(wanted).mean()


def test_widths_lose_more_the_narrower_they_are(ordered):
    record = prune_record.load(ordered["unet"][3]["record"].path)
    losses = record["recovery"]["widths"]
    assert losses["1"] < 1e-9 < losses["0.75"] < losses["0.5"]


def test_the_same_twice_is_the_same_bytes_with_distillation_too(mini, tmp_path):
    digests = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        inputs, context, _ = prepare(mini, tmp_path / name, "unet")
        stage = SlimStructured(kinds=("heads",), widths=(0.5, 1.0), recover_steps=3)
        made = stage.run(inputs, context)
        assert prune_record.load(made["record"].path)["recovery"]["loss"] > 0
        digests.append((torch_module.digest(made["module"].path),
                        prune_record.digest(made["record"].path)))  # fmt: skip
    assert digests[0] == digests[1]


@pytest.mark.parametrize("wrong", [{"kinds": ("blocks",)}, {"widths": (0.0,)}, {"widths": ()}])
def test_wrong_options_are_refused(ordered, wrong):
    inputs, context, *_ = ordered["unet"]
    with pytest.raises(StageError, match="widths above 0"):
        SlimStructured(**wrong).run(inputs, context)


def test_a_width_of_nothing_is_refused(ordered, tmp_path):
    with pytest.raises(StageError, match="width above 0"):
        narrowed(ordered["unet"], tmp_path, 0.0)
