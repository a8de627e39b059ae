"""optimum-intel's own INT8 recipes for a pipeline that it exported. Runs in its environment.

    python quantize_openvino.py SOURCE TARGET hybrid|full [--samples 2]

hybrid: OVWeightQuantizationConfig(bits=8, quant_method="hybrid"), which quantizes what feeds
the U-Net's convolutions, and of the rest the weights; full: OVQuantizationConfig (nncf.quantize)
of U-Net and VAE decoder, SmoothQuant off. Calibrated on drawn inputs: only speed counts here.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import nncf
import numpy as np
from optimum.intel import (
    OVConfig,
    OVDiffusionPipeline,
    OVPipelineQuantizationConfig,
    OVQuantizationConfig,
    OVQuantizer,
    OVWeightQuantizationConfig,
)
from optimum.intel.openvino.quantization import OVCalibrationDataset


def drawn(model: Any, seed: int, side: int) -> dict[str, Any]:
    """One call's inputs for an OpenVINO model of the pipeline: names and ranks are read from it."""
    draw, feeds = np.random.default_rng(seed), {}
    sizes = {"timestep": (), "encoder_hidden_states": (1, 77, 768), "timestep_cond": (1, 256)}
    for port in model.inputs:
        name = port.get_any_name()
        if name == "timestep":
            rank = len(port.get_partial_shape())
            feeds[name] = np.full((1,) * rank, 999 // (1 + seed)).astype(
                port.get_element_type().to_dtype()
            )
        else:
            feeds[name] = draw.standard_normal(sizes.get(name, (1, 4, side, side)), np.float32)
    return feeds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("recipe", choices=["hybrid", "full"])
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--side", type=int, default=64, help="latent pixels")
    options = parser.parse_args()
    pipeline = OVDiffusionPipeline.from_pretrained(options.source, compile=False)
    if options.recipe == "hybrid":
        names: tuple[str, ...] = ("unet",)
        config: Any = OVWeightQuantizationConfig(
            bits=8, quant_method="hybrid", num_samples=options.samples
        )
    else:
        names = ("unet", "vae_decoder")
        each = OVQuantizationConfig(bits=8, num_samples=options.samples, smooth_quant_alpha=-1)
        config = OVPipelineQuantizationConfig(
            dict.fromkeys(names, each), default_config=OVWeightQuantizationConfig(bits=8)
        )
    samples = {
        name: nncf.Dataset([
            drawn(getattr(pipeline, name).model, seed, options.side)
            for seed in range(options.samples)
        ])
        for name in names
    }  # fmt: skip
    quantizer = OVQuantizer(pipeline)
    quantizer.quantize(
        ov_config=OVConfig(quantization_config=config),
        calibration_dataset=OVCalibrationDataset(samples),
        save_directory=options.target,
    )


if __name__ == "__main__":
    main()
