"""The stage: the compressed original's answers to a recording."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from diffoundry.compression.estimating import PlanSettings
from diffoundry.compression.simulator import simulated
from diffoundry.errors import ArtifactError, ModelError
from diffoundry.formats import quant_plan, recording, simulation
from diffoundry.formats.recording import ComponentRecording, ShapeCall
from diffoundry.stages.simulate import Simulate
from tests.compilers.mini_component import MiniComponent
from tests.core.compression.recorded import plan_of
from tests.mini_pipelines import make_named


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calls")
    made = MiniComponent(make_named(tmp_path_factory.mktemp("mini"), "lcm"), folder, "vae_decoder")
    calls = made.calls(5, 0)
    shapes = [ShapeCall(c.feeds, c.outputs, c.shape, "", True) for c in made.calls(1, 7)]
    saved = ComponentRecording(made.contract, tuple(calls), (), tuple(shapes), {})
    recording.save(saved, folder / "with_shapes")
    made.inputs["recording"] = dataclasses.replace(
        made.artifact("recording", folder / "with_shapes"), digest="sha256:it"
    )
    plan = plan_of(made.module, calls, PlanSettings(keep=()), made.contract)
    quant_plan.save(folder / "plan", plan)
    made.inputs["plan"] = made.artifact("quant_plan", folder / "plan")
    return made


def answers(mini, made):
    saved = recording.load_component(mini.inputs["recording"].path)
    recorded = (*saved.calls, *saved.shape_calls)
    return zip(recorded, made.calls + made.shape_calls, strict=True)


def test_without_a_plan_a_module_answers_as_recorded(mini):
    made = simulation.load(mini.run(Simulate(), "plain")["simulation"])
    assert made.recording_digest == "sha256:it" and len(made.shape_calls) == 1
    for call, found in answers(mini, made):
        np.testing.assert_array_equal(found["image"], call.outputs["image"])


def test_with_a_plan_every_call_is_the_simulators(mini):
    made = simulation.load(mini.run(Simulate(planned=True), "planned")["simulation"])
    plan = quant_plan.load(mini.inputs["plan"].path)
    for call, found in answers(mini, made):
        with simulated(mini.module, plan):
            wanted = mini.answer(mini.module, call.feeds)["image"]
        np.testing.assert_allclose(found["image"], wanted, atol=1e-5)
        assert np.abs(found["image"] - call.outputs["image"]).max() > 1e-4


def test_the_same_run_writes_the_same_bytes(mini):
    digests = [
        simulation.digest(mini.run(Simulate(planned=True), name)["simulation"])
        for name in ("one", "two")
    ]
    assert digests[0] == digests[1]


def test_a_plan_of_another_model_and_infinite_answers_are_refused(mini):
    plan = quant_plan.load(mini.inputs["plan"].path)
    before = dict(mini.inputs)
    layer = dataclasses.replace(plan.layers[0], module="elsewhere.conv", scheme="float")
    quant_plan.save(mini.folder / "strange", dataclasses.replace(plan, layers=(layer,)))
    last = plan.layers[-1].module  # of which no grid clips what comes out
    wild = {**plan.tensors, f"{last}.bias": np.full_like(plan.weight_scale(last), np.inf)}
    quant_plan.save(mini.folder / "wild", dataclasses.replace(plan, tensors=wild))
    try:
        mini.inputs["plan"] = mini.artifact("quant_plan", mini.folder / "strange")
        with pytest.raises(ArtifactError, match=r"elsewhere\.conv"):
            mini.run(Simulate(planned=True), "strangework")
        mini.inputs["plan"] = mini.artifact("quant_plan", mini.folder / "wild")
        with pytest.raises(ModelError):
            mini.run(Simulate(planned=True), "wildwork")
    finally:
        mini.inputs.update(before)
