"""What the narrow widths of one set of weights cost the embedded U-Net, with and without training.

    .venv/bin/python benchmarks/slimming.py [--pairs 500] [--steps 300] [--no-fit]

The units are ordered on the calibration split; the joint distillation trains on it too. Judged as
in pruning.py. Writes Markdown to standard output.
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
from pruning import record

from diffoundry.compression.importance import DAMPING
from diffoundry.compression.pruning import Settings, damage_of, rank_sites
from diffoundry.compression.slimming import distil, fit_widths, narrow, order_units
from diffoundry.embedded import DEFAULT_GUIDANCE, SHAPES_LCM
from diffoundry.embedded.measure import sample_lcm, share_right
from diffoundry.embedded.prompts import load_split
from diffoundry.models.wrappers import GuidedDenoiser


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--widths", type=float, nargs="+", default=[0.5, 0.75, 1.0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--fit", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--work", type=Path, help="keep the recordings here, and use them again")
    options = parser.parse_args()
    folder = options.work or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    contract, calibration = record("calibration", 32, folder / "calibration")
    _, evaluation = record("evaluation", 16, folder / "evaluation")
    pairs = load_split("evaluation")[: options.pairs]
    pipeline = LatentConsistencyModelPipeline.from_pretrained(SHAPES_LCM, dtype=torch.float32)
    module = GuidedDenoiser(pipeline.unet).eval().requires_grad_(False)
    rankings = rank_sites(module, contract, calibration, Settings(0.5))
    sites = [ranking.site for ranking in rankings]
    order_units(module.network, rankings)

    def rows(name: str) -> None:
        for width in options.widths:
            tried = copy.deepcopy(module)
            narrow(tried.network, sites, width)
            sqnr = -10 * math.log10(damage_of(tried, contract, evaluation))
            pipeline.unet = tried.network
            images = sample_lcm(pipeline, pairs, steps=4, guidance=DEFAULT_GUIDANCE)
            right = share_right(images, [pair.prompt for pair in pairs])
            size = sum(p.numel() for p in tried.parameters())
            print(f"| {width:g} | {name} | {size / 1e6:.2f} M | {sqnr:.1f} | {right:.1%} |",
                  flush=True)  # fmt: skip

    print("| width | weights | U-Net | output SQNR, dB | prompts right |")
    print("|---|---|---|---|---|")
    rows("ordered")
    name = "ordered"
    if options.fit:
        started = time.process_time()
        fit_widths(module, sites, options.widths, contract, calibration, 1.0, DAMPING)
        name += f", fitted together ({time.process_time() - started:.0f} CPU seconds)"
        rows(name)
    started = time.process_time()
    distil(module, sites, options.widths, contract, calibration, options.steps, options.rate)
    seconds = time.process_time() - started
    rows(f"{name}, {options.steps} steps of joint distillation ({seconds:.0f} CPU seconds)")


if __name__ == "__main__":
    main()
