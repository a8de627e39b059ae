"""The capture of a preview decoder: its calls are on latents that the pipeline's capture made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffoundry.errors import StageError
from diffoundry.formats import recording
from diffoundry.formats.canonical import tree_digest
from diffoundry.formats.recording import PipelineRecording, Trajectory
from diffoundry.models.contracts import contract_for
from diffoundry.models.pipeline import PREVIEW, open_pipeline
from diffoundry.models.preview import with_preview_decoder
from diffoundry.stages.capture_preview import CapturePreview
from diffoundry.types import Artifact, ArtifactType, Axis, Contract, StageContext
from tests.mini_pipelines import make_named, make_tiny_vae

SHAPES = ((("batch", 2), ("height", 16), ("width", 20)),)


class Setting:
    """A preview decoder's folder, its contract, and three trajectories that end in noise."""

    def __init__(self, folder: Path) -> None:
        self.decoder = make_tiny_vae(folder / "tiny", scaling_factor=2.0)
        source = open_pipeline(make_named(folder / "lcm", "lcm"))
        axes = (Axis("batch", 1, 1, 2), *(Axis(n, 8, 16, 32, 4) for n in ("height", "width")))
        widened = with_preview_decoder(source, self.decoder)
        self.contract: Contract = contract_for(widened, PREVIEW, axes)
        draw = np.random.default_rng(0)
        self.latents = draw.standard_normal((3, 1, 4, 8, 8)).astype(np.float32)
        shape = {"batch": 1, "height": 16, "width": 16}
        flat = np.zeros((1, 16, 16, 3), np.float32)
        made = tuple(
            Trajectory(f"prompt {n}", "", n, "lcm", 1, 1.0, shape, one, None, one, flat)
            for n, one in enumerate(self.latents)
        )
        recording.save(PipelineRecording(made, "evaluation"), folder / "pipeline")
        self.inputs = {
            "module": Artifact(ArtifactType("torch_module"), self.decoder, "sha256:0", PREVIEW),
            "pipeline": Artifact(ArtifactType("recording"), folder / "pipeline", "sha256:1"),
        }

    def run(self, work: Path, **options: object) -> Path:
        work.mkdir()
        context = StageContext(work, PREVIEW, self.contract, {PREVIEW: self.contract}, threads=1)
        return CapturePreview(**options).run(self.inputs, context)["recording"].path  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("preview"))


def test_the_calls_are_the_trajectories_latents_decoded(setting: Setting, tmp_path: Path) -> None:
    import torch
    from diffusers import AutoencoderTiny

    made = setting.run(tmp_path / "work", shapes=SHAPES)
    recording.validate(made)
    found = recording.load_component(made)
    assert found.contract == setting.contract
    assert [call.prompt for call in found.calls] == ["prompt 0", "prompt 1"]
    vae = AutoencoderTiny.from_pretrained(setting.decoder)
    for call, latent in zip(found.calls, setting.latents, strict=False):
        np.testing.assert_array_equal(call.feeds["latent"], latent)
        with torch.no_grad():
            wanted = vae.decode(torch.from_numpy(latent) / 2).sample.numpy()
        np.testing.assert_allclose(call.outputs["image"], wanted, atol=1e-5)


def test_the_evaluation_has_floors_swaps_and_shapes(setting: Setting, tmp_path: Path) -> None:
    found = recording.load_component(setting.run(tmp_path / "work", shapes=SHAPES))
    assert set(found.floors) == {"fp32", "fp16"}
    assert found.floors["fp32"]["image"].max_abs < found.floors["fp16"]["image"].max_abs
    (swap, *_) = found.swaps_of("latent")
    assert swap.status == "real" and swap.decides(found.floors["fp32"])
    assert [dict(call.shape) for call in found.shape_calls] == [dict(SHAPES[0])]


def test_of_a_large_model_one_small_call_is_measured(setting: Setting, tmp_path: Path) -> None:
    probe = (("batch", 1), ("height", 8), ("width", 8))
    made = setting.run(tmp_path / "work", shapes=(probe,), probe=probe, precisions=("fp32",))
    found = recording.load_component(made)
    assert set(found.floors) == {"fp32"}
    assert {found.bases[swap.base].shape["height"] for swap in found.swaps} == {8}


def test_other_splits_have_their_calls_alone(setting: Setting, tmp_path: Path) -> None:
    made = setting.run(tmp_path / "work", split="calibration", calls_per_component=3, max_calls=2)
    found = recording.load_component(made)
    assert len(found.calls) == 2
    assert (found.swaps, dict(found.floors)) == ((), {})


def test_the_same_capture_gives_the_same_bytes(setting: Setting, tmp_path: Path) -> None:
    one, two = (tree_digest(setting.run(tmp_path / name)) for name in ("one", "two"))
    assert one == two


def test_without_a_contract_it_says_so(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="contract"):
        CapturePreview().run(setting.inputs, StageContext(tmp_path))
