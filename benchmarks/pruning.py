"""What pruning costs the embedded U-Net: every method at equal size, in one table.

    .venv/bin/python benchmarks/pruning.py [--pairs 500] [--ratios 0.15 0.3] [--recover 400]

Judged by the SQNR of the U-Net's output on evaluation calls (dB, mean), and by prompt accuracy at
4 steps. Ranks and fits use the calibration split, sizes the tuning split; no retraining except in
the rows that say so. Writes Markdown to standard output.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from pathlib import Path

import torch
from diffusers import LatentConsistencyModelPipeline

from diffoundry.compression.pruning import Settings, damage_of, prune
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

METHODS = {
    "second order, compensated": {"importance": "second_order", "compensate": True},
    "second order": {"importance": "second_order", "compensate": False},
    "variance, compensated": {"importance": "variance", "compensate": True},
    "L1, compensated": {"importance": "l1", "compensate": True},
    "L1 (torch.nn.utils.prune.ln_structured's order)": {"importance": "l1", "compensate": False},
}


def record(split: str, count: int, folder: Path):
    """The U-Net's calls along the trajectories of the first `count` pairs of a split."""
    source = open_pipeline(SHAPES_LCM)
    axes = native_axes(source, {})
    contracts = {name: contract_for(source, name, axes) for name in COMPONENTS}
    inputs = {
        name: Artifact(ArtifactType("torch_module"), source.components[name].folder, "", name)
        for name in COMPONENTS
    }
    inputs["pipeline_files"] = Artifact(ArtifactType("pipeline_files"), source.path, "")
    pairs = tuple((pair.prompt, pair.seed) for pair in load_split(split)[:count])
    folder.mkdir()
    # Recorded as calibration whichever split it is: floors and swaps are not wanted here.
    stage = Capture("calibration", pairs, guidance=DEFAULT_GUIDANCE, calls_per_component=count,
                    max_calls=4 * count)  # fmt: skip
    made = stage.run(inputs, StageContext(work=folder, contracts=contracts))
    return contracts["unet"], recording.load_component(made["unet"].path).calls


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.15, 0.3])
    parser.add_argument("--recover", type=int, default=400)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
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
              f"| {seconds:.0f} s |", flush=True)  # fmt: skip

    print("| cut | method | U-Net | output SQNR, dB | prompts right | takes |")
    print("|---|---|---|---|---|---|")
    row("original", 0.0, original, 0.0)
    for ratio in options.ratios:
        best = None
        for name, method in METHODS.items():
            unet = copy.deepcopy(original)
            started = time.perf_counter()
            prune(GuidedDenoiser(unet).eval(), contract, calibration, tuning,
                  Settings(ratio, **method))  # fmt: skip
            row(name, ratio, unet, time.perf_counter() - started)
            best = best if best is not None else unet
        if options.recover:
            started = time.perf_counter()
            module = GuidedDenoiser(best).eval()
            recover(module, contract, calibration, options.recover)
            row(f"the first, then {options.recover} steps of distillation", ratio, best,
                time.perf_counter() - started)  # fmt: skip


if __name__ == "__main__":
    main()
