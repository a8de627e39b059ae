"""Peak memory of every stage that builds a compressed U-Net of random weights.

    .venv/bin/python benchmarks/compression_memory.py [--widths 128 256 512] [--profile NAME]

The bound for what quantizes or prunes is three times the component's fp32 weights plus 2 GB; the
figure is the process's own peak, libraries included. The model is made on the fly: its numbers mean
nothing, only their sizes do.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from build_speed import timed_build
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.mini_pipelines import make_pipeline

COMPRESSING = ("quantize", "choose_precision", "prune", "palettize", "simulate")
GIB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", default="onnx-cpu-int8")
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = make_pipeline(
            place / "model", kind="lcm", widths=tuple(options.widths), groups=32, heads=8,
            vae_widths=(32, 32, 32), latent_side=16, text_width=64,
        )  # fmt: skip
        weights = sum(file.stat().st_size for file in (model / "unet").glob("*.safetensors"))
        allowed = 3 * weights + 2 * GIB
        asked = [str(model), "--profile", options.profile, "--component", "unet", "--jobs", "1"]
        seconds, document = timed_build(asked, place / "store")
    table = Table("stage", "seconds", "peak GiB", "allowed GiB")
    for row in document["stages"]:
        if row["component"] in ("unet", None):
            bound = f"{allowed / GIB:.2f}" if row["stage"].startswith(COMPRESSING) else ""
            peak = f"{row['peak_memory_bytes'] / GIB:.2f}"
            table.add_row(row["stage"], f"{row['seconds']:.1f}", peak, bound)
    console = Console()
    console.print(table)
    console.print(f"weights {weights / GIB:.2f} GiB in fp32; the whole build {seconds:.0f} s")


if __name__ == "__main__":
    main()
