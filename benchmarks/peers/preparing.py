"""Makes the peers: two virtual environments, the tools' own exports, and OpenVINO's INT8 recipes.

optimum-onnx 0.1.0 and optimum-intel 2.2.0 want different versions of optimum, so each has its own
environment. Every version in them is pinned; nothing here touches the project's environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
NEEDED = ("unet", "vae_decoder", "text_encoder")


@dataclass(frozen=True)
class Peer:
    """What a peer made: `folder` is empty, and `problem` says why, where it could not."""

    name: str
    kind: str
    python: Path
    folder: Path
    problem: str = ""


def prepare(model: Path, root: Path, say: Callable[[str], None], make: bool = True) -> list[Peer]:
    """Every peer, made in `root` unless it is there already. `make` False: only what is there."""
    onnx, intel = root / "onnx", root / "openvino"
    exported = root / "exports" / model.name
    plans: list[tuple[str, str, Path, Path, Sequence[object]]] = [
        ("optimum-onnx fp32", "ort", onnx, exported / "onnx", (
            "bin/optimum-cli", "export", "onnx", "--model", model, "--task", "text-to-image")),
        ("optimum-intel fp32", "openvino", intel, exported / "openvino", (
            "bin/optimum-cli", "export", "openvino", "--model", model, "--task", "text-to-image",
            "--weight-format", "fp32")),
        ("optimum-intel INT8 hybrid", "openvino", intel, exported / "openvino-hybrid", (
            "bin/python", HERE / "quantize_openvino.py", exported / "openvino", "hybrid")),
        ("optimum-intel INT8 full", "openvino", intel, exported / "openvino-full", (
            "bin/python", HERE / "quantize_openvino.py", exported / "openvino", "full")),
    ]  # fmt: skip
    found = []
    for name, kind, environment, folder, command in plans:
        problem = ""
        if make:
            problem = _environment(environment, say) or _export(environment, folder, command, say)
        elif not folder.is_dir():
            problem = "not made yet"
        found.append(Peer(name, kind, environment / "bin" / "python", folder, problem))
    return found


def _environment(folder: Path, say: Callable[[str], None]) -> str:
    """Make a virtual environment of the pinned versions; why not, or ""."""
    done = folder / "installed"
    if done.exists():
        return ""
    pins = HERE / f"constraints-{folder.name}.txt"
    say(f"{pins.name}: installing")
    shutil.rmtree(folder, ignore_errors=True)
    # No resolution: the list is closed, but for torchvision, which optimum-intel lists and these
    # models do not need (its build for a GPU breaks the import of transformers).
    pip = [str(folder / "bin" / "pip"), "install", "-q", "--no-deps", "-r", str(pins)]
    steps = ([sys.executable, "-m", "venv", str(folder)], pip)
    for step in steps:
        problem = _run(step)
        if problem:
            return f"its environment could not be made: {problem}"
    done.touch()
    return ""


def _export(
    environment: Path, folder: Path, command: Sequence[object], say: Callable[[str], None]
) -> str:
    """Run a tool into a folder beside `folder`, which gets its name when it is whole."""
    if folder.is_dir():
        return ""
    say(f"{folder.name}: {' '.join(Path(str(part)).name for part in command[:3])}")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    program, *rest = (str(one) for one in command)
    if program.endswith("python"):  # quantize_openvino.py SOURCE TARGET RECIPE
        rest = [rest[0], rest[1], str(part), rest[2]]
    else:
        rest = [*rest, str(part)]
    problem = _run([str(environment / program), *rest])
    if not problem:
        part.rename(folder)
    return problem


def _run(command: Sequence[str]) -> str:
    """Why a command failed, in its own last words, or ""."""
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    if done.returncode == 0:
        return ""
    if done.returncode < 0:
        return f"ended by signal {-done.returncode} (memory?)"
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return (lines[-1] if lines else f"exit code {done.returncode}")[:300]


def size_bytes(folder: Path, components: Sequence[str] = NEEDED) -> dict[str, int]:
    """Component -> bytes of its files in an exported pipeline."""
    return {
        name: sum(file.stat().st_size for file in (folder / name).rglob("*") if file.is_file())
        for name in components
    }
