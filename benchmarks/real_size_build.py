"""Seconds and peak memory of every stage of a build, beside what it may take at the real size.

    .venv/bin/python benchmarks/real_size_build.py [MODEL] --profile onnx-cpu --profile openvino-cpu
        [--component unet] [--memory-budget 8GiB] [--stages-only [--shared]] [--json FILE]

MODEL is the benchmark model of Stable Diffusion 1.5's size by default (`make_sd15_lcm.py`).
`--stages-only` runs the stages that make engines, each in a process of its own, without recording
the original and without checks: what the converters need, in minutes. The bars are for that model's
U-Net; peak memory is the whole process's, libraries included, in GB of 10^9 bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from stages_alone import Row, as_document, run_stages

ROOT = Path(__file__).parent.parent / "build"
MODEL = ROOT / "models" / "sd15-lcm"
GB = 1e9
BARS_GB = {
    ("exported_program_from_torch", ""): 5.0,
    ("onnx_from_exported_program", "fp32"): 5.0,
    ("onnx_from_exported_program", "fp16"): 6.0,
    ("openvino_from_onnx", "fp32"): 6.0,
    ("openvino_from_onnx", "fp16"): 6.0,
    ("coreml_from_exported_program", "fp16"): 7.0,
    ("tflite_from_exported_program", "fp32"): 11.0,
    ("tflite_from_exported_program", "fp16"): 11.0,
    ("quantize_onnx", ""): 9.0,
    ("quantize_fx", ""): 9.0,
    ("quantize_nncf", ""): 9.0,
    ("choose_precision", ""): 9.0,
    ("openvino_from_onnx", "int8"): 9.0,
    ("prune_structured", ""): 9.0,
}
"""(Stage, precision) -> GB of the 860 M U-Net; the fp32 stages also share 75 s."""
DEFAULTS = {"onnx_from_exported_program": "fp32", "tflite_from_exported_program": "fp32",
            "coreml_from_exported_program": "fp32", "openvino_from_onnx": "fp32"}  # fmt: skip


def bar_of(row: Row) -> float | None:
    """What the stage may take in GB, for the U-Net of 860 M parameters."""
    precision = row.precision or DEFAULTS.get(row.stage, "")
    return BARS_GB.get((row.stage, precision)) if row.component == "unet" else None


def built(
    model: str, profile: str, components: Sequence[str], budget: str, scratch: Path
) -> Iterator[Row]:
    """The stages of one whole `diffoundry build` from an empty store, and the build itself."""
    command = [sys.executable, "-m", "diffoundry.cli.main", "build", model, "--profile", profile,
               "--json", "--out", str(scratch / f"bundle-{profile}")]  # fmt: skip
    for component in components:
        command += ["--component", component]
    if budget:
        command += ["--memory-budget", budget]
    cache = {"DIFFOUNDRY_CACHE": str(scratch / f"cache-{profile}")}
    started = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, **cache}, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    try:
        document: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        yield Row(profile, "", "build", "", seconds, None, None, done.stderr[-800:])
        return
    peak = 0
    for stage in document.get("stages", ()):
        found = stage["peak_memory_bytes"]
        peak = max(peak, found or 0)
        problem = (stage.get("error") or {}).get("found", "")
        precision = next((p for p in ("fp16", "int8") if p in stage["id"]), "")
        yield Row(profile, stage["component"] or "pipeline", stage["stage"], precision,
                  stage["seconds"], found, None, problem)  # fmt: skip
    words = "" if done.returncode == 0 else f"exit code {done.returncode}"
    yield Row(profile, "", "the whole build", "", seconds, peak or None, None, words)


def print_table(rows: Sequence[Row]) -> None:
    """Every stage; what is over its bar is marked."""
    table = Table("profile", "component", "stage", "s", "peak GB", "bar GB", "made GB", "")
    for row in rows:
        bar, peak = bar_of(row), row.peak_memory_bytes
        over = " over" if bar and peak and peak / GB > bar else ""
        table.add_row(
            row.profile, row.component, f"{row.stage} {row.precision}".strip(),
            "-" if row.seconds is None else f"{row.seconds:.0f}",
            "-" if peak is None else f"{peak / GB:.2f}{over}",
            "" if bar is None else f"{bar:.0f}",
            "" if row.size_bytes is None else f"{row.size_bytes / GB:.2f}",
            row.problem[:300],
        )  # fmt: skip
    Console(width=170).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(MODEL))
    parser.add_argument("--profile", action="append", default=[])
    parser.add_argument("--component", action="append", default=[])
    parser.add_argument("--memory-budget", default="")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stages-only", action="store_true")
    parser.add_argument("--shared", action="store_true",
                        help="with --stages-only: one process for a component")  # fmt: skip
    parser.add_argument("--scratch", type=Path, help="kept, with what was made (default: not)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    profiles = options.profile or ["onnx-cpu"]
    ROOT.mkdir(exist_ok=True)
    scratch = options.scratch or Path(tempfile.mkdtemp(prefix="real-size-", dir=ROOT))
    scratch.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    try:
        if options.stages_only:
            for row in run_stages(
                options.model, profiles, options.component or ["unet"], scratch, options.threads,
                options.shared, lambda line: print(line, file=sys.stderr, flush=True),
            ):  # fmt: skip
                print(f"  {row.seconds} s, {row.peak_memory_bytes} bytes {row.problem}",
                      file=sys.stderr, flush=True)  # fmt: skip
                rows.append(row)
        else:
            for profile in profiles:
                rows += built(
                    options.model, profile, options.component, options.memory_budget, scratch
                )
    finally:
        if options.scratch is None:
            shutil.rmtree(scratch, ignore_errors=True)
        if options.json:
            options.json.write_text(json.dumps([as_document(row) for row in rows], indent=1) + "\n")
    print_table(rows)


if __name__ == "__main__":
    main()
