"""The stage: a smaller folder that loads again, with its record."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from diffoundry.compilers.prune_structured import PruneStructured
from diffoundry.errors import ModelError, StageError
from diffoundry.formats import prune_record, recording, torch_module
from diffoundry.formats.recording import Call, ComponentRecording
from diffoundry.models.components import load_component
from diffoundry.models.contracts import contract_for, native_axes
from diffoundry.models.pipeline import open_pipeline
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
