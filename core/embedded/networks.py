"""The four networks of `shapes-lcm` before training, and its schedulers' settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

TOKENS = 16
TEXT_WIDTH = 96
GUIDANCE_WIDTH = 64
LATENT_CHANNELS = 4
LATENT_SIDE = 16
NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


def build_vae() -> AutoencoderKL:
    """A variational autoencoder: image [batch, 3, 64, 64] in -1..1 <-> latent [batch, 4, 16, 16].

    The factor is 4: with 8, a small shape is two latent pixels wide and comes back as a blob.
    """
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=LATENT_SIDE * 4,
    )


def build_text_encoder(vocabulary_size: int, bos: int, eos: int) -> CLIPTextModel:
    """A CLIP text encoder: token ids [batch, 16] -> hidden states [batch, 16, 96]."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    return CLIPTextModel(config)


def build_unet(*, guidance_embedding: bool) -> UNet2DConditionModel:
    """The denoiser: latent [batch, 4, 16, 16], timestep, text [batch, 16, 96] -> predicted noise.

    With `guidance_embedding`, it also takes the guidance as `timestep_cond` [batch, 64], as the
    student of latent consistency distillation does (Luo et al. 2023, section 4.2).
    """
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96, 112),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
        time_cond_proj_dim=GUIDANCE_WIDTH if guidance_embedding else None,
    )
