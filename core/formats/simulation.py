"""The simulation kind: what a compressed component computes in PyTorch on a recording's calls.

A folder with `simulation.json` and `tensors.safetensors`: outputs only, in the order of the calls
of the recording that `recording_digest` names. Conversion of a lossy engine is judged against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffoundry.formats import canonical
from diffoundry.formats.arrays import attach, detach, open_tensors
from diffoundry.formats.documents import reading
from diffoundry.types import Array

KIND = "simulation"
SCHEMA = "diffoundry.simulation/1.0"
STRUCTURE_FILE = "simulation.json"
TENSORS_FILE = "tensors.safetensors"


@dataclass(frozen=True)
class Simulation:
    """Outputs by name of every call, and of every shape call, of one recording."""

    recording_digest: str
    calls: tuple[Mapping[str, Array], ...]
    shape_calls: tuple[Mapping[str, Array], ...]


def save(simulation: Simulation, folder: Path) -> None:
    """Write into `folder` (made if absent). The same arrays give the same bytes."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Array] = {}
    structure = detach(simulation, arrays, {})
    save_file(arrays, folder / TENSORS_FILE)
    document = {
        "schema": SCHEMA,
        "tensors_digest": canonical.sha256_file(folder / TENSORS_FILE),
        "simulation": structure,
    }
    (folder / STRUCTURE_FILE).write_bytes(canonical.canonical_json(document))


def load(folder: Path) -> Simulation:
    """Read it back; arrays are paged in as they are used. Raises ArtifactError where damaged."""
    path = canonical.inside(folder, STRUCTURE_FILE)
    with reading("simulation", path, SCHEMA) as document:
        read = open_tensors(canonical.inside(folder, TENSORS_FILE))
        return canonical.parse(Simulation, attach(document["simulation"], read))


def validate(folder: Path) -> None:
    """Check bytes and structure. Raises ArtifactError."""
    load(folder)
    with reading("simulation", canonical.inside(folder, STRUCTURE_FILE), SCHEMA) as document:
        found = canonical.sha256_file(canonical.inside(folder, TENSORS_FILE))
        if found != document["tensors_digest"]:
            raise ValueError(f"{TENSORS_FILE} has the digest {found}")


def digest(folder: Path) -> str:
    """Digest of the folder's contents (it is written canonically)."""
    return canonical.tree_digest(folder)


def size_bytes(folder: Path) -> int:
    """Size of its files."""
    return canonical.tree_size_bytes(folder)
