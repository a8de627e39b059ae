"""Engines of this host: built once for a build and a GPU, kept in Diffoundry's cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from diffoundry.errors import ArtifactError
from diffoundry.folders import cache_root
from diffoundry.formats import canonical, tensorrt_build, tensorrt_engine
from diffoundry.formats.tensorrt_engine import Fingerprint
from diffoundry.runtimes.tensorrt.builder import build_engine
from diffoundry.runtimes.tensorrt.driver import Gpu
from diffoundry.types import Artifact


def cache_folder() -> Path:
    """Where engines and the timings of earlier builds are kept on this machine."""
    return cache_root() / "tensorrt"


def fingerprint_here(artifact: Artifact, trt: Any, gpu: Gpu) -> Fingerprint:
    """The fingerprint that an engine of `artifact`, a `tensorrt_build`, gets on this host."""
    spec = tensorrt_build.read_spec(artifact.path)
    return Fingerprint(
        tensorrt=str(trt.__version__),
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
        driver=gpu.driver,
        build_digest=artifact.digest or tensorrt_build.digest(artifact.path),
        version_compatible=spec.version_compatible,
    )


def engine_folder(fingerprint: Fingerprint) -> Path:
    """Where the engine with this fingerprint is kept, whether or not it is built."""
    key = canonical.sha256_bytes(canonical.canonical_json(fingerprint))
    return cache_folder() / "engines" / key.removeprefix("sha256:")[:32]


def engine_of(artifact: Artifact, trt: Any, gpu: Gpu) -> tuple[Path, bytes]:
    """The engine of a `tensorrt_build` on this host, built if there is none; folder and bytes.

    Two processes at once build it once. A damaged one is built again. Raises StageError.
    """
    from filelock import FileLock

    fingerprint = fingerprint_here(artifact, trt, gpu)
    folder = engine_folder(fingerprint)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        try:
            tensorrt_engine.refuse_other_host(
                folder, tensorrt_engine.read_fingerprint(folder), fingerprint
            )
            return folder, tensorrt_engine.load(folder)
        except ArtifactError:  # none yet, damaged, or of another host: it is built
            model = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower())
            timings = cache_folder() / f"timings-{trt.__version__}-{model}.cache"
            plan = build_engine(trt, artifact.path, timings)
            tensorrt_engine.save(folder, plan, fingerprint)
            return folder, plan
