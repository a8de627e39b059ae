"""What each shape costs at the real size: seconds a call, per pixel, and peak memory.

    .venv/bin/python benchmarks/shapes.py [--model DIR] [--engines DIR] [--component unet ...]
        [--shapes 1x256x256 1x512x512 ...] [--eager 1x512x512 ...] [--kinds onnx openvino]

Engines are DIR/COMPONENT-onnx and DIR/COMPONENT-openvino, made there unless they are; the model is
made by make_sd15_lcm.py. Every row is a process of its own (peak memory is all it held, libraries
included): it opens the engine, calls it once, and then `--rounds` times. Processor seconds are of
all threads: steadier on a machine that others use, so ratios are taken of them. Where PyTorch ran
too, the last column is the largest difference from it, as a share of its largest value.
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
from make_sd15_lcm import ROOT, make as make_model
from real_engines import contract_of, eager, feeds_for, make, open_engine, opened

from diffoundry.memory import peak_memory

SHAPES = ["1x256x256", "1x512x512", "1x512x768", "1x768x768", "1x1024x1024", "4x256x256",
          "2x512x512", "4x512x512"]  # fmt: skip


def axis_values(shape: str) -> dict[str, int]:
    """ "2x512x768" -> batch, height and width in pixels."""
    batch, height, width = (int(part) for part in shape.split("x"))
    return {"batch": batch, "height": height, "width": width}


def measure(order: dict[str, Any]) -> dict[str, Any]:
    """Open one contender in this process and call it at one shape."""
    contract = contract_of(Path(order["model"]), order["component"])
    feeds = feeds_for(contract, axis_values(order["shape"]))
    started = time.perf_counter()
    if order["kind"] == "eager":
        session: Any = eager(Path(order["model"]), contract, order["threads"])
    else:
        engine = opened(Path(order["engine"]), order["kind"])
        session = open_engine(engine, contract, order["threads"])
    opened_in = time.perf_counter() - started
    seconds, processor = [], []
    for _ in range(1 + order["rounds"]):
        started, used = time.perf_counter(), time.process_time()
        outputs = session.infer(feeds)
        seconds.append(time.perf_counter() - started)
        processor.append(time.process_time() - used)
    np.save(order["output"], next(iter(outputs.values())))
    later = slice(1, None) if order["rounds"] else slice(None)
    found = {"seconds": seconds[later], "processor": processor[later]}
    medians = {name: float(np.median(values)) for name, values in found.items()}
    return {"opened": opened_in, **medians, "peak": peak_memory()}


def alone(order: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a fresh process, or {"problem": …} where it died."""
    command = [sys.executable, __file__, "--order", json.dumps(order)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"problem": f"exit code {done.returncode}: {done.stderr.strip()[-300:]}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(options: argparse.Namespace, component: str, work: Path) -> None:
    """Print one table: each shape by each contender."""
    print(f"\n{component}, {options.threads} threads\n")
    columns = (
        "shape", "contender", "s a call", "processor s", "× eager", "µs a pixel", "peak GB", "off",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for shape in options.shapes:
        values = axis_values(shape)
        pixels = values["batch"] * values["height"] * values["width"]
        original: tuple[float, Any] | None = None
        for kind in [*(["eager"] if shape in options.eager else []), *options.kinds]:
            order = {
                "model": str(options.model), "component": component, "kind": kind, "shape": shape,
                "engine": str(options.engines / f"{component}-{kind}"), "rounds": options.rounds,
                "threads": options.threads, "output": str(work / f"{kind}.npy"),
            }  # fmt: skip
            found = alone(order)
            if "problem" in found:
                print(f"| {shape} | {kind} | {found['problem']} | | | | | |", flush=True)
                continue
            output = np.load(order["output"])
            if kind == "eager":
                original = (found["processor"], output)
            ratio = off = ""
            if original is not None and kind != "eager":
                ratio = f"{found['processor'] / original[0]:.2f}"
                off = f"{np.abs(output - original[1]).max() / np.abs(original[1]).max():.1e}"
            used, peak = found["processor"], found["peak"] / 1e9
            cost = f"{used:.2f} | {ratio} | {used / pixels * 1e6:.1f} | {peak:.2f} | {off}"
            print(f"| {shape} | {kind} | {found['seconds']:.2f} | {cost} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "sd15-lcm")
    parser.add_argument("--engines", type=Path, default=ROOT.parent / "real-size")
    parser.add_argument("--component", nargs="+", default=["unet", "vae_decoder"])
    parser.add_argument("--kinds", nargs="*", default=["onnx", "openvino"])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="BxHxW")
    parser.add_argument("--eager", nargs="*", default=["1x512x512"], metavar="BxHxW")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--order", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.order:
        print(json.dumps(measure(json.loads(options.order))))
        return
    make_model(options.model)
    options.engines.mkdir(parents=True, exist_ok=True)
    work = options.engines / "outputs"
    work.mkdir(exist_ok=True)
    for component in options.component:
        missing = [k for k in options.kinds if not (options.engines / f"{component}-{k}").exists()]
        if missing:
            make(options.model, component, options.engines, tuple(options.kinds))
        rows(options, component, work)


if __name__ == "__main__":
    main()
