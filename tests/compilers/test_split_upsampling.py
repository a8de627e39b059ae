"""The stage: upsampling in four small convolutions loads again, computes the same, is planned."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import onnx
import pytest

from diffoundry.compilers.exported_program_from_torch import trace
from diffoundry.compilers.split_upsampling import SplitUpsampling
from diffoundry.compression.estimating import PlanSettings
from diffoundry.errors import ModelError
from diffoundry.exporters.onnx_from_exported_program import write_fp32
from diffoundry.formats import onnx as onnx_format, torch_module
from diffoundry.models.components import load_component
from tests.compilers.mini_component import MiniComponent
from tests.core.compression.recorded import plan_of
from tests.mini_pipelines import make_named

WIDE = SplitUpsampling(min_channels=4)
PARTS = ("even_even", "even_odd", "odd_even", "odd_odd")


@pytest.fixture(scope="module", params=["unet", "vae_decoder", "tiny vae_decoder"])
def mini(request, tmp_path_factory):
    *tiny, component = request.param.split()
    pipeline = make_named(tmp_path_factory.mktemp("mini"), "autoencoder_tiny" if tiny else "lcm")
    return MiniComponent(pipeline, tmp_path_factory.mktemp("calls"), component)


@pytest.fixture(scope="module")
def split(mini):
    """The folder that the stage made, and the module in it."""
    folder = mini.run(WIDE, "split")["module"]
    return folder, load_component(folder, mini.component)


def test_it_loads_again_and_computes_the_same(mini, split):
    folder, loaded = split
    torch_module.validate(folder)
    for call in mini.calls(2, 5):
        for name, found in mini.answer(loaded, call.feeds).items():
            wanted = call.outputs[name]
            np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())
    surgery = json.loads((folder / "surgery.json").read_text())["operations"]
    assert surgery and {one["operation"] for one in surgery} == {"split_doubling"}


def test_each_part_is_planned_and_reads_one_range(mini, split):
    plan = plan_of(split[1], mini.calls(4, 6), PlanSettings(), mini.contract)
    parts = {one.module: one for one in plan.layers if one.module.endswith(PARTS)}
    surgery = json.loads((split[0] / "surgery.json").read_text())["operations"]
    assert len(parts) == 4 * len(surgery)
    for operation in surgery:
        name = next(one for one in parts if operation["module"] in one).rpartition(".")[0]
        assert len({parts[f"{name}.{part}"].activation for part in PARTS}) == 1
        assert {parts[f"{name}.{part}"].scheme for part in PARTS} == {"static"}


def test_nothing_is_enlarged_or_cropped_in_onnx(mini, split, tmp_path):
    import onnxruntime

    write_fp32(trace(split[1], mini.contract), mini.contract, tmp_path, 18, 10**9)
    model = onnx.load(onnx_format.model_file(tmp_path))
    kinds = Counter(node.op_type for node in model.graph.node if "upsamplers" in node.name)
    assert not kinds["Resize"] and not kinds["Slice"] and not kinds["Pad"]
    session = onnxruntime.InferenceSession(model.SerializeToString())
    call = mini.calls(1, 7)[0]
    found = session.run(None, {name: np.asarray(value) for name, value in call.feeds.items()})
    for value, wanted in zip(found, call.outputs.values(), strict=True):
        np.testing.assert_allclose(value, wanted, atol=2e-5 * np.abs(wanted).max())


def test_the_same_run_writes_the_same_bytes(mini, split):
    again = mini.run(WIDE, "again")["module"]
    assert torch_module.digest(again) == torch_module.digest(split[0])


def test_narrow_planes_stay_as_they_are_and_that_is_said(mini):
    said = []
    stage = SplitUpsampling()
    made = stage.run(mini.only(stage), mini.context("narrow", say=said.append))["module"].path
    assert "none has 128 channels" in said[-1] and not (made / "surgery.json").exists()
    torch_module.validate(made)
    call = mini.calls(1, 5)[0]
    for name, found in mini.answer(load_component(made, mini.component), call.feeds).items():
        np.testing.assert_array_equal(found, call.outputs[name])


def test_surgery_of_another_model_is_refused(mini):
    folder = mini.run(WIDE, "strange")["module"]
    surgery = json.loads((folder / "surgery.json").read_text())
    surgery["operations"][0]["module"] += ".elsewhere"
    (folder / "surgery.json").write_text(json.dumps(surgery))
    with pytest.raises(ModelError, match="elsewhere"):
        load_component(folder, mini.component)


def test_a_component_that_doubles_nothing_stays_as_it_is(tmp_path):
    encoder = MiniComponent(make_named(tmp_path / "mini", "lcm"), tmp_path, "vae_encoder")
    said = []
    made = encoder.run(WIDE, "nothing", say=said.append)["module"]
    assert said == ["vae_encoder: 0 of 0 convolutions behind a doubling in four parts"]
    assert not (made / "surgery.json").exists()
    call = encoder.calls(1, 5)[0]
    for name, found in encoder.answer(load_component(made, "vae_encoder"), call.feeds).items():
        np.testing.assert_array_equal(found, call.outputs[name])
