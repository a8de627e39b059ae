"""Trains `shapes-lcm` from nothing: `python -m diffoundry.embedded.train --work DIR [--out DIR]`.

Four phases, each resumable: the autoencoder, the teacher (an ordinary latent diffusion
model, after its text encoder), the distillation to few steps, the export. Needs torch, diffusers
and transformers; no network. On two CPU cores with AMX it takes about an hour and a half.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffoundry.embedded import DEFAULT_GUIDANCE, SHAPES_LCM
from diffoundry.embedded.card import write_card
from diffoundry.embedded.export import assemble_pipeline, export, make_log
from diffoundry.embedded.measure import measure_vae, sample_lcm, sample_teacher, share_right
from diffoundry.embedded.prompts import PromptSeed, load_split
from diffoundry.embedded.train_lcm import train_lcm
from diffoundry.embedded.train_teacher import (
    encode_prompts,
    tokenize_all,
    train_teacher,
    train_text_encoder,
)
from diffoundry.embedded.train_vae import encode_cache, train_vae
from diffoundry.embedded.training import Settings
from diffoundry.embedded.vocabulary import build_tokenizer

if TYPE_CHECKING:
    from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and runs the phases that are not done yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--out", type=Path, default=SHAPES_LCM)
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    for item in dataclasses.fields(Settings):
        if item.name.endswith("_steps"):
            flag = f"--{item.name.replace('_', '-')}"
            parser.add_argument(flag, type=int, default=item.default)
    options = vars(parser.parse_args(arguments))
    steps = {name: options[name] for name in options if name.endswith("_steps")}
    settings = dataclasses.replace(Settings(), **steps)
    train(options["work"], options["out"], settings, options["device"])


def train(work: Path, out: Path, settings: Settings, device: str = "cpu") -> None:
    """Runs all phases in `work` and puts the finished pipeline at `out`."""
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    vae, vae_phases = train_vae(work, settings, device)
    moments, scenes, factor = encode_cache(vae, work, settings, device)
    text_encoder = train_text_encoder(work, settings, device, tokenizer)
    states = encode_prompts(text_encoder, tokenize_all(tokenizer))
    teacher_unet, teacher_phases = train_teacher(work, settings, device, states, (moments, scenes))
    save_teacher(teacher_unet, work / "teacher")
    latents = (moments, scenes)
    unet, lcm_phases = train_lcm(work, settings, device, states, latents, teacher_unet)

    pairs = load_split("evaluation")
    parts = {"tokenizer": tokenizer, "text_encoder": text_encoder, "vae": vae, "factor": factor}
    taught = sample_teacher(pairs, **parts, unet=teacher_unet, guidance=settings.teacher_guidance)
    pipeline = assemble_pipeline(**parts, unet=unet)
    figures: dict[str, Any] = {
        "guidance": DEFAULT_GUIDANCE,
        "pairs": len(pairs),
        "vae_round_trip": measure_vae(vae, 500, settings.seed),
        "teacher_25_steps": share_right(taught, [pair.prompt for pair in pairs]),
        **measure_lcm(pipeline, pairs),
    }
    print(f"figures: {figures}", flush=True)
    phases = [*vae_phases, *teacher_phases, *lcm_phases]
    log = make_log(settings, phases, figures, notes=())
    export(pipeline, out, card=write_card(log), log=log)


def measure_lcm(
    pipeline: LatentConsistencyModelPipeline,
    pairs: Sequence[PromptSeed],
    steps: Sequence[int] = (4, 2, 1),
) -> dict[str, float]:
    """Share of the pairs whose picture shows the whole prompt, for each number of steps.

    The pipeline is the float16 one that is exported, upcast to float32 for a CPU's sake.
    """
    import copy

    import torch

    upcast = copy.deepcopy(pipeline).to(torch.float32)
    prompts = [pair.prompt for pair in pairs]
    return {
        f"lcm_{n}_steps": share_right(
            sample_lcm(upcast, pairs, steps=n, guidance=DEFAULT_GUIDANCE), prompts
        )
        for n in steps
    }


def save_teacher(unet: UNet2DConditionModel, folder: Path) -> None:
    """Keeps the teacher's U-Net, float16: an example of one without guidance embedding."""
    import copy

    import torch

    copy.deepcopy(unet).to(torch.float16).save_pretrained(folder / "unet")


if __name__ == "__main__":
    main()
