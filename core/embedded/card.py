"""The model card of `shapes-lcm`, filled in from its training log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffoundry.embedded.scenes import COLOURS, SHAPES, SIZES, all_scenes

_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# shapes-lcm

A Latent Consistency Model of a few million parameters that draws one plain shape on a plain
background, 64x64 pixels, in one to four steps. Diffoundry ships it so that its whole chain can be
tested offline with weights that mean something: `diffoundry.embedded.recogniser` reads colour,
shape, size and background back from a picture, so prompt accuracy falls when compression hurts.

    import torch
    from diffusers import LatentConsistencyModelPipeline
    from diffoundry.embedded import SHAPES_LCM

    pipeline = LatentConsistencyModelPipeline.from_pretrained(SHAPES_LCM, dtype=torch.float32)
    prompt = "a small red circle on a blue background"
    image = pipeline(prompt, num_inference_steps=4, guidance_scale={guidance},
                     height=64, width=64).images[0]

## What it knows
Prompts have one form: "a SIZE COLOUR SHAPE on a COLOUR background", {scenes} in all.

- colours: {colours}
- shapes: {shapes}
- sizes: {sizes}

Anything else in a prompt is outside what it was trained on.

## How good it is
{evaluated} committed prompt and seed pairs (`splits.json`, "evaluation"), guidance {guidance}.
A picture is right when the recogniser reads all four words of its prompt from it; unreadable is
wrong.

{figures}

## Where it comes from
Trained from scratch, from random weights, on scenes drawn by `diffoundry.embedded.scenes`; no other
data and no other model went into it. The command, which needs no network:

    python -m diffoundry.embedded.train --work DIR

{phases}

The seeds are fixed ({seed}), but another machine, another torch, or a resumed run gives other
weights of like quality. Settings, losses and seconds of every phase: `training_log.json`.

{notes}
- **Autoencoder**: AutoencoderKL, factor 4 (latent 4x16x16; with factor 8 the shapes are lost),
  trained with L1 + MSE + {vae_kl} KL; in its second part pixels near an edge weigh more.
- **Text encoder**: CLIPTextModel, trained alone to name the scene from its last positions.
- **Teacher**: UNet2DConditionModel, noise prediction, {empty:.0%} empty prompts, AdamW with a
  one-cycle rate; noisy timesteps are drawn more often in its first part, all alike in its second.
  Averaged weights.
- **Distillation**: latent consistency distillation (Luo et al. 2023) on a grid of {grid} steps,
  guidance drawn from {low} to {high}, pseudo-Huber loss; pairs of neighbouring points are first
  5 grid steps apart, then 2, then 1. Averaged weights. Then once more at a lower rate.
- **Ends**: the student learns where the teacher's guided DDIM trajectories (17 steps) end, from
  pure noise and from its own first answers made noisy again; shapes with fine parts twice as often.

The files hold float16; every network also runs upcast to float32.

## Licence
Apache-2.0.
"""


def write_card(log: Mapping[str, Any]) -> str:
    """The text of README.md beside the weights; `log` is what `export.make_log` returns."""
    settings, figures = log["settings"], log["figures"]
    rows = ["| | right |", "|---|---|"]
    vae = figures.get("vae_round_trip", {})
    named = {
        "fresh scenes through the autoencoder and back": vae.get("right"),
        "teacher, DDIM, 25 steps": figures.get("teacher_25_steps"),
        "shapes-lcm, 4 steps": figures.get("lcm_4_steps"),
        "shapes-lcm, 2 steps": figures.get("lcm_2_steps"),
        "shapes-lcm, 1 step": figures.get("lcm_1_steps"),
    }
    rows += [f"| {name} | {share:.1%} |" for name, share in named.items() if share is not None]
    phases = ["| phase | steps | minutes | last logged loss |", "|---|---|---|---|"]
    for name, phase in log["phases"].items():
        loss = next((r["loss"] for r in reversed(phase["records"]) if "loss" in r), float("nan"))
        minutes = phase["seconds"] / 60
        phases.append(f"| {name} | {phase['steps']} | {minutes:.0f} | {loss:.4f} |")
    notes = "\n".join(f"- {note}" for note in log["notes"])
    return _CARD.format(
        guidance=figures.get("guidance", 3.0),
        evaluated=figures.get("pairs", 500),
        scenes=len(all_scenes()),
        colours=", ".join(COLOURS),
        shapes=", ".join(SHAPES),
        sizes=", ".join(SIZES),
        figures="\n".join(rows),
        phases="\n".join(phases),
        notes=notes,
        seed=settings["seed"],
        vae_kl=settings["vae_kl"],
        empty=settings["teacher_empty_prompts"],
        grid=settings["lcm_grid"],
        low=settings["lcm_guidance_min"],
        high=settings["lcm_guidance_max"],
    )
