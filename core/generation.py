"""Pictures from text, with any sessions: engines of a bundle, or PyTorch. Never imports torch."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from diffoundry.errors import StageError, UsageError
from diffoundry.formats.canonical import atomic_write
from diffoundry.formats.step_table import StepTable
from diffoundry.models.geometry import Geometry
from diffoundry.sampling.guidance import combine, guidance_embedding
from diffoundry.sampling.noise import draw_initial, draw_step_noise
from diffoundry.sampling.sampler import Predict, sample
from diffoundry.sampling.schedulers import SCHEDULERS
from diffoundry.types import Array, Session

PICTURE_COMPONENTS = ("text_encoder", "unet", "vae_decoder")
"""What a picture from text needs."""


class Encoded(Protocol):
    """A tokenized prompt: ids and mask int64 [tokens], and the words that did not fit."""

    @property
    def ids(self) -> Array: ...

    @property
    def attention_mask(self) -> Array: ...

    @property
    def lost(self) -> str: ...


class TextEncoder(Protocol):
    """What tokenizes prompts (`diffoundry.models.tokenizer.Tokenizer`)."""

    def encode(self, text: str) -> Encoded: ...


class Tables(Protocol):
    """Where step tables come from (`diffoundry.formats.step_table.TableFolder`)."""

    @property
    def default(self) -> str: ...

    def load(self, scheduler: str | None, steps: int) -> StepTable: ...


@dataclass(frozen=True)
class Picture:
    """One picture: uint8 [height, width, 3], and what it was made from.

    `lost` is the end of the prompt (and of the negative one) that the model did not see, "" when
    it saw everything.
    """

    image: Array
    seed: int
    parameters: Mapping[str, Any] = field(default_factory=dict)
    lost: str = ""
    lost_negative: str = ""


@dataclass(frozen=True)
class TextToImage:
    """A whole pipeline over sessions named text_encoder, unet, vae_decoder.

    Does what StableDiffusionPipeline and LatentConsistencyModelPipeline of diffusers do: a U-Net
    with a guidance embedding is called once a step with `timestep_cond`; any other is guided by
    a negative prompt wherever guidance > 1.
    """

    sessions: Mapping[str, Session]
    tokenizer: TextEncoder
    tables: Tables
    geometry: Geometry

    @property
    def embeds_guidance(self) -> bool:
        """Whether the U-Net takes the guidance as an input."""
        return self.geometry.guidance_embedding_dim is not None

    @property
    def default_guidance(self) -> float:
        """The default of the diffusers pipeline class."""
        return 8.5 if self.embeds_guidance else 7.5

    def denoise(
        self,
        prompt: str,
        negative: str = "",
        *,
        steps: int,
        guidance: float,
        scheduler: str | None = None,
        initial_latents: Array,
        step_noise: Array | None = None,
    ) -> Array:
        """The denoising loop: the final latent, float32 [batch, C, height/f, width/f].

        initial_latents: unit normal noise of that shape; step_noise: [calls, *that shape], for
        schedulers that add noise. Raises UsageError for a negative prompt that the model cannot
        take, an unknown scheduler, or a number of steps that has no table.
        """
        self._check_negative(negative)
        table = self.tables.load(scheduler, steps)
        predict = self._predict(prompt, negative, guidance, initial_latents.shape)
        return sample(table, initial_latents.astype(np.float32), predict, step_noise)

    def decode(self, latents: Array) -> Array:
        """A final latent [batch, C, height/f, width/f] -> RGB float32 [batch, H, W, 3] in 0..1."""
        geometry = self.geometry
        latent = latents / geometry.latent_scaling_factor + geometry.latent_shift_factor
        feeds = {"latent": latent.astype(np.float32)}
        image = self.sessions["vae_decoder"].infer(feeds)["image"].astype(np.float32)
        return np.clip(image / 2 + np.float32(0.5), 0.0, 1.0).transpose(0, 2, 3, 1)

    def generate(
        self,
        prompts: Sequence[str],
        negative: str = "",
        *,
        steps: int | None = None,
        guidance: float | None = None,
        scheduler: str | None = None,
        seed: int = 0,
        count: int = 1,
        height: int | None = None,
        width: int | None = None,
        done: Callable[[Picture], None] = lambda picture: None,
    ) -> list[Picture]:
        """`count` pictures of each prompt, with the seeds seed, seed + 1, …

        Each picture is made alone, so it does not depend on the others, and handed to `done` as
        soon as it is there. height and width are in pixels. Raises UsageError for arguments that
        the model cannot take.
        """
        guidance = self.default_guidance if guidance is None else guidance
        self._check_request(negative, guidance, seed, count)
        shape = self._latent_shape(height, width)
        scheduler = scheduler or self.tables.default
        if steps is None and scheduler in SCHEDULERS:
            steps = SCHEDULERS[scheduler].default_steps
        table = self.tables.load(scheduler, steps or 0)
        pictures = []
        for prompt in prompts:
            predict = self._predict(prompt, negative, guidance, shape)
            for one in range(seed, seed + count):
                noise = draw_step_noise(one, table.calls, shape) if table.needs_noise else None
                latent = sample(table, draw_initial(one, shape), predict, noise)
                image = to_uint8(self.decode(latent))[0]
                parameters = {
                    "prompt": prompt,
                    "negative": negative,
                    "steps": table.steps,
                    "guidance": guidance,
                    "scheduler": table.scheduler,
                    "seed": one,
                    "height": image.shape[0],
                    "width": image.shape[1],
                }
                lost = [self.tokenizer.encode(text).lost for text in (prompt, negative)]
                pictures.append(Picture(image, one, parameters, *lost))
                done(pictures[-1])
        return pictures

    def encode(self, text: str) -> Array:
        """The text encoder's output for one prompt: float32 [1, tokens, text width]."""
        encoded = self.tokenizer.encode(text)
        feeds = {"input_ids": encoded.ids[None]}
        if self.geometry.uses_attention_mask:
            feeds["attention_mask"] = encoded.attention_mask[None]
        return self.sessions["text_encoder"].infer(feeds)["prompt_embeds"]

    def _predict(
        self, prompt: str, negative: str, guidance: float, shape: tuple[int, ...]
    ) -> Predict:
        """The U-Net as the sampler calls it: guided, over a latent of `shape`."""
        batch = shape[0]
        conditional = np.repeat(self.encode(prompt), batch, axis=0)
        width = self.geometry.guidance_embedding_dim
        if width is not None:
            embedding = guidance_embedding(guidance, width, batch)
            return lambda x, t, k: self._unet(x, t, conditional, timestep_cond=embedding)
        if guidance <= 1:
            return lambda x, t, k: self._unet(x, t, conditional)
        unconditional = np.repeat(self.encode(negative), batch, axis=0)
        both = np.concatenate([unconditional, conditional])

        def guided(x: Array, t: float, k: int) -> Array:
            halves = np.split(self._unet(np.concatenate([x, x]), t, both), 2)
            return combine(halves[0], halves[1], guidance)

        def guided_in_two_calls(x: Array, t: float, k: int) -> Array:
            return combine(self._unet(x, t, unconditional), self._unet(x, t, conditional), guidance)

        return guided if self._unet_takes(2 * batch, shape) else guided_in_two_calls

    def _unet(self, x: Array, t: float, text: Array, **more: Array) -> Array:
        feeds = {
            "sample": x,
            "timestep": np.full(len(x), t, dtype=np.float32),
            "encoder_hidden_states": text,
            **more,
        }
        return self.sessions["unet"].infer(feeds)["model_output"]

    def _unet_takes(self, batch: int, shape: tuple[int, ...]) -> bool:
        """Whether the U-Net's engine allows this batch (one that does not say so does)."""
        session = self.sessions["unet"]
        contract, policy = getattr(session, "contract", None), getattr(session, "policy", None)
        sides = (side * self.geometry.vae_factor for side in shape[2:])
        values = dict(zip(("batch", "height", "width"), (batch, *sides), strict=True))
        if contract is not None:
            axes = [axis for axis in contract.axes if axis.name in values]
            values = {axis.name: values[axis.name] for axis in axes}
            if "batch" not in values or any(axis.problem_with(values[axis.name]) for axis in axes):
                return False
        return policy is None or policy.allows(values)

    def _check_request(self, negative: str, guidance: float, seed: int, count: int) -> None:
        self._check_negative(negative)
        if negative and guidance <= 1:
            raise _usage("negative prompt", "guidance above 1", str(guidance), "raise guidance")
        if seed < 0:
            raise _usage("seed", "0 or more", str(seed), "choose another seed")
        if count < 1:
            raise _usage("count", "1 or more", str(count), "ask for at least one picture")

    def _check_negative(self, negative: str) -> None:
        if negative and self.embeds_guidance:
            raise _usage(
                "negative prompt",
                "none: a model with a guidance embedding (LCM) was distilled with the empty one",
                repr(negative),
                "leave it out, or say in the prompt what should be there",
            )

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        geometry = self.geometry
        height = geometry.native_height_pixels if height is None else height
        width = geometry.native_width_pixels if width is None else width
        multiple = geometry.pixel_multiple_of
        if min(height, width) < multiple or height % multiple or width % multiple:
            raise _usage(
                "picture size",
                f"height and width that are multiples of {multiple}",
                f"{height} × {width}",
                "choose another size",
            )
        self._check_range({"batch": 1, "height": height, "width": width})
        sides = (height // geometry.vae_factor, width // geometry.vae_factor)
        return (1, geometry.latent_channels, *sides)

    def _check_range(self, shape: Mapping[str, int]) -> None:
        """Refuse a size that the U-Net's engine was not built for (sessions that say so)."""
        session = self.sessions["unet"]
        contract, policy = getattr(session, "contract", None), getattr(session, "policy", None)
        axes = contract.axes if contract is not None else ()
        sizes = {axis.name: axis for axis in axes if axis.name in shape}
        allowed = ""
        if any(axis.problem_with(shape[name]) for name, axis in sizes.items()):
            allowed = ", ".join(f"{n} {a.min} to {a.max}" for n, a in sizes.items() if n != "batch")
        elif policy is not None and not policy.allows(shape):
            allowed = "; ".join(
                " × ".join(str(value) for name, value in one if name != "batch")
                for one in policy.shapes
            )
        if allowed:
            raise _usage(
                "picture size",
                f"what these engines were built for: {allowed}",
                f"{shape['height']} × {shape['width']}",
                "choose such a size, or build with other axes in the profile",
            )


def to_uint8(image: Array) -> Array:
    """RGB in 0..1 -> 0..255, rounded as diffusers rounds. Raises StageError where not finite."""
    if not np.isfinite(image).all():
        raise StageError(
            "generated picture",
            expected="finite values",
            found="NaN or infinity",
            remedy="run `verify` on the bundle: an engine is damaged or overflows here",
        )
    return np.rint(image * 255).astype(np.uint8)


def save_png(picture: Picture, path: Path, bundle_digest: str = "") -> None:
    """Write a PNG; tEXt "parameters" (JSON) and "bundle" (digest) say where it came from."""
    from PIL import Image, PngImagePlugin

    text = PngImagePlugin.PngInfo()
    # ASCII JSON: tEXt is Latin-1, and a prompt may be in any script.
    text.add_text("parameters", json.dumps(dict(picture.parameters), sort_keys=True))
    text.add_text("bundle", bundle_digest)
    stream = io.BytesIO()
    Image.fromarray(picture.image).save(stream, format="PNG", pnginfo=text)
    atomic_write(path, stream.getvalue())


def _usage(where: str, expected: str, found: str, remedy: str) -> UsageError:
    return UsageError(where, expected=expected, found=found, remedy=remedy)
