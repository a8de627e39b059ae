"""Peak memory of pruning a U-Net of random weights, beside what it may be.

    .venv/bin/python benchmarks/pruning_memory.py [--width 160]
    .venv/bin/python benchmarks/pruning_memory.py --model DIR [--sites 'mid_block*']

The bound is three times the component's fp32 weights plus 2 GB; the process's own libraries are
left out (measured after the network is there and has run once). `--model` takes the U-Net of a
diffusers folder instead, and `--sites` cuts only blocks of these names, in less time: what is held
at once is the network and the largest of its sites.
"""

from __future__ import annotations

import argparse
import resource
import time
from fnmatch import fnmatch
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from diffoundry.compression.pruning import Settings, network_of, prune
from diffoundry.formats.recording import Call
from diffoundry.models.components import load_component
from diffoundry.models.contracts import contract_for
from diffoundry.models.pipeline import open_pipeline
from diffoundry.models.pruning import find_sites
from diffoundry.models.wrappers import Denoiser
from diffoundry.types import Axis, AxisRef, Contract, TensorSpec


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def random_unet(width: int, side: int, text: int) -> tuple[torch.nn.Module, Contract]:
    """A U-Net of three levels with drawn weights, and its contract."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=side, block_out_channels=(width, 2 * width, 4 * width), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text,
    )  # fmt: skip
    batch = AxisRef("batch")
    latent = (batch, 4, side, side)
    contract = Contract(
        "unet",
        (
            TensorSpec("sample", "float32", latent),
            TensorSpec("timestep", "float32", (batch,)),
            TensorSpec("encoder_hidden_states", "float32", (batch, 77, text)),
        ),
        (TensorSpec("model_output", "float32", latent),),
        (Axis("batch", 1, 1, 4),),
    )
    return Denoiser(unet).eval().requires_grad_(False), contract


def unet_of(model: Path, side: int) -> tuple[torch.nn.Module, Contract]:
    """The U-Net of a diffusers folder, and its contract at `side` latent pixels."""
    source = open_pipeline(model)
    pixels = side * source.geometry.vae_factor
    sides = (Axis(n, pixels, pixels, pixels, pixels) for n in ("height", "width"))
    contract = contract_for(source, "unet", (Axis("batch", 1, 1, 1), *sides))
    return load_component(source.components["unet"].folder, "unet"), contract


def drawn_calls(module: torch.nn.Module, contract: Contract, count: int) -> list[Call]:
    """Calls on drawn inputs, and what the network answers."""
    draw, calls = torch.Generator().manual_seed(0), []
    for number in range(count):
        feeds = {
            spec.name: torch.full(spec.shape(contract.opt_shape()), 999.0 / (1 + number))
            if spec.name == "timestep"
            else torch.randn(spec.shape(contract.opt_shape()), generator=draw)
            for spec in contract.inputs
        }
        made = module(*feeds.values()).numpy()
        arrays = {name: value.numpy() for name, value in feeds.items()}
        calls.append(Call(arrays, {"model_output": made}, contract.opt_shape(), ""))
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--width", type=int, default=160, help="channels of the first level")
    parser.add_argument("--side", type=int, default=32, help="latent pixels")
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--model", type=Path, help="a diffusers folder, in place of --width")
    parser.add_argument("--sites", nargs="+", default=[], help="patterns of blocks to cut")
    parser.add_argument("--ratio", type=float, default=0.15)
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.model:
        module, contract = unet_of(options.model, options.side)
    else:
        module, contract = random_unet(options.width, options.side, 256)
    network = network_of(module)
    keep = tuple(
        site.module
        for site in find_sites(network)
        if options.sites and not any(fnmatch(site.module, one) for one in options.sites)
    )
    calls = drawn_calls(module, contract, options.calls)
    weights = 4 * sum(p.numel() for p in network.parameters()) / 2**20
    start, started = peak_mb(), time.perf_counter()
    made = prune(module, contract, calls, calls[:1], Settings(options.ratio, keep=keep), print)
    used = peak_mb() - start + weights
    before, after = made.parameters
    print(f"{len(made.cuts)} blocks cut, {before / 1e6:.0f} M to {after / 1e6:.0f} M parameters, "
          f"{time.perf_counter() - started:.0f} s")  # fmt: skip
    print(f"weights {weights:.0f} MB; peak of pruning {used:.0f} MB, weights included; allowed "
          f"{3 * weights + 2048:.0f} MB; peak of the process {peak_mb():.0f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
