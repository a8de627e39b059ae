"""Trains `shapes-lcm` from nothing: `python -m diffoundry.embedded.train --work DIR [--out DIR]`.

Five phases, each resumable: the autoencoder, the teacher (an ordinary latent diffusion
model, after its text encoder), the distillation to few steps, its completion on the ends of the
teacher's trajectories, the export. Needs torch, diffusers and transformers; no network. On two CPU
cores with AMX it takes about two and a half hours.

    python -m diffoundry.embedded.train --work DIR --student MODEL --teacher UNET

does the last two only, from a student (a whole pipeline) and its teacher's U-Net.
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
from diffoundry.embedded.train_ends import train_ends
from diffoundry.embedded.train_lcm import Distillation, train_lcm
from diffoundry.embedded.train_teacher import (
    encode_prompts,
    prepare_for_training,
    tokenize_all,
    train_teacher,
    train_text_encoder,
)
from diffoundry.embedded.train_vae import encode_cache, train_vae
from diffoundry.embedded.training import Settings, read_json
from diffoundry.embedded.vocabulary import build_tokenizer

if TYPE_CHECKING:
    from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and runs the phases that are not done yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--out", type=Path, default=SHAPES_LCM)
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument("--student", type=Path, help="a pipeline to go on from")
    parser.add_argument("--teacher", type=Path, help="the U-Net that it was distilled from")
    for item in dataclasses.fields(Settings):
        if item.name.endswith("_steps"):
            flag = f"--{item.name.replace('_', '-')}"
            parser.add_argument(flag, type=int, default=item.default)
    options = vars(parser.parse_args(arguments))
    steps = {name: options[name] for name in options if name.endswith("_steps")}
    settings = dataclasses.replace(Settings(), **steps)
    if (options["student"] is None) != (options["teacher"] is None):
        parser.error("--student and --teacher belong together")
    if options["student"] is None:
        train(options["work"], options["out"], settings, options["device"])
    else:
        complete(options["work"], options["out"], settings, options["student"], options["teacher"],
                 options["device"])  # fmt: skip


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
    distillation = Distillation(settings, device, teacher_unet, states, moments, scenes)
    student, lcm_phases = train_lcm(work, settings, distillation)
    unet, ends = train_ends(work, settings, distillation, student)
    parts = {"tokenizer": tokenizer, "text_encoder": text_encoder, "vae": vae, "factor": factor}
    phases = [*vae_phases, *teacher_phases, *lcm_phases, ends]
    pairs = load_split("evaluation")
    taught = sample_teacher(pairs, **parts, unet=teacher_unet, guidance=settings.teacher_guidance)
    figures = {
        "vae_round_trip": measure_vae(vae, 500, settings.seed),
        "teacher_25_steps": share_right(taught, [pair.prompt for pair in pairs]),
    }
    finish(out, parts, unet, make_log(settings, phases, figures, notes=()))


def complete(
    work: Path, out: Path, settings: Settings, student: Path, teacher: Path, device: str = "cpu"
) -> None:
    """Runs the last two phases from a student's pipeline folder and its teacher's U-Net folder.

    What the student's own training log says of the phases before, and of the autoencoder and the
    teacher, is kept.
    """
    import torch
    from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel

    work.mkdir(parents=True, exist_ok=True)
    former = LatentConsistencyModelPipeline.from_pretrained(student, dtype=torch.float32)
    former.to(device)
    guide = UNet2DConditionModel.from_pretrained(teacher, dtype=torch.float32).to(device)
    prepare_for_training(guide.requires_grad_(False))
    states = encode_prompts(former.text_encoder, tokenize_all(former.tokenizer))
    # These two phases draw no scenes: they start from noise alone.
    nothing = torch.zeros(1, 2, 4, 16, 16), torch.zeros(1, dtype=torch.long)
    distillation = Distillation(settings, device, guide, states, *nothing)
    unet, ends = train_ends(work, settings, distillation, former.unet)
    told = read_json(student / "training_log.json")
    kept = {name: told["figures"][name] for name in ("vae_round_trip", "teacher_25_steps")}
    log = make_log(settings, [ends], kept, notes=told["notes"])
    log["settings"] = {**log["settings"], **told["settings"]}
    log["phases"] = {**told["phases"], **log["phases"]}
    parts = {
        "tokenizer": former.tokenizer,
        "text_encoder": former.text_encoder,
        "vae": former.vae,
        "factor": former.vae.config.scaling_factor,
    }
    finish(out, parts, unet, log)


def finish(
    out: Path, parts: dict[str, Any], unet: UNet2DConditionModel, log: dict[str, Any]
) -> None:
    """Measures the finished networks on the evaluation pairs, once, and exports them to `out`.

    `parts` are what `assemble_pipeline` takes beside the U-Net.
    """
    pairs = load_split("evaluation")
    pipeline = assemble_pipeline(**parts, unet=unet)
    log["figures"] |= {
        "guidance": DEFAULT_GUIDANCE,
        "pairs": len(pairs),
        **measure_lcm(pipeline, pairs),
    }
    print(f"figures: {log['figures']}", flush=True)
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
