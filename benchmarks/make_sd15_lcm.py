"""Writes a diffusers directory of Stable Diffusion 1.5's architecture as an LCM, seeded weights.

    .venv/bin/python benchmarks/make_sd15_lcm.py [FOLDER] [--vae AutoencoderTiny] [--width 320]

U-Net 859.6 M parameters (`time_cond_proj_dim` 256), AutoencoderKL 83.7 M, CLIP ViT-L/14's text
encoder 123.1 M, a tokenizer of CLIP's size, LCMScheduler: LCM Dreamshaper v7 but for its weights.
Those are drawn, so the model serves speed and memory only; its pictures mean nothing. What is there
already is kept: the folder is made once. `--width` 320 is Stable Diffusion's; others give the same
network thinner (160: 216 M parameters, 112: 107 M), to see how cost grows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import string
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.mini_pipelines import BOS, EOS, build_vocabulary, write_tokenizer

ROOT = Path(__file__).parent.parent / "build" / "models"
VOCABULARY = 49408
"""CLIP's: 512 bytes, 48,894 merges, two marks."""


def make(folder: Path, vae: str = "AutoencoderKL", width: int = 320) -> Path:
    """Write the model unless `folder` holds it; return `folder`."""
    import diffusers
    import torch

    if (folder / "model_index.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    torch.manual_seed(0)
    write_tokenizer(part / "tokenizer", 77, merges=clip_merges())
    for name, build in {"unet": unet, "vae": autoencoder, "text_encoder": text_encoder}.items():
        model = build(width) if name == "unet" else build(vae)
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{name}: {parameters:.1f} M parameters", flush=True)
        model.save_pretrained(part / name, safe_serialization=True, max_shard_size="20GB")
        del model
    diffusers.LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        original_inference_steps=50, prediction_type="epsilon", set_alpha_to_one=True,
        steps_offset=1, timestep_spacing="leading",
    ).save_pretrained(part / "scheduler")  # fmt: skip
    index = {
        "_class_name": "LatentConsistencyModelPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None], "image_encoder": [None, None],
        "requires_safety_checker": False, "safety_checker": [None, None],
        "scheduler": ["diffusers", "LCMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", vae],
    }  # fmt: skip
    (part / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    part.rename(folder)
    return folder


def clip_merges() -> list[tuple[str, str]]:
    """As many merges as CLIP has: letters to pairs to triples to fours, in the alphabet's order."""
    letters = string.ascii_lowercase
    ends = [*letters, *(letter + "</w>" for letter in letters)]
    starts = ["".join(p) for n in (1, 2, 3) for p in itertools.product(letters, repeat=n)]
    merges = ((start, end) for start in starts for end in ends)
    return list(itertools.islice(merges, VOCABULARY - 514))


def unet(width: int) -> Any:
    """SD 1.5's U-Net with LCM's guidance input, its answer near the noise that it is given."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=64, in_channels=4, out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        layers_per_block=2, cross_attention_dim=768, attention_head_dim=8,
        norm_num_groups=32 if width % 32 == 0 else 16, time_cond_proj_dim=256,
    )  # fmt: skip
    answer_near_the_noise(model)
    return model


def answer_near_the_noise(model: Any) -> None:
    """Lead the sample past the network to its output, so that latents keep an ordinary size.

    What drawn weights answer has nothing to do with the noise, and dividing by the signal's 0.07 at
    the first step makes latents of 15. silu(x) − silu(−x) = x, so two channels of conv_in's output,
    carried by the last skip, give the sample back behind the last norm and activation.
    """
    import torch

    with torch.no_grad():
        last = model.up_blocks[-1].resnets[-1]
        group = model.conv_norm_out.num_channels // model.conv_norm_out.num_groups
        skip = last.conv_shortcut.in_channels - model.conv_in.out_channels
        attention = model.up_blocks[-1].attentions[-1].proj_out
        model.conv_out.weight.mul_(0.1)
        for latent in range(4):
            for side, sign in enumerate((1.0, -1.0)):
                channel = latent * group + side  # each pair in a group of the norm's own
                model.conv_in.weight[channel] *= 0.02
                model.conv_in.weight[channel, latent, 1, 1] = sign
                for layer in (last.conv2, last.conv_shortcut, attention):
                    layer.weight[channel] *= 0.02
                last.conv_shortcut.weight[channel, skip + channel, 0, 0] = 1.0
                model.conv_out.weight[latent, channel, 1, 1] += sign * 0.5


def autoencoder(name: str) -> Any:
    """SD 1.5's autoencoder, or the tiny one (TAESD's shape)."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    if name == "AutoencoderTiny":
        return AutoencoderTiny()
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        sample_size=512, scaling_factor=0.18215,
    )  # fmt: skip


def text_encoder(_: str) -> Any:
    """CLIP ViT-L/14's text model."""
    from transformers import CLIPTextConfig, CLIPTextModel

    ids = build_vocabulary(clip_merges())
    config = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, max_position_embeddings=77, projection_dim=768,
        hidden_act="quick_gelu",
        bos_token_id=ids[BOS], eos_token_id=ids[EOS], pad_token_id=ids[EOS],
    )  # fmt: skip
    return CLIPTextModel(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument(
        "--vae", default="AutoencoderKL", choices=["AutoencoderKL", "AutoencoderTiny"]
    )
    parser.add_argument("--width", type=int, default=320)
    options = parser.parse_args()
    tiny = "-tiny" if options.vae == "AutoencoderTiny" else ""
    name = f"sd15-lcm{tiny}" + ("" if options.width == 320 else f"-{options.width}")
    print(make(options.folder or ROOT / name, options.vae, options.width))


if __name__ == "__main__":
    main()
