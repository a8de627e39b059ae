"""The `tensorrt_engine` format: an engine built on one host, and the fingerprint of that host.

A folder with `engine.plan` and `fingerprint.json`. It is never part of a manifest: it lies in
the cache of the host that built it, and under `evidence/` of a bundle that was completed there.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from diffoundry.errors import ArtifactError
from diffoundry.formats import canonical

ENGINE_FILE = "engine.plan"
FINGERPRINT_FILE = "fingerprint.json"
REBUILD = "build it anew from the bundle's ONNX: diffoundry verify BUNDLE --complete"


@dataclass(frozen=True)
class Fingerprint:
    """Where an engine was built, and from what.

    `tensorrt`: version of the library. `gpu`, `compute_capability` ("8.9"), `driver` ("CUDA
    13.0", the newest that the driver supports). `build_digest`: of the `tensorrt_build`.
    `version_compatible`: the engine says that newer releases of the same major may run it.
    """

    tensorrt: str
    gpu: str
    compute_capability: str
    driver: str
    build_digest: str
    version_compatible: bool = False


def save(folder: Path, plan: bytes, fingerprint: Fingerprint) -> None:
    """Write an engine and its fingerprint; the fingerprint last, which makes it whole."""
    folder.mkdir(parents=True, exist_ok=True)
    canonical.atomic_write(folder / ENGINE_FILE, plan)
    document = {"engine_digest": canonical.sha256_bytes(plan), "built_on": fingerprint}
    canonical.atomic_write(folder / FINGERPRINT_FILE, canonical.pretty_json(document))


def read_fingerprint(folder: Path) -> Fingerprint:
    """Read the fingerprint beside an engine. Raises ArtifactError."""
    return _read(folder)[0]


def load(folder: Path) -> bytes:
    """The engine's bytes. Raises ArtifactError where they are not those that were saved."""
    _, expected = _read(folder)
    file = canonical.inside(folder, ENGINE_FILE)
    plan = file.read_bytes() if file.is_file() else b""
    found = canonical.sha256_bytes(plan)
    if found != expected:
        raise ArtifactError(
            str(file),
            expected=f"the engine {expected}",
            found=found if plan else "no such file",
            remedy=REBUILD,
        )
    return plan


def _read(folder: Path) -> tuple[Fingerprint, str]:
    """The fingerprint and the digest of the engine that it belongs to. Raises ArtifactError."""
    from pydantic import ValidationError

    file = canonical.inside(folder, FINGERPRINT_FILE)
    try:
        document = json.loads(file.read_bytes())
        built_on = canonical.parse(Fingerprint, document["built_on"])
        return built_on, str(document["engine_digest"])
    except (OSError, ValueError, ValidationError, KeyError, TypeError) as error:
        raise ArtifactError(
            str(file),
            expected="the fingerprint of an engine",
            found=str(error).splitlines()[0][:300],
            remedy=REBUILD,
        ) from error


def validate(folder: Path) -> None:
    """Check that the engine is whole. Raises ArtifactError. It says nothing of this host."""
    load(folder)


def canonicalise(folder: Path) -> None:
    """Nothing to do: an engine is bound to its host, and never compared byte by byte."""


def digest(folder: Path) -> str:
    """Digest of the engine and its fingerprint."""
    return canonical.tree_digest(folder)


def size_bytes(folder: Path) -> int:
    """Size of both files."""
    return canonical.tree_size_bytes(folder)


def refuse_other_host(folder: Path, built: Fingerprint, here: Fingerprint) -> None:
    """Raise ArtifactError where an engine was built on another kind of host than this one."""
    differences = differences_of(built, here)
    if differences:
        raise ArtifactError(
            f"TensorRT engine {folder.name}",
            expected="an engine that was built for this host: "
            + ", ".join(f"{what} {wanted}" for what, _, wanted in differences),
            found=", ".join(f"{what} {found}" for what, found, _ in differences),
            remedy=REBUILD,
        )


def differences_of(built: Fingerprint, here: Fingerprint) -> list[tuple[str, str, str]]:
    """(what, built with, here) of everything that keeps an engine from running here.

    A newer driver runs older engines; a newer TensorRT only those that are version compatible.
    """
    pairs = {
        "GPU": (built.gpu, here.gpu),
        "compute capability": (built.compute_capability, here.compute_capability),
        "build": (built.build_digest, here.build_digest),
    }
    found = [(what, one, other) for what, (one, other) in pairs.items() if one != other]
    if not _runs_on_tensorrt(built, here):
        found.append(("TensorRT", built.tensorrt, here.tensorrt))
    if _numbers(here.driver) < _numbers(built.driver):
        found.append(("driver", built.driver, here.driver))
    return found


def _runs_on_tensorrt(built: Fingerprint, here: Fingerprint) -> bool:
    if built.tensorrt == here.tensorrt:
        return True
    one, other = _numbers(built.tensorrt), _numbers(here.tensorrt)
    return built.version_compatible and one[:1] == other[:1] and one <= other


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
