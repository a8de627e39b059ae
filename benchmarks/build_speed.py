"""Times `diffoundry build` from an empty store, again, and after one U-Net option changed.

.venv/bin/python benchmarks/build_speed.py [--profile onnx-cpu] [--model DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from diffoundry.profiles.reading import shipped_profiles


def with_changed_unet(profile: str) -> str:
    """The profile's text with another opset for the U-Net alone."""
    text = shipped_profiles()[profile].read_text()
    route = text[text.index("route = [") : text.index("]", text.index("route = [")) + 1]
    changed = route.replace("route = [", "unet = [").replace("opset = 18", "opset = 19")
    return f"{text}\n[variants.component_routes]\n{changed}\n"


def timed_build(arguments: list[str], cache: Path) -> tuple[float, dict[str, Any]]:
    """Wall-clock seconds of one build process, and its `--json` document."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "diffoundry.cli.main", "build", *arguments, "--json"],
        env={**os.environ, "DIFFOUNDRY_CACHE": str(cache)},
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(done.stderr + done.stdout)
    return seconds, json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="onnx-cpu")
    parser.add_argument("--model", default=None)
    options = parser.parse_args()
    model = [options.model] if options.model else []
    table = Table("build", "seconds", "stages run", "which", "peak MB of a process")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        changed = folder / "changed.toml"
        changed.write_text(with_changed_unet(options.profile))
        runs = [
            ("from an empty store", options.profile),
            ("again", options.profile),
            ("after changing a U-Net option", str(changed)),
        ]
        for title, profile in runs:
            arguments = [*model, "--profile", profile, "--out", str(folder / "bundle")]
            seconds, document = timed_build(arguments, folder / "cache")
            made = [stage for stage in document["stages"] if stage["status"] == "done"]
            peak = max((stage["peak_memory_bytes"] for stage in made), default=0)
            which = ", ".join(f"{s['component'] or 'pipeline'}:{s['stage']}" for s in made)
            table.add_row(
                title,
                f"{seconds:.1f}",
                str(len(made)),
                which if len(made) < 8 else "all",
                f"{peak / 1e6:.0f}" if made else "-",
            )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
