"""Seeded random diffusers directories, small enough to make on the fly in a test.

`make_pipeline(folder, **PIPELINES["sd"])` writes one in well under two seconds (after torch and
diffusers are imported). The weights are random but scaled so that activations are ordinary and
every input has an influence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORDS = ("a", "small", "large", "red", "blue", "green", "circle", "square", "on", "the", "cat")

PIPELINES: Mapping[str, Mapping[str, Any]] = {
    "lcm": {"kind": "lcm"},
    "sd": {"kind": "sd"},
    "odd_widths": {"widths": (6, 10), "groups": 2, "latent_channels": 3, "text_width": 14},
    "three_levels": {"widths": (8, 8, 12), "vae_widths": (4, 8, 8), "heads": 2},
    "four_levels": {"widths": (4, 8, 8, 12), "vae_widths": (4, 4, 8, 8), "latent_side": 16},
    "tokens_24": {"kind": "lcm", "tokens": 24},
    "sd2": {
        "prediction_type": "v_prediction",
        "linear_projection": True,
        "heads": (1, 2),
        "pad_token": "!",
        "scheduler": "DDIMScheduler",
    },
    "autoencoder_tiny": {"kind": "lcm", "vae": "AutoencoderTiny", "vae_widths": (4, 4, 4)},
    "fp16_variant": {"kind": "lcm", "variant": "fp16"},
    "sharded": {"shard_bytes": 20_000},
    "no_mid_block": {"mid_block": False},
}
"""Name -> options of make_pipeline: one for each thing that differs between real pipelines."""


@dataclass(frozen=True)
class Options:
    """What a mini pipeline looks like; sizes are latent pixels, channels and tokens."""

    kind: Literal["sd", "lcm"] = "sd"
    widths: tuple[int, ...] = (8, 12)
    groups: int = 2
    heads: int | tuple[int, ...] = 2
    mid_block: bool = True
    linear_projection: bool = False
    guidance_width: int | None = 16
    vae: Literal["AutoencoderKL", "AutoencoderTiny"] = "AutoencoderKL"
    vae_widths: tuple[int, ...] = (4, 8)
    latent_channels: int = 4
    latent_side: int = 8
    scaling_factor: float | None = None
    text_width: int = 16
    text_layers: int = 2
    tokens: int = 12
    pad_token: str = EOS
    tokenizer_json: bool = False
    prediction_type: str = "epsilon"
    scheduler: str | None = None
    variant: str | None = None
    shard_bytes: int | None = None
    safety_checker: bool = True
    seed: int = 0


def make_pipeline(folder: Path, **options: Any) -> Path:
    """Write a whole diffusers directory and return it; `options` are the fields of Options."""
    import torch

    chosen = Options(**options)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder / "tokenizer", chosen.tokens, chosen.pad_token, chosen.tokenizer_json)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chosen.seed)
        for name, model in _networks(chosen).items():
            _randomise(model)
            _save(model, folder / name, chosen)
    _scheduler(chosen).save_pretrained(folder / "scheduler")
    _write_index(folder, chosen)
    return folder


def make_named(folder: Path, name: str) -> Path:
    """Write the pipeline that `PIPELINES[name]` describes."""
    return make_pipeline(folder, **PIPELINES[name])


def make_tiny_vae(folder: Path, **options: Any) -> Path:
    """Write the folder of an AutoencoderTiny alone; `options` as of make_pipeline, whose latents
    the default fits (not those of "odd_widths" and the like)."""
    import torch

    chosen = Options(**{"vae": "AutoencoderTiny", "vae_widths": (4, 4), **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chosen.seed + 1)
        model = _autoencoder(chosen)
        _randomise(model)
        _save(model, folder, chosen)
    return folder


def write_tokenizer(
    folder: Path,
    tokens: int,
    pad_token: str = EOS,
    as_tokenizer_json: bool = False,
    merges: list[tuple[str, str]] | None = None,
) -> Path:
    """Write a CLIP tokenizer: all bytes and `merges`, by default what makes each WORD a token."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = build_merges() if merges is None else merges
    vocabulary = build_vocabulary(merges)
    token = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    config = {
        "add_prefix_space": False,
        "bos_token": {"__type": "AddedToken", "content": BOS, **token},
        "eos_token": {"__type": "AddedToken", "content": EOS, **token},
        "unk_token": {"__type": "AddedToken", "content": EOS, **token},
        "pad_token": pad_token,
        "do_lower_case": True,
        "model_max_length": tokens,
        "tokenizer_class": "CLIPTokenizer",
    }
    special = {
        "bos_token": {"content": BOS, **token},
        "eos_token": {"content": EOS, **token},
        "pad_token": pad_token,
        "unk_token": {"content": EOS, **token},
    }
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    _write_json(folder / "vocab.json", vocabulary)
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", special)
    if as_tokenizer_json:
        from transformers import CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(folder)
        for path in list(folder.iterdir()):
            path.unlink()
        tokenizer.save_pretrained(folder)
    return folder


def build_merges() -> list[tuple[str, str]]:
    """Merges that make each of WORDS one token, built left to right."""
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:
            pieces = _apply(pair, pieces)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _apply(merges[-1], pieces)
    return merges


def build_vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Token -> id: "!" is 0 as in CLIP, then bytes, bytes at a word's end, merges, BOS, EOS."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable]
    letters += [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [left + right for left, right in merges]
    return {token: i for i, token in enumerate(dict.fromkeys([*tokens, BOS, EOS]))}


def _apply(pair: tuple[str, str], pieces: list[str]) -> list[str]:
    result: list[str] = []
    for piece in pieces:
        if result and (result[-1], piece) == pair:
            result[-1] += piece
        else:
            result.append(piece)
    return result


def _networks(options: Options) -> dict[str, Any]:
    return {
        "unet": _unet(options),
        "vae": _autoencoder(options),
        "text_encoder": _text_encoder(options),
    }


def _unet(options: Options) -> Any:
    from diffusers import UNet2DConditionModel

    levels = len(options.widths)
    return UNet2DConditionModel(
        sample_size=options.latent_side,
        in_channels=options.latent_channels,
        out_channels=options.latent_channels,
        block_out_channels=options.widths,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        mid_block_type="UNetMidBlock2DCrossAttn" if options.mid_block else None,
        layers_per_block=1,
        norm_num_groups=options.groups,
        cross_attention_dim=options.text_width,
        attention_head_dim=options.heads,
        use_linear_projection=options.linear_projection,
        time_cond_proj_dim=options.guidance_width if options.kind == "lcm" else None,
    )


def _autoencoder(options: Options) -> Any:
    from diffusers import AutoencoderKL, AutoencoderTiny

    levels = len(options.vae_widths)
    if options.vae == "AutoencoderTiny":
        return AutoencoderTiny(
            encoder_block_out_channels=options.vae_widths,
            decoder_block_out_channels=options.vae_widths,
            num_encoder_blocks=(1,) * levels,
            num_decoder_blocks=(1,) * levels,
            latent_channels=options.latent_channels,
            scaling_factor=options.scaling_factor or 1.0,
        )
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=options.vae_widths,
        layers_per_block=1,
        latent_channels=options.latent_channels,
        norm_num_groups=options.groups,
        sample_size=options.latent_side * 2 ** (levels - 1),
        scaling_factor=options.scaling_factor or 0.5,
    )


def _text_encoder(options: Options) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    vocabulary = build_vocabulary(build_merges())
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=options.text_width,
        intermediate_size=2 * options.text_width,
        num_hidden_layers=options.text_layers,
        num_attention_heads=2,
        max_position_embeddings=options.tokens,
        projection_dim=options.text_width,
        bos_token_id=vocabulary[BOS],
        eos_token_id=vocabulary[EOS],
        pad_token_id=vocabulary[options.pad_token],
    )
    return CLIPTextModel(config)


def _scheduler(options: Options) -> Any:
    import diffusers

    name = options.scheduler or ("LCMScheduler" if options.kind == "lcm" else "PNDMScheduler")
    settings: dict[str, Any] = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": options.prediction_type,
        "steps_offset": 1,
    }
    if name in ("DDIMScheduler", "LCMScheduler"):
        settings["clip_sample"] = False
    if name == "PNDMScheduler":
        settings["skip_prk_steps"] = True
    return getattr(diffusers, name)(**settings)


def _randomise(model: Any) -> None:
    """Normal weights of variance 1 / fan in, norms near one, small biases."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() > 1 and "embedding.weight" not in name:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            elif parameter.dim() > 1:
                parameter.copy_(noise)
            else:
                parameter.copy_(0.1 * noise + (0.0 if name.endswith("bias") else 1.0))
        if hasattr(model, "post_quant_conv"):
            # Pictures in about -1..1, and a spread of the latent that is not negligible.
            model.decoder.conv_out.weight.mul_(0.3)


def _save(model: Any, folder: Path, options: Options) -> None:
    extra: dict[str, Any] = {}
    if options.variant:
        model = model.half()
        extra["variant"] = options.variant
    if options.shard_bytes:
        extra["max_shard_size"] = options.shard_bytes
    model.save_pretrained(folder, safe_serialization=True, **extra)


def _write_index(folder: Path, options: Options) -> None:
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    index: dict[str, Any] = {
        "_class_name": (
            "LatentConsistencyModelPipeline" if options.kind == "lcm" else "StableDiffusionPipeline"
        ),
        "_diffusers_version": scheduler["_diffusers_version"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": options.safety_checker,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", options.vae],
    }
    if options.safety_checker:
        # Named as real pipelines name them; the folders are not needed, nothing reads them.
        index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    _write_json(folder / "model_index.json", index)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
