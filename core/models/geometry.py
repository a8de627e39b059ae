"""The sizes of a pipeline, read from its configs, and the refusal of what they do not allow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffoundry.errors import ModelError
from diffoundry.models.defaults import field

Config = Mapping[str, Any]

DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "AttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D")
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
# U-Net features that need inputs beyond the contract: field -> values that switch it off.
OUTSIDE_CONTRACT: Mapping[str, tuple[Any, ...]] = {
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "class_embeddings_concat": (None, False),
    "addition_embed_type": (None,),
    "encoder_hid_dim_type": (None,),
    "encoder_hid_dim": (None,),
    "dual_cross_attention": (None, False),
    "attention_type": (None, "default"),
}
# The SD pipelines ignore these, so a value would mean another picture elsewhere.
IGNORED_BY_PIPELINE: Mapping[str, tuple[Any, ...]] = {
    "shift_factor": (None, 0, 0.0),
    "latents_mean": (None,),
    "latents_std": (None,),
}


@dataclass(frozen=True)
class Geometry:
    """The sizes and conventions of one pipeline; nothing of this is assumed anywhere else.

    `vae_factor` is image pixels per latent pixel; `pixel_multiple_of` is what image sides must be
    a multiple of: vae_factor × 2^(U-Net levels − 1). A VAE decoder takes
    latent / latent_scaling_factor + latent_shift_factor. `guidance_embedding_dim` is the width of
    `timestep_cond`, or None. `native_*_pixels` is the size the model was made for.
    """

    vae_factor: int
    latent_channels: int
    tokens: int
    text_width: int
    native_height_pixels: int
    native_width_pixels: int
    latent_scaling_factor: float
    latent_shift_factor: float
    prediction_type: str
    guidance_embedding_dim: int | None
    pixel_multiple_of: int
    is_lcm: bool
    uses_attention_mask: bool = False

    @property
    def sample_size_pixels(self) -> int:
        """The native height (which is the native width too in all but a few pipelines)."""
        return self.native_height_pixels


def read_geometry(
    *,
    pipeline_class: str,
    unet: Config,
    vae: Config,
    text_encoder: Config,
    scheduler: Config,
    tokenizer: Config,
) -> Geometry:
    """Derive the geometry from the configs. Raises ModelError where they do not fit together."""
    _check_unet(unet)
    vae_class = str(vae["_class_name"])
    factor, scaling, shift = read_vae(vae_class, vae)
    channels = int(field(vae_class, vae, "latent_channels"))
    text_width = int(field("CLIPTextModel", text_encoder, "hidden_size"))
    _check_joints(unet, channels, text_width)
    levels = len(field("UNet2DConditionModel", unet, "block_out_channels"))
    height, width = _native_latent(pipeline_class, unet)
    guidance = field("UNet2DConditionModel", unet, "time_cond_proj_dim")
    return Geometry(
        vae_factor=factor,
        latent_channels=channels,
        tokens=_tokens(text_encoder, tokenizer),
        text_width=text_width,
        native_height_pixels=height * factor,
        native_width_pixels=width * factor,
        latent_scaling_factor=scaling,
        latent_shift_factor=shift,
        prediction_type=str(scheduler.get("prediction_type", "epsilon")),
        guidance_embedding_dim=None if guidance is None else int(guidance),
        pixel_multiple_of=factor * 2 ** (levels - 1),
        is_lcm=pipeline_class == "LatentConsistencyModelPipeline",
        uses_attention_mask=bool(text_encoder.get("use_attention_mask", False)),
    )


def _check_unet(unet: Config) -> None:
    """Raise ModelError that names every feature outside the contract."""
    problems = [
        f"{name}={unet[name]!r}"
        for name, allowed in OUTSIDE_CONTRACT.items()
        if unet.get(name) not in allowed
    ]
    for name, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        strange = set(field("UNet2DConditionModel", unet, name)) - set(known)
        problems += [f"{name} holds {block!r}" for block in sorted(strange)]
    mid = field("UNet2DConditionModel", unet, "mid_block_type")
    if mid not in MID_BLOCKS:
        problems.append(f"mid_block_type={mid!r}")
    if problems:
        raise ModelError(
            "unet/config.json",
            expected="a U-Net with sample, timestep, encoder_hidden_states (and timestep_cond)",
            found="; ".join(problems),
            remedy="these features are not supported; use a U-Net without them",
        )


def read_vae(
    vae_class: str, vae: Config, where: str = "vae/config.json"
) -> tuple[int, float, float]:
    """Pixels per latent pixel, scaling factor and shift of the autoencoder.

    Raises ModelError, in the config that `where` names, for one of another pipeline class.
    """
    for name, ignored in IGNORED_BY_PIPELINE.items():
        if vae.get(name) not in ignored:
            raise ModelError(
                where,
                expected=f"no {name}: StableDiffusionPipeline does not use it",
                found=f"{name}={vae[name]!r}",
                remedy="this autoencoder was made for another pipeline class",
            )
    for name in ("in_channels", "out_channels"):
        if field(vae_class, vae, name) != 3:
            raise ModelError(where, expected=f"{name}=3 (RGB)", found=f"{name}={vae[name]}")
    scaling = float(field(vae_class, vae, "scaling_factor"))
    shift = float(vae.get("shift_factor") or 0.0)
    if vae_class == "AutoencoderKL":
        return 2 ** (len(field(vae_class, vae, "block_out_channels")) - 1), scaling, shift
    encoder = 2 ** (len(field(vae_class, vae, "encoder_block_out_channels")) - 1)
    step = int(field(vae_class, vae, "upsampling_scaling_factor"))
    decoder = step ** (len(field(vae_class, vae, "decoder_block_out_channels")) - 1)
    if encoder != decoder:
        raise ModelError(
            where,
            expected="an encoder that shrinks as much as the decoder enlarges",
            found=f"encoder {encoder}x, decoder {decoder}x",
        )
    return encoder, scaling, shift


def _check_joints(unet: Config, latent_channels: int, text_width: int) -> None:
    """The networks must fit each other: latent channels and text width."""
    for name in ("in_channels", "out_channels"):
        channels = field("UNet2DConditionModel", unet, name)
        if channels != latent_channels:
            raise ModelError(
                "unet/config.json",
                expected=f"{name}={latent_channels}, the latent channels of the vae",
                found=f"{name}={channels}",
                remedy="inpainting, image-conditioned or learned-variance U-Nets are not supported",
            )
    width = field("UNet2DConditionModel", unet, "cross_attention_dim")
    widths = {int(width)} if isinstance(width, int) else {int(value) for value in width}
    if widths != {text_width}:
        raise ModelError(
            "unet/config.json",
            expected=f"cross_attention_dim={text_width}, the text encoder's hidden_size",
            found=f"cross_attention_dim={width}",
            remedy="the U-Net and the text encoder come from different models",
        )


def _native_latent(pipeline_class: str, unet: Config) -> tuple[int, int]:
    """Native latent height and width."""
    size = field("UNet2DConditionModel", unet, "sample_size")
    if size is None:
        raise ModelError(
            "unet/config.json",
            expected="sample_size, the native size in latent pixels",
            found="none",
            remedy='add it, for example "sample_size": 64',
        )
    if not isinstance(size, int):
        return int(size[0]), int(size[1])
    # As StableDiffusionPipeline.__init__ does: the first releases wrote 32 for models of 64.
    old = pipeline_class == "StableDiffusionPipeline" and _older_than_0_9(unet)
    return (64, 64) if old and size < 64 else (size, size)


def _older_than_0_9(unet: Config) -> bool:
    match = re.match(r"(\d+)\.(\d+)", str(unet.get("_diffusers_version", "")))
    return match is not None and (int(match[1]), int(match[2])) < (0, 9)


def _tokens(text_encoder: Config, tokenizer: Config) -> int:
    """Tokens of a prompt: what the tokenizer pads to, within the encoder's positions."""
    positions = int(field("CLIPTextModel", text_encoder, "max_position_embeddings"))
    length = tokenizer.get("model_max_length")
    # transformers writes 1e30 where no length was given.
    if length is None or length > 1e9:
        return positions
    if int(length) > positions:
        raise ModelError(
            "tokenizer/tokenizer_config.json",
            expected=f"model_max_length <= {positions}, the text encoder's positions",
            found=str(length),
            remedy="the tokenizer and the text encoder come from different models",
        )
    return int(length)
