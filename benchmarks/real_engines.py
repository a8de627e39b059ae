"""Engines of one component at a time, made by the project's own stages, for scripts of real size.

    .venv/bin/python benchmarks/real_engines.py MODEL COMPONENT FOLDER [--kinds onnx openvino]

Writes FOLDER/COMPONENT-onnx and FOLDER/COMPONENT-openvino: fp32, every axis dynamic; of the kind
openvino-bf16 in bfloat16. What is there already is kept. Checks and recordings are left out: they
are what `diffoundry build` is for.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffoundry.building.worker import Request, run_request
from diffoundry.discovery import runtime_named
from diffoundry.formats import canonical
from diffoundry.models.contracts import contract_for
from diffoundry.models.pipeline import PipelineSource, open_pipeline
from diffoundry.sessions import CheckedSession, open_session
from diffoundry.types import Artifact, ArtifactType, Axis, Contract, Session, ShapePolicy

PIXELS = (256, 512, 1024)
"""min, opt and max of height and width."""
BATCH = (1, 1, 4)
DYNAMIC = ShapePolicy()
RUNTIMES = {"onnx": "onnx_session", "openvino": "openvino_session"}
LAST_STAGES: dict[str, tuple[str, ArtifactType, dict[str, Any]]] = {
    "onnx": ("fuse_onnx", ArtifactType("onnx", "fp32", DYNAMIC), {}),
    "openvino": ("openvino_from_onnx", ArtifactType("openvino", "fp32", DYNAMIC), {}),
    "openvino-bf16": (
        "openvino_from_onnx", ArtifactType("openvino", "bf16", DYNAMIC), {"precision": "bf16"},
    ),
}  # fmt: skip
"""As in the profiles onnx-cpu, openvino-cpu and openvino-cpu-bf16."""


def axes_of(source: PipelineSource) -> tuple[Axis, ...]:
    """Batch 1 to 4, sides 256 to 1024 in the steps that the model allows."""
    return axes_like(PIXELS[0], PIXELS[2], source.geometry.pixel_multiple_of)


def axes_like(least: int, largest: int, step: int) -> tuple[Axis, ...]:
    """batch, height and width between these sides in pixels."""
    sides = (Axis(n, least, min(PIXELS[1], largest), largest, step) for n in ("height", "width"))
    return (Axis("batch", *BATCH), *sides)


def contract_of(model: Path, component: str) -> Contract:
    """What `component` of the diffusers folder `model` takes and gives, over `axes_of`."""
    source = open_pipeline(model)
    return contract_for(source, component, axes_of(source))


def feeds_for(contract: Contract, shape: Mapping[str, int], seed: int = 0) -> dict[str, Any]:
    """Inputs of ordinary size: unit normal floats, timesteps of a loop, ids of a vocabulary."""
    import numpy as np

    rng = np.random.default_rng(seed)
    feeds: dict[str, Any] = {}
    for spec in contract.inputs:
        size = spec.shape(shape)
        if spec.dtype == "int64":
            feeds[spec.name] = rng.integers(0, 1000, size)
        elif spec.name == "timestep":
            feeds[spec.name] = np.full(size, 759.0, np.float32)
        else:
            feeds[spec.name] = rng.standard_normal(size, np.float32)
    return feeds


def eager(model: Path, contract: Contract, threads: int = 2) -> Session:
    """The PyTorch original as a session."""
    from diffoundry.models.components import load_component
    from diffoundry.runtimes.torch_eager import OpenedModule

    folder = open_pipeline(model).components[contract.component].folder
    return OpenedModule(load_component(folder, contract.component), contract, "cpu", threads)


def open_engine(engine: Artifact, contract: Contract, threads: int = 2) -> CheckedSession:
    """An engine of `make`, or another of these kinds, by its runtime."""
    runtime = runtime_named(RUNTIMES[engine.type.kind])
    return open_session(runtime, engine, contract, "cpu", threads)


def make(model: Path, component: str, folder: Path, kinds: tuple[str, ...]) -> dict[str, Artifact]:
    """Kind (of `LAST_STAGES`) -> engine in `folder`, made unless it is there."""
    contract = contract_of(model, component)
    missing = [kind for kind in kinds if not (folder / f"{component}-{kind}").is_dir()]
    if missing:
        scratch = folder / f"{component}.part"
        shutil.rmtree(scratch, ignore_errors=True)
        _convert(model, contract, folder, scratch, missing)
        shutil.rmtree(scratch)
    return {kind: opened(folder / f"{component}-{kind}", kind) for kind in kinds}


def opened(path: Path, kind: str) -> Artifact:
    """The engine in `path` as a dynamic artifact. Its digest is of no use here: "sha256:"."""
    return Artifact(LAST_STAGES[kind][1], path, "sha256:")


def _convert(
    model: Path, contract: Contract, folder: Path, scratch: Path, kinds: list[str]
) -> None:
    source = open_pipeline(model).components[contract.component].folder
    program = _stage(
        "exported_program_from_torch", contract, scratch / "program",
        {"module": Artifact(ArtifactType("torch_module"), source, "sha256:")},
        "program", ArtifactType("exported_program", "fp32"),
    )  # fmt: skip
    plain = _stage(
        "onnx_from_exported_program", contract, scratch / "plain",
        {"program": program}, "model", ArtifactType("onnx", "fp32", DYNAMIC),
    )  # fmt: skip
    shutil.rmtree(program.path)
    for kind in kinds:
        stage, engine, settings = LAST_STAGES[kind]
        made = _stage(stage, contract, scratch / kind, {"model": plain}, "model", engine, settings)
        made.path.rename(folder / f"{contract.component}-{kind}")


def _stage(
    name: str,
    contract: Contract,
    work: Path,
    inputs: dict[str, Artifact],
    output: str,
    kind: ArtifactType,
    settings: Mapping[str, Any] | None = None,
) -> Artifact:
    work.mkdir(parents=True)
    request = Request(
        name,
        dict(settings or {}),
        inputs,
        {output: kind},
        work,
        contract.component,
        {contract.component: contract},
    )
    answer = run_request(request, lambda line: None)
    made = answer.outputs[output]
    print(f"{contract.component} {name}: {answer.seconds:.0f} s, "
          f"peak {answer.peak_memory_bytes / 2**30:.1f} GiB", file=sys.stderr)  # fmt: skip
    return Artifact(kind, made.path, made.digest, contract=made.contract)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("component")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=LAST_STAGES, default=["onnx", "openvino"])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for kind, engine in make(
        options.model, options.component, options.folder, tuple(options.kinds)
    ).items():
        size = canonical.tree_size_bytes(engine.path) / 2**20
        print(f"{kind}: {engine.path} ({size:.0f} MB)")


if __name__ == "__main__":
    main()
