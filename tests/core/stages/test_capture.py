"""The capture stage on mini pipelines: its pictures are diffusers' own, and all is recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from diffoundry.capture.reference import Reference
from diffoundry.errors import ModelError, StageError
from diffoundry.formats import recording
from diffoundry.formats.canonical import tree_digest, tree_size_bytes
from diffoundry.models.contracts import contract_for
from diffoundry.models.pipeline import open_pipeline
from diffoundry.sampling.probing import quiet
from diffoundry.sampling.schedulers import SCHEDULERS
from diffoundry.stages.capture import COMPONENTS, Capture
from diffoundry.types import Artifact, ArtifactType, Axis, Produced, StageContext
from tests.mini_pipelines import make_named

PAIRS = (("a red circle", 3), ("a small blue square", 4))
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "lcm": {"steps": 3, "guidance": 5.0},
    "sd2": {"steps": 3, "guidance": 4.0, "negative": "green"},
    "autoencoder_tiny": {"steps": 2, "guidance": 2.0},
    "odd_widths": {"steps": 4, "guidance": 3.0, "scheduler": "euler_ancestral"},
}


@dataclasses.dataclass(frozen=True)
class Captured:
    """A mini pipeline, and what the stage made of it."""

    name: str
    model: Path
    folder: Path
    said: list[str]
    stage: Capture

    @property
    def guided(self) -> bool:
        """Whether the pipeline guides by two calls a step."""
        return self.name in ("sd2", "odd_widths")

    def component(self, name: str) -> recording.ComponentRecording:
        return recording.load_component(self.folder / name)

    @property
    def pipeline(self) -> recording.PipelineRecording:
        return recording.load_pipeline(self.folder / "pipeline")


def capture(
    model: Path, work: Path, stage: Capture, said: list[str] | None = None
) -> Mapping[str, Produced]:
    work.mkdir()
    source = open_pipeline(model)
    step = source.geometry.pixel_multiple_of
    side = source.geometry.sample_size_pixels
    axes = (
        Axis("batch", 1, 1, 2),
        Axis("height", step, side, side, step),
        Axis("width", step, side, side, step),
    )
    inputs = {
        name: Artifact(ArtifactType("torch_module"), part.folder, "sha256:0", name)
        for name, part in source.components.items()
    }
    inputs["pipeline_files"] = Artifact(ArtifactType("pipeline_files"), model, "sha256:0")
    contracts = {name: contract_for(source, name, axes) for name in COMPONENTS}
    context = StageContext(
        work=work, contracts=contracts, threads=1, say=(said if said is not None else []).append
    )
    return stage.run(inputs, context)


@pytest.fixture(scope="module", params=list(OPTIONS))
def captured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Captured:
    folder = tmp_path_factory.mktemp("capture")
    model = make_named(folder / "model", request.param)
    step = open_pipeline(model).geometry.pixel_multiple_of
    untraced = ((("batch", 2), ("height", 2 * step), ("width", step)),)
    declared = ((("batch", 2), ("height", step), ("width", step)),)
    options = OPTIONS[request.param]
    stage = Capture(pairs=PAIRS, shapes=declared, untraced_shapes=untraced, **options)
    said: list[str] = []
    capture(model, folder / "work", stage, said)
    return Captured(request.param, model, folder / "work", said, stage)


def run_diffusers(captured: Captured, index: int) -> np.ndarray:
    """The picture that the real diffusers pipeline makes of the recorded noise."""
    import sys

    import diffusers
    import torch

    trajectory = captured.pipeline.trajectories[index]
    kind = (
        diffusers.StableDiffusionPipeline
        if captured.guided
        else diffusers.LatentConsistencyModelPipeline
    )
    pipeline = kind.from_pretrained(
        captured.model, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    if captured.stage.scheduler:
        wanted = getattr(diffusers, SCHEDULERS[captured.stage.scheduler].class_name)
        with quiet():
            pipeline.scheduler = wanted.from_config(pipeline.scheduler.config)
    module = sys.modules[type(pipeline.scheduler).__module__]
    draws = iter(() if trajectory.noise is None else torch.from_numpy(trajectory.noise))
    negative = {"negative_prompt": trajectory.negative} if captured.guided else {}
    with quiet(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(draws))
        return pipeline(
            trajectory.prompt,
            num_inference_steps=trajectory.steps,
            guidance_scale=trajectory.guidance,
            latents=torch.from_numpy(trajectory.initial_latents),
            output_type="np",
            **negative,
        ).images


def test_pictures_are_those_of_the_real_diffusers_pipeline(captured: Captured) -> None:
    for index in range(len(PAIRS)):
        expected = run_diffusers(captured, index)
        found = captured.pipeline.trajectories[index].image
        assert found.std() > 0.01
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_every_recording_is_valid_and_small(captured: Captured) -> None:
    for name in (*COMPONENTS, "pipeline"):
        recording.validate(captured.folder / name)
    assert tree_size_bytes(captured.folder) < 1_000_000


def test_the_calls_of_the_whole_trajectory_are_recorded(captured: Captured) -> None:
    unet = captured.component("unet")
    per_step = 2 if captured.guided else 1
    assert len(unet.calls) == min(16, per_step * captured.stage.steps * len(PAIRS))
    assert {call.prompt for call in unet.calls} >= {prompt for prompt, _ in PAIRS}
    assert len({float(call.feeds["timestep"][0]) for call in unet.calls}) == captured.stage.steps


def test_the_encoder_is_called_on_the_decoded_pictures(captured: Captured) -> None:
    image = captured.component("vae_encoder").calls[0].feeds["image"]
    picture = captured.pipeline.trajectories[0].image
    np.testing.assert_allclose(image.transpose(0, 2, 3, 1) / 2 + 0.5, picture, atol=1e-6)


def test_floors_are_positive_and_small_and_fp16s_is_larger(captured: Captured) -> None:
    for name in COMPONENTS:
        component = captured.component(name)
        for output, floor in component.floors["fp32"].items():
            peak = max(np.abs(call.outputs[output]).max() for call in component.calls)
            half = component.floors["fp16"][output]
            assert 0 < floor.max_abs < 1e-5 * max(peak, 1)
            assert floor.max_abs < half.max_abs < 0.05 * max(peak, 1)
            assert 20 < half.sqnr_db < floor.sqnr_db


def test_every_input_has_a_swap_that_decides(captured: Captured) -> None:
    for name in COMPONENTS:
        component = captured.component(name)
        for spec in component.contract.inputs:
            swaps = component.swaps_of(spec.name)
            assert any(len(s.decides(component.floors["fp32"])) == len(s.effects) for s in swaps)
            for swap in swaps:
                base = component.calls[swap.base]
                for key, value in base.feeds.items():
                    assert np.array_equal(value, swap.feeds[key]) == (key != spec.name)


def test_the_guidance_embedding_is_never_recorded_twice_so_its_swap_is_enlarged(
    captured: Captured,
) -> None:
    unet = captured.component("unet")
    if "timestep_cond" not in {spec.name for spec in unet.contract.inputs}:
        assert captured.guided
        return
    (swap,) = unet.swaps_of("timestep_cond")
    assert swap.status == "enlarged"
    assert swap.value.startswith("guidance ")


def test_declared_and_untraced_shapes_are_recorded(captured: Captured) -> None:
    for name in COMPONENTS:
        component = captured.component(name)
        axes = {axis.name for axis in component.contract.axes}
        wanted = {
            tuple(pair for pair in shape if pair[0] in axes): traced
            for shapes, traced in (
                (captured.stage.untraced_shapes, False),
                (captured.stage.shapes, True),
            )
            for shape in shapes
        }
        found = {tuple(sorted(c.shape.items())): c.traced for c in component.shape_calls}
        assert found == wanted
        first = component.contract.inputs[0].name
        for call in component.shape_calls:
            assert not np.array_equal(call.feeds[first][0], call.feeds[first][1])


def test_the_same_capture_gives_the_same_digests(captured: Captured, tmp_path: Path) -> None:
    again = capture(captured.model, tmp_path / "again", captured.stage)
    for name, produced in again.items():
        assert tree_digest(produced.path) == tree_digest(captured.folder / name), name


def test_only_the_evaluation_split_has_floors_and_swaps(tmp_path: Path) -> None:
    model = make_named(tmp_path / "model", "lcm")
    stage = Capture(split="calibration", pairs=PAIRS[:1], steps=1)
    made = capture(model, tmp_path / "work", stage)
    unet = recording.load_component(made["unet"].path)
    assert len(unet.calls) == 1
    assert (unet.swaps, dict(unet.floors)) == ((), {})
    assert recording.load_pipeline(made["pipeline"].path).split == "calibration"


def test_the_text_encoder_reads_further_prompts_without_a_trajectory(tmp_path: Path) -> None:
    model = make_named(tmp_path / "model", "lcm")
    texts = ("a paper boat", "two green pears", "a dog on a hill")
    stage = Capture(
        split="calibration", calls_per_component=1, pairs=PAIRS[:1], texts=texts, steps=1
    )
    made = capture(model, tmp_path / "work", stage)
    read = [call.prompt for call in recording.load_component(made["text_encoder"].path).calls]
    assert set(read) >= {PAIRS[0][0], *texts}
    assert len(recording.load_component(made["unet"].path).calls) == 1
    assert len(recording.load_pipeline(made["pipeline"].path).trajectories) == 1


def test_without_pairs_it_says_what_is_missing(tmp_path: Path) -> None:
    model = make_named(tmp_path / "model", "lcm")
    with pytest.raises(StageError, match="at least one"):
        capture(model, tmp_path / "work", Capture())


def change_weight(model: Path, part: str, name: str, value: float) -> None:
    from safetensors.numpy import load_file, save_file

    path = next((model / part).glob("*.safetensors"))
    tensors = load_file(path)
    tensors[name] = np.full_like(tensors[name], value)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_model_that_overflows_is_at_fault_itself_and_the_module_is_named(tmp_path: Path) -> None:
    model = make_named(tmp_path / "model", "lcm")
    change_weight(model, "unet", "conv_norm_out.weight", 3e38)
    with pytest.raises(ModelError, match=r"unet: the model itself is at fault[^$]*conv_norm_out"):
        capture(model, tmp_path / "work", Capture(pairs=PAIRS[:1], steps=1))


def test_a_nan_weight_is_a_fault_of_the_model(tmp_path: Path) -> None:
    model = make_named(tmp_path / "model", "lcm")
    change_weight(model, "unet", "conv_in.bias", float("nan"))
    with pytest.raises(ModelError, match="unet"):
        capture(model, tmp_path / "work", Capture(pairs=PAIRS[:1], steps=1))


def test_a_flat_picture_only_warns(tmp_path: Path) -> None:
    model = make_named(tmp_path / "model", "lcm")
    change_weight(model, "vae", "decoder.conv_out.weight", 0.0)
    change_weight(model, "vae", "decoder.conv_out.bias", 0.1)
    said: list[str] = []
    made = capture(model, tmp_path / "work", Capture(pairs=PAIRS[:1], steps=1), said)
    (note,) = recording.load_pipeline(made["pipeline"].path).notes
    assert "flat" in note
    assert any("flat" in line for line in said)
    latent = recording.load_component(made["vae_decoder"].path).swaps_of("latent")
    assert [swap.status for swap in latent] == ["no_influence"]


def test_a_large_models_floors_and_swaps_come_from_one_small_call(tmp_path: Path) -> None:
    """Counted: what each component is called for beyond its trajectory."""
    model = make_named(tmp_path / "model", "lcm")
    step = open_pipeline(model).geometry.pixel_multiple_of
    probe = (("batch", 1), ("height", step), ("width", step))
    huge = (("batch", 2), ("height", 4 * step), ("width", 4 * step))
    stage = Capture(
        pairs=PAIRS[:1], steps=4, max_calls=2, shapes=(probe,), probe=probe,
        untraced_shapes=((("batch", 2), ("height", 2 * step), ("width", step)),),
        precisions=("fp32",), left_out=(huge,),
    )  # fmt: skip
    run = Mock(wraps=Reference.infer)
    doubles = Mock(wraps=Reference.infer_double)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reference, "infer", lambda self, feeds: run(self, feeds))
        patch.setattr(Reference, "infer_double", lambda self, feeds: doubles(self, feeds))
        patch.setattr(Reference, "infer_half", Mock(side_effect=AssertionError))
        capture(model, tmp_path / "work", stage)
    found = recording.load_component(tmp_path / "work" / "unet")
    assert len(found.calls) == 2 and set(found.floors) == {"fp32"}
    assert found.left_out == (dict(huge),)
    assert {found.bases[swap.base].shape["height"] for swap in found.swaps} == {step}
    assert {swap.input for swap in found.swaps} == {s.name for s in found.contract.inputs}
    at_usual = [
        feeds
        for (reference, feeds), _ in run.call_args_list
        if reference.contract.component == "unet"
        and feeds["sample"].shape == found.calls[0].feeds["sample"].shape
    ]
    assert len(at_usual) == 4  # the trajectory, and nothing else
    assert all(
        feeds["sample"].shape[0] == 1 for (_, feeds), _ in run.call_args_list if "sample" in feeds
    )
    (untraced,) = [call for call in found.shape_calls if not call.traced]
    assert untraced.outputs["model_output"].shape[0] == 2
    exact = [c.args[1] for c in doubles.call_args_list if c.args[0].contract.component == "unet"]
    assert len(exact) <= 3 and all(feeds["sample"].shape[2] == step // 2 for feeds in exact)
