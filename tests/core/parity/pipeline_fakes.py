"""A numpy "pipeline" with the guidance embedding, at the size of the embedded model's pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from diffoundry.formats.recording import PipelineRecording, Trajectory
from diffoundry.formats.step_table import StepTable
from diffoundry.generation import TextToImage
from diffoundry.models.geometry import Geometry
from diffoundry.types import Array, Session

CAPTIONS = (
    "a small red circle on a blue background",
    "a large green square on a white background",
)
GEOMETRY = Geometry(
    vae_factor=16,
    latent_channels=3,
    tokens=5,
    text_width=3,
    native_height_pixels=64,
    native_width_pixels=64,
    latent_scaling_factor=0.5,
    latent_shift_factor=0.0,
    prediction_type="epsilon",
    guidance_embedding_dim=4,
    pixel_multiple_of=16,
    is_lcm=True,
)
LATENT = (1, 3, 4, 4)
STEPS = 2


@dataclass(frozen=True)
class Encoded:
    ids: Array
    attention_mask: Array
    lost: str = ""


class FakeTokenizer:
    def encode(self, text: str) -> Encoded:
        ids = np.frombuffer(text.encode().ljust(5)[-5:], np.uint8).astype(np.int64)
        return Encoded(ids, np.ones(5, np.int64))


class FakeTables:
    default = "lcm"

    def load(self, scheduler: str | None, steps: int) -> StepTable:
        ones = np.ones(steps, np.float32)
        columns = ones[:, None]
        return StepTable(
            "lcm", steps, 1.0, 100 * ones, ones, 0.8 * columns, -0.3 * columns, 0.1 * ones
        )


@dataclass
class FakeComponent:
    """One numpy function as a session; `spoil` spoils what it gives."""

    compute: Callable[[Mapping[str, Array]], dict[str, Array]]
    spoil: Callable[[Array], Array] = lambda value: value
    closed: bool = field(default=False)

    def infer(self, feeds):
        return {name: self.spoil(value) for name, value in self.compute(feeds).items()}

    def probe(self, feeds, names=None):
        return {}

    def precision_used(self):
        return {"compute": "fp32"}

    def close(self):
        self.closed = True


def _text_encoder(feeds: Mapping[str, Array]) -> dict[str, Array]:
    ids = feeds["input_ids"].astype(np.float32)
    return {"prompt_embeds": np.stack([np.sin(ids), np.cos(ids), ids / 100], axis=-1)}


def _unet(feeds: Mapping[str, Array]) -> dict[str, Array]:
    text = feeds["encoder_hidden_states"].mean(axis=1)[:, :, None, None]
    guidance = feeds["timestep_cond"].mean()
    return {"model_output": (np.tanh(feeds["sample"]) + text + guidance).astype(np.float32)}


def _vae_decoder(feeds: Mapping[str, Array]) -> dict[str, Array]:
    return {"image": np.tanh(feeds["latent"]).repeat(16, axis=2).repeat(16, axis=3)}


FUNCTIONS = {"text_encoder": _text_encoder, "unet": _unet, "vae_decoder": _vae_decoder}


def make_sessions(**spoils: Callable[[Array], Array]) -> dict[str, Session]:
    return {
        name: FakeComponent(function, **({"spoil": spoils[name]} if name in spoils else {}))
        for name, function in FUNCTIONS.items()
    }


def make_recording(prompts: tuple[str, ...] = CAPTIONS) -> PipelineRecording:
    pipeline = TextToImage(make_sessions(), FakeTokenizer(), FakeTables(), GEOMETRY)
    trajectories = []
    for seed, prompt in enumerate(prompts):
        draw = np.random.default_rng(seed)
        initial = draw.standard_normal(LATENT).astype(np.float32)
        noise = draw.standard_normal((STEPS, *LATENT)).astype(np.float32)
        final = pipeline.denoise(
            prompt, steps=STEPS, guidance=4.0, initial_latents=initial, step_noise=noise
        )
        image = pipeline.decode(final)
        shape = {"batch": 1, "height": 64, "width": 64}
        trajectories.append(
            Trajectory(prompt, "", seed, "lcm", STEPS, 4.0, shape, initial, noise, final, image)
        )
    return PipelineRecording(tuple(trajectories), "evaluation")
