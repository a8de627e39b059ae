"""What decoding in tiles costs and saves: dB against the whole picture at once, seconds, memory.

    .venv/bin/python benchmarks/tiling.py --embedded
    .venv/bin/python benchmarks/tiling.py --engine onnx:FOLDER [--side 1024] [--factor 8]

--embedded decodes what the embedded model's encoder makes of drawn scenes at four times its own
size: one scene enlarged, and sixteen side by side.
--engine takes one decoder's engine (an ONNX or OpenVINO folder) and smooth drawn latents; with
weights that were drawn too, seconds and memory mean something and dB little.
Each row is a process of its own: what it held at most is its peak memory, libraries included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from real_engines import PIXELS, axes_like, make, open_engine, opened

from diffoundry.memory import peak_memory
from diffoundry.sampling import tiling
from diffoundry.sessions import CheckedSession
from diffoundry.types import AxisRef, Contract, TensorSpec


def open_decoder(
    engine: str, factor: int, threads: int, channels: int = 4, least: int = 64
) -> CheckedSession:
    """The decoder "KIND:FOLDER" for pictures of up to four times PIXELS' largest side."""
    kind, _, folder = engine.partition(":")
    batch, height, width = AxisRef("batch"), AxisRef("height"), AxisRef("width")
    sides = (AxisRef("height", divisor=factor), AxisRef("width", divisor=factor))
    latent = TensorSpec("latent", "float32", (batch, channels, *sides))
    image = TensorSpec("image", "float32", (batch, 3, height, width))
    # Tiles in the steps that a pipeline of three halvings has.
    axes = axes_like(least, 4 * PIXELS[2], 8 * factor)
    contract = Contract("vae_decoder", (latent,), (image,), axes)
    return open_engine(opened(Path(folder), kind), contract, threads)


def drawn_latent(height: int, width: int, channels: int = 4) -> Any:
    """Smooth noise of unit size, as latents of pictures are: [1, channels, height, width]."""
    grown = np.random.default_rng(0).standard_normal((1, channels, height // 4 + 3, width // 4 + 3))
    latent = np.repeat(np.repeat(grown, 4, axis=2), 4, axis=3)
    for axis in (2, 3):  # a box of four along each axis
        latent = sum(np.roll(latent, shift, axis) for shift in range(4)) / 4
    latent = latent[:, :, 4 : 4 + height, 4 : 4 + width]
    return np.ascontiguousarray(latent / latent.std(), np.float32)


def embedded_latents() -> dict[str, Any]:
    """Name -> latent [1, 4, 64, 64] of a picture of 256 × 256 pixels, by the embedded encoder."""
    import torch
    from diffusers import AutoencoderKL

    from diffoundry.embedded import SHAPES_LCM
    from diffoundry.embedded.scenes import all_scenes, draw

    vae = AutoencoderKL.from_pretrained(SHAPES_LCM / "vae")
    rng = np.random.default_rng(0)
    every = all_scenes()
    drawn = [draw(every[rng.integers(len(every))], rng) for _ in range(16)]
    rows = [np.concatenate(drawn[start : start + 4], axis=1) for start in range(0, 16, 4)]
    pictures = {
        "sixteen scenes": np.concatenate(rows),
        "one scene, enlarged": drawn[0].repeat(4, axis=0).repeat(4, axis=1),
    }
    found = {}
    for name, picture in pictures.items():
        pixels = torch.from_numpy(picture.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        with torch.no_grad():
            found[name] = vae.encode(pixels).latent_dist.mean.numpy()
    return found


def psnr_db(found: Any, reference: Any) -> float:
    """Against the reference's own largest value, as the parity contract has it."""
    error = float(np.mean((found.astype(np.float64) - reference) ** 2))
    peak = float(np.abs(reference).max())
    return 300.0 if error == 0 else 10 * float(np.log10(peak**2 / error))


def measure(order: dict[str, Any]) -> dict[str, Any]:
    """One decode in this process; the picture goes to order["picture"]."""
    latent = np.load(order["latent"])
    factor = order["factor"]
    tiling.OVERLAP = order["overlap"]
    started = time.perf_counter()
    decoder = open_decoder(order["engine"], factor, order["threads"], latent.shape[1])
    opened_in = time.perf_counter() - started
    tiles = tiling.plan_tiles(decoder, latent.shape, factor, order["tile"])
    seconds = []
    for _ in range(order["rounds"]):
        started = time.perf_counter()
        if tiles is None:
            image = decoder.infer({"latent": latent})["image"]
        else:
            image = tiling.decode_tiles(decoder, latent, tiles)
        seconds.append(time.perf_counter() - started)
    np.save(order["picture"], image)
    cut = "whole" if tiles is None else tiles.described(factor)
    median = float(np.median(seconds))
    return {"cut": cut, "opened": opened_in, "seconds": median, "peak": peak_memory()}


def alone(order: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--order", json.dumps(order)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{order}: exit code {done.returncode}\n{done.stderr[-800:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(engine: str, latent: Any, factor: int, options: argparse.Namespace, work: Path) -> None:
    """Print a row for the whole picture and one for each size of tile."""
    np.save(work / "latent.npy", latent)
    height, width = (side * factor for side in latent.shape[2:])
    print(f"\n{engine.rpartition('/')[2]}, {height} × {width} pixels\n")
    print("| cut | dB against the whole | largest difference / peak | s | × whole | peak GB |")
    print("|---|---|---|---|---|---|")
    whole = None
    for tile in ["off", *options.tiles]:
        order = {
            "engine": engine, "factor": factor, "threads": options.threads, "tile": tile,
            "rounds": options.rounds, "overlap": options.overlap,
            "latent": str(work / "latent.npy"), "picture": str(work / f"{tile}.npy"),
        }  # fmt: skip
        found = alone(order)
        picture = np.load(order["picture"])
        whole = whole or (picture, found["seconds"])
        worst = float(np.abs(picture - whole[0]).max() / np.abs(whole[0]).max())
        difference = f"{psnr_db(picture, whole[0]):.1f} | {worst:.3f}" if tile != "off" else " | "
        seconds, peak = found["seconds"], found["peak"] / 1e9
        cost = f"{seconds:.2f} | {seconds / whole[1]:.2f} | {peak:.2f}"
        print(f"| {found['cut']} | {difference} | {cost} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--embedded", action="store_true")
    parser.add_argument("--engine", help="KIND:FOLDER of a VAE decoder")
    parser.add_argument("--side", type=int, nargs="+", default=[1024], help="height and width")
    parser.add_argument("--factor", type=int, default=8)
    parser.add_argument("--tiles", type=int, nargs="+", default=[640, 512])
    parser.add_argument("--overlap", type=float, default=tiling.OVERLAP)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("build/tiling"))
    parser.add_argument("--latent", type=Path, help="a .npy of latents to decode")
    parser.add_argument("--order", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.order:
        print(json.dumps(measure(json.loads(options.order))))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    if options.embedded:
        from diffoundry.embedded import SHAPES_LCM

        engine = make(SHAPES_LCM, "vae_decoder", options.work, ("onnx",))["onnx"]
        for name, latent in embedded_latents().items():
            print(f"\n{name}:")
            table(f"onnx:{engine.path}", latent, 4, options, options.work)
        return
    height, width = (options.side * 2)[:2]
    latent = np.load(options.latent) if options.latent else drawn_latent(
        height // options.factor, width // options.factor
    )  # fmt: skip
    table(options.engine, latent, options.factor, options, options.work)


if __name__ == "__main__":
    main()
