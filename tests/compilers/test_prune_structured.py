"""The stage: a smaller folder that loads again, with its record."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch

from diffoundry.compilers.prune_structured import PruneStructured, cut_calls
from diffoundry.errors import ModelError, StageError
from diffoundry.formats import prune_record, recording, smaller_calls, torch_module
from diffoundry.formats.recording import Call, ComponentRecording
from diffoundry.models.components import load_component
from diffoundry.models.contracts import contract_for, native_axes
from diffoundry.models.pipeline import open_pipeline
from diffoundry.models.pruning import find_sites
from diffoundry.models.rewriting import write_rewritten
from diffoundry.types import Artifact, ArtifactType, StageContext
from tests.mini_pipelines import make_named


def calls_of(module, contract, count, seed):
    rng = np.random.default_rng(seed)
    shape = contract.opt_shape()
    calls = []
    for _ in range(count):
        feeds = {}
        for spec in contract.inputs:
            size = spec.shape(shape)
            if spec.dtype == "int64":
                feeds[spec.name] = rng.integers(0, 10, size)
            elif spec.name == "timestep":
                feeds[spec.name] = rng.uniform(0, 999, size).astype(np.float32)
            else:
                feeds[spec.name] = rng.normal(size=size).astype(np.float32)
        made = module(*(torch.from_numpy(feeds[spec.name]) for spec in contract.inputs))
        calls.append(Call(feeds, {contract.outputs[0].name: made.numpy()}, shape, ""))
    return tuple(calls)


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    return make_named(tmp_path_factory.mktemp("mini"), "lcm")


def prepare(mini, folder, component):
    source = open_pipeline(mini)
    axes = native_axes(source, {})
    contract = contract_for(source, component, axes)
    path = source.components[component].folder
    module = load_component(path, component)
    inputs = {"module": Artifact(ArtifactType("torch_module", "fp32"), path, "sha256:0", component)}
    for number, split in enumerate(("calibration", "tuning")):
        calls = calls_of(module, contract, 3, number)
        recording.save(ComponentRecording(contract, calls, (), (), {}), folder / split)
        inputs[split] = Artifact(ArtifactType("recording"), folder / split, "sha256:0", component)
    context = StageContext(work=folder / "work", component=component, contract=contract)
    context.work.mkdir()
    return inputs, context, module


@pytest.mark.parametrize("component", ["unet", "text_encoder", "vae_decoder"])
def test_what_is_written_is_smaller_and_loads_as_what_was_pruned(mini, tmp_path, component):
    inputs, context, module = prepare(mini, tmp_path, component)
    made = PruneStructured(ratio=0.1, floor=0.4).run(inputs, context)
    folder = made["module"].path
    torch_module.validate(folder)
    smaller = load_component(folder, component)
    count = [sum(p.numel() for p in one.parameters()) for one in (module, smaller)]
    record = prune_record.load(made["record"].path)
    assert record["parameters"] == {"before": count[0], "after": count[1]}
    assert count[1] <= 0.9 * count[0]
    surgery = json.loads((folder / "surgery.json").read_text())
    assert [one["module"] for one in surgery["operations"]] == [
        one["module"] for one in record["sites"]
    ]
    (call, *_) = recording.load_component(inputs["tuning"].path).calls
    contract = context.contract
    output = smaller(*(torch.from_numpy(np.array(call.feeds[s.name])) for s in contract.inputs))
    error = (output.numpy() - call.outputs[contract.outputs[0].name]).std()
    assert 0 < error < call.outputs[contract.outputs[0].name].std()


def test_pruned_twice_keeps_both_operations(mini, tmp_path):
    inputs, context, _ = prepare(mini, tmp_path, "unet")
    first = PruneStructured(ratio=0.02, kinds=("heads",), floor=0.5).run(inputs, context)
    inputs["module"] = dataclasses.replace(inputs["module"], path=first["module"].path)
    again = dataclasses.replace(context, work=tmp_path / "again")
    again.work.mkdir()
    second = PruneStructured(ratio=0.02, kinds=("feed_forward",)).run(inputs, again)
    kinds = [one["operation"] for one in json.loads(
        (second["module"].path / "surgery.json").read_text())["operations"]]  # fmt: skip
    assert kinds[0] == "prune_heads" and kinds[-1] == "prune_feed_forward"
    load_component(second["module"].path, "unet")


def test_the_same_run_writes_the_same_bytes(mini, tmp_path):
    digests = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        inputs, context, _ = prepare(mini, tmp_path / name, "unet")
        made = PruneStructured(ratio=0.02, kinds=("heads",), recover_steps=3).run(inputs, context)
        digests.append((torch_module.digest(made["module"].path),
                        prune_record.digest(made["record"].path)))  # fmt: skip
    assert digests[0] == digests[1]


@pytest.mark.parametrize("wrong", [{"ratio": 1.5}, {"kinds": ("blocks",)}, {"floor": 0.0}])
def test_wrong_options_are_refused(mini, tmp_path, wrong):
    inputs, context, _ = prepare(mini, tmp_path, "unet")
    with pytest.raises(StageError, match="kinds among"):
        PruneStructured(**wrong).run(inputs, context)


def test_a_ratio_out_of_reach_is_refused_with_what_could_go(mini, tmp_path):
    inputs, context, _ = prepare(mini, tmp_path, "unet")
    with pytest.raises(StageError, match="at most"):
        PruneStructured(ratio=0.9, kinds=("heads",)).run(inputs, context)
    assert not (context.work / "module").exists()


def test_a_folder_whose_surgery_is_another_models_is_refused(mini, tmp_path):
    inputs, context, _ = prepare(mini, tmp_path, "unet")
    stage = PruneStructured(ratio=0.02, kinds=("heads",))
    folder = stage.run(inputs, context)["module"].path
    surgery = json.loads((folder / "surgery.json").read_text())
    surgery["operations"][0]["module"] += ".elsewhere"
    (folder / "surgery.json").write_text(json.dumps(surgery))
    with pytest.raises(ModelError, match="none such"):
        load_component(folder, "unet")


def replaced(inputs, folder, split, change):
    """The inputs with another recording of one split, whose calls `change` made."""
    old = recording.load_component(inputs[split].path)
    calls = change(old.calls)
    recording.save(ComponentRecording(old.contract, calls, (), (), {}), folder)
    return {**inputs, split: dataclasses.replace(inputs[split], path=folder)}


@pytest.mark.parametrize(
    ("split", "change", "words"),
    [
        ("calibration", lambda calls: (), "empty recording"),
        ("tuning", lambda calls: (), "empty recording"),
        ("calibration", lambda calls: calls[:1] * 3, "all with the same inputs"),
        ("calibration", lambda calls: calls[:1], "all with the same inputs"),
    ],
)
def test_recordings_that_say_nothing_are_refused(mini, tmp_path, split, change, words):
    inputs, context, _ = prepare(mini, tmp_path, "unet")
    inputs = replaced(inputs, tmp_path / "other", split, change)
    with pytest.raises(StageError, match=words):
        PruneStructured(ratio=0.1, floor=0.4).run(inputs, context)
    assert not (context.work / "module").exists()


def with_weights(inputs, folder, component, change):
    """The inputs with a module whose network `change` was done to, and recordings from it."""
    source = inputs["module"].path
    shutil.copytree(source, folder)
    module = load_component(source, component)
    change(module.network)
    write_rewritten(folder / "new", source, module.network)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    for path in (folder / "new").iterdir():
        path.replace(folder / path.name)
    return {**inputs, "module": dataclasses.replace(inputs["module"], path=folder)}


FF = "mid_block.attentions.0.transformer_blocks.0.ff"


def test_activations_that_are_infinite_name_the_layer(mini, tmp_path):
    def change(network):
        network.get_submodule(f"{FF}.net.0.proj").weight *= 3e38

    inputs, context, _ = prepare(mini, tmp_path, "unet")
    inputs = with_weights(inputs, tmp_path / "sick", "unet", change)
    with pytest.raises(StageError, match=re.escape(f"the layer {FF}.net.2")):
        PruneStructured(ratio=0.1, kinds=("feed_forward",)).run(inputs, context)


def test_activations_that_are_constant_are_pruned_without_a_nan(mini, tmp_path):
    def change(network):
        proj = network.get_submodule(f"{FF}.net.0.proj")
        proj.weight *= 0
        proj.bias.fill_(1.0)

    inputs, context, _ = prepare(mini, tmp_path, "unet")
    inputs = with_weights(inputs, tmp_path / "flat", "unet", change)
    made = PruneStructured(ratio=0.03, kinds=("feed_forward",)).run(inputs, context)
    module = load_component(made["module"].path, "unet")  # refuses weights that are not finite
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert FF in [one["module"] for one in prune_record.load(made["record"].path)["sites"]]


def test_the_smallest_floor_still_leaves_a_unit_everywhere_and_groups_whole(mini, tmp_path):
    inputs, context, module = prepare(mini, tmp_path, "unet")
    sites = [site for site in find_sites(module.network) if site.kind != "feed_forward"]
    most = sum(site.parameters(module.network) * (site.units - site.groups) for site in sites)
    total = sum(p.numel() for p in module.parameters())
    stage = PruneStructured(ratio=most / total, kinds=("channels", "heads"), floor=0.01,
                            importance="l1", compensate=False)  # fmt: skip
    made = stage.run(inputs, context)
    smaller = load_component(made["module"].path, "unet")
    groups = {site.module: site.groups for site in sites}
    record = prune_record.load(made["record"].path)["sites"]
    assert {one["module"]: one["kept"] for one in record} == groups
    assert sum(p.numel() for p in smaller.parameters()) == total - most


def test_calls_of_a_large_component_are_fewer_smaller_and_answered_anew(mini, monkeypatch):
    source = open_pipeline(mini)
    whole = contract_for(source, "unet", native_axes(source, {}))
    axes = tuple(dataclasses.replace(axis, min=axis.multiple_of) for axis in whole.axes)
    contract = dataclasses.replace(whole, axes=axes)
    module = load_component(source.components["unet"].folder, "unet")
    step = next(axis.multiple_of for axis in axes if axis.name == "height")
    monkeypatch.setattr(smaller_calls, "PIXELS", step * step)
    calls = calls_of(module, contract, 3, 0)
    found = cut_calls(module, contract, calls, 2)
    assert len(found) == 2
    for call, of in zip(found, (calls[0], calls[2]), strict=True):
        assert call.shape == {"batch": 1, "height": step, "width": step}
        assert contract.check_feeds(call.feeds) == call.shape
        contract.check_outputs(call.outputs, call.shape)
        made = module(*(torch.from_numpy(call.feeds[spec.name]) for spec in contract.inputs))
        np.testing.assert_array_equal(made.numpy(), call.outputs[contract.outputs[0].name])
        np.testing.assert_array_equal(call.feeds["timestep"], of.feeds["timestep"])
