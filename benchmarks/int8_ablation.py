"""What each switch of INT8 buys the embedded U-Net, in one table.

    .venv/bin/python benchmarks/int8_ablation.py [--pairs 500] [--judged WORD ...] [--only WORD ...]

Judged by the plan simulator: SQNR of the U-Net's output on evaluation calls (dB, pooled), and
prompt accuracy at 4 steps with the simulated U-Net in the pipeline. Ranges come from the
calibration split. Writes Markdown to standard output. `--only`: rows whose name holds a word;
`--judged`: those of them whose pictures are read back, which takes longest.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import LatentConsistencyModelPipeline
from pruning import record

from diffoundry.compilers.exported_program_from_torch import trace
from diffoundry.compilers.quantize_nncf import QuantizeNncf
from diffoundry.compression.distilling import recover_quantized
from diffoundry.compression.estimating import PlanSettings, complete, draft
from diffoundry.compression.fx_observing import watch_layers
from diffoundry.compression.layers import KEEP, find_layers
from diffoundry.compression.sensitivity import Bench
from diffoundry.compression.simulator import simulated
from diffoundry.compression.smoothing import find_folds, largest_inputs, smooth
from diffoundry.compression.splitting import skip_convolutions, token_layers
from diffoundry.embedded import DEFAULT_GUIDANCE, SHAPES_LCM
from diffoundry.embedded.measure import sample_lcm, share_right
from diffoundry.embedded.prompts import load_split
from diffoundry.formats.quant_plan import QuantPlan
from diffoundry.models.splits import split_convolution, split_first_token
from diffoundry.models.wrappers import GuidedDenoiser

DEFAULT = PlanSettings()
SHORTCUTS = "*conv_shortcut"
TIME = ("*time_embedding.*", "*time_emb_proj")


def keeping(*gone: str, **more) -> PlanSettings:
    """The default settings with these patterns off the keep-list."""
    return PlanSettings(keep=tuple(p for p in KEEP if p not in gone), **more)


class Ablation:
    """Holds the recordings and the original, and makes rows."""

    def __init__(self, pairs: int, calibration: int, evaluation: int, judged: list[str]) -> None:
        self.judged = judged
        folder = Path(tempfile.mkdtemp())
        self.contract, self.calls = record("calibration", calibration, folder / "calibration")
        _, self.evaluation = record("evaluation", evaluation, folder / "evaluation")
        self.pairs = load_split("evaluation")[:pairs]
        self.pipeline = LatentConsistencyModelPipeline.from_pretrained(
            SHAPES_LCM, dtype=torch.float32
        )
        self.original = GuidedDenoiser(self.pipeline.unet.eval().requires_grad_(False)).eval()
        latest = max(float(call.feeds["timestep"].max()) for call in self.calls)
        self.first_step = [c for c in self.calls if float(c.feeds["timestep"].max()) == latest]
        self._seen: dict[tuple[int, int], object] = {}

    def plan(self, settings: PlanSettings, module=None, calls=None) -> QuantPlan:
        """What quantize_fx makes of it (each module is watched once)."""
        module, calls = module or self.original, calls or self.calls
        key = (id(module), len(calls))
        if key not in self._seen:
            kinds = {n: k for n, k in find_layers(module).items() if k != "embedding"}
            program = trace(module, self.contract)
            self._seen[key] = watch_layers(program, self.contract, calls, kinds, True)
        taken, given = self._seen[key]
        layers = draft(module, settings)
        return complete(module, "unet", "quantize_fx", settings, layers, taken, given)

    def nncf(self, **options) -> QuantPlan:
        stage = QuantizeNncf(calls=16, **options)
        layers = draft(self.original, stage)
        static = [layer.module for layer in layers if layer.scheme == "static"]
        program = trace(self.original, self.contract, dynamic=False)
        return stage._plan(self.original, program, self.contract, self.calls, layers, static)

    def changed(self, change: Callable[[GuidedDenoiser], object]) -> GuidedDenoiser:
        module = GuidedDenoiser(copy.deepcopy(self.original.network)).eval()
        change(module)
        return module

    def split_skips(self, module: GuidedDenoiser) -> None:
        for name, channels in skip_convolutions(module.network).items():
            split_convolution(module.network, name, channels)

    def split_tokens(self, module: GuidedDenoiser) -> None:
        for name in token_layers(module.network):
            split_first_token(module.network, name)

    def smoothed(self, alpha: float) -> GuidedDenoiser:
        def change(module: GuidedDenoiser) -> None:
            folds = find_folds(module.network)
            names = [fold.consumers[0] for fold in folds]
            largest = largest_inputs(module.network, module, self.contract, self.calls, names)
            smooth(module.network, folds, largest, alpha)

        return self.changed(change)

    def row(self, name: str, plan: QuantPlan, module=None) -> None:
        module = module or self.original
        sqnr_db = Bench(module, self.contract, self.evaluation).sqnr_db(plan)
        right = "–"
        if any(word in name for word in self.judged):
            self.pipeline.unet = module.network
            with simulated(module, plan):
                images = sample_lcm(self.pipeline, self.pairs, steps=4, guidance=DEFAULT_GUIDANCE)
            right = f"{share_right(images, [pair.prompt for pair in self.pairs]):.1%}"
        count = sum(layer.integer_kernel for layer in plan.layers)
        print(f"| {name} | {count} | {min(sqnr_db, 200):.1f} | {right} |", flush=True)


def rows(a: Ablation, steps: int) -> dict[str, Callable[[str], None]]:
    def plain(settings: PlanSettings, calls=None) -> Callable[[str], None]:
        return lambda name: a.row(name, a.plan(settings, calls=calls))

    def other(settings: PlanSettings, make: Callable[[], GuidedDenoiser]) -> Callable[[str], None]:
        def run(name: str) -> None:
            module = make()
            a.row(name, a.plan(settings, module), module)

        return run

    def split(change: Callable[[GuidedDenoiser], None]) -> Callable[[], GuidedDenoiser]:
        return lambda: a.changed(change)

    def recovered(settings: PlanSettings) -> Callable[[str], None]:
        def run(name: str) -> None:
            module = a.changed(lambda _: None)
            with torch.random.fork_rng(devices=[]):
                plan, _ = recover_quantized(
                    module, a.plan(settings), a.contract, a.calls, steps, 3e-5
                )
            a.row(name, plan, module)

        return run

    nothing = PlanSettings(conv="float", linear="float", embedding="float")
    weights = PlanSettings(conv="weight_only", linear="weight_only")
    everything = PlanSettings(keep=())

    def set_(**options) -> Callable[[str], None]:
        return plain(dataclasses.replace(DEFAULT, **options))

    return {
        "float": plain(nothing),
        "weights only": plain(weights),
        "weights only, MSE scales": plain(dataclasses.replace(weights, weight_ranges="mse")),
        "naive: every layer, ranges of the first step": plain(everything, a.first_step),
        "every layer, ranges of every step": plain(everything),
        "**default**: keep-list, ranges of every step": plain(DEFAULT),
        "default, ranges of the first step": plain(DEFAULT, a.first_step),
        "default, time embedding in INT8 too": plain(keeping(*TIME)),
        "default, conv_shortcut in INT8 too": plain(keeping(SHORTCUTS)),
        "default, conv_shortcut in INT8, split": other(keeping(SHORTCUTS), split(a.split_skips)),
        "default, conv_in and conv_out in INT8 too": plain(keeping("*conv_in", "*conv_out")),
        "default, first token apart": other(DEFAULT, split(a.split_tokens)),
        "default, SmoothQuant 0.5": other(DEFAULT, lambda: a.smoothed(0.5)),
        "default, SmoothQuant 0.8": other(DEFAULT, lambda: a.smoothed(0.8)),
        "default, bias correction": set_(bias_correction=True),
        "default, percentile 99.99": set_(ranges="percentile"),
        "default, percentile 99.9": set_(ranges="percentile", percentile=99.9),
        "default, MSE ranges": set_(ranges="mse"),
        "default, MSE weight scales": set_(weight_ranges="mse"),
        "default, symmetric": set_(symmetric=True),
        "default, outputs on grids too": set_(quantize_outputs=("conv", "linear")),
        "default, linear layers dynamic": set_(linear="dynamic"),
        "default, SmoothQuant 0.5, bias correction, MSE ranges together": other(
            dataclasses.replace(DEFAULT, bias_correction=True, ranges="mse"),
            lambda: a.smoothed(0.5),
        ),
        f"default, {steps} steps of recovery": recovered(DEFAULT),
        f"naive plan, {steps} steps of recovery": recovered(everything),
        "quantize_nncf, its own ranges": lambda name: a.row(name, a.nncf()),
        "quantize_nncf, minmax": lambda name: a.row(name, a.nncf(own_ranges=False)),
        "quantize_nncf, minmax, its bias correction": lambda name: a.row(
            name, a.nncf(own_ranges=False, bias_correction=True)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--calibration", type=int, default=32, help="prompts, of 4 calls each")
    parser.add_argument("--evaluation", type=int, default=16, help="prompts, of 4 calls each")
    parser.add_argument("--steps", type=int, default=200, help="of quantization-aware recovery")
    parser.add_argument("--only", nargs="+", default=[""])
    parser.add_argument("--judged", nargs="+", default=["float", "naive", "**default**"])
    options = parser.parse_args()
    ablation = Ablation(options.pairs, options.calibration, options.evaluation, options.judged)
    print("| switch | layers in INT8 kernels | output SQNR, dB | prompts right |")
    print("|---|---|---|---|", flush=True)
    started = time.perf_counter()
    for name, run in rows(ablation, options.steps).items():
        if any(word in name for word in options.only):
            run(name)
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
