"""Phase 4: the trained networks as a diffusers folder in float16, with card and log."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffoundry.embedded.networks import NOISE_SCHEDULE
from diffoundry.embedded.training import Phase, Settings
from diffoundry.embedded.vocabulary import EOS, write_slow_files

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, LatentConsistencyModelPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer


def assemble_pipeline(
    *,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    factor: float,
) -> LatentConsistencyModelPipeline:
    """The float16 pipeline with copies of the networks; `factor` scales the latents."""
    import copy

    import torch
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler
    from diffusers.models.attention_processor import AttnProcessor2_0

    networks = [copy.deepcopy(net).to("cpu", torch.float16) for net in (text_encoder, unet, vae)]
    text_half, unet_half, vae_half = networks
    unet_half.set_attn_processor(AttnProcessor2_0())
    vae_half.register_to_config(scaling_factor=factor)
    scheduler = LCMScheduler(
        **NOISE_SCHEDULE,
        original_inference_steps=50,
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="epsilon",
        timestep_scaling=10.0,
    )
    return LatentConsistencyModelPipeline(
        vae=vae_half,
        text_encoder=text_half,
        tokenizer=tokenizer,
        unet=unet_half,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(
    pipeline: LatentConsistencyModelPipeline,
    out: Path,
    *,
    card: str,
    log: Mapping[str, Any],
) -> None:
    """Writes the folder beside `out`, then puts it in its place with two renames."""
    fresh = out.with_name(f".{out.name}.new")
    former = out.with_name(f".{out.name}.old")
    for folder in (fresh, former):
        shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(fresh, safe_serialization=True)
    _tidy(fresh)
    write_slow_files(pipeline.tokenizer, fresh / "tokenizer")
    special = {"bos_token": pipeline.tokenizer.bos_token, "eos_token": EOS}
    special |= {"pad_token": EOS, "unk_token": EOS}
    _write_json(fresh / "tokenizer" / "special_tokens_map.json", special)
    (fresh / "README.md").write_text(card, encoding="utf-8")
    _write_json(fresh / "training_log.json", log)
    if out.exists():
        os.replace(out, former)
    os.replace(fresh, out)
    shutil.rmtree(former, ignore_errors=True)


def _tidy(folder: Path) -> None:
    """Removes what describes the machine that wrote the folder rather than the model."""
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes them for their owner alone
    for path in sorted(folder.rglob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            continue
        kept = {k: v for k, v in content.items() if k not in _LOCAL_KEYS}
        if kept != content:
            _write_json(path, kept)


_LOCAL_KEYS = frozenset({"_name_or_path", "is_local", "local_files_only"})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def make_log(
    settings: Settings, phases: Sequence[Phase], figures: Mapping[str, Any], notes: Sequence[str]
) -> dict[str, Any]:
    """The training log: settings, every phase's loss and seconds, the measured figures."""
    return {
        "settings": asdict(settings),
        "figures": dict(figures),
        "notes": list(notes),
        "phases": {
            phase.name: {
                "steps": phase.step,
                "seconds": round(phase.seconds),
                "records": phase.records,
            }
            for phase in phases
        },
    }
