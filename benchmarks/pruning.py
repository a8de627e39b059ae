"""What pruning costs the embedded U-Net: every method at equal size, in one table.

    .venv/bin/python benchmarks/pruning.py [--pairs 500] [--ratios 0.15 0.3 0.5]

Judged by the SQNR of the U-Net's output on evaluation calls (dB, mean), and by prompt accuracy at
4 steps. Ranks and fits use the calibration split, sizes the tuning split; no retraining except in
the rows that say so. Writes Markdown to standard output.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import tempfile
import time
from pathlib import Path

import torch
from diffusers import LatentConsistencyModelPipeline

from diffoundry.compression.pruning import Settings, cut_down, damage_of, survey
from diffoundry.compression.recovery import recover
from diffoundry.embedded import DEFAULT_GUIDANCE, SHAPES_LCM
from diffoundry.embedded.measure import sample_lcm, share_right
from diffoundry.embedded.prompts import load_split
from diffoundry.formats import recording
from diffoundry.models.contracts import contract_for, native_axes
from diffoundry.models.pipeline import COMPONENTS, open_pipeline
from diffoundry.models.wrappers import GuidedDenoiser
from diffoundry.stages.capture import Capture
from diffoundry.types import Artifact, ArtifactType, StageContext

SECOND, OWN, PLAIN, L1, MERGED = (
    "second order, compensated",
    "second order, compensated by each layer's own output",
    "second order",
    "L1 (as torch.nn.utils.prune.ln_structured ranks)",
    "variance, near-duplicate heads merged",
)
METHODS = {
    SECOND: {"importance": "second_order"},
    PLAIN: {"importance": "second_order", "compensate": False},
    L1: {"importance": "l1", "compensate": False},
    OWN: {"importance": "second_order", "fit_to": "own"},
    MERGED: {"importance": "variance", "compensate": False},
}
RECOVERED = (SECOND, L1)
"""The methods after which a recovery is shown, at the second ratio."""


def record(split: str, count: int, folder: Path):
    """The U-Net's calls along the trajectories of the first `count` pairs of a split."""
    source = open_pipeline(SHAPES_LCM)
    axes = native_axes(source, {})
    contracts = {name: contract_for(source, name, axes) for name in COMPONENTS}
    if (folder / "done").exists():
        return contracts["unet"], recording.load_component(folder / "unet").calls
    inputs = {
        name: Artifact(ArtifactType("torch_module"), source.components[name].folder, "", name)
        for name in COMPONENTS
    }
    inputs["pipeline_files"] = Artifact(ArtifactType("pipeline_files"), source.path, "")
    pairs = tuple((pair.prompt, pair.seed) for pair in load_split(split)[:count])
    folder.mkdir(exist_ok=True)
    # Recorded as calibration whichever split it is: floors and swaps are not wanted here.
    stage = Capture("calibration", pairs, guidance=DEFAULT_GUIDANCE, calls_per_component=count,
                    max_calls=4 * count)  # fmt: skip
    made = stage.run(inputs, StageContext(work=folder, contracts=contracts))
    (folder / "done").touch()
    return contracts["unet"], recording.load_component(made["unet"].path).calls


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.15, 0.3, 0.5])
    parser.add_argument("--recover", type=int, default=200)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--methods", type=int, default=len(METHODS), help="only the first so many")
    parser.add_argument("--work", type=Path, help="keep the recordings here, and use them again")
    options = parser.parse_args()
    folder = options.work or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    contract, calibration = record("calibration", 32, folder / "calibration")
    _, tuning = record("tuning", 8, folder / "tuning")
    _, evaluation = record("evaluation", 16, folder / "evaluation")
    pairs = load_split("evaluation")[: options.pairs]
    pipeline = LatentConsistencyModelPipeline.from_pretrained(SHAPES_LCM, dtype=torch.float32)
    original = pipeline.unet.eval().requires_grad_(False)

    def row(name: str, ratio: float, unet: torch.nn.Module, seconds: float) -> None:
        pipeline.unet = unet
        module = GuidedDenoiser(unet).eval()
        damage = damage_of(module, contract, evaluation)
        sqnr = "exact" if damage == 0 else f"{-10 * math.log10(damage):.1f}"
        images = sample_lcm(pipeline, pairs, steps=4, guidance=DEFAULT_GUIDANCE)
        right = share_right(images, [pair.prompt for pair in pairs])
        size = sum(p.numel() for p in unet.parameters())
        print(f"| {ratio:.0%} | {name} | {size / 1e6:.2f} M | {sqnr} | {right:.1%} "
              f"| {seconds:.0f} |", flush=True)  # fmt: skip

    print("| cut | method | U-Net | output SQNR, dB | prompts right | CPU seconds |")
    print("|---|---|---|---|---|---|")
    row("original", 0.0, original, 0.0)
    for name in list(METHODS)[: options.methods]:
        settings = Settings(0.5, **METHODS[name])
        started = time.process_time()
        whole = GuidedDenoiser(copy.deepcopy(original)).eval()
        found = survey(whole, contract, calibration, tuning, settings)
        surveyed = time.process_time() - started
        for ratio in options.ratios:
            started = time.process_time()
            module = GuidedDenoiser(copy.deepcopy(original)).eval()
            asked = dataclasses.replace(settings, ratio=ratio)
            cut_down(module, contract, calibration, found, asked)
            row(name, ratio, module.network, surveyed + time.process_time() - started)
            if name in RECOVERED and [ratio] == options.ratios[1:2] and options.recover:
                started = time.process_time()
                recover(module, contract, calibration, options.recover, options.rate)
                row(f"{name}, then {options.recover} steps of distillation", ratio,
                    module.network, time.process_time() - started)  # fmt: skip


if __name__ == "__main__":
    main()
