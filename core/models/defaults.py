"""What diffusers and transformers assume where a config leaves a field out.

Older configs are sparse (Stable Diffusion 1.4's vae has no scaling_factor). Reading the real
defaults takes seconds of imports, so they are repeated here; a test holds them equal to the
signatures of the classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "UNet2DConditionModel": {
        "sample_size": None,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": (
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        "up_block_types": (
            "UpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
        ),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 1280,
        "time_cond_proj_dim": None,
    },
    "AutoencoderKL": {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (64,),
        "latent_channels": 4,
        "scaling_factor": 0.18215,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
    },
    "AutoencoderTiny": {
        "in_channels": 3,
        "out_channels": 3,
        "encoder_block_out_channels": (64, 64, 64, 64),
        "decoder_block_out_channels": (64, 64, 64, 64),
        "latent_channels": 4,
        "upsampling_scaling_factor": 2,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    },
    "CLIPTextModel": {"hidden_size": 512, "max_position_embeddings": 77, "vocab_size": 49408},
}


def field(class_name: str, config: Mapping[str, Any], name: str) -> Any:
    """The value that the class would use: the config's own, or the class's default."""
    return config[name] if name in config else DEFAULTS[class_name][name]
