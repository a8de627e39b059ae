"""Peak memory of pruning a U-Net of random weights, beside what it may be.

    .venv/bin/python benchmarks/pruning_memory.py [--width 160]

The bound is three times the component's fp32 weights plus 2 GB; the process's own libraries are
left out (measured after the network is there and has run once).
"""

from __future__ import annotations

import argparse
import resource

import torch
from diffusers import UNet2DConditionModel

from diffoundry.compression.pruning import Settings, prune
from diffoundry.formats.recording import Call
from diffoundry.models.wrappers import Denoiser
from diffoundry.types import Axis, AxisRef, Contract, TensorSpec


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--width", type=int, default=160, help="channels of the first level")
    parser.add_argument("--side", type=int, default=32, help="latent pixels")
    parser.add_argument("--calls", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    text, side, width = 256, options.side, options.width
    unet = UNet2DConditionModel(
        sample_size=side, block_out_channels=(width, 2 * width, 4 * width), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text,
    )  # fmt: skip
    module = Denoiser(unet).eval().requires_grad_(False)
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
    calls = []
    for number in range(options.calls):
        feeds = {
            "sample": torch.randn(1, 4, side, side),
            "timestep": torch.tensor([999.0 / (1 + number)]),
            "encoder_hidden_states": torch.randn(1, 77, text),
        }
        made = module(*feeds.values()).numpy()
        arrays = {name: value.numpy() for name, value in feeds.items()}
        calls.append(Call(arrays, {"model_output": made}, {"batch": 1}, ""))
    weights = 4 * sum(p.numel() for p in unet.parameters()) / 2**20
    start = peak_mb()
    prune(module, contract, calls, calls[:1], Settings(0.15), print)
    used = peak_mb() - start + weights
    print(f"weights {weights:.0f} MB; peak of pruning {used:.0f} MB, weights included; "
          f"allowed {3 * weights + 2048:.0f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
