"""How cost grows: a build's seconds and peak memory with parameters, an engine's with pixels.

    .venv/bin/python benchmarks/growth.py [--widths 112 320] [--profile onnx-cpu] [--sides 256 …]
        [--stages-only] [--engine DIR] [--out docs]

Builds the shipped model and models of Stable Diffusion 1.5's shape at each width from an empty
store, one component (`--component`, the U-Net by default); then one engine of the largest model is
called at each side. Writes growth.json and growth.svg. What was measured before is kept: a model or
a side that is in growth.json already is not measured again (`--again` does).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from growth_chart import Panel, draw
from make_sd15_lcm import ROOT, make
from real_size_build import built
from stages_alone import Row, run_stages

from diffoundry.embedded import SHAPES_LCM
from diffoundry.formats.torch_module import read_headers
from diffoundry.models.pipeline import open_pipeline

GB = 1e9
HERE = Path(__file__).parent


def parameters_of(model: Path, component: str) -> int:
    """Numbers in the weights of a component's folder."""
    headers = read_headers(open_pipeline(model).components[component].folder)
    sizes = (header.shape for header in headers.values())
    return sum(_product(shape) for shape in sizes)


def _product(shape: Sequence[int]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found


def measure_build(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of each stage of one component's build, and of the whole."""
    scratch = Path(tempfile.mkdtemp(prefix="growth-", dir=ROOT.parent))
    try:
        if options.stages_only:
            rows = list(run_stages(str(model), [options.profile], [options.component], scratch, 2,
                                   False, _say))  # fmt: skip
        else:
            rows = list(built(str(model), options.profile, [options.component], "", scratch))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    problems = [row.problem for row in rows if row.problem]
    if problems:
        sys.exit(f"{model}: {problems[0]}")
    stages = {_name(row): {"seconds": row.seconds, "peak_bytes": row.peak_memory_bytes}
              for row in rows if row.stage != "the whole build"}  # fmt: skip
    return {
        "parameters": parameters_of(model, options.component),
        "seconds": sum(one["seconds"] or 0.0 for one in stages.values()),
        "peak_bytes": max(one["peak_bytes"] or 0 for one in stages.values()),
        "stages": stages,
    }


def _name(row: Row) -> str:
    return f"{row.component}:{row.stage}" + (f":{row.precision}" if row.precision else "")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measure_engine(model: Path, folder: Path, side: int, calls: int) -> dict[str, Any]:
    """Median seconds of a call of the U-Net's engine at `side` pixels, and its process's peak."""
    order = {"kind": "engines", "name": "engine", "model": str(model.resolve()), "what": ["unet"],
             "engines": {"unet": str(folder.resolve())}, "threads": 2, "side": side,
             "steps": 4}  # fmt: skip
    lines = [{"open": order}, *({"call": "unet", "number": n} for n in range(calls + 1)),
             {"memory": True}]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "ours.py"], cwd=HERE / "peers", capture_output=True, text=True,
        input="".join(json.dumps(line) + "\n" for line in lines),
    )  # fmt: skip
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    problem = next((one["problem"] for one in answers if "problem" in one), "")
    if problem or len(answers) < len(lines):
        sys.exit(f"engine at {side}: {problem or done.stderr[-400:]}")
    seconds = median(one["seconds"] for one in answers[2:-1])
    return {"pixels": side * side, "seconds": seconds, "peak_bytes": answers[-1]["peak"]}


def panels_of(document: Mapping[str, Any]) -> list[Panel]:
    """Build seconds, build memory, engine seconds."""
    builds = sorted(document["builds"].values(), key=lambda one: float(one["parameters"]))
    calls = sorted(document["engine"].values(), key=lambda one: float(one["pixels"]))
    shared = set.intersection(*(set(one["stages"]) for one in builds)) if builds else set()
    heavy = sorted(shared, key=lambda name: -(builds[-1]["stages"][name]["seconds"] or 0))[:2]
    lines = {"all stages": [(b["parameters"], b["seconds"]) for b in builds]}
    for name in heavy if len(shared) > 2 else []:
        lines[name.partition(":")[2]] = [
            (b["parameters"], max(b["stages"][name]["seconds"], 0.01)) for b in builds
        ]
    panels = [
        Panel("Build, seconds", "parameters", lines, "s"),
        Panel("Build, peak GB of a process", "parameters",
              {"largest stage": [(b["parameters"], b["peak_bytes"] / GB) for b in builds],
               "the weights in fp32": [(b["parameters"], 4 * b["parameters"] / GB) for b in builds],
               }, "GB"),
    ]  # fmt: skip
    if calls:
        pixels = {"U-Net": [(c["pixels"], c["seconds"]) for c in calls]}
        panels.append(Panel("One call, seconds", "pixels", pixels, "s"))
    return panels


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="*", default=[112, 320])
    parser.add_argument("--profile", default="onnx-cpu")
    parser.add_argument("--component", default="unet")
    parser.add_argument("--stages-only", action="store_true", help="no recording, no checks")
    parser.add_argument("--sides", type=int, nargs="*", default=[256, 384, 512, 768, 1024])
    parser.add_argument("--engine", type=Path, help="a U-Net engine of the widest model")
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--again", action="store_true", help="measure what is known already")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs")
    options = parser.parse_args()
    file = options.out / "growth.json"
    document: dict[str, Any] = {"builds": {}, "engine": {}}
    if file.exists() and not options.again:
        document = json.loads(file.read_text())
    document["builds_are"] = f"{options.component}, {options.profile}, " + (
        "stages that make engines" if options.stages_only else "recording and checks included"
    )
    models = {"shapes-lcm": SHAPES_LCM}
    for width in options.widths:
        folder = ROOT / ("sd15-lcm" if width == 320 else f"sd15-lcm-{width}")
        models[folder.name] = make(folder, width=width)
    for name, model in models.items():
        if name not in document["builds"]:
            document["builds"][name] = measure_build(model, options)
            file.write_text(json.dumps(document, indent=1) + "\n")
    for side in options.sides if options.engine else []:
        if str(side) not in document["engine"]:
            last = list(models.values())[-1]
            document["engine"][str(side)] = measure_engine(
                last, options.engine, side, options.calls
            )
            file.write_text(json.dumps(document, indent=1) + "\n")
    note = f"Dashed: growing as fast as the axis below. Builds: {document['builds_are']}."
    chart = draw(panels_of(document), "How cost grows", note)
    (options.out / "growth.svg").write_text(chart)


if __name__ == "__main__":
    main()
