"""Pictures from text, with any sessions: engines of a bundle, or PyTorch. Never imports torch."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from diffoundry.errors import StageError
from diffoundry.formats.canonical import atomic_write
from diffoundry.formats.step_table import StepTable
from diffoundry.models.geometry import Geometry
from diffoundry.sampling.guidance import combine, guidance_embedding
from diffoundry.sampling.noise import draw_initial, draw_step_noise
from diffoundry.sampling.requests import check_negative, check_request, latent_shape, unet_takes
from diffoundry.sampling.sampler import Predict, sample
from diffoundry.sampling.schedulers import SCHEDULERS
from diffoundry.sampling.tiling import Tiles, Tiling, decode_tiles, plan_tiles
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


@runtime_checkable
class Pausing(Protocol):
    """A session that can let go of its engine and open it again (`SessionOnDemand`)."""

    def pause(self) -> None: ...


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
        check_negative(self.geometry, negative)
        table = self.tables.load(scheduler, steps)
        predict = self._predict(prompt, negative, guidance, initial_latents.shape)
        return sample(table, initial_latents.astype(np.float32), predict, step_noise)

    def decode(self, latents: Array, tile: Tiling = "off") -> Array:
        """A final latent [batch, C, height/f, width/f] -> RGB float32 [batch, H, W, 3] in 0..1.

        `tile`: see `diffoundry.sampling.tiling`; "off" is what the original computes.
        """
        geometry = self.geometry
        latent = latents / geometry.latent_scaling_factor + geometry.latent_shift_factor
        latent = latent.astype(np.float32)
        decoder, tiles = self.sessions["vae_decoder"], self.tiles(latents.shape, tile)
        if tiles is None:
            image = decoder.infer({"latent": latent})["image"].astype(np.float32)
        else:
            image = decode_tiles(decoder, latent, tiles)
        return np.clip(image / 2 + np.float32(0.5), 0.0, 1.0).transpose(0, 2, 3, 1)

    def with_decoder(
        self, decoder: Session, scaling_factor: float = 1.0, shift_factor: float = 0.0
    ) -> TextToImage:
        """The same pipeline with another decoder of its latents, which takes them divided and
        shifted by its own factors; a preview decoder takes them as the U-Net leaves them."""
        return dataclasses.replace(
            self,
            sessions={**self.sessions, "vae_decoder": decoder},
            geometry=dataclasses.replace(
                self.geometry,
                latent_scaling_factor=scaling_factor,
                latent_shift_factor=shift_factor,
            ),
        )

    def tiles(self, shape: tuple[int, ...], tile: Tiling) -> Tiles | None:
        """How a latent of `shape` is cut for the decoder; None: not at all. Raises UsageError."""
        return plan_tiles(self.sessions["vae_decoder"], shape, self.geometry.vae_factor, tile)

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
        tile: Tiling = "auto",
        in_turn: bool = False,
        done: Callable[[Picture], None] = lambda picture: None,
    ) -> list[Picture]:
        """`count` pictures of each prompt, with the seeds seed, seed + 1, …

        Each picture is made alone, so it does not depend on the others, and handed to `done` as
        soon as it is there. height and width are in pixels. `tile`: whether the decoder works in
        tiles. `in_turn`: every latent is made before the first is decoded, so that U-Net and
        decoder are never held together where sessions can pause (`SessionOnDemand`); for a single
        picture it is always so. Raises UsageError for arguments that the model cannot take.
        """
        guidance = self.default_guidance if guidance is None else guidance
        check_request(self.geometry, negative, guidance, seed, count)
        shape = latent_shape(self.geometry, self.sessions["unet"], height, width)
        tiles = self.tiles(shape, tile)
        scheduler = scheduler or self.tables.default
        if steps is None and scheduler in SCHEDULERS:
            steps = SCHEDULERS[scheduler].default_steps
        table = self.tables.load(scheduler, steps or 0)
        predicts = [self._predict(prompt, negative, guidance, shape) for prompt in prompts]
        self._pause("text_encoder")

        def latents() -> Iterator[tuple[str, int, Array]]:
            for prompt, predict in zip(prompts, predicts, strict=True):
                for one in range(seed, seed + count):
                    noise = draw_step_noise(one, table.calls, shape) if table.needs_noise else None
                    yield prompt, one, sample(table, draw_initial(one, shape), predict, noise)

        in_turn = in_turn or len(prompts) * count == 1
        made: Iterable[tuple[str, int, Array]] = latents()
        if in_turn:
            made = list(made)
            self._pause("unet")
        pictures = []
        for prompt, one, latent in made:
            image = to_uint8(self.decode(latent, tile))[0]
            parameters = {
                "prompt": prompt,
                "negative": negative,
                "steps": table.steps,
                "guidance": guidance,
                "scheduler": table.scheduler,
                "seed": one,
                "height": image.shape[0],
                "width": image.shape[1],
                **({} if tiles is None else {"tiles": tiles.described(self.geometry.vae_factor)}),
            }
            lost = [self.tokenizer.encode(text).lost for text in (prompt, negative)]
            pictures.append(Picture(image, one, parameters, *lost))
            done(pictures[-1])
        if in_turn:
            self._pause("vae_decoder")
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

        takes_both = unet_takes(self.geometry, self.sessions["unet"], 2 * batch, shape)
        return guided if takes_both else guided_in_two_calls

    def _unet(self, x: Array, t: float, text: Array, **more: Array) -> Array:
        feeds = {
            "sample": x,
            "timestep": np.full(len(x), t, dtype=np.float32),
            "encoder_hidden_states": text,
            **more,
        }
        return self.sessions["unet"].infer(feeds)["model_output"]

    def _pause(self, component: str) -> None:
        """Let go of an engine until it is called again, where its session can do that."""
        session = self.sessions[component]
        if isinstance(session, Pausing):
            session.pause()


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
